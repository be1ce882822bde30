"""What values a tensor can take, channel by channel: one pass of interval arithmetic.

Follows from the weights alone, whatever the input: a filter of zeros gives its bias, a
BatchNormalization with scale 0 its shift, a Relu behind a bound below 0 gives 0. What no function
here understands may take any value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from onnx import TensorProto, helper

from onnxprune import fields, moves
from onnxprune.graph import Graph, Node
from onnxprune.groups import DependencyGraph
from onnxprune.intervals import (
    Function,
    Interval,
    add,
    between,
    divide,
    exactly,
    join,
    largest,
    multiply,
    negate,
    smallest,
    unknown,
    weighted,
)
from onnxprune.ops.registry import is_unary, lookup
from onnxprune.runs import movement_view
from onnxprune.shapes import Environment, Evaluator
from onnxprune.types import AnyArray, Float64Array, Shape

_CHANNEL = 1
_SPACE = 2
_MOST = 1 << 18  # elements of one interval before it is widened to what channels tell apart
_MOST_VALUES = 1 << 22  # elements of a constant that is followed element by element
_CHUNK = 1 << 22  # elements of a weight that are worked on at a time
_FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16}


class Values:
    """Exact values of constants, and of what is computed from constants alone."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._evaluator = Evaluator(graph.opsets)

    def read(self, name: str) -> AnyArray | None:
        """The values, read or computed anew by each call; None where they cannot be computed."""
        constant = self.graph.constants.get(name)
        if constant is not None:
            return constant.weight.read()
        if name not in self.graph.derived:
            return None
        node = self.graph.producer[name]
        inputs = [self.read(given) if given else None for given in node.inputs]
        if any(given and value is None for given, value in zip(node.inputs, inputs, strict=True)):
            return None
        found = self._evaluator.run(node, inputs)
        return None if found is None else found[node.outputs.index(name)]


@dataclass
class Bounds:
    """Bounds of every tensor.

    Attributes:
        env: The shapes they were found at.
        values: Exact values of constants.
        by_name: The interval of each tensor of which something is known.
        wild: Tensors with a NaN or an infinity behind them, which a 0 does not undo.
    """

    env: Environment
    values: Values
    by_name: dict[str, Interval] = field(default_factory=dict)
    wild: set[str] = field(default_factory=set)

    def of(self, name: str) -> Interval | None:
        """Bounds of a tensor; None where not even its rank is known."""
        found = self.by_name.get(name)
        shape = self.env.shape(name)
        if found is not None or shape is None:
            return found
        if name in self.values.graph.derived and int(np.prod(shape)) <= _MOST_VALUES:
            array = self.values.read(name)
            if array is not None and array.dtype.kind not in "OSUc":
                return exactly(array)
        return unknown(len(shape))

    def along(self, name: str, axis: int) -> Interval | None:
        """Ends for each index of one axis, shape (extent,), whatever lies on the others."""
        found, shape = self.of(name), self.env.shape(name)
        if found is None or shape is None:
            return None
        flat = found.hull([a for a in range(found.rank) if a != axis])
        return flat.moved(lambda ends: np.broadcast_to(ends.reshape(-1), (shape[axis],)))


@dataclass(frozen=True, slots=True)
class _View:
    """One node, with the bounds of its inputs."""

    node: Node
    bounds: Bounds

    def get(self, position: int) -> Interval | None:
        """Bounds of an input; None where it is not given or has no known rank."""
        names = self.node.inputs
        if position >= len(names) or not names[position]:
            return None
        return self.bounds.of(names[position])

    def given(self, position: int) -> bool:
        """Whether an optional input is there."""
        return position < len(self.node.inputs) and bool(self.node.inputs[position])

    def need(self, position: int) -> Interval:
        """Bounds of an input that is there."""
        found = self.get(position)
        if found is None:
            raise _Unknown
        if np.isnan(found.low).any():
            raise _Wild
        return found

    def shape(self, position: int) -> Shape:
        """Shape of an input."""
        found = self.bounds.env.shape(self.node.inputs[position])
        if found is None:
            raise _Unknown
        return found

    def weight(self, position: int) -> Float64Array:
        """Values of an input that is constant."""
        found = self.bounds.values.read(self.node.inputs[position])
        if found is None:
            raise _Unknown
        values = found.astype(np.float64)
        if not np.isfinite(values).all():
            raise _Wild
        return values

    def number(self, name: str, default: float) -> float:
        """A float attribute."""
        attribute = self.node.attributes.get(name)
        return default if attribute is None else float(attribute.f)


class _Unknown(Exception):  # noqa: N818  (control flow, no error)
    """Nothing can be said of a node's outputs."""


class _Wild(_Unknown):
    """Not even that they are finite."""


_Bounding = Callable[[_View], Interval]
_FUNCTIONS: dict[str, _Bounding] = {}


def _bounds_of(*names: str) -> Callable[[_Bounding], _Bounding]:
    def register(function: _Bounding) -> _Bounding:
        for name in names:
            _FUNCTIONS[name] = function
        return function

    return register


def find_bounds(graph: DependencyGraph) -> Bounds:
    """Bounds of every tensor that a node computes.

    Args:
        graph: From ``analyse``.

    Source: interval bound propagation, Gowal et al. 2018 (arXiv:1810.12715), from no bound on the
        inputs.
    """
    bounds = Bounds(graph.envs[0], Values(graph.graph))
    labelled = graph.tracer.traces[0].fields
    for node in graph.graph.nodes:
        if node.captures or all(name in graph.graph.derived for name in node.outputs if name):
            continue
        if not bounds.wild.isdisjoint(node.inputs):
            bounds.wild.update(name for name in node.outputs if name)
            continue
        for name, found in _outputs(node, bounds):
            # No bounds take no place: `of` says unknown then.
            if not (np.isinf(found.low).all() and np.isinf(found.high).all()):
                told = {axis for f in labelled.get(name, ()) for axis in fields.varying(f)}
                bounds.by_name[name] = _narrow(found, told)
    return bounds


def _narrow(found: Interval, told: set[int]) -> Interval:
    if found.low.size > _MOST:
        found = found.hull([axis for axis in range(found.rank) if axis not in told])
    return found if found.low.size <= _MOST else found.hull(range(found.rank))


def _outputs(node: Node, bounds: Bounds) -> Iterator[tuple[str, Interval]]:
    entry = lookup(node.op_type, node.domain, node.since)
    view = _View(node, bounds)
    try:
        if entry is not None and entry.move is not None:
            yield from _moved(view)
            return
        if node.domain or not node.since:
            return
        function = _FUNCTIONS.get(node.op_type)
        if function is not None:
            found = function(view)
        elif is_unary(node.op_type, node.since):
            found = _at_points(view)
        else:
            return
    except _Wild:
        bounds.wild.update(name for name in node.outputs if name)
        return
    except _Unknown:
        return
    shape = bounds.env.shape(node.outputs[0])
    if shape is not None and found.rank == len(shape):
        yield node.outputs[0], found


def _moved(view: _View) -> Iterator[tuple[str, Interval]]:
    node, env = view.node, view.bounds.env
    x, seen = view.need(0), movement_view(node, env)
    entry = lookup(node.op_type, node.domain, node.since)
    if seen is None or entry is None or entry.move is None:
        return
    steps = entry.move(seen, seen.x.shape, [shape or () for shape in seen.out_shapes])
    for name, each in zip(node.outputs, steps or (), strict=False):
        if name:
            yield name, x.moved(lambda ends, each=each: moves.run(each, ends, seen.x.shape))  # type: ignore[misc]  # mypy cannot infer a lambda with a default


# -- weights ---------------------------------------------------------------------------------------


@_bounds_of("Conv")
def _conv(view: _View) -> Interval:
    weight, group = view.weight(1), view.node.int("group", 1)
    x = view.bounds.along(view.node.inputs[0], _CHANNEL)
    if x is None:
        raise _Unknown
    if pads(view.node, weight.shape[2:]):
        x = join(x, between(0, 0, 1))
    out, width = weight.shape[:2]
    taps = weight.reshape(group, out // group, width, -1)
    return _with_bias(view, _products(taps, x), weight.ndim)


@_bounds_of("ConvTranspose")
def _conv_transpose(view: _View) -> Interval:
    """Every output sees some of the taps, so each counts as if it might be missing."""
    weight, group = view.weight(1), view.node.int("group", 1)
    x = view.bounds.along(view.node.inputs[0], _CHANNEL)
    if x is None:
        raise _Unknown
    x = join(x, between(0, 0, 1))
    taps = weight.reshape(group, weight.shape[0] // group, weight.shape[1], -1)
    return _with_bias(view, _products(taps.transpose(0, 2, 1, 3), x), weight.ndim)


def _products(taps: Float64Array, x: Interval) -> Interval:
    """Sums over inputs and taps, shape (out,); ``taps``: (group, out / group, in / group, taps)."""
    group, out, width, count = taps.shape
    column = x.moved(lambda ends: np.repeat(ends.reshape(group, width, 1), count, axis=1))
    step = max(1, _CHUNK // max(1, group * width * count))
    parts = [
        weighted(taps[:, start : start + step].reshape(group, -1, width * count), column)
        for start in range(0, out, step)
    ]
    return Interval(
        np.concatenate([part.low for part in parts], axis=1).reshape(-1),
        np.concatenate([part.high for part in parts], axis=1).reshape(-1),
    )


def _with_bias(view: _View, sums: Interval, rank: int) -> Interval:
    if view.given(2):
        sums = add(sums, view.need(2))
    return sums.moved(lambda ends: fields.along(ends, _CHANNEL, rank))


def pads(node: Node, kernel: Shape) -> bool:
    """Whether a Conv adds zeros around its input."""
    auto = node.string("auto_pad", "NOTSET")
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        # With a stride wider than the kernel nothing is added, but then sizes decide.
        return any(size > 1 for size in kernel)
    return auto == "NOTSET" and any(node.ints("pads") or ())


@_bounds_of("Gemm")
def _gemm(view: _View) -> Interval:
    node, derived = view.node, view.bounds.values.graph.derived
    if node.inputs[1] not in derived or node.inputs[0] in derived:
        raise _Unknown
    weight = view.weight(1) if node.int("transB", 0) else view.weight(1).T
    x = view.bounds.along(node.inputs[0], 0 if node.int("transA", 0) else 1)
    if x is None:
        raise _Unknown
    sums = _products(weight[None, :, :, None], x)
    sums = multiply(sums, between(view.number("alpha", 1), view.number("alpha", 1), 1))
    beta = view.number("beta", 1)
    if view.given(2) and beta:
        sums = add(sums, multiply(view.need(2), between(beta, beta, 1)))
    return sums.moved(lambda ends: fields.lift(ends, 2))


@_bounds_of("MatMul")
def _matmul(view: _View) -> Interval:
    node, derived = view.node, view.bounds.values.graph.derived
    a, b = view.need(0), view.need(1)
    if a.rank < 2 or b.rank < 2:
        raise _Unknown
    if node.inputs[1] in derived and b.rank == 2:
        x = view.bounds.along(node.inputs[0], a.rank - 1)
        assert x is not None
        sums = _products(view.weight(1).T[None, :, :, None], x)
        return sums.moved(lambda ends: fields.along(ends, a.rank - 1, a.rank))
    if node.inputs[0] in derived and a.rank == 2:
        x = view.bounds.along(node.inputs[1], b.rank - 2)
        assert x is not None
        sums = _products(view.weight(0)[None, :, :, None], x)
        return sums.moved(lambda ends: fields.along(ends, b.rank - 2, b.rank))
    # A row of zeros times anything is 0; that is how a head without effect looks.
    rank = max(a.rank, b.rank)
    left = fields.lift(a.hull([a.rank - 1]).zero, rank)
    right = fields.lift(b.hull([b.rank - 2]).zero, rank)
    return between(0, 0, rank).where(left | right, unknown(rank))


# -- normalisation ---------------------------------------------------------------------------------


@_bounds_of("BatchNormalization")
def _batch_normalization(view: _View) -> Interval:
    if view.node.since >= 14 and view.node.int("training_mode", 0):
        raise _Unknown
    x = view.need(0)
    scale, shift, mean, var = (
        view.need(position).moved(lambda ends: fields.along(ends, _CHANNEL, x.rank))
        for position in range(1, 5)
    )
    if not all(np.isfinite(one.low).all() for one in (scale, shift, mean, var)):
        raise _Wild
    spread = add(var, between(*(view.number("epsilon", 1e-5),) * 2, x.rank)).monotone(np.sqrt)
    return add(multiply(add(x, negate(mean)), _quotient(scale, spread)), shift)


@_bounds_of("InstanceNormalization")
def _instance_normalization(view: _View) -> Interval:
    x = view.need(0)
    scale, shift = (
        view.need(position).moved(lambda ends: fields.along(ends, _CHANNEL, x.rank))
        for position in (1, 2)
    )
    nothing = x.hull(range(_SPACE, x.rank)).zero
    return add(multiply(between(0, 0, x.rank).where(nothing, unknown(x.rank)), scale), shift)


@_bounds_of("LayerNormalization")
def _layer_normalization(view: _View) -> Interval:
    """A scale of 0 leaves the shift; nothing else is known."""
    rank = view.need(0).rank
    scaled = multiply(unknown(rank), view.need(1).moved(lambda ends: fields.lift(ends, rank)))
    if not view.given(2):
        return scaled
    return add(scaled, view.need(2).moved(lambda ends: fields.lift(ends, rank)))


@_bounds_of("GroupNormalization")
def _group_normalization(view: _View) -> Interval:
    rank, width = view.need(0).rank, view.shape(0)[_CHANNEL]
    scale, shift = view.need(1), view.need(2)
    if scale.low.size not in (1, width) or shift.low.size not in (1, width):
        raise _Unknown  # one for each group, before opset 21
    scale, shift = (
        one.moved(lambda ends: fields.along(ends.reshape(-1), _CHANNEL, rank))
        for one in (scale, shift)
    )
    return add(multiply(unknown(rank), scale), shift)


@_bounds_of("Softmax")
def _softmax(view: _View) -> Interval:
    return between(0, 1, view.need(0).rank)


# -- element by element ----------------------------------------------------------------------------


def _rising(view: _View) -> Function | None:
    """The function of an operator that never falls, None for others."""
    alpha = view.number
    match view.node.op_type:
        case "Relu":
            return lambda x: np.maximum(x, 0)
        case "LeakyRelu" if alpha("alpha", 0.01) >= 0:
            return lambda x: np.where(x < 0, alpha("alpha", 0.01) * x, x)
        case "Elu" if alpha("alpha", 1) >= 0:
            return lambda x: np.where(x < 0, alpha("alpha", 1) * np.expm1(np.minimum(x, 0)), x)
        case "Sigmoid":
            return lambda x: 1 / (1 + np.exp(-x))
        case "HardSigmoid" if alpha("alpha", 0.2) >= 0:
            return lambda x: np.clip(alpha("alpha", 0.2) * x + alpha("beta", 0.5), 0, 1)
        case "Softplus":
            return lambda x: np.logaddexp(x, 0)
        case "ThresholdedRelu" if alpha("alpha", 1) >= 0:
            return lambda x: np.where(x > alpha("alpha", 1), x, 0)
    return {"Tanh": np.tanh, "Exp": np.exp, "Floor": np.floor, "Ceil": np.ceil}.get(
        view.node.op_type
    )


@_bounds_of("Relu", "LeakyRelu", "Elu", "Sigmoid", "HardSigmoid", "Softplus", "ThresholdedRelu")
@_bounds_of("Tanh", "Exp", "Floor", "Ceil")
def _monotone(view: _View) -> Interval:
    function = _rising(view)
    return _at_points(view) if function is None else view.need(0).monotone(function)


def _at_points(view: _View) -> Interval:
    """Any function of one tensor, element by element: where that is constant, so is the result."""
    x = view.need(0)
    inside = np.where(x.constant, x.low, 0).astype(np.float32)
    found = Evaluator(view.bounds.values.graph.opsets).run(view.node, [inside])
    if not found or found[0].shape != inside.shape or found[0].dtype.kind != "f":
        raise _Unknown
    known = x.constant & np.isfinite(found[0])
    return exactly(found[0]).where(known, unknown(x.rank))


@_bounds_of("HardSwish")
def _hard_swish(view: _View) -> Interval:
    x = view.need(0)

    def swish(ends: Float64Array) -> Float64Array:
        return np.where(ends <= -3, 0, ends * np.clip(ends / 6 + 0.5, 0, 1))

    with np.errstate(invalid="ignore"):
        low, high = swish(x.low), swish(x.high)
    valley = (x.low < -1.5) & (x.high > -1.5)  # where it has its least value, -3/8
    return Interval(np.where(valley, -0.375, np.minimum(low, high)), np.maximum(low, high))


@_bounds_of("Identity", "Dropout")
def _same(view: _View) -> Interval:
    if view.given(2):  # Dropout in training
        raise _Unknown
    return view.need(0)


@_bounds_of("Cast", "CastLike")
def _cast(view: _View) -> Interval:
    env, node = view.bounds.env, view.node
    if {env.data_type(node.inputs[0]), env.data_type(node.outputs[0])} <= _FLOATS:
        return view.need(0)
    raise _Unknown


@_bounds_of("Clip")
def _clip(view: _View) -> Interval:
    x = view.need(0)
    if view.node.has("min"):
        x = largest(x, between(*(view.number("min", 0),) * 2, x.rank))
    if view.node.has("max"):
        x = smallest(x, between(*(view.number("max", 0),) * 2, x.rank))
    if view.given(1):
        x = largest(x, view.need(1).moved(lambda ends: fields.lift(ends.reshape(-1), x.rank)))
    if view.given(2):
        x = smallest(x, view.need(2).moved(lambda ends: fields.lift(ends.reshape(-1), x.rank)))
    return x


@_bounds_of("Neg")
def _neg(view: _View) -> Interval:
    return negate(view.need(0))


@_bounds_of("Abs")
def _abs(view: _View) -> Interval:
    x = view.need(0)
    return largest(largest(x, negate(x)), between(0, 0, x.rank))


@_bounds_of("Add", "Sum", "Sub", "Mul", "Div", "Min", "Max")
def _arithmetic(view: _View) -> Interval:
    combine = {
        "Add": add,
        "Sum": add,
        "Sub": lambda a, b: add(a, negate(b)),
        "Mul": multiply,
        "Div": _quotient,
        "Min": smallest,
        "Max": largest,
    }[view.node.op_type]
    operands = [view.need(position) for position in range(len(view.node.inputs))]
    rank = max(one.rank for one in operands)
    lifted = [one.moved(lambda ends: fields.lift(ends, rank)) for one in operands]
    result = lifted[0]
    for operand in lifted[1:]:
        result = combine(result, operand)
    return result


def _quotient(a: Interval, b: Interval) -> Interval:
    if b.zero.any():
        raise _Wild
    return divide(a, b)


@_bounds_of("PRelu")
def _prelu(view: _View) -> Interval:
    x = view.need(0)
    nothing = between(0, 0, x.rank)
    slope = view.need(1).moved(lambda ends: fields.lift(ends, x.rank))
    return add(largest(x, nothing), multiply(smallest(x, nothing), slope))


@_bounds_of("Where")
def _where(view: _View) -> Interval:
    a, b = view.need(1), view.need(2)
    rank = max(a.rank, b.rank, view.need(0).rank)
    return join(*(one.moved(lambda ends: fields.lift(ends, rank)) for one in (a, b)))


@_bounds_of("QuantizeLinear")
def _quantize(view: _View) -> Interval:
    x = view.need(0)
    try:
        limits = np.iinfo(
            helper.tensor_dtype_to_np_dtype(view.bounds.env.data_type(view.node.outputs[0]))
        )
    except ValueError:  # floats of 8 bits
        raise _Unknown from None
    scaled = divide(x, _quantizer(view, 1)).monotone(np.rint)
    if view.given(2):
        scaled = add(scaled, _quantizer(view, 2))
    return scaled.monotone(lambda ends: np.clip(ends, limits.min, limits.max))


@_bounds_of("DequantizeLinear")
def _dequantize(view: _View) -> Interval:
    x = view.need(0)
    if view.given(2):
        x = add(x, negate(_quantizer(view, 2)))
    return multiply(x, _quantizer(view, 1))


def _quantizer(view: _View, position: int) -> Interval:
    """Scale or zero point: one, or one for each index of an axis."""
    found, rank = view.need(position), view.need(0).rank
    if found.rank > 1 or view.node.int("block_size", 0):
        raise _Unknown
    axis = view.node.int("axis", 1)
    if found.low.size > 1 and found.low.size != view.shape(0)[axis]:
        raise _Unknown
    axis = axis % rank if found.low.size > 1 else 0
    return found.moved(lambda ends: fields.along(ends.reshape(-1), axis, rank))


# -- space -----------------------------------------------------------------------------------------


@_bounds_of("MaxPool", "GlobalMaxPool", "GlobalAveragePool", "AveragePool")
def _pool(view: _View) -> Interval:
    x = view.need(0)
    x = x.hull(range(_SPACE, x.rank))
    # Zeros around the input count where an average is told to count them.
    counted = view.node.op_type == "AveragePool" and view.node.int("count_include_pad", 0)
    return join(x, between(0, 0, x.rank)) if counted else x


@_bounds_of("ReduceMean", "ReduceMax", "ReduceMin", "ReduceSum")
def _reduce(view: _View) -> Interval:
    node, x = view.node, view.need(0)
    axes = node.ints("axes")
    if axes is None and view.given(1):
        found = view.bounds.values.read(node.inputs[1])
        if found is None:
            raise _Unknown
        axes = tuple(int(axis) for axis in found.reshape(-1))
    if not axes and node.int("noop_with_empty_axes", 0):
        return x
    over = tuple(axis % x.rank for axis in axes) if axes else tuple(range(x.rank))
    x = x.hull(over)
    if node.op_type == "ReduceSum":
        # How many are summed may depend on the input: the sign alone stays known.
        x = Interval(np.where(x.low >= 0, 0, -np.inf), np.where(x.high <= 0, 0, np.inf))
    if node.int("keepdims", 1):
        return x
    return x.moved(
        lambda ends: ends.reshape([n for a, n in enumerate(ends.shape) if a not in over])
    )


@_bounds_of("Resize", "Upsample")
def _resize(view: _View) -> Interval:
    """Averages of neighbours stay between them; other ways to interpolate may overshoot."""
    x, node = view.need(0), view.node
    after = view.bounds.env.shape(node.outputs[0]) or ()
    changed = [a for a, (m, n) in enumerate(zip(view.shape(0), after, strict=True)) if m != n]
    plain = node.string("mode", "nearest") in ("nearest", "linear", "bilinear")
    outside = node.string("coordinate_transformation_mode", "") == "tf_crop_and_resize"
    x = x.hull(sorted({*changed, *range(_SPACE, x.rank)}))
    return x if plain and not outside else between(0, 0, x.rank).where(x.zero, unknown(x.rank))


@_bounds_of("Pad")
def _pad(view: _View) -> Interval:
    """Zeros or other values around the input, or copies of what is in it."""
    x, node = view.need(0), view.node
    after = view.bounds.env.shape(node.outputs[0]) or ()
    grown = [a for a, (m, n) in enumerate(zip(view.shape(0), after, strict=True)) if m != n]
    if any(x.low.shape[axis] > 1 for axis in grown):
        x = x.hull(grown)
    if node.string("mode", "constant") != "constant":
        return x
    value = view.number("value", 0)
    filled = view.need(2) if view.given(2) else between(value, value, x.rank)
    return join(x, filled.moved(lambda ends: fields.lift(ends.reshape(-1), x.rank)))


@_bounds_of("Concat")
def _concat(view: _View) -> Interval:
    parts = [view.need(position) for position in range(len(view.node.inputs))]
    axis = view.node.int("axis", 0) % parts[0].rank
    sizes = [view.shape(position)[axis] for position in range(len(parts))]
    others = np.broadcast_shapes(*(fields.first(p.low, [axis]).shape for p in parts))

    def wide(ends: Float64Array, size: int) -> Float64Array:
        return np.broadcast_to(ends, (*others[:axis], size, *others[axis + 1 :]))

    pairs = list(zip(parts, sizes, strict=True))
    return Interval(
        np.concatenate([wide(part.low, size) for part, size in pairs], axis=axis),
        np.concatenate([wide(part.high, size) for part, size in pairs], axis=axis),
    )
