"""Accuracy of the networks of `models/` in 16-bit floats and int8, whole and pruned.

    python tools/bench/precision.py --markdown tools/bench/results/precision.md

Top-1 on the labelled images of `models/fashion_test.npz`; calibration sees
`models/fashion_calib.npz`, without labels. 16-bit figures come from the emulation that rounds
after every node; int8 from ONNX Runtime's integer kernels. Where `tensorrt_rtx` can be imported
(wheels tensorrt-rtx-cu12-libs and -bindings 1.7.1; no GPU is needed), every file is parsed and
built there as well.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from onnxprune.data import load_data
from onnxprune.io import load, save
from onnxprune.model import Model
from onnxprune.pipeline import shrink
from onnxprune.quantize.convert import convert
from onnxprune.recipe import QuantizeOptions
from onnxprune.runtime import session

MODELS = Path(__file__).resolve().parents[2] / "models"
CALIBRATION = MODELS / "fashion_calib.npz"
NETWORKS = ("resnet", "vgg", "mobile", "vit")
FORMS: dict[str, dict[str, Any]] = {
    "whole": {},
    "50 % of channels": {"ratio": 0.5},
    "50 % and 2:4": {"ratio": 0.5, "then": "2:4"},
}
TYPES = ("fp16", "bf16", "int8")
ALLOWED = {"fp16": 0.2, "int8": 0.5}  # points that may be lost


def top1(model: Model) -> float:
    """In per cent, on the labelled images."""
    with np.load(MODELS / "fashion_test.npz") as stored:
        images, labels = stored["input"], stored["labels"]
    loaded = session(model)
    (name,), (output, *_) = loaded.inputs, loaded.outputs
    found = [
        loaded.run({name: images[start : start + 500]})[output].argmax(1)
        for start in range(0, len(images), 500)
    ]
    return float(100 * np.mean(np.concatenate(found) == labels))


def trial(trt: Any, path: Path) -> str:
    """What TensorRT-RTX says of a file: built, or its first complaint."""
    logger = trt.Logger(trt.Logger.Severity.INTERNAL_ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        return f"refused: {parser.get_error(0).desc()}"
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    for at in range(network.num_inputs):
        tensor = network.get_input(at)
        shapes = [[size if size > 0 else most for size in tensor.shape] for most in (1, 4, 32)]
        profile.set_shape(tensor.name, *shapes)
    config.add_optimization_profile(profile)
    built = builder.build_serialized_network(network, config)
    return "not built" if built is None else "builds"


def rows(folder: Path, networks: Sequence[str]) -> Iterator[str]:
    """One line for each network and form."""
    try:
        trt = import_module("tensorrt_rtx")
    except ImportError:
        trt = None
    header = ["network", "form", "fp32", *TYPES, "int8 ranges", "weights in kB", "TensorRT-RTX"]
    yield "| " + " | ".join(header) + " |"
    yield "|" + "---|" * len(header)
    beyond: list[str] = []
    for name in networks:
        source = load(MODELS / f"fashion_{name}.onnx")
        data = load_data(CALIBRATION, source)
        for form, options in FORMS.items():
            model = shrink(source, data=data, verify="none", **options)[0] if options else source
            plain = top1(model)
            cells, sizes, said, how = [f"{plain:.2f}"], [], [], ""
            for to in TYPES:
                made = convert(model, QuantizeOptions(to=to), data, data)  # type: ignore[arg-type]  # of TYPES
                reached = top1(made.runs_as or made.model)
                cells.append(f"{reached:.2f}")
                sizes.append(f"{made.found.bytes[1] / 1e3:.0f}")
                how = made.found.method
                if to in ALLOWED and plain - reached > ALLOWED[to] + 1e-9:
                    beyond.append(f"{name}, {form}, {to}")
                path = folder / f"{name}.{to}.onnx"
                save(made.model, path, force=True)
                said.append("not asked" if trt is None else trial(trt, path))
            whole = sum(weight.nbytes for weight in model.weights().values()) / 1e3
            verdict = " / ".join(dict.fromkeys(said))
            yield (
                f"| {name} | {form} | " + " | ".join(cells)
                + f" | {how} | {whole:.0f} → {' / '.join(sizes)} | {verdict} |"
            )  # fmt: skip
    yield ""
    yield "Lost more than allowed (0.2 points in fp16, 0.5 in int8): " + (
        "; ".join(beyond) or "nothing"
    ) + "."  # fmt: skip


def main() -> None:
    """Parse the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--markdown", type=Path, help="file to write")
    parser.add_argument("--only", nargs="+", choices=NETWORKS, default=NETWORKS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        lines = []
        for line in rows(Path(folder), options.only):
            print(line, flush=True)
            lines.append(line)
    if options.markdown is not None:
        text = "# Precision\n\n`tools/bench/precision.py`; top-1 in per cent, weights as stored.\n"
        options.markdown.write_text(text + "\n" + "\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    main()
