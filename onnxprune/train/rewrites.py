"""Operators that onnxruntime-training has no gradient for, written with those that have one.

Every rewrite computes the same function, and keeps the node's initializers as they are: a weight is
still that weight. The gradients were checked against finite differences, one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnxprune.dims import size_of
from onnxprune.types import AnyArray

Sizes = tuple[int | None, ...]


class NoRewriteError(Exception):
    """The case is not covered; the text ends a sentence."""


class Writer:
    """Writes the nodes that stand in for one node.

    Args:
        model: The model, changed in place: constants are added to it.
        shapes: Sizes of its tensors, None where they are open.
    """

    def __init__(self, model: onnx.ModelProto, shapes: Mapping[str, Sizes]) -> None:
        self.graph = model.graph
        self.shapes = shapes
        self.opset = next(e.version for e in model.opset_import if e.domain in ("", "ai.onnx"))
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self.taken = set(self.constants) | {
            name for node in model.graph.node for name in node.output
        }
        self.nodes: list[onnx.NodeProto] = []

    def fresh(self) -> str:
        """A name nothing has yet."""
        number = len(self.taken)
        while f"train_{number}" in self.taken:
            number += 1
        self.taken.add(f"train_{number}")
        return f"train_{number}"

    def constant(self, value: Any, dtype: Any = np.float32) -> str:
        """A new constant."""
        name = self.fresh()
        tensor = numpy_helper.from_array(np.asarray(value, dtype), name)
        self.graph.initializer.append(tensor)
        self.constants[name] = tensor
        return name

    def op(self, op_type: str, *inputs: str, to: str = "", **attributes: Any) -> str:
        """A new node; the name of its output, which is ``to`` where that is given."""
        made = to or self.fresh()
        self.nodes.append(helper.make_node(op_type, inputs, [made], **attributes))
        return made

    def sizes(self, name: str) -> Sizes:
        """Sizes of a tensor.

        Raises:
            NoRewriteError: Not even its rank is known.
        """
        if name not in self.shapes:
            raise NoRewriteError("on a tensor whose rank is not known")
        return self.shapes[name]

    def spatial(self, name: str) -> tuple[int, ...]:
        """Sizes behind the first two axes.

        Raises:
            NoRewriteError: They are open.
        """
        sizes = [size for size in self.sizes(name)[2:] if size is not None]
        if len(sizes) < len(self.sizes(name)) - 2:
            raise NoRewriteError("on a tensor of open height or width")
        return tuple(sizes)

    def value(self, name: str) -> AnyArray:
        """Value of a constant.

        Raises:
            NoRewriteError: It is none.
        """
        if name not in self.constants:
            raise NoRewriteError("with an input that is computed")
        return numpy_helper.to_array(self.constants[name])

    def reshape(self, x: str, shape: Sequence[int], to: str = "") -> str:
        """Reshape to fixed sizes; 0 copies, -1 is the rest."""
        return self.op("Reshape", x, self.constant(shape, np.int64), to=to)

    def unsqueezed(self, x: str, axes: Sequence[int]) -> str:
        """Unsqueeze, as this opset spells it."""
        if self.opset < 13:
            return self.op("Unsqueeze", x, axes=list(axes))
        return self.op("Unsqueeze", x, self.constant(axes, np.int64))

    def along(self, x: str, matrix: AnyArray, axis: int, rank: int, to: str = "") -> str:
        """Multiply a matrix (new, old) into one axis."""
        last = rank - 1
        order = [*range(rank)]
        order[axis], order[last] = last, axis
        held = self.constant(matrix.T)
        if axis == last:
            return self.op("MatMul", x, held, to=to)
        turned = self.op("Transpose", x, perm=order)
        return self.op("Transpose", self.op("MatMul", turned, held), to=to, perm=order)


Rewrite = Callable[[Writer, onnx.NodeProto, Mapping[str, Any]], object]
REWRITES: dict[str, Rewrite] = {}


def rewrites(*operators: str) -> Callable[[Rewrite], Rewrite]:
    """Registers a function that writes what stands in for a node of one of these operators."""

    def register(function: Rewrite) -> Rewrite:
        for one in operators:
            REWRITES[one] = function
        return function

    return register


def rewritten(model: onnx.ModelProto, frozen: frozenset[str]) -> dict[str, str]:
    """Rewrite a model in place; what could not be, by first output of the node, with the reason.

    Args:
        model: Opset 12 to 21, no functions.
        frozen: First outputs of the BatchNormalization nodes that keep their statistics.
    """
    failed = _pass(model, frozen)
    # Shapes behind an operator that inference does not know may be known now.
    return _pass(model, frozen) if failed else failed


def _pass(model: onnx.ModelProto, frozen: frozenset[str]) -> dict[str, str]:
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    shapes = {
        value.name: tuple(size_of(dim) for dim in value.type.tensor_type.shape.dim)
        for value in (*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output)
        if value.type.tensor_type.HasField("shape")
    }
    shapes |= {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    writer = Writer(model, shapes)
    failed: dict[str, str] = {}
    for node in model.graph.node:
        rewrite = REWRITES.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        if node.op_type == "BatchNormalization" and node.output[0] not in frozen:
            rewrite = None
        if rewrite is not None:
            before = len(writer.nodes)
            attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            try:
                if rewrite(writer, node, attributes) is not None:
                    continue
            except NoRewriteError as reason:
                failed[node.output[0]] = str(reason)
            del writer.nodes[before:]
        writer.nodes.append(node)
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in writer.nodes]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return failed


# -- activations -----------------------------------------------------------------------------------


@rewrites("PRelu")
def _prelu(w: Writer, node: onnx.NodeProto, _: Mapping[str, Any]) -> str:
    x, slope = node.input
    below = w.op("Mul", slope, w.op("Relu", w.op("Neg", x)))
    return w.op("Sub", w.op("Relu", x), below, to=node.output[0])


@rewrites("HardSigmoid")
def _hard_sigmoid(w: Writer, node: onnx.NodeProto, a: Mapping[str, Any]) -> str:
    line = w.op("Mul", node.input[0], w.constant(a.get("alpha", 0.2)))
    line = w.op("Add", line, w.constant(a.get("beta", 0.5)))
    return w.op("Clip", line, w.constant(0), w.constant(1), to=node.output[0])


@rewrites("HardSwish")
def _hard_swish(w: Writer, node: onnx.NodeProto, _: Mapping[str, Any]) -> str:
    x = node.input[0]
    line = w.op("Add", w.op("Mul", x, w.constant(1 / 6)), w.constant(0.5))
    gate = w.op("Clip", line, w.constant(0), w.constant(1))
    return w.op("Mul", x, gate, to=node.output[0])


def _softplus_of(w: Writer, x: str, to: str = "") -> str:
    small = w.op("Exp", w.op("Neg", w.op("Abs", x)))  # never over 1, so that nothing overflows
    return w.op("Add", w.op("Relu", x), w.op("Log", w.op("Add", small, w.constant(1))), to=to)


@rewrites("Softplus")
def _softplus(w: Writer, node: onnx.NodeProto, _: Mapping[str, Any]) -> str:
    return _softplus_of(w, node.input[0], node.output[0])


@rewrites("Mish")
def _mish(w: Writer, node: onnx.NodeProto, _: Mapping[str, Any]) -> str:
    x = node.input[0]
    return w.op("Mul", x, w.op("Tanh", _softplus_of(w, x)), to=node.output[0])


@rewrites("Softsign")
def _softsign(w: Writer, node: onnx.NodeProto, _: Mapping[str, Any]) -> str:
    x = node.input[0]
    return w.op("Div", x, w.op("Add", w.op("Abs", x), w.constant(1)), to=node.output[0])


@rewrites("Elu", "Selu", "Celu")
def _elu(w: Writer, node: onnx.NodeProto, a: Mapping[str, Any]) -> str:
    x = node.input[0]
    selu, celu = node.op_type == "Selu", node.op_type == "Celu"
    alpha = a.get("alpha", 1.67326319217681884765625 if selu else 1.0)
    below = w.op("Min", x, w.constant([0]))
    if celu:
        below = w.op("Mul", below, w.constant(1 / alpha))
    curve = w.op("Mul", w.op("Sub", w.op("Exp", below), w.constant(1)), w.constant(alpha))
    if not selu:
        return w.op("Add", w.op("Relu", x), curve, to=node.output[0])
    whole = w.op("Add", w.op("Relu", x), curve)
    gamma = w.constant(a.get("gamma", 1.05070102214813232421875))
    return w.op("Mul", whole, gamma, to=node.output[0])


@rewrites("Sum", "Mean")
def _sum(w: Writer, node: onnx.NodeProto, _: Mapping[str, Any]) -> str:
    total = node.input[0]
    for one in node.input[1:]:
        total = w.op("Add", total, one)
    factor = 1 / len(node.input) if node.op_type == "Mean" else 1.0
    return w.op("Mul", total, w.constant(factor), to=node.output[0])


@rewrites("CastLike")
def _cast_like(w: Writer, node: onnx.NodeProto, _: Mapping[str, Any]) -> str | None:
    like = w.constants.get(node.input[1])
    if like is None:
        raise NoRewriteError("with a type that is not a constant's")
    w.nodes.append(helper.make_node("Cast", [node.input[0]], [node.output[0]], to=like.data_type))
    return str(node.output[0])


# -- norms -----------------------------------------------------------------------------------------


@rewrites("BatchNormalization")
def _frozen_batch_norm(w: Writer, node: onnx.NodeProto, a: Mapping[str, Any]) -> str:
    """With the running statistics, in training too."""
    x, scale, bias, mean, variance = node.input
    tail = range(1, len(w.sizes(x)) - 1)
    wide = [w.unsqueezed(name, tail) if tail else name for name in (scale, bias, mean, variance)]
    deviation = w.op("Sqrt", w.op("Add", wide[3], w.constant(a.get("epsilon", 1e-5))))
    even = w.op("Div", w.op("Sub", x, wide[2]), deviation)
    return w.op("Add", w.op("Mul", even, wide[0]), wide[1], to=node.output[0])


def _even(w: Writer, x: str, epsilon: float) -> str:
    """Mean 0 and variance 1 over what follows the first two axes."""
    off = w.op("Sub", x, w.op("GlobalAveragePool", x))
    variance = w.op("GlobalAveragePool", w.op("Mul", off, off))
    return w.op("Div", off, w.op("Sqrt", w.op("Add", variance, w.constant(epsilon))))


@rewrites("InstanceNormalization")
def _instance_norm(w: Writer, node: onnx.NodeProto, a: Mapping[str, Any]) -> str:
    x, scale, bias = node.input
    tail = range(1, len(w.sizes(x)) - 1)
    even = _even(w, x, a.get("epsilon", 1e-5))
    scaled = w.op("Mul", even, w.unsqueezed(scale, tail))
    return w.op("Add", scaled, w.unsqueezed(bias, tail), to=node.output[0])


@rewrites("GroupNormalization")
def _group_norm(w: Writer, node: onnx.NodeProto, a: Mapping[str, Any]) -> str:
    x, scale, bias = node.input
    sizes, groups = w.sizes(x), a["num_groups"]
    tail = range(1, len(sizes) - 1)
    even = _even(w, w.reshape(x, [0, groups, -1]), a.get("epsilon", 1e-5))
    if w.opset < 21:  # scale and bias of groups
        even = w.op("Mul", even, w.unsqueezed(scale, [1]))
        even = w.op("Add", even, w.unsqueezed(bias, [1]))
        return w.op("Reshape", even, w.op("Shape", x), to=node.output[0])
    whole = w.op("Reshape", even, w.op("Shape", x))
    scaled = w.op("Mul", whole, w.unsqueezed(scale, tail))
    return w.op("Add", scaled, w.unsqueezed(bias, tail), to=node.output[0])


@rewrites("LayerNormalization")
def _layer_norm(w: Writer, node: onnx.NodeProto, _: Mapping[str, Any]) -> str:
    """The gradient wants all three outputs declared."""
    made = onnx.NodeProto()
    made.CopyFrom(node)
    del made.output[1:]
    made.output.extend([w.fresh(), w.fresh()])
    w.nodes.append(made)
    return str(node.output[0])


@rewrites("LRN")
def _lrn(w: Writer, node: onnx.NodeProto, a: Mapping[str, Any]) -> str:
    x, size = node.input[0], a["size"]
    channels = w.sizes(x)[1]
    if channels is None:
        raise NoRewriteError("on an open number of channels")
    band = np.zeros((channels, channels))
    for row in range(channels):
        band[row, max(0, row - (size - 1) // 2) : row + size // 2 + 1] = 1
    kernel = w.constant(band.reshape(channels, channels, *[1] * (len(w.sizes(x)) - 2)))
    around = w.op("Conv", w.op("Mul", x, x), kernel)
    line = w.op("Mul", around, w.constant(a.get("alpha", 1e-4) / size))
    line = w.op("Add", line, w.constant(a.get("bias", 1.0)))
    power = w.op("Pow", line, w.constant(a.get("beta", 0.75)))
    return w.op("Div", x, power, to=node.output[0])
