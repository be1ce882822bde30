"""Every node of a model, bodies and functions included, and what is known of its tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

import onnx
from onnx import shape_inference

from onnxprune.graph import captured_names
from onnxprune.model import Model
from onnxprune.presented import attributes_of, domain_of, label_of
from onnxprune.skeleton import skeleton

_PRESENT = ("Identity", "Reshape", "Squeeze", "Unsqueeze", "Transpose", "Cast", "Flatten")


@dataclass(frozen=True, eq=False)
class Body:
    """The nodes of one graph, body or function, and who makes what in it.

    Attributes:
        model: The model it is in.
        nodes: Its nodes, in order.
        scope: "" for the main graph.
        outer: What encloses it, None for the main graph and for functions.
        graph: The graph, None for a function.
    """

    model: Model
    nodes: tuple[onnx.NodeProto, ...]
    scope: str
    outer: Body | None
    graph: onnx.GraphProto | None

    @cached_property
    def producer(self) -> Mapping[str, onnx.NodeProto]:
        """Node that makes each tensor."""
        return {name: node for node in self.nodes for name in node.output if name}

    @cached_property
    def tensors(self) -> Mapping[str, onnx.TensorProto]:
        """Constant tensors by name."""
        found = {} if self.graph is None else {one.name: one for one in self.graph.initializer}
        for node in self.nodes:
            if node.op_type == "Constant" and node.output:
                value = attributes_of(node, {}).get("value")
                if value is not None:
                    found[node.output[0]] = value.t
        return found

    @cached_property
    def constant(self) -> frozenset[str]:
        """Tensors computed from constants alone, the constants included."""
        known = set() if self.outer is None else set(self.outer.constant)
        if self.graph is not None:
            known -= {value.name for value in self.graph.input}
            known |= {one.name for one in self.graph.initializer}
            known |= {one.values.name for one in self.graph.sparse_initializer}
        for node in self.nodes:
            names = [*(name for name in node.input if name), *captured_names(node)]
            if (names or node.op_type == "Constant") and all(name in known for name in names):
                known.update(name for name in node.output if name)
        return frozenset(known)

    def maker(self, name: str) -> onnx.NodeProto | None:
        """Node that makes a tensor, here or in what encloses it, past those that only show it."""
        node = self.producer.get(name)
        if node is None:
            return None if self.outer is None else self.outer.maker(name)
        if node.op_type in _PRESENT and node.input and node.input[0]:
            return self.maker(node.input[0]) or node
        return node

    def tensor(self, name: str) -> onnx.TensorProto | None:
        """The constant tensor of a name, here or in what encloses it."""
        found = self.tensors.get(name)
        if found is None and self.outer is not None:
            return self.outer.tensor(name)
        return found

    def label(self, node: onnx.NodeProto) -> str:
        """What to call one of the nodes."""
        return f"{label_of(node)} in '{self.scope}'" if self.scope else label_of(node)


def bodies(model: Model) -> Iterator[Body]:
    """The main graph, then every body and every function that stands in the model."""
    main = Body(model, tuple(model.proto.graph.node), "", None, model.proto.graph)
    yield from _with_inner(main)
    for function in model.proto.functions:
        inside = Body(model, tuple(function.node), function.name, None, None)
        yield from _with_inner(inside)


def _with_inner(body: Body) -> Iterator[Body]:
    yield body
    for node in body.nodes:
        for attribute in node.attribute:
            for graph in (*([attribute.g] if attribute.HasField("g") else ()), *attribute.graphs):
                scope = f"{body.scope}/{node.output[0]}" if body.scope else node.output[0]
                yield from _with_inner(Body(body.model, tuple(graph.node), scope, body, graph))


def functions_of(model: Model) -> set[tuple[str, str]]:
    """Domain and name of the functions that a model brings along."""
    return {(domain_of(one.domain), one.name) for one in model.proto.functions}


def element_types(model: Model) -> dict[str, int]:
    """Element type of the main graph's tensors, as far as declarations and inference tell."""
    bones = skeleton(model)
    with suppress(shape_inference.InferenceError):  # what is declared still counts
        bones = shape_inference.infer_shapes(bones)
    graph = bones.graph
    found = {
        value.name: value.type.tensor_type.elem_type
        for value in (*graph.input, *graph.value_info, *graph.output)
        if value.type.HasField("tensor_type")
    }
    return found | {tensor.name: tensor.data_type for tensor in model.proto.graph.initializer}
