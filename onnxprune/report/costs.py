"""What models cost: parameters, multiply-accumulates, bytes, times."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from onnxprune.density import Change
from onnxprune.report.layout import became, byte_size, new_table, number
from onnxprune.report.ops import NO_RULE, OperatorUse
from onnxprune.types import Latency, ModelStats


def operators_used(operators: Sequence[OperatorUse]) -> Table:
    """What each operator costs, and what its rule does."""
    table = new_table("operator", ">nodes", ">params", ">MACs", "what the rule does")
    for use in operators:
        name = f"{use.domain}.{use.op_type}" if use.domain else use.op_type
        params, macs = (number(n) if n else "" for n in (use.params, use.macs))
        table.add_row(name, str(use.count), params, macs, Text(use.rule or NO_RULE))
    return table


def cost_table(before: ModelStats, after: ModelStats, first: str, second: str) -> Table:
    """What two models cost, side by side."""
    table = new_table("", f">{first}", f">{second}", ">left")
    rows = [
        ("params", before.params, after.params),
        ("MACs", before.macs, after.macs),
        ("file", before.bytes, after.bytes),
        ("channels", before.channels, after.channels),
    ]
    for name, old, new in rows:
        spelled = byte_size if name == "file" else number
        left = f"{100 * new / old:.1f} %" if old else ""
        table.add_row(name, spelled(old), spelled(new), left)
    return table


def layer_table(stats: ModelStats) -> Table:
    """What each layer costs."""
    table = new_table("layer", "operator", ">in", ">out", ">MACs", ">MACs per byte")
    for layer in stats.layers:
        if layer.macs:
            table.add_row(
                Text(layer.node), layer.op_type, str(layer.inputs), str(layer.outputs),
                number(layer.macs), f"{layer.density:.3g}",
            )  # fmt: skip
    return table


def change_table(found: Sequence[Change]) -> Table:
    """Layers before and after."""
    table = new_table("layer", ">channels in", ">out", ">MACs", ">left", ">MACs per byte")
    for change in found:
        old, new = change.before, change.after
        table.add_row(
            Text(new.node),
            became(str(old.inputs), str(new.inputs)),
            became(str(old.outputs), str(new.outputs)),
            number(new.macs),
            f"{100 * new.macs / old.macs:.1f} %",
            became(f"{old.density:.3g}", f"{new.density:.3g}"),
        )
    return table


def totals(stats: ModelStats) -> str:
    """What a model costs, in one line."""
    return (
        f"{number(stats.params)} params · {number(stats.macs)} MACs · {byte_size(stats.bytes)} · "
        f"{stats.channels} channels"
    )


def times(found: Latency) -> str:
    """Medians, with what nine of ten runs stay under, and at what they were measured."""
    cores = "all cores" if found.threads is None else f"{found.threads} thread"
    cores += "s" if (found.threads or 1) > 1 else ""
    batch = "" if found.batch is None else f", batch {found.batch}"
    foretold = "" if found.predicted is None else f" (predicted {1e3 * found.predicted:.3g} ms)"
    old, new = found.before_p90, found.after_p90
    slow = "" if old is None or new is None else f", p90 {1e3 * old:.3g} → {1e3 * new:.3g} ms"
    return (
        f"latency in ONNX Runtime, {cores}{batch}: {1e3 * found.before:.3g} ms → "
        f"{1e3 * found.after:.3g} ms{foretold}{slow}, ratio {found.ratio:.3f} ({found.low:.3f} to "
        f"{found.high:.3f} at 95 %, {found.runs} runs in turn)"
    )
