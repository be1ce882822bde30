"""How near `shrink --target` comes on every network of the zoo.

    python tools/bench/targets.py --markdown tools/bench/results/targets.md

The zoo is `../shared/zoo` beside the repository. Costs are those of the plan, which equal those of
the written model; importance l1, both default scopes.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from trial import SHARED

from onnxprune.analyse import analyse
from onnxprune.errors import OnnxPruneError, TargetError
from onnxprune.io import load
from onnxprune.planning import Planner, Wish
from onnxprune.score import score

TARGETS = (("macs", 0.7), ("macs", 0.5), ("params", 0.7), ("params", 0.5))


def main() -> int:
    """Exit 1 where a target that is within reach is missed by more than a hundredth."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="*/*")
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    zoo = SHARED / "zoo"
    off: dict[tuple[str, float], list[float]] = {target: [] for target in TARGETS}
    beyond: dict[tuple[str, float], int] = dict.fromkeys(TARGETS, 0)
    missed: list[str] = []
    for entry in sorted(path for path in zoo.glob(args.only) if path.is_dir() or path.suffix):
        if entry.parent.parent != zoo:
            continue
        with tempfile.TemporaryDirectory() as folder:
            script = [sys.executable, str(zoo / "materialize.py"), str(entry), "--out", folder]
            subprocess.run(script, check=True, capture_output=True)
            (path,) = Path(folder).rglob("*.onnx")
            try:
                graph = analyse(load(path))
                values = score(graph, "l1")
            except OnnxPruneError as error:
                missed.append(f"- {entry.parent.name}/{entry.stem}: {error}")
                continue
            for name, share in TARGETS:
                planner = Planner(graph, Wish(targets={name: share}))
                try:
                    left = planner.left(planner.plan(values).keep)[name]
                except TargetError:
                    beyond[name, share] += 1
                    continue
                off[name, share].append(abs(left - share))
                if abs(left - share) > 0.01:
                    missed.append(
                        f"- {entry.parent.name}/{entry.stem}: {name}={share:g}: {left:.3f}"
                    )
        print(entry.stem, file=sys.stderr, flush=True)
    lines = ["# Targets", "", "`tools/bench/targets.py`, importance l1, default scope.", ""]
    lines += ["| target | within reach | out of reach | median miss | worst miss |"]
    lines += ["|---|---|---|---|---|"]
    for target, misses in off.items():
        if misses:
            lines.append(
                f"| {target[0]}={target[1]:g} | {len(misses)} | {beyond[target]} "
                f"| {statistics.median(misses):.4f} | {max(misses):.4f} |"
            )
    lines += ["", "Missed by more than .01:", "", *(missed or ["none"]), ""]
    page = "\n".join(lines)
    print(page)
    if args.markdown is not None:
        args.markdown.write_text(page, "utf-8")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
