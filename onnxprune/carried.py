"""Where the channels of a cut are in the original, and tensors that carry mixtures of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from onnxprune.graph import Graph, Node
from onnxprune.select import PruningPlan
from onnxprune.sites import Site
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
FLOOR = 1e-9  # of the largest variance: directions with less are taken to have that much


@dataclass(frozen=True)
class Stream:
    """A group whose channels are seen by sums alone.

    Attributes:
        group: The group.
        makers: First outputs of the layers that make its channels.
        readers: First outputs of the layers that read them; none where only a product of two
            activations does.
        product: First output of that product, "" where there is none.
    """

    group: ChannelGroup
    makers: frozenset[str]
    readers: frozenset[str]
    product: str = ""


@dataclass(frozen=True)
class Mixture:
    """What the survivors of a group are to carry at some positions of a tensor.

    Attributes:
        stream: The group.
        goal: The tensor.
        places: Position of each unit there, shape (units,).
        matrix: Shape (units, survivors).
    """

    stream: Stream
    goal: str
    places: IntArray
    matrix: Float64Array


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


class Carried:
    """The units of every group that is cut, in every tensor of the original.

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

    def has(self, name: str, group: int) -> bool:
        """Whether a tensor carries channels of a group."""
        return group in self.carried.get(name, ())

    def groups(self, names: Iterable[str]) -> set[int]:
        """Groups that some of these tensors carry."""
        return {group for name in names for group in self.carried.get(name, ())}

    def exposed(self) -> set[int]:
        """Groups that leave the graph, or that bodies of other graphs read."""
        graph = self.original
        return self.groups((*graph.captured, *graph.outputs, *graph.inputs))

    def spots(self, name: str, group: int) -> tuple[tuple[int, ...], list[IntArray]] | None:
        """Axes of a tensor on which a group lies, and positions there.

        Returns:
            Flat positions of the units on these axes, shape (units,), once for each time that
            every unit is there; None where units are there in another way.
        """
        found = [one for one in self.labels[name] if (self.group_of[one] == group).any()]
        if len(found) != 1:
            return None
        axes = tuple(axis for axis, size in enumerate(found[0].shape) if size > 1)
        flat = found[0].reshape(-1)
        at = np.flatnonzero(self.group_of[flat] == group)
        units = self.unit_of[flat[at]]
        size = self.plan.graph.groups[group].size
        times, rest = divmod(units.size, size)
        order = np.argsort(units, kind="stable")
        if rest or not (np.bincount(units, minlength=size) == times).all():
            return None
        return axes, list(at[order].reshape(size, times).T)

    def places(self, name: str, group: int) -> tuple[int, IntArray] | None:
        """Axis of a tensor and, for each unit of a group, its one position there."""
        found = self.spots(name, group)
        if found is None or len(found[0]) != 1 or len(found[1]) != 1:
            return None
        return found[0][0], found[1][0]

    def alike(self, node: Node, group: int) -> bool:
        """Whether a node that is no layer treats every channel of a group alike."""
        graph = self.original
        if node.domain or node.captures:
            return False
        if node.op_type == "BatchNormalization":  # folded into the layer in front, or no stream
            maker = graph.producer.get(node.inputs[0])
            return maker is not None and is_dense(maker, graph)
        given = [name for name in node.inputs if name and name not in graph.derived]
        if node.op_type == "Add":
            if len(given) == 1:
                maker = graph.producer.get(given[0])
                return maker is not None and maker.op_type == "MatMul" and is_dense(maker, graph)
            return all(self.has(name, group) for name in given)
        if node.op_type == "MatMul":  # of two activations, over another axis
            reads = [self.has(name, group) for name in given]
            return reads.count(True) == 1 and group in self.groups(node.outputs)
        if node.op_type in ("Mul", "Div"):
            return self._scaled(node, group)
        if node.op_type in _TAKING:
            return self.has(node.inputs[0], group)
        return node.op_type in _ALIKE and group in self.groups(node.outputs)

    def _scaled(self, node: Node, group: int) -> bool:
        """Whether a node multiplies all channels of one position by the same number."""
        reads = [self.has(name, group) for name in node.inputs]
        found = self.spots(node.outputs[0], group) if reads.count(True) == 1 else None
        if found is None or (node.op_type == "Div" and reads[1]):
            return False
        env = self.survivors.trace.env
        made, other = env.shape(node.outputs[0]), env.shape(node.inputs[reads.index(False)])
        if made is None or other is None:
            return False
        missing = len(made) - len(other)
        return all(axis < missing or other[axis - missing] == 1 for axis in found[0])

    def folded(self, stream: Stream, found: Sequence[Site]) -> bool:
        """Whether every norm and constant that touches a stream belongs to one of these layers."""
        own = {site.norm.key for site in found if site.norm is not None}
        own |= {site.added[0].key for site in found if site.added is not None}
        touched = {
            node.key
            for node in self.original.nodes
            if (node.op_type == "BatchNormalization" or _adds_constant(node, self.original))
            and stream.group.id in self.groups((*node.inputs, *node.outputs))
        }
        free = all(not site.ties and not site.shown.quantized for site in found)
        return free and touched <= own

    def cut_along_one_axis(self, goal: str) -> bool:
        """Whether a tensor is cut along one axis alone."""
        return goal in self.labels and len(self.survivors.masks(goal)) == 1

    def bases(self, mixtures: Iterable[Mixture]) -> dict[str, Basis]:
        """What each tensor is to carry once all its mixtures are there."""
        found: dict[str, list[Mixture]] = {}
        for one in mixtures:
            found.setdefault(one.goal, []).append(one)
        return {goal: self._basis(goal, found[goal]) for goal in sorted(found)}

    def _basis(self, goal: str, mixtures: Sequence[Mixture]) -> Basis:
        axis, alive = self._kept(goal)
        matrix = np.zeros((alive.size, int(alive.sum())))
        left = np.flatnonzero(alive)
        matrix[left, np.arange(left.size)] = 1.0
        for one in mixtures:
            survivors = one.places[self.plan.keep[one.stream.group.id]]
            matrix[np.ix_(one.places, np.searchsorted(left, survivors))] = one.matrix
        return Basis(axis, matrix.astype(np.float32))

    def _kept(self, goal: str) -> tuple[int, AnyArray]:
        """Axis of a tensor that is cut, and what of it survives."""
        for axis in range(len(self.survivors.trace.env.shape(goal) or ())):
            alive = self.survivors.alive(goal, axis)
            if alive is not None:
                return axis, alive
        raise AssertionError("the goal of a stream is cut")


def is_dense(node: Node, graph: Graph) -> bool:
    """Whether a node multiplies all channels of its first input with one constant matrix."""
    if node.op_type not in _DENSE or node.domain or len(node.inputs) < 2:
        return False
    if node.inputs[0] in graph.derived or node.inputs[1] not in graph.derived:
        return False
    return node.int("group", 1) == 1


def _adds_constant(node: Node, graph: Graph) -> bool:
    return node.op_type == "Add" and any(name in graph.derived for name in node.inputs)
