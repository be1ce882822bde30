"""shrink --finetune: cut, train, and again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from onnxprune import io
from onnxprune.cli import run
from onnxprune.errors import TargetError, TrainingError, UsageError
from onnxprune.model import Model
from onnxprune.report.build import as_json
from onnxprune.report.schemas import stored
from onnxprune.report.tuned import rounds_report
from onnxprune.rounds import shrink_in_rounds
from onnxprune.runtime import session
from onnxprune.terminal import show
from onnxprune.train.own import FromGradients
from onnxprune.tuning import finetune
from tests.small import parsed, reloaded
from tests.training import CLASSES, FEATURES, installed, points, written

WIDTH = 24


def network() -> Model:
    rng = np.random.default_rng(0)
    return parsed(
        f"g (float[n,{FEATURES}] x) => (float[n,{CLASSES}] y)"
        "{h = Gemm(x, w, b) r = Relu(h) y = Gemm(r, v, c)}",
        w=(0.5 * rng.standard_normal((FEATURES, WIDTH))).astype(np.float32),
        b=np.zeros(WIDTH, np.float32),
        v=(0.3 * rng.standard_normal((WIDTH, CLASSES))).astype(np.float32),
        c=np.zeros(CLASSES, np.float32),
    )


def gradients(weights: Any, inputs: Any, targets: Any) -> tuple[float, dict[str, np.ndarray]]:
    """Cross entropy, and distillation at temperature 2, of ``network``."""
    hidden = inputs["x"] @ weights["w"] + weights["b"]
    passed = np.maximum(hidden, 0)
    scores = passed @ weights["v"] + weights["c"]
    loss, off = 0.0, np.zeros_like(scores)
    if "ce/y" in targets:
        share = _softmax(scores)
        wanted = np.eye(CLASSES)[targets["ce/y"]]
        loss, off = -float(np.log((share * wanted).sum(1)).mean()), share - wanted
    if "kd/y" in targets:
        share, wanted = _softmax(scores / 2), _softmax(targets["kd/y"] / 2)
        loss += 4 * float((wanted * np.log(wanted / share)).sum(1).mean())
        off = off + 2 * (share - wanted)
    off = off / len(scores)
    back = (off @ weights["v"].T) * (hidden > 0)
    found = {"w": inputs["x"].T @ back, "b": back.sum(0), "v": passed.T @ off, "c": off.sum(0)}
    return loss, found


def _softmax(scores: np.ndarray) -> np.ndarray:
    exp = np.exp(scores - scores.max(1, keepdims=True))
    return exp / exp.sum(1, keepdims=True)


TRAINING: dict[str, Any] = {
    "data": "points.npz", "labels": "classes.npy", "epochs": 6, "rate": 0.02, "batch_size": 16,
    "loss": ("ce",), "seed": 0,
}  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path)
    reloaded(network(), tmp_path / "m.onnx")


def rounds(**options: Any) -> tuple[Model, Any]:
    trainer = options.pop("trainer", None) or FromGradients(gradients)
    training = {**TRAINING, "trainer": trainer}
    return shrink_in_rounds(
        options.pop("model", "m.onnx"), options.pop("output", "out.onnx"),
        cut={}, training=training,
        **{"ratio": 0.5, "steps": 3, "schedule": "linear", **options},
    )  # fmt: skip


def accuracy(model: Model) -> float:
    x, y = points()
    return float((session(model).run({"x": x})["y"].argmax(1) == y).mean())


def test_each_round_cuts_what_the_last_one_trained_until_the_ratio_is_met() -> None:
    made, report = rounds()
    assert made.weights()["w"].shape == (FEATURES, WIDTH // 2)
    assert accuracy(made) > 0.85
    kept = sorted(path.name for path in Path("out.onnx.rounds").iterdir())
    assert kept == sorted(
        [f"{n}.{kind}.onnx" for n in (1, 2, 3) for kind in ("cut", "tuned")] + ["rounds.json"]
    )
    widths = [io.load(f"out.onnx.rounds/{n}.tuned.onnx").weights()["w"].shape[1] for n in (1, 2, 3)]
    assert widths == [20, 16, 12]
    assert [one.params for one in report.rounds] == sorted(
        (one.params for one in report.rounds), reverse=True
    )
    assert report.before.params > report.after.params


def test_training_data_and_labels_are_checked_before_the_first_cut(
    capsys: pytest.CaptureFixture[str],
) -> None:
    labels = np.load("classes.npy")
    np.save("wrong.npy", labels + 1)
    for data, named in (("points.npz", "wrong.npy"), ("none.npz", "classes.npy")):
        code = run(["shrink", "m.onnx", "--ratio", "0.5", "--finetune", "--train-data", data,
                    "--labels", named, "-o", "out.onnx"])  # fmt: skip
        assert code == 2
        assert capsys.readouterr().err.count("\n") == 1
        assert not Path("out.onnx.rounds").exists()


def test_a_folder_without_a_trained_round_is_no_obstacle() -> None:
    class Breaks(FromGradients):
        def prepare(self, *given: Any) -> None:
            raise TrainingError("the process cannot be started")

    with pytest.raises(TrainingError):
        rounds(trainer=Breaks(gradients))
    assert Path("out.onnx.rounds/1.cut.onnx").exists()
    rounds(schedule="polynomial")
    assert Path("out.onnx").exists()


def test_force_starts_again_beside_a_checkpoint_of_other_options() -> None:
    class Dies(FromGradients):
        steps = 0

        def step(self, *given: Any, **named: Any) -> float:
            self.steps += 1
            if self.steps == 50:
                raise TrainingError("the process died")
            return super().step(*given, **named)

    with pytest.raises(TrainingError):
        rounds(trainer=Dies(gradients))
    with pytest.raises(UsageError, match="--resume goes on behind them, --force starts again"):
        rounds(ratio=0.25)
    rounds(ratio=0.25, force=True)


def test_rounds_that_were_broken_off_go_on_to_the_same_bytes() -> None:
    rounds(output="whole.onnx")

    class Dies(FromGradients):
        steps = 0

        def step(self, *given: Any, **named: Any) -> float:
            self.steps += 1
            if self.steps == 150:  # in the second round
                raise TrainingError("the process died")
            return super().step(*given, **named)

    with pytest.raises(TrainingError):
        rounds(trainer=Dies(gradients))
    assert not Path("out.onnx").exists()
    with pytest.raises(UsageError, match="--resume goes on behind them"):
        rounds()
    rounds(resume=True)
    assert Path("out.onnx").read_bytes() == Path("whole.onnx").read_bytes()


def test_soft_rounds_train_what_was_set_to_zero_and_only_the_last_one_cuts() -> None:
    made, report = rounds(soft=True)
    assert made.weights()["w"].shape == (FEATURES, WIDTH // 2)
    assert accuracy(made) > 0.85
    for number, gone in ((1, 4), (2, 8)):
        soft = io.load(f"out.onnx.rounds/{number}.soft.onnx")
        read = soft.weights()["v"].read()
        assert read.shape == (WIDTH, CLASSES)
        assert (np.abs(read).max(axis=1) > 0).all(), "what was zero has been trained again"
        assert report.rounds[number - 1].params == report.before.params, gone
    assert report.after.params == report.rounds[-1].params < report.before.params


def test_soft_rounds_start_from_zeros_where_the_cut_would_be() -> None:
    """Without an epoch of training they are the masked twin."""
    training = {**TRAINING, "trainer": FromGradients(gradients), "epochs": 0}
    shrink_in_rounds(
        "m.onnx", "out.onnx", cut={}, training=training, ratio=0.5, steps=3, schedule="linear",
        soft=True,
    )  # fmt: skip
    for number, gone in ((1, 4), (2, 8)):
        soft = io.load(f"out.onnx.rounds/{number}.soft.onnx")
        zero = np.abs(soft.weights()["v"].read()).max(axis=1) == 0
        assert zero.sum() == gone
        before = io.load("m.onnx").weights()["v"].read()
        np.testing.assert_array_equal(soft.weights()["v"].read()[~zero], before[~zero])


def test_soft_rounds_that_were_broken_off_go_on_to_the_same_bytes() -> None:
    rounds(output="whole.onnx", soft=True)

    class Dies(FromGradients):
        steps = 0

        def step(self, *given: Any, **named: Any) -> float:
            self.steps += 1
            if self.steps == 150:  # in the second round
                raise TrainingError("the process died")
            return super().step(*given, **named)

    with pytest.raises(TrainingError):
        rounds(trainer=Dies(gradients), soft=True)
    rounds(resume=True, soft=True)
    assert Path("out.onnx").read_bytes() == Path("whole.onnx").read_bytes()


def test_rounds_of_other_options_are_not_gone_on_with() -> None:
    rounds(steps=1)
    with pytest.raises(UsageError, match="other options"):
        rounds(steps=2, resume=True, force=True)


def test_it_stops_before_more_is_lost_than_allowed() -> None:
    trained, _ = finetune(
        "m.onnx", output="trained.onnx", trainer=FromGradients(gradients), **TRAINING
    )
    _, report = rounds(model="trained.onnx", ratio=0.95, steps=4, max_loss=0.05)
    assert accuracy(trained) > 0.95
    assert 1 <= len(report.rounds) < 4
    assert report.after.params == report.rounds[-1].params


def test_a_first_round_that_loses_too_much_is_an_error() -> None:
    with pytest.raises(TargetError, match="the first round loses"):
        rounds(ratio=0.95, steps=1, max_loss=-0.9)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--ratio", "0.5", "--finetune"), "--train-data FILE.npz"),
        (("--ratio", "0.5", "--train-data", "points.npz"), "--train-data goes with --finetune"),
        (("--ratio", "0.5", "--l1-bn", "0.1"), "--l1-bn goes with --finetune"),
        (("--lossless", "--finetune", "--train-data", "points.npz"), "--lossless cannot go"),
        (("--ratio", "0.5", "--finetune", "--train-data", "points.npz", "--dry-run"), "--dry-run"),
        (("--ratio", "0.5", "--max-loss", "0.1"), "--sensitivity"),
        (
            ("--ratio", "0.5", "--finetune", "--train-data", "points.npz", "--quantize", "fp16"),
            "then onnxprune quantize RESULT --to TYPE",
        ),
        (
            ("--ratio", "0.5", "--finetune", "--train-data", "points.npz", "--then", "2:4"),
            "then onnxprune sparsify RESULT --pattern P",
        ),
        (("--ratio", "0.5", "--soft"), "--soft goes with --finetune"),
        (("--ratio", "0.5", "--finetune", "--train-data", "points.npz", "--soft"), "one step"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["shrink", "m.onnx", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert err.count("\n") == 1
    assert not list(Path().glob("*pruned*"))


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ("classes.npy", "share of held-out samples whose class is right (--labels)"),
        (None, "share of held-out samples with the class that the original says"),
    ],
)
def test_the_report_says_what_the_shares_are_and_what_is_next(
    labels: str | None, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = FromGradients(gradients)
    training = {**TRAINING, "labels": labels, "loss": (), "trainer": trainer, "epochs": 1}
    _, report = shrink_in_rounds(
        "m.onnx", "out.onnx", cut={"data": "points.npz"}, training=training, ratio=0.5
    )
    show(rounds_report(report))
    lines = capsys.readouterr().out.splitlines()
    assert said in lines
    assert "drift on points.npz, 240 samples:" in lines
    assert lines[-1].startswith("next: trtexec --onnx=out.onnx --minShapes=x:")
    found = as_json(report)
    jsonschema.validate(found, json.loads(stored("report")))
    assert found["rounds"][0]["measure"] == ("agreement" if labels is None else "top1")


@pytest.mark.training
def test_the_loop_from_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    installed()
    code = run(
        ["shrink", "m.onnx", "--ratio", "0.5", "--steps", "2", "--finetune", "--train-data",
         "points.npz", "--labels", "classes.npy", "--epochs", "4", "--lr", "0.02", "--batch-size",
         "16", "--json"]
    )  # fmt: skip
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert [one["number"] for one in found["rounds"]] == [1, 2]
    assert io.load("m.pruned.onnx").weights()["w"].shape == (FEATURES, WIDTH // 2)
