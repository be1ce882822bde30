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

from onnxprune.through import Through
from onnxprune.types import AnyArray, Float64Array

_RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of the mean variance of the inputs
_FIRST_RIDGE = 3  # to be tried; from there to where the held-out error falls
_HELD_OUT = 0.2
_LEAST_GAIN = 1e-3  # of the held-out error: less is noise
_ROUNDS = 4  # in which targets follow the slopes of the activation behind a layer
_ROUND_GAIN = 1e-2  # of the held-out error: for less there is no further round
_MOST_GRAM_BYTES = 1 << 30
_MOST_ROW_BYTES = 1 << 29
_MOST_HELD_BYTES = 1 << 28
_MOST_ROWS = 6144  # that are kept as they are: their own Gram matrix has to be solved
_BLOCK = 2048  # inputs that are looked at in float64 at once

Settle = Callable[[Float64Array, Float64Array], tuple[Float64Array, Float64Array]]


def sketched(groups: int, inputs: int) -> bool:
    """Whether a layer has too many inputs for the Gram matrix of all of them."""
    return 8 * groups * inputs * inputs > _MOST_GRAM_BYTES


def most_rows(groups: int, inputs: int) -> int:
    """Rows that a sketched layer is fitted to, held-out ones included."""
    return max(2, min(_MOST_ROWS, _MOST_ROW_BYTES // (4 * groups * inputs)))


class Moments:
    """Sums over rows of inputs X and targets Z; one set for each group of a layer."""

    def __init__(self, groups: int, inputs: int, outputs: int) -> None:
        self.rows = 0
        self.xx = np.zeros((groups, inputs, inputs))
        self.xz = np.zeros((groups, inputs, outputs))
        self.z = np.zeros((groups, outputs))
        self.zz = np.zeros((groups, outputs))

    def add(self, x: AnyArray, z: AnyArray) -> None:
        """Add rows, shapes (groups, rows, inputs) and (groups, rows, outputs).

        Products within a batch have the precision of the batch, sums over batches float64.
        """
        self.rows += x.shape[1]
        self.xx += np.matmul(x.transpose(0, 2, 1), x)
        self.aim(x, z)

    def bare(self) -> Moments:
        """The same inputs, without targets."""
        groups, inputs, outputs = self.xz.shape
        other = Moments(groups, 0, outputs)
        other.rows, other.xx, other.xz = self.rows, self.xx, np.zeros((groups, inputs, outputs))
        return other

    def aim(self, x: AnyArray, z: AnyArray) -> None:
        """Add the targets of rows whose inputs are there already."""
        self.xz += np.matmul(x.transpose(0, 2, 1), z)
        self.z += z.sum(axis=1, dtype=np.float64)
        self.zz += np.square(z, dtype=np.float64).sum(axis=1)

    def join(self, other: Moments | Rows) -> Moments:
        """The sums over the rows of both."""
        both = self.bare()
        names = ("rows", "xx", "xz", "z", "zz")
        if isinstance(other, Rows):
            for name in names[1:]:
                setattr(both, name, getattr(self, name).copy())
            both.add(other.x, other.z)
            return both
        for name in names:
            setattr(both, name, getattr(self, name) + getattr(other, name))
        return both

    def error(self, weight: Float64Array) -> Float64Array:
        """Sum of squares of Z - X W, shape (groups, outputs)."""
        product = np.matmul(self.xx, weight)
        crossed = np.einsum("gio,gio->go", weight, product - 2 * self.xz)
        return np.asarray(self.zz + crossed, np.float64)

    @property
    def spread(self) -> Float64Array:
        """Sum of squares of Z around its mean, shape (groups, outputs)."""
        return np.asarray(self.zz - np.square(self.z) / max(self.rows, 1), np.float64)

    def solver(self, start: Float64Array, *, constant: bool) -> Callable[[float], Float64Array]:
        """What gives the solution near ``start`` for a ridge; the last input may be constant."""
        varying = self.xx.shape[1] - constant
        diagonal = np.arange(varying)
        square = self.xx[:, diagonal, diagonal]
        if constant:
            square = square - np.square(self.xx[:, :-1, -1]) / max(self.rows, 1)
        scale = np.maximum(square.mean(axis=1), 1e-30)
        wrong = self.xz - np.matmul(self.xx, start)
        kept = self.xx[:, diagonal, diagonal].copy()

        def solution(ridge: float) -> Float64Array:
            self.xx[:, diagonal, diagonal] = kept + (ridge * scale)[:, None]
            try:
                return np.asarray(start + np.linalg.solve(self.xx, wrong), np.float64)
            except np.linalg.LinAlgError:
                return np.full_like(start, np.nan)
            finally:
                self.xx[:, diagonal, diagonal] = kept

        return solution


class Rows:
    """Rows of X and Z as they are, for layers with more inputs than rows."""

    def __init__(self, groups: int, inputs: int, outputs: int, most: int) -> None:
        self.rows = 0
        self._aimed = 0
        self._x = np.empty((groups, most, inputs), np.float32)
        self._z = np.empty((groups, most, outputs), np.float32)

    @property
    def x(self) -> AnyArray:
        """Inputs, shape (groups, rows, inputs)."""
        return self._x[:, : self.rows]

    @property
    def z(self) -> AnyArray:
        """Targets, shape (groups, rows, outputs)."""
        return self._z[:, : self.rows]

    def add(self, x: AnyArray, z: AnyArray) -> None:
        """Add rows, shapes (groups, rows, inputs) and (groups, rows, outputs)."""
        stop = self.rows + x.shape[1]
        self._x[:, self.rows : stop] = x
        self.rows = stop
        self.aim(x, z)

    def bare(self) -> Rows:
        """The same inputs, without targets."""
        other = Rows(self._x.shape[0], 0, 0, 0)
        other.rows, other._x, other._z = self.rows, self._x, np.empty_like(self._z)
        return other

    def aim(self, x: AnyArray, z: AnyArray) -> None:
        """Add the targets of rows whose inputs are there already."""
        stop = self._aimed + x.shape[1]
        self._z[:, self._aimed : stop] = z
        self._aimed = stop

    def join(self, other: Moments | Rows) -> Rows:
        """These rows and those of another set."""
        assert isinstance(other, Rows)
        groups, _, inputs = self.x.shape
        both = Rows(groups, inputs, self.z.shape[2], self.rows + other.rows)
        both.add(self.x, self.z)
        both.add(other.x, other.z)
        return both

    def error(self, weight: Float64Array) -> Float64Array:
        """Sum of squares of Z - X W, shape (groups, outputs)."""
        with np.errstate(over="ignore", invalid="ignore"):
            left = self.z - np.matmul(self.x, weight.astype(np.float32))
        return np.asarray(np.square(left, dtype=np.float64).sum(axis=1), np.float64)

    @property
    def spread(self) -> Float64Array:
        """Sum of squares of Z around its mean, shape (groups, outputs)."""
        z = self.z.astype(np.float64)
        return np.asarray(np.square(z - z.mean(axis=1, keepdims=True)).sum(axis=1), np.float64)

    def solver(self, start: Float64Array, *, constant: bool) -> Callable[[float], Float64Array]:
        """What gives the solution near ``start`` for a ridge; the last input may be constant.

        (XᵀX + λ)⁻¹XᵀR = Xᵀ(XXᵀ + λ)⁻¹R, where XXᵀ has the size of the rows.
        """
        groups, rows, inputs = self.x.shape
        varying = inputs - constant
        around = np.zeros((groups, 1, varying))
        if constant:
            around = self.x[:, :, :varying].mean(axis=1, keepdims=True, dtype=np.float64)
        gram = np.zeros((groups, rows, rows))
        for block in _blocks(varying):
            part = self.x[:, :, block] - around[:, :, block]
            gram += np.matmul(part, part.transpose(0, 2, 1))
        wrong = self.z.astype(np.float64) - _product(self.x, start)
        middle = wrong.mean(axis=1, keepdims=True) if constant else np.zeros((groups, 1, 1))
        wrong -= middle
        diagonal = np.arange(rows)
        kept = gram[:, diagonal, diagonal].copy()
        scale = np.maximum(kept.sum(axis=1) / varying, 1e-30)

        def solution(ridge: float) -> Float64Array:
            gram[:, diagonal, diagonal] = kept + (ridge * scale)[:, None]
            try:
                dual = np.linalg.solve(gram, wrong)
            except np.linalg.LinAlgError:
                return np.full_like(start, np.nan)
            found = start.copy()
            for block in _blocks(varying):
                part = self.x[:, :, block] - around[:, :, block]
                found[:, block] += np.matmul(part.transpose(0, 2, 1), dual)
            if constant:
                moved = found[:, :varying] - start[:, :varying]
                found[:, -1:] += middle - np.matmul(around, moved)
            return found

        return solution


def _blocks(inputs: int) -> list[slice]:
    return [slice(first, min(first + _BLOCK, inputs)) for first in range(0, inputs, _BLOCK)]


def _product(x: AnyArray, weight: Float64Array) -> Float64Array:
    """X W in float64 without a copy of X in it."""
    total = np.zeros((x.shape[0], x.shape[1], weight.shape[2]))
    for block in _blocks(x.shape[2]):
        total += np.matmul(x[:, :, block].astype(np.float64), weight[:, block])
    return total


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
    """

    def __init__(
        self,
        groups: int,
        inputs: int,
        outputs: int,
        rows: int,
        *,
        intercept: bool = True,
        summed: bool = False,
    ) -> None:
        """Expect at most ``rows`` rows; ``summed`` keeps sums over them even of few."""
        self.intercept = intercept
        held = int(rows * _HELD_OUT)
        wide = inputs + intercept
        few = not summed and (rows - held <= wide or sketched(groups, wide))
        small = not summed and 4 * groups * held * wide < _MOST_HELD_BYTES
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
        before = _loss(judge, start)
        old = Fit(weight, bias, before / scale, before / scale, None)
        if not self.held.rows:  # nothing could tell a gain from noise learned by heart
            return old

        def settled(found: Float64Array) -> tuple[Float64Array, Float64Array]:
            parts = self._parted(found, bias)
            return parts if settle is None or not np.isfinite(found).all() else settle(*parts)

        solution = self.fitted.solver(start, constant=self.intercept)
        error, ridge = _least(lambda one: _loss(judge, self._joined(*settled(solution(one)))))
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
        for _ in range(_ROUNDS):
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


def _loss(judge: Moments | Rows, weight: Float64Array) -> float:
    """Sum of all the errors, >= 0 whatever rounding made of it; inf where it is no number."""
    error = float(judge.error(weight).sum())
    return max(error, 0.0) if np.isfinite(error) else np.inf


def _least(loss: Callable[[float], float]) -> tuple[float, float]:
    """Least loss and its ridge, found by walking downhill from the middle."""
    best = _FIRST_RIDGE
    losses = {best: loss(_RIDGES[best])}
    for step in (-1, 1):
        tried = best + step
        while 0 <= tried < len(_RIDGES) and tried not in losses:
            losses[tried] = loss(_RIDGES[tried])
            if losses[tried] >= losses[best] * (1 - _LEAST_GAIN):
                break
            best, tried = tried, tried + step
    return losses[best], _RIDGES[best]
