"""The weights nearest to given ones that hold a sparsity pattern, nearest by a quadratic form.

A layer's output error over calibration data is (w - c) A (w - c)ᵀ for each of its outputs: c are
the weights that least squares would give without a pattern, A the second moments of what the layer
reads. Three steps share the search, each of which only lowers the error: a pass over the inputs
or a splitting method decides which weights stay, descent over runs exchanges single ones, and
conjugate gradients give those that stay their best values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from math import comb

import numpy as np

from onnxprune.patterns import NM, Block, Kernel, Pattern, mask
from onnxprune.types import AnyArray, BoolArray, Float64Array, FloatArray

_BLOCK = 128  # inputs that are worked on before the rest hears of it
_MOST_CHOICES = 128  # ways to keep N of M that are all tried
_ROUNDS = 30  # of the splitting method
_STIFFNESS = 0.1  # of its first round, in units of the scaled inputs' variance
_GROWTH = 1.1  # of the stiffness, each round
_ROUNDS_PER_INVERSE = 10
_SWEEPS = 2
_STEPS = 20  # of conjugate gradients
_STEPS_TOGETHER = 60  # where outputs count together: that is a system of all weights at once
_TINY = np.float32(1e-30)


@dataclass(frozen=True, slots=True)
class Quadratic:
    """Error of a layer as a function of its weights.

    Attributes:
        matrix: A, shape (groups, inputs, inputs), symmetric, positive definite.
        center: c, shape (groups, outputs, inputs).
        metric: M, shape (groups, outputs, outputs), positive definite, where errors of outputs
            count together: then the error is the sum of M times (W - C) A (W - C)ᵀ.
    """

    matrix: Float64Array
    center: Float64Array
    metric: Float64Array | None = None

    def error(self, weights: FloatArray) -> float:
        """Sum of (w - c) A (w - c)ᵀ over all outputs, or as ``metric`` says."""
        moved = weights - self.center
        seen = moved if self.metric is None else np.matmul(self.metric, moved)
        return float(np.einsum("gok,gok->", np.matmul(seen, self.matrix), moved))

    def scaled(self) -> tuple[Quadratic, Float64Array]:
        """The same in inputs of variance 1, and what divides weights of it to get them back."""
        scale = np.sqrt(np.diagonal(self.matrix, axis1=1, axis2=2))
        scale = np.where(scale > 0, scale, 1.0)
        matrix = self.matrix / (scale[:, :, None] * scale[:, None, :])
        if self.metric is None:
            return Quadratic(matrix, self.center * scale[:, None]), scale[:, None]
        size = np.sqrt(np.diagonal(self.metric, axis1=1, axis2=2))
        metric = self.metric / (size[:, :, None] * size[:, None, :])
        both = size[:, :, None] * scale[:, None]
        return Quadratic(matrix, self.center * both, metric), both


def pruned(problem: Quadratic, pattern: Pattern, sparsity: float) -> Float64Array:
    """Weights that hold a pattern and leave little error.

    Args:
        problem: The error; inputs ordered so that what a pattern takes together is contiguous.
        pattern: Any but ``Kernel``, which is a ``Block`` of one output once the taps of a channel
            lie next to one another.
        sparsity: Share that goes; N:M implies its own.

    Returns:
        Shape (groups, outputs, inputs).

    Source: which weights stay by the alternating direction method as in Meng et al. 2024, ALPS
        (arXiv:2406.07831), here for any pattern; the rest is coordinate descent.
    """
    scaled, scale = problem.scaled()
    found = alternated(scaled, pattern, sparsity)
    if isinstance(pattern, NM) and scaled.metric is None:
        found = descended(scaled, found, pattern)
    return refined(scaled, found) / scale


def refined(problem: Quadratic, weights: FloatArray, steps: int = 0) -> Float64Array:
    """The best values of the weights that are not zero, by conjugate gradients.

    ``steps`` of 0 are as many as it takes.
    """
    steps = steps or (_STEPS if problem.metric is None else _STEPS_TOGETHER)
    free = weights != 0
    found = np.array(weights, np.float64)
    # The error that is left is taken in float64 once; what makes up for it is small.
    off = problem.center - found
    off = off if problem.metric is None else np.matmul(problem.metric, off)
    left = (np.matmul(off, problem.matrix) * free).astype(np.float32)
    matrix = problem.matrix.astype(np.float32)
    scale = 1 / np.maximum(np.diagonal(matrix, axis1=1, axis2=2), _TINY)[:, None]
    dot, metric = _dot, None
    if problem.metric is not None:
        metric, dot = problem.metric.astype(np.float32), _dot_of_all
        scale = scale / np.maximum(np.diagonal(metric, axis1=1, axis2=2), _TINY)[:, :, None]
    moved = np.zeros_like(left)
    near = left * scale
    direction = near.copy()
    energy = dot(left, near)
    for _ in range(steps):
        bent = np.matmul(direction, matrix)
        bent = bent if metric is None else np.matmul(metric, bent)
        bent *= free
        length = energy / np.maximum(dot(direction, bent), _TINY)
        moved += length * direction
        left -= length * bent
        near = left * scale
        after = dot(left, near)
        direction *= after / np.maximum(energy, _TINY)
        direction += near
        energy = after
    return np.asarray(found + moved, np.float64)


def _dot(a: FloatArray, b: FloatArray) -> FloatArray:
    """Product of each row with another, shape (groups, rows, 1)."""
    return np.asarray(np.einsum("gok,gok->go", a, b)[..., None])


def _dot_of_all(a: FloatArray, b: FloatArray) -> FloatArray:
    """The same of all rows of a group together, shape (groups, 1, 1)."""
    return np.asarray(np.einsum("gok,gok->g", a, b)[:, None, None])


# -- which weights stay ----------------------------------------------------------------------------


def swept(problem: Quadratic, pattern: Pattern, sparsity: float) -> Float64Array:
    """SparseGPT: inputs are settled from the first to the last, later ones make up for it.

    Of N:M all ways to keep N of a run are compared by the error that is left once the rest of the
    run and all later inputs have made up for what goes; other patterns take
    the same share of every block of inputs, as there.

    Source: Frantar & Alistarh 2023 (arXiv:2301.00774), without the inverse: the error of an input
        given those before it is a row of the reversed Cholesky factor.
    """
    found = np.empty_like(problem.center)
    for group, (matrix, center) in enumerate(zip(problem.matrix, problem.center, strict=True)):
        order = _heavy_first(matrix, width(pattern))
        done = _swept(matrix[np.ix_(order, order)], center[:, order], pattern, sparsity)
        found[group, :, order] = done.T
    return found


def _heavy_first(matrix: Float64Array, run: int) -> AnyArray:
    """Inputs in runs, those that carry most first: what follows makes up for them."""
    carried = np.diagonal(matrix).reshape(-1, run).sum(axis=1)
    runs = np.argsort(-carried, kind="stable")
    return np.asarray((runs[:, None] * run + np.arange(run)).reshape(-1))


def width(pattern: Pattern) -> int:
    """Neighbouring inputs that a pattern decides on together."""
    match pattern:
        case NM(_, m):
            return m
        case Block(_, width):
            return width
        case Kernel():
            raise ValueError("kernels are blocks of one output")
    return 1


def _swept(
    matrix: Float64Array, center: Float64Array, pattern: Pattern, sparsity: float
) -> Float64Array:
    """One group of ``swept``, its inputs in their order."""
    inputs = center.shape[1]
    factor = np.linalg.cholesky(matrix[::-1, ::-1])[::-1, ::-1]  # A = F Fᵀ, F upper triangular
    moved, felt = np.zeros_like(center), np.zeros_like(center)
    whole = isinstance(pattern, NM) and comb(pattern.m, pattern.n) <= _MOST_CHOICES
    for block in _blocks(inputs, width(pattern)):
        corner = np.asarray(factor[block, block], np.float64)
        if whole:
            assert isinstance(pattern, NM)
            done = _by_runs(corner, center[:, block], felt[:, block], pattern)
        else:
            now = center[:, block] - np.matmul(felt[:, block], np.linalg.inv(corner))
            keep = mask(pattern, np.square(now * np.diagonal(corner)), sparsity)
            done = _by_inputs(corner, center[:, block], felt[:, block], keep)
        moved[:, block] = done
        felt[:, block.stop :] += np.matmul(done, factor[block, block.stop :])
    return center + moved


def _blocks(inputs: int, run: int) -> Iterator[slice]:
    step = max(1, _BLOCK // run) * run
    return (slice(first, min(first + step, inputs)) for first in range(0, inputs, step))


def _by_runs(
    corner: Float64Array, center: Float64Array, felt: Float64Array, pattern: NM
) -> Float64Array:
    """How far each weight of a block moves where every run of N:M keeps its best N."""
    own = _corners(corner, pattern.m)
    choices, inverses = _Choices(np.matmul(own, own.swapaxes(1, 2)), pattern.n), np.linalg.inv(own)
    moved, felt = np.zeros_like(center), felt.copy()
    for at, inverse in enumerate(inverses):
        run = slice(at * pattern.m, (at + 1) * pattern.m)
        free = center[:, run] - np.matmul(felt[:, run], inverse)
        moved[:, run] = choices.best(at, free) - center[:, run]
        felt[:, run.stop :] += np.matmul(moved[:, run], corner[run, run.stop :])
    return moved


def _by_inputs(
    corner: Float64Array, center: Float64Array, felt: Float64Array, keep: BoolArray
) -> Float64Array:
    """The same for a mask that is given."""
    moved, felt = np.zeros_like(center), felt.copy()
    for at in range(center.shape[1]):
        stays = -felt[:, at] / corner[at, at]
        moved[:, at] = np.where(keep[:, at], stays, -center[:, at])
        felt[:, at:] += moved[:, at, None] * corner[at, at:]
    return moved


class _Choices:
    """The best N of M weights to keep in each run, row by row, by a quadratic form for each run."""

    def __init__(self, matrices: FloatArray, n: int) -> None:
        """``matrices``: shape (runs, M, M)."""
        m = matrices.shape[1]
        self._gone = m - n
        costs, self._maps = [], []
        for some in map(list, combinations(range(m), n)):
            others = [at for at in range(m) if at not in some]
            inner = np.linalg.inv(_part(matrices, some, some))
            pull = np.matmul(_part(matrices, others, some), inner)
            # What goes costs its Schur complement: the rest of the run makes up for its part.
            left = np.matmul(pull, _part(matrices, some, others))
            left = _part(matrices, others, others) - left
            cost = np.zeros((len(matrices), m, self._gone), matrices.dtype)
            cost[:, others] = np.linalg.cholesky(left)
            moved = np.zeros_like(matrices)
            moved[:, some, some] = 1
            moved[:, np.array(others)[:, None], some] = pull
            costs.append(cost)
            self._maps.append(moved)
        self._costs = np.concatenate(costs, axis=2)

    def best(self, run: int, free: FloatArray) -> FloatArray:
        """The best weights of a run, for what they would be without a pattern, (rows, M)."""
        costs = np.square(np.matmul(free, self._costs[run])).reshape(len(free), -1, self._gone)
        chosen = costs.sum(axis=2).argmin(axis=1)
        found = np.empty_like(free)
        for number, moved in enumerate(self._maps):
            rows = np.flatnonzero(chosen == number)
            found[rows] = np.matmul(free[rows], moved[run])
        return found


def _part(matrices: FloatArray, rows: list[int], columns: list[int]) -> FloatArray:
    return matrices[:, np.array(rows)[:, None], columns]


def _corners(matrix: FloatArray, m: int) -> FloatArray:
    """The square of each run on the diagonal, shape (runs, M, M)."""
    runs = len(matrix) // m
    at = np.arange(runs)
    return matrix.reshape(runs, m, runs, m)[at, :, at]


def alternated(problem: Quadratic, pattern: Pattern, sparsity: float) -> Float64Array:
    """Weights that hold a pattern, by turns nearest in error and nearest in the pattern.

    The two copies are drawn together ever more stiffly. Inputs should have variance 1, so that
    what the pattern keeps is measured as the error is. Works in single precision.

    Source: the alternating direction method of multipliers for pruning, Meng et al. 2024
        (arXiv:2406.07831).
    """
    center = problem.center.astype(np.float32)
    draw = _Draw.of(problem)

    def nearest(weights: FloatArray) -> FloatArray:
        return weights * mask(pattern, np.square(weights), sparsity)

    found = nearest(center)
    owed = np.zeros_like(center)
    for number in range(_ROUNDS):
        stiff = np.float32(_STIFFNESS * _GROWTH ** (number - number % _ROUNDS_PER_INVERSE))
        if number % _ROUNDS_PER_INVERSE == 0:
            owed /= 1 if number == 0 else np.float32(_GROWTH**_ROUNDS_PER_INVERSE)
            draw.prepare(stiff)
        owed += draw.free(found - owed, stiff)
        found = nearest(owed)
        owed -= found
    return found.astype(np.float64)


class _Draw:
    """Least error of weights that are drawn to given ones."""

    def __init__(self, problem: Quadratic) -> None:
        self.matrix = problem.matrix.astype(np.float32)
        self.aim = np.matmul(problem.center.astype(np.float32), self.matrix)

    @staticmethod
    def of(problem: Quadratic) -> _Draw:
        """For outputs that count each alone, or together."""
        return _Draw(problem) if problem.metric is None else _DrawTogether(problem)

    def prepare(self, stiff: np.float32) -> None:
        """Be ready for another stiffness."""
        one = np.eye(self.matrix.shape[1], dtype=np.float32)
        self.inverse = np.linalg.inv(self.matrix + stiff * one)

    def free(self, to: FloatArray, stiff: np.float32) -> FloatArray:
        """Weights of least error, drawn to ``to``."""
        return np.asarray(np.matmul(self.aim + stiff * to, self.inverse))


class _DrawTogether(_Draw):
    """The same where errors of outputs count together: M X A + s X = B in the axes of both."""

    def __init__(self, problem: Quadratic) -> None:
        assert problem.metric is not None
        (one, self.left), (two, self.right) = (
            np.linalg.eigh(part) for part in (problem.metric, problem.matrix)
        )
        self.size = (one[:, :, None] * two[:, None]).astype(np.float32)
        aim = np.matmul(np.matmul(problem.metric, problem.center), problem.matrix)
        self.left = self.left.astype(np.float32)
        self.right = self.right.astype(np.float32)
        self.aim = aim.astype(np.float32)

    def prepare(self, stiff: np.float32) -> None:
        self.inverse = 1 / (self.size + stiff)

    def free(self, to: FloatArray, stiff: np.float32) -> FloatArray:
        turned = np.matmul(self.left.swapaxes(1, 2), self.aim + stiff * to)
        turned = np.matmul(turned, self.right) * self.inverse
        return np.asarray(np.matmul(np.matmul(self.left, turned), self.right.swapaxes(1, 2)))


def descended(problem: Quadratic, weights: FloatArray, pattern: NM) -> Float64Array:
    """N:M runs looked at once more, each with all others as they are: which N, and their values.

    No step makes the error larger, up to single precision.
    """
    if comb(pattern.m, pattern.n) > _MOST_CHOICES:
        return np.asarray(weights, np.float64)
    found = weights.astype(np.float32)
    for group, one in enumerate(found):
        matrix = problem.matrix[group].astype(np.float32)
        slope = np.matmul(one - problem.center[group].astype(np.float32), matrix)
        runs = [slice(first, first + pattern.m) for first in range(0, len(matrix), pattern.m)]
        own = _corners(matrix, pattern.m)
        choices, inverses = _Choices(own, pattern.n), np.linalg.inv(own)
        for _ in range(_SWEEPS):
            for block in _blocks(len(matrix), pattern.m):
                before = one[:, block].copy()
                near = slope[:, block]
                for run in (run for run in runs if block.start <= run.start < block.stop):
                    inside = slice(run.start - block.start, run.stop - block.start)
                    at = run.start // pattern.m
                    now = choices.best(at, one[:, run] - np.matmul(near[:, inside], inverses[at]))
                    near += np.matmul(now - one[:, run], matrix[run, block])
                    one[:, run] = now
                moved = one[:, block] - before
                slope[:, : block.start] += np.matmul(moved, matrix[block, : block.start])
                slope[:, block.stop :] += np.matmul(moved, matrix[block, block.stop :])
    return found.astype(np.float64)
