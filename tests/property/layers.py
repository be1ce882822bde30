"""Pieces with weights: what makes channels and what reads them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from tests.property.builder import Builder
from tests.property.motifs import ANY, MAPS, motif
from tests.property.tensors import Open, T, at
from tests.property.weights import vector, weight


def width(b: Builder) -> int:
    return int(b.pick((8, 6, 12, 4, 16)))


def layer(b: Builder, x: T, out: int | None = None) -> T:
    """Any layer that reads all channels and makes ``out`` new ones."""
    out = out or width(b)
    match x.kind:
        case "flat":
            return gemm(b, x, out) if b.one_in(2) else matmul(b, x, out)
        case "last":
            return matmul(b, x, out)
        case "other":
            return matmul(b, channels_last(b, x), out)
        case _:
            return conv(b, x, out, kernel=b.pick((1, 3)))


def channels_last(b: Builder, x: T) -> T:
    if x.c == x.rank - 1:
        return x
    return b.transpose(x, [*(a for a in range(x.rank) if a != x.c), x.c])


def elsewhere(b: Builder, x: T) -> None:
    """One more output of the model that reads all channels."""
    b.output(layer(b, x, 3))


def joined(b: Builder, x: T, y: T) -> T:
    """What was made of x goes on with it, instead of it, or meets it behind a layer each."""
    match b.pick(("added", "instead", "apart")):
        case "added":
            return b.op("Add", x, y, shape=x.shape)
        case "instead":
            if b.one_in(2):
                elsewhere(b, x)
            return y
    out = width(b)
    return b.op("Add", layer(b, x, out), layer(b, y, out))


def bent(b: Builder, x: T) -> T:
    """A cheap activation that kills no channel."""
    return b.op("LeakyRelu", x, alpha=0.3) if b.one_in(2) else x


def conv(
    b: Builder,
    x: T,
    out: int,
    *,
    kernel: int = 1,
    group: int = 1,
    stride: int = 1,
    dilation: int = 1,
) -> T:
    """A convolution that keeps the size of space, or halves it."""
    dims = x.rank - 2
    pad = dilation * (kernel - 1) // 2
    fan = x.channels // group * kernel**dims
    array = b.normal(out, x.channels // group, *(kernel,) * dims, scale=math.sqrt(2 / fan))
    attributes: dict[str, Any] = {"kernel_shape": [kernel] * dims} if b.one_in(2) else {}
    if group > 1:
        attributes["group"] = group
    if stride > 1:
        attributes["strides"] = [stride] * dims
    if dilation > 1:
        attributes["dilations"] = [dilation] * dims
    if pad and dilation == 1 and b.one_in(4):
        attributes["auto_pad"] = "SAME_UPPER"
    elif pad:
        attributes["pads"] = [pad] * 2 * dims
    inputs: list[T | str] = [x, weight(b, array), *([vector(b, out)] if b.one_in(2) else [])]
    space = [(s + (stride - 1)) // stride for s in x.shape[2:]]
    return b.op("Conv", *inputs, shape=[x.shape[0], out, *space], **attributes)


@motif("Conv", on=MAPS)
def dense_conv(b: Builder, x: T, op: str) -> T:
    stride = 2 if min(x.shape[2:]) >= 8 and b.one_in(3) else 1
    dilation = 2 if stride == 1 and b.one_in(4) else 1
    kernel = b.pick((3, 1)) if min(x.shape[2:]) >= 3 else 1
    return conv(b, x, width(b), kernel=kernel, stride=stride, dilation=dilation)


@motif("Conv", on=MAPS)
def depthwise(b: Builder, x: T, op: str) -> T:
    return conv(b, x, x.channels * b.pick((1, 1, 2)), kernel=3, group=x.channels)


@motif("Conv", on=MAPS)
def grouped_conv(b: Builder, x: T, op: str) -> T | None:
    group = _groups(b, x)
    if group is None:
        return None
    return conv(b, x, group * b.pick((4, 2, 3)), kernel=b.pick((1, 3)), group=group)


def _groups(b: Builder, x: T) -> int | None:
    found = [g for g in (2, 3, 4) if x.channels % g == 0 and x.channels // g > 1]
    return b.pick(found) if found else None


@motif("ConvTranspose", on=MAPS)
def conv_transpose(b: Builder, x: T, op: str) -> T | None:
    dims = x.rank - 2
    style = b.pick(("dense", "grouped", "depthwise"))
    group = {"dense": 1, "grouped": _groups(b, x), "depthwise": x.channels}[style]
    if group is None:
        return None
    stride = 2 if max(x.shape[2:]) <= 8 and dims < 3 else 1
    each = (
        width(b) if style == "dense" else b.pick((1, 2)) if style == "depthwise" else b.pick((4, 3))
    )
    fan = x.channels // group
    array = b.normal(x.channels, each, *(stride,) * dims, scale=math.sqrt(2 / fan))
    bias = [vector(b, each * group)] if b.one_in(2) else []
    shape = [x.shape[0], each * group, *(s * stride for s in x.shape[2:])]
    inputs: list[T | str] = [x, weight(b, array), *bias]
    return b.op("ConvTranspose", *inputs, shape=shape, group=group, strides=[stride] * dims)


@motif("Conv", "ConvTranspose", on=MAPS)
def convolved_with_data(b: Builder, x: T, op: str) -> T:
    """The weight comes from outside, so nothing may be cut here, but the data goes on."""
    elsewhere(b, x)
    out = 5
    shape = (out, x.channels) if op == "Conv" else (x.channels, out)
    w = b.input((*shape, *(1,) * (x.rank - 2)), c=0)
    return b.op(op, x, w, shape=[x.shape[0], out, *x.shape[2:]])


@motif("Conv", on=("map2",))
def channels_as_space(b: Builder, x: T, op: str) -> T | None:
    """A convolution slides over what were the channels."""
    if isinstance(x.shape[2], Open):
        return None
    elsewhere(b, x)
    y = replace(b.transpose(x, (0, 2, 1, 3)), c=1)
    return conv(b, y, width(b), kernel=3)


# -- products ------------------------------------------------------------------------------------


@motif("MatMul", "Gemm", on=("flat",))
@motif("MatMul", on=("last",))
def multiplied_with_data(b: Builder, x: T, op: str) -> T:
    """The other matrix comes from outside."""
    elsewhere(b, x)
    w = b.input((x.channels, 5), c=0)
    if op == "Gemm" and b.opset < 11:
        return b.op(op, x, w, vector(b, 5), shape=[x.shape[0], 5])
    return b.op(op, x, w, shape=[*x.shape[:-1], 5])


def matmul(b: Builder, x: T, out: int) -> T:
    """x · W on the last axis."""
    array = b.normal(x.channels, out, scale=math.sqrt(2 / x.channels))
    y = b.op("MatMul", x, weight(b, array), shape=[*x.shape[:-1], out])
    return b.op("Add", y, vector(b, out)) if b.one_in(2) else y


@motif("MatMul", on=("last", "flat"))
def last_axis(b: Builder, x: T, op: str) -> T:
    return matmul(b, x, width(b))


@motif("Einsum", on=("last", "flat", "map1", "map2"), since=12)
def sum_over_letters(b: Builder, x: T, op: str) -> T:
    """Channels are a letter that the result has another in the place of."""
    out = width(b)
    array = b.normal(x.channels, out, scale=math.sqrt(2 / x.channels))
    read = "".join("c" if axis == x.c else "nhwtu"[axis] for axis in range(x.rank))
    made = read.replace("c", "o")
    shape = [out if axis == x.c else size for axis, size in enumerate(x.shape)]
    if b.one_in(2):
        return b.op(op, x, weight(b, array), shape=shape, equation=f"{read},co->{made}")
    return b.op(op, weight(b, array.T.copy()), x, shape=shape, c=x.c, equation=f"oc,{read}->{made}")


@motif("MatMul", on=("map1",))
def weight_on_the_left(b: Builder, x: T, op: str) -> T:
    """W · x on (N, C, T)."""
    out = width(b)
    array = b.normal(out, x.channels, scale=math.sqrt(2 / x.channels))
    return b.op("MatMul", weight(b, array), x, shape=[x.shape[0], out, x.shape[2]], c=1)


@motif("MatMul", on=("last", "flat"))
def one_dimensional_operand(b: Builder, x: T, op: str) -> T:
    """x · v loses the channels: a gate for all of them, or one more layer."""
    v = weight(b, b.normal(x.channels, scale=math.sqrt(1 / x.channels)))
    y = b.op("MatMul", x, v, shape=x.shape[:-1], c=0)
    gate = b.unsqueeze(b.op("Sigmoid", y), x.rank - 1)
    return b.op("Mul", matmul(b, x, x.channels), gate)


@motif("MatMul", on=("last",))
def batched_constant(b: Builder, x: T, op: str) -> T | None:
    """Every head has a matrix of its own: (N, T, h·d) to (N, h, T, d) · (h, d, e)."""
    heads = b.pick((2, 4))
    if x.rank != 3 or x.channels % heads or x.channels // heads < 2:
        return None
    each, out = x.channels // heads, b.pick((4, 3))
    y = b.reshape(x, [at(0), at(1), heads, at(2, over=heads)], c=3)
    y = b.transpose(y, (0, 2, 1, 3))
    shape = b.pick(((heads, each, out), (1, heads, each, out)))
    w = weight(b, b.normal(*shape, scale=math.sqrt(1 / each)))
    y = b.op("MatMul", y, w, shape=[*y.shape[:3], out])
    y = b.transpose(y, (0, 2, 1, 3))
    return b.reshape(y, [at(0), at(1), at(2, 3)], c=2)


def gemm(b: Builder, x: T, out: int) -> T:
    """A fully connected layer, in one of Gemm's forms."""
    array = b.normal(x.channels, out, scale=math.sqrt(2 / x.channels))
    bias = b.pick((None, (out,), (1, out), (1,), (1, 1)))
    if bias is None and b.opset < 11:
        bias = (out,)
    extra = [] if bias is None else [weight(b, b.normal(*bias))]
    attributes: dict[str, Any] = {}
    if b.one_in(4):
        attributes = {"alpha": 1.5, "beta": 0.5}
    shape = [x.shape[0], out]
    if b.one_in(2):
        array, attributes["transB"] = array.T.copy(), 1
    a = x
    if b.one_in(4):
        a, attributes["transA"] = b.transpose(x, (1, 0)), 1
    return b.op("Gemm", a, weight(b, array), *extra, shape=shape, c=1, **attributes)


@motif("Gemm", on=("flat",))
def plain_gemm(b: Builder, x: T, op: str) -> T:
    return gemm(b, x, width(b))


@motif("Gemm", on=("flat",))
def gemm_with_weight_on_the_left(b: Builder, x: T, op: str) -> T:
    """(W · xᵀ)ᵀ, the way some exporters write batch-last models."""
    out = width(b)
    array = b.normal(out, x.channels, scale=math.sqrt(2 / x.channels))
    attributes: dict[str, Any] = {"transB": 1}
    if b.one_in(2):
        array, attributes["transA"] = array.T.copy(), 1
    bias = weight(b, b.normal(out, 1))
    y = b.op("Gemm", weight(b, array), x, bias, shape=[out, x.shape[0]], c=0, **attributes)
    return b.transpose(y, (1, 0))


# -- blocks ----------------------------------------------------------------------------------------


@motif("Add", on=ANY)
def residual(b: Builder, x: T, op: str) -> T:
    inner = bent(b, layer(b, x))
    y = layer(b, inner, x.channels)
    return b.op("Add", *b.shuffled([x, y]))


@motif("Mul", on=MAPS)
def squeeze_and_excite(b: Builder, x: T, op: str) -> T:
    y = b.op("GlobalAveragePool", x, shape=[*x.shape[:2], *(1,) * (x.rank - 2)])
    y = b.op("Relu", conv(b, y, 4)) if b.one_in(2) else bent(b, conv(b, y, 4))
    gate = b.op("Sigmoid", conv(b, y, x.channels))
    return b.op("Mul", *b.shuffled([x, gate]), shape=x.shape)


@motif("Mul", on=ANY)
def gated_linear_unit(b: Builder, x: T, op: str) -> T:
    """Split in halves; one gates the other."""
    y = layer(b, x, 2 * width(b))
    half = y.channels // 2
    value, gate = b.split(y, y.c, [half, half], equal=b.one_in(2))
    return b.op("Mul", value, b.op("Sigmoid", gate))


@motif("Gather", on=("last",))
def embedding(b: Builder, x: T, op: str) -> T:
    """Rows of a table looked up by an input of integers, added to x."""
    ids = b.input(x.shape[:-1], c=0, dtype=np.int64)
    table = weight(b, b.normal(11, x.channels))
    looked_up = b.op("Gather", table, ids, shape=x.shape, c=x.c, dtype=b.real, axis=0)
    return b.op("Add", layer(b, x, x.channels), looked_up)
