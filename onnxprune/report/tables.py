"""Reports for people: rich tables, plain text where the terminal or a pipe asks for it."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterable, Sequence

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from onnxprune.density import Change, changes, thinnest
from onnxprune.groups import DependencyGraph
from onnxprune.report.checks import check_lines
from onnxprune.report.ops import NO_RULE, OperatorUse
from onnxprune.types import (
    ChannelGroup,
    Drift,
    GroupReport,
    HeldWeight,
    Latency,
    LayerReport,
    ModelStats,
    Quantized,
    Report,
    Sparsified,
    ThinLayer,
    Width,
)

_INTERFACE = re.compile(r"input '([^']+)', whose shape is the model's interface")
_MOST_INPUTS = 4
_MOST_OUTPUTS = 6
_PIPE_WIDTH = 1 << 16  # columns where nobody says how wide the page is: what reads it may wrap
_THINNEST = 5
_MOST_NAMED = 3  # nodes that one reason names
_MOST_LAYERS = 60  # rows of a table that nobody asked to be longer
_MOST_REASONS = 8
_SPARED = 60  # characters of a name before it is shortened


def console(*, terminal: bool) -> Console:
    """Where tables go: stdout."""
    return Console(width=None if terminal else _PIPE_WIDTH, highlight=False, soft_wrap=False)


def shrink_report(report: Report, *, verbose: bool = False) -> Iterable[RenderableType]:
    """Before and after, what was cut, drift, and the closing line."""
    if verbose:
        yield group_table(report.groups)
        yield alignment_table(report.layers)
    cut = sum(group.kept < group.size for group in report.groups)
    free = sum(group.frozen is None for group in report.groups)
    yield _line(
        f"{_groups(report)}: {cut} cut, {free - cut} left whole, "
        f"{len(report.groups) - free} frozen · importance {report.importance}"
        + (f" ({report.importance_why})" if report.importance_why else "")
        + _rounding(report)
    )
    yield from _interface_line(report)
    assert report.after is not None
    yield _cost_table(report.before, report.after, "before", "after")
    if verbose or report.rounded:
        yield from _alignment_lines(report.layers)
    yield from _restored_lines(report, verbose=verbose)
    if report.sparsified is not None:
        if verbose:
            yield thin_table(report.sparsified.layers)
        yield from map(_line, _sparse_lines(report.sparsified))
    yield from _tidied_lines(report)
    if report.quantized is not None:
        yield from map(_line, _quantized_lines(report.quantized, verbose=verbose))
    if report.latency is not None:
        yield _line(_times(report.latency))
        if report.quantized is not None and report.latency.ratio > 1:
            yield _line(_slower(report.quantized.to))
    yield from drift_lines(report)
    yield from target_lines(report, verbose=verbose)
    yield _line(_closing(report))
    yield from next_line(report)


def _slower(to: str) -> str:
    """Why fewer bits are no faster here."""
    what = "Q/DQ pairs" if to == "int8" else f"{to} models"
    return (
        f"ONNX Runtime on this CPU runs {what} slower than float32; TensorRT is what they are for"
    )


def _rounding(report: Report) -> str:
    """What widths were rounded to where nobody asked for it."""
    if report.rounded or report.round_to == 1:
        return ""
    return f" · widths rounded to {report.round_to} for kernels (--round-to)"


def _restored_lines(report: Report, *, verbose: bool) -> Iterable[RenderableType]:
    """What refitting did, in one line, or a line for each layer."""
    if not report.restored:
        if report.shifted:
            yield _line(
                f"restored: {report.shifted} biases make up for what was dropped "
                "(without data; --data FILE.npz refits every layer)"
            )
        return
    taken = [one for one in report.restored if one.ridge is not None]
    compared = [one for one in report.restored if math.isfinite(one.before)]
    options = report.recipe.get("options")
    drawn = isinstance(options, dict) and options.get("restore") == "pictures"
    fitted = "made-up pictures" if drawn else report.verdict.inputs or "the data"
    line = f"restored: {len(taken)} of {len(report.restored)} layers refitted on {fitted}"
    if compared:
        before = sum(one.before for one in compared) / len(compared)
        after = sum(one.after for one in compared) / len(compared)
        line += f"; mean held-out error {before:.3g} → {after:.3g}"
    if drawn:
        line += " (--restore refit --data FILE.npz fits to what it really sees)"
    yield _line(line)
    left = [one for one in report.restored if one not in compared]
    if left and not verbose:
        counted = "1 layer" if len(left) == 1 else f"{len(left)} layers"
        yield _line(f"  {counted} could not be refitted, first {left[0].node}: {left[0].why}")
    for one in report.restored if verbose else ():
        errors = f"{one.before:.3g} → {one.after:.3g}" if one in compared else "not refitted"
        yield _line(f"  {one.node}: {errors}{f' ({one.why})' if one.why else ''}")


def inspect_report(
    report: Report, operators: Sequence[OperatorUse] | None = None, *, verbose: bool = False
) -> Iterable[RenderableType]:
    """The channel groups, or the operators, and the totals; ``verbose`` names all that is in it."""
    if operators is not None:
        yield _operator_table(operators)
    elif report.groups:
        yield group_table(report.groups, cut=False, every=verbose)
    if verbose:
        yield _layer_table(report.before)
    if report.held is not None:
        yield held_table(report.held)
    free = sum(group.frozen is None for group in report.groups)
    how = f"importance auto: {report.importance} ({report.importance_why})"
    yield _line(
        f"{_groups(report)}, {free} can be pruned · " + (how if free else report.importance_why)
    )
    yield _line(f"{_totals(report.before)} · at {_shapes(report)}")
    if report.without_effect:
        counted = "channel has" if report.without_effect == 1 else "channels have"
        yield _line(f"{report.without_effect} {counted} no effect: shrink --lossless removes them")


def sparsify_report(report: Report, *, verbose: bool = False) -> Iterable[RenderableType]:
    """What the pattern did to each layer, what that is good for, drift, and the closing line."""
    found = report.sparsified
    assert found is not None
    shown = found.layers
    if not verbose and len(shown) > _MOST_LAYERS:
        shown = tuple(one for one in shown if not one.done)
    if shown:
        yield thin_table(shown)
    if len(shown) < len(found.layers):
        yield _line(f"and {len(found.layers) - len(shown)} layers that hold it (-v shows them)")
    yield from map(_line, _sparse_lines(found))
    yield from _tidied_lines(report)
    if report.latency is not None:
        yield _line(_times(report.latency))
    yield from drift_lines(report)
    yield from target_lines(report, verbose=verbose)
    yield _line(_closing(report))
    yield from next_line(report)


def next_line(report: Report) -> Iterable[RenderableType]:
    """What to run next."""
    if report.following is not None:
        yield _line(f"next: {report.following.command}")


def target_lines(report: Report, *, verbose: bool) -> Iterable[RenderableType]:
    """What a target said of the result, where it was asked, and what to expect of it."""
    if report.checked is not None:
        yield from check_lines(report.checked, verbose=verbose, notes=False)
    if report.following is not None:
        yield from map(_line, report.following.expect)


def quantize_report(report: Report, *, verbose: bool = False) -> Iterable[RenderableType]:
    """What became of which nodes, why others stayed, drift, and the closing line."""
    found = report.quantized
    assert found is not None
    yield from map(_line, _quantized_lines(found, verbose=verbose))
    yield from drift_lines(report)
    yield from target_lines(report, verbose=verbose)
    yield _line(_closing(report))
    yield from next_line(report)


def _quantized_lines(found: Quantized, *, verbose: bool = False) -> Iterable[str]:
    """How far quantization got, and what it left and why."""
    what = "layers compute" if found.to == "int8" else "nodes compute"
    line = f"{found.to}: {len(found.done)} {what} in it, {len(found.kept)} stay as they were"
    before, after = found.bytes
    yield f"{line} · weights {_size(before)} → {_size(after)}"
    if found.method:
        tried = ", ".join(f"{name} {error:.3g}" for name, error in found.tried.items())
        yield f"ranges of activations by {found.method}" + (
            f" (held-out error: {tried})" if tried else ""
        )
    if found.lost:
        yield f"{found.lost} weights are too small for it and became zero"
    reasons: dict[str, list[str]] = {}
    for one in found.kept:
        reasons.setdefault(one.why, []).append(one.node)
    for at, (why, nodes) in enumerate(reasons.items()):
        if at == _MOST_REASONS and not verbose:
            yield f"  and {len(reasons) - at} more reasons (-v gives them)"
            return
        shown = nodes if verbose else nodes[:_MOST_NAMED]
        more = f" (+{len(nodes) - len(shown)})" if len(nodes) > len(shown) else ""
        yield f"  not {found.to}: {why}: {', '.join(shown)}{more}"


def _sparse_lines(found: Sparsified) -> Iterable[str]:
    """How far the pattern got, and honestly what it is good for."""
    done = [one for one in found.layers if one.done]
    own = [one for one in done if not one.shared]
    size = sum(one.size for one in own)
    dense = len(found.layers) - len(done)
    line = f"{found.pattern} in {_layers(len(done))}"
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
            f"its own timing favours them; gain expected in {gains} of {_layers(len(done))}"
        )
    else:
        yield (
            f"TensorRT and ONNX Runtime have no kernels for {found.pattern}: nothing runs faster, "
            "it saves bytes where the file is compressed"
        )
    line = f"thinned weights: {_size(found.dense_bytes)} as stored, "
    line += f"{_size(found.packed_bytes)} as values and positions"
    if found.xz_bytes is not None:
        before, after = found.xz_bytes
        line += f" · the file in xz: {_size(before)} → {_size(after)}"
    yield line


def _methods(done: Sequence[ThinLayer], asked: str) -> str:
    """How values were chosen; where the method had nothing to go by, how many layers go by size."""
    plain = sum(one.method != asked for one in done)
    if plain in (0, len(done)):
        return f"by {done[0].method}"
    return f"by {asked}, {plain} of {_layers(len(done))} by magnitude"


def _layers(count: int) -> str:
    return f"{count} layer{'s' if count != 1 else ''}"


def thin_table(layers: Sequence[ThinLayer]) -> Table:
    """One row for each layer that a pattern was to be imposed on."""
    table = _table("layer", "operator", "weight", ">axis", ">out x in", ">zeros", ">kept", ">error",
                   "")  # fmt: skip
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


def _matrix(one: ThinLayer | HeldWeight) -> str:
    """Outputs by channels, by kernel positions, of each group."""
    if one.axis is None:
        return ""
    groups = f"{one.groups} of " if one.groups > 1 else ""
    taps = f"x{one.taps}" if one.taps > 1 else ""
    return f"{groups}{one.outputs}x{one.channels}{taps}"


def held_table(weights: Sequence[HeldWeight]) -> Table:
    """What sparsity each weight has."""
    blocks = list(dict.fromkeys(name for one in weights for name in one.blocks))
    table = _table("layer", "operator", "weight", ">axis", ">out x in", ">zeros", "holds",
                   *(f">zero {name}" for name in blocks), ">outputs", ">channels")  # fmt: skip
    for one in weights:
        shares = (_share(one.blocks.get(name)) for name in blocks)
        table.add_row(
            Text(one.node),
            one.op_type,
            Text(one.tensor),
            str(one.axis),
            _matrix(one),
            _share(one.zeros),
            " ".join(one.runs) or "–",
            *shares,
            str(one.zero_outputs or "–"),
            str(one.zero_channels or "–"),
        )
    return table


def _share(value: float | None) -> str:
    return "–" if not value else f"{100 * value:.1f} %"


def compare_report(report: Report, *, verbose: bool = False) -> Iterable[RenderableType]:
    """Costs side by side, layers that lost density, times and drift."""
    assert report.after is not None
    yield _cost_table(report.before, report.after, "first", "second")
    found = changes(report.before, report.after)
    shown = found if verbose else thinnest(found, _THINNEST)
    if shown:
        yield _change_table(shown)
    if report.latency is not None:
        yield _line(_times(report.latency))
    yield from drift_lines(report)


def group_table(groups: Sequence[GroupReport], *, cut: bool = True, every: bool = False) -> Table:
    """One row for each channel group; frozen ones with the reason.

    Args:
        groups: What to show.
        cut: Show what each keeps.
        every: Show all weights by name, and the nodes that use the producers.
    """
    kept, nodes = (">kept",) if cut else (), ("nodes",) if every else ()
    table = _table("group", "unit", ">size", *kept, "producers → consumers", *nodes, "")
    names = _all if every else _some
    for group in groups:
        table.add_row(
            str(group.id),
            _units(group),
            str(group.size),
            *([str(group.kept)] if cut else []),
            Text(f"{names(group.producers)} → {names(group.consumers)}"),
            *([Text(_all(group.nodes))] if every else []),
            Text(f"frozen: {group.frozen}" if group.frozen else group.why),
        )
    return table


def alignment_table(layers: Sequence[LayerReport]) -> Table:
    """Channels into and out of each layer, what they go by, and why that or why not."""
    table = _table("layer", ">channels in", ">by", "", ">out", ">by", "")
    for layer in layers:
        if layer.inputs is not None and layer.outputs is not None:
            sides = (_side(layer.inputs), _side(layer.outputs))
            table.add_row(Text(layer.before.node), *(cell for side in sides for cell in side))
    return table


def _side(width: Width) -> tuple[str, str, Text]:
    before, after = str(width.before), str(width.before if width.after is None else width.after)
    not_aligned = "" if width.aligned else "not aligned: "
    return _became(before, after), str(width.step), Text(not_aligned + width.why)


def _alignment_lines(layers: Sequence[LayerReport]) -> Iterable[RenderableType]:
    """How many layers are aligned, and for each reason that others are not, where and how many."""
    weighted = [layer for layer in layers if layer.inputs is not None]
    if not weighted:
        return
    aligned = sum(layer.aligned for layer in weighted)
    yield _line(f"aligned for Tensor Cores: {aligned} of {len(weighted)} layers")
    reasons: dict[str, list[str]] = {}
    for layer in weighted:
        for side, words in ((layer.inputs, "into"), (layer.outputs, "out of")):
            if side is not None and not side.aligned:
                reasons.setdefault(side.why, []).append(f"{words} {layer.before.node}")
    for reason, places in reasons.items():
        yield _line(f"  {reason}: {_some(places)}")


def _units(group: GroupReport) -> str:
    """What one unit is, and where it is more than a channel, how many and how wide."""
    if group.unit == "channel":
        return group.unit
    many = f"{group.units} {group.unit}{'s' if group.units != 1 else ''}"
    return f"{many} of {group.size // group.units}" if group.size % group.units == 0 else many


def group_details(
    graph: DependencyGraph, groups: Iterable[ChannelGroup]
) -> Iterable[RenderableType]:
    """Every weight axis of some groups."""
    for group in groups:
        yield from group_detail(graph, group)


def group_detail(graph: DependencyGraph, group: ChannelGroup) -> Iterable[RenderableType]:
    """Every weight axis of one group."""
    units = f"{group.size} {group.unit}{'s' if group.size != 1 else ''}"
    rows = f", in {len(group.cells)} rows that keep equal counts" if len(group.cells) > 1 else ""
    yield _line(f"group {group.id}: {units}, width {group.width}{rows}")
    if group.frozen:
        yield _line(f"frozen: {group.frozen}")
    table = _table("role", "tensor", ">axis", "shape", ">channels", "operator", "node")
    for axis in (*group.producers, *group.parameters, *group.consumers):
        shape = graph.graph.constants[axis.tensor].weight.shape
        table.add_row(
            axis.role,
            Text(axis.tensor),
            str(axis.axis),
            "x".join(map(str, shape)),
            str(axis.index.size),
            axis.op_type,
            Text(axis.node),
        )
    yield table


def groups_csv(groups: Sequence[GroupReport]) -> str:
    """The group table as comma-separated values."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    columns = ("id", "unit", "size", "kept", "producers", "consumers", "frozen", "why", "nodes")
    writer.writerow(columns)
    for group in groups:
        producers, consumers = " ".join(group.producers), " ".join(group.consumers)
        writer.writerow(
            [group.id, group.unit, group.size, group.kept, producers, consumers,
             group.frozen or "", group.why, " ".join(group.nodes)]
        )  # fmt: skip
    return out.getvalue()


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


# -- parts -----------------------------------------------------------------------------------------


def _operator_table(operators: Sequence[OperatorUse]) -> Table:
    table = _table("operator", ">nodes", ">params", ">MACs", "what the rule does")
    for use in operators:
        name = f"{use.domain}.{use.op_type}" if use.domain else use.op_type
        params, macs = (number(n) if n else "" for n in (use.params, use.macs))
        table.add_row(name, str(use.count), params, macs, Text(use.rule or NO_RULE))
    return table


def _cost_table(before: ModelStats, after: ModelStats, first: str, second: str) -> Table:
    table = _table("", f">{first}", f">{second}", ">left")
    rows = [
        ("params", before.params, after.params),
        ("MACs", before.macs, after.macs),
        ("file", before.bytes, after.bytes),
        ("channels", before.channels, after.channels),
    ]
    for name, old, new in rows:
        spelled = _size if name == "file" else number
        left = f"{100 * new / old:.1f} %" if old else ""
        table.add_row(name, spelled(old), spelled(new), left)
    return table


def _layer_table(stats: ModelStats) -> Table:
    table = _table("layer", "operator", ">in", ">out", ">MACs", ">MACs per byte")
    for layer in stats.layers:
        if layer.macs:
            table.add_row(
                Text(layer.node), layer.op_type, str(layer.inputs), str(layer.outputs),
                number(layer.macs), f"{layer.density:.3g}",
            )  # fmt: skip
    return table


def _change_table(found: Sequence[Change]) -> Table:
    table = _table("layer", ">channels in", ">out", ">MACs", ">left", ">MACs per byte")
    for change in found:
        old, new = change.before, change.after
        table.add_row(
            Text(new.node),
            _became(str(old.inputs), str(new.inputs)),
            _became(str(old.outputs), str(new.outputs)),
            number(new.macs),
            f"{100 * new.macs / old.macs:.1f} %",
            _became(f"{old.density:.3g}", f"{new.density:.3g}"),
        )
    return table


def _became(old: str, new: str) -> str:
    return old if old == new else f"{old} → {new}"


def _times(found: Latency) -> str:
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


def _tidied_lines(report: Report) -> Iterable[RenderableType]:
    """What folding and simplifying left."""
    if report.tidied is None:
        return
    (nodes, left), (norms, stay) = report.tidied.nodes, report.tidied.norms
    yield _line(
        f"folded and simplified: {nodes} → {left} nodes, {norms} → {stay} BatchNormalizations"
    )


def drift_lines(report: Report) -> Iterable[RenderableType]:
    """How far every output lies from the original's."""
    verdict = report.verdict
    if not verdict.drift:
        return
    says = " (random input: says little about quality)" if _random(report) else ""
    yield _line(f"drift on {verdict.inputs}{says}:")
    for name, one in list(verdict.drift.items())[:_MOST_OUTPUTS]:
        top = "" if one.top1 is None else f", top-1 agreement {100 * one.top1:.1f} %"
        yield _line(
            f"  {name}: cosine {one.cosine:.4f}, relative L2 {one.rel_l2:.3g}, "
            f"SNR {one.snr_db:.1f} dB{top}"
        )
    if len(verdict.drift) > _MOST_OUTPUTS:
        yield _line(f"  and {len(verdict.drift) - _MOST_OUTPUTS} more outputs")
    for note in verdict.notes:
        yield _line(f"  {note}")


def _closing(report: Report) -> str:
    """Last line of a run, in one line whatever happens."""
    before, after = report.before, report.after
    assert after is not None
    parts = [f"saved {report.output_path}" if report.output_path else "nothing saved"]
    if report.verb == "sparsify" and report.sparsified is not None:
        layers = report.sparsified.layers
        done = sum(one.done for one in layers)
        parts.append(f"{report.sparsified.pattern} in {done} of {_layers(len(layers))}")
    elif report.verb == "quantize":
        parts.append(f"{_size(before.bytes)} → {_size(after.bytes)}")
    else:
        parts.append(f"{number(before.params)} → {number(after.params)} params")
        parts.append(f"{number(before.macs)} → {number(after.macs)} MACs")
    parts.append(_verdict(report))
    worst = worst_drift(report)
    if worst is not None:
        where = " on random input" if _random(report) else ""
        parts.append(f"drift{where} {worst.rel_l2:.3g} (cos {worst.cosine:.3f})")
    return " · ".join(parts)


def _verdict(report: Report) -> str:
    match report.verdict.status:
        case "none":
            return "not verified"
        case "not_run":
            return "not verified: untestable"
    if report.verb == "sparsify":
        assert report.sparsified is not None
        thinned = any(one.done for one in report.sparsified.layers)
        return "pattern holds, loads and runs" if thinned else "a copy: nothing was thinned"
    if report.verb == "quantize":
        return _ran(report)
    if report.sparsified is not None:
        return f"{_proof(report)}, then {report.sparsified.pattern}, which holds"
    return _proof(report)


def _ran(report: Report) -> str:
    """What is known of a quantized model: ONNX Runtime has no bfloat16 kernels on a CPU."""
    assert report.quantized is not None
    return "valid, emulated" if report.quantized.to == "bf16" else "loads and runs"


def _proof(report: Report) -> str:
    """What the cut itself was held against."""
    if report.exact is False:
        return "not exact: statistics of a normalisation changed"
    if report.importance == "lossless":
        return "equals the original"
    return "twin ok" if report.verdict.twin else "loads and runs"


def worst_drift(report: Report) -> Drift | None:
    """Drift of the output that lies farthest off."""
    found = list(report.verdict.drift.values())
    return max(
        found, key=lambda one: one.rel_l2 if one.rel_l2 == one.rel_l2 else 1e300, default=None
    )


def _random(report: Report) -> bool:
    return report.verdict.inputs.startswith("random")


def _totals(stats: ModelStats) -> str:
    return (
        f"{number(stats.params)} params · {number(stats.macs)} MACs · {_size(stats.bytes)} · "
        f"{stats.channels} channels"
    )


def _interface_line(report: Report) -> Iterable[RenderableType]:
    """The inputs, a cache for one, whose shape keeps channels from going."""
    found = [_INTERFACE.findall(group.frozen) for group in report.groups if group.frozen]
    names = list(dict.fromkeys(name for inputs in found for name in inputs))
    if names:
        shown = ", ".join(f"'{name}'" for name in names[:_MOST_INPUTS])
        more = f" and {len(names) - _MOST_INPUTS} more" if len(names) > _MOST_INPUTS else ""
        yield _line(
            f"{sum(map(bool, found))} of the frozen ones must fit the shape of "
            f"an input, as of a cache: {shown}{more}"
        )


def _groups(report: Report) -> str:
    return f"{len(report.groups)} channel group{'s' if len(report.groups) != 1 else ''}"


def _shapes(report: Report) -> str:
    named = (f"{name} {'x'.join(map(str, shape))}" for name, shape in report.stand_ins.items())
    return ", ".join(named) or "no inputs"


def number(value: float) -> str:
    """A count in three digits: 25.6 M."""
    for unit in ("", " k", " M", " G"):
        if value < 999.5:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g} T"


def _size(value: float) -> str:
    text = number(value)
    return f"{text}B" if text[-1].isalpha() else f"{text} B"


def _all(names: Sequence[str]) -> str:
    return ", ".join(names) or "–"


def _some(names: Sequence[str]) -> str:
    if not names:
        return "–"
    first = names[0] if len(names[0]) <= _SPARED else "…" + names[0][-_SPARED:]
    return first if len(names) == 1 else f"{first} (+{len(names) - 1})"


def _line(text: str) -> Text:
    return Text(text, overflow="fold")


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        right = column.startswith(">")
        table.add_column(column.lstrip(">"), justify="right" if right else "left", overflow="fold")
    return table
