"""Pieces that look along axes: norms, pools, reductions, resizing, padding, sampling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tests.property.builder import Builder, Open, T
from tests.property.layers import elsewhere, joined, layer
from tests.property.motifs import ANY, MAPS, motif
from tests.property.pointwise import positive
from tests.property.weights import vector, weight

_WIDE = (*MAPS, "last")


def _spread(x: T, axes: Sequence[int]) -> int:
    return math.prod(x.shape[a] for a in axes)


# -- norms -----------------------------------------------------------------------------------------


@motif("BatchNormalization", on=(*MAPS, "flat"))
def batch_norm(b: Builder, x: T, op: str) -> T:
    n = x.channels
    mean = b.initializer(b.normal(n, scale=0.3))
    inputs = [x, vector(b, n), vector(b, n), mean, vector(b, n, positive=True)]
    return b.op("BatchNormalization", *inputs, epsilon=1e-4)


@motif("BatchNormalization", on=MAPS, since=14)
def batch_norm_in_training(b: Builder, x: T, op: str) -> T | None:
    if b.real is not np.float32 or _spread(x, x.others) < 4:
        return None
    n = x.channels
    inputs = [x, vector(b, n), vector(b, n), vector(b, n), vector(b, n, positive=True)]
    each = T("", (n,), 0, b.real)
    made = b.node("BatchNormalization", inputs, [x, each, each], training_mode=1)
    return made[0]


@motif("InstanceNormalization", on=MAPS)
def instance_norm(b: Builder, x: T, op: str) -> T | None:
    if _spread(x, x.others) < 4:
        return None
    return b.op("InstanceNormalization", x, vector(b, x.channels), vector(b, x.channels))


@motif("GroupNormalization", on=MAPS, since=18)
def group_norm(b: Builder, x: T, op: str) -> T | None:
    groups = b.pick([g for g in (2, 4, 1, x.channels) if x.channels % g == 0])
    if x.channels // groups * _spread(x, x.others) < 4:
        return None
    if 18 < b.opset < 21:  # version 18 was withdrawn
        return None
    size = x.channels if b.opset >= 21 else groups
    return b.op("GroupNormalization", x, vector(b, size), vector(b, size), num_groups=groups)


@motif("InstanceNormalization", on=("map2",))
def group_norm_as_exported(b: Builder, x: T, op: str) -> T | None:
    """Reshape to (N, groups, rest), InstanceNormalization, and back: before opset 18."""
    groups = b.pick((2, 4))
    if x.channels % groups or any(isinstance(s, Open) for s in x.shape):
        return None
    if x.channels // groups * _spread(x, x.others) < 4:
        return None
    shape = [int(s) for s in x.shape]
    y = b.op("Reshape", x, b.ints(0, groups, -1), shape=[shape[0], groups, x.channels // groups
             * shape[2] * shape[3]], c=1)  # fmt: skip
    ones, zeros = (b.initializer(np.full(groups, v, b.real)) for v in (1, 0))
    y = b.op("InstanceNormalization", y, ones, zeros)
    y = b.op("Reshape", y, b.ints(*shape), shape=shape, c=1)
    return b.op("Mul", y, weight(b, b.factors(x.channels, 1, 1)))


@motif("LayerNormalization", on=ANY, since=17)
@motif("RMSNormalization", on=ANY, since=23)
def layer_norm(b: Builder, x: T, op: str) -> T | None:
    """Over the last axes, channels among them or not."""
    axis = b.integer(max(x.c + 1, 2) if b.one_in(3) else 1, x.rank) if x.c < x.rank - 1 else -1
    axis = min(axis, x.rank - 1)
    shape = x.shape[axis:]
    if any(isinstance(s, Open) for s in shape) or math.prod(shape) < 3:
        return None
    inputs = [x, weight(b, b.factors(*shape))]
    if op == "LayerNormalization" and b.one_in(2):
        inputs.append(weight(b, b.factors(*shape)))
    return joined(b, x, b.op(op, *inputs, axis=axis))


@motif("Softmax", "LogSoftmax", "Hardmax", on=ANY)
def softmax(b: Builder, x: T, op: str) -> T | None:
    axis = b.pick((x.rank - 1, 1, 2 if x.rank > 2 else 1))
    if op == "Hardmax" and b.real is np.float16:
        return None
    y = b.op(op, x, axis=b.pick((axis, axis - x.rank)) if b.opset >= 11 else axis)
    return joined(b, x, y)


@motif("CumSum", on=ANY, since=11)
def cumulative_sum(b: Builder, x: T, op: str) -> T | None:
    if b.real is np.float16:
        return None
    axis = b.integer(1, x.rank - 1)
    along = b.initializer(np.asarray(b.pick((axis, axis - x.rank)), np.int64))
    y = b.op("CumSum", x, along, exclusive=b.integer(0, 1), reverse=b.integer(0, 1))
    return joined(b, x, b.op("Mul", y, b.scalar(0.3)))


@motif("LRN", on=("map2",))
def response(b: Builder, x: T, op: str) -> T:
    """Over channels, which stay, or (transposed) over rows."""
    if b.one_in(2):
        return joined(b, x, b.op("LRN", x, size=3, alpha=0.5))
    y = b.op("LRN", b.transpose(x, (0, 2, 1, 3)), size=3, alpha=0.5)
    return b.transpose(y, (0, 2, 1, 3))


@motif("LpNormalization", on=ANY)
def lp_norm(b: Builder, x: T, op: str) -> T:
    axis = b.integer(1, x.rank - 1)
    y = b.op("LpNormalization", x, axis=b.pick((axis, axis - x.rank)), p=b.pick((2, 1)))
    return joined(b, x, b.op("Mul", y, b.scalar(3.0)))


@motif("MeanVarianceNormalization", on=("map2",), since=9)
def mean_variance(b: Builder, x: T, op: str) -> T | None:
    if _spread(x, x.others) < 4:
        return None
    return b.op("MeanVarianceNormalization", x, **({"axes": [2, 3]} if b.one_in(2) else {}))


# -- pools -----------------------------------------------------------------------------------------


@motif("MaxPool", "AveragePool", "LpPool", on=("map2", "map1"))
def pool(b: Builder, x: T, op: str) -> T | None:
    if min(x.shape[2:]) < 3:
        return None
    dims = x.rank - 2
    if b.one_in(2):
        attributes: dict[str, object] = {"kernel_shape": [2] * dims, "strides": [2] * dims}
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
            return b.op("Mul", x, b.scalar(1 / math.sqrt(_spread(x, axes))))
    return x


def _reduce(b: Builder, x: T, op: str, axes: Sequence[int], keep: bool) -> T:
    since = 13 if op == "ReduceSum" else 18
    shape = [1 if a in axes else s for a, s in enumerate(x.shape) if keep or a not in axes]
    c = x.c if keep else x.c - sum(a < x.c for a in axes)
    spelled = [a - x.rank for a in axes] if b.opset >= 11 and b.one_in(2) else axes
    extra = {} if keep and b.one_in(2) else {"keepdims": int(keep)}
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
    return b.op("Add", x, b.op("Mul", b.cast(found, b.real), b.scalar(0.3)), shape=x.shape)


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
        extra = {"output_height": 2, "output_width": 2}
    else:
        names = [b.initializer(np.concatenate([np.zeros((2, 1), np.float32), corners], axis=1))]
        extra = {"pooled_shape": [2, 2]}
    return b.op(op, x, *names, shape=[2, x.shape[1], 2, 2], **extra)
