"""Coupled channels in another order: the same function, with more of it in an N:M pattern.

Channels of a group may stand in any order as long as all that makes, accompanies and reads them
agrees. Where that is not certain they stay in theirs, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from hashlib import sha256

import numpy as np

from onnxprune.calibrate import energies
from onnxprune.data import Data
from onnxprune.emit import ConstantEdit, Emitter
from onnxprune.errors import RecipeError
from onnxprune.groups import DependencyGraph
from onnxprune.layers import layer_of
from onnxprune.model import Model, Weight
from onnxprune.patterns import NM
from onnxprune.permute import search
from onnxprune.types import (
    AnyArray,
    ChannelGroup,
    Float64Array,
    IntArray,
    Moved,
    Permuted,
    Shape,
    WeightAxis,
)

_VECTOR = 1 << 16  # elements of a constant that is looked at whether it has one value throughout
_LEAST_GAIN = 1e-4  # of what the pattern keeps: an order for less is not worth its entry


@dataclass(frozen=True)
class Reordered:
    """A model with channels in another order.

    Attributes:
        model: The model.
        groups: What was done with each group, or why nothing was.
        moved: The axes of weights that changed.
    """

    model: Model
    groups: tuple[Permuted, ...] = ()
    moved: tuple[Moved, ...] = ()


@dataclass(frozen=True)
class _Voter:
    """Scores of the weights of one layer that read a group, shape (rows, channels)."""

    tensor: str
    scores: Float64Array


def reordered(
    graph: DependencyGraph,
    pattern: NM,
    eligible: Set[str],
    *,
    data: Data | None = None,
    seed: int = 0,
    heard: Callable[[int, int, str], None] | None = None,
) -> Reordered:
    """Find for each group the order in which its readers keep most, and put it there.

    Args:
        graph: The analysis of the model.
        pattern: N:M.
        eligible: Weights that will hold it, by their name in the model.
        data: Weighs each channel by the size of what it carries; None takes weights as they are.
        seed: For the search.
        heard: Called before each group.
    """
    finder = _Finder(graph, pattern, eligible, data)
    open_groups = [group for group in graph.groups if group.consumers]
    found: list[Permuted] = []
    orders: dict[int, IntArray] = {}
    for number, group in enumerate(open_groups):
        if heard is not None:
            heard(number, len(open_groups), group.name)
        why = finder.complaint(group)
        voters = [] if why else list(finder.voters(group))
        if not why and not voters:
            why = "no layer that will hold the pattern reads runs of it"
        if why:
            found.append(Permuted(group.name, group.size, (), 0.0, 0.0, 0.0, why))
            continue
        scores = np.concatenate([one.scores for one in voters])
        order = search(scores, pattern, seed)
        said = ""
        if order.after <= order.before * (1 + _LEAST_GAIN):
            said = "no order keeps more"
        else:
            orders[group.id] = order.channels
        readers = tuple(one.tensor for one in voters)
        found.append(
            Permuted(group.name, group.size, readers, order.before, order.after, order.best, said)
        )
    model, moved = _written(graph, orders)
    return Reordered(model, tuple(found), moved)


def repeated(graph: DependencyGraph, entries: Sequence[Moved]) -> Reordered:
    """Put channels in recorded orders, on the same original or one trained again.

    Raises:
        RecipeError: The orders are not those of channels of this model.
    """
    recorded: dict[tuple[str, int, str], list[IntArray]] = {}
    for entry in entries:
        key = entry.tensor, entry.axis, entry.role
        recorded.setdefault(key, []).append(np.asarray(entry.kept, np.int64))
    orders: dict[int, IntArray] = {}
    for group in graph.prunable:
        for axis in _axes(group):
            places = _places(axis, group.size) if len(axis.axes) == 1 else None
            for kept in recorded.get((axis.tensor, axis.axis, axis.role), ()):
                if places is None or kept.size != axis.view[axis.axes[0]]:
                    continue
                unit_at = np.full(kept.size, -1)
                unit_at[places] = np.arange(group.size)[:, None]
                order = unit_at[kept[places[:, 0]]]
                if not np.array_equal(order, np.arange(group.size)) and (order >= 0).all():
                    orders[group.id] = order
    model, moved = _written(graph, orders)
    if sorted(moved, key=repr) != sorted(entries, key=repr):
        raise RecipeError("the recipe does not fit this model: its channels are coupled otherwise")
    return Reordered(model, (), moved)


class _Finder:
    def __init__(
        self, graph: DependencyGraph, pattern: NM, eligible: Set[str], data: Data | None
    ) -> None:
        self.graph, self.pattern, self.eligible = graph, pattern, eligible
        self.carried = self._carried(data) if data is not None and not data.random else {}

    def complaint(self, group: ChannelGroup) -> str:
        """Why the order of a group's channels stays, "" where it is free."""
        if group.frozen is not None:
            return group.frozen
        if len(group.cells) > 1:
            return "its channels lie in rows"
        if group.size % self.pattern.m or group.size == self.pattern.m:
            return f"{group.size} channels, of which runs of {self.pattern.m} cannot exchange any"
        for axis in _axes(group):
            if len(axis.axes) != 1:
                return f"'{axis.tensor}' has a channel on several axes"
            if _places(axis, group.size) is None:
                return f"'{axis.tensor}' has not the same number of places for each channel"
            if self.graph.graph.constants[axis.tensor].pinned is not None:
                return f"'{axis.tensor}' {self.graph.graph.constants[axis.tensor].pinned}"
        return ""

    def voters(self, group: ChannelGroup) -> Iterator[_Voter]:
        """Layers whose runs are made of the group's channels."""
        for axis in group.consumers:
            constant = self.graph.graph.constants[axis.tensor]
            first = int(axis.index.min())
            inside = np.arange(first, first + group.size)
            runs = axis.index.size == group.size and first % self.pattern.m == 0
            if (
                not runs
                or constant.origin not in self.eligible
                or not np.array_equal(np.sort(axis.index), inside)
                or not np.array_equal(axis.unit[np.argsort(axis.index)], np.arange(group.size))
            ):
                continue
            weight = np.abs(constant.weight.read().astype(np.float64)).reshape(axis.view)
            part = np.take(weight, inside, axis=axis.axes[0])
            scores = np.moveaxis(part, axis.axes[0], -1).reshape(-1, group.size)
            size = self.carried.get(axis.tensor)
            if size is not None and first + group.size <= size.size:
                scores = scores * np.sqrt(size[first : first + group.size])
                scores = scores / max(
                    float(scores.mean()), 1e-300
                )  # layers have units of their own
            yield _Voter(constant.origin, scores)

    def _carried(self, data: Data) -> Mapping[str, Float64Array]:
        """Mean square of each channel that a layer reads, by its weight."""
        tensors = {
            axis.tensor
            for group in self.graph.prunable
            for axis in group.consumers
            if self.graph.graph.constants[axis.tensor].origin in self.eligible
        }
        layers = {name: layer_of(self.graph.graph, name) for name in sorted(tensors)}
        known = {name: layer for name, layer in layers.items() if layer is not None}
        found = energies(self.graph.graph, list(known.values()), data)
        # The channels of a grouped convolution are those of all groups: its axis has fewer.
        return {
            name: found[(layer.data, layer.axis)]
            for name, layer in known.items()
            if layer.groups == 1
        }


def _axes(group: ChannelGroup) -> Sequence[WeightAxis]:
    return (*group.producers, *group.consumers, *group.parameters)


def _places(axis: WeightAxis, size: int) -> IntArray | None:
    """Places of each unit along an axis, shape (units, places); None where the numbers differ."""
    counts = np.bincount(axis.unit, minlength=size)
    if counts.size != size or counts.min() != counts.max():
        return None
    sorted_out = np.lexsort((axis.index, axis.unit))
    return np.asarray(axis.index[sorted_out].reshape(size, -1))


@dataclass(frozen=True, slots=True)
class _Turn:
    """Entries of one axis of a view in another order."""

    view: Shape
    axis: int
    order: IntArray


def _written(
    graph: DependencyGraph, orders: Mapping[int, IntArray]
) -> tuple[Model, tuple[Moved, ...]]:
    """The model with units of groups in new orders."""
    constants = graph.graph.constants
    turns: dict[tuple[str, int, str, Shape], _Turn] = {}
    for group in graph.prunable:
        order = orders.get(group.id)
        if order is None:
            continue
        for axis in _axes(group):
            places = _places(axis, group.size)
            assert places is not None
            key = axis.tensor, axis.axis, axis.role, axis.view
            turn = turns.get(key)
            if turn is None:
                entries = np.arange(axis.view[axis.axes[0]])
                turn = turns[key] = _Turn(axis.view, axis.axes[0], entries)
            # Groups that share an axis, as after a Concat, have places of their own on it.
            turn.order[places.reshape(-1)] = places[order].reshape(-1)
    if not turns:
        return graph.graph.source, ()
    emitter = Emitter(graph.graph)
    by_tensor: dict[str, list[_Turn]] = {}
    for (name, *_), turn in turns.items():
        by_tensor.setdefault(name, []).append(turn)
    for name, several in by_tensor.items():
        weight = constants[name].weight
        if not _is_level(weight):  # any order is the same: copies of one zero bias stay one
            edit = ConstantEdit(weight.shape, _turned(several, weight.shape), _key(several))
            emitter.constants[name] = edit
    moved = (
        Moved(name, axis, role, tuple(turn.order.tolist()))
        for (name, axis, role, _), turn in turns.items()
    )
    return emitter.build(), tuple(moved)


def _is_level(weight: Weight) -> bool:
    """Whether a vector has one value throughout."""
    if weight.size > _VECTOR:
        return False
    values = weight.read().reshape(-1)
    return bool(values.size) and bool((values == values[0]).all())


def _turned(turns: Sequence[_Turn], shape: Shape) -> Callable[[AnyArray], AnyArray]:
    def compute(array: AnyArray) -> AnyArray:
        for turn in turns:
            array = np.take(array.reshape(turn.view), turn.order, axis=turn.axis)
        return np.ascontiguousarray(array.reshape(shape))

    return compute


def _key(turns: Sequence[_Turn]) -> bytes:
    digest = sha256(b"order")
    for turn in turns:
        digest.update(repr((turn.view, turn.axis)).encode() + turn.order.tobytes())
    return digest.digest()
