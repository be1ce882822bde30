"""Constants in the many forms exporters give them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tests.property.builder import Builder
from tests.property.tensors import Array, Open, T


def weight(b: Builder, array: Array) -> str:
    """A constant: an initializer, a Constant node, or the end of a chain that gives it back."""
    if not b.one_in(3):
        return _plain(b, array)
    forms = [_shared, _constant, _identity, _cast, _transposed, _reshaped, _unsqueezed, _scaled]
    if b.opset >= 10 and b.real is np.float32:
        forms.append(_quantized)
    return str(b.pick(forms)(b, array))


def vector(b: Builder, size: int, *, positive: bool = False) -> str:
    """A bias, scale or the like."""
    values = b.rng.uniform(0.5, 1.5, size) if positive else b.factors(size)
    array = values.astype(b.real)
    if not b.one_in(5):
        return _plain(b, array)
    return str(b.pick([_shared, _constant, _identity, _unsqueezed])(b, array))


def operand(b: Builder, x: T, *, positive: bool = False, rank: int | None = None) -> str:
    """A constant that broadcasts to ``x``: along channels, other axes, all of them, or none."""
    full = [1 if isinstance(s, Open) else s for s in x.shape]
    style = b.pick(("channels", "channels", "full", "some", "scalar"))
    if style == "scalar":
        shape: Sequence[int] = b.pick(((), (1,), (1,) * x.rank))
    elif style == "channels":
        shape = [s if a == x.c else 1 for a, s in enumerate(full)]
    elif style == "full":
        shape = full
    else:
        shape = [s if b.one_in(2) else 1 for s in full]
    if style != "scalar":
        shape = _trimmed(b, shape)
    if rank is not None:
        shape = (1,) * (rank - len(shape)) + tuple(shape)
    values = np.abs(b.factors(*shape)) if positive else b.factors(*shape)
    return weight(b, np.asarray(values, b.real))


def _trimmed(b: Builder, shape: Sequence[int]) -> tuple[int, ...]:
    """Without some of the leading ones, which broadcasting does not need."""
    shape = tuple(shape)
    while shape and shape[0] == 1 and b.one_in(2):
        shape = shape[1:]
    return shape


def _plain(b: Builder, array: Array) -> str:
    return b.initializer(array)


def _constant(b: Builder, array: Array) -> str:
    return b.constant(array)


def _shared(b: Builder, array: Array) -> str:
    """An initializer that something else uses already, if one has this shape."""
    for name, other in b.initializers.items():
        if other.shape == array.shape and other.dtype == array.dtype and array.ndim:
            return name
    return b.initializer(array)


def _op(b: Builder, op_type: str, array: Array, *inputs: str, **attributes: Any) -> str:
    return b.op(op_type, *inputs, shape=array.shape, **attributes).name


def _identity(b: Builder, array: Array) -> str:
    return _op(b, "Identity", array, b.initializer(array))


def _cast(b: Builder, array: Array) -> str:
    wide = np.float32 if b.real is np.float64 else np.float64
    x = T(b.initializer(array.astype(wide)), array.shape, 0, wide)
    return b.cast(x, b.real).name


def _transposed(b: Builder, array: Array) -> str:
    if array.ndim < 2:
        return _identity(b, array)
    perm = b.shuffled(range(array.ndim))
    stored = b.initializer(np.ascontiguousarray(array.transpose(np.argsort(perm))))
    return _op(b, "Transpose", array, stored, perm=perm)


def _reshaped(b: Builder, array: Array) -> str:
    """Stored with an axis split in two, or all in one."""
    wide = array.reshape(-1) if b.one_in(2) else array.reshape(*array.shape[:-1], -1, 1)
    return _op(b, "Reshape", array, b.initializer(wide), b.ints(*array.shape))


def _unsqueezed(b: Builder, array: Array) -> str:
    if not array.ndim or 1 not in array.shape:
        extra = T(b.initializer(array[None]), (1, *array.shape), 0, b.real)
        return b.squeeze(extra, [0]).name
    axis = array.shape.index(1)
    less = array.reshape([s for a, s in enumerate(array.shape) if a != axis])
    return b.unsqueeze(T(b.initializer(less), less.shape, 0, b.real), axis).name


def _scaled(b: Builder, array: Array) -> str:
    """Weight normalisation as exporters leave it: w = v · g."""
    shape = [s if a == 0 else 1 for a, s in enumerate(array.shape)]
    gain = np.asarray(b.rng.uniform(0.5, 2, shape), b.real)
    value = np.asarray(array / gain, b.real)
    return _op(b, "Mul", array, b.initializer(value), b.initializer(gain))


def _quantized(b: Builder, array: Array) -> str:
    """Eight bits, one scale for all or (opset 13) one for each entry of an axis."""
    axis = b.integer(0, array.ndim - 1) if array.ndim and b.opset >= 13 and b.one_in(2) else None
    moved = np.abs(array) if axis is None else np.abs(np.moveaxis(array, axis, 0))
    peak = moved.max() if axis is None else moved.reshape(moved.shape[0], -1).max(axis=1)
    scale = np.asarray(np.maximum(peak, 1e-2) / 100, np.float32)
    wide = scale if axis is None else scale.reshape([-1 if a == axis else 1
                                                     for a in range(array.ndim)])  # fmt: skip
    points = b.rng.integers(-20, 20, scale.shape) if b.one_in(2) else np.zeros(scale.shape, int)
    shift = points if axis is None else points.reshape(wide.shape)
    stored = np.clip(np.round(np.asarray(array, np.float32) / wide) + shift, -127, 127).astype(
        np.int8
    )
    inputs = [b.initializer(stored), b.initializer(scale)]
    if points.any() or b.one_in(2):
        inputs.append(b.initializer(points.astype(np.int8)))
    attributes: dict[str, Any] = {} if axis is None else {"axis": axis}
    return _op(b, "DequantizeLinear", array, *inputs, **attributes)
