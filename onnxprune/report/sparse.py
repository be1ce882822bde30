"""What pattern weights hold, for people and as comma-separated values."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence

from rich.table import Table
from rich.text import Text

from onnxprune.report.layout import byte_size, counted_layers, new_table, number, share
from onnxprune.types import HeldWeight, Sparsified, ThinLayer


def thin_table(layers: Sequence[ThinLayer]) -> Table:
    """One row for each layer that a pattern was to be imposed on."""
    columns = ("layer", "operator", "weight", ">axis", ">out x in", ">zeros", ">kept", ">error", "")
    table = new_table(*columns)
    for one in layers:
        figures = ("", "", "")
        if one.done:
            figures = (f"{100 * one.zeros:.1f} %", f"{one.kept:.4f}", f"{one.error:.3g}")
        note = one.why if one.done else f"dense: {one.why}"
        table.add_row(
            Text(one.node),
            one.op_type,
            Text(one.tensor or "–"),
            "" if one.axis is None else str(one.axis),
            _matrix(one),
            *figures,
            Text(note),
        )
    return table


def held_table(weights: Sequence[HeldWeight]) -> Table:
    """What sparsity each weight has."""
    blocks = list(dict.fromkeys(name for one in weights for name in one.blocks))
    table = new_table("layer", "operator", "weight", ">axis", ">out x in", ">zeros", "holds",
                   *(f">zero {name}" for name in blocks), ">outputs", ">channels")  # fmt: skip
    for one in weights:
        shares = (share(one.blocks.get(name)) for name in blocks)
        table.add_row(
            Text(one.node),
            one.op_type,
            Text(one.tensor),
            str(one.axis),
            _matrix(one),
            share(one.zeros),
            " ".join(one.runs) or "–",
            *shares,
            str(one.zero_outputs or "–"),
            str(one.zero_channels or "–"),
        )
    return table


def _matrix(one: ThinLayer | HeldWeight) -> str:
    """Outputs by channels, by kernel positions, of each group."""
    if one.axis is None:
        return ""
    groups = f"{one.groups} of " if one.groups > 1 else ""
    taps = f"x{one.taps}" if one.taps > 1 else ""
    return f"{groups}{one.outputs}x{one.channels}{taps}"


def sparse_lines(found: Sparsified) -> Iterable[str]:
    """How far the pattern got, and honestly what it is good for."""
    done = [one for one in found.layers if one.done]
    own = [one for one in done if not one.shared]
    size = sum(one.size for one in own)
    dense = len(found.layers) - len(done)
    line = f"{found.pattern} in {counted_layers(len(done))}"
    line += f", {dense} stay{'s' if dense == 1 else ''} dense" if dense else ""
    if size:
        zeros = sum(one.zeros * one.size for one in own) / size
        line += f" · {100 * zeros:.1f} % of {number(size)} weights are zero"
        line += f" · {_methods(done, found.method)}"
    yield line
    if not own:
        return
    if found.pattern == "2:4":
        gains = sum(one.gains for one in done)
        yield (
            f"TensorRT has sparse kernels for 2:4 in 16-bit and 8-bit types, and takes them where "
            f"its own timing favours them; gain expected in {gains} of {counted_layers(len(done))}"
        )
    else:
        yield (
            f"TensorRT and ONNX Runtime have no kernels for {found.pattern}: nothing runs faster, "
            "it saves bytes where the file is compressed"
        )
    line = f"thinned weights: {byte_size(found.dense_bytes)} as stored, "
    line += f"{byte_size(found.packed_bytes)} as values and positions"
    if found.xz_bytes is not None:
        before, after = found.xz_bytes
        line += f" · the file in xz: {byte_size(before)} → {byte_size(after)}"
    yield line


def _methods(done: Sequence[ThinLayer], asked: str) -> str:
    """How values were chosen; where the method had nothing to go by, how many layers go by size."""
    plain = sum(one.method != asked for one in done)
    if plain in (0, len(done)):
        return f"by {done[0].method}"
    return f"by {asked}, {plain} of {counted_layers(len(done))} by magnitude"


def thin_csv(layers: Sequence[ThinLayer]) -> str:
    """What a pattern did to each layer, as comma-separated values."""
    columns = ("node", "op_type", "tensor", "eligible", "done", "axis", "groups", "outputs",
               "channels", "taps", "aligned", "zeros", "kept", "error", "gains", "why",
               "shared", "method")  # fmt: skip
    return _csv(columns, layers)


def held_csv(weights: Sequence[HeldWeight]) -> str:
    """What sparsity each weight has, as comma-separated values."""
    columns = ("node", "op_type", "tensor", "axis", "groups", "outputs", "channels", "taps",
               "zeros", "runs", "blocks", "zero_outputs", "zero_channels")  # fmt: skip
    return _csv(columns, weights)


def _csv(columns: Sequence[str], rows: Sequence[object]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow([_cell(getattr(row, name)) for name in columns])
    return out.getvalue()


def _cell(value: object) -> object:
    match value:
        case tuple():
            return " ".join(map(str, value))
        case dict():
            return " ".join(f"{name}={share:g}" for name, share in value.items())
    return value
