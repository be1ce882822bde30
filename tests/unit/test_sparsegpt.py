"""Weights that hold a pattern: near the best there are, and never worse than the largest."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, product

import numpy as np
import pytest

from onnxprune.patterns import NM, Block, Pattern, Unstructured, holds, mask
from onnxprune.sparsegpt import Quadratic, alternated, descended, pruned, refined, swept


def drawn(inputs: int, outputs: int, *, groups: int = 1, rows: int = 0, seed: int = 0) -> Quadratic:
    """A layer whose inputs are correlated and of unlike size."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((groups, inputs, inputs)) * rng.lognormal(size=(groups, 1, inputs))
    x = rng.standard_normal((groups, rows or 4 * inputs, inputs)) @ mix
    matrix = x.transpose(0, 2, 1) @ x / x.shape[1]
    at = np.arange(inputs)
    matrix[:, at, at] += 1e-3 * matrix[:, at, at].mean()
    return Quadratic(matrix, rng.standard_normal((groups, outputs, inputs)))


def best_error(problem: Quadratic, pattern: NM) -> float:
    """The least error of all masks, each with its best values."""
    m, inputs = pattern.m, problem.matrix.shape[1]
    runs = [
        [[first + at for at in some] for some in combinations(range(m), pattern.n)]
        for first in range(0, inputs, m)
    ]
    least = np.full(problem.center.shape[1], np.inf)
    matrix, center = problem.matrix[0], problem.center[0]
    for chosen in product(*runs):
        keep = [at for run in chosen for at in run]
        gone = np.setdiff1d(np.arange(inputs), keep)
        pull = np.linalg.solve(matrix[np.ix_(keep, keep)], matrix[np.ix_(keep, gone)])
        left = matrix[np.ix_(gone, gone)] - matrix[np.ix_(gone, keep)] @ pull
        lost = center[:, gone]
        least = np.minimum(least, ((lost @ left) * lost).sum(axis=1))
    return float(least.sum())


def test_a_small_layer_comes_near_the_best_of_all_masks() -> None:
    problem = drawn(12, 40)
    best = best_error(problem, NM(2, 4))
    once = problem.error(swept(problem, NM(2, 4), 0.5))
    found = problem.error(pruned(problem, NM(2, 4), 0.5))
    assert best <= found <= 1.15 * best
    assert best <= once <= 2.5 * best


def test_one_run_alone_is_solved_exactly() -> None:
    problem = drawn(4, 50)
    best = best_error(problem, NM(2, 4))
    np.testing.assert_allclose(problem.error(swept(problem, NM(2, 4), 0.5)), best, rtol=1e-9)


@pytest.mark.parametrize(
    "pattern",
    [
        NM(2, 4),
        NM(1, 4),
        NM(4, 8),
        NM(8, 16),
        Unstructured(),
        Block(1, 4),
        Block(4, 1),
        Block(4, 4),
    ],
    ids=str,
)
@pytest.mark.parametrize("groups", [1, 3])
def test_every_pattern_holds_and_beats_the_largest_weights(pattern: Pattern, groups: int) -> None:
    problem = drawn(160, 24, groups=groups)
    share = 1 - pattern.n / pattern.m if isinstance(pattern, NM) else 0.5
    largest = problem.center * mask(pattern, np.abs(problem.center), share)
    variance = np.diagonal(problem.matrix, axis1=1, axis2=2)[:, None]
    weighed = problem.center * mask(pattern, np.square(problem.center) * variance, share)
    plain = min(problem.error(largest), problem.error(weighed))
    for search in (swept, pruned):
        found = search(problem, pattern, share)
        assert holds(pattern, found, share)
        if isinstance(pattern, NM) or search is pruned:
            assert problem.error(found) < plain
    assert problem.error(pruned(problem, pattern, share)) < problem.error(
        swept(problem, pattern, share)
    )


def test_no_later_step_makes_the_error_larger() -> None:
    problem, _ = drawn(64, 32).scaled()
    first = alternated(problem, NM(2, 4), 0.5)
    second = descended(problem, first, NM(2, 4))
    third = refined(problem, second)
    errors = [problem.error(one) for one in (first, second, third)]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < errors[0]


def test_values_are_those_of_least_squares() -> None:
    problem = drawn(16, 5)
    keep = mask(NM(2, 4), np.abs(problem.center), 0.5)
    found = refined(problem, refined(problem, problem.center * keep, steps=60))
    for row, some in enumerate(keep[0]):
        aim = problem.matrix[0] @ problem.center[0, row]
        exact = np.linalg.solve(problem.matrix[0][np.ix_(some, some)], aim[some])
        np.testing.assert_allclose(found[0, row, some], exact, rtol=1e-6)


def test_inputs_that_carry_nothing_go_first() -> None:
    problem = drawn(16, 8)
    dead = [0, 1, 6, 7]
    problem.matrix[:, dead], problem.matrix[:, :, dead] = 0, 0
    problem.matrix[:, dead, dead] = 1e-12
    for search in (swept, pruned):
        found = search(problem, NM(2, 4), 0.5)
        assert not found[:, :, dead].any()
        assert np.isfinite(found).all()


def together(outputs: int, groups: int = 1, seed: int = 5) -> np.ndarray:
    """How errors of outputs count where fewer layers' outputs read them."""
    read = np.random.default_rng(seed).standard_normal((groups, outputs // 2, outputs))
    return read.transpose(0, 2, 1) @ read + 0.1 * np.eye(outputs)


def test_errors_that_count_together_are_led_to_where_they_cancel() -> None:
    alone = drawn(16, 12)
    problem = replace(alone, metric=together(12))
    found, once = (pruned(one, NM(2, 4), 0.5) for one in (problem, alone))
    assert holds(NM(2, 4), found, 0.5)
    assert problem.error(found) < 0.6 * problem.error(once)
    assert alone.error(found) > alone.error(once)


def test_a_metric_that_keeps_outputs_apart_changes_next_to_nothing() -> None:
    alone = drawn(16, 8)
    scales = np.random.default_rng(1).lognormal(size=8)
    problem = replace(alone, metric=np.diag(scales)[None])
    found = pruned(problem, NM(2, 4), 0.5)
    once = refined(alone, alternated(alone.scaled()[0], NM(2, 4), 0.5) / alone.scaled()[1])
    np.testing.assert_allclose(found, once, atol=2e-3)


def test_values_under_a_metric_are_those_of_least_squares() -> None:
    problem = replace(drawn(8, 6, rows=200), metric=together(6))
    keep = mask(NM(2, 4), np.square(problem.center), 0.5)
    found = refined(problem, problem.center * keep, steps=200)
    assert problem.metric is not None
    whole = np.kron(problem.metric[0], problem.matrix[0])  # of weights in a row
    free = np.flatnonzero(keep)
    aim = whole @ problem.center.reshape(-1)
    best = np.zeros(keep.size)
    best[free] = np.linalg.solve(whole[np.ix_(free, free)], aim[free])
    np.testing.assert_allclose(found.reshape(-1), best, atol=1e-3)
