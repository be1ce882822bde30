"""Small models as ONNX text, and what may be said of the channels that an analysis found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx

from onnxprune.analyse import DependencyGraph, analyse
from onnxprune.model import Model
from onnxprune.rewrite import Surgery, operate
from tests.oracle import assert_equals_masked_twin, plan_at, plan_at_random, plan_without

_SEEDS = range(3)


def model(text: str, *, opset: int = 21, ir_version: int = 10, **constants: Any) -> Model:
    """A model from its body; constants are arrays, or shapes filled from a seeded generator.

    In IR version 3 every constant is also a graph input, as it has to be.
    """
    head = f'<ir_version: {ir_version}, opset_import: ["" : {opset}]>'
    proto = onnx.parser.parse_model(f"{head}\n{text}")
    rng = np.random.default_rng(0)
    for name, given in constants.items():
        if isinstance(given, tuple):
            array = np.asarray(rng.standard_normal(given) * 0.6, np.float32)
        else:
            array = np.asarray(given)
        tensor = onnx.numpy_helper.from_array(array, name)
        proto.graph.initializer.append(tensor)
        if ir_version < 4:
            entry = onnx.helper.make_tensor_value_info(name, tensor.data_type, tensor.dims)
            proto.graph.input.append(entry)
    return Model(proto)


def between_convs(middle: str, *, opset: int = 21, reads: int = 8, **constants: Any) -> Model:
    """Conv w1 (8 channels) makes ``a``, the middle ``m``, Conv w2 reads ``reads`` channels."""
    text = (
        "g (float[2,3,8,8] x) => (float[n,c,h,w] y) {\n"
        f"a = Conv(x, w1, b1)\n{middle}\ny = Conv(m, w2)}}"
    )
    weights = {"w1": (8, 3, 1, 1), "b1": (8,), "w2": (4, reads, 1, 1)}
    return model(text, opset=opset, **{**weights, **constants})


def between_matmuls(middle: str, *, opset: int = 21, reads: int = 8, **constants: Any) -> Model:
    """MatMul w1 (8 channels) makes ``a`` (2, 6, 8), the middle ``m``, MatMul w2 reads it."""
    text = (
        "g (float[2,6,3] x) => (float[n,t,c] y) {\n"
        f"a = MatMul(x, w1)\n{middle}\ny = MatMul(m, w2)}}"
    )
    return model(text, opset=opset, **{"w1": (3, 8), "w2": (reads, 4), **constants})


# -- what an analysis found ------------------------------------------------------------------------


def units(graph: DependencyGraph, tensor: str, axis: int) -> list[tuple[int, int] | None]:
    """Group and unit at each position of a weight's axis, None where nothing may go."""
    size = graph.graph.constants[tensor].weight.shape[axis]
    found: list[tuple[int, int] | None] = [None] * size
    for group in graph.prunable:
        for weight in (*group.producers, *group.consumers, *group.parameters):
            if weight.tensor == tensor and weight.axes == (axis,):
                for position, unit in zip(weight.index, weight.unit, strict=True):
                    found[position] = (group.id, int(unit))
    return found


def assert_coupled(graph: DependencyGraph, *axes: tuple[str, int]) -> None:
    """Position i of every axis is one channel, which may go."""
    first = units(graph, *axes[0])
    assert None not in first, reason(graph, axes[0][0])
    assert len(set(first)) == len(first)
    for tensor, axis in axes[1:]:
        assert units(graph, tensor, axis) == first, (tensor, axis)


def reason(graph: DependencyGraph, producer: str) -> str:
    """Why the channels that a weight makes may not go; "" where they may."""
    for group in graph.groups:
        if any(weight.tensor == producer for weight in group.producers):
            return group.frozen or ""
    return "no group"


def assert_frozen(found: Model, producer: str, *words: str) -> None:
    """The channels stay, for a reason that has these words, and the rest is cut exactly."""
    graph = analyse(found)
    why = reason(graph, producer)
    assert why, f"{producer} is not frozen"
    for word in words:
        assert word in why
    assert_exact(found, some=False)


def assert_exact(found: Model, *, some: bool = True, attention: str = "heads") -> None:
    """Every plan tried gives the masked twin; ``some``: there is something to cut."""
    graph = analyse(found, attention=attention)
    if some:
        assert graph.prunable, str(graph)
    for seed in _SEEDS:
        assert_equals_masked_twin(found, plan_at(graph, 0.5, seed), vacuous=not some)
        assert_equals_masked_twin(found, plan_at_random(graph, seed), vacuous=True)


def halved(found: Model, *, attention: str = "heads") -> dict[str, onnx.NodeProto]:
    """The nodes of the model cut in half, by their first output."""
    surgery = operate(plan_at(analyse(found, attention=attention), 0.5))
    return {node.output[0]: node for node in surgery.model.proto.graph.node}


def attribute(node: onnx.NodeProto, name: str) -> object:
    return next(onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == name)


def overridable(found: Model, name: str) -> Model:
    """The model with a constant that a caller may override: nothing computed from it is folded."""
    tensor = next(t for t in found.proto.graph.initializer if t.name == name)
    entry = onnx.helper.make_tensor_value_info(name, tensor.data_type, tensor.dims)
    found.proto.graph.input.append(entry)
    return found


def unknown(found: Model, *outputs: str) -> Model:
    """The model with operators that nobody knows in place of those that make some tensors."""
    for node in found.proto.graph.node:
        if node.output[0] in outputs:
            node.op_type, node.domain = "Unknown", "nobody"
    found.proto.opset_import.append(onnx.helper.make_opsetid("nobody", 1))
    return found


# -- cutting it ------------------------------------------------------------------------------------


def without(found: Model, producer: str, units_gone: Sequence[int] = (1, 2, 5)) -> Surgery:
    """The model without some channels that one weight makes, held against its twin."""
    graph = analyse(found)
    named = (g.id for g in graph.prunable if producer in [axis.tensor for axis in g.producers])
    plan = plan_without(graph, {next(named): units_gone})
    assert_equals_masked_twin(found, plan)
    return operate(plan)


def shapes(surgery: Surgery) -> dict[str, tuple[int, ...]]:
    return {name: weight.shape for name, weight in surgery.model.weights().items()}
