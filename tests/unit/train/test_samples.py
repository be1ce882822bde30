from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from onnxprune.data import Data
from onnxprune.errors import UsageError
from onnxprune.runtime import session
from onnxprune.train import samples as module
from onnxprune.train.samples import Samples, Teacher
from tests.training import linear, points


def drawn(count: int = 50) -> Samples:
    x, y = points()
    return Samples({"x": x[:count]}, y[:count], "points")


def test_batches_of_data_become_samples() -> None:
    data = Data([{"x": np.ones((3, 2))}, {"x": np.zeros((2, 2))}], "", random=False, samples=5)
    made = Samples.of(data, np.arange(5))
    assert len(made) == 5
    assert made.labels is not None
    assert made.labels.dtype == np.int64


def test_inputs_that_are_not_counted_alike_are_refused() -> None:
    data = Data([{"x": np.ones((3, 2)), "k": np.array(2.0)}], "", random=False, samples=3)
    with pytest.raises(UsageError, match="one entry for each sample"):
        Samples.of(data, None)


def test_a_split_is_seeded_and_keeps_labels_with_samples() -> None:
    whole = drawn()
    one, held = whole.split(0.2, seed=1)
    again, _ = whole.split(0.2, seed=1)
    other, _ = whole.split(0.2, seed=2)
    assert (len(one), len(held)) == (40, 10)
    assert np.array_equal(one.inputs["x"], again.inputs["x"])
    assert not np.array_equal(one.inputs["x"], other.inputs["x"])
    for part in (one, held):
        at = [int(np.flatnonzero((whole.inputs["x"] == row).all(1))[0]) for row in part.inputs["x"]]
        assert np.array_equal(part.labels, whole.labels[at])  # type: ignore[index, arg-type]


def test_a_split_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="leaves none"):
        drawn(3).split(0.1, seed=0)


def asked_of(teacher: Teacher, at: np.ndarray) -> np.ndarray:
    try:
        return teacher.outputs(at)["y"]
    finally:
        teacher.close()


@pytest.mark.parametrize(
    "limits",
    [{}, {"_IN_MEMORY": 0}, {"_IN_MEMORY": 0, "_ON_DISK": 0}],
    ids=["in memory", "in a file", "asked again"],
)
def test_a_teacher_says_the_same_wherever_it_is_kept(
    limits: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in limits.items():
        monkeypatch.setattr(module, name, value)
    loaded, at = session(linear()), np.array([7, 3, 49, 3])
    said = asked_of(Teacher(loaded, drawn(), ["y"], batch=8), at)
    wanted = loaded.run({"x": drawn().inputs["x"][at]})["y"]
    np.testing.assert_allclose(said, wanted, rtol=1e-5)


def test_a_disk_that_is_full_means_asking_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> Callable[..., object]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_IN_MEMORY", 0)
    monkeypatch.setattr(module.tempfile, "TemporaryDirectory", full)
    said = asked_of(Teacher(session(linear()), drawn(), ["y"], batch=8), np.arange(5))
    assert said.shape == (5, 3)
