"""Least squares for one layer: the weights that bring its output nearest to a target.

Sums over the data are in float64; a fifth of the rows is held out and decides how strongly the new
weights are held to the old ones, and whether they are taken at all.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnxprune.types import AnyArray, Float64Array

_RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of the mean diagonal of the Gram matrix
_HELD_OUT = 0.2
_LEAST_GAIN = 1e-3  # of the held-out error: less is noise


class Moments:
    """Sums over rows of inputs X and targets Z; one set for each group of a layer."""

    def __init__(self, groups: int, inputs: int, outputs: int) -> None:
        self.rows = 0
        self.x = np.zeros((groups, inputs))
        self.z = np.zeros((groups, outputs))
        self.xx = np.zeros((groups, inputs, inputs))
        self.xz = np.zeros((groups, inputs, outputs))
        self.zz = np.zeros((groups, outputs))

    def add(self, x: AnyArray, z: AnyArray) -> None:
        """Add rows, shapes (groups, rows, inputs) and (groups, rows, outputs)."""
        turned = x.transpose(0, 2, 1)
        self.rows += x.shape[1]
        self.x += x.sum(axis=1, dtype=np.float64)
        self.z += z.sum(axis=1, dtype=np.float64)
        self.xx += np.matmul(turned, x)
        self.xz += np.matmul(turned, z)
        self.zz += np.square(z, dtype=np.float64).sum(axis=1)

    def plus(self, other: Moments) -> Moments:
        """The sums over the rows of both."""
        total = Moments(*self.xz.shape)
        for name in ("rows", "x", "z", "xx", "xz", "zz"):
            setattr(total, name, getattr(self, name) + getattr(other, name))
        return total

    def error(self, weight: Float64Array, bias: Float64Array) -> Float64Array:
        """Sum of squares of Z - X W - b, shape (groups, outputs)."""
        gw = np.matmul(self.xx, weight)
        return np.asarray(
            self.zz
            - 2 * np.einsum("gio,gio->go", weight, self.xz)
            + np.einsum("gio,gio->go", weight, gw)
            - 2 * bias * self.z
            + 2 * bias * np.einsum("gi,gio->go", self.x, weight)
            + self.rows * np.square(bias),
            np.float64,
        )

    def loss(self, weight: Float64Array, bias: Float64Array) -> float:
        """Sum of all the errors, >= 0 whatever rounding made of it."""
        return max(float(self.error(weight, bias).sum()), 0.0)

    @property
    def spread(self) -> Float64Array:
        """Sum of squares of Z around its mean, shape (groups, outputs)."""
        return np.asarray(self.zz - np.square(self.z) / max(self.rows, 1), np.float64)


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
    """Collects rows and solves."""

    def __init__(self, groups: int, inputs: int, outputs: int, *, intercept: bool = True) -> None:
        self.intercept = intercept
        self.fitted = Moments(groups, inputs, outputs)
        self.held = Moments(groups, inputs, outputs)

    def add(self, x: AnyArray, z: AnyArray) -> None:
        """Add one batch of rows; the last of them are held out.

        The share is of all rows so far, so that batches of one row are held out now and then.
        """
        rows = x.shape[1]
        due = int((self.fitted.rows + self.held.rows + rows) * _HELD_OUT) - self.held.rows
        cut = rows - min(max(due, 0), rows)
        if cut:
            self.fitted.add(x[:, :cut], z[:, :cut])
        if cut < rows:
            self.held.add(x[:, cut:], z[:, cut:])

    def solve(self, weight: Float64Array, bias: Float64Array) -> Fit:
        """Min ‖Z - X W - b‖² + λ‖W - W₀‖², λ by the held-out rows; b is free.

        Args:
            weight: W₀, shape (groups, inputs, outputs).
            bias: The old bias, shape (groups, outputs).

        Source: ridge regression towards given weights (Hoerl & Kennard 1970).
        """
        judge = self.held if self.held.rows else self.fitted
        scale = max(float(judge.spread.sum()), 1e-30)
        before = judge.loss(weight, bias)
        if not self.held.rows:  # nothing could tell a gain from noise learned by heart
            return Fit(weight, bias, before / scale, before / scale, None)
        best: tuple[float, float] | None = None
        for ridge, (w, b) in _solutions(self.fitted, weight, _RIDGES, self.intercept):
            error = judge.loss(w, b)
            if np.isfinite(error) and (best is None or error < best[0]):
                best = (error, ridge)
        if best is None or best[0] > before * (1 - _LEAST_GAIN):
            return Fit(weight, bias, before / scale, before / scale, None)
        ((_, (w, b)),) = _solutions(self.fitted.plus(self.held), weight, best[1:], self.intercept)
        return Fit(w, b, before / scale, best[0] / scale, best[1])


def _solutions(
    moments: Moments, start: Float64Array, ridges: tuple[float, ...], intercept: bool
) -> list[tuple[float, tuple[Float64Array, Float64Array]]]:
    rows = max(moments.rows, 1)
    mean_x, mean_z = moments.x / rows * intercept, moments.z / rows * intercept
    gram = moments.xx - rows * mean_x[:, :, None] * mean_x[:, None, :]
    cross = moments.xz - rows * mean_x[:, :, None] * mean_z[:, None, :]
    wrong = cross - np.matmul(gram, start)
    inputs = gram.shape[1]
    scale = np.maximum(np.trace(gram, axis1=1, axis2=2) / inputs, 1e-30)
    found = []
    diagonal = np.arange(inputs)
    for ridge in ridges:
        damped = gram.copy()
        damped[:, diagonal, diagonal] += (ridge * scale)[:, None]
        try:
            w = start + np.linalg.solve(damped, wrong)
        except np.linalg.LinAlgError:
            continue
        found.append((ridge, (w, mean_z - np.einsum("gi,gio->go", mean_x, w))))
    return found
