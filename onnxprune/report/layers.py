"""Every layer that multiplies, as reports show it: cost, compute density, alignment."""

from __future__ import annotations

from onnxprune.alignment import Alignment, Coming
from onnxprune.density import Change, changes, is_thin
from onnxprune.groups import DependencyGraph
from onnxprune.types import LayerReport, LayerStats, ModelStats


def layer_reports(
    graph: DependencyGraph,
    before: ModelStats,
    after: ModelStats | None = None,
    coming: Coming | None = None,
) -> tuple[LayerReport, ...]:
    """The layers of a model, or those that two models share by name.

    Args:
        graph: The analysis that says what each layer wants and why it has the width it has: of
            the original for a cut, of the second model where two are compared.
        before: Cost of the original.
        after: Cost of what became of it; None where nothing was cut.
        coming: What its weights are to become.
    """
    alignment = Alignment(graph, coming)
    if after is None:
        return tuple(_layer(alignment, one, None) for one in before.layers if one.macs)
    return tuple(_layer(alignment, one.before, one.after) for one in changes(before, after))


def _layer(alignment: Alignment, before: LayerStats, after: LayerStats | None) -> LayerReport:
    thin = after is not None and is_thin(Change(before, after))
    inputs, outputs = alignment.widths(before, after) or (None, None)
    return LayerReport(before, after, thin, inputs, outputs)
