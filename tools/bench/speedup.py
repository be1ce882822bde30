"""How much faster ONNX Runtime runs what `shrink --target macs=0.5` leaves, network by network.

    python tools/bench/speedup.py resnet18.onnx vgg.onnx --markdown tools/bench/results/speedup.md
    python tools/bench/speedup.py --round-to 1 --round-to 16 mobilenet_v2.onnx
    python tools/bench/speedup.py --kernels mobilenet_v2.onnx

Original and result run in turn on one thread; the processor time of that thread and the wall time
are both taken, the first is what counts on a machine that others use. Without data: importance and
restoring need none. --kernels prints by operator where the time goes, before and after.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from onnxprune.analyse import analyse
from onnxprune.data import random_data
from onnxprune.errors import OnnxPruneError
from onnxprune.feeds import Batch
from onnxprune.io import load
from onnxprune.model import Model
from onnxprune.pipeline import shrink
from onnxprune.runtime import profile, session
from onnxprune.timing import compare_timings, interleaved, timing

WANTED = 1.7  # times faster, in the median of the networks
SHOWN = 12  # operators


@dataclass(frozen=True)
class Gain:
    """One network at one rounding.

    Attributes:
        asked: The rounding asked for, or default.
        round_to: What was taken.
        before: Milliseconds of the original.
        macs: Share of its multiply-accumulates that is left.
        speedup: Its time by that of the result, processor time; with the interval at 95 %.
        wall: The same by wall time.
    """

    name: str
    asked: str
    round_to: str
    before: float
    macs: float
    speedup: float
    interval: tuple[float, float]
    wall: float
    runs: int

    @property
    def efficiency(self) -> float:
        """Speed-up as a share of what the multiply-accumulates alone would give."""
        return self.speedup * self.macs


def timed(first: Model, second: Model, feeds: Batch, seconds: float) -> tuple[list[float], ...]:
    """Processor and wall seconds of each run, original and result in turn."""
    calls = [partial(session(one, threads=1).run, feeds) for one in (first, second)]
    walls: list[list[float]] = [[], []]

    def both(which: int) -> None:
        start = time.perf_counter()
        calls[which]()
        walls[which].append(time.perf_counter() - start)

    spent = interleaved([partial(both, 0), partial(both, 1)], seconds, time.thread_time)
    return (*spent, *(wall[-2 * len(spent[0]) :][1::2] for wall in walls))


def gain(
    path: Path, target: float, round_to: int | str | None, seconds: float
) -> tuple[Gain, Model]:
    """Cut one network and time it."""
    original = load(path)
    made, report = shrink(original, targets={"macs": target}, round_to=round_to, verify="none")
    assert report.after is not None
    graph = analyse(original)
    feeds = random_data(original, shapes=graph.stand_ins, batches=1).batches[0]
    old, new, old_wall, new_wall = timed(original, made, feeds, seconds)
    value, low, high = compare_timings(timing(old), timing(new))
    wall, _, _ = compare_timings(timing(old_wall), timing(new_wall))
    row = Gain(
        path.stem, str(round_to or "default"), str(report.round_to), 1e3 * statistics.median(old),
        report.after.macs / report.before.macs, 1 / value, (1 / high, 1 / low), 1 / wall, len(old),
    )  # fmt: skip
    return row, made


def kernels(first: Model, second: Model) -> Iterable[str]:
    """Microseconds by kernel of the runtime's own graph, before and after."""
    graph = analyse(first)
    feeds = random_data(first, shapes=graph.stand_ins, batches=1).batches[0]
    spent = []
    for model in (first, second):
        found: Counter[str] = Counter()
        for kernel in profile(model, feeds, runs=15, threads=1, tensors=False):
            found[kernel.op_type] += round(1e6 * kernel.seconds)
        spent.append(found)
    for name, count in spent[0].most_common(SHOWN) + [
        (name, 0) for name in spent[1] if name not in spent[0]
    ]:
        after = spent[1][name]
        yield f"  {name}: {count} → {after} µs" + (f" ({count / after:.2f} ×)" if after else "")


def report(rows: Sequence[Gain], target: float) -> Iterable[str]:
    """The result as Markdown."""
    yield "# Speed-up on a CPU\n"
    yield (
        f"`tools/bench/speedup.py`: `shrink --target macs={target:g}`, no data; ONNX Runtime, one "
        "thread, batch 1, original and result in turn on a machine that others use too: medians of "
        "the thread's own processor time (wall time beside it). *Share of ideal*: the speed-up "
        "times the share of multiply-accumulates left, 1 where time falls as they do.\n"
    )
    for asked in dict.fromkeys(row.asked for row in rows):
        of_one = [row.speedup for row in rows if row.asked == asked]
        yield (
            f"Rounding {asked}: median {statistics.median(of_one):.2f} × of {len(of_one)} "
            f"networks, wanted {WANTED} ×; least {min(of_one):.2f} ×.\n"
        )
    yield "| network | round-to | ms | MACs left | faster (95 %) | wall | share of ideal | runs |"
    yield "|---|---|--:|--:|--:|--:|--:|--:|"
    for row in rows:
        yield (
            f"| {row.name} | {row.round_to} | {row.before:.3g} | {row.macs:.3f} | "
            f"{row.speedup:.2f} × ({row.interval[0]:.2f} to {row.interval[1]:.2f}) | "
            f"{row.wall:.2f} × | {row.efficiency:.2f} | {row.runs} |"
        )


def main() -> int:
    """Exit 1 where the median is less than wanted."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--target", type=float, default=0.5, help="share of MACs to leave")
    parser.add_argument(
        "--round-to", action="append", help="N or auto; repeatable; else by default"
    )
    parser.add_argument("--seconds", type=float, default=4.0, help="for each pair")
    parser.add_argument("--kernels", action="store_true", help="print where the time goes")
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    rows: list[Gain] = []
    for path in args.models:
        for spelled in args.round_to or [None]:
            rounding = spelled if spelled in ("auto", None) else int(spelled)
            try:
                row, made = gain(path, args.target, rounding, args.seconds)
            except OnnxPruneError as error:
                print(f"{path.stem}: {error}", file=sys.stderr, flush=True)
                continue
            rows.append(row)
            print(row, f"{row.efficiency:.2f}", file=sys.stderr, flush=True)
            if args.kernels:
                print("\n".join(kernels(load(path), made)), file=sys.stderr, flush=True)
    page = "\n".join(report(rows, args.target)) + "\n"
    sys.stdout.write(page)
    if args.markdown is not None:
        args.markdown.write_text(page, "utf-8", newline="\n")
    return int(statistics.median(row.speedup for row in rows) < WANTED)


if __name__ == "__main__":
    sys.exit(main())
