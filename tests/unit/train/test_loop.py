"""Fine-tuning with a trainer in numpy: what the core does, whoever computes gradients."""

from __future__ import annotations

import errno
import json
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnxprune import io
from onnxprune.errors import TrainingError, UsageError, VerificationError
from onnxprune.model import Model
from onnxprune.runtime import session
from onnxprune.train.checkpoint import Checkpoint
from onnxprune.train.own import FromGradients
from onnxprune.train.schedule import Schedule
from onnxprune.tuning import finetune
from tests.small import array, parsed, reloaded
from tests.training import linear, points, softmax, trainer, written

OPTIONS = {"epochs": 4, "rate": 0.05, "batch_size": 16, "seed": 3}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path)
    reloaded(linear(), tmp_path / "m.onnx")


def tuned(**options: Any) -> tuple[Model, Any]:
    given = {"data": "points.npz", "labels": "classes.npy", "trainer": trainer(), **OPTIONS}
    return finetune("m.onnx", **(given | options))


def accuracy(model: Model) -> float:
    x, y = points()
    return float((session(model).run({"x": x})["y"].argmax(1) == y).mean())


class Falters(FromGradients):
    """Does something at one step."""

    def __init__(self, at: int, what: object) -> None:
        super().__init__(softmax)
        self.at, self.what, self.done = at, what, 0

    def step(self, *given: Any, **named: Any) -> float:
        self.done += 1
        if self.done == self.at:
            if isinstance(self.what, BaseException):
                raise self.what
            return float("nan")
        return super().step(*given, **named)


def test_labels_are_learned_and_only_weights_change() -> None:
    before = io.load("m.onnx")
    made, report = tuned(output="out.onnx")
    assert accuracy(made) > accuracy(before) + 0.2
    after = io.load("out.onnx")
    np.testing.assert_array_equal(array(after, "w"), array(made, "w"))
    stripped = [onnx.ModelProto.FromString(m.proto.SerializeToString()) for m in (before, after)]
    for proto in stripped:
        del proto.graph.initializer[:]
    assert stripped[0] == stripped[1]
    assert report.tuned.checked == 2
    assert report.tuned.measure == "top1"
    assert len(report.tuned.epochs) == 1 + OPTIONS["epochs"]
    assert not Path("out.onnx.checkpoint.npz").exists()


def test_labels_may_be_whole_floats() -> None:
    made, _ = tuned(labels=points()[1].astype(np.float32))
    assert np.array_equal(array(made, "w"), array(tuned()[0], "w"))


def test_data_may_be_arrays_in_memory() -> None:
    made, _ = tuned(data={"x": points()[0]})
    assert np.array_equal(array(made, "w"), array(tuned()[0], "w"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"data": None}, "training needs inputs"),
        ({"data": 3}, "data is a int"),
        ({"data": {"x": np.ones((9, 5), np.float32)}}, "input 'x' is float32 "),
        ({"epochs": "3"}, "epochs is '3', not a whole number"),
        ({"epochs": None}, "epochs and batch-size are whole numbers"),
        ({"batch_size": 1.5}, "batch-size is 1.5, not a whole number"),
        ({"rate": "0.1"}, "lr is '0.1', not a number"),
        ({"optimizer": 3}, "optimizer is 3, not a text"),
        ({"validation": None}, "val is None"),
        ({"loss": 3}, "loss is 3"),
        ({"seed": "1"}, "seed is '1', not a whole number"),
        ({"max_drift": "0.1"}, "max-drift is '0.1', not a number"),
    ],
)
def test_values_of_another_kind_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        tuned(**options)


def test_the_same_seed_gives_the_same_weights_and_another_does_not() -> None:
    one, two, other = tuned()[0], tuned()[0], tuned(seed=4)[0]
    assert np.array_equal(array(one, "w"), array(two, "w"))
    assert not np.array_equal(array(one, "w"), array(other, "w"))


@pytest.mark.parametrize("at", [5, 14, 30])
def test_a_run_that_was_broken_off_goes_on_to_the_same_weights(
    at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxprune.train.loop._SAVE_EVERY", 0.0)  # after every step
    whole, _ = tuned()
    with pytest.raises(TrainingError, match=r"--resume goes on from 'out\.onnx"):
        tuned(output="out.onnx", trainer=Falters(at, TrainingError("the process died")))
    assert not Path("out.onnx").exists()
    again, report = tuned(output="out.onnx", resume=True)
    assert np.array_equal(array(again, "w"), array(whole, "w"))
    assert len(report.tuned.epochs) == 1 + OPTIONS["epochs"]


def test_an_interruption_saves_where_it_stands() -> None:
    whole, _ = tuned()
    with pytest.raises(KeyboardInterrupt):
        tuned(output="out.onnx", trainer=Falters(20, KeyboardInterrupt()))
    again, _ = tuned(output="out.onnx", resume=True)
    assert np.array_equal(array(again, "w"), array(whole, "w"))


class Signals(FromGradients):
    """Gets an order to end half-way through an update; asked for more amid it, it has nothing."""

    def __init__(self, at: int) -> None:
        super().__init__(softmax)
        self.at, self.done, self.amid = at, 0, False

    def step(self, *given: Any, **named: Any) -> float:
        self.done += 1
        self.amid = True
        weights = self._held["w"].copy()
        if self.done == self.at:
            self._held["w"] += 1
            signal.raise_signal(signal.SIGINT)
            self._held["w"][...] = weights
        loss = super().step(*given, **named)
        self.amid = False
        return loss

    def state(self) -> Any:
        return {} if self.amid else super().state()


@pytest.mark.parametrize("at", [3, 14, 20, 28])
def test_an_order_to_end_is_followed_between_two_steps(at: int) -> None:
    tuned(output="whole.onnx")
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match=r"--resume goes on from 'out\.onnx\.checkpoint"):
        tuned(output="out.onnx", trainer=Signals(at))
    assert signal.getsignal(signal.SIGINT) is before
    tuned(output="out.onnx", resume=True)
    assert Path("out.onnx").read_bytes() == Path("whole.onnx").read_bytes()


def test_an_interruption_amid_a_step_leaves_the_checkpoint_before() -> None:
    class Breaks(FromGradients):
        done = 0

        def step(self, *given: Any, **named: Any) -> float:
            self.done += 1
            if self.done == 20:
                self._held["w"] += 1
                raise KeyboardInterrupt
            return super().step(*given, **named)

    tuned(output="whole.onnx")
    with pytest.raises(KeyboardInterrupt):
        tuned(output="out.onnx", trainer=Breaks(softmax))
    with np.load("out.onnx.checkpoint.npz") as held:
        assert "state/w" in held.files
    tuned(output="out.onnx", resume=True)
    assert Path("out.onnx").read_bytes() == Path("whole.onnx").read_bytes()


def test_a_checkpoint_without_state_is_refused() -> None:
    with pytest.raises(KeyboardInterrupt):
        tuned(output="out.onnx", trainer=Signals(20))
    with np.load("out.onnx.checkpoint.npz") as held:
        kept = {name: held[name] for name in held.files if not name.startswith("state/")}
    np.savez("out.onnx.checkpoint.npz", **kept)
    with pytest.raises(UsageError, match=r"no state of the trainer \(delete it"):
        tuned(output="out.onnx", resume=True)


def test_a_loss_that_is_no_number_ends_it_and_the_best_is_left() -> None:
    with pytest.raises(TrainingError, match=r"loss became nan at step \d+ of epoch 3"):
        tuned(output="out.onnx", trainer=Falters(30, None))
    made, report = tuned(output="out.onnx", resume=True, epochs=2)  # what it has, and no more
    assert report.tuned.best in (1, 2)
    assert "the result is what 2 of 4 epochs gave" in report.warnings
    assert accuracy(made) > 0.8


def test_no_resume_beside_a_checkpoint_is_refused() -> None:
    with pytest.raises(TrainingError):
        tuned(output="out.onnx", trainer=Falters(30, None))
    with pytest.raises(UsageError, match="--resume goes on from it, --force starts again"):
        tuned(output="out.onnx")
    tuned(output="out.onnx", force=True)


def test_a_checkpoint_of_other_options_is_refused() -> None:
    with pytest.raises(TrainingError):
        tuned(output="out.onnx", trainer=Falters(30, None))
    with pytest.raises(UsageError, match="other options"):
        tuned(output="out.onnx", resume=True, rate=0.01)


@pytest.mark.parametrize("epochs", [1, 3, 6])
def test_a_checkpoint_of_another_number_of_epochs_is_refused(epochs: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        tuned(output="out.onnx", trainer=Signals(30))  # amid the third of four
    said = r"of a run of 4 epochs, not \d.*\(--epochs 4 goes on, --epochs 2 takes what it has\)"
    with pytest.raises(UsageError, match=said):
        tuned(output="out.onnx", resume=True, epochs=epochs)


def test_a_damaged_checkpoint_is_refused() -> None:
    Path("out.onnx.checkpoint.npz").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(UsageError, match="no checkpoint that can be read"):
        tuned(output="out.onnx", resume=True)


def test_a_full_disk_costs_the_checkpoint_and_not_the_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Checkpoint, "write", full)
    made, report = tuned(output="out.onnx")
    assert Path("out.onnx").exists()
    assert accuracy(made) > 0.8
    assert any("cannot be written: No space left" in said for said in report.warnings)


def test_a_folder_that_takes_no_file_is_found_before_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def none(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("tempfile.NamedTemporaryFile", none)
    late = Falters(1, AssertionError("it trains"))
    with pytest.raises(UsageError, match=r"takes no file: Read-only file system \(choose another"):
        tuned(output="out.onnx", trainer=late)


def test_weights_that_come_in_are_kept_where_training_brings_nothing() -> None:
    good, _ = tuned(epochs=10)
    io.save(good, "good.onnx")

    def away(*given: Mapping[str, np.ndarray]) -> tuple[float, dict[str, np.ndarray]]:
        loss, gradients = softmax(*given)
        return loss, {name: -5 * one for name, one in gradients.items()}

    class Unchecked(FromGradients):
        def gradients(self, inputs: Any, targets: Any) -> Any:
            if not self.stepping:
                return softmax(self._held, inputs, targets)
            return away(self._held, inputs, targets)

        stepping = False

        def step(self, *given: Any, **named: Any) -> float:
            self.stepping = True
            return super().step(*given, **named)

    made, report = finetune(
        "good.onnx", data="points.npz", labels="classes.npy", trainer=Unchecked(away), **OPTIONS
    )
    assert report.tuned.best == 0
    assert np.array_equal(array(made, "w"), array(good, "w"))
    assert any("no epoch was better" in said for said in report.warnings)


def test_wrong_gradients_are_found_before_the_first_step() -> None:
    def wrong(*given: Any) -> tuple[float, dict[str, np.ndarray]]:
        loss, gradients = softmax(*given)
        return loss, {**gradients, "w": 3 * gradients["w"]}

    with pytest.raises(VerificationError, match="wrong gradient for 'w'"):
        tuned(trainer=FromGradients(wrong))


def test_zeros_of_a_pattern_stay_and_others_need_not() -> None:
    model = linear()
    weight = array(model, "w").copy()
    weight[::2] = 0
    model.proto.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weight, "w"))
    for keep, stay in (("auto", True), ("all", True), ("none", False)):
        made, report = finetune(
            model, data="points.npz", labels="classes.npy", trainer=trainer(), keep_zeros=keep,
            **OPTIONS,
        )  # fmt: skip
        assert (not array(made, "w")[::2].any()) == stay
        assert report.tuned.zeros == (9 if stay else 0)


def test_a_weight_in_a_constant_node_goes_back_into_it() -> None:
    w = ", ".join(str(v) for v in array(linear(), "w").reshape(-1).tolist())
    model = parsed(
        "g (float[n,6] x) => (float[n,3] y) {"
        f" w = Constant<value = float[6,3] {{{w}}}>() y = Gemm(x, w, b) }}",
        b=np.zeros(3, np.float32),
    )
    made, _ = finetune(model, data="points.npz", labels="classes.npy", trainer=trainer(), **OPTIONS)
    assert [node.op_type for node in made.proto.graph.node] == ["Constant", "Gemm"]
    assert not np.array_equal(made.weights()["w"].read(), model.weights()["w"].read())
    assert accuracy(made) > 0.8


def test_a_weight_in_half_precision_stays_so() -> None:
    model = parsed(
        "g (float16[n,6] x) => (float16[n,3] y) {y = Gemm(x, w, b)}",
        w=array(linear(), "w").astype(np.float16),
        b=np.zeros(3, np.float16),
    )
    made, _ = finetune(model, data="points.npz", labels="classes.npy", trainer=trainer(), **OPTIONS)
    assert made.weights()["w"].dtype == np.float16
    x, y = points()
    said = session(made).run({"x": x.astype(np.float16)})["y"]
    assert (said.argmax(1) == y).mean() > 0.8


def test_a_model_of_one_sample_at_a_time_is_trained_in_batches() -> None:
    proto = linear().proto
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    made, report = finetune(
        proto, data="points.npz", labels="classes.npy", trainer=trainer(), **OPTIONS
    )
    assert report.tuned.batch_size == OPTIONS["batch_size"]
    assert made.proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1


def test_probabilities_are_trained_by_their_scores() -> None:
    model = parsed(
        "g (float[n,6] x) => (float[n,3] p) {s = Gemm(x, w, b) p = Softmax(s)}",
        w=array(linear(), "w"),
        b=np.zeros(3, np.float32),
    )

    def function(weights: Any, inputs: Any, targets: Any) -> Any:
        return softmax(weights, inputs, {"ce/y": targets["ce/p"]})

    made, report = finetune(
        model, data="points.npz", labels="classes.npy", trainer=FromGradients(function), **OPTIONS
    )
    x, y = points()
    assert (session(made).run({"x": x})["p"].argmax(1) == y).mean() > 0.8
    assert report.tuned.losses == ("ce",)


def test_the_rate_warms_up_and_ends_near_zero() -> None:
    rates = [Schedule(1.0, 200).rate(step) for step in range(200)]
    assert rates[0] < 0.2
    assert max(rates) == pytest.approx(1.0)
    assert rates.index(max(rates)) == 10
    assert rates[-1] < 0.001


def test_the_report_is_json_by_the_schema() -> None:
    import jsonschema

    from onnxprune.report.build import as_json
    from onnxprune.report.schemas import stored

    _, report = tuned()
    found = as_json(report)
    jsonschema.validate(found, json.loads(stored("report")))
    assert found["tuned"]["epochs"][0]["loss"] is None  # type: ignore[index]
