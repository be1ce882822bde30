"""What ``finetune`` prints."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from onnxprune.report.endings import drift_lines, next_line, target_lines
from onnxprune.report.layout import number
from onnxprune.types import Drift, Report, Round, Tuned

_SAID = {"top1": "accuracy", "agreement": "agreement with the teacher"}
_HEADS = {"top1": "accuracy", "agreement": "agreement"}


def finetune_report(report: Report) -> Iterable[RenderableType]:
    """The epochs, what the result says beside the teacher, and the closing line."""
    found = report.tuned
    assert found is not None
    yield _epochs(found)
    yield _line(
        f"{number(found.weights[1])} weights by {found.trainer}, {'+'.join(found.losses)}, "
        f"{found.optimizer} at {found.rate:g}, batches of {found.batch_size}; "
        f"{found.samples[0]} samples, {found.samples[1]} held out"
    )
    if found.checked:
        yield _line(f"gradients of {found.checked} weights agree with finite differences")
    for name, after in found.drift_after.items():
        before = found.drift_before.get(name)
        if before is not None:
            yield _line(f"drift of '{name}' from the teacher: {_drift(before)} → {_drift(after)}")
    yield _line(_closing(report, found))


def rounds_report(report: Report) -> Iterable[RenderableType]:
    """The rounds, drift from the original, and the closing line."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for head in ("round", "params", "MACs", "right after the cut", "after training"):
        table.add_column(head, justify="right")
    for one in report.rounds:
        table.add_row(
            str(one.number), number(one.params), number(one.macs),
            *("–" if math.isnan(share) else f"{100 * share:.2f} %"
              for share in (one.before, one.after)),
        )  # fmt: skip
    yield table
    yield from map(_line, _measured(report.rounds))
    yield from drift_lines(report)
    yield from target_lines(report, verbose=False)
    before, after = report.before, report.after
    assert after is not None
    yield _line(
        f"saved {report.output_path} · {number(before.params)} → {number(after.params)} params · "
        f"{number(before.macs)} → {number(after.macs)} MACs · every cut proved; its model in "
        f"{report.output_path}.rounds"
    )
    yield from next_line(report)


def _measured(rounds: Sequence[Round]) -> Iterable[str]:
    """What the shares in the table are of."""
    match rounds[-1].measure:
        case "top1":
            yield "share of held-out samples whose class is right (--labels)"
        case "agreement":
            yield "share of held-out samples with the class that the original says"


def _epochs(found: Tuned) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    heads = ["epoch", "loss", "held out"] + ([_HEADS[found.measure]] if found.measure else [])
    for head in heads:
        table.add_column(head, justify="right")
    table.add_column("")
    for one in found.epochs:
        loss = "–" if math.isnan(one.loss) else f"{one.loss:.4g}"
        cells = [str(one.number), loss, f"{one.held_out:.4g}"]
        if found.measure:
            cells.append(f"{100 * one.metric:.2f} %")
        table.add_row(*cells, "kept" if one.number == found.best else "")
    return table


def _drift(drift: Drift) -> str:
    top = "" if drift.top1 is None else f", top-1 {100 * drift.top1:.1f} %"
    return f"{drift.rel_l2:.3g} (cos {drift.cosine:.4f}{top})"


def _closing(report: Report, found: Tuned) -> str:
    parts = [f"saved {report.output_path}" if report.output_path else "nothing saved"]
    first, best = found.epochs[0], found.epochs[found.best]
    if found.measure:
        said = _SAID[found.measure]
        parts.append(f"{said} {100 * first.metric:.2f} → {100 * best.metric:.2f} %")
    else:
        parts.append(f"held-out loss {first.held_out:.4g} → {best.held_out:.4g}")
    if found.zeros:
        parts.append(f"{number(found.zeros)} zeros kept")
    if report.verdict.status == "passed":
        parts.append("loads and runs")
    return " · ".join(parts)


def _line(text: str) -> Text:
    return Text(text, overflow="fold")
