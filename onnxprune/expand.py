"""What a cut and its restoring left of a model, at the original's size.

Between the steps of an iterative cut channels are ranked again on what the last step left. There
the original's graph keeps its shape, so that units keep their numbers: what survived holds its
restored values, what was dropped is read by zeros, as in the masked twin.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from onnxprune.emit import ConstantEdit, Emitter
from onnxprune.graph import Graph
from onnxprune.groups import DependencyGraph
from onnxprune.model import Model
from onnxprune.prepare import prepare
from onnxprune.select import PruningPlan
from onnxprune.slices import Slice, slices
from onnxprune.survivors import Survivors
from onnxprune.twin import twin_emitter
from onnxprune.types import AnyArray, Shape


def expanded(plan: PruningPlan, made: Model, restored: Iterable[str]) -> DependencyGraph:
    """The analysis of the original, with the weights that a cut and its restoring left.

    Args:
        plan: The cut.
        made: The model it made, restored.
        restored: Constants of ``made`` whose values are not slices of the original's.

    Returns:
        The plan's analysis, groups and units as they were, on other weights. Constants that have
        no counterpart of the right shape in the original keep its slices.
    """
    graph = plan.graph.graph
    survivors = Survivors(plan.graph.tracer.traces[0], plan.graph.dead(plan.keep))
    small, parts = prepare(made), slices(plan.graph, survivors)
    emitter = twin_emitter(plan)
    for name in restored:
        if name not in small.constants:
            continue
        value = small.constants[name].weight
        part = parts.get(name)
        whole = graph.constants[name].weight.shape if name in graph.constants else None
        if whole is not None and value.shape == (whole if part is None else part.shape):
            _spread(emitter, name, value.read(), _places(part, whole))
        else:
            _add_bias(emitter, small, name, survivors)
    constants = {
        name: replace(constant, weight=emitter.weight(name)) if name in emitter.constants else
        constant for name, constant in graph.constants.items()
    }  # fmt: skip
    return replace(plan.graph, graph=replace(graph, constants=constants, model=emitter.build()))


def _places(part: Slice | None, whole: Shape) -> AnyArray:
    """Flat positions of the survivors of a constant."""
    every = np.arange(int(np.prod(whole))).reshape(whole)
    return (every if part is None else part.take(every)).reshape(-1)


def _spread(emitter: Emitter, name: str, value: AnyArray, places: AnyArray) -> None:
    masked = emitter.constants.get(name)

    def compute(array: AnyArray) -> AnyArray:
        full = np.array(array if masked is None else masked.compute(array))
        full.reshape(-1)[places] = value.reshape(-1)
        return full

    shape = emitter.graph.constants[name].weight.shape
    emitter.constants[name] = ConstantEdit(shape, compute, b"expanded" + value.tobytes())


def _add_bias(emitter: Emitter, small: Graph, name: str, survivors: Survivors) -> None:
    """Give a node the bias that restoring gave it, where it had none."""
    for reader, position in small.consumers.get(name, ()):
        node = emitter.graph.producer.get(reader.outputs[0])
        if node is None or node.op_type != reader.op_type or len(node.inputs) > position:
            continue
        shape = survivors.trace.env.shape(node.outputs[0]) or ()
        axis = 1 if node.op_type != "MatMul" else len(shape) - 1
        value = small.constants[name].weight.read()
        full = np.zeros(shape[axis], value.dtype)
        alive = survivors.alive(node.outputs[0], axis)
        full[slice(None) if alive is None else alive] = value
        proto = emitter.node(node)
        while len(proto.input) <= position:
            proto.input.append("")
        proto.input[position] = emitter.literal(f"{node.key}_bias", full)
