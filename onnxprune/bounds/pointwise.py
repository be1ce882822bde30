"""Bounds of functions that work element by element."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, helper

from onnxprune import fields
from onnxprune.bounds.view import Unknown, View, Wild, bounds_of
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
)
from onnxprune.shapes import Evaluator
from onnxprune.types import Float64Array

_FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16}


def _rising(view: View) -> Function | None:
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


@bounds_of("Relu", "LeakyRelu", "Elu", "Sigmoid", "HardSigmoid", "Softplus", "ThresholdedRelu")
@bounds_of("Tanh", "Exp", "Floor", "Ceil")
def _monotone(view: View) -> Interval:
    function = _rising(view)
    return at_points(view) if function is None else view.need(0).monotone(function)


def at_points(view: View) -> Interval:
    """Any function of one tensor, element by element: where that is constant, so is the result."""
    x = view.need(0)
    inside = np.where(x.constant, x.low, 0).astype(np.float32)
    with np.errstate(all="ignore"):
        found = Evaluator(view.bounds.values.graph.opsets).run(view.node, [inside])
    if not found or found[0].shape != inside.shape or found[0].dtype.kind != "f":
        raise Unknown
    known = x.constant & np.isfinite(found[0])
    return exactly(found[0]).where(known, unknown(x.rank))


@bounds_of("HardSwish")
def _hard_swish(view: View) -> Interval:
    x = view.need(0)

    def swish(ends: Float64Array) -> Float64Array:
        return np.where(ends <= -3, 0, ends * np.clip(ends / 6 + 0.5, 0, 1))

    with np.errstate(invalid="ignore"):
        low, high = swish(x.low), swish(x.high)
    valley = (x.low < -1.5) & (x.high > -1.5)  # where it has its least value, -3/8
    return Interval(np.where(valley, -0.375, np.minimum(low, high)), np.maximum(low, high))


@bounds_of("Identity", "Dropout")
def _same(view: View) -> Interval:
    old = view.node.op_type == "Dropout" and view.node.since < 7
    if view.given(2) or (old and not view.node.int("is_test", 0)):  # Dropout in training
        raise Unknown
    return view.need(0)


@bounds_of("Cast", "CastLike")
def _cast(view: View) -> Interval:
    env, node = view.bounds.env, view.node
    if {env.data_type(node.inputs[0]), env.data_type(node.outputs[0])} <= _FLOATS:
        return view.need(0)
    raise Unknown


@bounds_of("Clip")
def _clip(view: View) -> Interval:
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


@bounds_of("Neg")
def _neg(view: View) -> Interval:
    return negate(view.need(0))


@bounds_of("Abs")
def _abs(view: View) -> Interval:
    x = view.need(0)
    return largest(largest(x, negate(x)), between(0, 0, x.rank))


@bounds_of("Add", "Sum", "Sub", "Mul", "Div", "Min", "Max")
def _arithmetic(view: View) -> Interval:
    if view.node.int("broadcast", 0):  # before opset 7, along an axis it names
        raise Unknown
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
        raise Wild
    return divide(a, b)


@bounds_of("PRelu")
def _prelu(view: View) -> Interval:
    x = view.need(0)
    nothing = between(0, 0, x.rank)
    if view.node.since < 7 and view.need(1).low.size > 1:  # one for each channel
        raise Unknown
    slope = view.need(1).moved(lambda ends: fields.lift(ends, x.rank))
    return add(largest(x, nothing), multiply(smallest(x, nothing), slope))


@bounds_of("Where")
def _where(view: View) -> Interval:
    a, b = view.need(1), view.need(2)
    rank = max(a.rank, b.rank, view.need(0).rank)
    return join(*(one.moved(lambda ends: fields.lift(ends, rank)) for one in (a, b)))


@bounds_of("QuantizeLinear")
def _quantize(view: View) -> Interval:
    x = view.need(0)
    try:
        limits = np.iinfo(
            helper.tensor_dtype_to_np_dtype(view.bounds.env.data_type(view.node.outputs[0]))
        )
    except ValueError:  # floats of 8 bits
        raise Unknown from None
    scaled = divide(x, _quantizer(view, 1)).monotone(np.rint)
    if view.given(2):
        scaled = add(scaled, _quantizer(view, 2))
    return scaled.monotone(lambda ends: np.clip(ends, limits.min, limits.max))


@bounds_of("DequantizeLinear")
def _dequantize(view: View) -> Interval:
    x = view.need(0)
    if view.given(2):
        x = add(x, negate(_quantizer(view, 2)))
    return multiply(x, _quantizer(view, 1))


def _quantizer(view: View, position: int) -> Interval:
    """Scale or zero point: one, or one for each index of an axis."""
    found, rank = view.need(position), view.need(0).rank
    if found.rank > 1 or view.node.int("block_size", 0):
        raise Unknown
    axis = view.node.int("axis", 1)
    if found.low.size > 1 and found.low.size != view.shape(0)[axis]:
        raise Unknown
    axis = axis % rank if found.low.size > 1 else 0
    return found.moved(lambda ends: fields.along(ends.reshape(-1), axis, rank))
