"""Bounds of what pools, pads, resizes, reduces and joins."""

from __future__ import annotations

import numpy as np

from onnxprune import fields
from onnxprune.bounds.view import Unknown, View, bounds_of
from onnxprune.intervals import Interval, between, join, unknown
from onnxprune.types import Float64Array

_SPACE = 2  # first spatial axis of (N, C, spatial…)


@bounds_of("MaxPool", "GlobalMaxPool", "GlobalAveragePool", "AveragePool")
def _pool(view: View) -> Interval:
    x = view.need(0)
    x = x.hull(range(_SPACE, x.rank))
    # Zeros around the input count where an average is told to count them.
    counted = view.node.op_type == "AveragePool" and view.node.int("count_include_pad", 0)
    return join(x, between(0, 0, x.rank)) if counted else x


@bounds_of("ReduceMean", "ReduceMax", "ReduceMin", "ReduceSum")
def _reduce(view: View) -> Interval:
    node, x = view.node, view.need(0)
    axes = node.ints("axes")
    if axes is None and view.given(1):
        found = view.bounds.values.read(node.inputs[1])
        if found is None:
            raise Unknown
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


@bounds_of("Resize", "Upsample")
def _resize(view: View) -> Interval:
    """Averages of neighbours stay between them; other ways to interpolate may overshoot."""
    x, node = view.need(0), view.node
    after = view.bounds.env.shape(node.outputs[0]) or ()
    changed = [a for a, (m, n) in enumerate(zip(view.shape(0), after, strict=True)) if m != n]
    plain = node.string("mode", "nearest") in ("nearest", "linear", "bilinear")
    outside = node.string("coordinate_transformation_mode", "") == "tf_crop_and_resize"
    x = x.hull(sorted({*changed, *range(_SPACE, x.rank)}))
    return x if plain and not outside else between(0, 0, x.rank).where(x.zero, unknown(x.rank))


@bounds_of("Pad")
def _pad(view: View) -> Interval:
    """Zeros or other values around the input, or copies of what is in it."""
    x, node = view.need(0), view.node
    x = x.hull(_padded(view, x.rank))
    if node.string("mode", "constant") != "constant":
        return x
    value = view.number("value", 0)
    filled = view.need(2) if view.given(2) else between(value, value, x.rank)
    return join(x, filled.moved(lambda ends: fields.lift(ends.reshape(-1), x.rank)))


def _padded(view: View, rank: int) -> list[int]:
    """Axes that gain or lose elements, all of them where that is not known."""
    sizes, axes = view.node.ints("pads"), tuple(range(rank))
    for position in (1, 3):
        if view.given(position):
            found = view.bounds.values.read(view.node.inputs[position])
            if found is None:
                return list(range(rank))
            given = tuple(int(v) for v in found.reshape(-1))
            sizes, axes = (given, axes) if position == 1 else (sizes, given)
    if sizes is None or len(sizes) != 2 * len(axes):
        return list(range(rank))
    count = len(axes)
    return sorted({axes[i] % rank for i in range(count) if sizes[i] or sizes[i + count]})


@bounds_of("Concat")
def _concat(view: View) -> Interval:
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
