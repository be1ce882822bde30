"""Importance from weights alone: scales, norms of filters, and how alike filters are."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from onnxprune.graph import Node
from onnxprune.groups import DependencyGraph
from onnxprune.types import AnyArray, ChannelGroup, Float64Array, WeightAxis

_log = logging.getLogger(__name__)
_SHOW_A_CONSTANT = {"Identity", "Cast"}
_MOST_PAIRS = 1 << 22  # distances between filters that are held at a time


def _mean(stacked: Float64Array) -> Float64Array:
    known = ~np.isnan(stacked)
    return np.asarray(np.nansum(stacked, axis=0) / np.maximum(known.sum(axis=0), 1), np.float64)


def _largest(stacked: Float64Array) -> Float64Array:
    return np.asarray(np.max(np.nan_to_num(stacked, nan=0.0), axis=0), np.float64)


def _sum(stacked: Float64Array) -> Float64Array:
    return np.asarray(np.nansum(stacked, axis=0), np.float64)


# Ways to combine values of several weights, shape (weights, units), NaN where one has no unit.
AGGREGATES: Mapping[str, Callable[[Float64Array], Float64Array]] = {
    "sum": _sum,
    "mean": _mean,
    "max": _largest,
}


def is_bn_scale(axis: WeightAxis) -> bool:
    """Whether an axis is that of a BatchNormalization's scale."""
    return axis.op_type == "BatchNormalization" and axis.input_index == 1


def bn_scale(
    graph: DependencyGraph, groups: Iterable[ChannelGroup], aggregate: str
) -> dict[int, Float64Array]:
    """|gamma| of the scales that ride along, for the groups that have any.

    Args:
        graph: The analysis.
        groups: Groups to rank.
        aggregate: How several scales of one unit combine.

    Returns:
        Importance, shape (units,), by group id; groups without a scale are left out.

    Source: Liu et al. 2017, Network Slimming (arXiv:1708.06519), sec. 3.
    """
    values: dict[int, Float64Array] = {}
    for group in groups:
        parts = [
            per_unit(axis, np.abs(finite(axis.tensor, real_values(graph, axis.tensor))), group)
            for axis in group.parameters
            if is_bn_scale(axis)
        ]
        if parts:
            values[group.id] = AGGREGATES[aggregate](np.stack(parts))
    return values


def per_unit(axis: WeightAxis, values: AnyArray, group: ChannelGroup) -> Float64Array:
    """Sum over the positions of each unit, NaN for units that the axis does not have.

    Args:
        axis: Where the values are.
        values: One for each position on ``axis.axes`` of ``axis.view``, any shape.
        group: Whose units are meant.

    Returns:
        Shape (units,).
    """
    flat = np.asarray(values, np.float64).reshape(-1)[axis.index]
    total = np.bincount(axis.unit, flat, group.size)
    count = np.bincount(axis.unit, minlength=group.size)
    return np.where(count > 0, total, np.nan)


@dataclass
class FilterScores:
    """Scores of the slices of weights that make channels; every weight is read once."""

    graph: DependencyGraph
    method: str
    aggregate: str = "sum"
    _scales: dict[str, Float64Array | None] = field(default_factory=dict)

    def of(self, groups: Iterable[ChannelGroup]) -> dict[int, Float64Array]:
        """Importance of each unit by group id, over all the weights that make it."""
        groups = list(groups)
        wanted: dict[str, list[tuple[ChannelGroup, WeightAxis]]] = {}
        for group in groups:
            for axis in self._made_by(group):
                wanted.setdefault(axis.tensor, []).append((group, axis))
        parts: dict[int, list[Float64Array]] = {group.id: [] for group in groups}
        for tensor, uses in wanted.items():
            weight = finite(tensor, real_values(self.graph, tensor))
            for group, axis in uses:
                parts[group.id].append(per_unit(axis, self._slices(weight, axis), group))
        return {
            group.id: AGGREGATES[self.aggregate](np.stack(parts[group.id]))
            if parts[group.id]
            else np.zeros(group.size)
            for group in groups
        }

    def _made_by(self, group: ChannelGroup) -> Iterator[WeightAxis]:
        yield from group.producers
        if self.method == "bn_l1":
            # With BatchNormalization folded in, the depthwise filter that a channel passes counts
            # too; plain norms are those of the filters that make it.
            yield from filter(_is_depthwise, group.parameters)

    def _slices(self, weight: AnyArray, axis: WeightAxis) -> Float64Array:
        """Score of each position on the axes of a weight, flat."""
        seen = weight.reshape(axis.view)
        rest = tuple(a for a in range(seen.ndim) if a not in axis.axes)
        if self.method == "fpgm":
            count = int(np.prod([axis.view[a] for a in axis.axes]))
            return fpgm(np.moveaxis(seen, axis.axes, range(len(axis.axes))).reshape(count, -1))
        with np.errstate(over="ignore", invalid="ignore"):
            if self.method in ("l2", "lamp"):
                norms = np.sqrt(np.sum(np.square(seen, dtype=np.float64), axis=rest))
            else:
                norms = np.sum(np.abs(seen), axis=rest, dtype=np.float64)
        flat = np.asarray(norms, np.float64).reshape(-1)
        if self.method == "lamp":
            return lamp(flat)
        if self.method == "bn_l1":
            scale = self._scale_behind(axis.tensor)
            if scale is not None and scale.size == flat.size:
                return flat * scale
        return flat

    def _scale_behind(self, tensor: str) -> Float64Array | None:
        """What the one BatchNormalization right behind a weight multiplies its channels by."""
        if tensor not in self._scales:
            used = self.graph.graph.uses.get(tensor)
            readers = self.graph.graph.consumers.get(used[0].outputs[0], []) if used else []
            found = [reader for reader, _ in readers if reader.op_type == "BatchNormalization"]
            self._scales[tensor] = self._folded(found[0]) if len(found) == 1 else None
        return self._scales[tensor]

    def _folded(self, node: Node) -> Float64Array | None:
        gamma, variance = self._constant(node.inputs[1]), self._constant(node.inputs[4])
        if gamma is None or variance is None:
            return None
        epsilon = node.attributes["epsilon"].f if node.has("epsilon") else 1e-5
        return np.asarray(np.abs(gamma) / np.sqrt(variance + epsilon), np.float64)

    def _constant(self, name: str) -> Float64Array | None:
        graph = self.graph.graph
        while name not in graph.constants:
            node = graph.producer.get(name)
            if node is None or node.op_type not in _SHOW_A_CONSTANT:
                return None
            name = node.inputs[0]
        return graph.constants[name].weight.read().astype(np.float64)


def fpgm(filters: AnyArray) -> Float64Array:
    """Sum of the distances from each filter to all others: the most central ones are redundant.

    Args:
        filters: One in each row, shape (n, weights).

    Returns:
        Shape (n,). Takes n² distances, a block of rows at a time.

    Source: He et al. 2019, Filter Pruning via Geometric Median (arXiv:1811.00250), eq. 4.
    """
    rows = np.asarray(filters, np.float64)
    square = np.einsum("ij,ij->i", rows, rows)
    step = max(1, _MOST_PAIRS // max(1, len(rows)))
    found = np.empty(len(rows))
    for start in range(0, len(rows), step):
        block = rows[start : start + step]
        distance = square[start : start + step, None] + square - 2 * block @ rows.T
        found[start : start + step] = np.sqrt(np.maximum(distance, 0)).sum(axis=1)
    return found


def lamp(norms: Float64Array) -> Float64Array:
    """Squared norm over the sum of the squared norms that are not smaller: comparable by layer.

    Args:
        norms: L2 norm of each filter of one weight, shape (n,).

    Returns:
        Shape (n,), in [0, 1].

    Source: Lee et al. 2021, Layer-adaptive sparsity for magnitude-based pruning
        (arXiv:2010.07611), eq. 4, for whole filters.
    """
    square = np.square(norms)
    order = np.argsort(square, kind="stable")
    rest = np.cumsum(square[order][::-1])[::-1]
    found = np.empty_like(square)
    found[order] = square[order] / np.maximum(rest, np.finfo(np.float64).tiny)
    return found


def _is_depthwise(axis: WeightAxis) -> bool:
    """A depthwise filter rides along: it makes each channel from that channel alone."""
    filters = axis.op_type in ("Conv", "ConvTranspose", "FusedConv") and axis.input_index == 1
    return filters and len(axis.view) >= 3


def real_values(graph: DependencyGraph, tensor: str) -> AnyArray:
    """A weight as real numbers: what is stored, or what DequantizeLinear makes of it."""
    array = graph.graph.constants[tensor].weight.read()
    for node, position in graph.graph.consumers.get(tensor, []):
        if node.op_type == "DequantizeLinear" and position == 0:
            return _dequantized(graph, node, array)
    if array.dtype in (np.float32, np.float64):
        return array
    return array.astype(np.float64)


def _dequantized(graph: DependencyGraph, node: Node, array: AnyArray) -> Float64Array:
    constants = graph.graph.constants
    parts = [constants.get(name) for name in node.inputs[1:]]
    scale = parts[0].weight.read().astype(np.float64) if parts and parts[0] else np.ones(())
    zero = parts[1].weight.read().astype(np.float64) if len(parts) > 1 and parts[1] else 0.0
    values = array.astype(np.float64)
    if scale.ndim == 1 and scale.size > 1:
        along = [
            -1 if axis == node.int("axis", 1) % array.ndim else 1 for axis in range(array.ndim)
        ]
        scale, zero = scale.reshape(along), np.reshape(zero, along) if np.ndim(zero) else zero
    elif scale.shape not in ((), (1,)):
        return values  # in blocks, which is frozen anyway
    return np.asarray((values - zero) * scale, np.float64)


def finite(tensor: str, array: AnyArray) -> AnyArray:
    """The same array; says once if something in it is not a number."""
    # A sum is finite unless an element is not, or it overflows, which float64 does not.
    with np.errstate(invalid="ignore", over="ignore"):
        odd = not np.isfinite(np.sum(array, dtype=np.float64))
    if odd:
        _log.warning("weight '%s' holds NaN/Inf", tensor)
    return array
