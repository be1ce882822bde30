"""Which of two epochs did better."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from onnxprune.train.judge import Judge
from onnxprune.train.objective import Aim, Objective
from onnxprune.train.samples import Samples
from onnxprune.types import Epoch


def judge(samples: int, *, labels: bool = True) -> Judge:
    held = np.zeros(samples, np.int64) if labels else None
    nothing: Any = None
    return Judge(
        nothing, nothing, Samples({"x": np.zeros((samples, 1), np.float32)}, held, ""), None,
        Objective(()), Aim("y", "y", -1), 64, 1,
    )  # fmt: skip


def epoch(metric: float, held_out: float) -> Epoch:
    return Epoch(1, 0.0, held_out, metric, 0.0)


@pytest.mark.parametrize(
    ("samples", "one", "than", "better"),
    [
        pytest.param(1000, (0.96, 0.3), (0.94, 0.2), True, id="more classes beyond chance"),
        pytest.param(1000, (0.942, 0.3), (0.941, 0.2), False, id="one class more is chance"),
        pytest.param(1000, (0.941, 0.19), (0.942, 0.2), True, id="the loss decides then"),
        pytest.param(100_000, (0.944, 0.3), (0.941, 0.2), True, id="of many samples it is none"),
        pytest.param(100, (1.0, 0.2), (1.0, 0.2), False, id="no gain"),
        pytest.param(100, (0.9, math.nan), (0.9, 0.2), False, id="a loss that is no number"),
    ],
)
def test_right_classes_count_beyond_chance_and_then_the_loss(
    samples: int, one: tuple[float, float], than: tuple[float, float], *, better: bool
) -> None:
    assert judge(samples).better(epoch(*one), epoch(*than)) is better


def test_without_labels_the_loss_decides() -> None:
    assert judge(1000, labels=False).better(epoch(0.9, 0.1), epoch(0.99, 0.2))
