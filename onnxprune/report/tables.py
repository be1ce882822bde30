"""The reports of the verbs for people: plain text where the terminal or a pipe asks for it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import RenderableType

from onnxprune.density import changes, thinnest
from onnxprune.report.channels import group_count, group_table, interface_line
from onnxprune.report.costs import (
    change_table,
    cost_table,
    layer_table,
    operators_used,
    times,
    totals,
)
from onnxprune.report.endings import closing, drift_lines, next_line, target_lines, tidied_lines
from onnxprune.report.layout import text_line
from onnxprune.report.ops import OperatorUse
from onnxprune.report.quantized import quantized_lines, slower
from onnxprune.report.restored import restored_lines
from onnxprune.report.sparse import held_table, sparse_lines, thin_table
from onnxprune.report.widths import alignment_lines, alignment_table, rounding
from onnxprune.types import Report

_THINNEST = 5
_MOST_LAYERS = 60  # rows of a table that nobody asked to be longer


def inspect_report(
    report: Report, operators: Sequence[OperatorUse] | None = None, *, verbose: bool = False
) -> Iterable[RenderableType]:
    """The channel groups, or the operators, and the totals; ``verbose`` names all that is in it."""
    if operators is not None:
        yield operators_used(operators)
    elif report.groups:
        yield group_table(report.groups, cut=False, every=verbose)
    if verbose:
        yield layer_table(report.before)
    if report.held is not None:
        yield held_table(report.held)
    free = sum(group.frozen is None for group in report.groups)
    how = f"importance auto: {report.importance} ({report.importance_why})"
    yield text_line(
        f"{group_count(report)}, {free} can be pruned · " + (how if free else report.importance_why)
    )
    yield text_line(f"{totals(report.before)} · at {_shapes(report)}")
    if report.without_effect:
        counted = "channel has" if report.without_effect == 1 else "channels have"
        yield text_line(
            f"{report.without_effect} {counted} no effect: shrink --lossless removes them"
        )


def shrink_report(report: Report, *, verbose: bool = False) -> Iterable[RenderableType]:
    """Before and after, what was cut, drift, and the closing line."""
    if verbose:
        yield group_table(report.groups)
        yield alignment_table(report.layers)
    cut = sum(group.kept < group.size for group in report.groups)
    free = sum(group.frozen is None for group in report.groups)
    yield text_line(
        f"{group_count(report)}: {cut} cut, {free - cut} left whole, "
        f"{len(report.groups) - free} frozen · importance {report.importance}"
        + (f" ({report.importance_why})" if report.importance_why else "")
        + rounding(report)
    )
    yield from interface_line(report)
    assert report.after is not None
    yield cost_table(report.before, report.after, "before", "after")
    if verbose or report.rounded:
        yield from alignment_lines(report.layers)
    yield from restored_lines(report, verbose=verbose)
    if report.sparsified is not None:
        if verbose:
            yield thin_table(report.sparsified.layers)
        yield from map(text_line, sparse_lines(report.sparsified))
    yield from tidied_lines(report)
    if report.quantized is not None:
        yield from map(text_line, quantized_lines(report.quantized, verbose=verbose))
    if report.latency is not None:
        yield text_line(times(report.latency))
        if report.quantized is not None and report.latency.ratio > 1:
            yield text_line(slower(report.quantized.to))
    yield from drift_lines(report)
    yield from target_lines(report, verbose=verbose)
    yield text_line(closing(report))
    yield from next_line(report)


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
        yield text_line(f"and {len(found.layers) - len(shown)} layers that hold it (-v shows them)")
    yield from map(text_line, sparse_lines(found))
    yield from tidied_lines(report)
    if report.latency is not None:
        yield text_line(times(report.latency))
    yield from drift_lines(report)
    yield from target_lines(report, verbose=verbose)
    yield text_line(closing(report))
    yield from next_line(report)


def quantize_report(report: Report, *, verbose: bool = False) -> Iterable[RenderableType]:
    """What became of which nodes, why others stayed, drift, and the closing line."""
    found = report.quantized
    assert found is not None
    yield from map(text_line, quantized_lines(found, verbose=verbose))
    yield from drift_lines(report)
    yield from target_lines(report, verbose=verbose)
    yield text_line(closing(report))
    yield from next_line(report)


def compare_report(report: Report, *, verbose: bool = False) -> Iterable[RenderableType]:
    """Costs side by side, layers that lost density, times and drift."""
    assert report.after is not None
    yield cost_table(report.before, report.after, "first", "second")
    found = changes(report.before, report.after)
    shown = found if verbose else thinnest(found, _THINNEST)
    if shown:
        yield change_table(shown)
    if report.latency is not None:
        yield text_line(times(report.latency))
    yield from drift_lines(report)


def _shapes(report: Report) -> str:
    named = (f"{name} {'x'.join(map(str, shape))}" for name, shape in report.stand_ins.items())
    return ", ".join(named) or "no inputs"
