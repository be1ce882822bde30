"""Whether a graph hangs together: versions, names, every tensor made once and before its use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

import onnx

from onnxprune.errors import ModelError
from onnxprune.messages import graphs, label, subgraphs


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
                    f"the model declares no opset for ONNX's own operators, but {label(node)} is "
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
            inside = f" in the body of {label(node)}"
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
                raise _twice(name, f"{label(node)} and {_writer_of(graph, position, name)}{where}")
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
            return label(node)
    if name in {value.name for value in graph.input}:
        return "a graph input"
    if name in list(graph.node[before].output)[1:]:
        return "itself"
    return "an initializer"


def _undefined(name: str, node: onnx.NodeProto, where: str) -> ModelError:
    return ModelError(
        f"tensor '{name}' is used by {label(node)}{where} but never defined",
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
            f"the graph has a cycle through tensor '{name}', which {label(node)} reads",
            hint="export the model again",
            node=node.name,
        )
    return ModelError(
        f"the nodes are not sorted: {label(node)} reads tensor '{name}' before "
        f"{label(graph.node[made_at[name]])} makes it (there is no cycle)",
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
