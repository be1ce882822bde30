"""Constant weights of layers as matrices, in every graph, body and function of a model.

A layer multiplies what it reads with a weight. Between the stored tensor and the layer there may be
nodes that only show the tensor in another form; they are followed step by step, there and back, so
that a choice made on the layer's matrix lands on the right stored elements.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from onnxprune import messages
from onnxprune.chains import (
    Computed,
    Scaled,
    Seen,
    Stored,
    axis_before,
    shown,
    stored_places,
    stored_values,
    widened,
)
from onnxprune.model import Model, Weight
from onnxprune.presented import (
    FLOATS,
    MICROSOFT,
    Attributes,
    Env,
    attributes_of,
    domain_of,
    label_of,
    numbers_of,
    presented,
    reader_of,
)
from onnxprune.types import AnyArray, FloatArray, Scalar, Shape

_FIRST_IR_WITH_PRIVATE_INITIALIZERS = 4
_CONVOLUTIONS = {("", "Conv"), (MICROSOFT, "FusedConv"), ("", "ConvTranspose")}
_GEMMS = {("", "Gemm"), (MICROSOFT, "FusedGemm")}
_PRODUCTS = {("", "MatMul")}
_PRODUCTS |= {
    (MICROSOFT, name) for name in ("FusedMatMul", "FusedMatMulActivation", "TransposeMatMul")
}
# Operators with weights that no sparse kernel takes, and the inputs that are weights.
_OTHERS: Mapping[str, tuple[int, ...]] = {
    "Attention": (1,),
    "ConvInteger": (1,),
    "DeformConv": (1,),
    "DynamicQuantizeMatMul": (1,),
    "Einsum": (0, 1),
    "GRU": (1, 2),
    "LSTM": (1, 2),
    "MatMulInteger": (0, 1),
    "MatMulNBits": (1,),
    "QAttention": (1,),
    "QGemm": (3,),
    "QLinearConv": (3,),
    "QLinearMatMul": (0, 3),
    "RNN": (1, 2),
}
_BATCHES = ("transBatchA", "transBatchB")
_ASK_A_SHAPE = ("Shape", "Size")


@dataclass(frozen=True, eq=False)
class SparseLayer:
    """A node that multiplies by a weight, and the weight as matrices.

    Attributes:
        node: The node; inside a function as it stands there.
        scope: "" in the main graph, else the way to the body or function it is in.
        position: Which of its inputs the weight is.
        seen: The weight as the node reads it, None where it is not constant.
        form: ``conv``, ``deconv``, ``rows`` (summed over the last axis), ``columns`` (over the one
            before), or "" where that is not known.
        groups: Groups of a convolution, matrices of a stack.
        why_not: Why no pattern can help it, whatever the pattern; None where one may.
    """

    node: onnx.NodeProto = field(repr=False)
    scope: str
    position: int
    seen: Seen | None
    form: str = ""
    groups: int = 1
    why_not: str | None = None

    @property
    def label(self) -> str:
        """What to call it."""
        own = self.node.name or self.key
        return f"{self.scope}/{own}" if self.scope else own

    @property
    def key(self) -> str:
        """First output that has a name."""
        return next((name for name in self.node.output if name), self.node.name)

    @property
    def stored(self) -> Stored:
        """The tensor behind the weight."""
        assert self.seen is not None
        return self.seen.stored

    @property
    def taps(self) -> int:
        """Kernel positions of a convolution, 1 elsewhere."""
        return prod(self._shape[2:]) if self.form in ("conv", "deconv") else 1

    @property
    def channels(self) -> int:
        """Channels that each output sums over."""
        return self.shape[2] // max(1, self.taps)

    @property
    def shape(self) -> Shape:
        """Of the weight as matrices: (groups, outputs of a group, taps * channels)."""
        shape, groups = self._shape, self.groups
        match self.form:
            case "conv":
                return (groups, shape[0] // groups, prod(shape[1:]))
            case "deconv":
                return (groups, shape[1], shape[0] // groups * prod(shape[2:]))
            case "rows":
                return (groups, shape[-2], shape[-1])
        return (groups, shape[-1], shape[-2])

    @property
    def axis(self) -> int:
        """Axis of the stored tensor along which the pattern runs."""
        assert self.seen is not None
        axis = {"conv": 1, "deconv": 0, "rows": -1, "columns": -2}[self.form] % len(self._shape)
        for step in reversed(self.seen.steps):
            axis = axis_before(step, axis)
        return axis

    def matrix(self, stored: AnyArray | None = None) -> FloatArray:
        """The weight as matrices, in float32 or float64; ``stored`` stands in for its values."""
        assert self.seen is not None
        given = self.stored.weight.read() if stored is None else stored
        return self._cut(widened(shown(given, self.seen.steps)))

    def places(self, matrix: NDArray[Scalar]) -> NDArray[Scalar]:
        """A mask of the matrices, or what else is no value, in the stored tensor's form."""
        assert self.seen is not None
        return stored_places(self._uncut(matrix), self.seen.steps)

    def zero(self) -> AnyArray:
        """What is stored for zero: a scalar, or an array where zero points differ."""
        assert self.seen is not None
        dtype = self.stored.weight.dtype
        if not any(isinstance(step, Scaled) and step.offset for step in self.seen.steps):
            return np.zeros((), dtype)
        return stored_values(np.zeros(self._shape, np.float32), self.seen.steps, dtype)

    @property
    def _shape(self) -> Shape:
        return (0, 0) if self.seen is None else self.seen.shape

    def _cut(self, weight: NDArray[Scalar]) -> NDArray[Scalar]:
        groups, outputs, _ = self.shape
        match self.form:
            case "conv":
                cut = weight.reshape(groups, outputs, self.channels, self.taps)
                return cut.transpose(0, 1, 3, 2).reshape(self.shape)
            case "deconv":
                cut = weight.reshape(groups, self.channels, outputs, self.taps)
                return cut.transpose(0, 2, 3, 1).reshape(self.shape)
            case "rows":
                return weight.reshape(self.shape)
        return np.ascontiguousarray(
            weight.reshape(groups, self.channels, outputs).transpose(0, 2, 1)
        )

    def _uncut(self, matrix: NDArray[Scalar]) -> NDArray[Scalar]:
        groups, outputs, _ = self.shape
        match self.form:
            case "conv":
                cut = matrix.reshape(groups, outputs, self.taps, self.channels)
                return cut.transpose(0, 1, 3, 2).reshape(self._shape)
            case "deconv":
                cut = matrix.reshape(groups, outputs, self.taps, self.channels)
                return cut.transpose(0, 3, 1, 2).reshape(self._shape)
            case "rows":
                return matrix.reshape(self._shape)
        return matrix.transpose(0, 2, 1).reshape(self._shape)


def sparse_layers(model: Model) -> tuple[SparseLayer, ...]:
    """Every layer that multiplies by a weight, in the order in which nodes run.

    Layers without a constant weight are among them, with the reason; a product of two activations
    has no weight and is not. What else reads a weight stands in ``Stored.readers``.
    """
    walk = _Walk(model)
    return tuple(walk.layers())


class _Walk:
    def __init__(self, model: Model) -> None:
        self.model = model
        self.functions = {
            (domain_of(one.domain), one.name, getattr(one, "overload", "")): one
            for one in model.proto.functions
        }
        self.known: dict[int, Stored] = {}
        self.found: list[SparseLayer] = []

    def layers(self) -> Iterator[SparseLayer]:
        """Walk the main graph and all that it reaches."""
        graph = self.model.proto.graph
        env: Env = {}
        self._body(graph, env, "")
        for value in graph.output:
            self._read(env.get(value.name), "it is a graph output")
        yield from self.found

    # -- graphs ------------------------------------------------------------------------------

    def _body(self, graph: onnx.GraphProto, env: Env, scope: str) -> None:
        """Add to ``env`` what the graph makes of constants."""
        overridable = (
            not scope and self.model.proto.ir_version >= _FIRST_IR_WITH_PRIVATE_INITIALIZERS
        )
        inputs = {value.name for value in graph.input}
        for name in inputs:
            env.pop(name, None)
        for tensor in graph.initializer:
            open_ = overridable and tensor.name in inputs
            pinned = "it is also a graph input, so a caller may override it" if open_ else None
            env[tensor.name] = self._stored(tensor, tensor.name, scope, pinned)
        for sparse in graph.sparse_initializer:
            env[sparse.values.name] = Computed("its weight is stored as a sparse tensor")
        self._nodes(graph.node, env, scope, {})

    def _stored(
        self, tensor: TensorProto, name: str, scope: str, pinned: str | None = None
    ) -> Seen:
        if id(tensor) not in self.known:
            deferred = None if scope else self.model.deferred.get(name)
            weight = deferred or Weight.from_tensor(tensor, self.model.directory, name=name)
            path = f"{scope}/{name}" if scope else name
            self.known[id(tensor)] = Stored(path, tensor, weight, not scope, pinned)
        found = self.known[id(tensor)]
        return Seen(found, found.weight.shape)

    def _nodes(
        self, nodes: Sequence[onnx.NodeProto], env: Env, scope: str, bound: Attributes
    ) -> None:
        for node in nodes:
            attributes = attributes_of(node, bound)
            called = self.functions.get(
                (domain_of(node.domain), node.op_type, getattr(node, "overload", ""))
            )
            if called is not None:
                self._call(called, node, attributes, env, scope)
            elif messages.is_constant(node):
                self._constant(node, attributes, env, scope)
            else:
                self._node(node, attributes, env, scope)

    def _constant(self, node: onnx.NodeProto, attributes: Attributes, env: Env, scope: str) -> None:
        value = attributes.get("value")
        if value is not None and value.HasField("t"):
            env[node.output[0]] = self._stored(value.t, node.output[0], scope)
            return
        numbers = numbers_of(attributes)
        if numbers is None:
            env[node.output[0]] = Computed(f"{label_of(node)} computes its weight")
            return
        weight = Weight.from_array(node.output[0], numbers)
        stored = Stored(node.output[0], TensorProto(), weight, False, "it is no tensor")
        env[node.output[0]] = Seen(stored, numbers.shape)

    def _call(
        self,
        function: onnx.FunctionProto,
        node: onnx.NodeProto,
        attributes: Attributes,
        env: Env,
        scope: str,
    ) -> None:
        inner: Env = {
            formal: env[given]
            for formal, given in zip(function.input, node.input, strict=False)
            if given in env
        }
        bound = {one.name: one for one in function.attribute_proto} | dict(attributes)
        self._nodes(function.node, inner, self._inside(node, scope), bound)
        for formal, given in zip(function.output, node.output, strict=False):
            if given and formal in inner:
                env[given] = inner[formal]

    def _node(self, node: onnx.NodeProto, attributes: Attributes, env: Env, scope: str) -> None:
        inside = self._inside(node, scope)
        for attribute in attributes.values():
            for body in (*([attribute.g] if attribute.HasField("g") else ()), *attribute.graphs):
                inner = dict(env)
                self._body(body, inner, inside)
                for value in body.output:
                    self._read(inner.get(value.name), f"{label_of(node)} hands it on")
        if node.op_type in _ASK_A_SHAPE:
            return
        shown_ = presented(node, attributes, env)
        if shown_ is not None:
            env[node.output[0]] = shown_
            for name in node.input:
                value = env.get(name)
                if isinstance(value, Seen) and value.stored is not shown_.stored:
                    self._read(value, reader_of(node))
            return
        weights = self._layer(node, attributes, env, scope)
        for position, name in enumerate(node.input):
            if position not in weights:
                self._read(env.get(name), reader_of(node))
        if node.input and all(name in env for name in node.input if name):
            env.update(
                (name, Computed(f"{label_of(node)} computes its weight"))
                for name in node.output
                if name
            )

    @staticmethod
    def _inside(node: onnx.NodeProto, scope: str) -> str:
        key = next((name for name in node.output if name), node.name)
        return f"{scope}/{key}" if scope else key

    @staticmethod
    def _read(value: Seen | Computed | None, by: str) -> None:
        if isinstance(value, Seen) and by not in value.stored.readers:
            value.stored.readers.append(by)

    # -- layers ------------------------------------------------------------------------------

    def _layer(
        self, node: onnx.NodeProto, attributes: Attributes, env: Env, scope: str
    ) -> tuple[int, ...]:
        """Note the layer that a node is; the inputs of it that are weights."""
        kind = (domain_of(node.domain), node.op_type)
        if kind in _CONVOLUTIONS:
            positions: tuple[int, ...] = (1,)
        elif kind in _GEMMS | _PRODUCTS:
            constant = tuple(at for at in (0, 1) if node.input[at] in env)
            if kind in _PRODUCTS and not constant:
                return ()
            if len(constant) == 2:
                return ()
            positions = constant or (1,)
        else:
            for at in _OTHERS.get(node.op_type, ()):
                value = env.get(node.input[at]) if at < len(node.input) else None
                if isinstance(value, Seen) and len(value.shape) > 1:
                    why = f"sparse kernels take no {node.op_type}"
                    self.found.append(SparseLayer(node, scope, at, value, why_not=why))
            return ()
        for at in positions:
            self.found.append(_layer(node, attributes, scope, at, env.get(node.input[at])))
        return positions


def _layer(
    node: onnx.NodeProto,
    attributes: Attributes,
    scope: str,
    position: int,
    value: Seen | Computed | None,
) -> SparseLayer:
    """The layer that a node is, whose weight is ``value``."""
    if not isinstance(value, Seen):
        how = value.how if value else "its weight is no constant"
        return SparseLayer(node, scope, position, None, why_not=how)
    form, groups = _form(node, attributes, position, value.shape)
    why = None
    if not form:
        why = f"a weight of shape {_spelled(value.shape)} is no matrix"
    elif any(attributes[name].i for name in _BATCHES if name in attributes):
        why = "it transposes batches"
    elif value.quantized or not _is_weight(value):
        kind = TensorProto.DataType.Name(value.stored.weight.data_type).lower()
        why = f"its weight is {kind}"
    elif not prod(value.shape):
        why = "its weight is empty"
    elif form in ("conv", "deconv"):
        filters = value.shape[0]
        if groups < 1 or filters % groups:
            why = f"{filters} filters in {groups} groups"
        elif groups > 1 and (value.shape[1] if form == "conv" else filters // groups) == 1:
            why = "depthwise: each output sums over 1 channel"
    return SparseLayer(node, scope, position, value, form, groups, why)


def _is_weight(value: Seen) -> bool:
    """Floats, or integers that something scales."""
    scaled = any(isinstance(step, Scaled) for step in value.steps)
    return value.stored.weight.data_type in FLOATS or scaled


def _form(
    node: onnx.NodeProto, attributes: Attributes, position: int, shape: Shape
) -> tuple[str, int]:
    """How a weight is laid out, and how many matrices it holds."""
    if node.op_type in ("Conv", "FusedConv", "ConvTranspose"):
        groups = int(attributes["group"].i) if "group" in attributes else 1
        form = "deconv" if node.op_type == "ConvTranspose" else "conv"
        return (form, groups) if len(shape) > 2 else ("", 1)
    if len(shape) < 2:
        return "", 1
    flag = attributes.get("transB" if position == 1 else "transA")
    turned = flag is not None and bool(flag.i)
    return ("rows" if (position == 1) == turned else "columns"), prod(shape[:-2])


def _spelled(shape: Shape) -> str:
    return "x".join(map(str, shape)) or "scalar"
