"""How near `shrink --target` comes on every network of the zoo.

    python tools/bench/targets.py --markdown tools/bench/results/targets.md
    python tools/bench/targets.py --only 'torchscript/*' --target macs=0.5 --target params=0.5

The zoo is `../shared/zoo` beside the repository. Costs are those of the plan, which equal those of
the written model; importance l1, default scope.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from trial import SHARED

from onnxprune.analyse import analyse
from onnxprune.errors import OnnxPruneError, TargetError
from onnxprune.io import load
from onnxprune.planning import Planner, Wish
from onnxprune.score import score

TARGETS = ("macs=0.7", "macs=0.5", "params=0.7", "params=0.5")
TOLERANCE = 0.01


@dataclass(frozen=True)
class Shot:
    """What became of one target. ``left`` is None where it was out of reach; ``why`` says how."""

    target: str
    left: float | None
    why: str = ""

    @property
    def miss(self) -> float:
        """How far off, as a share of the original's cost; 0 where it was out of reach."""
        return 0.0 if self.left is None else abs(self.left - float(self.target.partition("=")[2]))


@dataclass(frozen=True)
class Row:
    """One network."""

    exporter: str
    name: str
    shots: tuple[Shot, ...]


def tried(path: Path, targets: Sequence[str]) -> tuple[Shot, ...]:
    """Every target of one model."""
    graph = analyse(load(path))
    values = score(graph, "l1")
    shots = []
    for target in targets:
        name, _, share = target.partition("=")
        planner = Planner(graph, Wish(targets={name: float(share)}))
        try:
            shots.append(Shot(target, planner.left(planner.plan(values).keep)[name]))
        except TargetError as error:
            frozen = [group for group in graph.groups if group.frozen]
            widest = max(frozen, key=lambda group: group.width, default=None)
            why = error.message.partition(": ")[2]
            if widest is not None:
                why += f"; whole stays the widest of {len(frozen)} frozen groups, {widest.name} "
                why += f"({widest.width} channels): {widest.frozen}"
            shots.append(Shot(target, None, why))
    return tuple(shots)


def report(rows: Sequence[Row], targets: Sequence[str]) -> Iterable[str]:
    """The result as Markdown."""
    yield "# Targets\n"
    yield (
        "`tools/bench/targets.py`, importance l1, default scope; every network of the zoo by "
        "exporter.\n"
    )
    yield "| exporter | target | within reach | out of reach | median miss | worst miss |"
    yield "|---|---|--:|--:|--:|--:|"
    for exporter in dict.fromkeys(row.exporter for row in rows):
        for target in targets:
            shots = [
                shot
                for row in rows
                if row.exporter == exporter
                for shot in row.shots
                if shot.target == target
            ]
            misses = [shot.miss for shot in shots if shot.left is not None]
            if misses:
                yield (
                    f"| {exporter} | {target} | {len(misses)} | {len(shots) - len(misses)} | "
                    f"{statistics.median(misses):.4f} | {max(misses):.4f} |"
                )
    every = [(row, shot) for row in rows for shot in row.shots]
    for title, found in (
        (f"Missed by more than {TOLERANCE}", [one for one in every if one[1].miss > TOLERANCE]),
        ("Out of reach", [one for one in every if one[1].left is None]),
    ):
        yield f"\n{title}:\n"
        for row, shot in found:
            left = "" if shot.left is None else f": {shot.left:.3f} left"
            yield f"- {row.exporter}/{row.name}, {shot.target}{left}{shot.why and ': '}{shot.why}"
        if not found:
            yield "none"
    yield "\n## Left of each network\n"
    yield "| exporter | network | " + " | ".join(targets) + " |"
    yield "|---|---|" + "--:|" * len(targets)
    for row in rows:
        cells = ["out of reach" if shot.left is None else f"{shot.left:.4f}" for shot in row.shots]
        yield f"| {row.exporter} | {row.name} | " + " | ".join(cells) + " |"


def main() -> int:
    """Exit 1 where a target that is within reach is missed by more than a hundredth."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="*/*")
    parser.add_argument("--target", action="append", help="one of several; MEASURE=SHARE")
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    targets = tuple(args.target or TARGETS)
    zoo = SHARED / "zoo"
    rows: list[Row] = []
    refused: list[str] = []
    for entry in sorted(path for path in zoo.glob(args.only) if path.suffix in (".xz", ".onnx")):
        exporter, name = entry.parent.name, entry.name.partition(".onnx")[0]
        with tempfile.TemporaryDirectory() as folder:
            script = [sys.executable, str(zoo / "materialize.py"), str(entry), "--out", folder]
            subprocess.run(script, check=True, capture_output=True)
            (path,) = Path(folder).rglob("*.onnx")
            try:
                rows.append(Row(exporter, name, tried(path, targets)))
            except OnnxPruneError as error:
                refused.append(f"- {exporter}/{name}: {error}")
                continue
        print(rows[-1], file=sys.stderr, flush=True)
    page = "\n".join((*report(rows, targets), *(("\nRefused:\n", *refused) if refused else ()), ""))
    print(page)
    if args.markdown is not None:
        args.markdown.write_text(page, "utf-8")
    return int(bool(refused) or any(shot.miss > TOLERANCE for row in rows for shot in row.shots))


if __name__ == "__main__":
    sys.exit(main())
