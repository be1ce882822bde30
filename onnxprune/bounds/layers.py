"""Bounds of what weights and normalisations make."""

from __future__ import annotations

import numpy as np

from onnxprune import fields
from onnxprune.bounds.view import Unknown, View, Wild, bounds_of
from onnxprune.graph import Node
from onnxprune.intervals import (
    Interval,
    add,
    between,
    divide,
    join,
    multiply,
    negate,
    unknown,
    weighted,
)
from onnxprune.types import FloatArray, Shape

_CHANNEL = 1
_SPACE = 2  # first spatial axis of (N, C, spatial…)
_CHUNK = 1 << 22  # elements of a weight that are worked on at a time


@bounds_of("Conv")
def _conv(view: View) -> Interval:
    weight, group = view.weight(1), view.node.int("group", 1)
    x = view.bounds.along(view.node.inputs[0], _CHANNEL)
    if x is None:
        raise Unknown
    if pads(view.node, weight.shape[2:]):
        x = join(x, between(0, 0, 1))
    out, width = weight.shape[:2]
    taps = weight.reshape(group, out // group, width, -1)
    return _with_bias(view, _products(taps, x), weight.ndim)


@bounds_of("ConvTranspose")
def _conv_transpose(view: View) -> Interval:
    """Every output sees some of the taps, so each counts as if it might be missing."""
    weight, group = view.weight(1), view.node.int("group", 1)
    x = view.bounds.along(view.node.inputs[0], _CHANNEL)
    if x is None:
        raise Unknown
    x = join(x, between(0, 0, 1))
    taps = weight.reshape(group, weight.shape[0] // group, weight.shape[1], -1)
    return _with_bias(view, _products(taps.transpose(0, 2, 1, 3), x), weight.ndim)


def _products(taps: FloatArray, x: Interval) -> Interval:
    """Sums over inputs and taps, shape (out,); ``taps``: (group, out / group, in / group, taps)."""
    group, out, width, count = taps.shape
    column = x.moved(lambda ends: np.repeat(ends.reshape(group, width), count, axis=1))
    step = max(1, _CHUNK // max(1, group * width * count))
    parts = [
        weighted(taps[:, start : start + step].reshape(group, -1, width * count), column)
        for start in range(0, out, step)
    ]
    return Interval(
        np.concatenate([part.low for part in parts], axis=1).reshape(-1),
        np.concatenate([part.high for part in parts], axis=1).reshape(-1),
    )


def _with_bias(view: View, sums: Interval, rank: int) -> Interval:
    if view.given(2):
        sums = add(sums, view.need(2))
    return sums.moved(lambda ends: fields.along(ends, _CHANNEL, rank))


def pads(node: Node, kernel: Shape) -> bool:
    """Whether a Conv adds zeros around its input."""
    auto = node.string("auto_pad", "NOTSET")
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        # With a stride wider than the kernel nothing is added, but then sizes decide.
        return any(size > 1 for size in kernel)
    return auto == "NOTSET" and any(node.ints("pads") or ())


@bounds_of("Gemm")
def _gemm(view: View) -> Interval:
    node, derived = view.node, view.bounds.values.graph.derived
    if node.inputs[1] not in derived or node.inputs[0] in derived:
        raise Unknown
    weight = view.weight(1) if node.int("transB", 0) else view.weight(1).T
    x = view.bounds.along(node.inputs[0], 0 if node.int("transA", 0) else 1)
    if x is None:
        raise Unknown
    sums = _products(weight[None, :, :, None], x)
    sums = multiply(sums, between(view.number("alpha", 1), view.number("alpha", 1), 1))
    beta = view.number("beta", 1)
    if view.given(2) and beta:
        sums = add(sums, multiply(view.need(2), between(beta, beta, 1)))
    return sums.moved(lambda ends: fields.lift(ends, 2))


@bounds_of("MatMul")
def _matmul(view: View) -> Interval:
    node, derived = view.node, view.bounds.values.graph.derived
    a, b = view.need(0), view.need(1)
    if a.rank < 2 or b.rank < 2:
        raise Unknown
    if node.inputs[1] in derived and b.rank == 2:
        x = view.bounds.along(node.inputs[0], a.rank - 1)
        assert x is not None
        sums = _products(view.weight(1).T[None, :, :, None], x)
        return sums.moved(lambda ends: fields.along(ends, a.rank - 1, a.rank))
    if node.inputs[0] in derived and a.rank == 2:
        x = view.bounds.along(node.inputs[1], b.rank - 2)
        assert x is not None
        sums = _products(view.weight(0)[None, :, :, None], x)
        return sums.moved(lambda ends: fields.along(ends, b.rank - 2, b.rank))
    # A row of zeros times anything is 0; that is how a head without effect looks.
    rank = max(a.rank, b.rank)
    left = fields.lift(a.hull([a.rank - 1]).zero, rank)
    right = fields.lift(b.hull([b.rank - 2]).zero, rank)
    return between(0, 0, rank).where(left | right, unknown(rank))


# -- normalisation ---------------------------------------------------------------------------------


@bounds_of("BatchNormalization")
def _batch_normalization(view: View) -> Interval:
    if _trains(view.node) or len(view.shape(1)) != 1:  # one for each element, before opset 9
        raise Unknown
    x = view.need(0)
    scale, shift, mean, var = (
        view.need(position).moved(lambda ends: fields.along(ends, _CHANNEL, x.rank))
        for position in range(1, 5)
    )
    if not all(np.isfinite(one.low).all() for one in (scale, shift, mean, var)):
        raise Wild
    spread = add(var, between(*(view.number("epsilon", 1e-5),) * 2, x.rank)).monotone(np.sqrt)
    if spread.zero.any():
        raise Wild
    return add(multiply(add(x, negate(mean)), divide(scale, spread)), shift)


def _trains(node: Node) -> bool:
    """Whether statistics come from the batch; each generation of the operator says so its way."""
    if node.since >= 14:
        return node.int("training_mode", 0) == 1
    if node.since < 7 and not node.int("is_test", 0):
        return True
    return any(node.outputs[1:])


@bounds_of("InstanceNormalization")
def _instance_normalization(view: View) -> Interval:
    x = view.need(0)
    scale, shift = (
        view.need(position).moved(lambda ends: fields.along(ends, _CHANNEL, x.rank))
        for position in (1, 2)
    )
    nothing = x.hull(range(_SPACE, x.rank)).zero
    return add(multiply(between(0, 0, x.rank).where(nothing, unknown(x.rank)), scale), shift)


@bounds_of("LayerNormalization")
def _layer_normalization(view: View) -> Interval:
    """A scale of 0 leaves the shift; nothing else is known."""
    rank = view.need(0).rank
    scaled = multiply(unknown(rank), view.need(1).moved(lambda ends: fields.lift(ends, rank)))
    if not view.given(2):
        return scaled
    return add(scaled, view.need(2).moved(lambda ends: fields.lift(ends, rank)))


@bounds_of("GroupNormalization")
def _group_normalization(view: View) -> Interval:
    rank, width = view.need(0).rank, view.shape(0)[_CHANNEL]
    scale, shift = view.need(1), view.need(2)
    if scale.low.size not in (1, width) or shift.low.size not in (1, width):
        raise Unknown  # one for each group, before opset 21
    scale, shift = (
        one.moved(lambda ends: fields.along(ends.reshape(-1), _CHANNEL, rank))
        for one in (scale, shift)
    )
    return add(multiply(unknown(rank), scale), shift)


@bounds_of("Softmax")
def _softmax(view: View) -> Interval:
    return between(0, 1, view.need(0).rank)
