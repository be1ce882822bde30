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

from onnxprune import fields
from onnxprune.activations import Activation, activation_behind
from onnxprune.compensate import layer_with_bias
from onnxprune.data import Data
from onnxprune.graph import Graph, Node
from onnxprune.moments import seen_weight
from onnxprune.prepare import prepare
from onnxprune.rewrite import operate
from onnxprune.select import PruningPlan
from onnxprune.sites import only_reader
from onnxprune.stepwise import Stepwise, Values
from onnxprune.survivors import Survivors
from onnxprune.types import Absorption, Float64Array

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


def recentred(plan: PruningPlan, data: Data) -> PruningPlan:
    """The same cut with biases that put the sums in front of activations right.

    Behind a layer after a layer, in execution order: the mean of each unit over all samples and
    positions becomes the original's times the share of its spread that the cut left, so that the
    ratio stays; where an activation does not go on in proportion (a gate), the original's itself.

    Args:
        plan: The cut.
        data: Inputs like those it will meet; a few dozen are enough for means and spreads.

    Raises:
        VerificationError: ONNX Runtime cannot run a piece of the model.

    Source: bias correction of Nagel et al. 2019, Data-Free Quantization Through Weight Equalization
        and Bias Correction (arXiv:1906.04721), with the ratio kept in the place of the mean.
    """
    original, work = plan.graph.graph, prepare(operate(plan).model)
    survivors = Survivors(plan.graph.tracer.traces[0], plan.graph.dead(plan.keep))
    aims = [aim for aim in _aims(plan) if aim.goal in work.producer]
    goals = [aim.goal for aim in aims]
    found: dict[int, Float64Array] = {}
    with Stepwise(original, data, goals) as first, Stepwise(work, data, goals) as second:
        for aim in aims:
            wanted, made = _at(first, original, aim.goal), _at(second, work, aim.goal)
            gone = survivors.masks(aim.goal)
            shift = _shift(aim, [fields.compact(each, *gone) for each in wanted], made)
            if shift is None:
                continue
            line = [1] * made[0].ndim
            line[aim.axis] = -1
            second.put(aim.goal, [v + shift.reshape(line).astype(v.dtype) for v in made])
            alive = survivors.alive(aim.goal, aim.axis)
            whole = np.zeros(wanted[0].shape[aim.axis])
            whole[slice(None) if alive is None else alive] = shift
            found[aim.node.index] = found.get(aim.node.index, 0.0) + whole
    added = (Absorption(index, bias=bias) for index, bias in found.items())
    return replace(plan, absorbed=(*plan.absorbed, *added))


def _at(run: Stepwise, graph: Graph, name: str) -> Values:
    return run.until(max(graph.producer[name].index + 1, run.done), [name])[name]


def _shift(aim: _Aim, wanted: Values, made: Values) -> Float64Array | None:
    """What to add to each unit; None where it is next to nothing, or not known."""
    (mean, spread), (now, left) = _moments(wanted, aim.axis), _moments(made, aim.axis)
    if aim.shrinks:
        mean = mean * np.minimum(left / np.maximum(spread, _TINY), 1.0)
    shift = np.asarray(mean - now, np.float64)
    if not np.isfinite(shift).all() or (np.abs(shift) <= _LEAST * spread + _TINY).all():
        return None
    return shift


def _moments(values: Values, axis: int) -> tuple[Float64Array, Float64Array]:
    """Mean and standard deviation of each unit, in float64."""
    rest = tuple(a for a in range(values[0].ndim) if a != axis)
    count = sum(each.size // each.shape[axis] for each in values)
    mean = sum(np.sum(v, axis=rest, dtype=np.float64) for v in values) / count
    square = sum(np.sum(np.square(v, dtype=np.float64), axis=rest) for v in values) / count
    return np.asarray(mean), np.sqrt(np.maximum(square - np.square(mean), 0.0))


# -- where a bias is to put something right --------------------------------------------------------


def _aims(plan: PruningPlan) -> Iterator[_Aim]:
    """Tensors in front of activations and outputs that one bias can move, in execution order."""
    graph, env = plan.graph.graph, plan.graph.envs[0]
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
