"""Models as another tool leaves them: channels zeroed, nothing smaller."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper

from onnxprune.analyse import analyse, random_keep
from onnxprune.emit import ConstantEdit, Emitter
from onnxprune.io import as_model
from onnxprune.model import Model
from onnxprune.record import dead_births, role
from onnxprune.select import PruningPlan
from onnxprune.stream import serialize
from onnxprune.twin import masked_twin
from onnxprune.types import AnyArray

_STATISTICS = (3, 4)  # inputs of BatchNormalization


def masked(model: Model, ratio: float, which: str, seed: int = 0) -> tuple[PruningPlan, Model]:
    """Zero a random share of every group.

    Args:
        model: The original.
        ratio: Share of the channels.
        which: ``consumers``, the weights that read them; ``producers``, the weights that make them
            with biases, scales and shifts; ``filters``, the weights that make them alone.
        seed: For the choice.

    Returns:
        The plan that would remove just these channels, and the masked model.
    """
    graph = analyse(model)
    plan = PruningPlan(graph, random_keep(graph, ratio, np.random.default_rng(seed)))
    if which == "consumers":
        return plan, as_model(serialize(masked_twin(plan)))
    emitter, dead = Emitter(graph.graph), graph.dead(plan.keep)
    normalised = {
        axis.tensor: axis.input_index
        for group in graph.groups
        for axis in group.parameters
        if axis.op_type == "BatchNormalization"
    }
    for name, births in dead_births(graph, dead):
        made = [(b.view, mask) for b, mask in births if role(graph, b) != "consumer"]
        untouched = normalised.get(name) in _STATISTICS or (
            which == "filters" and name in normalised
        )
        if made and not untouched:

            def zeroed(array: AnyArray, made: list[tuple] = made) -> AnyArray:
                result = np.array(array)
                for view, mask in made:
                    result.reshape(view)[np.broadcast_to(mask, view)] = 0
                return result

            shape = graph.graph.constants[name].weight.shape
            key = repr([np.packbits(mask).tobytes() for _, mask in made]).encode()
            emitter.constants[name] = ConstantEdit(shape, zeroed, key)
    return plan, as_model(serialize(emitter.build()))


def folded(model: Model) -> Model:
    """The model with every BatchNormalization folded into the Conv before it."""
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    graph = proto.graph
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    nodes, makers = [], {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        if node.op_type == "Identity" and node.input[0] in weights:
            weights[node.output[0]] = weights[node.input[0]]
        elif node.op_type == "BatchNormalization":
            conv = makers[node.input[0]]
            scale, shift, mean, var = (weights[name].astype(float) for name in node.input[1:5])
            epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5)
            factor = scale / np.sqrt(var + epsilon)
            weight = weights[conv.input[1]]
            lines = (-1, *(1,) * (weight.ndim - 1))
            weights[conv.input[1]] = (weight * factor.reshape(lines)).astype(np.float32)
            bias = f"{conv.input[1]}.bias"
            weights[bias] = (shift - mean * factor).astype(np.float32)
            conv.input.append(bias)
            conv.output[0] = node.output[0]
        else:
            nodes.append(node)
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    used = {name for node in kept for name in node.input}
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(kept)
    graph.initializer.extend(
        numpy_helper.from_array(array, name) for name, array in weights.items() if name in used
    )
    return Model(proto)
