"""Importance of every coupled channel: what `select` ranks by."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from onnxprune.calibrate import energies, grams
from onnxprune.data import Data
from onnxprune.errors import UsageError
from onnxprune.functions import UserFunction
from onnxprune.groups import DependencyGraph
from onnxprune.layers import Layer, kernel_size, layer_of, matrix
from onnxprune.norms import (
    AGGREGATES,
    FilterScores,
    bn_scale,
    finite,
    is_bn_scale,
    per_unit,
    real_values,
)
from onnxprune.obs import Reader, greedy_costs
from onnxprune.types import AnyArray, ChannelGroup, Float64Array, IntArray, WeightAxis

FROM_WEIGHTS = ("bn_scale", "l1", "l2", "bn_l1", "reader", "path", "fpgm", "lamp", "random")
FROM_DATA = ("activation", "wanda", "obs")
METHODS = (*FROM_WEIGHTS, *FROM_DATA)
# Importances that compare from one group to another as they are.
COMPARABLE = ("lamp", "obs")
Scorer = Callable[[ChannelGroup, DependencyGraph], AnyArray]

_SLIMMED = 0.2  # share of BatchNormalization scales next to nothing that no plain training leaves
_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Importance(Mapping[int, Float64Array]):
    """Importance of the units of every prunable group, by group id; higher stays.

    Attributes:
        by_group: Shape (units,) for each group id.
        method: What was measured.
        why: Why that method, in words.
    """

    by_group: Mapping[int, Float64Array] = field(repr=False)
    method: str
    why: str = ""

    def __getitem__(self, group: int) -> Float64Array:
        return self.by_group[group]

    def __iter__(self) -> Iterator[int]:
        return iter(self.by_group)

    def __len__(self) -> int:
        return len(self.by_group)


def score(
    graph: DependencyGraph,
    method: str | Scorer = "auto",
    *,
    aggregate: str | None = None,
    data: Data | None = None,
    seed: int = 0,
) -> Importance:
    """How important each unit of each prunable group is.

    Args:
        graph: From ``analyse``.
        method: One of ``METHODS``, ``auto`` (the best the model and the data allow), a function
            that gives the importance, shape (units,), of a group, or ``path.py:function``.
        aggregate: How the weights that make one unit combine: ``sum``, ``mean`` or ``max``. None
            averages BatchNormalization scales and adds up everything else.
        data: Calibration data, for ``activation``, ``wanda`` and ``obs``.
        seed: For ``random``, and for the positions that ``obs`` looks at.

    Returns:
        Importance in float64 by group id.

    Raises:
        UsageError: There is no such method, it needs data, or a function returned another shape.

    Source: ``bn_scale``: Network Slimming (arXiv:1708.06519); ``l1``, ``l2``: Pruning Filters for
        Efficient ConvNets (arXiv:1608.08710); ``bn_l1``: the L1 norm of the filter after
        BatchNormalization is folded into it; ``reader``: the squared norm of the weights that read
        a channel, as a share of each reader's; ``path``: the root of that times the same share of
        what makes it, so the norms on both sides multiply; ``fpgm``: Filter Pruning via Geometric
        Median (arXiv:1811.00250); ``lamp``: arXiv:2010.07611; ``wanda``: arXiv:2306.11695, by
        columns; ``obs``: arXiv:2403.18955.
    """
    if aggregate is not None and aggregate not in AGGREGATES:
        raise UsageError(f"aggregate is '{aggregate}'", hint="give sum, mean or max")
    if isinstance(method, str) and ":" in method:
        given: Scorer = UserFunction.read(method).load()  # type: ignore[assignment]  # checked below
        method = given
    if callable(method):
        name = getattr(method, "__name__", "function")
        values = {group.id: _asked(method, name, group, graph) for group in graph.prunable}
        return Importance(values, name, "given by the caller")
    why = "asked for"
    if method == "auto":
        method, why = choose(graph, data)
    if method in FROM_DATA and data is None:
        raise UsageError(f"importance {method} needs calibration data", hint="--data FILE.npz")
    groups = graph.prunable
    match method:
        case "bn_scale":
            values = bn_scale(graph, groups, aggregate or "mean")
            values |= _without_scale(graph, [g for g in groups if g.id not in values], aggregate)
        case "l1" | "l2" | "bn_l1" | "fpgm" | "lamp":
            values = FilterScores(graph, method, aggregate or "sum").of(groups)
        case "reader":
            values = _reader_shares(graph, aggregate or "sum")
        case "path":
            read = _reader_shares(graph, aggregate or "sum")
            made = _squared_shares(FilterScores(graph, "l2", aggregate or "sum").of(groups))
            values = {group: np.sqrt(read[group] * made[group]) for group in read}
        case "random":
            values = {
                group.id: np.random.default_rng([seed, group.id]).random(group.size)
                for group in groups
            }
        case "activation" | "wanda":
            assert data is not None
            values = _Flow(graph, aggregate or "sum", data).of(groups, method)
        case "obs":
            assert data is not None
            values = _refit_costs(graph, data, seed)
        case _:
            known = ", ".join(("auto", *METHODS))
            raise UsageError(
                f"importance is '{method}'", hint=f"give one of {known}, or path.py:function"
            )
    return Importance(values, method, why)


def choose(graph: DependencyGraph, data: Data | None = None) -> tuple[str, str]:
    """The method ``auto`` takes for a model, and why in words."""
    if data is not None and not data.random:
        return "obs", "calibration data is given"
    groups = [group for group in graph.prunable if group.producers]
    scaled = [group for group in groups if any(map(is_bn_scale, group.parameters))]
    if groups and len(scaled) == len(groups):
        small = _share_of_small_scales(graph, groups)
        if small >= _SLIMMED:
            return (
                "bn_scale",
                f"{100 * small:.0f} % of the BatchNormalization scales are next to nothing",
            )
        return "path", "the BatchNormalization scales were not trained to be sparse"
    if scaled:
        bare = len(groups) - len(scaled)
        return "path", f"{bare} of {len(groups)} groups have no BatchNormalization"
    if any(node.op_type == "Conv" for node in graph.graph.nodes):
        return "path", "BatchNormalization was folded by the exporter, or never there"
    return "path", "the model has no BatchNormalization"


def _share_of_small_scales(graph: DependencyGraph, groups: Sequence[ChannelGroup]) -> float:
    """Share of the scales below a hundredth of the largest, as Network Slimming leaves them."""
    names = {axis.tensor for group in groups for axis in group.parameters if is_bn_scale(axis)}
    scales = np.concatenate([np.abs(real_values(graph, name)).reshape(-1) for name in names])
    return float(np.mean(scales < 0.01 * scales.max()))


def _asked(method: Scorer, name: str, group: ChannelGroup, graph: DependencyGraph) -> Float64Array:
    values = np.asarray(method(group, graph), np.float64)
    if values.shape != (group.size,):
        raise UsageError(
            f"importance '{name}' gave shape {values.shape} for group '{group.name}'",
            hint=f"it needs ({group.size},)",
        )
    return values


def _without_scale(
    graph: DependencyGraph, bare: Sequence[ChannelGroup], aggregate: str | None
) -> dict[int, Float64Array]:
    if bare:
        _log.warning(
            "%d of %d groups have no BatchNormalization scale and are ranked by l1 (first: '%s')",
            len(bare), len(graph.prunable), bare[0].name,
        )  # fmt: skip
    return FilterScores(graph, "l1", aggregate or "sum").of(bare)


# -- from what reads a channel ---------------------------------------------------------------------


def _reader_shares(graph: DependencyGraph, aggregate: str) -> dict[int, Float64Array]:
    """Squared norm of the weights that read each unit, as a share of all that its reader reads.

    Where no weight reads a group, by what makes it.
    """
    parts: dict[int, list[Float64Array]] = {group.id: [] for group in graph.prunable}
    for group, axis, _ in _readers(graph, graph.prunable):
        value = _squared_columns(graph, axis)
        if value.any():
            parts[group.id].append(per_unit(axis, value / value.sum(), group))
    bare = [group for group in graph.prunable if not parts[group.id]]
    found = {
        number: AGGREGATES[aggregate](np.stack(each)) for number, each in parts.items() if each
    }
    return found | _squared_shares(FilterScores(graph, "l2").of(bare))


def _squared_columns(graph: DependencyGraph, axis: WeightAxis) -> Float64Array:
    """Squared norm of a weight at each position of an axis."""
    seen = finite(axis.tensor, real_values(graph, axis.tensor)).reshape(axis.view)
    rest = tuple(a for a in range(seen.ndim) if a not in axis.axes)
    square = np.sum(np.square(seen, dtype=np.float64), axis=rest)
    return np.asarray(np.nan_to_num(square).reshape(-1), np.float64)


def _squared_shares(norms: Mapping[int, Float64Array]) -> dict[int, Float64Array]:
    squares = {group: np.square(values) for group, values in norms.items()}
    tiny = np.finfo(np.float64).tiny
    return {group: each / max(float(each.sum()), tiny) for group, each in squares.items()}


# -- from data -------------------------------------------------------------------------------------


def _readers(
    graph: DependencyGraph, groups: Iterable[ChannelGroup]
) -> list[tuple[ChannelGroup, WeightAxis, Layer]]:
    """Every layer that reads a group, with the axis it reads by."""
    found = []
    for group in groups:
        for axis in group.consumers:
            layer = layer_of(graph.graph, axis.tensor)
            if layer is not None:
                found.append((group, axis, layer))
    return found


class _Flow:
    """What channels carry, seen where they are read."""

    def __init__(self, graph: DependencyGraph, aggregate: str, data: Data) -> None:
        self.graph = graph
        self.aggregate = aggregate
        self.found = _readers(graph, graph.prunable)
        self.energy = energies(graph.graph, [layer for _, _, layer in self.found], data)

    def of(self, groups: Sequence[ChannelGroup], method: str) -> dict[int, Float64Array]:
        parts: dict[int, list[Float64Array]] = {group.id: [] for group in groups}
        for group, axis, layer in self.found:
            energy = self.energy[layer.data, layer.axis]
            if energy.size != int(np.prod([axis.view[a] for a in axis.axes])):
                continue  # the layer sees its input in another order than its weight
            value = energy
            if method == "wanda":
                value = _squared_columns(self.graph, axis) * energy
                value = value / max(float(value.sum()), np.finfo(np.float64).tiny)
            parts[group.id].append(per_unit(axis, value, group))
        bare = [group for group in groups if not parts[group.id]]
        values = {
            group.id: AGGREGATES[self.aggregate](np.stack(parts[group.id]))
            for group in groups
            if parts[group.id]
        }
        return values | FilterScores(self.graph, "l2").of(bare)


def _refit_costs(graph: DependencyGraph, data: Data, seed: int) -> dict[int, Float64Array]:
    """``obs`` for every group: greedy removal over all the layers that read it."""
    env = graph.envs[0]
    wanted: dict[str, list[tuple[ChannelGroup, WeightAxis, Layer]]] = {}
    for group, axis, layer in _readers(graph, graph.prunable):
        wanted.setdefault(layer.seen, []).append((group, axis, layer))
    last = {group.id: seen for seen, uses in wanted.items() for group, _, _ in uses}
    readers: dict[int, list[Reader]] = {group.id: [] for group in graph.prunable}
    values: dict[int, Float64Array] = {}
    layers = [uses[0][2] for uses in wanted.values()]
    for layer, gram in grams(graph.graph, env, layers, data, seed):
        weight = _seen_weight(graph, layer)
        for group, axis, _ in wanted[layer.seen]:
            if weight is not None:
                readers[group.id] += _least_squares(layer, axis, weight, gram.matrix, gram.rows)
            if last[group.id] == layer.seen and readers[group.id]:
                values[group.id] = greedy_costs(readers.pop(group.id), group.size)
    bare = [group for group in graph.prunable if group.id not in values]
    return values | FilterScores(graph, "l2").of(bare)


def _seen_weight(graph: DependencyGraph, layer: Layer) -> AnyArray | None:
    """The weight as the layer sees it; None where something computes it from the constant."""
    weight = real_values(graph, layer.weight)
    shape = graph.envs[0].shape(layer.seen)
    if layer.seen == layer.weight or weight.shape == shape:
        node = graph.graph.producer.get(layer.seen)
        if node is None or node.op_type in ("Identity", "Cast", "DequantizeLinear"):
            return weight
    node = graph.graph.producer.get(layer.seen)
    if node is not None and node.op_type == "Transpose" and node.inputs[0] == layer.weight:
        return weight.transpose(node.ints("perm") or tuple(reversed(range(weight.ndim))))
    return None


def _least_squares(
    layer: Layer, axis: WeightAxis, weight: AnyArray, gram: Float64Array, rows: int
) -> Iterator[Reader]:
    """One reader for each group of a layer that reads units by an axis."""
    product = matrix(layer, weight)
    kernel = kernel_size(layer, weight.shape)
    width = product.shape[1] // kernel  # input channels of one group
    if kernel > 1 and gram.shape[1] == width:  # too many inputs: kernel positions as outputs
        product, kernel = product.reshape(len(product), width, -1), 1
    stacked = layer.groups == 1 and axis.index.max() < width  # every matrix reads the same
    for number in range(len(product)):
        first = 0 if stacked else number * width
        mine = (axis.index >= first) & (axis.index < first + width)
        if not mine.any():
            continue
        channel = axis.index[mine] - first
        columns = channel[:, None] * kernel + np.arange(kernel)
        units = axis.unit[mine]
        joined, owners = _joined(columns, units)
        yield Reader.of(gram[number], rows, product[number], joined, owners)


def _joined(columns: IntArray, units: IntArray) -> tuple[IntArray, IntArray]:
    """Inputs of each unit in one row, where all units own as many; else one row a channel."""
    owners, count = np.unique(units, return_counts=True)
    if (count == count[0]).all() and count[0] > 1:
        order = np.argsort(units, kind="stable")
        return columns[order].reshape(owners.size, -1), owners
    return columns, units
