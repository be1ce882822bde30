"""Ridge least squares with a held-out choice."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from onnxprune.refit import Fitter, most_rows, sketched
from onnxprune.sums import Moments, Rows


def drawn(rows: int, inputs: int, outputs: int, seed: int = 0) -> tuple[np.ndarray, ...]:
    """X, W and b in float64 of one group."""
    rng = np.random.default_rng(seed)
    return (
        rng.standard_normal((1, rows, inputs)) + 0.5,
        rng.standard_normal((1, inputs, outputs)),
        rng.standard_normal((1, outputs)),
    )


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("intercept", [True, False])
def test_what_is_linear_is_found(groups: int, intercept: bool) -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((groups, 400, 7)) + 1
    w, b = rng.standard_normal((groups, 7, 5)), rng.standard_normal((groups, 5)) * intercept
    fitter = Fitter(groups, 7, 5, 2000, intercept=intercept)
    fitter.add(x, x @ w + b[:, None])
    fit = fitter.solve(np.zeros_like(w), np.zeros_like(b))
    np.testing.assert_allclose(fit.weight, w, atol=1e-4)
    np.testing.assert_allclose(fit.bias, b, atol=1e-4)
    assert fit.ridge == 1e-6
    assert fit.before > 0.9
    assert fit.after < 1e-9


@pytest.mark.parametrize("make", [lambda: Moments(1, 4, 3), lambda: Rows(1, 4, 3, 50)])
def test_error_is_the_sum_of_squares(make: Callable[[], Moments | Rows]) -> None:
    x, w, _ = (one.astype(np.float32) for one in drawn(50, 4, 3))
    z = np.random.default_rng(9).standard_normal((1, 50, 3)).astype(np.float32)
    sums = make()
    sums.add(x[:, :20], z[:, :20])
    sums.add(x[:, 20:], z[:, 20:])
    expected = np.square(z - x @ w).sum(axis=1)
    np.testing.assert_allclose(sums.error(w.astype(np.float64)), expected, rtol=1e-5)
    np.testing.assert_allclose(sums.spread, np.square(z - z.mean(1)).sum(axis=1), rtol=1e-5)


@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize("ridge", [1e-4, 1.0])
def test_rows_and_their_sums_give_one_solution(ridge: float, constant: bool) -> None:
    """The dual form is no approximation: the same weights from a system as large as the rows."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 30, 50)).astype(np.float32) + 1
    x[:, :, -1] = 1
    z = rng.standard_normal((2, 30, 3)).astype(np.float32)
    start = rng.standard_normal((2, 50, 3))
    sums, rows = Moments(2, 50, 3), Rows(2, 50, 3, 30)
    sums.add(x.astype(np.float64), z.astype(np.float64))
    rows.add(x, z)
    found = [one.solver(start, constant=constant)(ridge) for one in (sums, rows)]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-4, atol=1e-4)


def test_joined_sets_are_one_set() -> None:
    x, w, _ = drawn(60, 4, 3)
    whole, first, second = Moments(1, 4, 3), Moments(1, 4, 3), Moments(1, 4, 3)
    rows, others = Rows(1, 4, 3, 20), Rows(1, 4, 3, 40)
    whole.add(x, x @ w)
    first.add(x[:, :20], x[:, :20] @ w)
    rows.add(x[:, :20], x[:, :20] @ w)
    second.add(x[:, 20:], x[:, 20:] @ w)
    others.add(x[:, 20:], x[:, 20:] @ w)
    both = first.join(others)
    for name in ("xx", "xz", "z", "zz"):
        np.testing.assert_allclose(getattr(both, name), getattr(whole, name), rtol=1e-5)
    assert (both.rows, first.rows) == (60, 20)
    np.testing.assert_allclose(rows.join(others).x, x, rtol=1e-6)
    assert second.join(second).rows == 80


def test_large_means_cost_no_digits() -> None:
    """Means a thousand times the spread: their squares alone would use up single precision."""
    x, w, b = drawn(4000, 12, 3)
    x = (x + 1000).astype(np.float32)
    fitter = Fitter(1, 12, 3, 4000)
    fitter.add(x, (x.astype(np.float64) @ w + b[:, None]).astype(np.float32))
    fit = fitter.solve(np.zeros_like(w), np.zeros_like(b))
    np.testing.assert_allclose(fit.weight, w, atol=2e-3)
    assert fit.after < 1e-6


def test_more_inputs_than_rows_are_fitted_to_the_rows() -> None:
    """Inputs that lie in few dimensions: 300 rows tell all there is of 1,000 inputs."""
    rng = np.random.default_rng(2)
    few = rng.standard_normal((1, 400, 40))
    x = (few @ rng.standard_normal((40, 1000)) + 1).astype(np.float32)
    w, b = rng.standard_normal((1, 1000, 6)), rng.standard_normal((1, 6))
    z = (x @ w + b[:, None]).astype(np.float32)
    fitter = Fitter(1, 1000, 6, 300)
    for start in range(0, 300, 50):
        fitter.add(x[:, start : start + 50], z[:, start : start + 50])
    assert isinstance(fitter.fitted, Rows)
    fit = fitter.solve(w + rng.standard_normal(w.shape), b + 1)
    assert fit.before > 0.3
    left = x[:, 300:] @ fit.weight + fit.bias[:, None] - z[:, 300:]
    assert np.square(left).mean() < 1e-6 * z.var()


def test_layer_as_wide_as_2048_channels_by_nine_is_solved_from_a_sample() -> None:
    groups, inputs = 1, 2048 * 9
    assert sketched(groups, inputs)
    assert not sketched(groups, 512 * 9)
    assert 1024 < most_rows(groups, inputs) <= 6144
    rows = 256
    rng = np.random.default_rng(2)
    few = rng.standard_normal((1, rows + 100, 24)).astype(np.float32)
    x = few @ rng.standard_normal((24, inputs)).astype(np.float32)
    w = rng.standard_normal((1, inputs, 4)) / 100
    z = (x @ w).astype(np.float32)
    fitter = Fitter(groups, inputs, 4, rows)
    fitter.add(x[:, :rows], z[:, :rows])
    fit = fitter.solve(w * 0.5, np.zeros((1, 4)))
    assert fit.before > 0.1
    left = x[:, rows:] @ fit.weight + fit.bias[:, None] - z[:, rows:]
    assert np.square(left).mean() < 1e-6 * z.var()


def test_new_weights_are_judged_as_they_will_be_stored() -> None:
    """Where storing spoils every candidate the old weights stay."""
    x, w, b = drawn(400, 6, 3)
    fitter = Fitter(1, 6, 3, 400)
    fitter.add(x, x @ w + b[:, None])
    fit = fitter.solve(w * 0.9, b, lambda weight, bias: (weight * 0.5, bias))
    assert fit.ridge is None
    kept = fitter.solve(w * 0.9, b, lambda weight, bias: (np.round(weight, 1), bias))
    np.testing.assert_array_equal(kept.weight, np.round(kept.weight, 1))
    assert 1e-6 < kept.after < kept.before


def test_noise_keeps_the_plain_weights() -> None:
    """Targets that the old weights make, plus noise: 24 rows of 20 inputs would learn the noise."""
    x, w, b = drawn(24, 20, 4)
    rng = np.random.default_rng(3)
    fitter = Fitter(1, 20, 4, 2000)
    fitter.add(x, x @ w + b[:, None] + 0.3 * rng.standard_normal((1, 24, 4)))
    fit = fitter.solve(w, b)
    unseen = rng.standard_normal((1, 500, 20)) + 0.5
    error = np.square(unseen @ (fit.weight - w) + (fit.bias - b)[:, None]).mean()
    assert error < 0.3**2 / 2
    assert fit.after <= fit.before
    if fit.ridge is None:
        assert fit.weight is w


def test_old_weights_that_cannot_be_bettered_stay_as_they_are() -> None:
    x, w, b = drawn(400, 6, 3)
    fitter = Fitter(1, 6, 3, 2000)
    fitter.add(x, x @ w + b[:, None])
    fit = fitter.solve(w, b)
    assert fit.weight is w
    assert fit.bias is b
    assert fit.ridge is None
    assert fit.before == fit.after < 1e-9


@pytest.mark.parametrize("size", [1, 2, 3, 32])
def test_a_fifth_is_held_out_whatever_the_size_of_the_batches(size: int) -> None:
    x, w, _ = drawn(192, 3, 2)
    fitter = Fitter(1, 3, 2, 2000)
    for start in range(0, 192, size):
        rows = x[:, start : start + size]
        fitter.add(rows, rows @ w)
    assert fitter.held.rows == 38
    assert fitter.fitted.rows == 154


def test_rows_too_few_to_hold_any_out_change_nothing() -> None:
    x, w, b = drawn(4, 6, 3)
    fitter = Fitter(1, 6, 3, 2000)
    fitter.add(x, np.ones((1, 4, 3)))
    fit = fitter.solve(w, b)
    assert fit.weight is w
    assert fit.ridge is None


def test_few_rows_fed_one_by_one_do_not_make_things_worse() -> None:
    """A layer behind global pooling sees one row for each sample: 16 rows for 30 inputs."""
    x, w, b = drawn(16, 30, 8)
    noisy = np.random.default_rng(4).standard_normal((1, 16, 8))
    fitter = Fitter(1, 30, 8, 2000)
    for row in range(16):
        fitter.add(x[:, row : row + 1], x[:, row : row + 1] @ w + noisy[:, row : row + 1])
    fit = fitter.solve(w, b * 0)
    unseen = np.random.default_rng(5).standard_normal((1, 400, 30))
    scale = np.square(unseen @ w).mean()
    assert np.square(unseen @ (fit.weight - w) + fit.bias[:, None]).mean() / scale < 0.2


def test_an_input_that_never_varies_is_no_trouble() -> None:
    x, w, b = drawn(300, 5, 2)
    x[:, :, 2] = 0
    x[:, :, 3] = x[:, :, 4]
    fitter = Fitter(1, 5, 2, 2000)
    fitter.add(x.astype(np.float32), (x @ w + b[:, None]).astype(np.float32))
    fit = fitter.solve(np.zeros_like(w), np.zeros_like(b))
    np.testing.assert_allclose(x @ fit.weight + fit.bias[:, None], x @ w + b[:, None], atol=1e-3)
    assert (fit.weight[0, 2] == 0).all()


def test_overflowed_rows_are_never_taken() -> None:
    x, w, b = drawn(100, 3, 2)
    x[0, 4, 0] = np.inf
    fitter = Fitter(1, 3, 2, 2000)
    with np.errstate(invalid="ignore"):
        fitter.add(x, x @ w)
        fit = fitter.solve(w, b)
    assert fit.weight is w
    assert fit.ridge is None
