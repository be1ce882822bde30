"""Importance of every coupled channel: what `select` ranks by."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from onnxprune.errors import UsageError
from onnxprune.graph import Node
from onnxprune.groups import DependencyGraph
from onnxprune.types import AnyArray, ChannelGroup, Float64Array, WeightAxis

METHODS = ("bn_scale", "l1", "l2", "bn_l1", "random")
Scorer = Callable[[ChannelGroup, DependencyGraph], AnyArray]

_log = logging.getLogger(__name__)
_SHOW_A_CONSTANT = {"Identity", "Cast"}


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


def score(graph: DependencyGraph, method: str | Scorer = "auto", *, seed: int = 0) -> Importance:
    """How important each unit of each prunable group is.

    Args:
        graph: From ``analyse``.
        method: One of ``METHODS``, ``auto`` (the best the model allows), or a function that gives
            the importance, shape (units,), of a group.
        seed: For ``random``.

    Returns:
        Importance in float64 by group id. Several weights that make one unit add up; several
        BatchNormalization scales are averaged.

    Raises:
        UsageError: There is no such method, or a function returned another shape.

    Source: ``bn_scale``: Liu et al. 2017, Network Slimming (arXiv:1708.06519); ``l1``, ``l2``:
        Li et al. 2017, Pruning Filters for Efficient ConvNets (arXiv:1608.08710). ``bn_l1`` is the
        L1 norm of the filter after BatchNormalization is folded into it.
    """
    if callable(method):
        name = getattr(method, "__name__", "function")
        values = {group.id: _asked(method, name, group, graph) for group in graph.prunable}
        return Importance(values, name, "given by the caller")
    why = "asked for"
    if method == "auto":
        method, why = choose(graph)
    match method:
        case "bn_scale":
            values = _bn_scale(graph)
        case "l1" | "l2" | "bn_l1":
            values = _Norms(graph, method).of(graph.prunable)
        case "random":
            values = {
                group.id: np.random.default_rng([seed, group.id]).random(group.size)
                for group in graph.prunable
            }
        case _:
            known = ", ".join(("auto", *METHODS))
            raise UsageError(f"importance is '{method}'", hint=f"give one of {known}")
    return Importance(values, method, why)


def choose(graph: DependencyGraph) -> tuple[str, str]:
    """The method ``auto`` takes for a model, and why in words."""
    groups = [group for group in graph.prunable if group.producers]
    scaled = [group for group in groups if any(map(_is_bn_scale, group.parameters))]
    if groups and len(scaled) == len(groups):
        return "bn_scale", "every group has BatchNormalization scales"
    if scaled:
        return "bn_l1", (
            f"{len(groups) - len(scaled)} of {len(groups)} groups have no BatchNormalization: "
            "using l1 with the BatchNormalization that follows folded in"
        )
    if any(node.op_type == "Conv" for node in graph.graph.nodes):
        return "l1", "BatchNormalization was folded by the exporter, or never there: using l1"
    return "l1", "the model has no BatchNormalization: using l1"


def _asked(method: Scorer, name: str, group: ChannelGroup, graph: DependencyGraph) -> Float64Array:
    values = np.asarray(method(group, graph), np.float64)
    if values.shape != (group.size,):
        raise UsageError(
            f"importance '{name}' gave shape {values.shape} for group '{group.name}'",
            hint=f"it needs ({group.size},)",
        )
    return values


# -- BatchNormalization scales ---------------------------------------------------------------------


def _is_bn_scale(axis: WeightAxis) -> bool:
    return axis.op_type == "BatchNormalization" and axis.input_index == 1


def _bn_scale(graph: DependencyGraph) -> dict[int, Float64Array]:
    """Mean of |gamma| over the scales that ride along; groups without any take l1."""
    values: dict[int, Float64Array] = {}
    bare: list[ChannelGroup] = []
    for group in graph.prunable:
        axes = [axis for axis in group.parameters if _is_bn_scale(axis)]
        if not axes:
            bare.append(group)
            continue
        total, count = np.zeros(group.size), np.zeros(group.size)
        for axis in axes:
            gamma = np.abs(_finite(axis.tensor, _real_values(graph, axis.tensor)))
            total += np.bincount(axis.unit, gamma.reshape(-1)[axis.index], group.size)
            count += np.bincount(axis.unit, minlength=group.size)
        values[group.id] = total / np.maximum(count, 1)
    if bare:
        _log.warning(
            "%d of %d groups have no BatchNormalization scale and are ranked by l1 (first: '%s')",
            len(bare), len(graph.prunable), bare[0].name,
        )  # fmt: skip
    return values | _Norms(graph, "l1").of(bare)


# -- norms of filters ------------------------------------------------------------------------------


@dataclass
class _Norms:
    """Norms of the slices of weights that make channels; every weight is read once."""

    graph: DependencyGraph
    method: str
    _scales: dict[str, Float64Array | None] = field(default_factory=dict)

    def of(self, groups: tuple[ChannelGroup, ...] | list[ChannelGroup]) -> dict[int, Float64Array]:
        """Sum of the norms over all weights of a group, for each unit."""
        wanted: dict[str, list[tuple[ChannelGroup, WeightAxis]]] = {}
        for group in groups:
            # With BatchNormalization folded in, the depthwise filter that a channel passes counts
            # too; plain norms are those of the filters that make it.
            through = self.method == "bn_l1"
            ridden = filter(_is_depthwise, group.parameters) if through else ()
            for axis in (*group.producers, *ridden):
                wanted.setdefault(axis.tensor, []).append((group, axis))
        values = {group.id: np.zeros(group.size) for group in groups}
        for tensor, uses in wanted.items():
            weight = _finite(tensor, _real_values(self.graph, tensor))
            for group, axis in uses:
                norms = self._slices(weight, axis)[axis.index]
                values[group.id] += np.bincount(axis.unit, norms, group.size)
        return values

    def _slices(self, weight: AnyArray, axis: WeightAxis) -> Float64Array:
        """Norm of each position on the axes of a weight, flat."""
        seen = weight.reshape(axis.view)
        rest = tuple(a for a in range(seen.ndim) if a not in axis.axes)
        with np.errstate(over="ignore", invalid="ignore"):
            if self.method == "l2":
                norms = np.sqrt(np.sum(np.square(seen, dtype=np.float64), axis=rest))
            else:
                norms = np.sum(np.abs(seen), axis=rest, dtype=np.float64)
            norms = norms.reshape(-1)
            if self.method == "bn_l1":
                scale = self._scale_behind(axis.tensor)
                if scale is not None and scale.size == norms.size:
                    norms = norms * scale
        return np.asarray(norms, np.float64)

    def _scale_behind(self, tensor: str) -> Float64Array | None:
        """What the one BatchNormalization right behind a weight multiplies its channels by."""
        if tensor not in self._scales:
            node = _reader(self.graph, tensor)
            readers = self.graph.graph.consumers.get(node.outputs[0], []) if node else []
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


def _is_depthwise(axis: WeightAxis) -> bool:
    """A depthwise filter rides along: it makes each channel from that channel alone."""
    filters = axis.op_type in ("Conv", "ConvTranspose", "FusedConv") and axis.input_index == 1
    return filters and len(axis.view) >= 3


def _reader(graph: DependencyGraph, name: str) -> Node | None:
    """The first node that uses a constant, past the nodes that only present it."""
    for node, _ in graph.graph.consumers.get(name, []):
        if node.outputs and node.outputs[0] in graph.graph.derived:
            found = _reader(graph, node.outputs[0])
            if found is not None:
                return found
        else:
            return node
    return None


def _real_values(graph: DependencyGraph, tensor: str) -> AnyArray:
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


def _finite(tensor: str, array: AnyArray) -> AnyArray:
    """The same array; says once if something in it is not a number."""
    # A sum is finite unless an element is not, or it overflows, which float64 does not.
    with np.errstate(invalid="ignore", over="ignore"):
        odd = not np.isfinite(np.sum(array, dtype=np.float64))
    if odd:
        _log.warning("weight '%s' holds NaN/Inf", tensor)
    return array
