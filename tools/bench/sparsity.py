"""2:4 by magnitude: how long it takes beside `polygraphy surgeon prune`, and on what it works.

    python tools/bench/sparsity.py --markdown tools/bench/results/sparsity.md
    python tools/bench/sparsity.py --skip-polygraphy --zoo FOLDER_OF_MODELS

Two networks of the usual shapes are built here with random weights: ResNet-50 (100 MB) and ViT-B
(350 MB). Each tool runs on the same files in a process of its own, in turn; what it made is checked
with numpy on its own account. Then the patterns are imposed on every case of `../shared/cases`, on
the models of this repository, and on those of ``--zoo``: every layer must be thinned, or say why
not, and none may break. Exits with 1 on any finding.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import numpy as np
import onnx
from onnx import helper, numpy_helper
from trial import REPOSITORY, SHARED, table

from onnxprune import io
from onnxprune.errors import OnnxPruneError
from onnxprune.sparsifying import sparsify
from onnxprune.thin import Wish, candidates

T = TypeVar("T")
PATTERNS: Mapping[str, float | None] = {"2:4": None, "1x4": 0.5, "2x2": 0.5, "unstructured": 0.5}
WANTED = {"ResNet-50": 1.5, "ViT-B": 8.0}  # seconds beyond load and save
WANTED_FASTER = 50


# -- two networks ----------------------------------------------------------------------------------


class Builder:
    """Collects nodes and seeded weights."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def weight(self, *shape: int) -> str:
        fan = max(1, int(np.prod(shape[1:])) if len(shape) > 2 else shape[0])
        name = f"w{len(self.weights)}"
        values = self.rng.standard_normal(shape, np.float32) * np.float32(fan**-0.5)
        self.weights.append(numpy_helper.from_array(values, name))
        return name

    def numbers(self, *values: int) -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.array(values, np.int64), name))
        return name

    def add(self, operator: str, *inputs: str, **attributes: object) -> str:
        name = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [name], name=f"n{name}", **attributes))
        return name

    def save(self, output: str, classes: int, path: Path) -> None:
        self.nodes.append(helper.make_node("Identity", [output], ["y"]))
        kind = onnx.TensorProto.FLOAT
        graph = helper.make_graph(
            self.nodes,
            path.stem,
            [helper.make_tensor_value_info("x", kind, ["n", 3, 224, 224])],
            [helper.make_tensor_value_info("y", kind, ["n", classes])],
            self.weights,
        )
        opset = helper.make_opsetid("", 17)
        onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=8), path)


def resnet50(path: Path) -> None:
    """Bottlenecks of 3, 4, 6 and 3, normalisation folded."""
    made = Builder()

    def conv(x: str, read: int, out: int, size: int, stride: int = 1) -> str:
        pad = size // 2
        return made.add(
            "Conv", x, made.weight(out, read, size, size), made.weight(out),
            kernel_shape=[size, size], strides=[stride, stride], pads=[pad] * 4,
        )  # fmt: skip

    x = made.add("Relu", conv("x", 3, 64, 7, 2))
    x = made.add("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    read = 64
    for width, blocks, first in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(blocks):
            stride = first if block == 0 else 1
            h = made.add("Relu", conv(x, read, width, 1))
            h = made.add("Relu", conv(h, width, width, 3, stride))
            h = conv(h, width, 4 * width, 1)
            if block == 0:
                x = conv(x, read, 4 * width, 1, stride)
            read = 4 * width
            x = made.add("Relu", made.add("Add", h, x))
    x = made.add("Flatten", made.add("GlobalAveragePool", x))
    made.save(made.add("Gemm", x, made.weight(1000, read), made.weight(1000), transB=1), 1000, path)


def vit_b(path: Path) -> None:
    """Twelve blocks of width 768."""
    made, width, heads = Builder(), 768, 12
    x = made.add(
        "Conv", "x", made.weight(width, 3, 16, 16), kernel_shape=[16] * 2, strides=[16] * 2
    )
    x = made.add("Reshape", x, made.numbers(0, width, -1))
    x = made.add("Transpose", x, perm=[0, 2, 1])

    def linear(x: str, read: int, out: int) -> str:
        return made.add("Add", made.add("MatMul", x, made.weight(read, out)), made.weight(out))

    def normal(x: str) -> str:
        return made.add("LayerNormalization", x, made.weight(width), made.weight(width))

    for _ in range(12):
        h = made.add(
            "Reshape", linear(normal(x), width, 3 * width), made.numbers(0, 0, 3, heads, 64)
        )
        h = made.add("Transpose", h, perm=[2, 0, 3, 1, 4])
        q, k, v = (made.add("Gather", h, made.numbers(at), axis=0) for at in range(3))
        q, k, v = (made.add("Squeeze", one, made.numbers(0)) for one in (q, k, v))
        scores = made.add("MatMul", q, made.add("Transpose", k, perm=[0, 1, 3, 2]))
        h = made.add("MatMul", made.add("Softmax", scores, axis=-1), v)
        h = made.add("Transpose", h, perm=[0, 2, 1, 3])
        h = made.add("Reshape", h, made.numbers(0, 0, width))
        x = made.add("Add", x, linear(h, width, width))
        h = made.add("Tanh", linear(normal(x), width, 4 * width))
        x = made.add("Add", x, linear(h, 4 * width, width))
    x = made.add("ReduceMean", normal(x), axes=[1], keepdims=0)
    made.save(linear(x, width, 1000), 1000, path)


# -- how long --------------------------------------------------------------------------------------


def ours(model: Path, output: Path, level: str) -> dict[str, object]:
    """One run of the command line in a process of its own: its report, and seconds in all."""
    command = [sys.executable, "-m", "onnxprune", "sparsify", str(model), "-o", str(output)]
    begun = time.perf_counter()
    ran = subprocess.run(
        [*command, "--force", "--json", "--no-xz", "--verify", level],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    found: dict[str, object] = json.loads(ran.stdout)
    return found | {"wall": time.perf_counter() - begun}


def polygraphy(model: Path, output: Path) -> float:
    """Seconds of `polygraphy surgeon prune`, start and all."""
    tool = Path(sys.executable).with_name("polygraphy")
    begun = time.perf_counter()
    subprocess.run(
        [tool, "surgeon", "prune", str(model), "-o", str(output)], check=True, capture_output=True
    )
    return time.perf_counter() - begun


def checked(before: Path, after: Path) -> tuple[int, int, float]:
    """Weights that hold 2:4 along what is summed over, weights of layers, and what they keep of the
    best there is."""
    old, new = (
        {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
        for path in (before, after)
    )
    good = count = 0
    kept = best = 0.0
    for node in onnx.load(before).graph.node:
        if node.op_type not in ("Conv", "Gemm", "MatMul") or node.input[1] not in old:
            continue
        axis = 0 if node.op_type == "MatMul" else 1
        was, now = (np.moveaxis(one[node.input[1]], axis, -1) for one in (old, new))
        count += 1
        if was.shape[-1] % 4:
            continue
        was, now = (np.abs(one).reshape(-1, 4) for one in (was, now))
        if ((now != 0).sum(axis=1) <= 2).all():
            good += 1
            kept += float(now.sum(dtype=np.float64))
            best += float(np.sort(was, axis=1)[:, 2:].sum(dtype=np.float64))
    return good, count, kept / best if best else 0.0


def apart(function: Callable[..., T], *arguments: object) -> T:
    """Call a function in a process of its own: what ours needs is not to be added to theirs."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def timed(folder: Path, *, beside: bool) -> tuple[str, list[str]]:
    """The table of times, and findings."""
    rows, findings = [], []
    for name, build in (("ResNet-50", resnet50), ("ViT-B", vit_b)):
        model, made = folder / f"{name}.onnx", folder / "made.onnx"
        apart(build, model)
        size = f"{model.stat().st_size / 1e6:.0f} MB"
        own = 0.0
        for level in ("none", "full"):
            found = ours(model, made, level)
            seconds: dict[str, float] = found["seconds"]  # type: ignore[assignment]
            beyond = sum(s for stage, s in seconds.items() if stage not in ("load", "save"))
            good, count, share = apart(checked, model, made)
            memory = f"{int(found['peak_memory_bytes']) / 1e6:.0f} MB"  # type: ignore[call-overload]
            if level == "none":
                own = beyond
                if beyond > WANTED[name]:
                    findings.append(f"{name}: {beyond:.2f} s, wanted {WANTED[name]}")
                if abs(share - 1) > 1e-6:
                    findings.append(f"{name}: kept {share:.6f} of the best there is")
            rows.append(
                [name, size, f"onnxprune --verify {level}", f"{beyond:.2f} s",
                 f"{seconds['sparsify']:.2f} s", f"{found['wall']:.1f} s", memory,
                 f"{good} of {count}", f"{share:.6f}"]
            )  # fmt: skip
        if beside:
            wall = polygraphy(model, made)
            good, count, share = apart(checked, model, made)
            rows.append([name, size, "polygraphy surgeon prune", "", "", f"{wall:.1f} s", "",
                         f"{good} of {count}", f"{share:.6f}"])  # fmt: skip
            if wall < WANTED_FASTER * own:
                findings.append(f"{name}: polygraphy {wall:.1f} s is not 50 times {own:.2f} s")
    head = ["network", "file", "tool", "beyond load and save", "the pattern alone", "in all",
            "peak memory", "layers that hold 2:4", "kept of the best"]  # fmt: skip
    return table(head, rows), findings


# -- on what ---------------------------------------------------------------------------------------


def models(zoo: Sequence[Path]) -> Iterator[tuple[str, Path]]:
    """Kind and file of everything to try."""
    for path in sorted((SHARED / "cases" / "onnx").glob("*.onnx")):
        yield "cases", path
    for path in sorted((REPOSITORY / "models").glob("*.onnx")):
        yield "models", path
    for folder in zoo:
        for path in sorted(folder.glob("*.onnx")):
            yield "zoo", path


def tried(path: Path, pattern: str, sparsity: float | None, level: str) -> tuple[str, list[str]]:
    """What became of one model under one pattern, and why each dense layer stays so."""
    try:
        model = io.load(path)
    except OnnxPruneError:
        return "invalid", []
    found = candidates(model, Wish.read(pattern, sparsity))
    reasons = [f"{found.layers[at].node.op_type}: {why}" for at, why in found.why.items()]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "out.onnx")
        try:
            _, report = sparsify(
                model, pattern=pattern, sparsity=sparsity, verify=level, output=output, xz=False
            )
        except OnnxPruneError as error:
            said = str(error)
            if error.exit_code == 3:
                return "no layer", reasons
            return ("not runnable" if "cannot run" in said else f"broken: {said}"), reasons
    assert report.sparsified is not None
    layers = report.sparsified.layers
    silent = [one.node for one in layers if not one.done and not one.why]
    missed = [one.node for one in layers if one.eligible and not one.done]
    if silent or missed:
        return f"broken: {(silent + missed)[0]} is dense without a reason", reasons
    return f"done {sum(one.done for one in layers)} of {len(layers)}", reasons


def everything(zoo: Sequence[Path]) -> tuple[str, list[str]]:
    """The table of what the patterns did to all models, and findings."""
    rows, findings = [], []
    reasons: Counter[str] = Counter()
    for pattern, sparsity in PATTERNS.items():
        counts: dict[str, Counter[str]] = {}
        thin: Counter[str] = Counter()
        for kind, path in models(zoo):
            if kind == "zoo" and pattern != "2:4":
                continue
            status, why = tried(path, pattern, sparsity, "twin")
            count = counts.setdefault(kind, Counter())
            count[status.split(":")[0].split(" ")[0]] += 1
            if status.startswith("done"):
                _, done, _, layers = status.split()
                thin[f"{kind} done"] += int(done)
                thin[f"{kind} layers"] += int(layers)
            if status.startswith("broken"):
                findings.append(f"{path.name}, {pattern}: {status}")
            if pattern == "2:4":
                reasons.update(_kind_of(one) for one in why)
            print(f"{pattern} {path.name}: {status}", file=sys.stderr)
        for kind, count in counts.items():
            rows.append([pattern, kind, *(str(count[s]) for s in
                         ("done", "no", "not", "invalid", "broken")),
                         f"{thin[f'{kind} done']} of {thin[f'{kind} layers']}"])  # fmt: skip
    head = ["pattern", "models", "thinned", "no layer can", "runtime cannot run", "invalid file",
            "broken", "layers"]  # fmt: skip
    why = table(["why layers stay dense under 2:4", "layers"],
                [[name, str(count)] for name, count in reasons.most_common(14)])  # fmt: skip
    return f"{table(head, rows)}\n\n{why}", findings


def _kind_of(reason: str) -> str:
    """A reason without the names and numbers of one layer."""
    import re

    return re.sub(r"\d+", "N", re.sub(r"'[^']*'", "…", reason))


def main() -> int:
    """Run it all; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--skip-polygraphy", action="store_true")
    parser.add_argument("--skip-times", action="store_true")
    parser.add_argument("--zoo", type=Path, nargs="*", default=[])
    parser.add_argument("--markdown", type=Path)
    asked = parser.parse_args()
    text, findings = "", []
    if not asked.skip_times:
        with tempfile.TemporaryDirectory() as folder:
            times, found = timed(Path(folder), beside=not asked.skip_polygraphy)
        text, findings = f"{times}\n\n", found
    tables, found = everything(asked.zoo)
    text, findings = text + tables, findings + found
    text += "\n\n" + ("\n".join(f"- {one}" for one in findings) or "No findings.")
    print(text)
    if asked.markdown:
        note = " ".join(__doc__.split("\n\n")[2].split())
        asked.markdown.write_text(
            f"# 2:4 by magnitude\n\nWritten by `tools/bench/sparsity.py`. {note}\n\n{text}\n",
            "utf-8",
        )
    return bool(findings)


if __name__ == "__main__":
    sys.exit(main())
