"""Does TensorRT build what it built before the cut, and are the channels left what it wants?

    python tools/bench/tensorrt.py FOLDER_OR_FILE... --lines trt.jsonl --markdown tensorrt.md

Needs the extra `tensorrt`. Every .onnx file is cut by half with `--round-to auto`, without
restoring and without verification (neither changes a shape), and TensorRT-RTX parses and builds
both. Then every layer that was cut is looked at in the *written* model, apart from what the report
says of it: its channels are a multiple of 8, or were none before, or the report says why. A line of
`--lines` for each network makes a run that was cut short go on where it was.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from trial import short, table

from onnxprune import io
from onnxprune.errors import OnnxPruneError
from onnxprune.pipeline import shrink
from onnxprune.standins import stand_ins
from onnxprune.targets.builder import build, check_installed
from onnxprune.targets.profiles import Wanted
from onnxprune.types import Report, Width
from onnxprune.weights import sparse_layers

WANTED = 8  # channels of a layer in 16-bit floats
SIDES = ("in", "out")


def models(given: Sequence[Path]) -> Iterator[tuple[str, Path]]:
    """Name and path of each model; of those in a folder the name starts with the folder's."""
    for path in given:
        if path.is_file():
            yield f"{path.parent.name}/{path.stem}", path
        for file in sorted(path.rglob("*.onnx")) if path.is_dir() else ():
            yield f"{path.name}/{file.relative_to(path).with_suffix('')}", file


def asked(path: Path) -> dict[str, Any]:
    """What TensorRT-RTX makes of a file."""
    model = io.load(path)
    wanted = Wanted.read(model)
    found = build(path, wanted.profiles(stand_ins(model) if wanted.open else ()))
    return {
        "status": found.status,
        "seconds": sum(found.seconds.values()),
        "said": "; ".join(f"{one.node}: {one.message}" for one in found.findings),
    }


def widths(path: Path) -> dict[str, tuple[int, int]]:
    """Channels into and out of every layer with a constant weight; in: of one group."""
    found = {}
    for layer in sparse_layers(io.load(path)):
        if layer.seen is not None and layer.form:
            groups, outputs, _ = layer.shape
            out = outputs * groups if layer.form in ("conv", "deconv") else outputs
            found[layer.label] = (layer.channels, out)
    return found


def judged(before: Path, after: Path, report: Report) -> dict[str, Any]:
    """How many sides of cut layers are aligned, and what is said of those that are not."""
    old, new = widths(before), widths(after)
    said = {one.before.node: (one.inputs, one.outputs) for one in report.layers}
    count: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    offenders = []
    for label, now in new.items():
        if label not in old or old[label] == now:
            count["layers left whole"] += 1
            continue
        count["layers cut"] += 1
        for at, side in enumerate(SIDES):
            was, left = old[label][at], now[at]
            row: Width | None = said.get(label, (None, None))[at]
            if left % WANTED == 0:
                count["aligned"] += 1
            elif was % WANTED:
                count["not aligned before either"] += 1
            elif row is not None and not row.aligned and row.why:
                count["not aligned, and the report says why"] += 1
                reasons[row.why] += 1
            else:
                offenders.append(f"{label} {side}: {was} → {left}")
    return {"count": dict(count), "reasons": dict(reasons), "offenders": offenders}


def one(path: Path) -> dict[str, Any]:
    """One network: built, cut, built again, its layers judged."""
    found: dict[str, Any] = {"original": asked(path)}
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder, "pruned.onnx")
        begun = time.perf_counter()
        try:
            _, report = shrink(path, ratio=0.5, round_to="auto", importance="l1", restore="none",
                               verify="none", output=made)  # fmt: skip
        except OnnxPruneError as error:
            return found | {"refused": str(error)}
        found["shrink"] = time.perf_counter() - begun
        found["left"] = (report.after or report.before).params / max(1, report.before.params)
        found["pruned"] = asked(made)
        found |= judged(path, made, report)
    return found


def page(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The result in Markdown."""
    cut = {name: row for name, row in rows.items() if "pruned" in row}
    able = {name: row for name, row in cut.items() if row["original"]["status"] == "built"}
    lost = {name: row for name, row in able.items() if row["pruned"]["status"] != "built"}
    count: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for row in cut.values():
        count.update(row["count"])
        reasons.update(row["reasons"])
    offenders = [f"- {name}: {one}" for name, row in cut.items() for one in row["offenders"]]
    never = {name: row for name, row in rows.items() if row["original"]["status"] != "built"}
    refused = {name: row for name, row in rows.items() if "refused" in row}
    times = [row["pruned"]["seconds"] for row in able.values()]
    lines = [
        "# TensorRT builds what is left",
        "",
        "`tools/bench/tensorrt.py`: `shrink --ratio 0.5 --round-to auto`, parsed and built by "
        "TensorRT-RTX 1.7.1 before and after. No engine was run: there is no GPU here. Seconds of "
        "two shared cores.",
        "",
        f"- of {len(rows)} networks TensorRT-RTX builds {len(rows) - len(never)}; {len(able)} of "
        f"those were cut, and of these it builds **{len(able) - len(lost)} of {len(able)}**",
        f"- parse and build of a cut network: median {median(times or [0]):.2f} s, longest "
        f"{max(times or [0]):.1f} s",
        f"- layers cut: {count['layers cut']}, which have {2 * count['layers cut']} sides: "
        f"{count['aligned']} a multiple of {WANTED}, {count['not aligned before either']} were "
        f"none before either, {count['not aligned, and the report says why']} are not and the "
        f"report says why, **{len(offenders)} offend**",
        "",
        "## Built before, not after",
        "",
        "\n".join(f"- {name}: {row['pruned']['said']}" for name, row in lost.items()) or "None.",
        "",
        "## Not a multiple, and not said why",
        "",
        "\n".join(offenders) or "None.",
        "",
        "## What the report says of those that are no multiple",
        "",
        "\n".join(f"- {times} × {why}" for why, times in reasons.most_common()) or "Nothing.",
        "",
        "## Not built to begin with",
        "",
        "\n".join(f"- {name}: {short(row['original']['said'], 300)}" for name, row in never.items())
        or "None.",
        "",
        "## Not cut",
        "",
        "\n".join(f"- {name}: {short(row['refused'], 200)}" for name, row in refused.items())
        or "None.",
        "",
        "## All networks",
        "",
        table(
            ("network", "original", "s", "pruned", "s", "params left", "layers cut", "no multiple"),
            (_row(name, row) for name, row in rows.items()),
        ),
        "",
    ]
    return "\n".join(lines)


def _row(name: str, row: Mapping[str, Any]) -> tuple[str, ...]:
    first = (name, row["original"]["status"], f"{row['original']['seconds']:.2f}")
    if "pruned" not in row:
        return (*first, "-", "-", "-", "-", "-")
    count = row["count"]
    left_over = 2 * count.get("layers cut", 0) - count.get("aligned", 0)
    return (
        *first,
        row["pruned"]["status"],
        f"{row['pruned']['seconds']:.2f}",
        f"{row['left']:.3f}",
        str(count.get("layers cut", 0)),
        str(left_over),
    )


def main() -> int:
    """Exit 1 where something is built no more, or misaligned without a word."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--lines", type=Path, required=True, help="a JSON line for each network")
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    check_installed("this benchmark")
    rows: dict[str, Any] = {}
    if args.lines.exists():
        known = map(json.loads, args.lines.read_text("utf-8").splitlines())
        rows = {line.pop("name"): line for line in known}
    for name, path in models(args.models):
        if name in rows:
            continue
        rows[name] = one(path)
        with args.lines.open("a", encoding="utf-8") as out:
            out.write(json.dumps({"name": name, **rows[name]}) + "\n")
        print(name, _row(name, rows[name])[1:], rows[name].get("offenders"), file=sys.stderr,
              flush=True)  # fmt: skip
    text = page(rows)
    if args.markdown is None:
        print(text)
    else:
        args.markdown.write_text(text, "utf-8")
    lost = (row for row in rows.values() if row["original"]["status"] == "built")
    bad = any(row.get("pruned", row["original"])["status"] != "built" for row in lost)
    return int(bad or any(row.get("offenders") for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
