"""A model in memory: the message, and lazy handles on its weights.

Weights are the bulk of a model, so nothing here copies them as a whole: they are handles until
somebody reads one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnxprune.errors import InvariantError, ModelError
from onnxprune.messages import bits, external_reference, is_constant, is_external, stored_bytes
from onnxprune.types import AnyArray, Shape


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
            if is_external(tensor)
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
        return stored_bytes(self.data_type, self.shape)

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
        if bits(self.data_type) % 8:
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
            if is_constant(node):
                weight = _constant_weight(node, self.directory)
                if weight is not None:
                    found[weight.name] = weight
        return found | dict(self.deferred)


def _decode(tensor: onnx.TensorProto) -> AnyArray:
    if bits(tensor.data_type) % 8 == 0:
        raw = tensor.raw_data  # protobuf copies here, so once only
        if raw:
            dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
            return np.frombuffer(raw, dtype).reshape(tuple(tensor.dims))
    return numpy_helper.to_array(tensor)


def _map_external(tensor: onnx.TensorProto, directory: Path | None) -> AnyArray:
    reference = external_reference(tensor)
    if directory is None:
        raise ModelError(
            f"tensor '{tensor.name}' is in the external file '{reference.location}', but the model "
            "came from memory",
            hint="load the model by its path",
        )
    shape = tuple(tensor.dims)
    nbytes = stored_bytes(tensor.data_type, shape)
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
    if bits(tensor.data_type) % 8 == 0:
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
