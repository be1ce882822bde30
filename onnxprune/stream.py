"""Write a model as protobuf, weight by weight.

The bulk is streamed through a small writer of our own (nested messages whose lengths are known
beforehand), which needs no copy of the weights, and none of the message either.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

import onnx
from google.protobuf.message import Message

from onnxprune.errors import InvariantError, UsageError
from onnxprune.files import Job
from onnxprune.messages import is_constant, is_external, is_heavy, varint, without
from onnxprune.model import Model, Weight
from onnxprune.skeleton import LARGE

INLINE_LIMIT = 2**31 - 2**20  # protobuf refuses messages of 2 GiB; the margin is for parsers' own
_ALIGNMENT = 4096  # of external tensors, so that they can be memory-mapped
_RAW_DATA = 9  # field number of TensorProto.raw_data


class Sink(Protocol):
    """What bytes can be written to."""

    def write(self, data: bytes | memoryview, /) -> int:
        """Take them; how many."""


@dataclass(frozen=True, slots=True)
class _Part:
    """A run of output bytes whose length is known before they are made."""

    length: int
    make: Callable[[], bytes | memoryview]


def _length(parts: Iterable[_Part]) -> int:
    return sum(part.length for part in parts)


def _ready(data: bytes) -> _Part:
    return _Part(len(data), lambda: data)


def _serialize(message: Message) -> bytes:
    data: bytes = message.SerializeToString(deterministic=True)
    return data


def _nested(number: int, parts: list[_Part]) -> list[_Part]:
    """Field ``number`` of wire type 2 (length-delimited) with the content ``parts``."""
    return [_ready(varint(number << 3 | 2) + varint(_length(parts))), *parts]


def _write_parts(out: Sink, parts: Iterable[_Part]) -> int:
    written = 0
    for part in parts:
        data = part.make()
        if len(data) != part.length:
            raise InvariantError(f"a part of {part.length} bytes came out as {len(data)}")
        written += out.write(data)
    return written


# Fields through which tensors are reached, by message; everything else is written as it is.
_WAY_DOWN: dict[str, tuple[str, ...]] = {
    "ModelProto": ("graph", "functions", "training_info"),
    "GraphProto": ("node", "initializer", "sparse_initializer"),
    "FunctionProto": ("node",),
    "TrainingInfoProto": ("initialization", "algorithm"),
    "NodeProto": ("attribute",),
    "AttributeProto": ("t", "g", "tensors", "graphs", "sparse_tensor", "sparse_tensors"),
    "SparseTensorProto": ("values", "indices"),
}
_DATA_FIELDS = (
    "raw_data",
    "float_data",
    "int32_data",
    "int64_data",
    "uint64_data",
    "double_data",
    "string_data",
    "external_data",
    "data_location",
)


class _Writer:
    """Turns a model into parts, with its large tensors inside or in one external data file.

    Attributes:
        placed: Offset in the data file and weight, in the order of writing; filled by ``parts``.
    """

    def __init__(self, model: Model, location: str | None = None) -> None:
        self._model = model
        self._location = location
        self._end = 0
        self.placed: list[tuple[int, Weight]] = []

    def parts(self) -> list[_Part]:
        """The model as output parts, lengths known, payloads made when they are written."""
        return self._message(self._model.proto)

    def _message(self, message: Message) -> list[_Part]:
        """``message`` with every tensor under it; what has no tensors comes first, in one part."""
        kind = message.DESCRIPTOR.name
        way_down = _WAY_DOWN[kind]
        parts = [_ready(_serialize(without(message, way_down)))]
        for name in way_down:
            number = message.DESCRIPTOR.fields_by_name[name].number
            value = getattr(message, name)
            children = (value,) if isinstance(value, Message) else value
            if isinstance(value, Message) and not message.HasField(name):
                continue
            for child in children:
                parts += _nested(number, self._child(child, message))
        return parts

    def _child(self, child: Message, parent: Message) -> list[_Part]:
        top = parent is self._model.proto.graph
        match child:
            case onnx.TensorProto():
                return self._tensor(child, self._model.deferred.get(child.name) if top else None)
            case onnx.NodeProto() if not any(map(is_heavy, child.attribute)):
                return [_ready(_serialize(child))]
            case onnx.NodeProto() if top and is_constant(child):
                return self._constant(child, self._model.deferred.get(child.output[0]))
        return self._message(child)

    def _constant(self, node: onnx.NodeProto, weight: Weight | None) -> list[_Part]:
        if weight is None:
            return self._message(node)
        parts = [_ready(_serialize(without(node, ("attribute",))))]
        for attribute in node.attribute:  # just `value`
            tensor = _nested(5, self._tensor(attribute.t, weight))
            rest = _ready(_serialize(without(attribute, ("t",))))
            parts += _nested(5, [rest, *tensor])
        return parts

    def _tensor(self, tensor: onnx.TensorProto, weight: Weight | None) -> list[_Part]:
        if weight is None:
            weight = Weight.from_tensor(tensor, self._model.directory)
            small = weight.nbytes <= LARGE or self._location is None
            typed = not (tensor.HasField("raw_data") or is_external(tensor))
            if weight.data_type == onnx.TensorProto.STRING or (typed and small):
                return [_ready(_serialize(tensor))]
        elif weight.shape != tuple(tensor.dims) or weight.data_type != tensor.data_type:
            raise InvariantError(
                f"deferred weight '{weight.name}' is {weight.dtype}{list(weight.shape)}, but the "
                f"model declares type {tensor.data_type}, {list(tensor.dims)}"
            )
        header = without(tensor, _DATA_FIELDS)
        if weight.data_type == onnx.TensorProto.STRING:
            header.string_data.extend(weight.to_proto().string_data)
            return [_ready(_serialize(header))]
        if self._location is not None and weight.nbytes > LARGE:
            self._place(header, weight)
            return [_ready(_serialize(header))]
        data = _nested(_RAW_DATA, [_Part(weight.nbytes, weight.payload)])
        return [_ready(_serialize(header)), *data]

    def _place(self, header: onnx.TensorProto, weight: Weight) -> None:
        offset = -(-self._end // _ALIGNMENT) * _ALIGNMENT
        self._end = offset + weight.nbytes
        self.placed.append((offset, weight))
        header.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (
            ("location", str(self._location)),
            ("offset", str(offset)),
            ("length", str(weight.nbytes)),
        ):
            header.external_data.add(key=key, value=value)


def _write_data(out: IO[bytes], placed: Iterable[tuple[int, Weight]]) -> int:
    end = 0
    for offset, weight in placed:
        out.write(bytes(offset - end))
        end = offset + out.write(weight.payload())
    return end


def serialize(model: Model) -> bytes:
    """The whole model inline, as ONNX Runtime takes it.

    Raises:
        UsageError: It would reach protobuf's limit of 2 GiB; use ``runnable``.
    """
    parts = _Writer(model).parts()
    if _length(parts) >= INLINE_LIMIT:
        raise UsageError("the model does not fit into one protobuf message of 2 GiB")
    out = io.BytesIO()
    _write_parts(out, parts)
    return out.getvalue()


def write_to(model: Model, out: Sink) -> int:
    """Write the whole model inline, weight by weight; the bytes written."""
    return _write_parts(out, _Writer(model).parts())


def fits_inline(model: Model) -> bool:
    """Whether the whole model goes into one message of protobuf's, 2 GiB."""
    return _length(_Writer(model).parts()) < INLINE_LIMIT


def model_jobs(model: Model, path: Path, data_path: Path | None) -> dict[Path, Job]:
    """What writes the model's files: data first, as the model refers to it.

    Without ``data_path`` everything goes into ``path``.
    """
    writer = _Writer(model, data_path.name if data_path else None)
    parts = writer.parts()
    jobs: dict[Path, Job] = {}
    if data_path is not None:
        jobs[data_path] = lambda out: _write_data(out, writer.placed)
    jobs[path] = lambda out: _write_parts(out, parts)
    return jobs
