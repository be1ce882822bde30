"""What a model needs before it is quantized: functions inlined, an opset that has the types."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import onnx

from onnxprune.errors import UnsupportedModelError
from onnxprune.graph import captured_names
from onnxprune.model import Model, Weight
from onnxprune.stream import serialize
from onnxprune.types import AnyArray, FloatArray

_SCALES = 5  # inputs of a BatchNormalization: X, scale, B, mean, var


def inlined(model: Model) -> Model:
    """The model with local functions in the graph, where it has any."""
    if not model.proto.functions:
        return model
    from onnx import inliner

    return replace(model, proto=inliner.inline_local_functions(model.proto))


def opset_of(model: Model) -> int:
    """Version of the ONNX operators, 0 where the model uses none of them."""
    known = (o.version for o in model.proto.opset_import if o.domain in ("", "ai.onnx"))
    return next(known, 0)


def raised(model: Model, opset: int) -> Model:
    """The model in at least that version of the ONNX operators.

    Raises:
        UnsupportedModelError: ONNX has no way to convert it.
    """
    given = opset_of(model)
    if not given or given >= opset:
        return model
    from onnx import version_converter

    proto = onnx.load_model_from_string(serialize(model))
    try:
        made = version_converter.convert_version(proto, opset)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UnsupportedModelError(
            f"opset {given} has no such types, and ONNX cannot raise it to {opset}: {reason}",
            hint=f"export the model with opset {opset} or later",
        ) from error
    for kind in ("input", "output"):  # whose shapes it infers anew
        values = {value.name: value for value in getattr(model.proto.graph, kind)}
        for value in getattr(made.graph, kind):
            if value.name in values:
                value.CopyFrom(values[value.name])
    return Model(made, None, path=model.path, file_bytes=model.file_bytes, sources=model.sources)


def without_batch_norms(model: Model) -> tuple[Model, tuple[str, ...]]:
    """Every BatchNormalization behind a convolution folded into it, and the convolutions' outputs.

    Integer kernels take what comes out of a convolution; a norm between it and the next quantizer
    would keep them apart.
    """
    graph = model.proto.graph
    weights = dict(model.weights())
    reads = Counter(name for node in graph.node for name in node.input)
    reads.update(name for node in graph.node for name in captured_names(node))
    fixed = {value.name for value in (*graph.input, *graph.output)}
    maker = {name: at for at, node in enumerate(graph.node) for name in node.output}
    pairs: list[tuple[int, int]] = []
    for at, node in enumerate(graph.node):
        before = maker.get(node.input[0]) if node.input else None
        if (
            node.op_type == "BatchNormalization"
            and node.domain in ("", "ai.onnx")
            and len([name for name in node.output if name]) == 1
            and before is not None
            and _foldable(graph.node[before], weights, reads, fixed)
            and all(_plain(name, weights, fixed) for name in node.input[1:_SCALES])
            and reads[node.input[0]] == 1
            and node.input[0] not in fixed
        ):
            pairs.append((before, at))
    if not pairs:
        return model, ()
    return _folded(model, pairs, weights)


def _plain(name: str, weights: dict[str, Weight], fixed: set[str]) -> bool:
    weight = weights.get(name)
    return weight is not None and weight.data_type == onnx.TensorProto.FLOAT and name not in fixed


def _foldable(
    node: onnx.NodeProto, weights: dict[str, Weight], reads: Counter[str], fixed: set[str]
) -> bool:
    """A convolution whose weight is its own."""
    if node.op_type != "Conv" or node.domain not in ("", "ai.onnx"):
        return False
    bias = node.input[2] if len(node.input) > 2 else ""
    return (
        _plain(node.input[1], weights, fixed)
        and reads[node.input[1]] == 1
        and (not bias or _plain(bias, weights, fixed))
    )


def _folded(
    model: Model, pairs: list[tuple[int, int]], weights: dict[str, Weight]
) -> tuple[Model, tuple[str, ...]]:
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    graph, deferred = proto.graph, dict(model.deferred)
    gone = set()
    for conv_at, norm_at in pairs:
        conv, norm = graph.node[conv_at], graph.node[norm_at]
        epsilon = next((a.f for a in norm.attribute if a.name == "epsilon"), 1e-5)
        scale, shift, mean, var = (
            np.asarray(weights[name].read(), np.float64) for name in norm.input[1:_SCALES]
        )
        factor = scale / np.sqrt(var + epsilon)
        weight = weights[conv.input[1]]
        had = conv.input[2] if len(conv.input) > 2 else ""
        bias = np.asarray(weights[had].read(), np.float64) if had else np.zeros_like(mean)
        new = np.asarray(shift + (bias - mean) * factor, np.float32)
        put(graph, deferred, weight.name, _times(weight.read(), factor))
        name = f"{norm.output[0]}_bias"
        put(graph, deferred, name, new)
        inputs = [conv.input[0], conv.input[1], name]
        del conv.input[:]
        conv.input.extend(inputs)
        conv.output[0] = norm.output[0]
        gone.add(norm_at)
    kept = [node for at, node in enumerate(graph.node) if at not in gone]
    order = [onnx.NodeProto() for _ in kept]
    for copy, node in zip(order, kept, strict=True):
        copy.CopyFrom(node)
    del graph.node[:]
    graph.node.extend(order)
    made = replace(model, proto=proto, deferred=deferred)
    return swept(made), tuple(model.proto.graph.node[at].output[0] for _, at in pairs)


def _times(weight: AnyArray, factor: FloatArray) -> AnyArray:
    shape = (-1,) + (1,) * (weight.ndim - 1)
    return np.asarray(np.multiply(weight, factor.reshape(shape)), np.float32)


def put(graph: onnx.GraphProto, deferred: dict[str, Weight], name: str, values: AnyArray) -> None:
    """Make a constant of the main graph hold ``values``: an initializer, in place of any other."""
    tensor = onnx.numpy_helper.from_array(np.ascontiguousarray(values), name)
    deferred.pop(name, None)
    for old in graph.initializer:
        if old.name == name:
            old.CopyFrom(tensor)
            return
    for node in graph.node:
        if node.op_type == "Constant" and node.output[0] == name:
            del node.attribute[:]
            node.attribute.append(onnx.helper.make_attribute("value", tensor))
            return
    graph.initializer.append(tensor)


def swept(model: Model) -> Model:
    """The model without constants, and nodes that only present constants, that nothing reads."""
    graph = model.proto.graph
    constants = set(model.weights())
    derived = set(constants)
    for node in graph.node:
        if node.input and all(name in derived for name in node.input if name):
            derived.update(node.output)
    needed = {value.name for value in graph.output}
    keep = []
    for node in reversed(graph.node):
        idle = all(name in derived for name in node.output if name)
        if idle and not needed & set(node.output):
            continue
        keep.append(node)
        needed.update((*node.input, *captured_names(node)))
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    order = [onnx.NodeProto() for _ in keep]
    for copy, node in zip(order, reversed(keep), strict=True):
        copy.CopyFrom(node)
    del proto.graph.node[:]
    proto.graph.node.extend(order)
    inputs = {value.name for value in graph.input}
    stay = [t for t in proto.graph.initializer if t.name in needed or t.name in inputs]
    tensors = [onnx.TensorProto() for _ in stay]
    for copy_, tensor in zip(tensors, stay, strict=True):
        copy_.CopyFrom(tensor)
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(tensors)
    made = {name for node in order for name in node.output} | {t.name for t in tensors} | inputs
    infos = [value for value in proto.graph.value_info if value.name in made]
    values = [onnx.ValueInfoProto() for _ in infos]
    for copied, value in zip(values, infos, strict=True):
        copied.CopyFrom(value)
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(values)
    deferred = {name: weight for name, weight in model.deferred.items() if name in needed}
    return replace(model, proto=proto, deferred=deferred)
