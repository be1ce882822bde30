"""Seconds and memory that pruning one ordinary network takes: torchvision's ResNet-50.

    python tools/bench/resnet50.py resnet50.onnx
    python tools/bench/resnet50.py resnet50.onnx --export        (needs torch and torchvision)

Each run is a process of its own. Time is from load to save, verification apart. Memory is the peak
of the process less what it had after importing all it needs. Wanted: 3 s, and 3 times the file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

WANTED_SECONDS = 3.0
WANTED_FILES = 3.0
STAGES = ("load", "prepare", "analyse", "score", "select", "rewrite", "save")


def peak_bytes() -> int:
    """Most memory this process had since it was started; other programs' before it not counted."""
    try:
        status = Path("/proc/self/status").read_text("ascii")
    except OSError:
        from onnxprune.report.clock import peak_memory

        return peak_memory()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def measure(model: Path, ratio: float) -> dict[str, object]:
    """One run in this process."""
    from onnxprune import io
    from onnxprune.analyse import analyse_graph
    from onnxprune.prepare import prepare
    from onnxprune.report.clock import Clock
    from onnxprune.rewrite import operate
    from onnxprune.score import score
    from onnxprune.select import select
    from onnxprune.shapes import environment
    from onnxprune.standins import find_stand_ins

    clock, own = Clock(), peak_bytes()
    with tempfile.TemporaryDirectory() as folder:
        with clock.stage("load"):
            loaded = io.load(model)
        with clock.stage("prepare"):
            graph = prepare(loaded)
            envs = tuple(environment(graph, shapes) for shapes in find_stand_ins(graph, None))
        with clock.stage("analyse"):
            found = analyse_graph(graph, envs)
        with clock.stage("score"):
            importance = score(found, "auto")
        with clock.stage("select"):
            plan = select(found, importance, ratio=ratio)
        with clock.stage("rewrite"):
            made = operate(plan).model
        with clock.stage("save"):
            written = io.save(made, Path(folder, "pruned.onnx"))
    return {
        "seconds": {name: clock.seconds[name] for name in STAGES},
        "interpreter_bytes": own,
        "peak_bytes": peak_bytes() - own,
        "input_bytes": model.stat().st_size,
        "output_bytes": written,
    }


def main() -> int:
    """Print the table; exit 1 where a figure is above what is wanted."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--export", action="store_true", help="write the model first, with torch")
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.export:
        from exports import export_resnet50

        export_resnet50(args.model)
    if args.once:
        print(json.dumps(measure(args.model, args.ratio)))
        return 0
    command = [sys.executable, __file__, str(args.model), "--once", "--ratio", str(args.ratio)]
    runs = [
        json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        for _ in range(args.runs)
    ]
    for stage in STAGES:
        spent = [run["seconds"][stage] for run in runs]
        print(f"{stage:10} {statistics.median(spent):6.2f} s")
    total = statistics.median(sum(run["seconds"].values()) for run in runs)
    files = max(run["peak_bytes"] for run in runs) / runs[0]["input_bytes"]
    size, left = runs[0]["input_bytes"] / 1e6, runs[0]["output_bytes"] / 1e6
    own = runs[0]["interpreter_bytes"] / 1e6
    print(f"{'total':10} {total:6.2f} s      (median of {args.runs}; wanted: {WANTED_SECONDS:g})")
    print(f"memory     {files:6.2f} files  (over the interpreter's {own:.0f} MB; wanted: 3)")
    print(f"file       {size:6.1f} MB -> {left:.1f} MB")
    return 0 if total <= WANTED_SECONDS and files <= WANTED_FILES else 1


if __name__ == "__main__":
    sys.exit(main())
