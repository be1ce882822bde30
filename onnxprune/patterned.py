"""Least squares of a layer whose weights are to hold a sparsity pattern.

The same rows, targets and held-out choice as of a refit without one; what is solved is the same
quadratic form, searched for the weights that may stay and for their values at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from threadpoolctl import threadpool_limits

from onnxprune.patterns import Block, Kernel, Pattern, Unstructured, mask
from onnxprune.refit import Fit, Fitter, Settle, least, loss, sketched
from onnxprune.sparsegpt import Quadratic, pruned, refined, swept, width
from onnxprune.sums import Moments, Rows
from onnxprune.through import Through
from onnxprune.types import BoolArray, Float64Array, FloatArray, IntArray

_WIDE = 4096  # inputs of a layer without a Gram matrix that are worked on at once
_ENOUGH = 128  # outputs of a layer that its ridge is chosen by
_FIRST_RIDGE = 4  # to be tried: a pattern takes more than a refit does
_TURNS = 2  # over the parts of such a layer
_LEAST_VARIANCE = 1e-30
METHODS = ("sparsegpt", "wanda")


@dataclass(frozen=True, slots=True)
class Imposed:
    """A pattern that a layer is to hold.

    Attributes:
        pattern: The pattern.
        sparsity: Share that goes; N:M implies its own.
        method: ``sparsegpt`` gives what stays new values, ``wanda`` leaves them, and
            only biases make up for what goes.
    """

    pattern: Pattern
    sparsity: float
    method: str = METHODS[0]

    def laid_out(self, inputs: int, taps: int) -> tuple[Pattern, IntArray]:
        """The pattern and the order of inputs in which it takes neighbours.

        Inputs are given channel by channel, the taps of each together: as kernels go, which are
        blocks in this order. Everything else runs along channels.
        """
        order = np.arange(inputs)
        match self.pattern:
            case Kernel():
                return (Block(1, taps) if taps > 1 else Unstructured()), order
            case _:
                return self.pattern, order.reshape(-1, taps).T.reshape(-1)


class PatternFitter(Fitter):
    """Collects rows as a refit does and solves for weights that hold a pattern."""

    rounds = 1  # with the mask as it is there is less to follow

    def __init__(
        self,
        shape: tuple[int, int, int],
        rows: int,
        imposed: Imposed,
        *,
        taps: int = 1,
        free: int = 0,
        intercept: bool = True,
        metric: Float64Array | None = None,
    ) -> None:
        """Expect at most ``rows`` rows.

        Args:
            shape: Groups, inputs and outputs of the layer.
            rows: Most rows there will be.
            imposed: What the weights of its inputs are to hold.
            taps: Inputs of each channel.
            free: Inputs at the end that no pattern binds.
            intercept: Whether there is a bias to be found.
            metric: How errors of outputs count together, shape (outputs, outputs), of one group;
                None where each counts alone.
        """
        groups, inputs, outputs = shape
        self.wide = sketched(groups, inputs + intercept)
        super().__init__(
            groups, inputs, outputs, rows,
            intercept=intercept, summed=not self.wide, kept=metric is not None,
        )  # fmt: skip
        self.bound = inputs - free
        self.imposed = imposed
        self.pattern, self.order = imposed.laid_out(self.bound, taps)
        self.keep: BoolArray = np.ones(shape, np.bool_)
        self.metric = metric

    def solve(
        self,
        weight: Float64Array,
        bias: Float64Array,
        settle: Settle | None = None,
        through: Through | None = None,
    ) -> Fit:
        """Weights that hold the pattern: those of several ways that do best on held-out rows.

        ``keep`` is then where they may be other than zero. ``Fit.before`` is the error of the
        weights of largest magnitude as they are.
        """
        # There are thousands of small factorisations: on a machine with other work threads of BLAS
        # wait for one another, and it takes three times as long.
        with threadpool_limits(limits=1, user_api="blas"):
            return self._best(weight, bias, settle, through)

    def _best(
        self,
        weight: Float64Array,
        bias: Float64Array,
        settle: Settle | None,
        through: Through | None,
    ) -> Fit:
        self._settle, self._bias = settle, bias
        judge = self.held if self.held.rows else self.fitted
        together = isinstance(self.fitted, Moments) and isinstance(judge, Rows)
        self._metric = self.metric[None] if self.metric is not None and together else None
        seen = None if self._metric is None else np.linalg.cholesky(self._metric)
        scale = max(_spread(judge, seen), 1e-30)
        start = self._joined(weight, bias)

        def judged(found: Float64Array) -> float:
            return _lost(judge, self._joined(*self._settled(found)), seen)

        plain = [self._plain(start, np.abs(weight[:, : self.bound]))]
        before = judged(plain[0])
        if not np.isfinite(before):  # no data to go by
            return self._fit(plain[0], Fit(weight, bias, before, before, None))
        plain.append(self._plain(start, self._wanda(weight)))
        if self.imposed.method == "wanda" or not self.held.rows:
            found = plain[-1]
            if self.intercept and self.held.rows:
                still = found.copy()
                still[:, -1] = start[:, -1]
                found = min(found, still, key=judged)
            done = Fit(weight, bias, before / scale, judged(found) / scale, 0.0)
            return self._fit(found, done)
        try:
            ridge = self._ridge(judge, start)
            tried = [*plain, self._solved(self.fitted, start, ridge)]
            if not self.wide:
                tried.append(self._solved(self.fitted, start, ridge, quick=True))
        except np.linalg.LinAlgError:  # inputs that never change have nothing to solve for
            found = min(plain, key=judged)
            return self._fit(found, Fit(weight, bias, before / scale, judged(found) / scale, 0.0))
        errors = [judged(one) for one in tried]
        error, found = min(errors), tried[int(np.argmin(errors))]
        keep = found != 0
        fit = Fit(weight, bias, before / scale, error / scale, ridge)

        def solved(sums: Moments | Rows) -> tuple[Float64Array, Float64Array]:
            return self._settled(self._refined(sums, start, found, ridge))

        sums = self.fitted, self.held
        # Behind an activation errors are no nearer once they are weighed by what reads it (of
        # outputs on other images: 8.1 for 8.2 thousandths), after half as much time again.
        if through is not None and self._metric is None:
            held = Fit(*self._settled(found), 0.0, 0.0, ridge)
            bent = self._through(through, held, solved)
            if bent is not None:
                sums, fit = bent[0], replace(fit, before=bent[1], after=bent[2])
        whole = self._refined(sums[0].join(sums[1]), start, found, ridge)
        whole[:, : self.bound] *= keep[:, : self.bound]
        return self._fit(whole, fit)

    def _ridge(self, judge: Moments | Rows, start: Float64Array) -> float:
        """The ridge that a single pass does best with, on some of the outputs where those do."""
        sums, outputs = self.fitted, start.shape[2]
        alone = not isinstance(self.pattern, Block) or self.pattern.outputs == 1
        if isinstance(sums, Moments) and isinstance(judge, Moments) and alone:
            some = np.unique(np.linspace(0, outputs - 1, min(outputs, _ENOUGH), dtype=np.int64))
            sums, judge, start = sums.some(some), judge.some(some), start[:, :, some]
        tried = partial(self._solved, sums, start, quick=True)
        return least(lambda one: loss(judge, tried(one)), _FIRST_RIDGE)[1]

    def _fit(self, found: Float64Array, fit: Fit) -> Fit:
        self.keep = found[:, : self._inputs(found)] != 0
        self.keep[:, self.bound :] = True
        weight, bias = self._settled(found)
        return replace(fit, weight=weight, bias=bias)

    def _inputs(self, found: Float64Array) -> int:
        return int(found.shape[1] - self.intercept)

    def _settled(self, found: Float64Array) -> tuple[Float64Array, Float64Array]:
        parts = self._parted(found, self._bias)
        if self._settle is None or not np.isfinite(found).all():
            return parts
        return self._settle(*parts)

    # -- weights as they are ---------------------------------------------------------------------

    def _plain(self, start: Float64Array, scores: Float64Array) -> Float64Array:
        """The weights of the highest scores as they are; the bias makes up for what goes."""
        turned = scores[:, self.order].swapaxes(1, 2)
        keep = np.ones_like(scores, np.bool_)
        keep[:, self.order] = mask(self.pattern, turned, self.imposed.sparsity).swapaxes(1, 2)
        found = start.copy()
        found[:, : self.bound] *= keep
        if self.intercept and self.fitted.rows:
            lost = start[:, : self.bound] - found[:, : self.bound]
            mean = self._means()[:, None]
            found[:, -1:] += np.matmul(mean[:, :, : self.bound], lost)
        return found

    def _means(self) -> Float64Array:
        """Mean of each input that has been moved, shape (groups, inputs)."""
        if isinstance(self.fitted, Rows):
            return np.asarray(self.fitted.x.mean(axis=1, dtype=np.float64))
        return np.asarray(self.fitted.xx[:, :, -1] / max(self.fitted.rows, 1))

    def _wanda(self, weight: Float64Array) -> Float64Array:
        """|w| times the norm of the input.

        Source: Sun et al. 2023 (arXiv:2306.11695).
        """
        sums, count = self.fitted, max(self.fitted.rows, 1)
        if isinstance(sums, Rows):
            square = np.square(sums.x, dtype=np.float64).sum(axis=1)
        else:
            square = np.asarray(np.diagonal(sums.xx, axis1=1, axis2=2), np.float64)
        if self.intercept:  # what is stored is around the origin
            assert self.origin is not None
            inputs = self.origin[0].shape[2]
            mean, origin = self._means()[:, :inputs], self.origin[0][:, 0]
            square = square[:, :inputs] / count + origin * (2 * mean + origin)
        norm = np.sqrt(np.maximum(square[:, : self.bound], 0.0))
        scores = np.abs(weight[:, : self.bound]) * norm[:, :, None]
        return np.asarray(scores, np.float64)

    # -- weights that make up for what goes --------------------------------------------------------

    def _solved(
        self, sums: Moments | Rows, start: Float64Array, ridge: float, *, quick: bool = False
    ) -> Float64Array:
        """The weights of one ridge; ``quick`` ones by a single pass."""
        share = self.imposed.sparsity

        def search(form: Quadratic, _: Float64Array) -> Float64Array:
            return (swept if quick else pruned)(form, self.pattern, share)

        if isinstance(sums, Rows):
            once = _Wide(sums, start, self.bound, self.order, width(self.pattern), ridge)
            return once.solved([search] if quick else [search, *[_values] * (_TURNS - 1)])
        metric = None if quick else self._metric
        return _searched(sums, start, self.bound, self.order, ridge, search, metric)

    def _refined(
        self, sums: Moments | Rows, start: Float64Array, found: Float64Array, ridge: float
    ) -> Float64Array:
        """The same weights with the values that are best for some sums."""
        if isinstance(sums, Rows):
            unit = width(self.pattern)
            wide = _Wide(sums, start, self.bound, self.order, unit, ridge, found)
            return wide.solved([_values])
        keep = found[:, self.order].swapaxes(1, 2)
        return _searched(
            sums,
            start,
            self.bound,
            self.order,
            ridge,
            lambda form, _: refined(form, keep),
            self._metric,
        )


def _lost(judge: Moments | Rows, weight: Float64Array, seen: FloatArray | None) -> float:
    """Sum of all the errors, or of what ``seen`` makes of those of each row."""
    if seen is None or not isinstance(judge, Rows):
        return loss(judge, weight)
    left = judge.z - np.matmul(judge.x, weight.astype(np.float32))
    error = float(np.square(np.matmul(left, seen), dtype=np.float64).sum())
    return error if np.isfinite(error) else np.inf


def _spread(judge: Moments | Rows, seen: FloatArray | None) -> float:
    """What there is to be explained, in the same measure."""
    if seen is None or not isinstance(judge, Rows):
        return float(judge.spread.sum())
    around = judge.z - judge.z.mean(axis=1, keepdims=True)
    return float(np.square(np.matmul(around, seen), dtype=np.float64).sum())


_Search = Callable[[Quadratic, Float64Array], Float64Array]  # the form, and present weights


def _values(form: Quadratic, present: Float64Array) -> Float64Array:
    return refined(form, present)


def _searched(
    sums: Moments,
    start: Float64Array,
    bound: int,
    order: IntArray,
    ridge: float,
    search: _Search,
    metric: Float64Array | None = None,
) -> Float64Array:
    """Weights of all inputs; those at the end follow from the ones that a pattern binds."""
    inside = sums.xx[:, order[:, None], order]
    crossed, target = sums.xx[:, bound:, order], sums.xz[:, order]
    tail = sums.xx[:, bound:, bound:]
    size = tail.shape[1]
    jitter = 1e-9 * np.maximum(np.trace(tail, axis1=1, axis2=2) / max(size, 1), 1e-30)
    tail = tail + jitter[:, None, None] * np.eye(size)
    # What the free inputs explain is not for the others to explain.
    pull = np.linalg.solve(tail, crossed)
    given = np.linalg.solve(tail, sums.xz[:, bound:])
    matrix = inside - np.matmul(crossed.swapaxes(1, 2), pull)
    aim = target - np.matmul(crossed.swapaxes(1, 2), given)
    first = start[:, order]
    form = replace(_held(matrix, aim, first, ridge), metric=metric)
    weights = search(form, first.swapaxes(1, 2)).swapaxes(1, 2)
    found = start.copy()
    found[:, order] = weights
    found[:, bound:] = given - np.matmul(pull, weights)
    return found


def _held(matrix: Float64Array, aim: Float64Array, first: Float64Array, ridge: float) -> Quadratic:
    """The error of weights W, held to ``first``: around its least, W = (A + λ)⁻¹(B + λ W₀)."""
    at = np.arange(matrix.shape[1])
    variance = np.maximum(matrix[:, at, at].mean(axis=1), _LEAST_VARIANCE)
    stiff = (ridge * variance)[:, None]
    held = matrix.copy()
    held[:, at, at] += stiff
    wrong = aim - np.matmul(matrix, first)
    center = first + np.linalg.solve(held, wrong)
    return Quadratic(held, np.ascontiguousarray(center.swapaxes(1, 2)))


class _Wide:
    """A layer with too many inputs for a Gram matrix: solved part by part from a sample of rows.

    Each part makes up for what those before it left.
    """

    def __init__(
        self,
        sums: Rows,
        start: Float64Array,
        bound: int,
        order: IntArray,
        unit: int,
        ridge: float,
        present: Float64Array | None = None,
    ) -> None:
        self.sums, self.start, self.bound, self.order = sums, start, bound, order
        self.unit, self.ridge = unit, ridge
        self.found = start.copy() if present is None else present.copy()

    def solved(self, searches: list[_Search]) -> Float64Array:
        """The weights after one turn over all parts for each search."""
        self._settle_tail()
        left = self.sums.z - np.matmul(self.sums.x, self.found.astype(np.float32))
        for search in searches:
            for part in self._parts():
                x = self.sums.x[:, :, part]
                now = self.found[:, part]
                gram = np.matmul(x.swapaxes(1, 2), x).astype(np.float64)
                aim = np.matmul(x.swapaxes(1, 2), left).astype(np.float64) + np.matmul(gram, now)
                form = _held(gram, aim, self.start[:, part], self.ridge)
                new = search(form, now.swapaxes(1, 2)).swapaxes(1, 2)
                left -= np.matmul(x, (new - now).astype(np.float32))
                self.found[:, part] = new
        self._settle_tail()
        return self.found

    def _parts(self) -> Iterator[IntArray]:
        step = max(1, _WIDE // self.unit) * self.unit
        return (self.order[first : first + step] for first in range(0, self.bound, step))

    def _settle_tail(self) -> None:
        """The bias, or what else no pattern binds."""
        tail = self.sums.x[:, :, self.bound :].astype(np.float64)
        if not tail.shape[2]:
            return
        made = np.matmul(self.sums.x[:, :, : self.bound], self.found[:, : self.bound])
        square = np.matmul(tail.swapaxes(1, 2), tail)
        square += 1e-9 * np.eye(square.shape[1])
        aim = np.matmul(tail.swapaxes(1, 2), self.sums.z - made)
        self.found[:, self.bound :] = np.linalg.solve(square, aim)
