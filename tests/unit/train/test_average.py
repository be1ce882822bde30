"""The mean of weights over steps: what it is, and when it is taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxprune.train.average import EVERY, Average
from onnxprune.train.own import FromGradients
from onnxprune.train.protocol import Arrays
from onnxprune.tuning import finetune
from tests.small import array, reloaded
from tests.training import linear, softmax, trainer, written


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path)
    reloaded(linear(), tmp_path / "m.onnx")


class Shakes(FromGradients):
    """Weights that swing around where they should be, each time they are asked for."""

    def __init__(self, size: float) -> None:
        super().__init__(softmax)
        self.size, self.sign = size, 1.0

    def weights(self) -> Arrays:
        self.sign = -self.sign
        off = {
            name: self.sign * self.size * np.resize([1.0, -1.0, -1.0, 1.0], one.shape)
            for name, one in super().weights().items()
        }
        return {
            name: (one + off[name]).astype(np.float32) for name, one in super().weights().items()
        }


def tuned(**options: Any) -> Any:
    given = {
        "data": "points.npz", "labels": "classes.npy", "trainer": trainer(), "epochs": 4,
        "rate": 0.05, "batch_size": 4, "seed": 3,
    }  # fmt: skip
    return finetune("m.onnx", **(given | options))


def test_it_is_a_mean_that_forgets_and_keeps_zeros() -> None:
    mean, kept = Average(), np.float32(0.98**EVERY)
    for value in (1.0, 2.0, 4.0):
        mean.add({"w": np.array([value, 0.0], np.float32)})
    assert mean.values is not None
    expected = kept * (kept * 1 + (1 - kept) * 2) + (1 - kept) * 4
    np.testing.assert_allclose(mean.values["w"], [expected, 0.0], rtol=1e-6)
    assert mean.values["w"][1] == 0.0
    assert [step for step in range(31) if Average.due(step)] == [0, 10, 20, 30]


def test_weights_that_swing_are_kept_as_their_mean() -> None:
    _, report = tuned(trainer=Shakes(0.5))
    best = report.tuned.epochs[report.tuned.best]
    assert report.tuned.best > 0
    assert best.averaged


def test_weights_that_are_better_than_their_mean_stay_as_they_are() -> None:
    made, report = tuned(epochs=1, rate=0.02)
    assert report.tuned.best == 1
    assert not report.tuned.epochs[1].averaged
    first, _ = tuned(epochs=1, rate=0.02)
    assert np.array_equal(array(made, "w"), array(first, "w"))


def test_under_a_penalty_no_mean_is_taken() -> None:
    _, report = tuned(trainer=Shakes(2.0), l1_weights=1e-3)
    assert not any(epoch.averaged for epoch in report.tuned.epochs)
