"""Whether a file is a model at all, and whether its tensors have their data.

``onnx.load`` and ONNX Runtime put what they refuse in words for their own developers; here each
fault is said in one line. Nothing here reads a weight's values.
"""

from __future__ import annotations

import math
import stat
from collections.abc import Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath

import onnx
from onnx import TensorProto

from onnxprune.errors import ModelError
from onnxprune.messages import (
    ExternalReference,
    bits,
    external_reference,
    is_external,
    is_known,
    stored_bytes,
    tensors,
)

_TYPED_FIELD: dict[int, str] = {
    TensorProto.FLOAT: "float_data",
    TensorProto.COMPLEX64: "float_data",
    TensorProto.DOUBLE: "double_data",
    TensorProto.COMPLEX128: "double_data",
    TensorProto.INT64: "int64_data",
    TensorProto.UINT32: "uint64_data",
    TensorProto.UINT64: "uint64_data",
    TensorProto.STRING: "string_data",
}
_MAGIC: tuple[tuple[bytes, str, str], ...] = (
    (b"PK\x03\x04", "a zip / PyTorch file", "export it to ONNX first"),
    (b"version https://git-lfs", "a git-lfs pointer, not the model", "run `git lfs pull`"),
    (b"\x89HDF\r\n", "a Keras / HDF5 file", "export it to ONNX first"),
    (b"\x1f\x8b", "a gzip archive", "unpack it first"),
    *(
        (b"\x80" + bytes([version]), "a pickle / PyTorch file", "export it to ONNX first")
        for version in range(2, 6)
    ),
)


def check_file(path: Path) -> None:
    """Refuse a path that is not a readable, non-empty file.

    Raises:
        ModelError: It is missing, a directory, something else, or empty.
    """
    try:
        found = path.stat()
    except FileNotFoundError:
        raise ModelError(f"no such file: '{path}'", hint="check the path") from None
    except OSError as error:
        raise ModelError(f"cannot read '{path}': {error.strerror}") from error
    if stat.S_ISDIR(found.st_mode):
        raise ModelError(f"'{path}' is a directory", hint="name the .onnx file in it")
    if not stat.S_ISREG(found.st_mode):
        raise ModelError(f"'{path}' is not a regular file", hint="name an .onnx file")
    if found.st_size == 0:
        raise ModelError(f"'{path}': the file is empty", hint="export or download it again")
    if found.st_size >= 2**31:
        raise ModelError(
            f"'{path}' has {found.st_size} bytes, and protobuf stops at 2 GiB",
            hint="export the model with external data",
        )


def not_a_model(data: bytes, source: str) -> ModelError:
    """The error for bytes that protobuf cannot read as a model, or that hold no graph."""
    if not data:
        return ModelError(f"'{source}': the file is empty", hint="export or download it again")
    for magic, what, hint in _MAGIC:
        if data.startswith(magic):
            return ModelError(f"'{source}' is not ONNX: it looks like {what}", hint=hint)
    if data[4:8] in (b"TFL3", b"ORTM"):
        what = "a TensorFlow Lite" if data[4:8] == b"TFL3" else "an ORT-format"
        return ModelError(
            f"'{source}' is not ONNX: it looks like {what} file", hint="use the original .onnx"
        )
    if data[8:9] == b"{" and int.from_bytes(data[:8], "little") < len(data):
        return ModelError(
            f"'{source}' is not ONNX: it looks like a safetensors file",
            hint="export the model to ONNX first",
        )
    head = data[:4096]
    text = head.decode("utf-8", "ignore")
    if len(text.encode()) >= len(head) - 3 and all(
        c.isprintable() or c in "\t\r\n\f" for c in text
    ):
        start = text.lstrip("\ufeff \t\r\n").lower()
        if start.startswith(("<!doctype", "<html", "<head", "<?xml")):
            return ModelError(
                f"'{source}' is not an ONNX file (HTML or XML)",
                hint="a download page was saved instead of the file",
            )
        return ModelError(f"'{source}' is not an ONNX file (text)", hint="name a binary .onnx file")
    if data[:1] == b"\x08":  # ir_version, the first field of every model
        return ModelError(
            f"'{source}' is truncated or damaged: protobuf cannot read it",
            hint="export or download it again",
        )
    return ModelError(f"'{source}' is not an ONNX file", hint="export the model to ONNX first")


def check_data(
    proto: onnx.ModelProto,
    directory: Path | None,
    path: Path | None = None,
) -> None:
    """That every tensor has the bytes its type and shape ask for, here or in external files.

    Args:
        proto: The model.
        directory: Where external data is looked up.
        path: The model's file; a symbolic link to it makes its real folder allowed too, as in the
            cache of the Hugging Face hub.

    Raises:
        ModelError: With the tensor, and the bytes needed and found.
    """
    roots = [] if directory is None else [directory.resolve()]
    if path is not None:
        roots.append(path.resolve().parent)
    sizes: dict[str, int] = {}
    for tensor, label in tensors(proto):
        if not is_known(tensor.data_type):
            raise ModelError(
                f"{label} has the unknown element type {tensor.data_type}",
                hint="upgrade onnx, or export the model again",
            )
        if any(size < 0 for size in tensor.dims):
            raise ModelError(
                f"{label} has a negative dimension: {list(tensor.dims)}",
                hint="export the model again",
            )
        if not is_external(tensor):
            _check_inline(tensor, label)
            continue
        reference = external_reference(tensor)
        if reference.location not in sizes:
            sizes[reference.location] = _external_size(reference.location, label, directory, roots)
        _check_external(tensor, label, reference, sizes[reference.location])


def _check_inline(tensor: TensorProto, label: str) -> None:
    elements = math.prod(tensor.dims)
    if tensor.HasField("raw_data"):
        needed, found = stored_bytes(tensor.data_type, tensor.dims), len(tensor.raw_data)
        fits, unit = needed == found, "bytes"
        if tensor.data_type == TensorProto.STRING:
            fits = False
    else:
        name = _TYPED_FIELD.get(tensor.data_type, "int32_data")
        complex_ = tensor.data_type in (TensorProto.COMPLEX64, TensorProto.COMPLEX128)
        needed, found = elements * (2 if complex_ else 1), len(getattr(tensor, name))
        packed = stored_bytes(tensor.data_type, tensor.dims) if bits(tensor.data_type) < 8 else -1
        fits, unit = found in (needed, packed), "values"
    if fits:
        return
    if found == 0:
        raise ModelError(
            f"{label} has no data for its {elements} elements",
            hint="its weights were stripped; use the complete model",
        )
    raise ModelError(
        f"{label} of shape {list(tensor.dims)} needs {needed} {unit} but has {found}",
        hint="export the model again",
    )


def _external_size(location: str, label: str, directory: Path | None, roots: Sequence[Path]) -> int:
    """Size of the external file, after it was made sure that it may be read."""
    if PurePosixPath(location).is_absolute() or PureWindowsPath(location).drive:
        raise ModelError(
            f"{label}: external data path '{location}' is absolute: refused",
            hint="put the file beside the model and export with a relative path",
        )
    if directory is None:
        raise ModelError(
            f"{label} is in the external file '{location}', but the model came from memory",
            hint="load the model by its path",
        )
    file = directory / location
    escapes = ".." in PurePosixPath(location).parts or ".." in PureWindowsPath(location).parts
    if escapes or not any(file.resolve().is_relative_to(root) for root in roots):
        raise ModelError(
            f"{label}: external data path '{location}' leads out of the model's folder: refused",
            hint="put the file itself beside the model",
        )
    if not file.exists():
        raise ModelError(
            f"{label}: external data file '{location}' is missing in '{directory}'",
            hint="put it beside the model",
        )
    if not file.is_file():
        raise ModelError(
            f"{label}: external data '{file}' is not a regular file",
            hint="put the data file there",
        )
    return file.stat().st_size


def _check_external(
    tensor: TensorProto, label: str, reference: ExternalReference, size: int
) -> None:
    needed = stored_bytes(tensor.data_type, tensor.dims)
    if tensor.data_type == TensorProto.STRING:
        raise ModelError(
            f"{label} keeps strings in external data, which ONNX does not allow",
            hint="export the model again",
        )
    if reference.length is not None and reference.length != needed:
        raise ModelError(
            f"{label} of shape {list(tensor.dims)} needs {needed} bytes but its external data is "
            f"{reference.length} long",
            hint="export the model again",
        )
    if reference.offset + needed > size:
        raise ModelError(
            f"{label}: external data file '{reference.location}' is too short: needed "
            f"{reference.offset + needed} bytes, found {size}",
            hint="download or export it again",
        )
