"""A better basis for queries and keys: channels that only one product of activations sees.

Attention scores are a sum over the channels of a head. Nothing asks for the channels one by one:
queries and keys may carry whatever gives the same scores, and for fewer channels the best there is
is known in closed form, the product of low rank that is nearest on the data. It becomes the target
of the layers that make queries and keys.

Source: weighted low-rank approximation by SVD (Eckart and Young 1936), of scores on calibration
    data instead of weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from onnxprune.calibrate import stream
from onnxprune.carried import FLOOR, Carried, Mixture, Stream, is_dense
from onnxprune.data import Data
from onnxprune.graph import Node
from onnxprune.sites import Site
from onnxprune.types import AnyArray, ChannelGroup, Float64Array, IntArray

_WORTH = 0.98  # of what the survivors lose as they are
_NOTHING = 1e-6  # of the energy of the scores: for less no weight is touched
_SAME = 1e-2  # of a ratio of energies that should be one number for all channels
_ON_THE_WAY = {"Add", "Cast", "Div", "Mul", "Reshape", "Squeeze", "Sub", "Unsqueeze", "Where"}


class Products:
    """Finds groups that only one product of two activations reads, and their best mixtures.

    Args:
        carried: Where the groups of a cut are.
    """

    def __init__(self, carried: Carried) -> None:
        self.carried = carried
        self.original = carried.original

    def candidates(self) -> list[Stream]:
        """Groups that are made by layers and end in one product, as far as the graph tells."""
        carried = self.carried
        makers: dict[int, set[str]] = {}
        products: dict[int, list[str]] = {}
        out = carried.exposed()
        for node in self.original.nodes:
            if node.key in self.original.derived:
                continue
            reads = carried.groups(node.inputs)
            makes = carried.groups(node.outputs)
            for group in reads | makes:
                if is_dense(node, self.original) and group not in reads:
                    makers.setdefault(group, set()).add(node.key)
                elif self._contracts(node, group):
                    products.setdefault(group, []).append(node.key)
                elif is_dense(node, self.original) or not carried.alike(node, group):
                    out.add(group)
        return [
            Stream(group, frozenset(makers[group.id]), frozenset(), products[group.id][0])
            for group in carried.plan.graph.prunable
            if group.id in makers and group.id not in out and len(products.get(group.id, ())) == 1
        ]

    def _contracts(self, node: Node, group: int) -> bool:
        """Whether a node sums over the channels of a group, each of both operands."""
        if node.op_type != "MatMul" or node.domain or self.carried.has(node.outputs[0], group):
            return False
        found = [
            self.carried.spots(name, group) if self.carried.has(name, group) else None
            for name in node.inputs
        ]
        return all(one is not None and len(one[1]) == 1 for one in found)

    def confirmed(self, streams: Sequence[Stream], fit: Mapping[str, Site]) -> list[Stream]:
        """The groups all of whose makers can be refitted.

        Args:
            streams: Candidates.
            fit: Layers that can be refitted, by their first output.
        """
        good = []
        for one in streams:
            found = [fit[key] for key in one.makers if key in fit]
            if len(found) == len(one.makers) and self.carried.folded(one, found):
                goals = {site.goal for site in found}
                sides = [places for goal in goals for places in self._sides(goal, one.group)]
                if len(sides) == 2 and all(map(self.carried.cut_along_one_axis, goals)):
                    good.append(one)
        return good

    def _sides(self, goal: str, group: ChannelGroup) -> list[IntArray]:
        """Positions of the units in a tensor that a maker aims at, for each side it makes."""
        found = self.carried.spots(goal, group.id) if goal in self.carried.labels else None
        return [] if found is None or len(found[0]) != 1 else found[1]

    def mixtures(
        self, streams: Sequence[Stream], fit: Mapping[str, Site], data: Data
    ) -> list[Mixture]:
        """What tensors that makers aim at are to carry, for the groups that gain by it.

        Args:
            streams: Confirmed ones.
            fit: Layers that can be refitted, by their first output.
            data: What the model reads.
        """
        goals = {one.group.id: sorted({fit[key].goal for key in one.makers}) for one in streams}
        seen = self._moments(streams, goals, data)
        found: list[Mixture] = []
        for one in streams:
            operands = self.original.producer[one.product].inputs
            sides = [
                (goal, p) for goal in goals[one.group.id] for p in self._sides(goal, one.group)
            ]
            moments = [seen[name, one.group.id] for name in operands]
            energies = [seen[goal, one.group.id].energy(p) for goal, p in sides]
            order = _matched([m.units for m in moments], energies)
            if order is None:
                continue
            keys = self._keys(self.original.producer[one.product])
            blocks = [m.blocks(centred=side == keys) for side, m in enumerate(moments)]
            keep = self.carried.plan.keep[one.group.id]
            matrices = _mixtures(one.group, keep, blocks[0], blocks[1])
            for matrix, side in zip(matrices, order, strict=bool(matrices)):
                found.append(Mixture(one, *sides[side], matrix))
        return found

    def _moments(
        self, streams: Sequence[Stream], goals: Mapping[int, Sequence[str]], data: Data
    ) -> dict[tuple[str, int], _Moments]:
        """Moments of the units of each group, by tensor and group."""
        sums: dict[tuple[str, int], _Moments] = {}
        for one in streams:
            group = one.group
            for name in self.original.producer[one.product].inputs:
                axes, (places,) = self.carried.spots(name, group.id) or ((), (np.zeros(0, int),))
                sums[name, group.id] = _Moments(axes, places, group.cells)
            for name in goals[group.id]:
                axes, _ = self.carried.spots(name, group.id) or ((), [])
                sums.setdefault((name, group.id), _Moments(axes))  # it may be the operand itself
        names = sorted({name for name, _ in sums})
        for values in stream(self.original.model, names, data) if names else ():
            for (name, _), moments in sums.items():
                moments.add(values[name])
        return sums

    def _keys(self, node: Node) -> int | None:
        """Operand of a product whose rows a Softmax competes over: it does not see their mean."""
        env = self.carried.survivors.trace.env
        made = env.shape(node.outputs[0])
        name, seen = node.outputs[0], 0
        while made is not None and seen < len(self.original.nodes):
            readers = self.original.consumers.get(name, ())
            if len(readers) != 1:
                return None
            reader = readers[0][0]
            shape = env.shape(reader.outputs[0])
            if shape is None or shape[-1] != made[-1]:
                return None
            if reader.op_type == "Softmax":
                return 1 if reader.int("axis", -1) in (-1, len(shape) - 1) else None
            if reader.op_type not in _ON_THE_WAY:
                return None
            name, seen = reader.outputs[0], seen + 1
        return None


class _Moments:
    """First and second moments of channels, each row of a group for itself.

    Args:
        axes: Axes of the tensor on which the channels lie.
        places: Position of each unit there; none where only energies are asked for.
        cells: Units of each row of the group.
    """

    def __init__(
        self,
        axes: tuple[int, ...],
        places: IntArray | None = None,
        cells: Sequence[IntArray] = (),
    ) -> None:
        self.axes = axes
        self.places = places
        self.cells = cells
        self.rows = 0
        self.square: Float64Array | float = 0.0  # of every position
        self.sums: list[Float64Array | float] = [0.0] * len(cells)
        self.products: list[Float64Array | float] = [0.0] * len(cells)

    def add(self, array: AnyArray) -> None:
        """Add every position of a tensor."""
        last = range(array.ndim - len(self.axes), array.ndim)
        moved = np.moveaxis(np.asarray(array, np.float32), self.axes, tuple(last))
        rows = moved.reshape(-1, int(np.prod(moved.shape[array.ndim - len(self.axes) :])))
        self.rows += len(rows)
        self.square = self.square + np.einsum("ij,ij->j", rows, rows, dtype=np.float64)
        if self.places is None:
            return
        for number, cell in enumerate(self.cells):
            part = rows[:, self.places[cell]]
            self.sums[number] = self.sums[number] + part.sum(axis=0, dtype=np.float64)
            self.products[number] = self.products[number] + (part.T @ part).astype(np.float64)

    def energy(self, places: IntArray) -> Float64Array:
        """Mean square at some positions."""
        return np.asarray(self.square)[places] / max(self.rows, 1)

    @property
    def units(self) -> Float64Array:
        """Mean square of each unit."""
        assert self.places is not None, "only energies were asked for"
        return self.energy(self.places)

    def blocks(self, *, centred: bool) -> list[Float64Array]:
        """Second moments of each row of the group, (units, units), or the covariance."""
        found = []
        for total, product in zip(self.sums, self.products, strict=True):
            mean = np.asarray(total) / max(self.rows, 1) * centred
            found.append(np.asarray(product) / max(self.rows, 1) - np.outer(mean, mean))
        return found


def _matched(
    operands: Sequence[Float64Array], sides: Sequence[Float64Array]
) -> tuple[int, int] | None:
    """Which side makes which operand: what is between them scales all channels alike."""
    for order in ((0, 1), (1, 0)):
        if all(_alike(operands[n], sides[side]) for n, side in enumerate(order)):
            return order
    return None


def _alike(first: Float64Array, second: Float64Array) -> bool:
    if not (np.isfinite(first).all() and np.isfinite(second).all() and second.any()):
        return False
    factor = first.sum() / second.sum()
    return bool((np.abs(first - factor * second) <= _SAME * (first + 1e-6 * first.max())).all())


def _mixtures(
    group: ChannelGroup,
    keep: IntArray,
    queries: Sequence[Float64Array],
    keys: Sequence[Float64Array],
) -> list[Float64Array]:
    """What survivors of both operands are to carry, each of shape (units, survivors).

    Args:
        group: The group.
        keep: Its survivors.
        queries: Second moments of the first operand, for each row of the group.
        keys: Of the second.

    Returns:
        [] where the survivors as they are lose next to nothing, or hardly more.
    """
    found = [np.zeros((group.size, keep.size)) for _ in range(2)]
    plain = mixed = whole = 0.0
    for cell, first, second in zip(group.cells, queries, keys, strict=True):
        mine = np.flatnonzero(np.isin(keep, cell))
        local = np.searchsorted(cell, keep[mine])
        left, right, lost = _best(first, second, local)
        found[0][np.ix_(cell, mine)] = left
        found[1][np.ix_(cell, mine)] = right
        gone = np.setdiff1d(np.arange(cell.size), local)
        mixed += lost
        plain += float(np.sum(first[np.ix_(gone, gone)] * second[np.ix_(gone, gone)]))
        whole += float(np.sum(first * second))
    return found if plain > _NOTHING * whole and mixed < _WORTH * plain else []


def _best(
    first: Float64Array, second: Float64Array, kept: IntArray
) -> tuple[Float64Array, Float64Array, float]:
    """Mixtures of both operands whose products are nearest to the original's, and what is lost.

    With q and k of these second moments, rank r: the P and K, each (units, r), for which qᵀP Kᵀk
    differs least from qᵀk in the mean square; turned and scaled to look like what survives.
    """
    (root, back), (key_root, key_back) = _roots(first), _roots(second)
    left, sizes, right = np.linalg.svd(root @ key_root)
    half = np.sqrt(sizes[: kept.size])
    mixtures = back @ left[:, : kept.size] * half
    others = key_back @ right.T[:, : kept.size] * half
    # The nearest to the survivors among all bases of the same product (Procrustes).
    scales = [max(float(np.trace(moment)), 1e-30) for moment in (first, second)]
    near = mixtures.T @ first[:, kept] / scales[0] + others.T @ second[:, kept] / scales[1]
    turn_left, _, turn_right = np.linalg.svd(near)
    turn = turn_left @ turn_right
    sized = _size(first, mixtures, kept) / _size(second, others, kept)
    factor = sized**-0.25 if np.isfinite(sized) and sized > 0 else 1.0
    lost = float(np.sum(np.square(sizes[kept.size :])))
    return mixtures @ turn * factor, others @ turn / factor, lost


def _roots(moment: Float64Array) -> tuple[Float64Array, Float64Array]:
    """Square root of a matrix of moments, and its inverse."""
    spread, axes = np.linalg.eigh(moment)
    spread = np.maximum(spread, max(float(spread.max()) * FLOOR, 1e-30))
    return (axes * np.sqrt(spread)) @ axes.T, (axes / np.sqrt(spread)) @ axes.T


def _size(moment: Float64Array, mixtures: Float64Array, kept: IntArray) -> float:
    """Energy of mixtures as a multiple of what survivors had."""
    made = np.einsum("ij,ik,kj->", mixtures, moment, mixtures, optimize=True)
    return float(made / max(float(np.trace(moment[np.ix_(kept, kept)])), 1e-30))
