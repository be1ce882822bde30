"""Write a changed graph back as a model: same names, same order, weights still lazy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnxprune.dims import size_of
from onnxprune.graph import Graph, Node
from onnxprune.model import Model, Weight
from onnxprune.skeleton import LARGE
from onnxprune.types import AnyArray, Shape

_FIRST_IR_WITH_PRIVATE_INITIALIZERS = 4
_FIRST_OPSET_WITH_ANY_CONSTANT = 9  # before, a Constant node held floats only


@dataclass(frozen=True, slots=True)
class ConstantEdit:
    """New values of one constant.

    Attributes:
        shape: New shape; the element type stays.
        compute: New values from the old ones.
        key: Two copies of one constant whose edits have equal keys end equal.
    """

    shape: Shape
    compute: Callable[[AnyArray], AnyArray]
    key: bytes


class Emitter:
    """Collects edits of a prepared graph and builds the model."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.constants: dict[str, ConstantEdit] = {}
        self.nodes: dict[int, list[onnx.NodeProto]] = {}
        self.dims: dict[str, Mapping[int, int]] = {}
        self._new: dict[str, AnyArray] = {}
        self._stored = {
            node.output[0]: node
            for node in graph.model.proto.graph.node
            if node.op_type == "Constant" and node.output
        }
        self._taken = set(graph.constants) | set(graph.inputs)
        self._taken |= {name for node in graph.nodes for name in node.outputs}

    # -- edits ---------------------------------------------------------------------------------

    def literal(self, hint: str, array: AnyArray) -> str:
        """A new constant; returns its name."""
        name = self.fresh(hint)
        self._new[name] = array
        return name

    def fresh(self, hint: str) -> str:
        """A name nothing has yet."""
        name, number = hint, 2
        while name in self._taken:
            name, number = f"{hint}_{number}", number + 1
        self._taken.add(name)
        return name

    def node(self, node: Node) -> onnx.NodeProto:
        """The node as it will be written, ready to be changed in place."""
        if node.index not in self.nodes:
            copy = onnx.NodeProto()
            copy.CopyFrom(node.proto)
            self.nodes[node.index] = [copy]
        return next(p for p in self.nodes[node.index] if p.op_type == node.op_type)

    def before(self, node: Node, added: onnx.NodeProto) -> None:
        """Put a new node in front of one."""
        self.node(node)
        self.nodes[node.index].insert(0, added)

    def after(self, node: Node, added: onnx.NodeProto) -> None:
        """Put a new node behind one."""
        self.node(node)
        self.nodes[node.index].append(added)

    # -- building ------------------------------------------------------------------------------

    def canonical(self) -> Mapping[str, str]:
        """Copies that end equal to another copy of the same constant, and to which one."""
        first: dict[tuple[str, bytes], str] = {}
        merged: dict[str, str] = {}
        for name, constant in self.graph.constants.items():
            edit = self.constants.get(name)
            key = (constant.origin, edit.key if edit else b"")
            if first.setdefault(key, name) != name:
                merged[name] = first[key]
        for node in self.graph.nodes:
            clone = node.outputs[0] if node.outputs else ""
            original = self.graph.clones.get(clone)
            if original is None or node.index in self.nodes:
                continue
            source = self.graph.producer[original]
            if source.index in self.nodes:
                continue
            if [merged.get(n, n) for n in node.inputs] == [merged.get(n, n) for n in source.inputs]:
                merged[clone] = merged.get(original, original)
        return merged

    def build(self) -> Model:
        """The changed model; nothing is read from weights until somebody needs it."""
        merged = self.canonical()
        source = self.graph.model
        proto = _without_graph(source.proto)
        target, old = proto.graph, source.proto.graph
        deferred: dict[str, Weight] = {}
        written = list(self._written(merged, deferred))
        written = _without_dead(written, self._ended(), self.graph)
        used = {name for node in written for name in node.input}
        used |= {name for node in self.graph.nodes for name in node.captures}
        used |= set(self.graph.outputs)
        self._initializers(target, deferred, merged, used)
        target.node.extend(written)
        _copy_interface(old, target)
        self._refresh_value_info(old, target, {n for node in written for n in node.output})
        return replace(source, proto=proto, deferred=deferred, file_bytes=0)

    def _written(
        self, merged: Mapping[str, str], deferred: dict[str, Weight]
    ) -> Iterator[onnx.NodeProto]:
        copies: dict[str, list[str]] = {}
        for name, constant in self.graph.constants.items():
            if name != constant.origin and name not in merged:
                copies.setdefault(constant.origin, []).append(name)
        old_ir = self.graph.model.proto.ir_version < _FIRST_IR_WITH_PRIVATE_INITIALIZERS
        if old_ir:
            for name, array in self._new.items():
                yield from self._new_constant_nodes(name, numpy_helper.from_array(array, name))
            for origin, names in copies.items():
                if not self.graph.constants[origin].in_node:
                    yield from self._constant_nodes(names, deferred)
        families: list[list[Node]] = []  # each node of the model with the clones behind it
        for member in self.graph.nodes:
            if member.key in self.graph.clones:
                families[-1].append(member)
            else:
                families.append([member])
        remaining = iter(families)
        for node in self.graph.model.proto.graph.node:
            name = node.output[0] if node.output else ""
            lifted = self.graph.constants.get(name)
            if lifted is not None and lifted.in_node and node.op_type == "Constant":
                if name in self.constants:
                    yield from self._constant_nodes([name], deferred)
                else:
                    if name in self.graph.model.deferred:
                        deferred[name] = lifted.weight
                    yield node
                yield from self._constant_nodes(copies.get(name, []), deferred)
                continue
            for member in next(remaining):
                if member.key not in merged:
                    for proto in self.nodes.get(member.index, [member.proto]):
                        yield _renamed(proto, merged)

    def _constant_nodes(
        self, names: Sequence[str], deferred: dict[str, Weight]
    ) -> Iterator[onnx.NodeProto]:
        for name in names:
            stored, tensor = self._stored.get(name), self._tensor(name, deferred)
            if stored is None:
                yield from self._new_constant_nodes(name, tensor)
                continue
            node = _constant_node(name, tensor)  # the same node with another value
            node.name, node.doc_string = stored.name, stored.doc_string
            node.metadata_props.extend(stored.metadata_props)
            yield node

    def _new_constant_nodes(self, name: str, tensor: onnx.TensorProto) -> Iterator[onnx.NodeProto]:
        if self.graph.opsets.get("", 0) >= _FIRST_OPSET_WITH_ANY_CONSTANT or _is_float(tensor):
            yield _constant_node(name, tensor)
            return
        values = numpy_helper.to_array(tensor).astype(np.float32)
        held = self.fresh(f"{name}_float")
        yield _constant_node(held, numpy_helper.from_array(values, held))
        yield helper.make_node("Cast", [held], [name], name=f"{name}_cast", to=tensor.data_type)

    def _tensor(self, name: str, deferred: dict[str, Weight]) -> onnx.TensorProto:
        """The constant as a message: with its data where that is small, else to be read later."""
        weight = self.weight(name)
        if weight.nbytes <= LARGE:
            return weight.to_proto()
        deferred[name] = weight
        return onnx.TensorProto(name=name, data_type=weight.data_type, dims=weight.shape)

    def weight(self, name: str) -> Weight:
        """A constant as it will be written."""
        old = self.graph.constants[name].weight
        edit = self.constants.get(name)
        if edit is None:
            return Weight.lazily(name, old.shape, old.data_type, old.read)
        return Weight.lazily(
            name,
            edit.shape,
            old.data_type,
            lambda: np.ascontiguousarray(edit.compute(old.read())).reshape(edit.shape),
        )

    def _initializers(
        self,
        target: onnx.GraphProto,
        deferred: dict[str, Weight],
        merged: Mapping[str, str],
        used: set[str],
    ) -> None:
        graph = self.graph.model.proto.graph
        ended, inputs = self._ended(), {value.name for value in graph.input}
        old_ir = self.graph.model.proto.ir_version < _FIRST_IR_WITH_PRIVATE_INITIALIZERS
        copies: dict[str, list[str]] = {}
        for name, constant in self.graph.constants.items():
            if name != constant.origin and name not in merged and not constant.in_node:
                copies.setdefault(constant.origin, []).append(name)
        sparse = {tensor.values.name: tensor for tensor in graph.sparse_initializer}
        for tensor in graph.initializer:
            # Before IR 4 an initializer is the default of an input, which stays.
            if tensor.name in used or tensor.name not in ended or tensor.name in inputs:
                self._initializer(tensor.name, target, deferred, tensor.doc_string)
            for copy in [] if old_ir else copies.get(tensor.name, []):
                self._initializer(copy, target, deferred, tensor.doc_string)
        for name, stored in sparse.items():
            if name in self.constants:
                self._initializer(name, target, deferred, "")
            else:
                target.sparse_initializer.append(stored)
            for copy in copies.get(name, []):
                self._initializer(copy, target, deferred, "")
        if not old_ir:
            for name, array in self._new.items():
                if name in used:
                    target.initializer.append(numpy_helper.from_array(array, name))

    def _initializer(
        self, name: str, target: onnx.GraphProto, deferred: dict[str, Weight], doc: str
    ) -> None:
        tensor = self._tensor(name, deferred)
        if doc:
            tensor.doc_string = doc
        target.initializer.append(tensor)

    def _ended(self) -> set[str]:
        """Tensors that something read before and nothing may read now."""
        return {name for node in self.graph.nodes for name in node.inputs}

    def _refresh_value_info(
        self, old: onnx.GraphProto, target: onnx.GraphProto, made: set[str]
    ) -> None:
        before = {name for node in old.node for name in node.output}
        for value in old.value_info:
            if value.name in before and value.name not in made:
                continue  # replaced together with the node that made it
            copy = target.value_info.add()
            copy.CopyFrom(value)
            self._refresh(copy)
        for value in target.input:
            self._refresh(value)

    def _refresh(self, value: onnx.ValueInfoProto) -> None:
        dims = value.type.tensor_type.shape.dim
        edit = self.constants.get(value.name)
        changed = dict(enumerate(edit.shape)) if edit else self.dims.get(value.name, {})
        for axis, size in changed.items():
            if axis < len(dims) and size_of(dims[axis]) is not None:
                dims[axis].dim_value = size


def _without_graph(source: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of everything but the graph, which is not even touched."""
    proto = onnx.ModelProto()
    for descriptor, value in source.ListFields():
        if descriptor.name in ("graph", "training_info"):
            continue
        if hasattr(value, "MergeFrom") and not isinstance(value, onnx.StringStringEntryProto):
            getattr(proto, descriptor.name).MergeFrom(value)
        else:
            setattr(proto, descriptor.name, value)
    proto.training_info.MergeFrom(source.training_info)
    return proto


def _copy_interface(old: onnx.GraphProto, target: onnx.GraphProto) -> None:
    target.name = old.name
    if old.doc_string:
        target.doc_string = old.doc_string
    target.input.extend(old.input)
    target.output.extend(old.output)
    target.quantization_annotation.extend(old.quantization_annotation)
    target.metadata_props.extend(old.metadata_props)


def _is_float(tensor: onnx.TensorProto) -> bool:
    kinds = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)
    return tensor.data_type in kinds


def _constant_node(name: str, tensor: onnx.TensorProto) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], name=f"{name}_constant", value=tensor)


def _renamed(node: onnx.NodeProto, merged: Mapping[str, str]) -> onnx.NodeProto:
    if not any(name in merged for name in node.input):
        return node
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    for position, name in enumerate(copy.input):
        copy.input[position] = merged.get(name, name)
    return copy


def _without_dead(
    nodes: list[onnx.NodeProto], read_before: set[str], graph: Graph
) -> list[onnx.NodeProto]:
    """Drop nodes that lost every reader through the cut, and those whose inputs went with them."""
    keep_names = set(graph.outputs) | graph.captured
    while True:
        made = {name for node in nodes for name in node.output}
        gone = {n for node in graph.nodes for n in node.outputs if n} - made
        used = {name for node in nodes for name in node.input} | keep_names
        alive = [
            node
            for node in nodes
            if not any(name in gone for name in node.input)
            and (
                any(name in used for name in node.output)
                or not any(name in read_before for name in node.output)
            )
        ]
        if len(alive) == len(nodes):
            return nodes
        nodes = alive
