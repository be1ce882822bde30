"""Pieces that work element by element, and tests and masks made from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from tests.property.builder import Builder
from tests.property.layers import joined, layer
from tests.property.motifs import ANY, MAPS, motif
from tests.property.tensors import Open, T
from tests.property.weights import operand, vector, weight

# What has to be done to the data first: nothing, or to bring it into the domain.
_FREE = "any"
_UNIT = "within (-1, 1)"
_POSITIVE = "above 0"
_ABOVE_ONE = "above 1"
_STEPS = "several wide, so that steps show"

# Operator -> (what it wants, first opset).
UNARY: dict[str, tuple[str, int]] = {
    **dict.fromkeys(
        ("Abs", "Neg", "Relu", "LeakyRelu", "Elu", "Selu", "Sigmoid", "Tanh", "Softplus",
         "Softsign", "HardSigmoid", "Identity", "Atan", "Sin", "Cos"), (_FREE, 7),
    ),
    **dict.fromkeys(("Erf", "Asinh", "Shrink"), (_FREE, 9)),
    "ThresholdedRelu": (_FREE, 10),
    "Celu": (_FREE, 12),
    "HardSwish": (_FREE, 14),
    "Mish": (_FREE, 18),
    "Gelu": (_FREE, 20),
    **dict.fromkeys(("Acos", "Asin", "Exp", "Tan"), (_UNIT, 7)),
    **dict.fromkeys(("Atanh", "Cosh", "Sinh"), (_UNIT, 9)),
    **dict.fromkeys(("Log", "Sqrt", "Reciprocal"), (_POSITIVE, 7)),
    "Acosh": (_ABOVE_ONE, 9),
    **dict.fromkeys(("Ceil", "Floor"), (_STEPS, 7)),
    "Sign": (_STEPS, 9),
    "Round": (_STEPS, 11),
}  # fmt: skip
# Attributes that keep more of the data alive than the defaults do.
_ATTRIBUTES: dict[str, dict[str, Any]] = {
    "ThresholdedRelu": {"alpha": 0.2},
    "Shrink": {"lambd": 0.2, "bias": 0.1},
    "HardSigmoid": {"alpha": 0.3},
}


def prepared(b: Builder, x: T, want: str) -> T:
    """Bring data into the domain of an operator."""
    match want:
        case "within (-1, 1)":
            return b.op("Mul", b.op("Tanh", x), b.scalar(0.9))
        case "above 0":
            return positive(b, x)
        case "above 1":
            return b.op("Add", b.op("Abs", x), b.scalar(1.2))
        case "several wide, so that steps show":
            return b.op("Mul", x, b.scalar(3.3))
    return x


def positive(b: Builder, x: T) -> T:
    return b.op("Add", b.op("Abs", x), b.scalar(0.5))


def _unary(b: Builder, x: T, op: str) -> T:
    if op == "Celu" and b.real is not np.float32:
        op = "Elu"
    return b.op(op, prepared(b, x, UNARY[op][0]), **_ATTRIBUTES.get(op, {}))


for _name, (_, _since) in UNARY.items():
    motif(_name, on=ANY, since=_since)(_unary)


def activation(b: Builder, x: T) -> T:
    """Some unary operator."""
    names = [name for name, (_, since) in UNARY.items() if since <= b.opset]
    return _unary(b, x, b.pick(names))


@motif("Cast", on=ANY)
def there_and_back(b: Builder, x: T, op: str) -> T:
    other = np.float32 if b.real is np.float64 else np.float64
    return b.cast(b.cast(x, other), b.real)


@motif("CastLike", on=ANY, since=15)
def cast_like(b: Builder, x: T, op: str) -> T:
    model = b.initializer(np.zeros(b.pick(((1,), ())), np.float64))
    y = b.op("CastLike", x, model, dtype=np.float64)
    like = b.pick((x, T(b.initializer(np.zeros(1, b.real)), (1,), 0, b.real)))
    return b.op("CastLike", b.op("Neg", y), like, dtype=b.real)


@motif("Clip", on=ANY)
def clip(b: Builder, x: T, op: str) -> T:
    if b.opset < 11:
        return b.op("Clip", x, min=-1.5, max=2.0)
    low = b.scalar(-1.5) if b.one_in(2) else None
    return b.op("Clip", x, low, b.scalar(2.0))


@motif("Dropout", on=ANY)
def dropout(b: Builder, x: T, op: str) -> T:
    mask = replace(x, dtype=np.bool_) if b.opset >= 10 and b.one_in(2) else None
    outputs = [x, mask] if mask else [x]
    if b.opset < 12:
        return b.node("Dropout", [x], outputs, ratio=0.3)[0]
    return b.node("Dropout", [x, b.scalar(0.3)], outputs)[0]


@motif("IsInf", on=ANY, since=10)
@motif("IsNaN", on=ANY, since=9)
def not_a_number(b: Builder, x: T, op: str) -> T:
    if b.real is np.float16:
        x = b.cast(x, np.float32)
    found = b.op(op, x, dtype=np.bool_)
    return b.op("Add", b.cast(x, b.real), b.cast(found, b.real))


# -- two operands ----------------------------------------------------------------------------------


@motif("Add", "Sub", "Mul", "Div", "Pow", "PRelu", on=ANY)
@motif("Max", "Min", "Sum", "Mean", on=ANY, since=8)
@motif("Mod", on=ANY, since=10)
def with_constant(b: Builder, x: T, op: str) -> T:
    """A constant of any rank, left or right of the data."""
    safe = positive(b, x) if op in ("Pow", "Div", "Mod") else x
    constant = operand(b, x, positive=op in ("Pow", "Div", "Mod", "PRelu"))
    attributes: dict[str, Any] = {"fmod": 1} if op == "Mod" else {}
    operands: Sequence[T | str] = (safe, constant)
    if op not in ("PRelu", "Mod"):
        operands = b.shuffled(operands)
    if op in ("Sum", "Mean", "Max", "Min") and b.one_in(2):
        operands = [*operands, operand(b, x)]
    return b.op(op, *operands, shape=x.shape, c=x.c, dtype=x.dtype, **attributes)


@motif("Add", "Sub", "Mul", "Div", "PRelu", "Max", "Min", "Sum", "Mean", on=ANY)
@motif("Pow", on=ANY)
@motif("Mod", on=ANY, since=10)
def with_data(b: Builder, x: T, op: str) -> T:
    """Two branches meet; the second may be a single value a channel, or not cut at all."""
    other = layer(b, x, x.channels)
    if op in ("Div", "Mod", "Pow"):
        other, x = positive(b, b.op("Tanh", other)), positive(b, x)
    if op == "PRelu":
        other = b.op("Abs", other)
    elif b.one_in(4) and b.opset >= 8 and x.rank > 2:
        shape = [s if a in (0, x.c) else 1 for a, s in enumerate(x.shape)]
        other = b.with_ints("ReduceMax", other, "axes", x.others, 18, shape=shape)
    operands = (x, other) if op in ("PRelu", "Mod", "Pow") else b.shuffled((x, other))
    attributes: dict[str, Any] = {"fmod": 1} if op == "Mod" else {}
    return b.op(op, *operands, shape=x.shape, **attributes)


@motif("PRelu", on=MAPS)
def slope_for_each_channel(b: Builder, x: T, op: str) -> T:
    shape = (x.channels, *(1,) * (x.rank - 2))
    return b.op("PRelu", x, weight(b, b.rng.uniform(0.1, 0.9, shape).astype(b.real)))


# -- conditions ------------------------------------------------------------------------------------


@motif("Greater", "Less", on=ANY, since=9)
@motif("GreaterOrEqual", "LessOrEqual", on=ANY, since=12)
@motif("Equal", on=ANY, since=11)
def compared(b: Builder, x: T, op: str) -> T:
    """A condition becomes numbers that scale the data."""
    if b.real is np.float16:
        return None  # type: ignore[return-value]  # too coarse to compare
    right: T | str = operand(b, x) if b.one_in(2) else layer(b, x, x.channels)
    left = x
    if op == "Equal":  # what is seldom equal shows nothing
        left = b.op("Floor", x)
        right = b.op("Floor", right, shape=x.shape, c=x.c) if isinstance(right, T) else b.scalar(0)
        if b.one_in(2):
            right = b.initializer(b.rng.integers(-1, 1, _like_channels(x)).astype(b.real))
    condition = b.op(op, left, right, shape=x.shape, dtype=np.bool_)
    number = b.op("Add", b.cast(condition, b.real), b.scalar(0.5))
    return joined(b, x, number)


def _like_channels(x: T) -> tuple[int, ...]:
    return tuple(size if axis == x.c else 1 for axis, size in enumerate(x.shape))


@motif("And", "Or", "Xor", "Not", on=ANY, since=9)
def combined(b: Builder, x: T, op: str) -> T | None:
    """Logic on two conditions, of which one may be constant."""
    first = b.op("Greater", x, b.scalar(0.1), dtype=np.bool_)
    if op == "Not":
        found = b.op("Not", first)
    else:
        second: T | str = b.op("Less", x, operand(b, x), shape=x.shape, dtype=np.bool_)
        if b.one_in(3):
            free = [1 if isinstance(s, Open) else s for s in x.shape]
            second = b.initializer(b.rng.random(free) < 0.5)
        found = b.op(op, *b.shuffled([first, second]), shape=x.shape, c=x.c, dtype=np.bool_)
    return joined(b, x, b.cast(found, b.real))


@motif("Where", on=ANY, since=9)
def selected(b: Builder, x: T, op: str) -> T:
    """A constant mask, or a computed one, chooses between two branches, or data and a number."""
    free = [1 if isinstance(s, Open) or b.one_in(2) else s for s in x.shape]
    condition: T | str = b.initializer(b.rng.random(free) < 0.6)
    if b.one_in(2):
        condition = b.op("Greater", x, b.scalar(0.0), dtype=np.bool_)
    other: T | str = b.pick((layer(b, x, x.channels), b.scalar(0.25), operand(b, x)))
    chosen = b.shuffled([x, other])
    return b.op("Where", condition, *chosen, shape=x.shape, c=x.c, dtype=x.dtype)


# -- integers --------------------------------------------------------------------------------------


def _whole(b: Builder, x: T, dtype: type[np.generic]) -> T:
    """Data as small positive integers."""
    return b.cast(b.op("Mul", b.op("Sigmoid", b.op("Tanh", x)), b.scalar(50)), dtype)


@motif("BitShift", on=ANY, since=11)
@motif("BitwiseAnd", "BitwiseOr", "BitwiseXor", "BitwiseNot", on=ANY, since=18)
def bits(b: Builder, x: T, op: str) -> T:
    dtype: type[np.generic] = np.uint32 if op == "BitShift" else b.pick((np.int32, np.int64))
    y = _whole(b, x, dtype)
    attributes: dict[str, Any] = (
        {"direction": b.pick(("LEFT", "RIGHT"))} if op == "BitShift" else {}
    )
    if op == "BitwiseNot":
        y = b.op(op, y)
    else:
        shape = (x.channels, *(1,) * (x.rank - 1 - x.c))
        lifted = b.initializer(b.rng.integers(1, 4, shape).astype(dtype))
        other = b.pick((lifted, _whole(b, layer(b, x, x.channels), dtype)))
        if op == "BitShift" and isinstance(other, T):
            other = b.initializer(np.asarray(2, dtype))
        y = b.op(op, y, other, **attributes)
    return joined(b, x, b.op("Mul", b.cast(y, b.real), b.scalar(0.05)))


@motif("QuantizeLinear", "DequantizeLinear", on=ANY, since=10)
def fake_quantization(b: Builder, x: T, op: str) -> T | None:
    if b.real is not np.float32:
        return None
    along = b.opset >= 13 and b.one_in(2)
    scale = b.rng.uniform(0.02, 0.06, (x.channels,) if along else ()).astype(np.float32)
    zero = np.zeros(scale.shape, np.int8) + b.integer(0, 3)
    names = [b.initializer(scale), b.initializer(zero.astype(np.int8))]
    attributes: dict[str, Any] = {"axis": b.pick((x.c, x.c - x.rank))} if along else {}
    q = b.op("QuantizeLinear", x, *names, dtype=np.int8, **attributes)
    return b.op("DequantizeLinear", q, *names, dtype=np.float32, **attributes)


@motif("Custom", on=ANY)
def unknown(b: Builder, x: T, op: str) -> T:
    """An operator that nothing knows; such models are not run."""
    b.custom = True
    return b.op("Blur", x, vector(b, x.channels), domain="custom.ops")
