"""The verb finetune from the command line."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from onnxprune import io
from onnxprune.cli import run
from onnxprune.pipeline import shrink
from onnxprune.report.schemas import stored
from onnxprune.sparsifying import sparsify
from onnxprune.train import place
from onnxprune.train.ort import OrtTrainer
from tests.small import conv_chain, reloaded
from tests.training import installed, linear, written

BEFORE = {"m.onnx", "points.npz", "classes.npy", "chain.onnx", "images.npz", "kinds.npy"}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path)
    reloaded(linear(), tmp_path / "m.onnx")
    reloaded(conv_chain((3, 16, 8), batch="n"), tmp_path / "chain.onnx")
    rng = np.random.default_rng(0)
    np.savez("images.npz", x=rng.standard_normal((96, 3, 8, 8)).astype(np.float32))
    np.save("kinds.npy", rng.integers(0, 4, 96))


class Call:
    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *arguments: object) -> tuple[int, str, str]:
        self.capsys.readouterr()
        code = run(["finetune", *map(str, arguments)])
        out, err = self.capsys.readouterr()
        return code, out, err


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    return Call(capsys)


def left() -> set[str]:
    return {path.name for path in Path().iterdir()}


# -- what cannot be done is said in one line ------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "which model?"),
        (("m.onnx",), "training needs inputs (--data FILE.npz)"),
        (("m.onnx", "--data", "points.npz"), "no model to imitate and there are no labels"),
        (("m.onnx", "--data", "points.npz", "--loss", "kd"), "--teacher ORIGINAL.onnx"),
        (("m.onnx", "--data", "points.npz", "--loss", "ce"), "--loss ce needs labels"),
        (("m.onnx", "--data", "points.npz", "--loss", "mae"), "loss is 'mae'"),
        (("m.onnx", "--data", "none.npz", "--labels", "classes.npy"), "none.npz: no such file"),
        (("m.onnx", "--data", "points.npz", "--labels", "none.npy"), "none.npy"),
        (("m.onnx", "--data", "points.npz", "--labels", "kinds.npy"), "96 labels for 240 samples"),
        (("m.onnx", "--data", "points.npz", "--labels", "classes.npy", "--val", "1"), "val is 1"),
        (("m.onnx", "--data", "points.npz", "--labels", "classes.npy", "--lr", "0"), "lr is 0"),
        (("m.onnx", "--data", "points.npz", "--labels", "classes.npy", "--l1-bn", "1e-3"),
         "--l1-bn needs BatchNormalization"),
        (("m.onnx", "--data", "points.npz", "--labels", "classes.npy", "--resume"),
         "there is no checkpoint"),
        (("m.onnx", "--data", "points.npz", "--labels", "classes.npy", "-o", "m.onnx"),
         "is the input itself"),
        (("m.onnx", "--data", "points.npz", "--teacher", "chain.onnx"),
         "of the teacher is [?, 3, 8, 8], not [?, 6]"),
        (("m.onnx", "--data", "points.npz", "--labels", "classes.npy", "--trainer", "torch",
          "--train-python", "python"), "--train-python goes with --trainer ort"),
    ],
)  # fmt: skip
def test_a_wrong_call_is_one_line_and_leaves_no_file(
    call: Call, arguments: tuple[str, ...], said: str
) -> None:
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1
    assert left() == BEFORE


LABELS = np.arange(240) % 3


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (np.where(LABELS == 2, 3, LABELS), "label 3 is none of the 3 classes of output 'y'"),
        (LABELS - 1, "label -1 is none of the 3 classes of output 'y' (give classes from 0 to 2)"),
        (LABELS + 0.5, "labels have 0.5 in them (give the class of each sample as a whole number)"),
        (np.where(LABELS == 2, np.nan, LABELS), "labels have nan in them"),
        (LABELS.astype(str), "labels are <U21, not numbers"),
        (np.eye(3)[LABELS], "labels have shape [?, 3], not [?] as output 'y' wants them"),
        (LABELS[:, None], "labels have shape [?, 1], not [?] as output 'y' wants them"),
    ],
)  # fmt: skip
def test_labels_that_are_no_classes_are_refused_before_training(
    call: Call, labels: np.ndarray, said: str
) -> None:
    np.save("classes.npy", labels)
    code, out, err = call("m.onnx", "--data", "points.npz", "--labels", "classes.npy")
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1
    assert left() == BEFORE


def test_a_model_without_float_weights_is_refused(call: Call) -> None:
    from tests.small import parsed

    reloaded(parsed("g (float[n,3] x) => (float[n,3] y) {y = Relu(x)}"), Path("relu.onnx"))
    np.savez("x.npz", x=np.ones((20, 3), np.float32))
    np.save("y.npy", np.zeros(20, np.int64))
    code, _, err = call("relu.onnx", "--data", "x.npz", "--labels", "y.npy")
    assert code == 3
    assert "no float weight that could be trained" in err


def test_quantized_weights_are_refused_with_what_to_do(call: Call) -> None:
    from onnxprune.quantizing import quantize

    quantize("chain.onnx", to="int8", data="images.npz", output="small.onnx")
    code, _, err = call("small.onnx", "--data", "images.npz", "--labels", "kinds.npy")
    assert code == 3
    assert "are quantized, and such cannot be trained (fine-tune the float model, before " in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("python", ["no-such-python", sys.executable])
def test_an_interpreter_that_cannot_do_it_is_exit_5_with_what_to_do(
    call: Call, python: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place, "_NEWEST", (3, 10))
    code, out, err = call("--setup", "--train-python", python)
    assert (code, out) == (5, "")
    assert "--train-python PATH of Python 3.11 or 3.12" in err
    assert err.count("\n") == 1


def test_offline_the_exact_command_is_said(
    call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    code, out, err = call("m.onnx", "--data", "points.npz", "--labels", "classes.npy")
    assert (code, out) == (5, "")
    *_, last = err.splitlines()
    assert "could not be installed" in last
    assert "-m pip install" in last
    assert f"{place.PACKAGE}=={place.VERSION}" in last
    assert "--no-deps --target" in last
    assert not list((tmp_path / "cache" / "onnxprune").iterdir()), "nothing half installed"


# -- with the wheel -------------------------------------------------------------------------------


@pytest.mark.training
def test_labels_are_learned_and_the_report_says_so(call: Call) -> None:
    installed()
    code, out, err = call(
        "m.onnx", "--data", "points.npz", "--labels", "classes.npy", "--epochs", "5",
        "--lr", "0.05", "--batch-size", "16",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert left() == BEFORE | {"m.tuned.onnx"}
    *_, last = out.splitlines()
    assert last.startswith("saved m.tuned.onnx · accuracy ")
    assert last.endswith("loads and runs")
    assert "gradients of 2 weights agree with finite differences" in out


@pytest.mark.training
def test_a_pruned_model_imitates_the_one_beside_it_without_labels(call: Call) -> None:
    installed()
    shrink("chain.onnx", ratio=0.5, importance="path", restore="none", output="chain.pruned.onnx")
    code, out, err = call(
        "chain.pruned.onnx", "--data", "images.npz", "--epochs", "4", "--lr", "0.01",
        "--batch-size", "16", "--json",
    )  # fmt: skip
    assert (code, err) == (0, "")
    found = json.loads(out)
    jsonschema.validate(found, json.loads(stored("report")))
    tuned = found["tuned"]
    assert tuned["losses"] == ["kd"]
    assert tuned["epochs"][tuned["best"]]["held_out"] < tuned["epochs"][0]["held_out"]
    made = io.load("chain.pruned.tuned.onnx")
    from onnxprune.recipe import read

    recipe = read(made)
    assert recipe.removed, "the recipe of the cut is still in it"
    assert {"w0", "w1", "head"} <= set(recipe.restored)


@pytest.mark.parametrize("name", ["other.onnx", "a b.onnx", "chain.fp32.v2.onnx"])
def test_the_original_is_found_whatever_its_name(name: str) -> None:
    from onnxprune.train.given import Given
    from onnxprune.train.zeros import recipe_of

    shrink("chain.onnx", ratio=0.5, output="small.onnx")
    Path("chain.onnx").rename(name)
    Path("broken.onnx").write_bytes(b"no model")
    small = io.load("small.onnx")
    given = Given.read(small, "images.npz", None, None, recipe_of(small), 0.1, (), seed=0, batch=16)
    assert given.teacher is not None
    assert given.teacher.path == Path(name)


@pytest.mark.training
def test_zeros_of_two_in_four_are_exact_in_the_file(call: Call) -> None:
    installed()
    sparsify("chain.onnx", output="chain.sparse.onnx")
    code, _, err = call(
        "chain.sparse.onnx", "--data", "images.npz", "--labels", "kinds.npy", "--epochs", "6",
        "--batch-size", "8", "--lr", "0.01",
    )  # fmt: skip
    assert (code, err) == (0, "")
    before, after = (io.load(f"chain.{kind}.onnx").weights() for kind in ("sparse", "sparse.tuned"))
    assert not np.array_equal(before["w1"].read(), after["w1"].read())
    for name in ("w1", "head"):
        np.testing.assert_array_equal(before[name].read() == 0, after[name].read() == 0)


@pytest.mark.training
def test_sparsity_training_shrinks_scales(call: Call) -> None:
    installed()
    options = ("chain.onnx", "--data", "images.npz", "--labels", "kinds.npy", "--epochs", "8",
               "--batch-size", "16", "--optimizer", "sgd", "--lr", "0.05", "--force")  # fmt: skip
    assert call(*options, "-o", "plain.onnx")[0] == 0
    assert call(*options, "--l1-bn", "0.05", "-o", "slim.onnx")[0] == 0
    plain, slim = (
        sum(float(np.abs(w.read()).sum()) for n, w in io.load(p).weights().items() if "gamma" in n)
        for p in ("plain.onnx", "slim.onnx")
    )
    assert slim < 0.8 * plain


@pytest.mark.training
def test_dry_run_writes_nothing(call: Call) -> None:
    installed()
    code, out, _ = call(
        "m.onnx", "--data", "points.npz", "--labels", "classes.npy", "--epochs", "1", "--dry-run"
    )
    assert code == 0
    assert left() == BEFORE
    assert out.splitlines()[-1].startswith("nothing saved")


@pytest.mark.training
def test_a_limit_that_is_passed_leaves_no_file(call: Call) -> None:
    installed()
    code, _, err = call(
        "m.onnx", "--data", "points.npz", "--labels", "classes.npy", "--epochs", "2",
        "--lr", "0.1", "--max-drift", "0.0001",
    )  # fmt: skip
    assert code == 4
    assert "max-drift" in err or "drift" in err
    assert "m.tuned.onnx" not in left()


@pytest.mark.training
def test_setup_says_where_it_is(call: Call) -> None:
    where = installed()
    code, out, err = call("--setup")
    assert (code, err) == (0, "")
    assert out.strip().endswith(str(where.folder))


@pytest.mark.training
def test_another_process_gives_the_same_bytes() -> None:
    installed()
    for name in ("one.onnx", "two.onnx"):
        subprocess.run(
            [sys.executable, "-m", "onnxprune", "finetune", "m.onnx", "--data", "points.npz",
             "--labels", "classes.npy", "--epochs", "2", "-q", "--threads", "1", "-o", name],
            check=True,
        )  # fmt: skip
    assert Path("one.onnx").read_bytes() == Path("two.onnx").read_bytes()


@pytest.mark.training
def test_an_interrupted_process_ends_soon_and_goes_on_to_the_same_bytes() -> None:
    installed()
    call = [sys.executable, "-m", "onnxprune", "finetune", "chain.onnx", "--data", "images.npz",
            "--labels", "kinds.npy", "--epochs", "300", "--batch-size", "16", "--threads", "1",
            "-q", "-o"]  # fmt: skip
    whole = subprocess.Popen([*call, "whole.onnx"])
    with subprocess.Popen([*call, "out.onnx"], stderr=subprocess.PIPE, text=True) as process:
        while not Path("out.onnx.checkpoint.npz").exists():
            assert process.poll() is None
            time.sleep(0.05)
        begun = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert time.monotonic() - begun < 8
    assert err == (
        "onnxprune: interrupted (--resume goes on from 'out.onnx.checkpoint.npz', "
        "which has the best so far)\n"
    )
    assert subprocess.run([*call, "out.onnx", "--resume"], check=False).returncode == 0
    assert whole.wait() == 0
    assert Path("out.onnx").read_bytes() == Path("whole.onnx").read_bytes()


@pytest.mark.training
def test_a_worker_killed_amid_an_epoch_loses_nothing(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed()
    options = ("chain.onnx", "--data", "images.npz", "--labels", "kinds.npy", "--epochs", "3",
               "--batch-size", "16", "--threads", "1", "-q")  # fmt: skip
    assert call(*options, "-o", "whole.onnx")[0] == 0
    done, step = [0], OrtTrainer.step

    def killed(self: OrtTrainer, *given: Any, **named: Any) -> float:
        done[0] += 1
        if done[0] == 8:  # amid the second epoch
            assert self._process is not None
            self._process.kill()
        return step(self, *given, **named)

    monkeypatch.setattr(OrtTrainer, "step", killed)
    code, out, err = call(*options, "-o", "out.onnx")
    assert (code, out) == (4, "")
    assert "the training process was killed by signal 9" in err
    assert "--resume goes on from 'out.onnx.checkpoint.npz'" in err
    assert "out.onnx" not in left()
    monkeypatch.setattr(OrtTrainer, "step", step)
    assert call(*options, "-o", "out.onnx", "--resume")[0] == 0
    assert Path("out.onnx").read_bytes() == Path("whole.onnx").read_bytes()
    assert "out.onnx.checkpoint.npz" not in left()
