"""Read and write models: lazy weights, external data, files over 2 GiB, atomic saves.

A model on disk is one protobuf message with its weights inside, or beside it in external data
files. Weights are the bulk, so nothing here copies them as a whole: they are handles until somebody
reads one, and a save streams them one at a time through a small protobuf writer of our own (nested
messages whose lengths are known beforehand), which needs no copy of the message either.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import secrets
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, Protocol, TypeVar

import numpy as np
import onnx
from google.protobuf.message import DecodeError, Message
from onnx import helper, numpy_helper

from onnxprune import validate
from onnxprune.errors import InvariantError, ModelError, UsageError
from onnxprune.types import AnyArray, Shape

LARGE = 1024  # bytes; what is larger goes to external data, and is left out of a skeleton
INLINE_LIMIT = 2**31 - 2**20  # protobuf refuses messages of 2 GiB; the margin is for parsers' own
_ALIGNMENT = 4096  # of external tensors, so that they can be memory-mapped
_RAW_DATA = 9  # field number of TensorProto.raw_data
_M = TypeVar("_M", bound=Message)


@dataclass(frozen=True, slots=True, eq=False)
class Weight:
    """Lazy handle on one constant tensor.

    Attributes:
        name: Initializer, or output of the Constant node.
        shape: Its dimensions.
        data_type: Element type, a value of ``onnx.TensorProto.DataType``.
    """

    name: str
    shape: Shape
    data_type: int
    _read: Callable[[], AnyArray] = field(repr=False)

    @classmethod
    def lazily(
        cls, name: str, shape: Iterable[int], data_type: int, read: Callable[[], AnyArray]
    ) -> Weight:
        """A weight whose values ``read`` computes whenever they are asked for."""
        return cls(name, tuple(int(size) for size in shape), data_type, read)

    @classmethod
    def from_array(cls, name: str, array: AnyArray) -> Weight:
        """A weight that holds ``array`` itself, not a copy."""
        return cls(
            name, array.shape, int(helper.np_dtype_to_tensor_dtype(array.dtype)), lambda: array
        )

    @classmethod
    def from_tensor(
        cls, tensor: onnx.TensorProto, directory: Path | None, *, name: str = ""
    ) -> Weight:
        """A handle on ``tensor``, whose external data lies under ``directory``."""
        read = (
            (lambda: _map_external(tensor, directory))
            if validate.is_external(tensor)
            else (lambda: _decode(tensor))
        )
        return cls(name or tensor.name, tuple(tensor.dims), tensor.data_type, read)

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """NumPy's element type; ``ml_dtypes`` has bfloat16 and those of less than 16 bits."""
        return helper.tensor_dtype_to_np_dtype(self.data_type)

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        """Bytes as ONNX stores them (two 4-bit elements share a byte)."""
        return validate.stored_bytes(self.data_type, self.shape)

    def read(self) -> AnyArray:
        """The values: a read-only array of ``shape``, decoded anew by each call.

        Raises:
            InvariantError: What was computed does not have the declared shape or element type.
        """
        array = self._read()
        if array.shape != self.shape or array.dtype != self.dtype:
            raise InvariantError(
                f"weight '{self.name}' should be {self.dtype}{list(self.shape)}, "
                f"not {array.dtype}{list(array.shape)}"
            )
        view = array.view()
        view.flags.writeable = False
        return view

    def to_proto(self) -> onnx.TensorProto:
        """The weight as a message of its own, values in ``raw_data``."""
        return numpy_helper.from_array(self.read(), self.name)

    def payload(self) -> bytes | memoryview:
        """The bytes of ``raw_data`` or of an external file; no copy where memory has them so."""
        if validate.bits(self.data_type) % 8:
            return self.to_proto().raw_data
        flat = np.ascontiguousarray(self.read()).reshape(-1)
        return flat.view(np.uint8).data


@dataclass(frozen=True, eq=False)
class Model:
    """A model and where its weights are. Treat ``proto`` as frozen: stages share it.

    Attributes:
        proto: The model; external tensors are references, and deferred ones have no data.
        directory: Folder in which external data is looked up.
        deferred: Values that are computed when they are needed, by name of a top-level initializer
            or by output of a top-level Constant node with a ``value``, whose tensor in ``proto``
            has the right ``dims`` and ``data_type`` but no data.
        path: The file the model came from.
        file_bytes: Size of the file and its external data, 0 if the model came from memory.
        sources: The file and its external data files, which ``save`` never overwrites.
    """

    proto: onnx.ModelProto = field(repr=False)
    directory: Path | None = None
    deferred: Mapping[str, Weight] = field(default_factory=dict, repr=False)
    path: Path | None = None
    file_bytes: int = 0
    sources: tuple[Path, ...] = ()

    def weights(self) -> Mapping[str, Weight]:
        """Every top-level constant by name, in file order: initializers, then Constant nodes.

        A sparse tensor is seen as the dense one it stands for. The mapping is built anew by each
        call; the values behind it are not touched.
        """
        found: dict[str, Weight] = {}
        for tensor in self.proto.graph.initializer:
            found[tensor.name] = Weight.from_tensor(tensor, self.directory)
        for sparse in self.proto.graph.sparse_initializer:
            found[sparse.values.name] = _sparse_weight(sparse.values.name, sparse, self.directory)
        for node in self.proto.graph.node:
            if validate.is_constant(node):
                weight = _constant_weight(node, self.directory)
                if weight is not None:
                    found[weight.name] = weight
        return found | dict(self.deferred)


def load(path: str | Path) -> Model:
    """Read and check a model. External data is memory-mapped when it is used, never read whole.

    Raises:
        ModelError: The file is no ONNX model, or an invalid one; the message says what to do.
    """
    path = Path(path)
    validate.check_file(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(f"cannot read '{path}': {error.strerror}") from error
    proto = _parse(data, str(path))
    del data  # twice the model's size until here
    try:
        _check(Model(proto, path.parent, path=path))
    except ModelError as error:
        raise ModelError(f"'{path}': {error.message}", hint=error.hint, node=error.node) from error
    sources = (path, *validate.external_files(proto, path.parent))
    size = sum(file.stat().st_size for file in sources)
    return Model(proto, path.parent, path=path, file_bytes=size, sources=sources)


def as_model(model: Model | onnx.ModelProto | bytes | str | Path) -> Model:
    """A checked ``Model`` of whatever the caller has; a ``ModelProto`` is shared, not copied."""
    match model:
        case Model():
            return model
        case str() | Path():
            return load(model)
        case bytes():
            made = Model(_parse(model, "the given bytes"))
        case _:
            made = Model(model)
    _check(made)
    return made


def skeleton(model: Model) -> onnx.ModelProto:
    """A copy without the large payloads, for the checker and for shape inference.

    Every constant over 1 KiB, deferred or sparse is left out and declared as a graph input of its
    type and shape instead. In subgraphs that is done where the name is unique, so that the body
    simply captures it.
    """
    return _Skeleton(model).build()


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


class Sink(Protocol):
    """What bytes can be written to."""

    def write(self, data: bytes | memoryview, /) -> int:
        """Take them; how many."""


def write_to(model: Model, out: Sink) -> int:
    """Write the whole model inline, weight by weight; the bytes written."""
    return _write_parts(out, _Writer(model).parts())


@contextlib.contextmanager
def runnable(model: Model) -> Iterator[bytes | str]:
    """What an ``InferenceSession`` takes: bytes, or over 2 GiB the path of a temporary file."""
    if _length(_Writer(model).parts()) < INLINE_LIMIT:
        yield serialize(model)
        return
    with tempfile.TemporaryDirectory(prefix="onnxprune-") as folder:
        path = Path(folder, "model.onnx")
        _write_files(_model_jobs(model, path, path.with_name(path.name + ".data")))
        yield str(path)


def save(model: Model, path: str | Path, *, force: bool = False) -> int:
    """Write the model atomically: all of it, or nothing and no leftovers.

    Weights stay inside the file where the original had them there and 2 GiB allow it; otherwise
    those over 1 KiB go to ``<path>.data`` beside it, page-aligned, and the model is written last.

    Returns:
        Bytes written.

    Raises:
        UsageError: The output is the input, exists and ``force`` is not given, or cannot be
            written.
    """
    return sum(save_with(model, path, {}, force=force).values())


def save_with(
    model: Model,
    path: str | Path,
    texts: Mapping[Path, str],
    *,
    force: bool = False,
    check: Callable[[Model], None] | None = None,
) -> Mapping[Path, int]:
    """``save``, together with text files: all of them or none.

    Args:
        model: What to write.
        path: Where to.
        texts: More files, by path; whether they may be overwritten is for the caller to check.
        force: Overwrite the model's files.
        check: Called with the model as the written files give it, before they are put in place;
            what it raises leaves no file.

    Returns:
        Bytes of each file that was written; the model itself comes last.

    Raises:
        UsageError: As in ``save``.
    """
    path = Path(path)
    inline = len(model.sources) <= 1 and not validate.external_files(model.proto, model.directory)
    inline = inline and _length(_Writer(model).parts()) < INLINE_LIMIT
    data_path = None if inline else path.with_name(path.name + ".data")
    for target in (path, data_path):
        if target is not None:
            with _named(target):
                _check_output(model, target, force)
    beside = {target: _text_job(text) for target, text in texts.items()}

    def written(temporary: Mapping[Path, Path]) -> None:
        if check is not None:
            moved = {} if data_path is None else {data_path.name: temporary[data_path].name}
            check(_reread(temporary[path], moved))

    return _write_files(beside | _model_jobs(model, path, data_path), written)


def write_texts(texts: Mapping[Path, str]) -> Mapping[Path, int]:
    """Write text files in UTF-8, all of them or none; bytes of each.

    Raises:
        UsageError: One cannot be written.
    """
    return _write_files({target: _text_job(text) for target, text in texts.items()})


# -- reading ---------------------------------------------------------------------------------------


def _parse(data: bytes, source: str) -> onnx.ModelProto:
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except DecodeError:
        raise validate.not_a_model(data, source) from None
    if not proto.HasField("graph"):
        raise validate.not_a_model(data, source)
    return proto


def _check(model: Model) -> None:
    validate.check_structure(model.proto)
    validate.check_data(model.proto, model.directory, model.path)
    validate.check_meaning(skeleton(model))


def _decode(tensor: onnx.TensorProto) -> AnyArray:
    if validate.bits(tensor.data_type) % 8 == 0:
        raw = tensor.raw_data  # protobuf copies here, so once only
        if raw:
            dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
            return np.frombuffer(raw, dtype).reshape(tuple(tensor.dims))
    return numpy_helper.to_array(tensor)


def _map_external(tensor: onnx.TensorProto, directory: Path | None) -> AnyArray:
    reference = validate.external_reference(tensor)
    if directory is None:
        raise ModelError(
            f"tensor '{tensor.name}' is in the external file '{reference.location}', but the model "
            "came from memory",
            hint="load the model by its path",
        )
    shape = tuple(tensor.dims)
    nbytes = validate.stored_bytes(tensor.data_type, shape)
    if nbytes == 0:
        return np.empty(shape, helper.tensor_dtype_to_np_dtype(tensor.data_type))
    try:
        raw = np.memmap(
            directory / reference.location, np.uint8, "r", offset=reference.offset, shape=(nbytes,)
        )
    except (OSError, ValueError) as error:
        raise ModelError(
            f"cannot read tensor '{tensor.name}' from '{directory / reference.location}': {error}"
        ) from error
    if validate.bits(tensor.data_type) % 8 == 0:
        return raw.view(helper.tensor_dtype_to_np_dtype(tensor.data_type)).reshape(shape)
    packed = onnx.TensorProto(data_type=tensor.data_type, dims=shape, raw_data=raw.tobytes())
    return numpy_helper.to_array(packed)


def _sparse_weight(name: str, sparse: onnx.SparseTensorProto, directory: Path | None) -> Weight:
    shape = tuple(sparse.dims)

    def densify() -> AnyArray:
        values = Weight.from_tensor(sparse.values, directory).read()
        indices = Weight.from_tensor(sparse.indices, directory).read().astype(np.int64)
        dense = np.zeros(shape, values.dtype)
        # linear indices (nnz,) or coordinates (nnz, rank)
        dense[np.unravel_index(indices, shape) if indices.ndim == 1 else tuple(indices.T)] = values
        return dense

    return Weight.lazily(name, shape, sparse.values.data_type, densify)


def _constant_weight(node: onnx.NodeProto, directory: Path | None) -> Weight | None:
    name = node.output[0]
    for attribute in node.attribute:
        match attribute.name:
            case "value":
                return Weight.from_tensor(attribute.t, directory, name=name)
            case "sparse_value":
                return _sparse_weight(name, attribute.sparse_tensor, directory)
            case "value_float":
                return Weight.from_array(name, np.array(attribute.f, np.float32))
            case "value_floats":
                return Weight.from_array(name, np.array(attribute.floats, np.float32))
            case "value_int":
                return Weight.from_array(name, np.array(attribute.i, np.int64))
            case "value_ints":
                return Weight.from_array(name, np.array(attribute.ints, np.int64))
    return None


# -- skeleton --------------------------------------------------------------------------------------


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
                data = _varint(len(value)) + value
                copy.MergeFromString(_varint(descriptor.number << 3 | 2) + data)
            else:
                setattr(copy, name, value)
    return copy


class _Skeleton:
    """Builds the skeleton of one model."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._inputs: dict[str, onnx.ValueInfoProto] = {}

    def build(self) -> onnx.ModelProto:
        proto = self._model.proto
        bones = without(proto, ("graph", "training_info"))
        self._copy_graph(proto.graph, bones.graph, top=True)
        declared = {value.name: value for value in bones.graph.input}
        for name, value in self._inputs.items():
            if name in declared:
                declared[name].CopyFrom(value)
            else:
                bones.graph.input.append(value)
        for tensor, _ in validate.tensors(bones):  # those whose name did not allow it
            if validate.is_external(tensor):
                inline = Weight.from_tensor(tensor, self._model.directory).to_proto()
                tensor.CopyFrom(inline)
        return bones

    def _copy_graph(
        self, graph: onnx.GraphProto, bones: onnx.GraphProto, *, top: bool = False
    ) -> None:
        bones.MergeFrom(without(graph, ("node", "initializer", "sparse_initializer")))
        for tensor in graph.initializer:
            if not self._leave_out(tensor.name, tensor, top=top):
                bones.initializer.append(tensor)
        for sparse in graph.sparse_initializer:
            name, values = sparse.values.name, sparse.values
            if not self._leave_out(name, values, dense=sparse.dims, top=top):
                bones.sparse_initializer.append(sparse)
        for node in graph.node:
            if not any(map(validate.is_heavy, node.attribute)):
                bones.node.append(node)
            elif not (validate.is_constant(node) and self._leave_out_constant(node, top=top)):
                self._copy_node(node, bones.node.add())

    def _copy_node(self, node: onnx.NodeProto, bones: onnx.NodeProto) -> None:
        bones.MergeFrom(without(node, ("attribute",)))
        for attribute in node.attribute:
            if not (attribute.HasField("g") or attribute.graphs):
                bones.attribute.append(attribute)
                continue
            made = bones.attribute.add()
            made.MergeFrom(without(attribute, ("g", "graphs")))
            if attribute.HasField("g"):
                self._copy_graph(attribute.g, made.g)
            for body in attribute.graphs:
                self._copy_graph(body, made.graphs.add())

    def _leave_out_constant(self, node: onnx.NodeProto, *, top: bool) -> bool:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                return self._leave_out(node.output[0], attribute.t, top=top)
            if attribute.HasField("sparse_tensor"):
                sparse = attribute.sparse_tensor
                return self._leave_out(node.output[0], sparse.values, dense=sparse.dims, top=top)
        return False

    def _leave_out(
        self,
        name: str,
        tensor: onnx.TensorProto,
        *,
        top: bool,
        dense: Iterable[int] | None = None,
    ) -> bool:
        """Declare the tensor as an input if it is large; whether that was done."""
        small = (
            validate.stored_bytes(tensor.data_type, tensor.dims) <= LARGE
            and not validate.is_external(tensor)
            and dense is None
            and not (top and name in self._model.deferred)
        )
        if small or not (top or self._definitions[name] == 1):
            return False
        dims = tuple(tensor.dims if dense is None else dense)
        self._inputs[name] = helper.make_tensor_value_info(name, tensor.data_type, dims)
        return True

    @cached_property
    def _definitions(self) -> Counter[str]:
        """How often each name is defined in all graphs together."""
        count: Counter[str] = Counter()
        for graph in validate.graphs(self._model.proto):
            count.update(value.name for value in graph.input)
            count.update(tensor.name for tensor in graph.initializer)
            count.update(sparse.values.name for sparse in graph.sparse_initializer)
            count.update(name for node in graph.node for name in node.output)
        return count


# -- writing ---------------------------------------------------------------------------------------


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


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _nested(number: int, parts: list[_Part]) -> list[_Part]:
    """Field ``number`` of wire type 2 (length-delimited) with the content ``parts``."""
    return [_ready(_varint(number << 3 | 2) + _varint(_length(parts))), *parts]


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
            case onnx.NodeProto() if not any(map(validate.is_heavy, child.attribute)):
                return [_ready(_serialize(child))]
            case onnx.NodeProto() if top and validate.is_constant(child):
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
            typed = not (tensor.HasField("raw_data") or validate.is_external(tensor))
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


_Job = Callable[[IO[bytes]], int]  # writes one file, and gives the bytes written


def _model_jobs(model: Model, path: Path, data_path: Path | None) -> dict[Path, _Job]:
    """Data first, as the model refers to it."""
    writer = _Writer(model, data_path.name if data_path else None)
    parts = writer.parts()
    jobs: dict[Path, _Job] = {}
    if data_path is not None:
        jobs[data_path] = lambda out: _write_data(out, writer.placed)
    jobs[path] = lambda out: _write_parts(out, parts)
    return jobs


def _text_job(text: str) -> _Job:
    return lambda out: out.write(text.encode())


def _reread(path: Path, moved: Mapping[str, str]) -> Model:
    """A model just written, whose external data lies where ``moved`` says as yet."""
    proto = _parse(path.read_bytes(), str(path))
    for tensor, _ in validate.tensors(proto):
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = moved.get(entry.value, entry.value)
    return Model(proto, path.parent)


def _write_files(
    jobs: Mapping[Path, _Job], check: Callable[[Mapping[Path, Path]], None] | None = None
) -> Mapping[Path, int]:
    """Write beside the targets, then move all into place, in the order given.

    Whatever goes wrong, an interruption too, leaves neither temporary files nor some of the
    targets. ``check`` sees where each lies before it is moved, and may raise.
    """
    temporary = {
        target: target.with_name(f".onnxprune-{secrets.token_hex(8)}.tmp") for target in jobs
    }
    for target in jobs:
        # Moving a file over a device or a pipe would replace it for the whole machine.
        if target.exists() and not target.is_file():
            raise UsageError(f"'{target}' is not a regular file", hint="choose another output")
    written: dict[Path, int] = {}
    moving = done = False
    try:
        for target, job in jobs.items():
            with _named(target), temporary[target].open("xb") as out:
                written[target] = job(out)
                out.flush()
                os.fsync(out.fileno())
        if check is not None:
            check(temporary)
        moving = True
        for target in jobs:
            with _named(target):
                temporary[target].replace(target)
        done = True
    finally:
        for target in () if done else jobs:
            # Once files move, a temporary file that is gone has become its target.
            moved = moving and not temporary[target].exists()
            (target if moved else temporary[target]).unlink(missing_ok=True)
    for folder in {target.parent for target in jobs}:
        _sync_folder(folder)
    return written


@contextlib.contextmanager
def _named(target: Path) -> Iterator[None]:
    """Say which file an error of the system is about."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise UsageError(
                f"disk full while writing '{target}'", hint="nothing was kept; free some space"
            ) from error
        raise UsageError(f"cannot write '{target}': {error.strerror or error}") from error


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable, on systems where a folder can be opened."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _check_output(model: Model, target: Path, force: bool) -> None:
    if not target.parent.is_dir():
        raise UsageError(f"folder '{target.parent}' does not exist", hint="create it first")
    if target.is_dir():
        raise UsageError(f"'{target}' is a directory", hint="give the output a file name")
    sources = {*model.sources, *validate.external_files(model.proto, model.directory)}
    if model.path is not None:
        sources.add(model.path)
    real = target.resolve()
    for source in sources:
        if source.resolve() == real or (
            target.exists() and source.exists() and target.samefile(source)
        ):
            raise UsageError(
                f"'{target}' is the input itself, which is never overwritten",
                hint="choose another output",
            )
    if target.exists() and not target.is_file():
        raise UsageError(f"'{target}' is not a regular file", hint="choose another output")
    if os.path.lexists(target) and not force:
        raise UsageError(
            f"'{target}' exists", hint="give --force to overwrite it, in Python force=True"
        )
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise UsageError(f"folder '{target.parent}' is not writable", hint="choose another output")
