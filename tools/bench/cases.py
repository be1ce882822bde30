"""Every hard case against its manifest: what must shrink, what must stay, which error is due.

    python tools/bench/cases.py --markdown tools/bench/results/cases.md

The cases are `../shared/cases` beside the repository. Exits with 1 on any finding.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from trial import SHARED, short, table, trial

from onnxprune import io
from onnxprune.analyse import analyse
from onnxprune.errors import OnnxPruneError
from onnxprune.rewrite import operate
from onnxprune.score import score
from onnxprune.select import select

RATIO = 0.5


@dataclass(frozen=True)
class Row:
    """One case: what became of it, and what is wrong with that."""

    name: str
    status: str
    findings: tuple[str, ...]
    left_alone: tuple[str, ...]


def run(entry: Mapping[str, object], folder: Path) -> Row:
    """One case through the product, held against its entry."""
    name = str(entry["id"])
    path = folder / "onnx" / str(entry.get("path") or f"{name}.onnx")
    if entry["error"] is not None:
        return refused(name, path, str(entry["error"]))
    tried = trial(path, ratio=RATIO, level="twin")
    findings: list[str] = []
    unusable = bool(entry["runs"]) and tried.status not in ("ok", "noise", "nothing")
    if unusable or tried.status in ("broken", "crash", "twin failed"):
        findings.append(f"{tried.status}: {tried.reason}")
    before, after = sizes(path)
    for weight in entry["shrink"]:  # type: ignore[attr-defined]
        axis = entry["axis"][weight]  # type: ignore[index]
        size = before[weight][axis]
        if after.get(weight, before[weight])[axis] != size - int(size * RATIO + 1e-9):
            findings.append(f"{weight} {before[weight]} became {after.get(weight)}")
    changed = [w for w in entry["keep"] if w in before and after.get(w) != before[w]]  # type: ignore[attr-defined]
    findings += [f"{w} {before[w]} should stay, became {after.get(w)}" for w in changed]
    left = [w for w in entry["may"] if w in before and after.get(w) == before[w]]  # type: ignore[attr-defined]
    return Row(name, tried.status, tuple(findings), tuple(left))


def refused(name: str, path: Path, due: str) -> Row:
    """An invalid file, or one with nothing to prune: it must be refused in one line."""
    try:
        graph = analyse(io.load(path))
    except OnnxPruneError as error:
        said = str(error).replace(str(path.parent), "cases")  # no path of this machine in a page
        return Row(name, f"refused: {short(said, 110)}", (), ())
    if graph.prunable:
        return Row(name, "accepted", (f"should say: {due}",), ())
    return Row(name, f"nothing to prune: {short(graph.groups[0].frozen or '', 80)}", (), ())


def sizes(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Shapes of all constants before and after."""
    model = io.load(path)
    graph = analyse(model)
    plan = select(graph, score(graph, "l1"), ratio=RATIO)
    after = operate(plan).model
    return (
        {name: weight.shape for name, weight in model.weights().items()},
        {name: weight.shape for name, weight in after.weights().items()},
    )


def report(rows: list[Row]) -> str:
    """A Markdown page: totals, findings, then every case."""
    wrong = [row for row in rows if row.findings]
    lines = [
        "# Hard cases",
        "",
        f"`tools/bench/cases.py`, ratio {RATIO} in each group, importance l1.",
        "",
        f"- as the manifest says: {len(rows) - len(wrong)} of {len(rows)}",
        *(f"- **{row.name}**: {'; '.join(row.findings)}" for row in wrong),
        "",
        table(
            ("case", "status", "debatable weights left whole"),
            [(row.name, row.status, ", ".join(row.left_alone)) for row in rows],
        ),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=Path, default=SHARED / "cases")
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    if not (args.cases / "manifest.json").is_file():
        print(f"{args.cases} holds no manifest.json", file=sys.stderr)
        return 2
    entries = json.loads((args.cases / "manifest.json").read_text("utf-8"))
    rows = [run(entry, args.cases) for entry in entries]
    page = report(rows)
    print(page)
    if args.markdown is not None:
        args.markdown.write_text(page, "utf-8")
    return int(any(row.findings for row in rows))


if __name__ == "__main__":
    sys.exit(main())
