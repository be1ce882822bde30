from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from onnxprune.errors import VerificationError
from onnxprune.train.copying import TrainingCopy
from onnxprune.train.gradcheck import check_gradients
from onnxprune.train.own import FromGradients
from onnxprune.train.protocol import Job, Term
from tests.training import linear, points, softmax

JOB = Job(("w", "b"), (Term("ce", "y", "ce/y"),))


def checked(function: Callable, job: Job = JOB) -> tuple[int, FromGradients]:
    trainer = FromGradients(function)
    trainer.prepare(TrainingCopy.of(linear()).proto, job)
    x, y = points()
    return check_gradients(trainer, job, {"x": x[:32]}, {"ce/y": y[:32]}), trainer


def test_right_gradients_pass_and_weights_are_as_before() -> None:
    count, trainer = checked(softmax)
    assert count == 2
    np.testing.assert_array_equal(
        trainer.weights()["w"], TrainingCopy.of(linear()).values(("w",))["w"]
    )


@pytest.mark.parametrize("factor", [0.5, -1.0, 1.5])
def test_a_wrong_gradient_is_named(factor: float) -> None:
    def wrong(*given: object) -> tuple[float, dict[str, np.ndarray]]:
        loss, gradients = softmax(*given)
        return loss, {**gradients, "w": factor * gradients["w"]}

    with pytest.raises(VerificationError, match="wrong gradient for 'w'"):
        checked(wrong)


def test_a_gradient_of_the_wrong_elements_is_found() -> None:
    def turned(*given: object) -> tuple[float, dict[str, np.ndarray]]:
        loss, gradients = softmax(*given)
        return loss, {**gradients, "w": gradients["w"][::-1].copy()}

    with pytest.raises(VerificationError, match="'w'"):
        checked(turned)


def test_masked_weights_are_not_moved() -> None:
    mask = np.ones((6, 3), bool)
    mask[::2] = False
    job = Job(("w", "b"), (Term("ce", "y", "ce/y"),), masks={"w": mask})
    assert checked(softmax, job)[0] == 2


def test_a_loss_that_is_random_cannot_be_checked() -> None:
    rng = np.random.default_rng(0)

    def noisy(*given: object) -> tuple[float, dict[str, np.ndarray]]:
        loss, gradients = softmax(*given)
        return loss + rng.normal(), gradients

    assert checked(noisy)[0] == 0
