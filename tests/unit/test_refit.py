"""Ridge least squares with a held-out choice."""

from __future__ import annotations

import numpy as np
import pytest

from onnxprune.refit import Fitter, Moments


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
    fitter = Fitter(groups, 7, 5, intercept=intercept)
    fitter.add(x, x @ w + b[:, None])
    fit = fitter.solve(np.zeros_like(w), np.zeros_like(b))
    np.testing.assert_allclose(fit.weight, w, atol=1e-4)
    np.testing.assert_allclose(fit.bias, b, atol=1e-4)
    assert fit.ridge == 1e-6
    assert fit.before > 0.9
    assert fit.after < 1e-9


def test_error_is_the_sum_of_squares() -> None:
    x, w, b = drawn(50, 4, 3)
    z = np.random.default_rng(9).standard_normal((1, 50, 3))
    moments = Moments(1, 4, 3)
    moments.add(x[:, :20], z[:, :20])
    moments.add(x[:, 20:], z[:, 20:])
    np.testing.assert_allclose(moments.error(w, b), np.square(z - x @ w - b[:, None]).sum(axis=1))
    np.testing.assert_allclose(moments.spread, np.square(z - z.mean(1)).sum(axis=1))
    assert moments.loss(w, b) == pytest.approx(moments.error(w, b).sum())


def test_loss_that_rounds_below_zero_is_zero() -> None:
    x, w, b = drawn(2000, 4, 3)
    moments = Moments(1, 4, 3)
    shifted = x + 1000
    moments.add(shifted, shifted @ w + b[:, None])
    assert moments.loss(w, b) >= 0


def test_noise_keeps_the_plain_weights() -> None:
    """Targets that the old weights make, plus noise: 24 rows of 20 inputs would learn the noise."""
    x, w, b = drawn(24, 20, 4)
    rng = np.random.default_rng(3)
    fitter = Fitter(1, 20, 4)
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
    fitter = Fitter(1, 6, 3)
    fitter.add(x, x @ w + b[:, None])
    fit = fitter.solve(w, b)
    assert fit.weight is w
    assert fit.bias is b
    assert fit.ridge is None
    assert fit.before == fit.after < 1e-9


@pytest.mark.parametrize("size", [1, 2, 3, 32])
def test_a_fifth_is_held_out_whatever_the_size_of_the_batches(size: int) -> None:
    x, w, _ = drawn(192, 3, 2)
    fitter = Fitter(1, 3, 2)
    for start in range(0, 192, size):
        rows = x[:, start : start + size]
        fitter.add(rows, rows @ w)
    assert fitter.held.rows == 38
    assert fitter.fitted.rows == 154


def test_rows_too_few_to_hold_any_out_change_nothing() -> None:
    x, w, b = drawn(4, 6, 3)
    fitter = Fitter(1, 6, 3)
    fitter.add(x, np.ones((1, 4, 3)))
    fit = fitter.solve(w, b)
    assert fit.weight is w
    assert fit.ridge is None


def test_few_rows_fed_one_by_one_do_not_make_things_worse() -> None:
    """A layer behind global pooling sees one row for each sample: 16 rows for 30 inputs."""
    x, w, b = drawn(16, 30, 8)
    noisy = np.random.default_rng(4).standard_normal((1, 16, 8))
    fitter = Fitter(1, 30, 8)
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
    fitter = Fitter(1, 5, 2)
    fitter.add(x.astype(np.float32), (x @ w + b[:, None]).astype(np.float32))
    fit = fitter.solve(np.zeros_like(w), np.zeros_like(b))
    np.testing.assert_allclose(x @ fit.weight + fit.bias[:, None], x @ w + b[:, None], atol=1e-3)
    assert (fit.weight[0, 2] == 0).all()


def test_overflowed_rows_are_never_taken() -> None:
    x, w, b = drawn(100, 3, 2)
    x[0, 4, 0] = np.inf
    fitter = Fitter(1, 3, 2)
    with np.errstate(invalid="ignore"):
        fitter.add(x, x @ w)
        fit = fitter.solve(w, b)
    assert fit.weight is w
    assert fit.ridge is None
