"""Network Slimming from an ONNX file alone: sparsity training, a global cut by scales, fine-tuning.

    python tools/bench/slimming.py --markdown tools/bench/results/slimming.md
    python tools/bench/slimming.py --images 3000 --epochs 1 --tune 1

A VGG of seven convolutions with BatchNormalization is written here with random weights: no
training framework has seen it. `finetune --l1-bn` trains it on Fashion-MNIST with an L1 penalty on
the scales of BatchNormalization (Liu et al. 2017, arXiv:1708.06519); `shrink --scope global
--importance bn_scale` takes the channels of the smallest scales, anywhere; `finetune` trains what
is left, with labels and the uncut network as its teacher. Beside it the same training without the
penalty, cut and tuned in the same way. Accuracy is that on the 10,000 test images. Needs the Debian
package dataset-fashion-mnist; at the defaults about 50 minutes on two cores.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from fashion import held_out, training
from onnx import helper, numpy_helper
from trial import table

from onnxprune.data import Data
from onnxprune.io import as_model
from onnxprune.model import Model
from onnxprune.pipeline import shrink
from onnxprune.runtime import session
from onnxprune.tuning import finetune

WIDTHS = (16, 32, 64, 64, 96, 96, 96)  # as the VGG of models/
POOLED = (2, 4)  # layers behind which the image is halved
CLASSES = 10
SMALL = 0.01  # scales under this share of the largest
WANTED = 0.2  # points that the slimmed network may lose


def vgg(seed: int = 0) -> Model:
    """The network with random weights; scales start at 0.5, as in the paper."""
    rng = np.random.default_rng(seed)
    nodes, held = [], {}
    x, before = "input", 1
    for number, after in enumerate(WIDTHS, start=1):
        name = f"layer{number}"
        spread = (2 / (9 * before)) ** 0.5  # He et al. 2015
        held[f"{name}.weight"] = spread * rng.standard_normal((after, before, 3, 3))
        held |= {f"{name}.scale": np.full(after, 0.5), f"{name}.bias": np.zeros(after)}
        held |= {f"{name}.mean": np.zeros(after), f"{name}.var": np.ones(after)}
        nodes.append(helper.make_node("Conv", [x, f"{name}.weight"], [f"{name}.c"], pads=[1] * 4))
        norm = [f"{name}.c", *(f"{name}.{one}" for one in ("scale", "bias", "mean", "var"))]
        nodes.append(helper.make_node("BatchNormalization", norm, [f"{name}.n"]))
        nodes.append(helper.make_node("Relu", [f"{name}.n"], [f"{name}.r"]))
        x, before = f"{name}.r", after
        if number in POOLED:
            shape = {"kernel_shape": [2, 2], "strides": [2, 2]}
            nodes.append(helper.make_node("MaxPool", [x], [f"{name}.p"], **shape))
            x = f"{name}.p"
    held["head.weight"] = before**-0.5 * rng.standard_normal((CLASSES, before))
    held["head.bias"] = np.zeros(CLASSES)
    nodes.append(helper.make_node("GlobalAveragePool", [x], ["pooled"]))
    nodes.append(helper.make_node("Flatten", ["pooled"], ["flat"]))
    head = ["flat", "head.weight", "head.bias"]
    nodes.append(helper.make_node("Gemm", head, ["logits"], transB=1))
    value, kind = helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "vgg",
        [value("input", kind, ["batch", 1, 28, 28])],
        [value("logits", kind, ["batch", CLASSES])],
        [numpy_helper.from_array(array.astype(np.float32), name) for name, array in held.items()],
    )
    opsets = [helper.make_opsetid("", 17)]
    return as_model(helper.make_model(graph, opset_imports=opsets, ir_version=8))


def scales(model: Model) -> np.ndarray:
    """All scales of BatchNormalization."""
    weights = model.weights()
    return np.concatenate(
        [
            np.abs(weights[node.input[1]].read())
            for node in model.proto.graph.node
            if node.op_type == "BatchNormalization"
        ]
    )


def accuracy(model: Model) -> float:
    """Per cent of the test images."""
    images, labels = held_out()
    loaded, right = session(model), 0
    for start in range(0, len(images), 500):
        said = loaded.run({"input": images[start : start + 500]})["logits"]
        right += int(np.sum(said.argmax(1) == labels[start : start + 500]))
    return 100 * right / len(images)


def rows(args: argparse.Namespace) -> Iterator[list[str]]:
    """With the penalty, and without."""
    images, labels = training(args.images)
    data = Data([{"input": images}], "training images", random=False, samples=len(images))
    few = Data([{"input": images[:256]}], "256 training images", random=False, samples=256)
    for penalty in (args.l1_bn, 0.0):
        begun = time.monotonic()
        options = {"threads": args.threads, "trainer": args.trainer, "data": data, "labels": labels}
        trained, _ = finetune(
            vgg(), loss="ce", epochs=args.epochs, rate=args.rate, optimizer="sgd", batch_size=128,
            l1_bn=penalty, progress=said, **options,
        )  # fmt: skip
        whole, found = accuracy(trained), scales(trained)
        small = 100 * float(np.mean(found < SMALL * found.max()))
        for ratio in args.cuts:
            cut = {"ratio": ratio, "scope": "global", "importance": "bn_scale", "max_ratio": 0.95}
            plain, _ = shrink(trained, restore="none", verify="none", **cut)
            made, report = shrink(trained, data=few, verify="none", **cut)
            tuned, _ = finetune(
                made, teacher=trained, loss="ce,kd", epochs=args.tune, progress=said, **options
            )
            before, after, done = report.before, report.after, accuracy(tuned)
            assert after is not None
            yield [
                f"{penalty:g}", f"{small:.0f} %", f"{whole:.2f}", f"{100 * ratio:.0f} %",
                f"{100 * after.params / before.params:.0f} %",
                f"{100 * after.macs / before.macs:.0f} %", f"{accuracy(plain):.2f}",
                f"{accuracy(made):.2f}", f"{done:.2f}", f"{done - whole:+.2f}",
                f"{(time.monotonic() - begun) / 60:.0f}",
            ]  # fmt: skip


HEAD = ["L1 of scales", "scales under 1 %", "trained", "channels cut", "params left", "MACs left",
        "cut", "refitted", "tuned", "to trained", "minutes"]  # fmt: skip


def said(line: str) -> None:
    """Progress on a terminal."""
    if sys.stderr.isatty():
        print(f"\r{line:<100}", end="", file=sys.stderr, flush=True)


def main() -> int:
    """Run it all; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--tune", type=int, default=8)
    parser.add_argument("--rate", type=float, default=0.05)
    parser.add_argument("--l1-bn", type=float, default=5e-3)
    parser.add_argument("--cuts", type=float, nargs="*", default=[0.6, 0.7])
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--trainer", default="ort")
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    found, findings = [], []
    for row in rows(args):
        found.append(row)
        print(" | ".join(row), file=sys.stderr, flush=True)
        if float(row[0]) and float(row[-2]) < -WANTED:
            findings.append(f"at {row[3]} of channels {row[-2]} points")
    text = table(HEAD, found)
    text += "\n\n" + ("\n".join(f"- {one}" for one in findings) or "No findings.")
    print(text)
    if args.markdown:
        note = " ".join(__doc__.split("\n\n")[2].split())
        args.markdown.write_text(
            "# Network Slimming from ONNX alone\n\n"
            f"Written by `tools/bench/slimming.py`. {note}\n\n"
            f"{args.images} images, {args.epochs} epochs of sparsity training, {args.tune} of "
            f"fine-tuning.\n\n{text}\n",
            "utf-8",
        )
    return bool(findings)


if __name__ == "__main__":
    sys.exit(main())
