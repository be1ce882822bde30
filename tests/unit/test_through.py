"""Refits that know the activation behind a layer."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from onnxprune.activations import activation_behind
from onnxprune.prepare import prepare
from onnxprune.refit import Fitter
from onnxprune.through import Through
from onnxprune.types import Float32Array
from tests.small import parsed

POINTS = np.linspace(-5, 5, 201, dtype=np.float32)


def behind(body: str, **weights: np.ndarray) -> object:
    text = f"""
    agraph (float[N,4] x) => (float[N,4] y) {{
        t = Identity(x)
        {body}
    }}
    """
    return activation_behind(prepare(parsed(text, **weights)), "t")


# ------------------------------------------------------------------------------- what is behind it


@pytest.mark.parametrize(
    ("body", "function"),
    [
        ("a = Relu(t)\ny = Identity(a)", lambda v: np.maximum(v, 0)),
        ("a = HardSwish(t)\ny = Neg(a)", lambda v: -v * np.clip(v / 6 + 0.5, 0, 1)),
        ("s = Sigmoid(t)\ny = Mul(t, s)", lambda v: v / (1 + np.exp(-v))),
        ("h = Mul(t, half)\ny = Max(t, h)", lambda v: np.maximum(v, v / 2)),
    ],
    ids=["relu", "hard swish and sign", "swish in two nodes", "leaky relu by hand"],
)
def test_activation_is_found_whatever_it_is_written_in(body: str, function: object) -> None:
    weights = {"half": np.float32(0.5)} if "half" in body else {}
    found = behind(body, **weights)
    wanted = function(POINTS.astype(np.float64))  # type: ignore[operator]
    np.testing.assert_allclose(found(POINTS), wanted, atol=2e-3)  # type: ignore[operator]


def test_far_out_an_activation_goes_on_straight() -> None:
    found = behind("s = Sigmoid(t)\ny = Mul(t, s)")
    far = np.float32([-1e6, -100, 0, 100, 1e6])
    np.testing.assert_allclose(found(far), [0, 0, 0, 100, 1e6], rtol=1e-3, atol=1e-3)  # type: ignore[operator]


def test_function_that_is_not_finite_everywhere_is_left_out() -> None:
    assert behind("a = Sqrt(t)\ny = Neg(a)") is None


def test_gelu_of_five_nodes_is_one_activation() -> None:
    body = """
    d = Div(t, root)
    e = Erf(d)
    p = Add(e, one)
    m = Mul(t, p)
    y = Mul(m, half)
    """
    weights = {"root": np.float32(2**0.5), "one": np.float32(1), "half": np.float32(0.5)}
    found = behind(body, **weights)
    at = found(np.float32([-1, 0, 1, 2]))  # type: ignore[operator]
    np.testing.assert_allclose(at, [-0.158655, 0, 0.841345, 1.954500], atol=1e-5)


@pytest.mark.parametrize(
    "body",
    [
        "a = Softmax(t)\ny = Add(t, a)",
        "y = Mul(t, line)",
        "y = Softmax(t)",
        "s = Softmax(t)\nr = Relu(t)\ny = Add(s, r)",
        "i = Cast<to=7>(t)\ny = Cast<to=1>(i)",
    ],
    ids=["sum with what mixes", "by channel", "no function", "seen in two ways", "rounded"],
)
def test_what_is_no_function_of_one_number_is_not_taken_for_one(body: str) -> None:
    weights = {"line": np.ones(4, np.float32)} if "line" in body else {}
    assert behind(body, **weights) is None


def test_longest_run_ends_where_the_tensor_itself_is_no_longer_read() -> None:
    found = behind("a = Relu(t)\nb = Softmax(a)\ny = Add(b, a)")
    assert [node.op_type for node in found.nodes] == ["Relu"]  # type: ignore[attr-defined]


# ------------------------------------------------------------------------------------ what it does


def relu(array: Float32Array) -> Float32Array:
    return np.maximum(array, np.float32(0))


def rows(seed: int, count: int) -> tuple[Float32Array, Float32Array]:
    """A Relu layer of ten inputs, five of which are lost: the rest cannot make it all."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((1, count, 10)).astype(np.float32)
    w = np.random.default_rng(0).standard_normal((10, 8)).astype(np.float32)
    return x[:, :, :5], x @ w - 1


def error(fit: object, x: Float32Array, z: Float32Array) -> float:
    made = x @ fit.weight.astype(np.float32) + fit.bias[:, None].astype(np.float32)  # type: ignore[attr-defined]
    wanted = relu(z)
    return float(np.square(relu(made) - wanted).sum() / np.square(wanted - wanted.mean()).sum())


@pytest.mark.parametrize("count", [40, 4000], ids=["a few rows", "many rows"])
def test_seen_through_a_relu_the_fit_is_better_on_rows_it_never_saw(count: int) -> None:
    x, z = rows(1, count)

    def batches() -> Iterator[tuple[Float32Array, Float32Array, None]]:
        for start in range(0, count, 20):
            yield x[:, start : start + 20], z[:, start : start + 20], None

    fits = []
    for through in (None, Through(relu, batches)):
        fitter = Fitter(1, 5, 8, count)
        for part, target, _ in batches():
            fitter.add(part, target)
        fits.append(fitter.solve(np.zeros((1, 5, 8)), np.zeros((1, 8)), None, through))
    unseen = rows(2, 4000)
    plain, seen = (error(fit, *unseen) for fit in fits)
    assert seen <= plain
    if count > 1000:
        assert seen < 0.93 * plain
        assert fits[1].after == pytest.approx(seen, rel=0.15)
    assert fits[1].before > fits[1].after


def test_what_is_added_in_front_of_the_activation_counts() -> None:
    """Where the other summand holds everything below zero, there is nothing to fit."""
    x, z = rows(1, 2000)
    low = np.full_like(z, -100.0)

    def batches() -> Iterator[tuple[Float32Array, Float32Array, Float32Array]]:
        yield x, z, low

    fitter = Fitter(1, 5, 8, 2000)
    fitter.add(x, z)
    plain = Fitter(1, 5, 8, 2000)
    plain.add(x, z)
    start = np.zeros((1, 5, 8)), np.zeros((1, 8))
    seen = fitter.solve(*start, None, Through(relu, batches))
    np.testing.assert_array_equal(seen.weight, plain.solve(*start).weight)


def test_without_an_activation_to_hide_errors_nothing_changes() -> None:
    x, z = rows(3, 2000)

    def batches() -> Iterator[tuple[Float32Array, Float32Array, None]]:
        yield x, z, None

    fits = []
    for through in (None, Through(lambda array: array, batches)):
        fitter = Fitter(1, 5, 8, 2000)
        fitter.add(x, z)
        fits.append(fitter.solve(np.zeros((1, 5, 8)), np.zeros((1, 8)), None, through))
    np.testing.assert_array_equal(fits[0].weight, fits[1].weight)
