"""The copy of a model that trainers work on, and the way of its weights back into the file.

A trainer gets a plain graph: constants are initializers, each use of a shared one has a copy of its
own, what was float16 is float32. None of that reaches the file: weights go back by name, into the
untouched graph, in the type they are stored in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx
from onnx import TensorProto, inliner, numpy_helper

from onnxprune.emit import ConstantEdit, Emitter
from onnxprune.errors import ModelError, UnsupportedModelError
from onnxprune.graph import Graph, Node
from onnxprune.model import Model, Weight
from onnxprune.prepare import prepare
from onnxprune.train.protocol import Arrays
from onnxprune.types import AnyArray

_HALVES = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
_FLOATS = (TensorProto.FLOAT, *_HALVES)
_LARGEST = 2**31 - 2**20  # bytes: protobuf's limit, as a trainer gets one message
_SCALES = ("BatchNormalization",)
# Inputs that hold weights, by operator. Of Add and Mul only what looks like one, see `_learned`.
_WEIGHTS: Mapping[str, tuple[int, ...]] = {
    "Conv": (1, 2),
    "ConvTranspose": (1, 2),
    "FusedConv": (1, 2),
    "Gemm": (0, 1, 2),
    "MatMul": (0, 1),
    "Einsum": (0, 1),
    "BatchNormalization": (1, 2),
    "LayerNormalization": (1, 2),
    "InstanceNormalization": (1, 2),
    "GroupNormalization": (1, 2),
    "PRelu": (1,),
    "Gather": (0,),
    "Add": (0, 1),
    "Mul": (0, 1),
}
_SHOW = ("Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")
_QUANTIZED = ("ConvInteger", "MatMulInteger", "MatMulNBits", "QLinearConv", "QLinearMatMul")
_ADDED_OR_MULTIPLIED = ("Add", "Mul")


@dataclass(frozen=True)
class TrainingCopy:
    """A model prepared for training.

    Attributes:
        graph: The prepared graph, whose constants have the names that trainers use.
    """

    graph: Graph

    @classmethod
    def of(cls, model: Model) -> TrainingCopy:
        """Prepare ``model``, which stays as it is.

        Raises:
            UnsupportedModelError: It has no weight that could be trained.
        """
        made = cls(prepare(model))
        if not made.weights:
            raise UnsupportedModelError(
                "the model has no float weight that could be trained",
                hint="quantized weights and those in bodies of If and Loop cannot",
            )
        return made

    @cached_property
    def weights(self) -> Mapping[str, tuple[Node, int]]:
        """Every weight that can be trained, with the node that reads it and the input it is."""
        found = {}
        for name, constant in self.graph.constants.items():
            weight, use = constant.weight, self._use(name)
            if constant.pinned or weight.data_type not in _FLOATS or use is None:
                continue
            node, position = use
            known = node.domain == "" or node.op_type == "FusedConv"
            if known and position in _WEIGHTS.get(node.op_type, ()) and _learned(weight, node):
                found[name] = use
        return found

    @property
    def quantized(self) -> str | None:
        """The first node that computes with quantized weights, for people."""
        for node in self.graph.nodes:
            stored = node.op_type == "DequantizeLinear" and node.inputs[0] in self.graph.constants
            if stored or node.op_type in _QUANTIZED:
                return f"{node.op_type} '{node.proto.name or node.outputs[0]}'"
        return None

    def _use(self, name: str) -> tuple[Node, int] | None:
        """The node that reads a constant, past those that only show it in another form.

        None where it is no more than a part of what is read, such as the scale of quantized values.
        """
        while (reader := next(iter(self.graph.consumers.get(name, ())), None)) is not None:
            node, position = reader
            if not node.outputs or node.outputs[0] not in self.graph.derived:
                return reader
            if node.op_type not in _SHOW or position != 0:
                return None
            name = node.outputs[0]
        return None

    @cached_property
    def statistics(self) -> tuple[str, ...]:
        """Running means and variances."""
        return tuple(
            name
            for node in self.graph.nodes
            if node.op_type == "BatchNormalization" and node.domain == ""
            for name in node.inputs[3:5]
            if name in self.graph.constants and not self.graph.constants[name].pinned
        )

    @cached_property
    def scales(self) -> tuple[str, ...]:
        """Scales of BatchNormalization."""
        return self._read_as(_SCALES, (1,))

    @cached_property
    def matrices(self) -> tuple[str, ...]:
        """Weights that multiply: those that decay, and that a penalty may thin."""
        able = ("Conv", "ConvTranspose", "FusedConv", "Gemm", "MatMul", "Einsum")
        return tuple(
            name
            for name in self._read_as(able, (0, 1))
            if len(self.graph.constants[name].weight.shape) > 1
        )

    def _read_as(self, operators: tuple[str, ...], positions: tuple[int, ...]) -> tuple[str, ...]:
        return tuple(
            name
            for name, (node, position) in self.weights.items()
            if node.op_type in operators and position in positions
        )

    def values(self, names: tuple[str, ...]) -> dict[str, AnyArray]:
        """Values of constants in float32."""
        constants = self.graph.constants
        return {name: np.array(constants[name].weight.read(), np.float32) for name in names}

    @cached_property
    def proto(self) -> onnx.ModelProto:
        """The model that trainers get.

        Raises:
            ModelError: It does not fit into one message.
        """
        source = self.graph.model.proto
        size = sum(constant.weight.nbytes for constant in self.graph.constants.values())
        if size >= _LARGEST:
            raise ModelError("the model is over 2 GiB, which no trainer takes")
        made = onnx.ModelProto(ir_version=source.ir_version)
        made.opset_import.extend(source.opset_import)
        made.functions.extend(source.functions)
        graph = made.graph
        graph.name = source.graph.name or "training"
        initial = set(self.graph.constants)
        graph.input.extend(v for v in source.graph.input if v.name not in initial)
        graph.output.extend(source.graph.output)
        shown = self._shown()
        read = {shown.get(name, name) for node in self.graph.nodes for name in node.inputs}
        read |= self.graph.captured | set(self.graph.outputs)
        for name, constant in self.graph.constants.items():
            if name in read:
                graph.initializer.append(_tensor(name, constant.weight))
        for node in self.graph.nodes:
            if node.outputs and node.outputs[0] in shown:
                continue
            graph.node.add().CopyFrom(_plain(node.proto, shown))
        if made.functions:
            made = inliner.inline_local_functions(made)
        _in_single_precision(made)
        return made

    def _shown(self) -> dict[str, str]:
        """Outputs of Identity nodes that only show a constant, and which."""
        found: dict[str, str] = {}
        kept = self.graph.captured | set(self.graph.outputs)
        for node in self.graph.nodes:
            source = found.get(node.inputs[0], node.inputs[0]) if node.inputs else ""
            plain = node.op_type == "Identity" and source in self.graph.constants
            if plain and node.outputs[0] not in kept:
                found[node.outputs[0]] = source
        return found

    def written(self, values: Arrays) -> Model:
        """The model with new values of some constants, everything else as it was."""
        emitter = Emitter(self.graph)
        for name, value in values.items():
            old = self.graph.constants[name].weight
            stored = np.ascontiguousarray(value, np.float32).reshape(old.shape).astype(old.dtype)
            emitter.constants[name] = _edit(stored)
        return emitter.build()


def _edit(values: AnyArray) -> ConstantEdit:
    return ConstantEdit(values.shape, lambda _: values, values.tobytes())


def _learned(weight: Weight, node: Node) -> bool:
    """Whether a constant beside an Add or a Mul looks like a weight, not like a fixed table.

    A bias or a scale has one axis, learned positions have two and are added; rotary tables are
    multiplied, and a mask has two values.
    """
    if node.op_type not in _ADDED_OR_MULTIPLIED:
        return True
    axes = sum(size > 1 for size in weight.shape)
    if axes <= 1:
        return axes == 1
    return node.op_type == "Add" and axes == 2 and np.unique(weight.read()).size > 2


def _tensor(name: str, weight: Weight) -> onnx.TensorProto:
    array = weight.read()
    if weight.data_type in _HALVES:
        array = array.astype(np.float32)
    return numpy_helper.from_array(np.ascontiguousarray(array).reshape(weight.shape), name)


def _plain(node: onnx.NodeProto, shown: Mapping[str, str]) -> onnx.NodeProto:
    """The node as trainers see it: constants read directly, BatchNormalization as in inference."""
    made = onnx.NodeProto()
    made.CopyFrom(node)
    for position, name in enumerate(made.input):
        made.input[position] = shown.get(name, name)
    if made.op_type == "BatchNormalization":
        kept = [a for a in made.attribute if a.name not in ("training_mode", "spatial")]
        del made.attribute[:], made.output[1:]
        made.attribute.extend(kept)
    return made


def _in_single_precision(model: onnx.ModelProto) -> None:
    """Make whatever is float16 or bfloat16 float32, in place."""
    for value in (*model.graph.input, *model.graph.output):
        tensor = value.type.tensor_type
        if tensor.elem_type in _HALVES:
            tensor.elem_type = TensorProto.FLOAT
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype") and attribute.i in _HALVES:
                attribute.i = TensorProto.FLOAT
            if attribute.HasField("t") and attribute.t.data_type in _HALVES:
                array = numpy_helper.to_array(attribute.t).astype(np.float32)
                attribute.t.CopyFrom(numpy_helper.from_array(array, attribute.t.name))
    for tensor in model.graph.initializer:
        if tensor.data_type in _HALVES:
            array = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
