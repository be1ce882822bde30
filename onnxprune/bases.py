"""A better basis for channels that nothing but sums see.

Between layers without an activation (the narrow ends of inverted residuals, the values of
attention) channels are only added up and multiplied with weights. Nothing there asks for single
channels of the original: what survives may carry any mixture of them, and the mixtures that lose
least of what the readers make are known in closed form. Those become the targets of the layers that
make the channels; the layers that read them are refitted anyway.

Source: reduced-rank regression (Izenman 1975); slicing in a rotated basis as in SliceGPT (Ashkboos
    et al. 2024, arXiv:2401.15024).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from onnxprune.affine import Affine
from onnxprune.calibrate import stream
from onnxprune.data import Data
from onnxprune.graph import Graph, Node
from onnxprune.select import PruningPlan
from onnxprune.shown import shown_behind
from onnxprune.sites import Site, Unfit
from onnxprune.survivors import Survivors
from onnxprune.types import AnyArray, ChannelGroup, Float32Array, Float64Array, IntArray

_DENSE = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
# Nodes that treat every channel alike and mix none; a pool over space is a sum.
_ALIKE = frozenset(
    """
    Add AveragePool Expand Flatten GlobalAveragePool Identity ReduceMean ReduceSum Reshape Squeeze
    Transpose Unsqueeze
    """.split()  # noqa: SIM905  (read as lines)
)
_TAKING = {"Gather", "Slice", "Split"}  # they may take other channels and leave those of a group
_FLOOR = 1e-9  # of the largest variance: directions with less are taken to have that much
_WORTH = 0.9  # of what the survivors lose as they are: a basis that loses more changes nothing
_NOTHING = 1e-6  # of what the readers make: for less no weight is touched


@dataclass(frozen=True)
class Stream:
    """A group whose channels are seen by sums alone.

    Attributes:
        group: The group.
        makers: First outputs of the layers that make its channels.
        readers: First outputs of the layers that read them.
    """

    group: ChannelGroup
    makers: frozenset[str]
    readers: frozenset[str]


@dataclass(frozen=True)
class Basis:
    """What a tensor is to carry instead of the channels that survive.

    Attributes:
        axis: Its axis of channels.
        matrix: Shape (channels, channels that survive).
    """

    axis: int
    matrix: Float32Array

    def of(self, array: AnyArray) -> Float32Array:
        """The tensor in this basis, with as many channels as survive."""
        last = np.moveaxis(np.asarray(array, np.float32), self.axis, -1)
        return np.moveaxis(np.matmul(last, self.matrix), -1, self.axis)


class Streams:
    """Finds groups that only sums see, and the bases they are best cut in.

    Args:
        plan: The cut.
        original: Graph of the original, without fused layers.
        survivors: What the cut leaves of its tensors.
    """

    def __init__(self, plan: PruningPlan, original: Graph, survivors: Survivors) -> None:
        self.plan = plan
        self.original = original
        self.survivors = survivors
        self.group_of = np.full(plan.graph.tracer.table.size, -1)
        self.unit_of = np.zeros_like(self.group_of)
        for group in plan.graph.prunable:
            if plan.keep[group.id].size < group.size:
                classes = np.abs(group.classes)
                self.group_of[classes] = group.id
                self.unit_of[classes] = np.arange(group.size)
        self.labels = {
            name: [self._classes(f) for f in found]
            for name, found in survivors.trace.fields.items()
            if name not in original.derived
        }
        self.carried = {
            name: {int(g) for one in found for g in np.unique(self.group_of[one])} - {-1}
            for name, found in self.labels.items()
        }

    def _classes(self, f: IntArray) -> IntArray:
        return np.abs(self.plan.graph.tracer.table.classes(f))

    def candidates(self) -> list[Stream]:
        """Groups that only sums see, as far as the graph tells."""
        makers: dict[int, set[str]] = {}
        readers: dict[int, set[str]] = {}
        out: set[int] = set()
        for name in (*self.original.captured, *self.original.outputs, *self.original.inputs):
            out |= self.carried.get(name, set())
        for node in self.original.nodes:
            if node.key in self.original.derived:
                continue
            reads = self._carried(node.inputs)
            makes = self._carried(node.outputs)
            for group in reads | makes:
                if _is_layer(node, self.original):
                    if not self._along_one_axis(node, group):
                        out.add(group)
                    if group in makes:
                        makers.setdefault(group, set()).add(node.key)
                    if group in reads:
                        readers.setdefault(group, set()).add(node.key)
                elif not self._alike(node, group):
                    out.add(group)
        return [
            Stream(group, frozenset(makers[group.id]), frozenset(readers[group.id]))
            for group in self.plan.graph.prunable
            if group.id in makers and group.id in readers and group.id not in out
        ]

    def _carried(self, names: Iterable[str]) -> set[int]:
        return {group for name in names for group in self.carried.get(name, ())}

    def _along_one_axis(self, node: Node, group: int) -> bool:
        """Whether a layer has each unit of the group at one position of one axis."""
        for name in (*node.inputs[:1], *node.outputs[:1]):
            if group in self.carried.get(name, ()) and self.places(name, group) is None:
                return False
        return True

    def places(self, name: str, group: int) -> tuple[int, IntArray] | None:
        """Axis of a tensor and, for each unit of a group, its position there."""
        found = [one for one in self.labels[name] if (self.group_of[one] == group).any()]
        if len(found) != 1:
            return None
        labels = found[0]
        axes = [axis for axis, size in enumerate(labels.shape) if size > 1]
        if len(axes) != 1:
            return None
        flat = labels.reshape(-1)
        at = np.flatnonzero(self.group_of[flat] == group)
        units = self.unit_of[flat[at]]
        size = self.plan.graph.groups[group].size
        if units.size != size or np.unique(units).size != size:
            return None
        return axes[0], at[np.argsort(units)]

    def _alike(self, node: Node, group: int) -> bool:
        """Whether a node that is no layer treats every channel of a group alike."""
        graph = self.original
        if node.domain or node.captures:
            return False
        if node.op_type == "BatchNormalization":  # folded into the layer in front, or no stream
            maker = graph.producer.get(node.inputs[0])
            return maker is not None and _is_layer(maker, graph)
        given = [name for name in node.inputs if name and name not in graph.derived]
        if node.op_type == "Add":
            if len(given) == 1:
                maker = graph.producer.get(given[0])
                return maker is not None and maker.op_type == "MatMul" and _is_layer(maker, graph)
            return all(group in self.carried.get(name, ()) for name in given)
        if node.op_type == "MatMul":  # of two activations, over another axis
            reads = [group in self.carried.get(name, ()) for name in given]
            return reads.count(True) == 1 and group in self._carried(node.outputs)
        if node.op_type in _TAKING:
            return group in self.carried.get(node.inputs[0], ())
        return node.op_type in _ALIKE and group in self._carried(node.outputs)

    def confirmed(self, streams: Sequence[Stream], found: Sequence[Site | Unfit]) -> list[Stream]:
        """The streams all of whose layers can be refitted, norms and biases included."""
        fit = {site.layer.node.key: site for site in found if isinstance(site, Site)}
        folded = {site.norm.key for site in fit.values() if site.norm is not None}
        folded |= {site.added[0].key for site in fit.values() if site.added is not None}
        good = []
        for one in streams:
            touched = {
                node.key
                for node in self.original.nodes
                if (node.op_type == "BatchNormalization" or _adds_constant(node, self.original))
                and one.group.id in self._carried((*node.inputs, *node.outputs))
            }
            sites = [fit.get(key) for key in (*one.makers, *one.readers)]
            free = all(s is not None and not s.ties and not s.shown.quantized for s in sites)
            goals = (site.goal for key in one.makers if (site := fit.get(key)) is not None)
            if free and touched <= folded and all(self._whole(goal, one) for goal in goals):
                good.append(one)
        return good

    def _whole(self, goal: str, stream: Stream) -> bool:
        """Whether what a maker aims at is cut along its channels alone."""
        cut = len(self.survivors.masks(goal))
        return goal in self.labels and cut == 1 and self.places(goal, stream.group.id) is not None

    # -- bases -------------------------------------------------------------------------------------

    def bases(
        self, streams: Sequence[Stream], found: Sequence[Site | Unfit], data: Data
    ) -> tuple[list[Stream], Mapping[str, Basis]]:
        """Streams that gain by a basis, and what each tensor that their makers aim at carries."""
        if not streams:
            return [], {}
        fit = {site.layer.node.key: site for site in found if isinstance(site, Site)}
        seen = self._covariances(streams, fit, data)
        mixed: dict[int, Float64Array] = {}
        for one in streams:
            parts = [self._read(fit[key], one, seen) for key in sorted(one.readers)]
            known = [part for part in parts if part is not None]
            if len(known) < len(parts) or not all(np.isfinite(c).all() for _, c in known):
                continue
            mixture = _mixtures(one.group, self.plan.keep[one.group.id], known)
            if mixture is not None:
                mixed[one.group.id] = mixture
        gaining = [one for one in streams if one.group.id in mixed]
        goals = {fit[key].goal for one in gaining for key in one.makers}
        return gaining, {goal: self._basis(goal, mixed) for goal in sorted(goals)}

    def _covariances(
        self, streams: Sequence[Stream], fit: Mapping[str, Site], data: Data
    ) -> Mapping[str, Float64Array]:
        """Covariance of the channels of each tensor that a reader sees, (channels, channels)."""
        axes: dict[str, int] = {}
        for one in streams:
            for key in one.readers:
                name = self.original.producer[key].inputs[0]
                places = self.places(name, one.group.id)
                if places is not None:
                    axes[name] = places[0]
        sums = {name: _Covariance() for name in axes}
        for values in stream(self.original.model, sorted(axes), data):
            for name, axis in axes.items():
                sums[name].add(values[name], axis)
        return {name: one.value for name, one in sums.items()}

    def _read(
        self, site: Site, one: Stream, seen: Mapping[str, Float64Array]
    ) -> tuple[Float64Array, Float64Array] | None:
        """What a reader makes of a stream, (units, outputs), and covariance, (units, units)."""
        node = self.original.producer[site.layer.node.key]
        shown = shown_behind(self.original, node.inputs[1])
        places = self.places(node.inputs[0], one.group.id)
        if shown is None or places is None:
            return None
        layer = replace(site.layer, node=node, weight=shown.leaf, seen=node.inputs[1],
                        data=node.inputs[0])  # fmt: skip
        norm = None if site.norm is None else self.original.producer[site.norm.key]
        there = replace(site, layer=layer, shown=shown, norm=norm, added=None)
        affine = Affine(there, self.original, lambda n: self.original.constants[n].weight.read())
        product = affine.product()
        if product is None:
            return None
        units = places[1]
        each, rest = divmod(product[0].shape[1], len(seen[layer.data]))
        if len(product[0]) != 1 or rest or not each:
            return None
        taps = product[0][0].reshape(len(seen[layer.data]), each, -1)[units]
        return taps.reshape(units.size, -1), seen[layer.data][np.ix_(units, units)]

    def _basis(self, goal: str, mixed: Mapping[int, Float64Array]) -> Basis:
        kept = self._kept(goal)
        axis, alive = kept
        matrix = np.zeros((alive.size, int(alive.sum())))
        left = np.flatnonzero(alive)
        matrix[left, np.arange(left.size)] = 1.0
        for group, mixture in mixed.items():
            places = self.places(goal, group) if group in self.carried.get(goal, ()) else None
            if places is None:
                continue
            survivors = places[1][self.plan.keep[group]]
            matrix[np.ix_(places[1], np.searchsorted(left, survivors))] = mixture
        return Basis(axis, matrix.astype(np.float32))

    def _kept(self, goal: str) -> tuple[int, AnyArray]:
        """Axis of a tensor that is cut, and what of it survives."""
        for axis in range(len(self.survivors.trace.env.shape(goal) or ())):
            alive = self.survivors.alive(goal, axis)
            if alive is not None:
                return axis, alive
        raise AssertionError("the goal of a stream is cut")


class _Covariance:
    """Second moments of channels around their mean, over a stream of batches."""

    def __init__(self) -> None:
        self.rows = 0
        self.square: Float64Array | float = 0.0
        self.sum: Float64Array | float = 0.0

    def add(self, array: AnyArray, axis: int) -> None:
        """Add every position of a tensor."""
        last = np.moveaxis(np.asarray(array, np.float32), axis, -1)
        rows = last.reshape(-1, last.shape[-1])
        self.rows += len(rows)
        self.square = self.square + (rows.T @ rows).astype(np.float64)
        self.sum = self.sum + rows.sum(axis=0, dtype=np.float64)

    @property
    def value(self) -> Float64Array:
        """The covariance."""
        mean = np.asarray(self.sum) / max(self.rows, 1)
        return np.asarray(self.square) / max(self.rows, 1) - np.outer(mean, mean)


def _mixtures(
    group: ChannelGroup, keep: IntArray, parts: Sequence[tuple[Float64Array, Float64Array]]
) -> Float64Array | None:
    """What each survivor is to carry, shape (units, survivors): rows mix among themselves alone.

    Args:
        group: The group.
        keep: Its survivors.
        parts: For each reader what it makes of the units, (units, outputs), and their covariance.

    Returns:
        None where the survivors as they are lose next to nothing, or hardly more.
    """
    want = np.zeros((group.size, group.size))
    covariance = np.mean([moment for _, moment in parts], axis=0)
    for weight, moment in parts:
        energy = float(np.einsum("io,ij,jo->", weight, moment, weight, optimize=True))
        want += weight @ weight.T / max(energy, 1e-30)
    found = np.zeros((group.size, keep.size))
    plain = mixed = 0.0
    for cell in group.cells:
        mine = np.flatnonzero(np.isin(keep, cell))
        block = np.ix_(cell, cell)
        local = np.searchsorted(cell, keep[mine])
        found[np.ix_(cell, mine)] = _best(want[block], covariance[block], local)
        chosen = np.eye(cell.size)[:, local]
        plain += _lost(want[block], covariance[block], chosen)
        mixed += _lost(want[block], covariance[block], found[np.ix_(cell, mine)])
    whole = float(np.einsum("ij,ij->", want, covariance))
    return found if plain > _NOTHING * whole and mixed < _WORTH * plain else None


def _lost(want: Float64Array, covariance: Float64Array, carried: Float64Array) -> float:
    """Energy of what readers make that the best regression on some mixtures leaves."""
    across = covariance @ carried
    told = across @ np.linalg.pinv(carried.T @ across, rcond=_FLOOR, hermitian=True) @ across.T
    return float(np.einsum("ij,ij->", want, covariance - told))


def _best(want: Float64Array, covariance: Float64Array, kept: IntArray) -> Float64Array:
    """Best mixtures of one row, turned and scaled so that they look like what survives.

    With x of this covariance, and readers that make Wᵀx, W Wᵀ = ``want``: as many mixtures Pᵀx as
    survive from which all Wᵀx can be told with the least error.
    """
    spread, axes = np.linalg.eigh(covariance)
    spread = np.maximum(spread, max(float(spread.max()) * _FLOOR, 1e-30))
    root = (axes * np.sqrt(spread)) @ axes.T
    back = (axes / np.sqrt(spread)) @ axes.T
    _, found = np.linalg.eigh(root @ want @ root)
    mixtures = back @ found[:, ::-1][:, : kept.size]  # each of variance 1
    # The nearest to the survivors among all bases of the same space (Procrustes).
    left, _, right = np.linalg.svd(mixtures.T @ covariance[:, kept])
    size = np.sqrt(np.maximum(np.diag(covariance)[kept], 1e-30))
    return np.asarray(mixtures @ (left @ right) * size, np.float64)


def _is_layer(node: Node, graph: Graph) -> bool:
    """Whether a node multiplies all channels of its first input with one constant matrix."""
    if node.op_type not in _DENSE or node.domain or len(node.inputs) < 2:
        return False
    if node.inputs[0] in graph.derived or node.inputs[1] not in graph.derived:
        return False
    return node.int("group", 1) == 1


def _adds_constant(node: Node, graph: Graph) -> bool:
    return node.op_type == "Add" and any(name in graph.derived for name in node.inputs)
