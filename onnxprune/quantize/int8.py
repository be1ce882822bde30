"""8-bit integers as Q/DQ pairs, in the form TensorRT takes.

Every input of a layer with weights goes through QuantizeLinear and DequantizeLinear, weights are
stored as int8 with a scale for each output channel; all is symmetric, zero points are zero. Biases
stay floats, and nothing stands behind a layer; of a residual sum the operand that no layer before
it makes is quantized, so that the sum can be taken where the layer's result is still at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx
from onnx import TensorProto, helper

from onnxprune.graph import captured_names
from onnxprune.model import Model
from onnxprune.quantize.ready import put, swept
from onnxprune.types import AnyArray, KeptNode
from onnxprune.weights import SparseLayer, sparse_layers

_STEPS = 127.0
_TAKEN = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_TINY = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class Quantizable:
    """A layer that can compute in int8.

    Attributes:
        label: What to call it.
        op_type: Its operator.
        output: Its output, which identifies it.
        activation: Tensor that it reads beside the weight.
        weight: Name of the weight as the node reads it.
        axis: Axis of the weight's output channels, None for one scale for all.
        value: The weight as it reads it.
        stored: Name of the stored tensor, where the node reads just that; else "".
    """

    label: str
    op_type: str
    output: str
    activation: str
    weight: str
    axis: int | None
    value: Callable[[], AnyArray]
    stored: str


@dataclass(frozen=True)
class Layers:
    """What can be quantized in a model.

    Attributes:
        layers: Layers with weights.
        sums: Operands of residual sums: output of the Add, position, tensor, the layer before it.
        kept: What stays in float, and why.
    """

    layers: tuple[Quantizable, ...]
    sums: tuple[tuple[str, int, str, str], ...]
    kept: tuple[KeptNode, ...]

    @property
    def activations(self) -> tuple[str, ...]:
        """Every tensor whose range is needed."""
        names = [one.activation for one in self.layers] + [one[2] for one in self.sums]
        return tuple(dict.fromkeys(names))


def find_layers(model: Model, wanted: Callable[[onnx.NodeProto], bool]) -> Layers:
    """The layers that can compute in int8.

    Args:
        model: Without local functions, batch norms folded.
        wanted: Whether the user's filters leave a node in.
    """
    layers, kept = [], []
    for layer in sparse_layers(model):
        why = "you asked for it" if not wanted(layer.node) else _why_not(layer)
        if why:
            kept.append(KeptNode(layer.label, layer.node.op_type, why))
        else:
            layers.append(_quantizable(layer))
    return Layers(tuple(layers), tuple(_sums(model, layers)), tuple(kept))


def _why_not(layer: SparseLayer) -> str:
    if layer.scope:
        return "it is inside a body"
    if layer.node.domain not in ("", "ai.onnx") or layer.node.op_type not in _TAKEN:
        return f"Q/DQ pairs are for {', '.join(_TAKEN)}"
    if layer.seen is None:
        return layer.why_not or "its weight is no constant"
    if layer.stored.weight.data_type != TensorProto.FLOAT or layer.seen.quantized:
        kind = TensorProto.DataType.Name(layer.stored.weight.data_type).lower()
        return f"its weight is {kind}"
    if not layer.form:
        return layer.why_not or "its weight is no matrix"
    if layer.position != 1:
        return "its weight is the first operand"
    if not layer.stored.weight.size:
        return "its weight is empty"
    return ""


def _quantizable(layer: SparseLayer) -> Quantizable:
    assert layer.seen is not None
    seen, rank = layer.seen, len(layer.seen.shape)
    axis: int | None = {"conv": 0, "deconv": 1, "rows": rank - 2, "columns": rank - 1}[layer.form]
    if layer.form == "deconv" and layer.groups > 1:
        axis = None  # channel k of every group shares index k
    plain = not seen.steps and layer.node.input[1] == layer.stored.name
    return Quantizable(
        layer.label,
        layer.node.op_type,
        layer.key,
        layer.node.input[0],
        layer.node.input[1],
        axis,
        seen.value,
        layer.stored.name if plain else "",
    )


def _sums(model: Model, layers: list[Quantizable]) -> list[tuple[str, int, str, str]]:
    """Of each sum of a convolution's result and something else, that something else."""
    graph = model.proto.graph
    readers: dict[str, int] = {}
    for node in graph.node:
        for name in (*node.input, *captured_names(node)):
            readers[name] = readers.get(name, 0) + 1
    for value in graph.output:
        readers[value.name] = readers.get(value.name, 0) + 1
    made = {one.output: one for one in layers if one.op_type == "Conv"}
    constants = set(model.weights())
    found = []
    for node in graph.node:
        if node.op_type != "Add" or node.domain not in ("", "ai.onnx"):
            continue
        for at in (0, 1):
            mine, other = node.input[at], node.input[1 - at]
            if mine in made and readers[mine] == 1 and other not in constants and mine != other:
                found.append((node.output[0], 1 - at, other, made[mine].label))
                break
    return found


def quantized(
    model: Model,
    found: Layers,
    thresholds: Mapping[str, float],
    floats: Collection[str] = (),
) -> Model:
    """The model with Q/DQ pairs.

    Args:
        model: That ``found`` was found in.
        found: From ``find_layers``.
        thresholds: Largest magnitude of each activation.
        floats: Labels of layers that stay in float all the same.
    """
    return _Writer(model, found, thresholds, set(floats)).build()


class _Writer:
    def __init__(
        self,
        model: Model,
        found: Layers,
        thresholds: Mapping[str, float],
        floats: set[str],
    ) -> None:
        self.model, self.found, self.thresholds = model, found, thresholds
        self.layers = {
            one.output: one
            for one in found.layers
            if one.label not in floats and thresholds.get(one.activation, 0.0) > 0
        }
        labels = {one.label for one in self.layers.values()}
        self.sums = {
            (output, at): name
            for output, at, name, label in found.sums
            if label in labels and thresholds.get(name, 0.0) > 0
        }
        self.proto = onnx.ModelProto()
        self.proto.CopyFrom(model.proto)
        self.graph = self.proto.graph
        self.deferred = dict(model.deferred)
        self.taken = {name for node in self.graph.node for name in (*node.input, *node.output)}
        self.taken |= {value.name for value in (*self.graph.input, *self.graph.output)}
        self.taken |= {tensor.name for tensor in self.graph.initializer}
        self.shared = self._shared()
        self.weights: dict[tuple[str, int | None], str] = {}
        self.pairs: dict[str, str] = {}
        self.first: list[onnx.NodeProto] = []  # reads constants only

    def _shared(self) -> set[str]:
        """Stored tensors that something else than the layers reads, or reads along other axes."""
        graph = self.graph
        shared = {value.name for value in (*graph.input, *graph.output)}
        axes: dict[str, int | None] = {}
        for node in graph.node:
            shared.update(captured_names(node))
            layer = self.layers.get(node.output[0]) if node.output else None
            for at, name in enumerate(node.input):
                mine = layer is not None and at == 1 and name == layer.stored
                if layer is None or not mine or axes.setdefault(name, layer.axis) != layer.axis:
                    shared.add(name)
        return shared

    def build(self) -> Model:
        wanted = {one.activation for one in self.layers.values()} | set(self.sums.values())
        body: list[onnx.NodeProto] = []
        for value in self.graph.input:
            if value.name in wanted:
                body += self._pair(value.name)
        for node in self.graph.node:
            layer = self.layers.get(node.output[0]) if node.output else None
            if layer is not None:
                node.input[0] = self.pairs[layer.activation]
                node.input[1] = self._weight(layer)
            for at in range(len(node.input)):
                if node.output and (node.output[0], at) in self.sums:
                    node.input[at] = self.pairs[self.sums[node.output[0], at]]
            body.append(node)
            for name in node.output:
                if name in wanted:
                    body += self._pair(name)
        order = [onnx.NodeProto() for _ in (*self.first, *body)]
        for copy, node in zip(order, (*self.first, *body), strict=True):
            copy.CopyFrom(node)
        del self.graph.node[:]
        self.graph.node.extend(order)
        return swept(replace(self.model, proto=self.proto, deferred=self.deferred))

    def _pair(self, name: str) -> list[onnx.NodeProto]:
        """QuantizeLinear and DequantizeLinear of an activation."""
        if name in self.pairs:
            return []
        scale, zero = self._fresh(f"{name}_scale"), self._fresh(f"{name}_zero_point")
        step = max(self.thresholds[name] / _STEPS, _TINY)
        put(self.graph, self.deferred, scale, np.array(step, np.float32))
        put(self.graph, self.deferred, zero, np.array(0, np.int8))
        small, back = self._fresh(f"{name}_quantized"), self._fresh(f"{name}_dequantized")
        self.pairs[name] = back
        return [
            helper.make_node("QuantizeLinear", [name, scale, zero], [small], small),
            helper.make_node("DequantizeLinear", [small, scale, zero], [back], back),
        ]

    def _weight(self, layer: Quantizable) -> str:
        """Store the weight as int8; the name of what it is dequantized to."""
        key = (layer.weight, layer.axis)
        if key in self.weights:
            return self.weights[key]
        values = layer.value()
        scale = steps_of(values, layer.axis)
        own = bool(layer.stored) and layer.stored not in self.shared
        name = layer.stored if own else self._fresh(f"{layer.weight}_int8")
        put(self.graph, self.deferred, name, to_int8(values, scale, layer.axis))
        scale_name, zero = self._fresh(f"{name}_scale"), self._fresh(f"{name}_zero_point")
        put(self.graph, self.deferred, scale_name, scale)
        put(self.graph, self.deferred, zero, np.zeros(scale.shape, np.int8))
        back = self._fresh(f"{name}_dequantized")
        node = helper.make_node("DequantizeLinear", [name, scale_name, zero], [back], back)
        if layer.axis is not None:
            node.attribute.append(helper.make_attribute("axis", layer.axis))
        self.first.append(node)
        self.weights[key] = back
        return back

    def _fresh(self, name: str) -> str:
        number, free = 2, name
        while free in self.taken:
            free, number = f"{name}__{number}", number + 1
        self.taken.add(free)
        return free


def steps_of(weight: AnyArray, axis: int | None) -> AnyArray:
    """The size of one step for each output channel, or one for all; 1 where all is zero."""
    magnitude = np.abs(np.asarray(weight, np.float32))
    others = None if axis is None else tuple(at for at in range(magnitude.ndim) if at != axis)
    step = np.asarray(magnitude.max(axis=others), np.float32) / np.float32(_STEPS)
    return np.asarray(np.where(step > 0, np.maximum(step, _TINY), 1.0), np.float32)


def to_int8(weight: AnyArray, steps: AnyArray, axis: int | None) -> AnyArray:
    """Weights in whole steps, -127 to 127: zero stays zero."""
    if axis is not None:
        steps = steps.reshape(tuple(-1 if at == axis else 1 for at in range(weight.ndim)))
    whole = np.rint(np.divide(weight, steps, dtype=np.float32))
    return np.asarray(np.clip(whole, -_STEPS, _STEPS), np.int8)
