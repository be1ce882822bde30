"""What a least-squares problem keeps of its rows: sums over them, or the rows themselves.

Both give the same solutions. Sums are as large as the square of the inputs, whatever the rows; rows
are solved from their own Gram matrix, and nothing grows with the square of the inputs.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from onnxprune.types import AnyArray, Float64Array, IntArray

_BLOCK = 2048  # inputs that are looked at in float64 at once


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

    def some(self, outputs: IntArray) -> Moments:
        """The same inputs, with the targets of some outputs."""
        other = Moments(len(self.xx), 0, outputs.size)
        other.rows, other.xx = self.rows, self.xx
        for name in ("xz", "z", "zz"):
            setattr(other, name, np.ascontiguousarray(getattr(self, name)[..., outputs]))
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
