"""How well latency is predicted: of single layers at widths left out of the fit, of whole models.

    python tools/bench/latency.py models/*.onnx resnet50.onnx --markdown results/latency.md
    python tools/bench/latency.py --targets zoo/*.onnx --markdown results/latency_targets.md
    python tools/bench/latency.py --speed

Layers: every layer of every model at a few random widths, predicted from its grid against the same
layer timed alone. Models: cut at several ratios, with and without whole blocks of channels; the
predicted share of the original's time against the measured one, both models timed in turn. One
thread unless --threads says otherwise. --speed prints how many multiply-accumulates a second a
layer reaches by its number of channels. --targets prints how near `shrink --target latency=SHARE`
comes: what it says of its result, and what a measurement says that had no part in choosing it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
from onnx import helper

from onnxprune.alignment import steps
from onnxprune.analyse import analyse
from onnxprune.data import random_data
from onnxprune.errors import TargetError
from onnxprune.extents import Extents, Layer
from onnxprune.groups import DependencyGraph
from onnxprune.io import load
from onnxprune.latency import LatencyTable
from onnxprune.latency_target import Found, LatencyTarget
from onnxprune.planning import Planner, Wish
from onnxprune.rewrite import operate
from onnxprune.score import score
from onnxprune.select import PruningPlan, select
from onnxprune.timing import Peculiarities, compare_timings, measure, time_layers

RATIOS = ((0.1, 1), (0.25, 1), (0.4, 1), (0.5, 1), (0.6, 1), (0.75, 1), (0.3, 16), (0.6, 16))
TARGETS = (0.7, 0.5)
WANTED_LEFT = 0.05  # of the original's time, that a target may be missed by
LEFT_OUT = 3  # random widths of each layer
WANTED_LAYER = 0.10
SHORT = 5e-6  # layers under this are a few ticks of the profile's clock, which counts whole µs


@dataclass(frozen=True)
class Shot:
    """One model at one target, as shares of the original's time.

    Attributes:
        predicted: By the table alone, before any measurement corrects it.
        told: What the target search measured of the plan it chose.
        interval: Of that, as it tells the user.
        left: Of the same plan, measured afterwards.
        seconds: What the search took, the table left out.
    """

    name: str
    before: float
    asked: float
    predicted: float
    told: float
    interval: tuple[float, float]
    left: float
    measured: int
    seconds: float


@dataclass(frozen=True)
class Cut:
    """One model at one cut, as shares of the original's time."""

    name: str
    ratio: float
    round_to: int
    before: float
    predicted: float
    measured: float
    interval: tuple[float, float]
    call: float

    @property
    def error(self) -> float:
        """Predicted over measured, less 1."""
        return self.predicted / self.measured - 1


def left_out(table: LatencyTable, rng: np.random.Generator) -> Iterable[tuple[float, float]]:
    """Predicted and measured seconds of layers at widths that are on no grid."""
    wanted: list[tuple[Layer, Extents]] = []
    stairs = {charge.stairs.layer: charge.stairs for charge in table.charges if charge.stairs}
    for layer, found in stairs.items():
        (grid, *_) = found.grids.values()
        moving = [len(axis) > 1 for axis in grid.axes]
        for _ in range(LEFT_OUT):
            extents = tuple(
                int(rng.integers(max(1, extent // 8), extent + 1)) if moves else extent
                for extent, moves in zip(layer.extents, moving, strict=True)
            )
            rounded = layer.rounded(extents, table.runtime.block)
            if all(rounded not in one.costs for one in found.grids.values()):
                wanted.append((layer, extents))
    for (layer, extents), spent in zip(wanted, time_layers(wanted), strict=True):
        yield stairs[layer](extents), table.runtime.corrected(spent)


def cuts(
    name: str, graph: DependencyGraph, table: LatencyTable, seconds: float, threads: int | None
) -> Iterable[Cut]:
    """The model at every ratio."""
    model = graph.graph.model
    feeds = random_data(model, shapes=graph.stand_ins, batches=1).batches[0]
    ranked = score(graph)
    for ratio, round_to in RATIOS:
        plan = select(graph, ranked, ratio=ratio, round_to=round_to)
        begun = time.thread_time()
        predicted = table.predict(plan.keep)
        call = time.thread_time() - begun
        made = operate(PruningPlan(graph, plan.keep)).model
        old, new = measure([model, made], feeds, seconds=seconds, threads=threads)
        value, low, high = compare_timings(old, new)
        yield Cut(
            name, ratio, round_to, old.seconds, predicted / table.seconds, value, (low, high), call
        )


def shots(name: str, graph: DependencyGraph, seconds: float) -> Iterable[Shot]:
    """The model at every target."""
    table = LatencyTarget.of(graph, None, 0)
    feeds = random_data(graph.graph.model, shapes=graph.stand_ins, batches=1).batches[0]
    ranked = score(graph)
    for asked in TARGETS:
        timer = LatencyTarget(table.predict, table.timed)
        wish = Wish(targets={"latency": asked}, round_to=steps(graph))
        planner = Planner(graph, wish, latency=timer.left)
        tried: list[PruningPlan] = []

        def search(planner: Planner = planner, tried: list[PruningPlan] = tried) -> Found:
            tried.append(planner.plan(ranked))
            return tried[-1], ranked.method, ""

        begun = time.perf_counter()
        try:
            (plan, _, _), told = timer.confirmed(asked, search)
        except TargetError as error:
            print(f"{name}: {error}", file=sys.stderr)
            continue
        spent = time.perf_counter() - begun
        made = operate(plan).model
        old, new = measure([graph.graph.source, made], feeds, seconds=seconds, threads=1)
        left, _, _ = compare_timings(old, new)
        predicted = (told.predicted or 0.0) / timer.whole
        yield Shot(
            name, old.seconds, asked, predicted, told.ratio, (told.low, told.high), left,
            len(tried), spent,
        )  # fmt: skip


def hits(found: Sequence[Shot]) -> Iterable[str]:
    """Targets as Markdown."""
    yield "# Latency targets\n"
    yield (
        "`tools/bench/latency.py --targets`: `shrink --target latency=SHARE` without data, one "
        "thread's processor time in ONNX Runtime, original and result in turn, shares of the "
        "original's time. *Told*: what the search measured of the plan it chose; *left*: the same "
        "plan measured again afterwards.\n"
    )
    near = sum(abs(shot.left - shot.asked) <= WANTED_LEFT for shot in found)
    yield (
        f"{near} of {len(found)} within {WANTED_LEFT} of what was asked; the farthest is "
        f"{max(abs(shot.left - shot.asked) for shot in found):.3f} off.\n"
    )
    yield "| model | ms | asked | predicted | told (95 %) | left | off | measured | s |"
    yield "|---|--:|--:|--:|--:|--:|--:|--:|--:|"
    for shot in found:
        yield (
            f"| {shot.name} | {1e3 * shot.before:.3g} | {shot.asked} | {shot.predicted:.3f} | "
            f"{shot.told:.3f} ({shot.interval[0]:.3f} to {shot.interval[1]:.3f}) | "
            f"{shot.left:.3f} | {shot.left - shot.asked:+.3f} | {shot.measured} × | "
            f"{shot.seconds:.0f} |"
        )


def quantile(values: Sequence[float], share: float) -> float:
    """A quantile, NaN of nothing."""
    return float(np.quantile(values, share)) if values else float("nan")


def speed() -> Iterable[str]:
    """Achieved multiply-accumulates by channel count, for the notes."""
    runtime = Peculiarities.measured()
    counts = (4, 8, 12, 14, 16, 24, 30, 32, 48, 62, 64, 96, 126, 128)
    yield "| layer at 28 × 28 | " + " | ".join(map(str, counts)) + " |"
    yield "|---|" + "--:|" * len(counts)
    for kernel in (1, 3):
        pads = helper.make_attribute("pads", [kernel // 2] * 4).SerializeToString()
        dense = Layer("Conv", (1, 128, 128), (1, 28, 28), (kernel, kernel), True, (pads,))
        shapes: dict[str, list[Extents]] = {
            f"{kernel} × {kernel}, 128 in, n out": [(1, 128, n) for n in counts],
            f"{kernel} × {kernel}, n in, 128 out": [(1, n, 128) for n in counts],
            f"{kernel} × {kernel}, n in, n out": [(1, n, n) for n in counts],
        }
        if kernel == 3:
            shapes["3 × 3 depthwise, n"] = [(n, 1, 1) for n in counts]
        for name, extents in shapes.items():
            spent = time_layers([(dense, one) for one in extents])
            rates = [
                prod(one) * kernel**2 * 28 * 28 / runtime.corrected(seconds) * 1e-9
                for one, seconds in zip(extents, spent, strict=True)
            ]
            yield f"| {name} | " + " | ".join(f"{rate:.1f}" for rate in rates) + " |"


def report(errors: Sequence[float], short: int, found: Sequence[Cut]) -> Iterable[str]:
    """The result as Markdown."""
    yield "# Latency, predicted and measured\n"
    yield (
        "`tools/bench/latency.py`: ONNX Runtime on an x86 CPU shared with other work, processor "
        "time of one thread, medians, models in turn.\n"
    )
    sizes = [abs(error) for error in errors]
    yield "## Layers at widths left out of the fit\n"
    yield (
        f"{len(sizes)} layers of 5 µs and more ({short} shorter ones left out: the profile counts "
        f"whole µs): error median {100 * quantile(sizes, 0.5):.1f} %, "
        f"p90 {100 * quantile(sizes, 0.9):.1f} %, "
        f"bias {100 * statistics.median(errors) if errors else 0:+.1f} %.\n"
    )
    whole = [abs(cut.error) for cut in found]
    yield "## Whole models\n"
    yield (
        f"{len(whole)} cuts: error median {100 * quantile(whole, 0.5):.1f} %, "
        f"p90 {100 * quantile(whole, 0.9):.1f} %. One prediction takes "
        f"{1e3 * statistics.median(cut.call for cut in found):.1f} ms (median), at most "
        f"{1e3 * max(cut.call for cut in found):.1f} ms.\n"
    )
    yield "| model | ms | ratio | round to | time left, predicted | measured (95 %) | error |"
    yield "|---|--:|--:|--:|--:|--:|--:|"
    for cut in found:
        yield (
            f"| {cut.name} | {1e3 * cut.before:.3g} | {cut.ratio} | {cut.round_to} | "
            f"{cut.predicted:.3f} | {cut.measured:.3f} ({cut.interval[0]:.3f} to "
            f"{cut.interval[1]:.3f}) | {100 * cut.error:+.1f} % |"
        )


def aimed(paths: Sequence[Path], seconds: float, markdown: Path | None) -> int:
    """Print the table of targets; 1 where one is missed."""
    found: list[Shot] = []
    for path in paths:
        begun = len(found)
        found += shots(path.stem, analyse(load(path)), seconds)
        said = " ".join(f"{shot.asked}: {shot.told:.3f} {shot.left:.3f}," for shot in found[begun:])
        print(f"{path.stem}: {said}", file=sys.stderr, flush=True)
    lines = "\n".join(hits(found)) + "\n"
    if markdown is not None:
        markdown.write_text(lines, "utf-8", newline="\n")
    sys.stdout.write(lines)
    return int(any(abs(shot.left - shot.asked) > WANTED_LEFT for shot in found))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each pair of models")
    parser.add_argument("--threads", type=int, default=1, help="0: all usable cores")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--targets", action="store_true")
    options = parser.parse_args()
    if options.speed:
        print("\n".join(speed()))
        return 0
    if options.targets:
        return aimed(options.models, options.seconds, options.markdown)
    threads = options.threads or None
    rng = np.random.default_rng(0)
    errors: list[float] = []
    found: list[Cut] = []
    short = 0
    for path in options.models:
        graph = analyse(load(path))
        feeds = random_data(graph.graph.model, shapes=graph.stand_ins, batches=1).batches[0]
        begun = time.perf_counter()
        table = LatencyTable(graph, feeds, threads=threads)
        spent = time.perf_counter() - begun
        pairs = list(left_out(table, rng))
        own = [predicted / seconds - 1 for predicted, seconds in pairs if seconds >= SHORT]
        short += len(pairs) - len(own)
        errors += own
        rows = list(cuts(path.stem, graph, table, options.seconds, threads))
        found += rows
        print(
            f"{path.stem}: table in {spent:.1f} s; layers "
            f"{100 * quantile([abs(error) for error in own], 0.5):.1f} % (median); cuts "
            + " ".join(f"{100 * row.error:+.1f}" for row in rows),
            flush=True,
        )
    lines = "\n".join(report(errors, short, found)) + "\n"
    if options.markdown is not None:
        options.markdown.write_text(lines, "utf-8", newline="\n")
    sys.stdout.write(lines)
    return 0 if quantile([abs(error) for error in errors], 0.5) <= WANTED_LAYER else 1


if __name__ == "__main__":
    sys.exit(main())
