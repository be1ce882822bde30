"""What makes a model unusable, said in one line each.

``onnx.load`` and ONNX Runtime accept much that breaks pruning later (a Conv whose weight does not
fit its input), and put what they refuse in words for their own developers. So the structure, the
data and the channel counts are checked here; only then is the rest left to ``onnx.checker``.
Nothing here reads a weight's values.
"""

from __future__ import annotations

import logging
import math
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TypeAlias

import onnx
from onnx import AttributeProto, TensorProto, helper

from onnxprune.dims import size_of
from onnxprune.errors import ModelError

_log = logging.getLogger(__name__)

_Shape: TypeAlias = tuple[int | None, ...]
_Shapes: TypeAlias = Mapping[str, _Shape]

# -- facts about tensors and attributes ------------------------------------------------------------

_PACKED_BITS = {"UINT4": 4, "INT4": 4, "FLOAT4E2M1": 4, "UINT2": 2, "INT2": 2}
_PACKED_BITS |= {"FLOAT6E2M3": 6, "FLOAT6E3M2": 6}
_BITS: dict[int, int] = {
    value: _PACKED_BITS.get(name) or helper.tensor_dtype_to_np_dtype(value).itemsize * 8
    for name, value in TensorProto.DataType.items()
    if name != "UNDEFINED"
}
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
                yield tensor, f"'{attribute.name}' of {_label(node)}"


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


def _label(node: onnx.NodeProto) -> str:
    name = node.name or next(filter(None, node.output), "")
    return f"{node.op_type} '{name}'" if name else f"unnamed {node.op_type}"


# -- the file --------------------------------------------------------------------------------------

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


# -- structure -------------------------------------------------------------------------------------


def check_structure(proto: onnx.ModelProto) -> None:
    """Versions, names, and that every tensor is defined once and before it is used.

    Raises:
        ModelError: With the node or tensor at fault.
    """
    _check_versions(proto)
    for graph in graphs(proto):
        _check_names(graph)
    if not proto.graph.output:
        raise ModelError("the graph has no outputs", hint="export the model again")
    _check_definitions(proto.graph, [], "")


def _check_versions(proto: onnx.ModelProto) -> None:
    if proto.ir_version < 1:
        raise ModelError("the model declares no IR version", hint="export it again")
    if proto.ir_version > onnx.IR_VERSION:
        raise ModelError(
            f"unknown IR version {proto.ir_version} (newest known {onnx.IR_VERSION})",
            hint="upgrade onnx and onnxruntime, or export with an older version",
        )
    opsets = {
        "" if entry.domain == "ai.onnx" else entry.domain: entry.version
        for entry in proto.opset_import
    }
    if not opsets:
        raise ModelError("the model declares no opset", hint="export it again")
    newest = onnx.defs.onnx_opset_version()
    if not 1 <= opsets.get("", 1) <= newest:
        raise ModelError(
            f"unsupported opset {opsets['']} (newest known {newest})",
            hint="export with a supported opset",
        )
    if "" not in opsets:
        for node in proto.graph.node:
            if node.domain in ("", "ai.onnx"):
                raise ModelError(
                    f"the model declares no opset for ONNX's own operators, but {_label(node)} is "
                    "one",
                    hint="export it again",
                )


def _check_names(graph: onnx.GraphProto) -> None:
    # Protobuf hands a name that is no UTF-8 over as bytes, which no str key would ever equal.
    values = (*graph.input, *graph.output, *graph.value_info)
    kinds: tuple[tuple[str, Iterable[str]], ...] = (
        ("tensor", (value.name for value in values)),
        ("tensor", (tensor.name for tensor in graph.initializer)),
        ("tensor", (sparse.values.name for sparse in graph.sparse_initializer)),
        ("tensor", (name for node in graph.node for name in (*node.input, *node.output))),
        ("node", (node.name for node in graph.node)),
        ("operator", (name for node in graph.node for name in (node.op_type, node.domain))),
        ("attribute", (attribute.name for node in graph.node for attribute in node.attribute)),
        (
            "dimension",
            (dim.dim_param for value in values for dim in value.type.tensor_type.shape.dim),
        ),
    )
    for kind, names in kinds:
        for name in names:
            if not isinstance(name, str):
                raise ModelError(
                    f"{kind} name {name!r} is not valid UTF-8", hint="rename it when exporting"
                )


def _check_definitions(graph: onnx.GraphProto, outer: list[set[str]], where: str) -> set[str]:
    """Check one graph and its subgraphs; ``outer`` holds the scopes around it.

    Returns:
        The names that the graph captures from ``outer``.
    """
    defined: set[str] = set()
    scopes = [*outer, defined]
    captured: set[str] = set()
    for value in graph.input:
        if value.name in defined:
            raise _twice(value.name, f"two graph inputs{where}")
        defined.add(value.name)
    constants = [tensor.name for tensor in graph.initializer]
    constants += [sparse.values.name for sparse in graph.sparse_initializer]
    if "" in constants:
        raise ModelError(f"an initializer{where} has no name", hint="export the model again")
    if len(set(constants)) < len(constants):
        name = next(name for name, count in Counter(constants).items() if count > 1)
        raise _twice(name, f"two initializers{where}")
    defined.update(constants)  # an initializer may also be an input: its default
    made_at: dict[str, int] | None = None
    for position, node in enumerate(graph.node):
        needed = list(node.input)
        for body in subgraphs(node) if node.attribute else ():
            inside = f" in the body of {_label(node)}"
            needed += _check_definitions(body, scopes, inside)
        for name in needed:
            if not name or name in defined:
                continue
            if any(name in scope for scope in outer):
                captured.add(name)
                continue
            if made_at is None:
                made_at = _makers(graph)
            if name in made_at:
                raise _unsorted(graph, made_at, position, name)
            if outer:  # perhaps made later in a graph around this one, which then complains
                captured.add(name)
                continue
            raise _undefined(name, node, where)
        for name in filter(None, node.output):
            if name in defined:
                raise _twice(name, f"{_label(node)} and {_writer_of(graph, position, name)}{where}")
            defined.add(name)
    for value in graph.output:
        if value.name in defined:
            continue
        if where and any(value.name in scope for scope in outer):
            captured.add(value.name)
            continue
        raise ModelError(
            f"graph output '{value.name}'{where} is never produced", hint="export the model again"
        )
    return captured


def _makers(graph: onnx.GraphProto) -> dict[str, int]:
    return {name: i for i, node in enumerate(graph.node) for name in node.output if name}


def _twice(name: str, by: str) -> ModelError:
    return ModelError(f"tensor '{name}' is written twice: by {by}", hint="export the model again")


def _writer_of(graph: onnx.GraphProto, before: int, name: str) -> str:
    for node in graph.node[: before + 1]:
        if name in node.output and (node is not graph.node[before]):
            return _label(node)
    if name in {value.name for value in graph.input}:
        return "a graph input"
    if name in list(graph.node[before].output)[1:]:
        return "itself"
    return "an initializer"


def _undefined(name: str, node: onnx.NodeProto, where: str) -> ModelError:
    return ModelError(
        f"tensor '{name}' is used by {_label(node)}{where} but never defined",
        hint="the export is incomplete; export the model again",
        node=node.name,
    )


def _unsorted(
    graph: onnx.GraphProto, made_at: Mapping[str, int], position: int, name: str
) -> ModelError:
    """Tell a cycle through tensor ``name`` from nodes that merely stand in the wrong order."""
    node = graph.node[position]
    pending, seen = [made_at[name]], {made_at[name]}
    cycle = False
    while pending:
        current = pending.pop()
        if current == position:
            cycle = True
            break
        for needed in _all_inputs(graph.node[current]):
            maker = made_at.get(needed)
            if maker is not None and maker not in seen:
                seen.add(maker)
                pending.append(maker)
    if cycle:
        return ModelError(
            f"the graph has a cycle through tensor '{name}', which {_label(node)} reads",
            hint="export the model again",
            node=node.name,
        )
    return ModelError(
        f"the nodes are not sorted: {_label(node)} reads tensor '{name}' before "
        f"{_label(graph.node[made_at[name]])} makes it (there is no cycle)",
        hint="sort them, e.g. with onnx_graphsurgeon's Graph.toposort()",
        node=node.name,
    )


def _all_inputs(node: onnx.NodeProto) -> Iterator[str]:
    yield from node.input
    for body in subgraphs(node):
        for inner in body.node:
            yield from _all_inputs(inner)
        for value in body.output:
            yield value.name


# -- data ------------------------------------------------------------------------------------------


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
        if tensor.data_type not in _BITS:
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
        packed = stored_bytes(tensor.data_type, tensor.dims) if _BITS[tensor.data_type] < 8 else -1
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


# -- meaning ---------------------------------------------------------------------------------------


_RUNTIME_LACKS_OPERATOR = (
    "is not a registered function/op",
    "No Op registered",
    "Could not find an implementation",
    "is not currently registered or supported",
)
_HARMLESS = ("is deprecated in domain", "Field 'shape' of 'type' is required")


def check_meaning(bones: onnx.ModelProto) -> None:
    """Let ``onnx.checker`` and shape inference look at a skeleton, and compare channel counts.

    The checker and inference err now and then on models that run well (GroupNormalization of opset
    18 counts as deprecated), so their verdict stands only where ONNX Runtime agrees. Channel counts
    are the reverse: the runtime finds out too late, or never.

    Args:
        bones: The model without large payloads; it loses its ``value_info``.

    Raises:
        ModelError: With the node at fault.
    """
    del bones.graph.value_info[:]  # often stale, and what is true of it is inferred again
    try:
        onnx.checker.check_model(bones)
    except onnx.checker.ValidationError as error:
        _refuse_if_runtime_does(bones, _one_line(str(error)))
    except UnicodeDecodeError as error:  # its complaint quotes such a string
        text = bytes(error.object).decode("utf-8", "backslashreplace")
        raise ModelError(_one_line(text), hint="export the model again") from None
    try:
        inferred, complaint = onnx.shape_inference.infer_shapes(bones, strict_mode=True), ""
    except onnx.shape_inference.InferenceError as error:
        inferred, complaint = onnx.shape_inference.infer_shapes(bones), _one_line(str(error))
    shapes = _known_shapes(inferred.graph)
    for node in bones.graph.node:
        _check_channels(node, [shapes.get(name, ()) for name in node.input])
    if complaint:
        _refuse_if_runtime_does(bones, complaint)


def _one_line(text: str) -> str:
    """The first complaint of the checker or of shape inference, with its node, in one line."""
    inference = re.search(
        r"\(op_type:(?P<op>[^,)]*)(?:, node name: (?P<node>.*?))?\): (?:\[\w+\] )?(?P<what>[^\n]*)",
        text,
    )
    if inference is not None:
        op, node, what = inference.group("op", "node", "what")
        return f"{op} '{node}': {what}" if node else f"{op}: {what}"
    context = re.search(r"==> Context: .*?Name: (?P<node>.*?) OpType: (?P<op>\S+)", text)
    what = text.partition("==> Context")[0]
    what = re.sub(r"(?:\S*/)?\w+\.(?:cc|cpp|h):\d+:?\s*(?:\w+: )?", "", what)  # C++ positions
    what = re.sub(r"^\[\w+\]\s*", "", " ".join(what.split()))
    if context is not None and context["node"] not in what:
        return f"{context['op']} '{context['node']}': {what}"
    return what


def _refuse_if_runtime_does(bones: onnx.ModelProto, complaint: str) -> None:
    """Raise the complaint unless ONNX Runtime loads the model all the same."""
    import onnxruntime  # only here: it costs 0.1 s
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    kinds: tuple[type[Exception], ...] = (RuntimeError, ValueError)
    for kind in vars(state).values():  # its own errors have no common base
        if isinstance(kind, type) and issubclass(kind, Exception):
            kinds += (kind,)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        onnxruntime.InferenceSession(
            bones.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except kinds as error:
        cannot_tell = any(reason in str(error) for reason in _RUNTIME_LACKS_OPERATOR)
        if not (cannot_tell and any(harmless in complaint for harmless in _HARMLESS)):
            raise ModelError(complaint, hint="export the model again") from error
    _log.info("accepted, although onnx complains: %s", complaint)


def _known_shapes(graph: onnx.GraphProto) -> _Shapes:
    """Shapes by tensor, a dimension that is unknown or symbolic as None."""
    shapes: dict[str, _Shape] = {}
    for value in (*graph.input, *graph.output, *graph.value_info):
        kind = value.type.tensor_type
        if value.type.HasField("tensor_type") and kind.HasField("shape"):
            # Some exporters write 0 where they do not know.
            shapes[value.name] = tuple(size_of(dim) or None for dim in kind.shape.dim)
    for tensor in graph.initializer:
        shapes[tensor.name] = tuple(tensor.dims)
    return shapes


def _check_channels(node: onnx.NodeProto, shapes: Sequence[_Shape]) -> None:
    """Compare what a node's weights say with its input; () stands for a shape not known."""
    if node.domain not in ("", "ai.onnx") or not shapes:
        return
    match node.op_type:
        case "Conv":
            _check_conv(node, *_three(shapes), transposed=False)
        case "ConvTranspose":
            _check_conv(node, *_three(shapes), transposed=True)
        case "QLinearConv" if len(shapes) >= 8:
            bias = shapes[8] if len(shapes) > 8 else ()
            _check_conv(node, shapes[0], shapes[3], bias, transposed=False)
        case "Gemm":
            _check_gemm(node, *_three(shapes))
        case "BatchNormalization" | "InstanceNormalization":
            if _integer(node, "spatial", 1) == 1 and len(shapes[0]) >= 2:
                for vector in shapes[1:]:
                    if len(vector) == 1 and _differ(vector[0], shapes[0][1]):
                        raise ModelError(
                            f"{_label(node)} has {vector[0]} channels but its input has "
                            f"{shapes[0][1]}",
                            hint="the model was damaged; export it again",
                            node=node.name,
                        )


def _three(shapes: Sequence[_Shape]) -> tuple[_Shape, _Shape, _Shape]:
    x, weight, bias = [*shapes, (), (), ()][:3]
    return x, weight, bias


def _differ(a: int | None, b: int | None) -> bool:
    return a is not None and b is not None and a != b


def _integer(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((a.i for a in node.attribute if a.name == name), default)


def _misfit(node: onnx.NodeProto, what: str) -> ModelError:
    return ModelError(
        f"{_label(node)}: {what}", hint="the model was damaged; export it again", node=node.name
    )


def _check_conv(
    node: onnx.NodeProto, x: _Shape, weight: _Shape, bias: _Shape, *, transposed: bool
) -> None:
    if len(weight) < 2:
        return
    group = _integer(node, "group", 1)
    wide, narrow = weight[0], weight[1]
    if narrow is not None:
        narrow *= group
    wanted, made = (wide, narrow) if transposed else (narrow, wide)
    if len(x) >= 2 and _differ(wanted, x[1]):
        raise _misfit(node, f"weight wants {wanted} input channels, tensor has {x[1]}")
    if group < 1 or (wide is not None and wide % group):
        raise _misfit(node, f"{wide} channels cannot be split into {group} groups")
    if len(bias) == 1 and _differ(bias[0], made):
        raise _misfit(node, f"bias has {bias[0]} entries, expected {made}")


def _check_gemm(node: onnx.NodeProto, a: _Shape, b: _Shape, bias: _Shape) -> None:
    if len(b) != 2:
        return
    inner, made = reversed(b) if _integer(node, "transB", 0) else b
    if len(a) == 2:
        has = a[0] if _integer(node, "transA", 0) else a[1]
        if _differ(inner, has):
            raise _misfit(node, f"weight wants {inner} input features, tensor has {has}")
    if bias and bias[-1] != 1 and _differ(bias[-1], made):
        raise _misfit(node, f"bias has {bias[-1]} entries, expected {made}")
