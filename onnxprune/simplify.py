"""What a model can do without: what is constant, nodes that hand on, copies, what nothing reads.

ONNX GraphSurgeon computes what is constant, on a scratch copy. Only the values are taken from it:
everything else of the model (metadata, names, functions, types it does not know) stays as it is.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from hashlib import sha256

import numpy as np
import onnx
from onnx import TensorProto

from onnxprune import messages
from onnxprune.errors import UsageError
from onnxprune.foldbn import rebuilt
from onnxprune.graph import captured_names
from onnxprune.model import Model, Weight
from onnxprune.skeleton import LARGE, skeleton
from onnxprune.stream import serialize
from onnxprune.types import AnyArray

_DRAWN = {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli"}
_DRAWN |= {"Multinomial", "Dropout"}
_QUANTIZING = {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"}
_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Gather")
_STANDARD = ("", "ai.onnx")
_ASK_A_SHAPE = ("Shape", "Size")
_A_NODE = 64  # bytes that a node takes in a file, at least


def simplified(model: Model, keep: Collection[str] = ()) -> Model:
    """The same function in fewer nodes; the model itself where there is nothing to do.

    Args:
        model: The model.
        keep: Constants that stay as they are, and under their names.
    """
    made = _folded(model, frozenset(keep))
    made = _without_copies(_without_identities(made), frozenset(keep))
    left = rebuilt(made, list(made.proto.graph.node))
    same = len(left.proto.graph.node) == len(model.proto.graph.node)
    same = same and len(left.proto.graph.initializer) == len(model.proto.graph.initializer)
    return model if same and made is model else left


# -- what is constant ------------------------------------------------------------------------------


def _folded(model: Model, keep: frozenset[str]) -> Model:
    """Tensors that depend on no input, as constants, unless they take more room than before."""
    graph = model.proto.graph
    types = _types(model)
    maker = {name: node for node in graph.node for name in node.output if name}
    values = {
        name: array
        for name, array in _constant_values(model).items()
        if name in maker and not messages.is_constant(maker[name])
        if _same_type(array, types, name)
    }
    needed = {value.name for value in graph.output}
    for node in graph.node:
        if not all(name in values for name in node.output if name):
            needed.update((*node.input, *captured_names(node)))
    # A graph output stays the output of a node.
    outputs = {value.name for value in graph.output}
    chosen = {n: a for n, a in values.items() if n in needed and n not in outputs}
    chosen = dict(_no_larger(model, maker, chosen, keep))
    if not chosen:
        return model
    nodes = []
    for node in graph.node:
        names = [name for name in node.output if name]
        if names and all(name in chosen for name in names):
            continue
        if any(name in chosen for name in names):  # the node stays, for its other outputs
            for name in names:
                chosen.pop(name, None)
        nodes.append(node)
    added = [
        Weight.from_array(name, np.ascontiguousarray(a)).to_proto() for name, a in chosen.items()
    ]
    return rebuilt(model, nodes, added=added, dropped=set(chosen))


def _constant_values(model: Model) -> Mapping[str, AnyArray]:
    """Values that GraphSurgeon finds, of whatever becomes constant in it, by name."""
    import onnx_graphsurgeon
    from onnx_graphsurgeon.logger import G_LOGGER

    bones = skeleton(model)
    scratch = onnx.ModelProto()
    try:
        scratch.ParseFromString(serialize(model))
    except UsageError:  # too large for one message: all but the large weights
        scratch.CopyFrom(bones)
    # Declared shapes may be those of an example; those inferred hold for every input.
    del bones.graph.value_info[:], scratch.graph.value_info[:]
    with contextlib.suppress(onnx.shape_inference.InferenceError):
        inferred = onnx.shape_inference.infer_shapes(bones, data_prop=True)
        scratch.graph.value_info.extend(inferred.graph.value_info)
    level, G_LOGGER.severity = G_LOGGER.severity, G_LOGGER.CRITICAL
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            graph = onnx_graphsurgeon.import_onnx(scratch)
            graph.fold_constants(
                partitioning="basic",
                recurse_subgraphs=False,
                recurse_functions=False,
                flatten_subgraphs=False,
                size_threshold=max(_largest(model), LARGE),
                should_exclude_node=lambda node: node.op in _DRAWN | _QUANTIZING,
            )
            return {
                name: tensor.values
                for name, tensor in graph.tensors().items()
                if isinstance(tensor, onnx_graphsurgeon.Constant)
            }
    finally:
        G_LOGGER.severity = level


def _largest(model: Model) -> int:
    return max((weight.nbytes for weight in model.weights().values()), default=0)


def _types(model: Model) -> dict[str, int]:
    try:
        graph = onnx.shape_inference.infer_shapes(skeleton(model)).graph
    except onnx.shape_inference.InferenceError:
        graph = model.proto.graph
    return {value.name: value.type.tensor_type.elem_type for value in graph.value_info}


def _same_type(array: object, types: Mapping[str, int], name: str) -> bool:
    """Whether a value has the type that its node makes; numpy lacks some, and others stand in."""
    if not isinstance(array, np.ndarray) or array.dtype.kind in "OUS":
        return False
    return int(onnx.helper.np_dtype_to_tensor_dtype(array.dtype)) == types.get(name)


def _no_larger(
    model: Model,
    maker: Mapping[str, onnx.NodeProto],
    values: Mapping[str, AnyArray],
    keep: frozenset[str],
) -> Iterator[tuple[str, AnyArray]]:
    """Values that take no more room than the constants which were there for them alone."""
    weights = model.weights()
    readers: dict[str, set[int]] = {}
    for node in model.proto.graph.node:
        for name in (*node.input, *captured_names(node)):
            readers.setdefault(name, set()).add(id(node))
    outputs = {value.name for value in model.proto.graph.output}
    for name, array in values.items():
        chain: dict[int, onnx.NodeProto] = {}
        pending = [name]
        leaves = set()
        while pending:
            current = pending.pop()
            node = maker.get(current)
            if current in weights:
                leaves.add(current)
            elif node is not None and id(node) not in chain:
                chain[id(node)] = node
                if node.op_type not in _ASK_A_SHAPE:
                    pending += [one for one in node.input if one]
        inner = (leaves | {one for node in chain.values() for one in node.output}) - {name}
        own = all(readers.get(one, set()) <= chain.keys() and one not in outputs for one in inner)
        room = sum(weights[leaf].nbytes for leaf in leaves) if own else 0
        if array.nbytes <= max(room, _A_NODE) and not leaves & keep:
            yield name, array


# -- nodes that hand on ----------------------------------------------------------------------------


def _without_identities(model: Model) -> Model:
    graph = model.proto.graph
    source_nodes = list(graph.node)  # held, so that an id stays what it is
    outputs = {value.name for value in graph.output}
    captured = {name for node in graph.node for name in captured_names(node)}
    fixed = outputs | captured
    opset = next((e.version for e in model.proto.opset_import if e.domain in _STANDARD), 1)
    falses = {
        name
        for name, weight in model.weights().items()
        if weight.data_type == TensorProto.BOOL and weight.size == 1 and not weight.read().any()
    }
    made = {name for node in graph.node for name in node.output}
    read = {name for node in graph.node for name in node.input if name} | fixed
    renamed: dict[str, str] = {}  # a tensor, and by what name it goes now
    gone: set[int] = set()
    for node in source_nodes:
        if not _hands_on(node, opset, falses) or any(name in read for name in node.output[1:]):
            continue
        source, result = renamed.get(node.input[0], node.input[0]), node.output[0]
        if result not in fixed:
            renamed[result] = source
            gone.add(id(node))
        elif result in outputs and result not in captured and source in made - fixed:
            # What makes it makes the output itself.
            renamed = {k: result if v == source else v for k, v in renamed.items()}
            renamed[source] = result
            made.add(result)
            fixed.add(source)
            gone.add(id(node))
    if not gone:
        return model
    nodes = []
    for node in source_nodes:
        if id(node) in gone:
            continue
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        for names in (copy.input, copy.output):
            for position, name in enumerate(names):
                names[position] = renamed.get(name, name)
        nodes.append(copy)
    return rebuilt(model, nodes, dropped=set(renamed) - outputs, maybe=())


def _hands_on(node: onnx.NodeProto, opset: int, falses: Collection[str]) -> bool:
    """Whether a node gives what it gets as its first output."""
    if node.domain not in _STANDARD or not node.input or not node.output:
        return False
    if node.op_type == "Identity":
        return True
    if node.op_type != "Dropout":
        return False
    if opset < 7:
        return any(a.name == "is_test" and a.i for a in node.attribute)
    training = node.input[2] if len(node.input) > 2 else ""
    return not training or training in falses


# -- constants that are there twice ----------------------------------------------------------------


def _without_copies(model: Model, keep: frozenset[str]) -> Model:
    """Equal initializers as one. Weights of layers stay apart: shared, they would be cut as one."""
    graph = model.proto.graph
    kept = keep | {value.name for value in (*graph.input, *graph.output)}
    kept |= {name for node in graph.node for name in captured_names(node)}
    kept |= {n.input[1] for n in graph.node if n.op_type in _WEIGHTED and len(n.input) > 1}
    kept |= {n.input[0] for n in graph.node if n.op_type in _WEIGHTED and n.input}
    weights = model.weights()
    first: dict[tuple[int, tuple[int, ...], bytes], str] = {}
    same: dict[str, str] = {}
    for tensor in graph.initializer:
        weight = weights[tensor.name]
        if tensor.name in kept or weight.dtype.kind in "OUS":
            continue
        digest = sha256(weight.payload()).digest()
        known = first.setdefault((weight.data_type, weight.shape, digest), tensor.name)
        if known != tensor.name:
            same[tensor.name] = known
    if not same:
        return model
    nodes = []
    for node in graph.node:
        copy = node
        if any(name in same for name in node.input):
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            for position, name in enumerate(copy.input):
                copy.input[position] = same.get(name, name)
        nodes.append(copy)
    return replace(rebuilt(model, nodes, maybe=tuple(same)), file_bytes=0)
