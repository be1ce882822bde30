"""Least squares for one layer: the weights that bring its output nearest to a target.

A fifth of the rows is held out and decides how strongly the new weights are held to the old ones,
and whether they are taken at all. Where there are more rows than inputs the normal equations are
solved, summed over batches in float64. Where there are fewer, or where the Gram matrix of the
inputs would be too large, a sample of the rows is kept and the same solution is found from the Gram
matrix of the rows: nothing grows with the square of the inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from onnxprune.sums import Moments, Rows
from onnxprune.through import Through
from onnxprune.types import AnyArray, Float64Array

_RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of the mean variance of the inputs
_FIRST_RIDGE = 3  # to be tried; from there to where the held-out error falls
_HELD_OUT = 0.2
_LEAST_GAIN = 1e-3  # of the held-out error: less is noise
_ROUND_GAIN = 1e-2  # of the held-out error: for less there is no further round
_MOST_GRAM_BYTES = 1 << 30
_MOST_ROW_BYTES = 1 << 29
_MOST_HELD_BYTES = 1 << 28
_MOST_ROWS = 6144  # that are kept as they are: their own Gram matrix has to be solved

Settle = Callable[[Float64Array, Float64Array], tuple[Float64Array, Float64Array]]


def sketched(groups: int, inputs: int) -> bool:
    """Whether a layer has too many inputs for the Gram matrix of all of them."""
    return 8 * groups * inputs * inputs > _MOST_GRAM_BYTES


def most_rows(groups: int, inputs: int) -> int:
    """Rows that a sketched layer is fitted to, held-out ones included."""
    return max(2, min(_MOST_ROWS, _MOST_ROW_BYTES // (4 * groups * inputs)))


_Sums = tuple[Moments | Rows, Moments | Rows]  # fitted, and held out


@dataclass(frozen=True, slots=True)
class Fit:
    """New weights of a layer.

    Attributes:
        weight: W, shape (groups, inputs, outputs).
        bias: b, shape (groups, outputs).
        before, after: Held-out error of old and new weights, as a share of the target's variance.
        ridge: How strongly the new weights were held to the old ones; None where those stay.
    """

    weight: Float64Array
    bias: Float64Array
    before: float
    after: float
    ridge: float | None


class Fitter:
    """Collects rows and solves.

    Inputs and targets are moved by their means in the first batch, so that sums of large numbers
    lose no digits; the bias is the weight of one more input, which is 1.

    Attributes:
        rounds: Times that targets follow the slopes of the activation behind a layer, at most.
    """

    rounds = 4

    def __init__(
        self,
        groups: int,
        inputs: int,
        outputs: int,
        rows: int,
        *,
        intercept: bool = True,
        summed: bool = False,
        kept: bool = False,
    ) -> None:
        """Expect at most ``rows`` rows.

        ``summed`` keeps sums over them even of few, ``kept`` those held out as they are even so.
        """
        self.intercept = intercept
        held = int(rows * _HELD_OUT)
        wide = inputs + intercept
        few = not summed and (rows - held <= wide or sketched(groups, wide))
        small = (kept or not summed) and 4 * groups * held * wide < _MOST_HELD_BYTES
        self.fitted = _collected(groups, wide, outputs, rows - held, kept=few)
        # Rows show errors that sums over them would round away.
        self.held = _collected(groups, wide, outputs, held, kept=few or small)
        self.origin: tuple[Float64Array, Float64Array] | None = None

    def add(self, x: AnyArray, z: AnyArray) -> None:
        """Add one batch of rows; the last of them are held out.

        The share is of all rows so far, so that batches of one row are held out now and then.
        """
        if self.origin is None:
            self.origin = _mean(x) * self.intercept, _mean(z) * self.intercept
        cut = self._fitted_of(x.shape[1], self.fitted.rows, self.held.rows)
        moved, target = self._moved(x, z)
        if cut:
            self.fitted.add(moved[:, :cut], target[:, :cut])
        if cut < x.shape[1]:
            self.held.add(moved[:, cut:], target[:, cut:])

    def _fitted_of(self, rows: int, fitted: int, held: int) -> int:
        """How many rows of the next batch are fitted."""
        due = int((fitted + held + rows) * _HELD_OUT) - held
        return rows - min(max(due, 0), rows)

    def _moved(self, x: AnyArray, z: AnyArray) -> tuple[AnyArray, AnyArray]:
        """Rows around the origin, with the input that is 1."""
        assert self.origin is not None
        moved = np.ones((x.shape[0], x.shape[1], x.shape[2] + self.intercept), x.dtype)
        np.subtract(x, self.origin[0], out=moved[:, :, : x.shape[2]], casting="same_kind")
        return moved, np.subtract(z, self.origin[1], dtype=z.dtype, casting="same_kind")

    def solve(
        self,
        weight: Float64Array,
        bias: Float64Array,
        settle: Settle | None = None,
        through: Through | None = None,
    ) -> Fit:
        """Min ‖Z - X W - b‖² + λ‖W - W₀‖², λ by the held-out rows; b is free with an intercept.

        Args:
            weight: W₀, shape (groups, inputs, outputs).
            bias: The old bias, shape (groups, outputs); 0 where there is no intercept.
            settle: What storing makes of weights and bias; new ones are judged after it.
            through: The activation through which Z is seen, if that is known: errors then count
                as they are behind it.

        Source: ridge regression towards given weights (Hoerl & Kennard 1970); through an
            activation as in Zhang et al. 2015 (arXiv:1505.06798), by iterative reweighting.
        """
        judge = self.held if self.held.rows else self.fitted
        scale = max(float(judge.spread.sum()), 1e-30)
        start = self._joined(weight, bias)
        before = loss(judge, start)
        old = Fit(weight, bias, before / scale, before / scale, None)
        if not self.held.rows:  # nothing could tell a gain from noise learned by heart
            return old

        def settled(found: Float64Array) -> tuple[Float64Array, Float64Array]:
            parts = self._parted(found, bias)
            return parts if settle is None or not np.isfinite(found).all() else settle(*parts)

        solution = self.fitted.solver(start, constant=self.intercept)
        error, ridge = least(lambda one: loss(judge, self._joined(*settled(solution(one)))))
        if not np.isfinite(error) or error > before * (1 - _LEAST_GAIN):
            return old
        found = replace(old, after=error / scale, ridge=ridge)
        sums = self.fitted, self.held

        def solved(fitted: Moments | Rows) -> tuple[Float64Array, Float64Array]:
            return settled(fitted.solver(start, constant=self.intercept)(ridge))

        if through is not None:
            bent = self._through(through, old, solved)
            if bent is not None:
                sums, found = bent[0], replace(found, before=bent[1], after=bent[2])
        w, b = solved(sums[0].join(sums[1]))
        return replace(found, weight=w, bias=b)

    def _through(
        self,
        through: Through,
        old: Fit,
        solved: Callable[[Moments | Rows], tuple[Float64Array, Float64Array]],
    ) -> tuple[_Sums, float, float] | None:
        """Rows with the targets that serve best behind an activation, and errors as seen there.

        None where the plain targets do.
        """
        (before, least), targets = self._round(through, (old.weight, old.bias), solved(self.fitted))
        best: tuple[_Sums, float] | None = None
        for _ in range(self.rounds):
            (error,), following = self._round(through, solved(targets[0]))
            if not error < least * (1 - _LEAST_GAIN):
                break
            more = error < least * (1 - _ROUND_GAIN)
            best, least = (targets, error), error
            if not more:
                break
            targets = following
        return None if best is None else (best[0], before, best[1])

    def _round(
        self, through: Through, *weights: tuple[Float64Array, Float64Array]
    ) -> tuple[list[float], _Sums]:
        """Held-out error of some weights as a share of what varies, and targets from the last."""
        fitted, held = self.fitted.bare(), self.held.bare()
        errors = [0.0 for _ in weights]
        total, square, count = np.zeros(()), 0.0, 0
        done = over = 0
        for x, z, added in through.batches():
            cut = self._fitted_of(x.shape[1], done, over)
            done, over = done + cut, over + x.shape[1] - cut
            wanted = through.wanted(z, added)
            for number, one in enumerate(weights):
                made = through.made(x, *one)
                seen = np.subtract(wanted, through.wanted(made, added))
                errors[number] += float(np.square(seen[:, cut:], dtype=np.float64).sum())
            moved, target = self._moved(x, through.target(z, made, seen))
            fitted.aim(moved[:, :cut], target[:, :cut])
            held.aim(moved[:, cut:], target[:, cut:])
            total = total + wanted[:, cut:].sum(axis=1, dtype=np.float64)
            square += float(np.square(wanted[:, cut:], dtype=np.float64).sum())
            count += x.shape[1] - cut
        scale = max(square - float(np.square(total).sum()) / max(count, 1), 1e-30)
        return [error / scale for error in errors], (fitted, held)

    def _joined(self, weight: Float64Array, bias: Float64Array) -> Float64Array:
        """Weights of what is summed: of inputs and targets that have been moved."""
        if not self.intercept:
            return weight
        assert self.origin is not None
        x, z = self.origin
        return np.concatenate([weight, bias[:, None] + np.matmul(x, weight) - z], axis=1)

    def _parted(self, found: Float64Array, bias: Float64Array) -> tuple[Float64Array, Float64Array]:
        if not self.intercept:
            return found, bias
        assert self.origin is not None
        x, z = self.origin
        weight = found[:, :-1]
        return weight, (found[:, -1:] - np.matmul(x, weight) + z)[:, 0]


def _collected(groups: int, inputs: int, outputs: int, rows: int, *, kept: bool) -> Moments | Rows:
    return Rows(groups, inputs, outputs, rows) if kept else Moments(groups, inputs, outputs)


def _mean(rows: AnyArray) -> Float64Array:
    found = np.asarray(rows.mean(axis=1, keepdims=True, dtype=np.float64))
    return np.where(np.isfinite(found), found, 0.0)


def loss(judge: Moments | Rows, weight: Float64Array) -> float:
    """Sum of all the errors, >= 0 whatever rounding made of it; inf where it is no number."""
    error = float(judge.error(weight).sum())
    return max(error, 0.0) if np.isfinite(error) else np.inf


def least(losing: Callable[[float], float], first: int = _FIRST_RIDGE) -> tuple[float, float]:
    """Least loss and its ridge, found by walking downhill from the ``first`` of them."""
    best = first
    losses = {best: losing(_RIDGES[best])}
    for step in (-1, 1):
        tried = best + step
        while 0 <= tried < len(_RIDGES) and tried not in losses:
            losses[tried] = losing(_RIDGES[tried])
            if losses[tried] >= losses[best] * (1 - _LEAST_GAIN):
                break
            best, tried = tried, tried + step
    return losses[best], _RIDGES[best]
