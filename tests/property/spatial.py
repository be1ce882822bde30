"""Pieces that look along axes: pools, reductions, resizing, padding, sampling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from tests.property.builder import Builder
from tests.property.layers import elsewhere, joined, layer
from tests.property.motifs import ANY, MAPS, motif
from tests.property.norms import spread
from tests.property.pointwise import positive
from tests.property.tensors import Open, T

_WIDE = (*MAPS, "last")


# -- pools -----------------------------------------------------------------------------------------


@motif("MaxPool", "AveragePool", "LpPool", on=("map2", "map1"))
def pool(b: Builder, x: T, op: str) -> T | None:
    if min(x.shape[2:]) < 3:
        return None
    dims = x.rank - 2
    if b.one_in(2):
        attributes: dict[str, Any] = {"kernel_shape": [2] * dims, "strides": [2] * dims}
        space = [s // 2 for s in x.shape[2:]]
    else:
        attributes = {"kernel_shape": [3] * dims, "pads": [1] * 2 * dims}
        space = list(x.shape[2:])
    shape = [*x.shape[:2], *space]
    outputs: list[T | None] = [replace(x, shape=tuple(shape))]
    if op == "MaxPool" and b.opset >= 8 and b.one_in(4):
        outputs.append(replace(x, shape=tuple(shape), dtype=np.int64))
    return b.node(op, [x], outputs, **attributes)[0]


@motif("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool", on=MAPS)
def global_pool(b: Builder, x: T, op: str) -> T:
    y = b.op(op, x, shape=[*x.shape[:2], *(1,) * (x.rank - 2)])
    if b.one_in(2):
        return b.op("Tanh", y)
    return b.op("Add", x, b.op("Tanh", y), shape=x.shape)


# -- reductions ------------------------------------------------------------------------------------


@motif("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2",
       "ReduceLogSum", "ReduceLogSumExp", "ReduceSumSquare", on=_WIDE)  # fmt: skip
def reduced(b: Builder, x: T, op: str) -> T | None:
    """Over space: added back as a gate, or one axis less."""
    axes = x.others if b.one_in(2) else [b.pick(x.others)]
    source = _bounded(b, x, op, axes)
    keep = b.one_in(2) or x.rank - len(axes) < 2
    y = _reduce(b, source, op, axes, keep)
    if keep:
        return b.op("Add", x, b.op("Tanh", y), shape=x.shape)
    return b.op("Tanh", y)


@motif("ReduceMean", "ReduceMax", "ReduceL2", on=ANY)
def reduced_over_channels(b: Builder, x: T, op: str) -> T | None:
    y = _reduce(b, x, op, [x.c], keep=True)
    return b.op("Mul", x, b.op("Sigmoid", y), shape=x.shape)


def _bounded(b: Builder, x: T, op: str, axes: Sequence[int]) -> T:
    match op:
        case "ReduceProd":
            return b.op("Add", b.op("Mul", b.op("Tanh", x), b.scalar(0.05)), b.scalar(1.0))
        case "ReduceLogSum":
            return positive(b, x)
        case "ReduceSum" | "ReduceL1" | "ReduceSumSquare":
            return b.op("Mul", x, b.scalar(1 / math.sqrt(spread(x, axes))))
    return x


def _reduce(b: Builder, x: T, op: str, axes: Sequence[int], keep: bool) -> T:
    since = 13 if op == "ReduceSum" else 18
    shape = [1 if a in axes else s for a, s in enumerate(x.shape) if keep or a not in axes]
    c = x.c if keep else x.c - sum(a < x.c for a in axes)
    spelled = [a - x.rank for a in axes] if b.opset >= 11 and b.one_in(2) else axes
    extra: dict[str, Any] = {} if keep and b.one_in(2) else {"keepdims": int(keep)}
    return b.with_ints(op, x, "axes", spelled, since, shape=shape, c=c, **extra)


@motif("ArgMax", "ArgMin", on=_WIDE)
def position_of_largest(b: Builder, x: T, op: str) -> T | None:
    """Where along one axis the largest lies; small differences are pushed apart."""
    if b.real is np.float16:
        return None
    axis = b.pick((*x.others, x.c))
    shape = [1 if a == axis else s for a, s in enumerate(x.shape)]
    if axis == x.c and b.one_in(2):
        elsewhere(b, x)
    found = b.op(op, x, shape=shape, dtype=np.int64, axis=axis, keepdims=1)
    number = b.op("Mul", b.cast(found, b.real), b.scalar(0.3))
    if axis == x.c:
        return b.op("Add", x, number, shape=x.shape)
    return joined(b, x, number)


@motif("TopK", on=_WIDE)
def largest(b: Builder, x: T, op: str) -> T | None:
    """The two largest along one axis, with or without their places."""
    if b.real is np.float16:
        return None
    axis = b.pick((*x.others, x.c))
    if x.shape[axis] < 2:
        return None
    shape = tuple(2 if a == axis else s for a, s in enumerate(x.shape))
    outputs = [replace(x, shape=shape), replace(x, shape=shape, dtype=np.int64)]
    if b.opset < 10:
        values, indices = b.node("TopK", [x], outputs, axis=axis, k=2)
    else:
        values, indices = b.node("TopK", [x, b.ints(2)], outputs, axis=axis)
    if axis == x.c and b.one_in(2):
        elsewhere(b, x)
    if b.one_in(2):
        return values
    return b.op("Add", values, b.op("Mul", b.cast(indices, b.real), b.scalar(0.2)))


# -- space -----------------------------------------------------------------------------------------


@motif("Upsample", on=("map2",), until=9)
@motif("Resize", on=("map2",), since=10)
def doubled(b: Builder, x: T, op: str) -> T | None:
    if max(x.shape[2:]) > 8:
        return None
    shape = [*x.shape[:2], *(s * 2 for s in x.shape[2:])]
    mode = b.pick(("nearest", "linear"))
    scales = np.asarray([1, 1, 2, 2], np.float32)
    if op == "Upsample" and b.opset < 9:
        return b.op(op, x, shape=shape, mode=mode, scales=scales.tolist())
    if b.opset < 11:
        return b.op(op, x, b.initializer(scales), shape=shape, mode=mode)
    if b.opset >= 18 and b.one_in(2):
        return b.op(op, x, None, b.initializer(scales[2:]), shape=shape, mode=mode, axes=[2, 3])
    if b.one_in(2) and not any(isinstance(s, Open) for s in shape):
        return b.op(op, x, None, None, b.ints(*shape), shape=shape, mode=mode)
    if b.one_in(2):
        return _doubled_by_shape(b, x, shape, mode)
    return b.op(op, x, None, b.initializer(scales), shape=shape, mode=mode)


def _doubled_by_shape(b: Builder, x: T, shape: Sequence[int], mode: str) -> T:
    """Sizes computed from the shape, as U-Net exports have them."""
    now = b.op("Shape", x, shape=[4], c=0, dtype=np.int64)
    twice = b.op("Mul", now, b.initializer(np.asarray([1, 1, 2, 2], np.int64)))
    return b.op("Resize", x, None, None, twice, shape=shape, mode=mode)


@motif("Pad", on=_WIDE)
def padded(b: Builder, x: T, op: str) -> T | None:
    """Around space or channels, with a constant, a mirror or the edge."""
    axes = [x.c] if b.one_in(3) else [b.pick(x.others)]
    if x.c in axes and b.one_in(2):
        elsewhere(b, x)
    mode = b.pick(("constant", "reflect", "edge"))
    if any(x.shape[a] < 3 for a in axes):
        return None
    before, after = b.pick(((1, 1), (0, 2), (2, 0)))
    grown = [s + before + after if a in axes else s for a, s in enumerate(x.shape)]
    amounts = [before if a in axes else 0 for a in range(x.rank)]
    amounts += [after if a in axes else 0 for a in range(x.rank)]
    value = 0.7 if mode == "constant" and b.one_in(2) else 0.0
    if b.opset < 11:
        return b.op("Pad", x, shape=grown, mode=mode, pads=amounts, value=value)
    inputs: list[T | str | None] = [x, b.ints(*amounts)]
    if value:
        inputs.append(b.scalar(value))
    if b.opset >= 18 and b.one_in(2):
        inputs[1] = b.ints(*[before] * len(axes), *[after] * len(axes))
        inputs += [None] * (3 - len(inputs)) + [b.ints(*axes)]
    return b.op("Pad", *inputs, shape=grown, mode=mode)


@motif("GridSample", on=("map2",), since=16)
def sampled(b: Builder, x: T, op: str) -> T | None:
    if isinstance(x.shape[0], Open) or b.real is not np.float32:
        return None
    grid = b.rng.uniform(-1, 1, (x.shape[0], 4, 4, 2)).astype(b.real)
    mode = "bilinear" if b.opset < 20 else "linear"
    return b.op(op, x, b.initializer(grid), shape=[*x.shape[:2], 4, 4], mode=mode)


@motif("GridSample", on=("map2",), since=16)
def sampled_at_computed_places(b: Builder, x: T, op: str) -> T | None:
    """A layer says where to sample, as spatial transformers do."""
    if b.real is not np.float32:
        return None
    places = b.op("Tanh", layer(b, x, 2))
    elsewhere(b, places)
    grid = b.transpose(places, (0, 2, 3, 1))
    mode = "bilinear" if b.opset < 20 else "linear"
    shape = [*x.shape[:2], *places.shape[2:]]
    return b.op(op, x, grid, shape=shape, c=1, mode=mode)


@motif("RoiAlign", on=("map2",), since=10, until=21)  # ONNX Runtime has no newer one yet
@motif("MaxRoiPool", on=("map2",), until=21)
def regions(b: Builder, x: T, op: str) -> T | None:
    if b.real is not np.float32 or max(x.shape[2:]) < 4:
        return None
    corners = np.asarray([[0, 0, 2, 2], [1, 1, 3, 3]], np.float32)
    if op == "RoiAlign":
        names = [b.initializer(corners), b.initializer(np.zeros(2, np.int64))]
        extra: dict[str, Any] = {"output_height": 2, "output_width": 2}
    else:
        names = [b.initializer(np.concatenate([np.zeros((2, 1), np.float32), corners], axis=1))]
        extra = {"pooled_shape": [2, 2]}
    return b.op(op, x, *names, shape=[2, x.shape[1], 2, 2], **extra)
