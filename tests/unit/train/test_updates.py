from __future__ import annotations

import numpy as np
import pytest

from onnxprune.train.updates import Updates


def problem(seed: int = 0) -> tuple[dict[str, np.ndarray], list[dict[str, np.ndarray]]]:
    rng = np.random.default_rng(seed)
    weights = {"a": rng.standard_normal((3, 4)).astype(np.float32), "b": np.ones(2, np.float32)}
    steps = [
        {n: rng.standard_normal(w.shape).astype(np.float32) for n, w in weights.items()}
        for _ in range(6)
    ]
    return weights, steps


def test_adamw_is_the_papers_with_decoupled_decay() -> None:
    weights, steps = problem()
    wanted = weights["a"].astype(np.float64)
    first, second = np.zeros_like(wanted), np.zeros_like(wanted)
    updates = Updates(weights, decayed=frozenset({"a"}), weight_decay=0.1)
    for number, gradients in enumerate(steps, start=1):
        updates.apply(gradients, 0.01)
        gradient = gradients["a"].astype(np.float64)
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        mean, power = first / (1 - 0.9**number), second / (1 - 0.999**number)
        wanted = wanted * (1 - 0.01 * 0.1) - 0.01 * mean / (np.sqrt(power) + 1e-8)
    np.testing.assert_allclose(weights["a"], wanted, rtol=1e-4, atol=1e-5)


def test_sgd_has_momentum_and_decay_in_the_gradient() -> None:
    weights, steps = problem()
    wanted, speed = weights["a"].astype(np.float64), 0.0
    updates = Updates(weights, optimizer="sgd", decayed=frozenset({"a"}), weight_decay=0.1)
    for gradients in steps:
        updates.apply(gradients, 0.01)
        speed = 0.9 * speed + gradients["a"] + 0.1 * wanted
        wanted = wanted - 0.01 * speed
    np.testing.assert_allclose(weights["a"], wanted, rtol=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_masked_weights_are_zero_at_once_and_after_every_step(optimizer: str) -> None:
    weights, steps = problem()
    mask = np.arange(12).reshape(3, 4) % 2 == 0
    updates = Updates(weights, optimizer=optimizer, masks={"a": mask}, weight_decay=0.1)
    assert not weights["a"][~mask].any()
    for gradients in steps:
        updates.apply(gradients, 0.1)
        assert not weights["a"][~mask].any()
        assert weights["a"][mask].all()


def test_a_penalty_pulls_towards_zero_by_its_own_factor() -> None:
    weights = {"a": np.array([2.0, -2.0], np.float32), "b": np.array([2.0], np.float32)}
    updates = Updates(weights, optimizer="sgd", l1={"a": 0.5})
    updates.apply({"a": np.zeros(2, np.float32), "b": np.zeros(1, np.float32)}, 0.1, l1=2.0)
    np.testing.assert_allclose(weights["a"], [1.9, -1.9], rtol=1e-6)
    assert weights["b"] == 2


def test_gradients_over_the_limit_are_scaled_together() -> None:
    weights = {"a": np.zeros(1, np.float32), "b": np.zeros(1, np.float32)}
    updates = Updates(weights, optimizer="sgd", clip=1.0)
    updates.apply({"a": np.array([3.0], np.float32), "b": np.array([4.0], np.float32)}, 1.0)
    np.testing.assert_allclose([weights["a"][0], weights["b"][0]], [-0.6, -0.8], rtol=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_state_put_back_goes_on_to_the_same_weights(optimizer: str) -> None:
    weights, steps = problem()
    updates = Updates(weights, optimizer=optimizer)
    for gradients in steps[:3]:
        updates.apply(gradients, 0.1)
    kept = {n: w.copy() for n, w in weights.items()}
    state = {n: a.copy() for n, a in updates.state().items()}
    for gradients in steps[3:]:
        updates.apply(gradients, 0.1)
    again = Updates(kept, optimizer=optimizer)
    again.load(state)
    for gradients in steps[3:]:
        again.apply(gradients, 0.1)
    assert all(np.array_equal(kept[name], weights[name]) for name in weights)
