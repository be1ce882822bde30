"""Figures that a cut is judged by, on arrays whose answer is known."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from onnxprune.errors import UsageError
from onnxprune.functions import UserFunction
from onnxprune.gauges import Drifted, Gauge, read_labels


def test_drift_is_that_of_all_batches_together_and_of_the_worst_output() -> None:
    drifted = Drifted()
    drifted.add({"a": np.array([3.0]), "b": np.ones(4)}, {"a": np.array([3.0]), "b": np.ones(4)})
    drifted.add({"a": np.array([4.0]), "b": np.ones(4)}, {"a": np.array([3.0]), "b": np.ones(4)})
    assert drifted.result() == pytest.approx(1 / 5)


def test_drift_of_equal_infinities_is_nothing_and_of_unequal_ones_infinite() -> None:
    odd = {"a": np.array([np.inf, np.nan, 1.0])}
    same, other = Drifted(), Drifted()
    same.add(odd, dict(odd))
    other.add(odd, {"a": np.array([1.0, np.nan, 1.0])})
    assert same.result() == 0.0
    assert math.isinf(other.result())


def test_drift_of_outputs_of_other_shapes_is_infinite() -> None:
    drifted = Drifted()
    drifted.add({"a": np.ones(3)}, {"a": np.ones(2)})
    assert math.isinf(drifted.result())


def test_accuracy_counts_over_batches_and_loss_is_what_it_fell() -> None:
    gauge = Gauge(labels=np.array([0, 1, 1]))
    tally = gauge.tally()
    tally.add({}, {"y": np.array([[2.0, 1.0], [2.0, 1.0]])})
    tally.add({"y": np.array([[0.0, 1.0]])}, {})  # an output that a cut does not reach
    assert tally.result() == pytest.approx(2 / 3)
    assert gauge.measure == "top1"
    assert gauge.loss(2 / 3, 1.0) == pytest.approx(1 / 3)


def test_accuracy_needs_an_output_of_scores() -> None:
    with pytest.raises(UsageError, match="no output has a score"):
        Gauge(labels=np.array([0])).tally().add({}, {"y": np.ones(3)})


def test_metric_gets_all_outputs_at_once_and_the_labels(tmp_path: Path) -> None:
    path = tmp_path / "m.py"
    path.write_text("def mean(outputs, labels):\n    return (outputs['y'] * labels).mean()\n")
    gauge = Gauge(np.array([1.0, 2.0, 3.0]), UserFunction.read(f"{path}:mean"))
    tally = gauge.tally()
    tally.add({}, {"y": np.array([1.0, 1.0])})
    tally.add({}, {"y": np.array([2.0])})
    assert gauge.measure == "metric"
    assert tally.result() == 3.0


@pytest.mark.parametrize(
    ("text", "spelled", "says"),
    [
        ("def f(o, l): return 1\n", "m.py:g", "has no function 'g'"),
        ("import nothing_of_the_kind\n", "m.py:f", "cannot be run"),
        ("def f(:\n", "m.py:f", "cannot be run"),
        ("", "m.py", "is not path.py:function"),
        ("", "none.py:f", "cannot read"),
    ],
)
def test_function_that_is_not_there_is_a_usage_error(
    text: str, spelled: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("m.py").write_text(text)
    with pytest.raises(UsageError, match=says):
        UserFunction.read(spelled)


def test_metric_that_gives_no_number_is_a_usage_error(tmp_path: Path) -> None:
    path = tmp_path / "m.py"
    path.write_text("def f(outputs, labels):\n    return 'good'\n")
    tally = Gauge(metric=UserFunction.read(f"{path}:f")).tally()
    tally.add({}, {"y": np.ones(1)})
    with pytest.raises(UsageError, match="gave str, not a number"):
        tally.result()


def test_labels_must_be_as_many_as_samples(tmp_path: Path) -> None:
    path = tmp_path / "y.npy"
    np.save(path, np.arange(10))
    assert read_labels(path, 8, 4).tolist() == list(range(8))  # a rest that no batch takes
    for samples in (11, 6):
        with pytest.raises(UsageError, match=f"10 labels for {samples} samples"):
            read_labels(path, samples, 4)
    np.savez(tmp_path / "y.npz", x=np.ones(2), labels=np.arange(3))
    assert read_labels(tmp_path / "y.npz", 3, 1).tolist() == [0, 1, 2]
    np.savez(tmp_path / "z.npz", x=np.ones(2))
    with pytest.raises(UsageError, match="no array 'labels'"):
        read_labels(tmp_path / "z.npz", 2, 1)
    (tmp_path / "bad.npy").write_text("no")
    with pytest.raises(UsageError, match="cannot read labels"):
        read_labels(tmp_path / "bad.npy", 1, 1)
