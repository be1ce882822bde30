"""What a model costs: parameters, multiply-accumulates, bytes, channels; per layer and in total.

A multiply-accumulate is one use of a weight; bias, BatchNormalization and activations count none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import onnx

from onnxprune import messages
from onnxprune.graph import Graph, Node, captured_names
from onnxprune.groups import DependencyGraph
from onnxprune.model import Model
from onnxprune.ops.registry import macs_of
from onnxprune.prepare import prepare
from onnxprune.runs import movement_view
from onnxprune.shapes import Environment, environment
from onnxprune.types import IntArray, LayerStats, ModelStats

_T = onnx.TensorProto
# Integers that are weights only behind a DequantizeLinear; else shapes, indices and the like.
_WIDE_INTEGERS = {_T.INT16, _T.INT32, _T.INT64, _T.UINT16, _T.UINT32, _T.UINT64}
_NO_NUMBERS = {_T.BOOL, _T.STRING, _T.UNDEFINED}
_RUNNING_STATISTICS = (3, 4)  # inputs of BatchNormalization that nothing trains


def stats(graph: DependencyGraph) -> ModelStats:
    """Cost of the model that was analysed, at its first stand-in shapes."""
    model = graph.graph.source
    return _stats(model, graph.graph, graph.envs[0], channels(graph))


def stats_after(graph: DependencyGraph, model: Model, keep: Mapping[int, IntArray]) -> ModelStats:
    """Cost of a rewritten model.

    Args:
        graph: The analysis of the original.
        model: What ``rewrite`` made of it.
        keep: Units that stayed, by group, as in ``PruningPlan.keep``.

    Returns:
        Its cost at the same input shapes, from its own shape inference.
    """
    prepared = prepare(model)
    env = environment(prepared, graph.stand_ins)
    return _stats(model, prepared, env, channels(graph, keep))


def _stats(model: Model, graph: Graph, env: Environment, width: int) -> ModelStats:
    layers = tuple(_layers(graph, env))
    return ModelStats(
        params=count_params(model),
        macs=sum(layer.macs for layer in layers),
        bytes=model.file_bytes or stored_bytes(model),
        channels=width,
        layers=layers,
    )


def channels(graph: DependencyGraph, keep: Mapping[int, IntArray] | None = None) -> int:
    """Width of all weight axes that make channels, together; with ``keep``, of what is left."""
    total = 0
    for group in graph.groups:
        kept = (keep or {}).get(group.id)
        for axis in group.producers:
            total += axis.index.size if kept is None else int(np.isin(axis.unit, kept).sum())
    return total


def stored_bytes(model: Model) -> int:
    """About what ``save`` will write; the few bytes that frame each tensor are not counted."""
    return int(model.proto.ByteSize()) + sum(weight.nbytes for weight in model.deferred.values())


# -- parameters ------------------------------------------------------------------------------------


def count_params(model: Model) -> int:
    """Elements of the float or quantized constants that nodes use, each constant once.

    Left out: running statistics of BatchNormalization, and integers of 16 bits and more that
    nothing dequantizes (shapes, indices).
    """
    return sum(parameters_by_name(model).values()) + sum(_inside_bodies(model.proto.graph))


def parameters_by_name(model: Model) -> Mapping[str, int]:
    """Elements of each top-level constant that counts as parameters."""
    used, dequantized = _uses(model.proto.graph)
    return {
        name: weight.size
        for name, weight in model.weights().items()
        if name in used and _is_parameter(weight.data_type, name in dequantized)
    }


def _is_parameter(data_type: int, dequantized: bool) -> bool:
    if data_type in _WIDE_INTEGERS:
        return dequantized
    return data_type not in _NO_NUMBERS


def _uses(graph: onnx.GraphProto) -> tuple[set[str], set[str]]:
    """Tensors that nodes read other than as running statistics, and those that are dequantized."""
    used: set[str] = set()
    dequantized: set[str] = set()
    for node in reversed(graph.node):
        statistics = _RUNNING_STATISTICS if node.op_type == "BatchNormalization" else ()
        if node.op_type == "Identity" and node.output[0] not in used:
            continue  # shows a constant to nobody, or as a running statistic
        used.update(name for at, name in enumerate(node.input) if at not in statistics)
        used.update(captured_names(node))
        if node.op_type == "DequantizeLinear":
            dequantized.add(node.input[0])
    return used, dequantized


def _inside_bodies(graph: onnx.GraphProto) -> Iterator[int]:
    """Parameters that belong to the bodies of If, Loop and Scan."""
    for node in graph.node:
        for attribute in node.attribute:
            for body in (*([attribute.g] if attribute.HasField("g") else ()), *attribute.graphs):
                used, dequantized = _uses(body)
                yield from (
                    int(np.prod(tensor.dims, dtype=np.int64))
                    for tensor in _constants_of(body)
                    if tensor.name in used
                    and _is_parameter(tensor.data_type, tensor.name in dequantized)
                )
                yield from _inside_bodies(body)


def _constants_of(body: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from body.initializer
    for node in body.node:
        if messages.is_constant(node) and node.attribute[0].HasField("t"):
            tensor = node.attribute[0].t
            yield _T(name=node.output[0], data_type=tensor.data_type, dims=tensor.dims)


# -- multiply-accumulates --------------------------------------------------------------------------


def _layers(graph: Graph, env: Environment) -> Iterator[LayerStats]:
    """Every node that multiplies or holds parameters."""
    for node in graph.nodes:
        if node.key in graph.derived:
            continue
        params = sum(_parameters_of(graph, node))
        macs = _macs(node, env)
        if params or macs:
            traffic = _traffic(node, env) if macs else (0, 0, 0, False, 1)
            yield LayerStats(node.label, node.op_type, params, macs, *traffic)


def _traffic(node: Node, env: Environment) -> tuple[int, int, int, bool, int]:
    """Bytes moved, channels read and made, whether each has filters of its own, and groups."""
    names = [name for name in (*node.inputs, *node.outputs) if name]
    moved = sum(_bytes_of(name, env) for name in names)
    x, y = env.shape(node.inputs[0]), env.shape(node.outputs[0])
    w = env.shape(node.inputs[1]) if len(node.inputs) > 1 else None
    convolution = "Conv" in node.op_type
    axis = 1 if convolution else -1
    read = 0 if node.op_type == "Gemm" and node.int("transA", 0) else axis
    inputs = x[read] if x and len(x) >= 2 else 0
    outputs = y[axis] if y and len(y) >= 2 else 0
    depthwise = bool(convolution and w and len(w) > 2 and w[1] == 1 and inputs == outputs > 1)
    groups = node.int("group", 1) if convolution else 1
    return moved, inputs, outputs, depthwise, groups


def _bytes_of(name: str, env: Environment) -> int:
    shape, kind = env.shape(name), env.data_type(name)
    if shape is None or kind == _T.UNDEFINED:
        return 0
    return int(np.prod(shape, dtype=np.int64)) * onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize


def _parameters_of(graph: Graph, node: Node) -> Iterator[int]:
    """Sizes of the constants a node reads, also through nodes that only present them."""
    statistics = _RUNNING_STATISTICS if node.op_type == "BatchNormalization" else ()
    for position, name in enumerate(node.inputs):
        if position in statistics or name not in graph.derived:
            continue
        leaf, dequantized = name, False
        while leaf in graph.derived and leaf not in graph.constants:
            source = graph.producer[leaf]
            leaf, dequantized = source.inputs[0], source.op_type == "DequantizeLinear"
        constant = graph.constants.get(leaf)
        if constant is not None and _is_parameter(constant.weight.data_type, dequantized):
            yield constant.weight.size


def _macs(node: Node, env: Environment) -> int:
    count = macs_of(node)
    view = movement_view(node, env) if count is not None else None
    return count(view) if count is not None and view is not None else 0
