from __future__ import annotations

import numpy as np
import pytest

from onnxprune.errors import UsageError
from onnxprune.train.objective import Aim, Objective, aims, choose
from tests.small import parsed

CLASSES, MAP = Aim("y", "y", -1), Aim("m", "m", None)


@pytest.mark.parametrize(
    ("losses", "labels", "teacher", "wanted"),
    [
        ((), True, False, [("y", "ce")]),
        ((), False, True, [("y", "kd"), ("m", "mse")]),
        ((), True, True, [("y", "ce"), ("y", "kd"), ("m", "mse")]),
        (("ce",), True, True, [("y", "ce")]),
        (("kd",), False, True, [("y", "kd")]),
        (("mse",), False, True, [("y", "mse"), ("m", "mse")]),
        (("ce", "kd"), True, True, [("y", "ce"), ("y", "kd")]),
    ],
)
def test_the_loss_follows_from_what_there_is_to_learn_from(
    losses: tuple[str, ...], labels: bool, teacher: bool, wanted: list[tuple[str, str]]
) -> None:
    found = choose((CLASSES, MAP), losses, labels=labels, teacher=teacher)
    assert [(aim.output, kind) for aim, kind in found] == wanted


@pytest.mark.parametrize(
    ("found", "losses", "labels", "teacher", "said"),
    [
        ((CLASSES,), (), False, False, "nothing to learn from"),
        ((CLASSES,), ("ce",), False, True, "--loss ce needs labels"),
        ((CLASSES,), ("kd",), True, False, "needs the model to imitate"),
        ((MAP,), ("kd",), False, True, "no output has a score for each class"),
        ((MAP,), (), True, False, "no output has a score for each class"),
        ((), ("mse",), False, True, "no output of the model is a float"),
    ],
)
def test_what_is_missing_is_said(
    found: tuple[Aim, ...], losses: tuple[str, ...], labels: bool, teacher: bool, said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        choose(found, losses, labels=labels, teacher=teacher)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("float[n,3] y) {y = Identity(x)}", Aim("y", "y", -1)),
        ("float[n,3] y) {y = Softmax(x)}", Aim("y", "x", -1, "Softmax")),
        ("float[n,3] y) {s = Softmax(x) y = Identity(s)}", Aim("y", "x", -1, "Softmax")),
        ("float[n,3] y) {y = LogSoftmax<axis=1>(x)}", Aim("y", "x", -1, "LogSoftmax")),
        ("float[n,1] y) {y = ReduceMax<keepdims=1>(x)}", Aim("y", "y", None)),
    ],
)
def test_scores_are_found_before_a_softmax(text: str, wanted: Aim) -> None:
    assert aims(parsed(f"g (float[n,3] x) => ({text}").proto) == (wanted,)


def test_an_output_of_whole_numbers_is_no_aim() -> None:
    model = parsed("g (float[n,3] x) => (int64[n,1] y) {y = ArgMax<axis=1>(x)}")
    assert aims(model.proto) == ()


def test_distillation_of_the_same_scores_is_zero_and_of_shifted_ones_too() -> None:
    objective = Objective(((CLASSES, "kd"),), 3.0)
    scores = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
    targets = objective.targets({"y": scores}, None)
    assert objective.loss({"y": scores}, targets) == pytest.approx(0, abs=1e-9)
    assert objective.loss({"y": scores + 7}, targets) == pytest.approx(0, abs=1e-6)


def test_probabilities_are_compared_by_their_logarithms() -> None:
    plain, soft = Objective(((CLASSES, "kd"),)), Objective(((Aim("y", "s", -1, "Softmax"), "kd"),))
    one, two = np.random.default_rng(0).standard_normal((2, 5, 3)).astype(np.float32)

    def share(scores: np.ndarray) -> np.ndarray:
        exp = np.exp(scores)
        return exp / exp.sum(1, keepdims=True)

    wanted = plain.loss({"y": one}, plain.targets({"y": two}, None))
    found = soft.loss({"y": share(one)}, soft.targets({"y": share(two)}, None))
    assert found == pytest.approx(wanted, rel=1e-4)


def test_squares_are_scaled_by_what_the_teacher_says() -> None:
    objective = Objective(((MAP, "mse"),), scales={"m": 0.25})
    targets = objective.targets({"m": np.zeros((2, 4), np.float32)}, None)
    assert objective.loss({"m": np.full((2, 4), 2.0)}, targets) == pytest.approx(1.0)
