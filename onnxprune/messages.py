"""What ONNX's protobuf messages hold: tensors, graphs, attributes, external data.

Nothing here reads a weight's values.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import onnx
from google.protobuf.message import Message
from onnx import AttributeProto, TensorProto, helper

from onnxprune.errors import ModelError

_M = TypeVar("_M", bound=Message)

_PACKED_BITS = {"UINT4": 4, "INT4": 4, "FLOAT4E2M1": 4, "UINT2": 2, "INT2": 2}
_PACKED_BITS |= {"FLOAT6E2M3": 6, "FLOAT6E3M2": 6}
_BITS: dict[int, int] = {
    value: _PACKED_BITS.get(name) or helper.tensor_dtype_to_np_dtype(value).itemsize * 8
    for name, value in TensorProto.DataType.items()
    if name != "UNDEFINED"
}
_HEAVY = frozenset(
    {
        AttributeProto.UNDEFINED,  # old writers leave the type out
        AttributeProto.TENSOR,
        AttributeProto.GRAPH,
        AttributeProto.SPARSE_TENSOR,
        AttributeProto.TENSORS,
        AttributeProto.GRAPHS,
        AttributeProto.SPARSE_TENSORS,
    }
)


@dataclass(frozen=True, slots=True)
class ExternalReference:
    """Where an external tensor's bytes are; ``length`` is None where the model does not say."""

    location: str
    offset: int
    length: int | None


def is_known(data_type: int) -> bool:
    """Whether this version of onnx knows the element type."""
    return data_type in _BITS


def bits(data_type: int) -> int:
    """Bits that ONNX spends on one element of ``TensorProto.DataType`` ``data_type``."""
    return _BITS[data_type]


def stored_bytes(data_type: int, dims: Iterable[int]) -> int:
    """Bytes of a tensor in ``raw_data`` or an external file; elements under 8 bits share bytes."""
    return -(-math.prod(dims) * _BITS[data_type] // 8)


def is_external(tensor: TensorProto) -> bool:
    """Whether the tensor's bytes are in a file of their own."""
    return tensor.data_location == TensorProto.EXTERNAL


def external_reference(tensor: TensorProto) -> ExternalReference:
    """Decode ``tensor.external_data``.

    Raises:
        ModelError: No location, or an offset or length that is no number.
    """
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    if not location:
        raise ModelError(
            f"tensor '{tensor.name}' is external but names no file", hint="export the model again"
        )
    numbers: dict[str, int | None] = {}
    for key in ("offset", "length"):
        text = entries.get(key, "")
        if text and not (text.isascii() and text.isdigit()):
            raise ModelError(
                f"tensor '{tensor.name}' in '{location}': bad {key} '{text}'",
                hint="export the model again",
            )
        numbers[key] = int(text) if text else None
    return ExternalReference(location, numbers["offset"] or 0, numbers["length"])


def is_heavy(attribute: AttributeProto) -> bool:
    """Whether there are tensors or graphs in the attribute."""
    return attribute.type in _HEAVY


def is_constant(node: onnx.NodeProto) -> bool:
    """Whether the node is a standard Constant."""
    return node.op_type == "Constant" and node.domain in ("", "ai.onnx")


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The bodies of an If, Loop, Scan or the like."""
    for attribute in node.attribute:
        if attribute.type in _HEAVY:
            if attribute.HasField("g"):
                yield attribute.g
            yield from attribute.graphs


def graphs(proto: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    """The graph and every subgraph under it."""
    pending = [proto.graph]
    while pending:
        graph = pending.pop()
        yield graph
        for node in graph.node:
            if node.attribute:
                pending.extend(subgraphs(node))


def tensors(proto: onnx.ModelProto) -> Iterator[tuple[TensorProto, str]]:
    """Every tensor of every graph and function, with a name for messages."""
    for graph in graphs(proto):
        for tensor in graph.initializer:
            yield tensor, f"initializer '{tensor.name}'"
        for sparse in graph.sparse_initializer:
            yield sparse.values, f"values of sparse initializer '{sparse.values.name}'"
            yield sparse.indices, f"indices of sparse initializer '{sparse.values.name}'"
        yield from _attribute_tensors(graph.node)
    for function in proto.functions:
        yield from _attribute_tensors(function.node)


def _attribute_tensors(nodes: Iterable[onnx.NodeProto]) -> Iterator[tuple[TensorProto, str]]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.type not in _HEAVY:
                continue
            found = [*attribute.tensors]
            if attribute.HasField("t"):
                found.append(attribute.t)
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                if sparse.HasField("values"):
                    found += [sparse.values, sparse.indices]
            for tensor in found:
                yield tensor, f"'{attribute.name}' of {label(node)}"


def external_files(proto: onnx.ModelProto, directory: Path | None) -> tuple[Path, ...]:
    """The external data files that the model refers to, in order of first use."""
    if directory is None:
        return ()
    files = {
        directory / external_reference(tensor).location: None
        for tensor, _ in tensors(proto)
        if is_external(tensor)
    }
    return tuple(files)


def label(node: onnx.NodeProto) -> str:
    """The node as messages name it."""
    name = node.name or next(filter(None, node.output), "")
    return f"{node.op_type} '{name}'" if name else f"unnamed {node.op_type}"


def without(message: _M, names: Collection[str]) -> _M:
    """A copy of ``message`` without the fields ``names``, which are not even touched."""
    copy: _M = type(message)()
    for descriptor in message.DESCRIPTOR.fields:
        name = descriptor.name
        if name in names:
            continue
        value = getattr(message, name)
        if not isinstance(value, Message) and hasattr(value, "MergeFrom"):  # repeated
            getattr(copy, name).MergeFrom(value)
        elif message.HasField(name):
            if isinstance(value, Message):
                getattr(copy, name).CopyFrom(value)
            elif isinstance(value, bytes):  # also a doc string that is no UTF-8
                data = varint(len(value)) + value
                copy.MergeFromString(varint(descriptor.number << 3 | 2) + data)
            else:
                setattr(copy, name, value)
    return copy


def varint(value: int) -> bytes:
    """A number as protobuf writes it, seven bits a byte."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
