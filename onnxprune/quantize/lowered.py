"""Write a decision on 16-bit types into a model: weights converted, casts where types meet.

Every cast stands right behind what it reads, once for each type, so that the list of nodes stays
in order. Names of inputs and outputs stay what they were, and their types too unless asked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxprune.graph import captured_names
from onnxprune.model import Model, Weight
from onnxprune.quantize.typed import FP32, SPELLED, Typing, rounded
from onnxprune.skeleton import LARGE, skeleton

_SUFFIX: Mapping[int, str] = {
    TensorProto.FLOAT16: "fp16",
    TensorProto.BFLOAT16: "bf16",
    FP32: "fp32",
}


def lowered(model: Model, typing: Typing, *, convert_io: bool = False) -> Model:
    """The model with the types of ``typing``.

    Args:
        model: Without local functions.
        typing: From ``Typist.decide`` on it.
        convert_io: Graph inputs and outputs become 16-bit as well.
    """
    return _Lowering(model, typing, convert_io).build()


class _Lowering:
    def __init__(self, model: Model, typing: Typing, convert_io: bool) -> None:
        self.model, self.typing, self.low = model, typing, typing.low
        self.proto = onnx.ModelProto()
        self.proto.CopyFrom(model.proto)
        self.graph = self.proto.graph
        self.weights = dict(model.weights())
        self.deferred = dict(model.deferred)
        self.taken = _names(self.graph)
        self.kinds: dict[str, int] = {}  # of every float tensor, as it is in the new model
        self.casts: dict[tuple[str, int], str] = {}
        self.pending: list[onnx.NodeProto] = []
        self.moved: dict[str, str] = {}  # outputs of the graph that are made under another name
        self.convert_io = convert_io

    def build(self) -> Model:
        fixed = self._fixed()
        self._inputs()
        self._constants(fixed)
        made: list[onnx.NodeProto] = []
        self._flush(made)
        for index, node in enumerate(self.graph.node):
            self._read(index, node)
            self._flush(made)
            self._write(index, node)
            made.append(node)
            self._close(node)
            self._flush(made)
        order = [onnx.NodeProto() for _ in made]
        for copy, node in zip(order, made, strict=True):
            copy.CopyFrom(node)
        del self.graph.node[:]
        self.graph.node.extend(order)
        for value in self.graph.value_info:
            if self.kinds.get(value.name) == self.low:
                value.type.tensor_type.elem_type = self.low
        return replace(self.model, proto=self.proto, deferred=self.deferred)

    # -- where types begin -----------------------------------------------------------------------

    def _fixed(self) -> set[str]:
        """Constants that keep their type: a caller may replace them, or reads them."""
        fixed = {value.name for value in (*self.graph.input, *self.graph.output)}
        fixed |= {sparse.values.name for sparse in self.graph.sparse_initializer}
        for node in self.graph.node:
            fixed.update(captured_names(node))
        return fixed

    def _inputs(self) -> None:
        for value in self.graph.input:
            if value.type.tensor_type.elem_type == FP32 and value.name not in self.weights:
                if self.convert_io:
                    value.type.tensor_type.elem_type = self.low
                self.kinds[value.name] = self.low if self.convert_io else FP32

    def _constants(self, fixed: set[str]) -> None:
        """Convert what only 16-bit nodes read."""
        wanted: dict[str, set[int]] = {}
        for (index, at), kind in self.typing.reads.items():
            wanted.setdefault(self.graph.node[index].input[at], set()).add(kind)
        makers = {node.output[0]: node for node in self.graph.node if node.op_type == "Constant"}
        tensors = {tensor.name: tensor for tensor in self.graph.initializer}
        for name, weight in self.weights.items():
            if weight.data_type != FP32:
                continue
            low = wanted.get(name) == {self.low} and name not in fixed
            self.kinds[name] = self.low if low else FP32
            if not low:
                continue
            if name in tensors:
                self._store(tensors[name], weight)
            elif name in makers:
                attribute = helper.make_attribute("value", TensorProto(name=name))
                self._store(attribute.t, weight)
                del makers[name].attribute[:]
                makers[name].attribute.append(attribute)

    def _store(self, tensor: onnx.TensorProto, weight: Weight) -> None:
        """Put a converted weight in place: small ones at once, others when they are written."""
        name, low = weight.name, self.low
        new = Weight.lazily(name, weight.shape, low, lambda: rounded(weight.read(), low))
        tensor.Clear()
        if new.nbytes < LARGE:
            self.deferred.pop(name, None)
            tensor.CopyFrom(numpy_helper.from_array(new.read(), name))
            return
        tensor.name, tensor.data_type = name, low
        tensor.dims.extend(weight.shape)
        self.deferred[name] = new

    # -- nodes -----------------------------------------------------------------------------------

    def _read(self, index: int, node: onnx.NodeProto) -> None:
        """Have every input of a node in the type it wants."""
        for at, name in enumerate(node.input):
            kind = self.typing.reads.get((index, at))
            if kind is not None:
                node.input[at] = self._as(name, kind)
        inside = dict.fromkeys(captured_names(node))
        renamed = {name: self._as(name, FP32) for name in inside if name in self.kinds}
        renamed = {name: new for name, new in renamed.items() if name != new}
        if renamed:
            for body in _bodies(node):
                _rename(body, renamed)

    def _as(self, name: str, kind: int) -> str:
        """The tensor in a type; a cast is made where it is not of that type already."""
        source = self.moved.get(name, name)
        have = self.kinds.get(source, kind)
        if have == kind:
            return source
        if source != name and self.kinds.get(name) == kind:
            return name
        made = self.casts.get((source, kind))
        if made is None:
            made = self._fresh(f"{name}_{_SUFFIX[kind]}")
            self.casts[source, kind] = made
            self.kinds[made] = kind
            self.pending.append(helper.make_node("Cast", [source], [made], made, to=kind))
        return made

    def _write(self, index: int, node: onnx.NodeProto) -> None:
        """Note the types of what a node makes, and have it make them."""
        outputs = {value.name for value in self.graph.output}
        for at, name in enumerate(node.output):
            kind = self.typing.writes.get((index, at))
            if kind is None:
                continue
            if kind == self.low and name in outputs and not self.convert_io:
                self.moved[name] = self._fresh(f"{name}_{_SUFFIX[kind]}")
                node.output[at] = self.moved[name]
                self.kinds[name] = FP32
            self.kinds[self.moved.get(name, name)] = kind
            if kind == self.low:
                self._retype(node)

    def _retype(self, node: onnx.NodeProto) -> None:
        """Attributes that name the type of an output."""
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype", "output_dtype") and attribute.i == FP32:
                attribute.i = self.low
            elif attribute.HasField("t") and attribute.t.data_type == FP32:
                values = rounded(numpy_helper.to_array(attribute.t), self.low)
                attribute.t.CopyFrom(numpy_helper.from_array(values, attribute.t.name))

    def _close(self, node: onnx.NodeProto) -> None:
        """Cast back what the graph hands out, or hand it out in its new type."""
        back = {new: old for old, new in self.moved.items()}
        for name in node.output:
            if name in back:
                label = self._fresh(f"{back[name]}_fp32")
                made = helper.make_node("Cast", [name], [back[name]], label, to=FP32)
                self.pending.append(made)
        for value in self.graph.output if self.convert_io else ():
            if value.name in node.output and self.kinds.get(value.name) == self.low:
                value.type.tensor_type.elem_type = self.low

    def _flush(self, made: list[onnx.NodeProto]) -> None:
        made.extend(self.pending)
        self.pending.clear()

    def _fresh(self, name: str) -> str:
        number, free = 2, name
        while free in self.taken:
            free, number = f"{name}__{number}", number + 1
        self.taken.add(free)
        return free


def _names(graph: onnx.GraphProto) -> set[str]:
    """Every name of a tensor or node, bodies included."""
    found = {value.name for value in (*graph.input, *graph.output, *graph.value_info)}
    found |= {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        found.update((node.name, *node.input, *node.output))
        for body in _bodies(node):
            found |= _names(body)
    return found


def _bodies(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _rename(body: onnx.GraphProto, names: dict[str, str]) -> None:
    """Read captured tensors under other names, in this body and those inside it."""
    for value in body.output:
        value.name = names.get(value.name, value.name)
    for node in body.node:
        for at, name in enumerate(node.input):
            node.input[at] = names.get(name, name)
        for inner in _bodies(node):
            _rename(inner, names)


def emulated(model: Model, low: int) -> Model:
    """A float32 model that computes what a 16-bit one does, rounded after every node.

    ONNX Runtime has few 16-bit kernels on a CPU: it computes in float32 and drops the casts it put
    in itself, so that overflow and rounding do not show. Casts that stand in the model it keeps.

    Args:
        model: What ``lowered`` made, its inputs and outputs float32.
        low: Its 16-bit type.
    """
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    weights, deferred = dict(model.weights()), dict(model.deferred)
    kinds = _kinds_of(model)
    for tensor in proto.graph.initializer:
        if tensor.data_type == low:
            wide = weights[tensor.name].read().astype(np.float32)
            deferred.pop(tensor.name, None)
            tensor.CopyFrom(numpy_helper.from_array(wide, tensor.name))
    made: list[onnx.NodeProto] = []
    for node in proto.graph.node:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        lows = [name for name in node.output if kinds.get(name) == low]
        _widen(copy, low, deferred, weights)
        made.append(copy)
        if node.op_type == "Constant":
            continue
        for at, name in enumerate(node.output):
            if name in lows:
                copy.output[at] = f"{name}__exact"
                inner = f"{name}__{SPELLED[low]}"
                made.append(helper.make_node("Cast", [copy.output[at]], [inner], to=low))
                made.append(helper.make_node("Cast", [inner], [name], to=FP32))
    del proto.graph.node[:], proto.graph.value_info[:]
    proto.graph.node.extend(made)
    return replace(model, proto=proto, deferred=deferred)


def _widen(node: onnx.NodeProto, low: int, deferred: dict[str, Weight], weights: object) -> None:
    """A node that makes float32 where it made 16 bits."""
    for attribute in node.attribute:
        if attribute.name in ("to", "dtype", "output_dtype") and attribute.i == low:
            attribute.i = FP32
        elif attribute.HasField("t") and attribute.t.data_type == low:
            name = node.output[0]
            held = deferred.pop(name, None)
            values = numpy_helper.to_array(attribute.t) if held is None else held.read()
            attribute.t.CopyFrom(numpy_helper.from_array(values.astype(np.float32), name))


def _kinds_of(model: Model) -> dict[str, int]:
    graph = onnx.shape_inference.infer_shapes(skeleton(model)).graph
    return {
        value.name: value.type.tensor_type.elem_type
        for value in (*graph.input, *graph.output, *graph.value_info)
    }
