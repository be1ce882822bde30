"""Constant weights of layers as matrices, in every graph, body and function of a model.

A layer multiplies what it reads with a weight. Between the stored tensor and the layer there may be
nodes that only show the tensor in another form; they are followed step by step, there and back, so
that a choice made on the layer's matrix lands on the right stored elements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from onnxprune import validate
from onnxprune.io import Model, Weight
from onnxprune.types import AnyArray, FloatArray, Scalar, Shape

_FIRST_IR_WITH_PRIVATE_INITIALIZERS = 4
_FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE}
_MS = "com.microsoft"
_CONVOLUTIONS = {("", "Conv"), (_MS, "FusedConv"), ("", "ConvTranspose")}
_GEMMS = {("", "Gemm"), (_MS, "FusedGemm")}
_PRODUCTS = {("", "MatMul")}
_PRODUCTS |= {(_MS, name) for name in ("FusedMatMul", "FusedMatMulActivation", "TransposeMatMul")}
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


# -- from a stored tensor to what a layer reads ----------------------------------------------------


@dataclass(frozen=True, slots=True)
class Transposed:
    """Axes in another order."""

    perm: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Reshaped:
    """The same elements under another shape."""

    before: Shape
    after: Shape


@dataclass(frozen=True, slots=True, eq=False)
class Scaled:
    """Values v become (v - offset) * factor; both broadcast to the shape they meet."""

    factor: Callable[[], AnyArray] = field(repr=False)
    offset: Callable[[], AnyArray] | None = field(default=None, repr=False)


Step = Transposed | Reshaped | Scaled


@dataclass(frozen=True, eq=False)
class Stored:
    """A constant tensor as the model stores it.

    Attributes:
        name: As recipes have it: the initializer or the output of the Constant node, inside bodies
            and functions behind the first output of the node around it.
        tensor: The message.
        weight: Its values.
        top: It belongs to the main graph.
        pinned: Why it may not be changed, or None.
        readers: What else reads it than layers, in words.
    """

    name: str
    tensor: TensorProto = field(repr=False)
    weight: Weight = field(repr=False)
    top: bool
    pinned: str | None = None
    readers: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """A stored tensor in the form that some node reads."""

    stored: Stored
    shape: Shape
    steps: tuple[Step, ...] = ()
    quantized: bool = False

    def then(self, step: Step, shape: Shape | None = None) -> Seen:
        """One step further."""
        return Seen(self.stored, shape or self.shape, (*self.steps, step), self.quantized)

    def reshaped(self, shape: Shape) -> Seen:
        """Under another shape."""
        return self.then(Reshaped(self.shape, shape), shape)

    def value(self) -> AnyArray:
        """What the node reads; 16-bit floats as float32."""
        return shown(self.stored.weight.read(), self.steps)


@dataclass(frozen=True, slots=True)
class _Computed:
    """A tensor made from constants in a way that is not followed."""

    how: str


def shown(stored: AnyArray, steps: Sequence[Step]) -> AnyArray:
    """A stored tensor as it is after some steps, narrow floats widened, which loses nothing."""
    array = stored
    for step in steps:
        match step:
            case Transposed(perm):
                array = array.transpose(perm)
            case Reshaped(_, shape):
                array = array.reshape(shape)
            case Scaled(factor, offset):
                values = _widened(array)
                if offset is not None:
                    values = np.subtract(values, _widened(offset()))
                array = np.multiply(values, _widened(factor()))
    return array


def stored_places(shown_: NDArray[Scalar], steps: Sequence[Step]) -> NDArray[Scalar]:
    """The way back of something that is no value, such as a mask."""
    array = shown_
    for step in reversed(steps):
        match step:
            case Transposed(perm):
                array = array.transpose(np.argsort(perm))
            case Reshaped(shape, _):
                array = array.reshape(shape)
    return array


def stored_values(values: AnyArray, steps: Sequence[Step], dtype: np.dtype[np.generic]) -> AnyArray:
    """The way back of values: the stored tensor that comes nearest to showing them."""
    array = values
    for at in range(len(steps) - 1, -1, -1):
        step = steps[at]
        if not isinstance(step, Scaled):
            array = stored_places(array, (step,))
            continue
        factor = np.broadcast_to(_widened(step.factor()), array.shape)
        array = np.divide(array, factor, out=np.zeros_like(array), where=factor != 0)
        if step.offset is not None:
            array = np.add(array, _widened(step.offset()))
    if _is_integer(dtype):
        limits = ml_dtypes.iinfo(dtype)  # type: ignore[no-untyped-call]  # no stub
        array = np.clip(np.rint(array), int(limits.min), int(limits.max))
    return array.astype(dtype)


def _widened(array: AnyArray) -> FloatArray:
    if array.dtype == np.float64:
        return np.asarray(array, np.float64)
    return np.asarray(array, np.float32)


def _is_integer(dtype: np.dtype[np.generic]) -> bool:
    return dtype.kind in "iu" or dtype.name.startswith(("int", "uint"))


def _axis_before(step: Step, axis: int) -> int:
    """The axis along which neighbours lie before a step, if they lie along ``axis`` after it."""
    match step:
        case Transposed(perm):
            return perm[axis]
        case Reshaped(before, after):
            apart = prod(after[axis + 1 :])
            for candidate in range(len(before)):
                stride = prod(before[candidate + 1 :])
                if stride <= apart < stride * before[candidate]:
                    return candidate
            return 0
    return axis


# -- layers ----------------------------------------------------------------------------------------


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
            axis = _axis_before(step, axis)
        return axis

    def matrix(self, stored: AnyArray | None = None) -> FloatArray:
        """The weight as matrices, in float32 or float64; ``stored`` stands in for its values."""
        assert self.seen is not None
        given = self.stored.weight.read() if stored is None else stored
        return self._cut(_widened(shown(given, self.seen.steps)))

    def places(self, matrix: NDArray[Scalar]) -> NDArray[Scalar]:
        """A mask of the matrices, or what else is no value, in the stored tensor's form."""
        assert self.seen is not None
        return stored_places(self._uncut(matrix), self.seen.steps)

    def values(self, matrix: AnyArray) -> AnyArray:
        """New matrices as a stored tensor of the same type."""
        assert self.seen is not None
        return stored_values(self._uncut(matrix), self.seen.steps, self.stored.weight.dtype)

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
        return weight.reshape(groups, self.channels, outputs).transpose(0, 2, 1)

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


_Env = dict[str, Seen | _Computed]
_Attributes = Mapping[str, onnx.AttributeProto]


class _Walk:
    def __init__(self, model: Model) -> None:
        self.model = model
        self.functions = {
            (_domain(one.domain), one.name, getattr(one, "overload", "")): one
            for one in model.proto.functions
        }
        self.known: dict[int, Stored] = {}
        self.found: list[SparseLayer] = []

    def layers(self) -> Iterator[SparseLayer]:
        """Walk the main graph and all that it reaches."""
        graph = self.model.proto.graph
        env: _Env = {}
        self._body(graph, env, "")
        for value in graph.output:
            self._read(env.get(value.name), "it is a graph output")
        yield from self.found

    # -- graphs ------------------------------------------------------------------------------

    def _body(self, graph: onnx.GraphProto, env: _Env, scope: str) -> None:
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
            env[sparse.values.name] = _Computed("its weight is stored as a sparse tensor")
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
        self, nodes: Sequence[onnx.NodeProto], env: _Env, scope: str, bound: _Attributes
    ) -> None:
        for node in nodes:
            attributes = _attributes(node, bound)
            called = self.functions.get(
                (_domain(node.domain), node.op_type, getattr(node, "overload", ""))
            )
            if called is not None:
                self._call(called, node, attributes, env, scope)
            elif validate.is_constant(node):
                self._constant(node, attributes, env, scope)
            else:
                self._node(node, attributes, env, scope)

    def _constant(
        self, node: onnx.NodeProto, attributes: _Attributes, env: _Env, scope: str
    ) -> None:
        value = attributes.get("value")
        if value is not None and value.HasField("t"):
            env[node.output[0]] = self._stored(value.t, node.output[0], scope)
            return
        numbers = _numbers(attributes)
        if numbers is None:
            env[node.output[0]] = _Computed(f"{_label(node)} computes its weight")
            return
        weight = Weight.from_array(node.output[0], numbers)
        stored = Stored(node.output[0], TensorProto(), weight, False, "it is no tensor")
        env[node.output[0]] = Seen(stored, numbers.shape)

    def _call(
        self,
        function: onnx.FunctionProto,
        node: onnx.NodeProto,
        attributes: _Attributes,
        env: _Env,
        scope: str,
    ) -> None:
        inner: _Env = {
            formal: env[given]
            for formal, given in zip(function.input, node.input, strict=False)
            if given in env
        }
        bound = {one.name: one for one in function.attribute_proto} | dict(attributes)
        self._nodes(function.node, inner, self._inside(node, scope), bound)
        for formal, given in zip(function.output, node.output, strict=False):
            if given and formal in inner:
                env[given] = inner[formal]

    def _node(self, node: onnx.NodeProto, attributes: _Attributes, env: _Env, scope: str) -> None:
        inside = self._inside(node, scope)
        for attribute in attributes.values():
            for body in (*([attribute.g] if attribute.HasField("g") else ()), *attribute.graphs):
                inner = dict(env)
                self._body(body, inner, inside)
                for value in body.output:
                    self._read(inner.get(value.name), f"{_label(node)} hands it on")
        if node.op_type in _ASK_A_SHAPE:
            return
        shown_ = _presented(node, attributes, env)
        if shown_ is not None:
            env[node.output[0]] = shown_
            for name in node.input:
                value = env.get(name)
                if isinstance(value, Seen) and value.stored is not shown_.stored:
                    self._read(value, _reader(node))
            return
        weights = self._layer(node, attributes, env, scope)
        for position, name in enumerate(node.input):
            if position not in weights:
                self._read(env.get(name), _reader(node))
        if node.input and all(name in env for name in node.input if name):
            env.update(
                (name, _Computed(f"{_label(node)} computes its weight"))
                for name in node.output
                if name
            )

    @staticmethod
    def _inside(node: onnx.NodeProto, scope: str) -> str:
        key = next((name for name in node.output if name), node.name)
        return f"{scope}/{key}" if scope else key

    @staticmethod
    def _read(value: Seen | _Computed | None, by: str) -> None:
        if isinstance(value, Seen) and by not in value.stored.readers:
            value.stored.readers.append(by)

    # -- layers ------------------------------------------------------------------------------

    def _layer(
        self, node: onnx.NodeProto, attributes: _Attributes, env: _Env, scope: str
    ) -> tuple[int, ...]:
        """Note the layer that a node is; the inputs of it that are weights."""
        kind = (_domain(node.domain), node.op_type)
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
    attributes: _Attributes,
    scope: str,
    position: int,
    value: Seen | _Computed | None,
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
    elif form in ("conv", "deconv") and (groups < 1 or value.shape[0] % groups):
        why = f"{value.shape[0]} filters in {groups} groups"
    elif groups > 1 and (value.shape[1] if form == "conv" else value.shape[0] // groups) == 1:
        why = "depthwise: each output sums over 1 channel"
    return SparseLayer(node, scope, position, value, form, groups, why)


def _is_weight(value: Seen) -> bool:
    """Floats, or integers that something scales."""
    scaled = any(isinstance(step, Scaled) for step in value.steps)
    return value.stored.weight.data_type in _FLOATS or scaled


def _form(
    node: onnx.NodeProto, attributes: _Attributes, position: int, shape: Shape
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


# -- nodes that show a tensor in another form ------------------------------------------------------


def _presented(node: onnx.NodeProto, attributes: _Attributes, env: _Env) -> Seen | None:
    """What a node makes of a constant, if it does no more than show it in another form."""
    if not node.input or not node.output:
        return None
    value = env.get(node.input[0])
    domain = _domain(node.domain)
    if node.op_type in ("Mul", "Div") and not domain:
        return _scaled(node, env)
    if not isinstance(value, Seen) or domain not in ("", _MS):
        return None
    if value.quantized and node.op_type != "DequantizeLinear":
        return None
    match node.op_type:
        case "Identity":
            return value
        case "Cast" if attributes["to"].i in _FLOATS:
            return value
        case "CastLike":
            return value
        case "Transpose":
            given = attributes.get("perm")
            rank = len(value.shape)
            perm = tuple(given.ints) if given is not None else tuple(range(rank))[::-1]
            return value.then(Transposed(perm), tuple(value.shape[axis] for axis in perm))
        case "QuantizeLinear" if value.stored.weight.data_type in _FLOATS:
            return Seen(value.stored, value.shape, value.steps, True)
        case "DequantizeLinear" if value.quantized:
            return Seen(value.stored, value.shape, value.steps)
        case "DequantizeLinear":
            return _dequantized(node, attributes, value, env)
    shape = _new_shape(node, attributes, value.shape, env)
    return None if shape is None else value.reshaped(shape)


def _new_shape(
    node: onnx.NodeProto, attributes: _Attributes, shape: Shape, env: _Env
) -> Shape | None:
    """Shape that Reshape, Flatten, Squeeze or Unsqueeze gives a constant; None for what is not."""
    match node.op_type:
        case "Reshape":
            wanted = _integers(node, attributes, env, "shape")
            if wanted is None:
                return None
            keep = not (attributes.get("allowzero") and attributes["allowzero"].i)
            sizes = [shape[at] if not n and keep else n for at, n in enumerate(wanted)]
            if -1 in sizes:
                rest = prod(n for n in sizes if n != -1)
                sizes[sizes.index(-1)] = prod(shape) // rest if rest else 0
            return tuple(sizes)
        case "Flatten":
            axis = int(attributes["axis"].i) if "axis" in attributes else 1
            axis = axis + len(shape) if axis < 0 else axis
            return (prod(shape[:axis]), prod(shape[axis:]))
        case "Squeeze":
            axes = _integers(node, attributes, env, "axes")
            if axes is None and len(node.input) > 1 and node.input[1]:
                return None
            gone = {axis % len(shape) for axis in axes or ()}
            return tuple(
                size for axis, size in enumerate(shape) if (axis not in gone if axes else size != 1)
            )
        case "Unsqueeze":
            axes = _integers(node, attributes, env, "axes")
            if axes is None:
                return None
            rank = len(shape) + len(axes)
            new, old = {axis % rank for axis in axes}, iter(shape)
            return tuple(1 if axis in new else next(old) for axis in range(rank))
    return None


def _scaled(node: onnx.NodeProto, env: _Env) -> Seen | None:
    """A weight times a constant that is smaller, or divided by one: zeros stay zero."""
    first, second = (env.get(name) for name in node.input)
    if not (isinstance(first, Seen) and isinstance(second, Seen)):
        return None
    weight, factor = first, second
    if node.op_type == "Mul" and prod(first.shape) < prod(second.shape):
        weight, factor = second, first
    if prod(factor.shape) >= prod(weight.shape) or weight.quantized or factor.quantized:
        return None
    if np.broadcast_shapes(weight.shape, factor.shape) != weight.shape:
        return None
    divides = node.op_type == "Div"

    def scale() -> AnyArray:
        value = _widened(factor.value())
        return np.divide(1, value) if divides else value

    return weight.then(Scaled(scale))


def _dequantized(
    node: onnx.NodeProto, attributes: _Attributes, value: Seen, env: _Env
) -> Seen | None:
    scale = env.get(node.input[1])
    zero = env.get(node.input[2]) if len(node.input) > 2 and node.input[2] else None
    if not isinstance(scale, Seen) or not (zero is None or isinstance(zero, Seen)):
        return None
    axis = int(attributes["axis"].i) if "axis" in attributes else 1
    block = int(attributes["block_size"].i) if "block_size" in attributes else 0
    shape = value.shape

    def fitted(given: Seen) -> Callable[[], AnyArray]:
        return lambda: _along(given.value(), shape, axis, block)

    offset = None if zero is None else fitted(zero)
    return value.then(Scaled(fitted(scale), offset))


def _along(given: AnyArray, shape: Shape, axis: int, block: int) -> AnyArray:
    """A scale or zero point in a form that broadcasts to ``shape``."""
    if given.size == 1:
        return given.reshape((1,) * len(shape))
    axis %= len(shape)
    if block:
        spread = np.repeat(given, block, axis=axis)
        return spread[(slice(None),) * axis + (slice(shape[axis]),)]
    return given.reshape(tuple(-1 if at == axis else 1 for at in range(len(shape))))


# -- parts of nodes --------------------------------------------------------------------------------


def _attributes(node: onnx.NodeProto, bound: _Attributes) -> _Attributes:
    """Attributes by name, those that a function takes from its call filled in."""
    found = {}
    for attribute in node.attribute:
        if not attribute.ref_attr_name:
            found[attribute.name] = attribute
        elif attribute.ref_attr_name in bound:
            found[attribute.name] = bound[attribute.ref_attr_name]
    return found


def _numbers(attributes: _Attributes) -> AnyArray | None:
    """Value of a Constant node that holds plain numbers."""
    for name, attribute in attributes.items():
        match name:
            case "value_int":
                return np.array(attribute.i, np.int64)
            case "value_ints":
                return np.array(attribute.ints, np.int64)
            case "value_float":
                return np.array(attribute.f, np.float32)
            case "value_floats":
                return np.array(attribute.floats, np.float32)
    return None


def _integers(
    node: onnx.NodeProto, attributes: _Attributes, env: _Env, name: str
) -> list[int] | None:
    """A list that is an attribute or the second input; None where it is neither, or no constant."""
    if name in attributes:
        return list(attributes[name].ints)
    value = env.get(node.input[1]) if len(node.input) > 1 else None
    if not isinstance(value, Seen) or value.quantized:
        return None
    return [int(one) for one in value.value().reshape(-1)]


def _domain(name: str) -> str:
    return "" if name == "ai.onnx" else name


def _label(node: onnx.NodeProto) -> str:
    name = node.name or next((name for name in node.output if name), "")
    return f"{node.op_type} '{name}'"


def _reader(node: onnx.NodeProto) -> str:
    return f"{_label(node)} reads it too"


def _spelled(shape: Shape) -> str:
    return "x".join(map(str, shape)) or "scalar"
