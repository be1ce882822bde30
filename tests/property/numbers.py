"""Data made from shapes, or from nothing: extents as numbers, ones, positions, noise."""

from __future__ import annotations

import numpy as np
from onnx import helper

from tests.property.builder import Builder
from tests.property.layers import joined, layer
from tests.property.motifs import ANY, motif
from tests.property.tensors import Open, T


@motif("Size", on=ANY)
def scaled_by_size(b: Builder, x: T, op: str) -> T:
    """The number of elements is used as data, and must stay what it was."""
    size = b.cast(b.op("Size", x, shape=(), c=0, dtype=np.int64), b.real)
    return b.op("Mul", x, b.op("Sqrt", b.op("Log", b.op("Sqrt", size))))


@motif("Shape", on=ANY)
def scaled_by_extent(b: Builder, x: T, op: str) -> T:
    """An extent is used as data, often that of the channels."""
    axis = b.pick((x.c, 1, x.rank - 1))
    shape = b.op("Shape", x, shape=[x.rank], c=0, dtype=np.int64)
    extent = b.op("Gather", shape, b.scalar(axis, np.int64), shape=(), axis=0)
    return b.op("Div", x, b.op("Sqrt", b.cast(extent, b.real)))


@motif("ConstantOfShape", on=ANY, since=9)
def plus_ones(b: Builder, x: T, op: str) -> T:
    """Ones in the shape of the data are added to it."""
    shape = b.op("Shape", x, shape=[x.rank], c=0, dtype=np.int64)
    value = helper.make_tensor("", helper.np_dtype_to_tensor_dtype(np.dtype(b.real)), [1], [1.0])
    ones = b.op("ConstantOfShape", shape, shape=x.shape, c=x.c, dtype=x.dtype, value=value)
    return joined(b, x, ones)


@motif("Range", on=ANY, since=11)
def plus_positions(b: Builder, x: T, op: str) -> T | None:
    """Positions along the last axis are added."""
    shape = b.op("Shape", x, shape=[x.rank], c=0, dtype=np.int64)
    end = b.op("Gather", shape, b.scalar(x.rank - 1, np.int64), shape=(), axis=0)
    start, step = b.scalar(0, np.int64), b.scalar(1, np.int64)
    positions = b.op("Range", start, end, step, shape=[x.shape[-1]], c=0, dtype=np.int64)
    return b.op("Add", x, b.op("Mul", b.cast(positions, b.real), b.scalar(0.1)))


@motif("RandomNormal", "RandomUniform", on=ANY, until=21)  # no newer ones in ONNX Runtime
def plus_noise(b: Builder, x: T, op: str) -> T | None:
    """Noise of a fixed shape, the same in every run."""
    if any(isinstance(s, Open) for s in x.shape[1:]):
        return None
    shape = [1, *x.shape[1:]] if b.one_in(2) else [1] * x.rank
    to = helper.np_dtype_to_tensor_dtype(np.dtype(b.real))
    made = [T("", tuple(shape), x.c, b.real)]
    noise = b.node(op, [], made, shape=shape, seed=1.0, dtype=to)[0]
    return b.op("Add", x, noise)


@motif("RandomNormalLike", "RandomUniformLike", on=ANY, until=21)
def plus_noise_like(b: Builder, x: T, op: str) -> T:
    """Noise in the shape of the data, which then stays, or of what no cut reaches."""
    if b.one_in(3):
        return joined(b, x, b.op(op, x, seed=1.0))
    return b.op("Add", x, b.op(op, _one_channel(b, x), seed=1.0), shape=x.shape)


def _one_channel(b: Builder, x: T) -> T:
    """The same with a single channel."""
    y = layer(b, x, 1)
    return b.op("Tanh", y)


@motif("EyeLike", on=("flat",), since=9)
def plus_identity(b: Builder, x: T, op: str) -> T:
    if b.one_in(3):
        return joined(b, x, b.op("EyeLike", x))
    return b.op("Add", x, b.op("EyeLike", _one_channel(b, x)), shape=x.shape)
