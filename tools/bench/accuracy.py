"""Accuracy of the four trained networks of `models/` against what is left of their MACs.

    python tools/bench/accuracy.py --prune-only --markdown tools/bench/results/importance.md
    python tools/bench/accuracy.py --bias --markdown tools/bench/results/bias.md
    python tools/bench/accuracy.py --restored --markdown tools/bench/results/restored.md
    python tools/bench/accuracy.py --sparse --markdown tools/bench/results/sparse_accuracy.md
    python tools/bench/accuracy.py --samples DIR --markdown tools/bench/results/samples.md

Top-1 on the labelled images of `models/fashion_test.npz`, whose 2,000 images give a standard error
of about half a point. Rankings and refits see `models/fashion_calib.npz`, 256 images without
labels. Nothing is trained.
"""

from __future__ import annotations

import argparse
import gzip
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from onnxprune.analyse import analyse
from onnxprune.data import Data, load_data
from onnxprune.errors import OnnxPruneError
from onnxprune.io import load
from onnxprune.model import Model
from onnxprune.pipeline import shrink
from onnxprune.planning import Planner, Wish
from onnxprune.rewrite import operate
from onnxprune.runtime import session
from onnxprune.score import METHODS, Importance, score
from onnxprune.sparsifying import sparsify
from onnxprune.types import AnyArray, Float32Array, Float64Array

MODELS = Path(__file__).resolve().parents[2] / "models"
NETWORKS = ("resnet", "vgg", "mobile", "vit")
SCOPES = ("local", "global", "isomorphic")
TARGETS = (0.9, 0.8, 0.7, 0.5, 0.25)


class Test:
    """Top-1 in per cent on the labelled images."""

    def __init__(self, folder: Path | None = None) -> None:
        """Those of `models/`, or all 10,000 of a folder of Fashion-MNIST's files."""
        if folder is not None:
            self.images = _normalised(_pixels(folder / "t10k-images-idx3-ubyte.gz") / 255)
            raw = gzip.decompress((folder / "t10k-labels-idx1-ubyte.gz").read_bytes())
            self.labels = np.frombuffer(raw, np.uint8, offset=8).astype(np.int64)
            return
        with np.load(MODELS / "fashion_test.npz") as stored:
            self.images, self.labels = stored["input"], stored["labels"]

    def __call__(self, model: Model) -> float:
        loaded = session(model)
        (name,), (output, *_) = loaded.inputs, loaded.outputs
        found = [
            loaded.run({name: self.images[start : start + 500]})[output].argmax(1)
            for start in range(0, len(self.images), 500)
        ]
        return float(100 * np.mean(np.concatenate(found) == self.labels))


def prune_only(
    networks: Sequence[str], targets: Sequence[float], methods: Sequence[str] = METHODS
) -> Iterator[str]:
    """Every ranking and scope, and what `auto` makes of it, with and without data."""
    test = Test()
    header = ["network", "importance", "scope", *(f"MACs {t:g}" for t in targets)]
    yield "| " + " | ".join(header) + " |"
    yield "|" + "---|" * len(header)
    for name in networks:
        model = load(MODELS / f"fashion_{name}.onnx")
        graph, data = analyse(model), load_data(MODELS / "fashion_calib.npz", model)
        yield f"| {name} | uncut | | " + " | ".join([f"{test(model):.1f}"] * len(targets)) + " |"
        for method in methods:
            values = score(graph, method, data=data)
            for scope in SCOPES:
                cells = []
                for target in targets:
                    planner = Planner(graph, Wish(targets={"macs": target}, scope=scope), data)
                    cells.append(accuracy(planner, values, test))
                yield f"| {name} | {method} | {scope} | " + " | ".join(cells) + " |"
        for label, given in (("auto", None), ("auto, data", data)):
            cells = [
                shrunk(
                    model, test, targets={"macs": target}, round_to=1, data=given, restore="none"
                )
                for target in targets
            ]
            yield f"| {name} | {label} | | " + " | ".join(cells) + " |"


def accuracy(planner: Planner, values: Importance, test: Test) -> str:
    """Top-1 of what a ranking leaves, - where the target is out of reach."""
    try:
        return f"{test(operate(planner.plan(values)).model):.1f}"
    except OnnxPruneError:
        return "-"


def shrunk(model: Model, test: Test, **options: object) -> str:
    """Top-1 of what `shrink` makes."""
    try:
        made, _ = shrink(model, verify="none", **options)  # type: ignore[arg-type]  # as given
    except OnnxPruneError:
        return "-"
    return f"{test(made):.1f}"


def restored(networks: Sequence[str]) -> Iterator[str]:
    """Defaults with data: a ratio of every group, and half of the MACs."""
    test = Test()
    header = ["network", "uncut", "cut", "MACs left", "not restored", "refitted", "lost", "s"]
    yield "| " + " | ".join(header) + " |"
    yield "|" + "---|" * len(header)
    wishes: dict[str, dict[str, object]] = {
        "30 % of channels": {"ratio": 0.3},
        "50 % of channels": {"ratio": 0.5},
        "half of the MACs": {"targets": {"macs": 0.5}, "round_to": 1},
    }
    for name in networks:
        model = load(MODELS / f"fashion_{name}.onnx")
        data = load_data(MODELS / "fashion_calib.npz", model)
        uncut = test(model)
        for label, wish in wishes.items():
            plain, _ = shrink(model, verify="none", data=data, restore="none", **wish)  # type: ignore[arg-type]  # as given
            begun = time.perf_counter()
            made, report = shrink(model, verify="none", data=data, **wish)  # type: ignore[arg-type]  # as given
            spent = time.perf_counter() - begun
            assert report.after is not None
            got = test(made)
            yield (
                f"| {name} | {uncut:.2f} | {label} | {report.after.macs / report.before.macs:.2f} "
                f"| {test(plain):.2f} | {got:.2f} | {uncut - got:.2f} | {spent:.1f} |"
            )


def without_data(networks: Sequence[str]) -> Iterator[str]:
    """Defaults without data, and how much of what a cut loses each way to restore gives back."""
    test = Test()
    ways = ("none", "bias", "pictures")
    header = ["network", "uncut", "ranking", "channels cut"]
    header += ["none", "bias", "back", "pictures", "back"]
    yield "| " + " | ".join(header) + " |"
    yield "|" + "---|" * len(header)
    for name in networks:
        model = load(MODELS / f"fashion_{name}.onnx")
        uncut = test(model)
        for ratio in (0.1, 0.2, 0.3):
            _, chosen = shrink(model, ratio=ratio, verify="none")
            ranking = chosen.importance
            none, bias, drawn = (
                test(shrink(model, ratio=ratio, importance=ranking, restore=way, verify="none")[0])
                for way in ways
            )
            yield (
                f"| {name} | {uncut:.1f} | {ranking} | {100 * ratio:.0f} % | {none:.1f} "
                f"| {bias:.1f} | {_back(uncut, none, bias)} "
                f"| {drawn:.1f} | {_back(uncut, none, drawn)} |"
            )


def _back(uncut: float, cut: float, restored: float) -> str:
    """Share of the loss that came back; - where next to nothing was lost."""
    return f"{100 * (restored - cut) / (uncut - cut):.0f} %" if uncut - cut > 1 else "-"


def sparse(networks: Sequence[str]) -> Iterator[str]:
    """2:4 in every layer that can take it, by every method, and behind a cut of channels."""
    test = Test()
    methods = ("magnitude", "wanda", "sparsegpt")
    header = ["network", "dense", *methods, "lost", "s", "30 % of channels", "and 2:4", "lost"]
    yield "| " + " | ".join(header) + " |"
    yield "|" + "---|" * len(header)
    for name in networks:
        model = load(MODELS / f"fashion_{name}.onnx")
        data = load_data(MODELS / "fashion_calib.npz", model)
        dense, cells, spent = test(model), [], 0.0
        for method in methods:
            begun = time.perf_counter()
            made, _ = sparsify(model, method=method, data=data, verify="none")
            spent = time.perf_counter() - begun
            cells.append(test(made))
        cut = test(shrink(model, ratio=0.3, round_to="auto", data=data, verify="none")[0])
        both = test(shrink(model, ratio=0.3, then="2:4", data=data, verify="none")[0])
        yield (
            f"| {name} | {dense:.2f} | " + " | ".join(f"{cell:.2f}" for cell in cells)
            + f" | {dense - cells[-1]:.2f} | {spent:.1f} | {cut:.2f} | {both:.2f} "
            f"| {dense - both:.2f} |"
        )  # fmt: skip


def by_samples(networks: Sequence[str], images: Path) -> Iterator[str]:
    """Half of the channels, refitted to more or fewer training images, and to other things."""
    test = Test()
    sets = {f"{count} images": _training(images, count) for count in (32, 128, 512, 2048)}
    sets |= {"256 pictures of noise": _noise(256), "256 digits": _digits(256)}
    yield "| network | uncut | " + " | ".join(sets) + " | made-up pictures |"
    yield "|---|---|" + "---|" * (len(sets) + 1)
    for name in networks:
        model = load(MODELS / f"fashion_{name}.onnx")
        cells = []
        for label, array in sets.items():
            batches = [{"input": array[at : at + 64]} for at in range(0, len(array), 64)]
            data = Data(batches, label, random=False, samples=len(array))
            cells.append(shrunk(model, test, ratio=0.5, data=data))
        cells.append(shrunk(model, test, ratio=0.5, restore="pictures"))
        yield f"| {name} | {test(model):.1f} | " + " | ".join(cells) + " |"


def _training(images: Path, count: int) -> Float32Array:
    """Training images of Fashion-MNIST, none of them among those of the calibration file."""
    pixels = _pixels(images / "train-images-idx3-ubyte.gz")
    chosen = np.random.default_rng(1).permutation(len(pixels))[:count]
    return _normalised(pixels[chosen] / 255)


def _pixels(path: Path) -> AnyArray:
    """Shape (n, 1, 28, 28)."""
    raw = gzip.decompress(path.read_bytes())
    return np.frombuffer(raw, np.uint8, offset=16).reshape(-1, 1, 28, 28)


def _normalised(pixels: Float64Array) -> Float32Array:
    return ((pixels - 0.2860) / 0.3530).astype(np.float32)


def _noise(count: int) -> Float32Array:
    return np.random.default_rng(1).standard_normal((count, 1, 28, 28)).astype(np.float32)


def _digits(count: int) -> Float32Array:
    """Handwritten digits of scikit-learn, 8 x 8 pixels blown up."""
    from sklearn.datasets import load_digits

    small = load_digits().images[:count] / 16
    large = np.kron(small, np.ones((3, 3)))
    return _normalised(np.pad(large, ((0, 0), (2, 2), (2, 2)))[:, None])


def plotted(rows: Sequence[str], path: Path) -> None:
    """Accuracy against MACs left for each ranking, in its best scope, and for `auto`."""
    from matplotlib import pyplot

    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    shares = [float(title.removeprefix("MACs ")) for title in cells[0][3:]]
    names = list(dict.fromkeys(row[0] for row in cells[2:]))
    figure, axes = pyplot.subplots(1, len(names), figsize=(4 * len(names), 4), sharey=True)
    for axis, name in zip(np.atleast_1d(axes), names, strict=True):
        best: dict[str, list[float]] = {}
        for row in cells[2:]:
            if row[0] == name and row[1] != "uncut":
                values = [float("nan") if v == "-" else float(v) for v in row[3:]]
                old = best.get(row[1], values)
                best[row[1]] = [float(np.fmax(a, b)) for a, b in zip(old, values, strict=True)]
        for method, values in best.items():
            bold = method.startswith("auto")
            axis.plot(shares, values, label=method, linewidth=2.5 if bold else 1, marker=".")
        axis.set(title=name, xlabel="share of MACs left")
        axis.invert_xaxis()
    np.atleast_1d(axes)[0].set_ylabel("top-1, %; not restored")
    np.atleast_1d(axes)[-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> int:
    """Print a table, and write it as it grows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prune-only", action="store_true")
    parser.add_argument("--auto-only", action="store_true", help="leave single rankings out")
    parser.add_argument("--restored", action="store_true")
    parser.add_argument("--sparse", action="store_true", help="2:4, with and without data")
    parser.add_argument("--bias", action="store_true", help="what comes back without data")
    parser.add_argument(
        "--samples", type=Path, metavar="DIR", help="folder of Fashion-MNIST's files"
    )
    parser.add_argument("--plot", type=Path, help="draw what --prune-only found (matplotlib)")
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--targets", default=",".join(map(str, TARGETS)))
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    networks = args.networks.split(",")
    if args.prune_only:
        title = "Ranking, prune only"
        targets = [float(t) for t in args.targets.split(",")]
        made = prune_only(networks, targets, () if args.auto_only else METHODS)
    elif args.bias:
        title, made = "Restored without training and without data", without_data(networks)
    elif args.sparse:
        title, made = "2:4 without training", sparse(networks)
    elif args.samples is not None:
        title, made = "Half of the channels, by data", by_samples(networks, args.samples)
    else:
        title, made = "Restored without training", restored(networks)
    lines = [f"# {title}", "", "`tools/bench/accuracy.py`; top-1 in per cent.", ""]
    for line in made:
        lines.append(line)
        print(line, flush=True)
        if args.markdown is not None:
            args.markdown.write_text("\n".join(lines) + "\n", "utf-8")
    if args.plot is not None:
        plotted(lines[4:], args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
