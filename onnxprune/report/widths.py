"""What the widths of layers go by."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from onnxprune.report.layout import became, new_table, some_names, text_line
from onnxprune.types import LayerReport, Report, Width


def rounding(report: Report) -> str:
    """What widths were rounded to where nobody asked for it."""
    if report.rounded or report.round_to == 1:
        return ""
    return f" · widths rounded to {report.round_to} for kernels (--round-to)"


def alignment_table(layers: Sequence[LayerReport]) -> Table:
    """Channels into and out of each layer, what they go by, and why that or why not."""
    table = new_table("layer", ">channels in", ">by", "", ">out", ">by", "")
    for layer in layers:
        if layer.inputs is not None and layer.outputs is not None:
            sides = (_side(layer.inputs), _side(layer.outputs))
            table.add_row(Text(layer.before.node), *(cell for side in sides for cell in side))
    return table


def _side(width: Width) -> tuple[str, str, Text]:
    before, after = str(width.before), str(width.before if width.after is None else width.after)
    not_aligned = "" if width.aligned else "not aligned: "
    return became(before, after), str(width.step), Text(not_aligned + width.why)


def alignment_lines(layers: Sequence[LayerReport]) -> Iterable[RenderableType]:
    """How many layers are aligned, and for each reason that others are not, where and how many."""
    weighted = [layer for layer in layers if layer.inputs is not None]
    if not weighted:
        return
    aligned = sum(layer.aligned for layer in weighted)
    yield text_line(f"aligned for Tensor Cores: {aligned} of {len(weighted)} layers")
    reasons: dict[str, list[str]] = {}
    for layer in weighted:
        for side, words in ((layer.inputs, "into"), (layer.outputs, "out of")):
            if side is not None and not side.aligned:
                reasons.setdefault(side.why, []).append(f"{words} {layer.before.node}")
    for reason, places in reasons.items():
        yield text_line(f"  {reason}: {some_names(places)}")
