"""Normalisations, in inference and in training, whole and taken apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tests.property.builder import Builder
from tests.property.layers import joined
from tests.property.motifs import ANY, MAPS, motif
from tests.property.tensors import Open, T, at
from tests.property.weights import vector, weight


def spread(x: T, axes: Sequence[int]) -> int:
    """Number of positions on some axes."""
    return math.prod(x.shape[a] for a in axes)


@motif("BatchNormalization", on=(*MAPS, "flat"))
def batch_norm(b: Builder, x: T, op: str) -> T:
    n = x.channels
    mean = b.initializer(b.normal(n, scale=0.3))
    inputs: list[T | str] = [x, vector(b, n), vector(b, n), mean, vector(b, n, positive=True)]
    return b.op("BatchNormalization", *inputs, epsilon=1e-4)


@motif("BatchNormalization", on=MAPS, since=14)
def batch_norm_in_training(b: Builder, x: T, op: str) -> T | None:
    if b.real is not np.float32 or spread(x, x.others) < 4:
        return None
    n = x.channels
    inputs: list[T | str] = [
        x,
        vector(b, n),
        vector(b, n),
        vector(b, n),
        vector(b, n, positive=True),
    ]
    each = T("", (n,), 0, b.real)
    made = b.node("BatchNormalization", inputs, [x, each, each], training_mode=1)
    return made[0]


@motif("InstanceNormalization", on=MAPS)
def instance_norm(b: Builder, x: T, op: str) -> T | None:
    if spread(x, x.others) < 4:
        return None
    return b.op("InstanceNormalization", x, vector(b, x.channels), vector(b, x.channels))


@motif("GroupNormalization", on=MAPS, since=18)
def group_norm(b: Builder, x: T, op: str) -> T | None:
    groups = b.pick([g for g in (2, 4, 1, x.channels) if x.channels % g == 0])
    if x.channels // groups * spread(x, x.others) < 4:
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
    if x.channels // groups * spread(x, x.others) < 4:
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
    inputs: list[T | str] = [x, weight(b, b.factors(*shape))]
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


@motif("LRN", "Softmax", "LogSoftmax", "LpNormalization", on=("map2", "flat"))
@motif("MeanVarianceNormalization", on=("map2",), since=9)
def over_rows_of_a_grid(b: Builder, x: T, op: str) -> T | None:
    """Channels as rows and columns, of which one axis is looked over."""
    group = b.pick((2, 4))
    if x.channels % group or (op in ("LRN", "MeanVarianceNormalization") and x.kind == "flat"):
        return None
    if op == "MeanVarianceNormalization" and spread(x, x.others) < 4:
        return None  # a line of equal numbers has no deviation to divide by
    space = [] if x.kind == "flat" else [at(2, 3)]
    y = b.reshape(x, [at(0), group, at(1, over=group), *space], c=2)
    extra: dict[str, Any] = {
        "LRN": {"size": 3},
        "MeanVarianceNormalization": {"axes": b.pick(([1, 3], [2, 3]))},
    }.get(op, {"axis": b.pick((1, 2)) if op == "LpNormalization" or b.opset >= 13 else 2})
    y = b.op(op, y, **extra)
    if x.kind == "flat":
        return b.reshape(y, [at(0), at(1, 2)], c=1)
    return b.reshape(y, [at(0), at(1, 2), at(3)], c=1)


@motif("LpNormalization", on=ANY)
def lp_norm(b: Builder, x: T, op: str) -> T:
    axis = b.integer(1, x.rank - 1)
    y = b.op("LpNormalization", x, axis=b.pick((axis, axis - x.rank)), p=b.pick((2, 1)))
    return joined(b, x, b.op("Mul", y, b.scalar(3.0)))


@motif("MeanVarianceNormalization", on=("map2",), since=9)
def mean_variance(b: Builder, x: T, op: str) -> T | None:
    if spread(x, x.others) < 4:
        return None
    axes = b.pick((None, [2, 3], [1, 2, 3]))
    y = b.op("MeanVarianceNormalization", x, **({} if axes is None else {"axes": axes}))
    return joined(b, x, y) if axes and 1 in axes else y
