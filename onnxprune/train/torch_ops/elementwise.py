"""Operators that work element by element."""

from __future__ import annotations

from functools import reduce
from typing import Any

from onnxprune.train.torch_ops.lazy import Tensor, torch
from onnxprune.train.torch_ops.registry import MICROSOFT, Op, op, torch_type

# Those that torch has under a name of its own and that take no attribute.
_UNARY = {
    "Abs": "abs",
    "Acos": "acos",
    "Acosh": "acosh",
    "Asin": "asin",
    "Asinh": "asinh",
    "Atan": "atan",
    "Atanh": "atanh",
    "BitwiseNot": "bitwise_not",
    "Ceil": "ceil",
    "Cos": "cos",
    "Cosh": "cosh",
    "Erf": "erf",
    "Exp": "exp",
    "Floor": "floor",
    "IsNaN": "isnan",
    "Log": "log",
    "Neg": "neg",
    "Not": "logical_not",
    "Reciprocal": "reciprocal",
    "Relu": "relu",
    "Round": "round",  # halves to even, as ONNX has it
    "Sigmoid": "sigmoid",
    "Sign": "sign",
    "Sin": "sin",
    "Sinh": "sinh",
    "Sqrt": "sqrt",
    "Tan": "tan",
    "Tanh": "tanh",
}
_BINARY = {
    "Add": "add",
    "Sub": "sub",
    "Mul": "mul",
    "And": "logical_and",
    "Or": "logical_or",
    "Xor": "logical_xor",
    "BitwiseAnd": "bitwise_and",
    "BitwiseOr": "bitwise_or",
    "BitwiseXor": "bitwise_xor",
    "Equal": "eq",
    "Greater": "gt",
    "GreaterOrEqual": "ge",
    "Less": "lt",
    "LessOrEqual": "le",
}


def _register(onnx_name: str, torch_name: str, *, binary: bool) -> None:
    def unary_function(_: Op, x: Tensor) -> Tensor:
        return getattr(torch, torch_name)(x)

    def binary_function(node: Op, a: Tensor, b: Tensor) -> Tensor:
        return getattr(torch, torch_name)(a, _old_broadcast(node, a, b))

    op(onnx_name)(binary_function if binary else unary_function)


for _onnx, _torch in _UNARY.items():
    _register(_onnx, _torch, binary=False)
for _onnx, _torch in _BINARY.items():
    _register(_onnx, _torch, binary=True)


def _old_broadcast(node: Op, a: Tensor, b: Tensor) -> Tensor:
    """Before version 7, ``b`` stood at ``axis`` of ``a`` when ``broadcast`` was set."""
    if node.version >= 7 or not node.integer("broadcast", 0) or "axis" not in node.attributes:
        return b
    after = a.ndim - node.axis(a.ndim) - b.ndim
    return b.reshape([*b.shape, *[1] * after])


@op("Div")
def div(node: Op, a: Tensor, b: Tensor) -> Tensor:
    """Whole numbers are cut towards zero."""
    b = _old_broadcast(node, a, b)
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


@op("Mod")
def mod(node: Op, a: Tensor, b: Tensor) -> Tensor:
    """The sign of the divisor, of the dividend with ``fmod``."""
    return torch.fmod(a, b) if node.integer("fmod", 0) else torch.remainder(a, b)


@op("Pow")
def power(node: Op, a: Tensor, b: Tensor) -> Tensor:
    """The result has the type of the base."""
    if b.numel() == 1 and not b.requires_grad and a.is_floating_point():
        shape = torch.broadcast_shapes(a.shape, b.shape)
        return torch.pow(a, float(b)).reshape(shape)
    return torch.pow(a, _old_broadcast(node, a, b)).to(a.dtype)


@op("BitShift")
def bit_shift(node: Op, a: Tensor, b: Tensor) -> Tensor:
    """LEFT or RIGHT."""
    left = node.text("direction", "LEFT") == "LEFT"
    return torch.bitwise_left_shift(a, b) if left else torch.bitwise_right_shift(a, b)


@op("IsInf")
def is_inf(node: Op, x: Tensor) -> Tensor:
    """Infinite, of the signs asked for."""
    negative = torch.isneginf(x) & bool(node.integer("detect_negative", 1))
    return negative | (torch.isposinf(x) & bool(node.integer("detect_positive", 1)))


@op("Sum")
def total(_: Op, *xs: Tensor) -> Tensor:
    """Sum of all inputs."""
    return reduce(torch.add, xs)


@op("Mean")
def mean(_: Op, *xs: Tensor) -> Tensor:
    """Mean of all inputs."""
    return reduce(torch.add, xs) / len(xs)


@op("Min")
def minimum(_: Op, *xs: Tensor) -> Tensor:
    """Smallest of all inputs."""
    return reduce(torch.minimum, xs)


@op("Max")
def maximum(_: Op, *xs: Tensor) -> Tensor:
    """Largest of all inputs."""
    return reduce(torch.maximum, xs)


@op("Where")
def where(_: Op, condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Choose by element."""
    return torch.where(condition, a, b)


@op("Clip")
def clip(node: Op, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    """Limits are attributes before version 11."""
    bounds: list[Any] = [low, high]
    if node.version < 11:
        bounds = [node.attributes.get("min"), node.attributes.get("max")]
    if bounds == [None, None]:
        return x
    bounds = [bound if bound is None else torch.as_tensor(bound).to(x) for bound in bounds]
    return torch.clamp(x, *bounds)


@op("Cast")
def cast(node: Op, x: Tensor) -> Tensor:
    """To another type; every real type is the run's own."""
    return x.to(torch_type(node.integer("to", 1), node.setting))


@op("CastLike")
def cast_like(_: Op, x: Tensor, like: Tensor) -> Tensor:
    """To the type of another tensor."""
    return x.to(like.dtype)


@op("BiasAdd", domain=MICROSOFT)
def bias_add(_: Op, x: Tensor, bias: Tensor, skip: Tensor) -> Tensor:
    """Sum of three."""
    return x + bias + skip
