"""Interval arithmetic on arrays: what is known of the values of a tensor, element by element.

Low and high ends have the tensor's rank and size 1 along every axis on which nothing tells its
elements apart, as fields do. Equal ends are a constant; infinite ends are no bound. Arithmetic is
that of real numbers: 0 times anything is 0, since activations are finite.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from onnxprune.types import AnyArray, BoolArray, Float64Array, FloatArray

Function = Callable[[Float64Array], Float64Array]


@dataclass(frozen=True, slots=True)
class Interval:
    """Low and high ends, of one shape."""

    low: Float64Array
    high: Float64Array

    @property
    def constant(self) -> BoolArray:
        """Where both ends are one finite number."""
        return np.asarray((self.low == self.high) & np.isfinite(self.low))

    @property
    def zero(self) -> BoolArray:
        """Where the value is 0."""
        return np.asarray((self.low == 0) & (self.high == 0))

    @property
    def rank(self) -> int:
        """Number of axes."""
        return self.low.ndim

    def hull(self, axes: Sequence[int]) -> Interval:
        """One interval for all that lies along some axes, which get size 1."""
        over = tuple(axes)
        return Interval(
            self.low.min(axis=over, keepdims=True), self.high.max(axis=over, keepdims=True)
        )

    def moved(self, move: Callable[[Float64Array], Float64Array]) -> Interval:
        """The same movement of elements for both ends."""
        return Interval(move(self.low), move(self.high))

    def monotone(self, function: Function) -> Interval:
        """Image under a function that never falls."""
        with np.errstate(all="ignore"):
            return _without_nan(function(self.low), function(self.high))

    def where(self, condition: BoolArray, other: Interval) -> Interval:
        """``self`` where the condition holds, else ``other``."""
        return Interval(
            np.where(condition, self.low, other.low), np.where(condition, self.high, other.high)
        )


def unknown(rank: int) -> Interval:
    """No bound at all."""
    ends = np.full((1,) * rank, np.inf)
    return Interval(-ends, ends)


def exactly(values: AnyArray) -> Interval:
    """Known values."""
    ends = np.asarray(values).astype(np.float64)
    return Interval(ends, ends)


def between(low: float, high: float, rank: int) -> Interval:
    """The same ends everywhere."""
    return Interval(np.full((1,) * rank, low), np.full((1,) * rank, high))


def join(a: Interval, b: Interval) -> Interval:
    """The smallest interval around both."""
    return Interval(np.minimum(a.low, b.low), np.maximum(a.high, b.high))


def add(a: Interval, b: Interval) -> Interval:
    """Sum."""
    with np.errstate(invalid="ignore"):
        return _without_nan(a.low + b.low, a.high + b.high)


def negate(a: Interval) -> Interval:
    """Negative."""
    return Interval(-a.high, -a.low)


def multiply(a: Interval, b: Interval) -> Interval:
    """Product; 0 times anything is 0."""
    products = [_times(x, y) for x in (a.low, a.high) for y in (b.low, b.high)]
    return Interval(np.minimum.reduce(products), np.maximum.reduce(products))


def divide(a: Interval, b: Interval) -> Interval:
    """Quotient; no bound where the divisor may be 0."""
    with np.errstate(all="ignore"):
        ends = [x / y for x in (a.low, a.high) for y in (b.low, b.high)]
    found = _without_nan(np.minimum.reduce(ends), np.maximum.reduce(ends))
    away = (b.low > 0) | (b.high < 0)
    return found.where(away, unknown(found.rank))


def smallest(a: Interval, b: Interval) -> Interval:
    """Element-wise minimum."""
    return Interval(np.minimum(a.low, b.low), np.minimum(a.high, b.high))


def largest(a: Interval, b: Interval) -> Interval:
    """Element-wise maximum."""
    return Interval(np.maximum(a.low, b.low), np.maximum(a.high, b.high))


def weighted(weight: FloatArray, x: Interval) -> Interval:
    """Sums ``weight @ x`` for x a column of intervals; only what a weight is not 0 for counts.

    Args:
        weight: Finite values, shape (group, out, in).
        x: Ends of shape (group, in).

    Returns:
        Ends of shape (group, out).
    """
    free_low, free_high = np.isinf(x.low)[:, None], np.isinf(x.high)[:, None]
    if free_low.all() and free_high.all():
        no_low = no_high = (weight != 0).any(axis=-1)
    else:
        up, down = weight > 0, weight < 0
        no_low = ((up & free_low) | (down & free_high)).any(axis=-1)
        no_high = ((up & free_high) | (down & free_low)).any(axis=-1)
    least, most = np.full(no_low.shape, -np.inf), np.full(no_low.shape, np.inf)
    low, high = np.where(np.isinf(x.low), 0.0, x.low), np.where(np.isinf(x.high), 0.0, x.high)
    # Most outputs know neither end, and cost nothing more.
    rows = np.flatnonzero(~(no_low & no_high).all(axis=0))
    known = weight[:, rows].astype(np.float64)
    plus, minus = np.maximum(known, 0), np.minimum(known, 0)
    least[:, rows] = (plus @ low[..., None] + minus @ high[..., None])[..., 0]
    most[:, rows] = (plus @ high[..., None] + minus @ low[..., None])[..., 0]
    return Interval(np.where(no_low, -np.inf, least), np.where(no_high, np.inf, most))


def _times(a: Float64Array, b: Float64Array) -> Float64Array:
    with np.errstate(invalid="ignore", over="ignore"):
        return np.where((a == 0) | (b == 0), 0.0, a * b)


def _without_nan(low: Float64Array, high: Float64Array) -> Interval:
    """No bound where an end is no number."""
    lost = np.isnan(low) | np.isnan(high)
    return Interval(np.where(lost, -np.inf, low), np.where(lost, np.inf, high))
