"""A model without its large payloads, for the checker and for shape inference."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import cached_property

import onnx
from onnx import helper

from onnxprune.messages import (
    graphs,
    is_constant,
    is_external,
    is_heavy,
    stored_bytes,
    tensors,
    without,
)
from onnxprune.model import Model, Weight

LARGE = 1024  # bytes; what is larger goes to external data, and is left out of a skeleton


def skeleton(model: Model) -> onnx.ModelProto:
    """A copy without the large payloads, for the checker and for shape inference.

    Every constant over 1 KiB, deferred or sparse is left out and declared as a graph input of its
    type and shape instead. In subgraphs that is done where the name is unique, so that the body
    simply captures it.
    """
    return _Skeleton(model).build()


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
        for tensor, _ in tensors(bones):  # those whose name did not allow it
            if is_external(tensor):
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
            if not any(map(is_heavy, node.attribute)):
                bones.node.append(node)
            elif not (is_constant(node) and self._leave_out_constant(node, top=top)):
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
            stored_bytes(tensor.data_type, tensor.dims) <= LARGE
            and not is_external(tensor)
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
        for graph in graphs(self._model.proto):
            count.update(value.name for value in graph.input)
            count.update(tensor.name for tensor in graph.initializer)
            count.update(sparse.values.name for sparse in graph.sparse_initializer)
            count.update(name for node in graph.node for name in node.output)
        return count
