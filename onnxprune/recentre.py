"""Biases fitted to made-up pictures: each unit stays active as often as it was.

A cut takes from the sum in front of an activation a part of its mean and a part of its spread. A
bias that gives the whole mean back to a narrower spread moves almost all of it to one side of the
bend: units that told things apart are then always on, or always off, and layer by layer less comes
through. What a bias can keep is the ratio of the two. The sum then looks as it did, only smaller,
and so does all that an activation like Relu makes of it, down to the outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from onnxprune.activations import Activation, activation_behind
from onnxprune.calibrate import stream
from onnxprune.compensate import layer_with_bias
from onnxprune.data import Data
from onnxprune.graph import Graph, Node
from onnxprune.groups import DependencyGraph
from onnxprune.moments import seen_weight
from onnxprune.prepare import prepare
from onnxprune.rewrite import operate
from onnxprune.select import PruningPlan
from onnxprune.sites import only_reader
from onnxprune.stepwise import Stepwise, Values
from onnxprune.survivors import Survivors
from onnxprune.types import Absorption, AnyArray, BoolArray, Float64Array

_NEAR, _FAR = 2.0, 4.0  # where an activation is looked at; Relu6 has not bent yet
_RISES = 1.6  # by this at least from near to far: Relu by 2, Sigmoid by 1.1
_FLAT = 0.5  # on the other side it makes at most this share
_CLASSES = 2  # an output with more in a row is one of scores, of which only the order counts
_LEAST = 1e-3  # of the spread: a bias that moves less is left as it is
_TINY = 1e-12


@dataclass(frozen=True)
class _Aim:
    """A bias, and the tensor that it is to put right.

    Attributes:
        node: Layer or BatchNormalization whose bias it is.
        goal: Tensor in front of an activation, or an output.
        axis: Channel axis of both.
        shrinks: Mean and spread may both be less; else the mean itself counts.
    """

    node: Node
    goal: str
    axis: int
    shrinks: bool


class Recentring:
    """Fits biases of any cut of one model to the same inputs.

    Behind a layer after a layer, in execution order: the mean of each unit over all samples and
    positions becomes the original's times the share of its spread that the cut left, so that the
    ratio stays; where an activation does not go on in proportion (a gate), the original's itself.

    Source: bias correction of Nagel et al. 2019, Data-Free Quantization Through Weight Equalization
        and Bias Correction (arXiv:1906.04721), with the ratio kept in the place of the mean.
    """

    def __init__(self, graph: DependencyGraph, data: Data) -> None:
        """Look at what the original makes.

        Args:
            graph: The model that is cut.
            data: Inputs like those it will meet; a few dozen are enough for means and spreads.

        Raises:
            VerificationError: ONNX Runtime cannot run the model.
        """
        self.graph, self.data = graph, data
        self.aims = list(_aims(graph))
        goals = [aim.goal for aim in self.aims]
        sums = {aim.goal: _Sums(aim.axis) for aim in self.aims}
        for values in stream(graph.graph.model, goals, data) if goals else ():
            for name, array in values.items():
                sums[name].add(array)
        self.wanted = sums

    def recentred(self, plan: PruningPlan) -> PruningPlan:
        """The same cut with biases that put the sums in front of activations right.

        Raises:
            VerificationError: ONNX Runtime cannot run a piece of the model.
        """
        work = prepare(operate(plan).model)
        survivors = Survivors(plan.graph.tracer.traces[0], plan.graph.dead(plan.keep))
        aims = [aim for aim in self.aims if aim.goal in work.producer]
        found: dict[int, Float64Array] = {}
        with Stepwise(work, self.data, [aim.goal for aim in aims]) as run:
            for aim in aims:
                stop = max(work.producer[aim.goal].index + 1, run.done)
                made = run.until(stop, [aim.goal])[aim.goal]
                alive = survivors.alive(aim.goal, aim.axis)
                shift = self._shift(aim, made, alive)
                if shift is None:
                    continue
                line = [1] * made[0].ndim
                line[aim.axis] = -1
                run.put(aim.goal, [v + shift.reshape(line).astype(v.dtype) for v in made])
                whole = np.zeros(self.wanted[aim.goal].size)
                whole[slice(None) if alive is None else alive] = shift
                found[aim.node.index] = found.get(aim.node.index, 0.0) + whole
        added = (Absorption(index, bias=bias) for index, bias in found.items())
        return replace(plan, absorbed=(*plan.absorbed, *added))

    def _shift(self, aim: _Aim, made: Values, alive: BoolArray | None) -> Float64Array | None:
        """What to add to each unit; None where it is next to nothing, or not known."""
        wanted, now = self.wanted[aim.goal], _Sums(aim.axis)
        for array in made:
            now.add(array)
        if now.count != wanted.count:  # cut along another axis too
            return None
        left = slice(None) if alive is None else alive
        mean, spread = wanted.mean[left], wanted.spread[left]
        if aim.shrinks:
            mean = mean * np.minimum(now.spread / np.maximum(spread, _TINY), 1.0)
        shift = np.asarray(mean - now.mean, np.float64)
        if not np.isfinite(shift).all() or (np.abs(shift) <= _LEAST * spread + _TINY).all():
            return None
        return shift


class _Sums:
    """First and second moments of each unit, in float64."""

    def __init__(self, axis: int) -> None:
        self.axis = axis
        self.count = 0  # values of each unit
        self.first: Float64Array = np.zeros(0)
        self.second: Float64Array = np.zeros(0)

    def add(self, array: AnyArray) -> None:
        """Take up a batch."""
        rest = tuple(a for a in range(array.ndim) if a != self.axis)
        if not self.count:
            self.first, self.second = np.zeros((2, array.shape[self.axis]))
        self.first = self.first + np.sum(array, axis=rest, dtype=np.float64)
        square = np.square(np.asarray(array, np.float64))
        self.second = self.second + np.sum(square, axis=rest)
        self.count += array.size // array.shape[self.axis]

    @property
    def size(self) -> int:
        """Number of units."""
        return self.first.size

    @property
    def mean(self) -> Float64Array:
        """Of each unit."""
        return self.first / self.count

    @property
    def spread(self) -> Float64Array:
        """Standard deviation of each unit."""
        return np.sqrt(np.maximum(self.second / self.count - np.square(self.mean), 0.0))


# -- where a bias is to put something right --------------------------------------------------------


def _aims(dependency: DependencyGraph) -> Iterator[_Aim]:
    """Tensors in front of activations and outputs that one bias can move, in execution order."""
    graph, env = dependency.graph, dependency.envs[0]
    inside: set[str] = set()  # what is made on the way through an activation
    for node in graph.nodes:
        name = node.outputs[0]
        if name in inside or name in graph.derived:
            continue
        shape = env.shape(name) or ()
        behind = activation_behind(graph, name)
        if behind is not None:
            inside.update(each for one in behind.nodes for each in one.outputs)
            shrinks = _in_proportion(behind)
        elif name in graph.outputs or _goes_to_softmax(graph, name):
            shrinks = len(shape) == 2 and shape[1] > _CLASSES
        else:
            continue
        mover = _mover(graph, name)
        if mover is None or not shape or env.shape(mover.outputs[0]) != shape:
            continue
        axis = len(shape) - 1 if mover.op_type in ("Gemm", "MatMul") else 1
        yield _Aim(mover, name, axis, shrinks)


def _goes_to_softmax(graph: Graph, name: str) -> bool:
    reader = only_reader(graph, name)
    return reader is not None and reader.op_type in ("Softmax", "LogSoftmax")


def _mover(graph: Graph, name: str) -> Node | None:
    """The nearest node with a bias that alone moves a tensor, seen through sums."""
    node = graph.producer.get(name)
    if node is None or node.domain:
        return None
    if node.op_type == "BatchNormalization":
        plain = not node.int("training_mode", 0) and node.inputs[2] in graph.derived
        return node if plain else None
    if node.op_type == "Add":
        makers = [(graph.producer[n].index, n) for n in node.inputs if n in graph.producer]
        for _, summand in sorted(makers, reverse=True):
            if summand not in graph.derived and only_reader(graph, summand) is node:
                found = _mover(graph, summand)
                if found is not None:
                    return found
        return None
    layer = layer_with_bias(graph, node)
    seen = None if layer is None else seen_weight(graph, layer.seen)
    if layer is None or seen is None or (layer.kind == "matmul" and seen.ndim > 2):
        return None
    return node


def _in_proportion(behind: Activation) -> bool:
    """Whether an activation makes half of half: as Relu does, and SiLU and GELU nearly."""
    points = behind.at(np.asarray([-_FAR, _NEAR, _FAR], np.float32))
    if points is None:
        return False
    low, near, far = (float(value) for value in points)
    return near > 0 and far >= _RISES * near and abs(low) <= _FLAT * far
