"""Tables of what ``sensitivity`` and ``sweep`` found."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from math import ceil

from rich.console import RenderableType
from rich.text import Text

from onnxprune.curves import Estimate, Sensitivity
from onnxprune.report.layout import new_table, number
from onnxprune.report.plots import SPELLED, name_of
from onnxprune.sweep import Sweep

_RANDOM = " (random input: says little about quality)"


def sensitivity_report(found: Sensitivity, written: str | None = None) -> Iterable[RenderableType]:
    """Loss of each group at each ratio; of a dry run how many units would go."""
    planned = found.estimate is not None
    table = new_table("group", ">size", *(f">{ratio:g}" for ratio in found.ratios))
    for entry in found.groups:
        cells = {p.ratio: str(p.removed) if planned else _figure(p.loss) for p in entry.points}
        table.add_row(
            Text(name_of(entry)),
            str(sum(group.size for group in entry.groups)),
            *(cells.get(ratio, "–") for ratio in found.ratios),
        )
    yield table
    what = SPELLED[found.measure]
    start = (
        "" if found.measure == "drift" else f"loss of {what}, original {_figure(found.baseline)}"
    )
    restored = "" if found.restore == "none" else f" · restored: {found.restore}"
    yield Text(
        f"{start or what} on {_inputs(found.data)} · importance {found.importance}{restored}"
    )
    if found.estimate is not None:
        yield _outlook(found.estimate, f"of {len(found.groups)} groups")
    elif written is not None:
        path = found.model.path or "MODEL"
        yield Text(f"next: onnxprune shrink {path} --sensitivity {written} --max-loss 0.01")


def sweep_report(found: Sweep) -> Iterable[RenderableType]:
    """Cost, latency and figure at each ratio."""
    table = new_table(">ratio", ">params", ">MACs", ">latency", f">{SPELLED[found.measure]}")
    for point in found.points:
        table.add_row(
            f"{point.ratio:g}",
            number(point.params),
            number(point.macs),
            "–" if point.latency_ms is None else f"{point.latency_ms:.3g} ms",
            _figure(point.figure),
        )
    yield table
    shapes = ", ".join(f"{n} {'x'.join(map(str, s))}" for n, s in found.stand_ins.items())
    yield Text(
        f"on {_inputs(found.data)} · importance {found.importance}, scope {found.scope} · "
        f"latency in ONNX Runtime at {shapes}"
    )
    if found.estimate is not None:
        yield _outlook(found.estimate, "of the model")


def _outlook(expected: Estimate, what: str) -> Text:
    cuts = f"{expected.points} cut{'s' if expected.points != 1 else ''}"
    spent = timedelta(seconds=ceil(expected.seconds))
    return Text(f"would measure {cuts} {what} in about {spent}; nothing is measured or written")


def _inputs(label: str) -> str:
    return label + (_RANDOM if label.startswith("random") else "")


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
