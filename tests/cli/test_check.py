"""The verb check, and --check of shrink and sparsify, from the command line."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from onnxprune import checking
from onnxprune.model import Model
from onnxprune.targets import builder
from onnxprune.targets.findings import Build, Finding
from tests.calls import Call
from tests.small import conv_chain, reloaded
from tests.unit.targets.cases import CASES

INSTALLED = find_spec("tensorrt_rtx") is not None
trt = pytest.mark.skipif(not INSTALLED, reason="needs onnxprune[tensorrt]")
BEFORE = {"chain.onnx", "open.onnx", "uint8.onnx"}
BUILT = Build("built", "TensorRT-RTX 9", (), {"parse": 0.1, "build": 1.0}, 1000)
FAILED = Build("refused", "TensorRT-RTX 9", (Finding("error", "parser", "Conv 'c1'", "bad"),))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    reloaded(conv_chain((3, 16, 24)), tmp_path / "chain.onnx")
    reloaded(conv_chain((3, 16, 24), batch="n"), tmp_path / "open.onnx")
    bad = next(case for case in CASES if case.name == "uint8_weight")
    reloaded(bad.make(), tmp_path / "uint8.onnx")


def left() -> set[str]:
    return {path.name for path in Path().iterdir()}


class Library:
    """Stands in for TensorRT-RTX; remembers how often it was asked."""

    def __init__(self, *answers: Build) -> None:
        self.answers = list(answers)
        self.asked: list[Model] = []

    def __call__(self, model: Model, *_: object, **__: object) -> Build:
        self.asked.append(model)
        return self.answers.pop(0)


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder, "MODULE", "no_such_module_anywhere")


def answers(monkeypatch: pytest.MonkeyPatch, *builds: Build) -> Library:
    library = Library(*builds)
    monkeypatch.setattr(checking, "installed", lambda: True)
    monkeypatch.setattr(checking, "build_model", library)
    return library


# -- the verb --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("missing")
def test_without_the_extra_our_rules_speak_and_it_is_said_how_to_ask_tensorrt(call: Call) -> None:
    code, out, err = call("check", "chain.onnx", "--target", "tensorrt")
    assert (code, err) == (0, "")
    assert "TensorRT itself was not asked" in out
    assert "pip install 'onnxprune[tensorrt]'" in out
    assert out.splitlines()[-1] == "next: trtexec --onnx=chain.onnx"
    assert left() == BEFORE


@pytest.mark.usefixtures("missing")
def test_build_without_the_extra_is_exit_5(call: Call) -> None:
    code, out, err = call("check", "chain.onnx", "--build")
    assert (code, out) == (5, "")
    assert err == ("onnxprune: --build needs TensorRT-RTX (pip install 'onnxprune[tensorrt]')\n")


def test_no_build_asks_nobody(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    library = answers(monkeypatch)
    found = call.json("check", "chain.onnx", "--no-build")
    assert library.asked == []
    assert found["check"]["build"] is None
    assert found["check"]["unasked"].endswith("--no-build")


def test_warnings_alone_pass(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, BUILT)
    found = call.json("check", "chain.onnx")
    assert found["verb"] == "check"
    assert found["check"]["passed"]
    assert found["check"]["build"] == {
        "status": "built", "version": "TensorRT-RTX 9",
        "seconds": {"parse": 0.1, "build": 1.0}, "engine_bytes": 1000,
    }  # fmt: skip
    assert found["next"]["command"] == "trtexec --onnx=chain.onnx"


def test_error_of_our_rules_is_exit_4_with_the_findings_on_stdout(call: Call) -> None:
    code, out, err = call("check", "uint8.onnx", "--no-build")
    assert code == 4
    assert "error [qdq-weight-type] DequantizeLinear 'k'" in out
    assert err.count("\n") == 1
    assert err.startswith("onnxprune: 'uint8.onnx': TensorRT does not take the model: ")
    assert call.json("check", "uint8.onnx", "--no-build", code=4)["check"]["errors"] == 1


def test_failed_build_is_exit_4_and_names_the_node(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers(monkeypatch, FAILED)
    code, out, err = call("check", "chain.onnx")
    assert code == 4
    assert "TensorRT-RTX 9 did not build it (refused)" in out
    assert err == (
        "onnxprune: 'chain.onnx': TensorRT-RTX 9 does not build the model: Conv 'c1': bad\n"
    )


def test_crash_is_explained_by_the_rule_that_foresaw_it(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    crash = Finding("error", "builder", "", "TensorRT-RTX crashed: SIGSEGV", "leave it out")
    answers(monkeypatch, Build("crashed", "", (crash,)))
    code, out, err = call("check", "uint8.onnx")
    assert code == 4
    assert "TensorRT-RTX did not build it (crashed)" in out
    assert "crashed: SIGSEGV, and 1 more; DequantizeLinear 'k': it reads 'wu'" in err


def test_timeout_is_no_refusal(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    late = builder.build(Path("chain.onnx"), {}, timeout=0.1, worker=("sleep", "9"))
    answers(monkeypatch, late)
    code, _, err = call("check", "chain.onnx")
    assert code == 4
    assert "TensorRT gave no answer: the model was not built in 0.1 s; give it longer" in err


def test_shapes_of_a_dynamic_input_go_into_profile_and_command(call: Call) -> None:
    found = call.json(
        "check", "open.onnx", "--no-build", "--min-shape", "x:1x3x8x8", "--opt-shape", "x:4x3x8x8",
        "--max-shape", "x:16x3x8x8",
    )  # fmt: skip
    assert found["check"]["profiles"] == {
        "x": {"min": [1, 3, 8, 8], "opt": [4, 3, 8, 8], "max": [16, 3, 8, 8], "given": True}
    }
    assert shlex.split(found["next"]["command"])[2:] == [
        "--minShapes=x:1x3x8x8", "--optShapes=x:4x3x8x8", "--maxShapes=x:16x3x8x8",
    ]  # fmt: skip
    chosen = call.json("check", "open.onnx", "--no-build")["check"]
    assert not chosen["profiles"]["x"]["given"]
    assert "profile" in [one["rule"] for one in chosen["findings"]]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--min-shape", "z:1x2"], 2, "--min-shape: the model has no input 'z'"),
        (["--opt-shape", "x"], 2, "--opt-shape x is not NAME:1x3x224x224"),
        (["--timeout", "0"], 2, "--timeout is 0"),
        (["--timeout", "5", "--no-build"], 2, "--timeout cannot go with --no-build"),
        (["--target", "openvino"], 2, "openvino"),
    ],
    ids=["name", "spelling", "timeout", "both", "target"],
)
def test_what_makes_no_sense_is_refused_in_one_line(
    call: Call, arguments: list[str], code: int, said: str
) -> None:
    got, out, err = call("check", "open.onnx", *arguments)
    assert (got, out) == (code, "")
    assert said in err
    assert err.count("\n") == 1


def test_file_that_is_none_is_exit_2_or_3(call: Call) -> None:
    assert call("check", "nowhere.onnx")[0] in (2, 3)
    Path("text.onnx").write_text("hello")
    assert call("check", "text.onnx")[0] == 3


def test_findings_that_say_the_same_share_a_line_unless_asked(call: Call) -> None:
    reloaded(conv_chain((3, 20, 20, 20)), Path("odd.onnx"))
    _, out, _ = call("check", "odd.onnx", "--no-build")
    assert "Conv 'c0' (+2): makes 20 channels" in out
    _, out, _ = call("check", "odd.onnx", "--no-build", "-v")
    assert "Conv 'c2': makes 20 channels" in out


# -- shrink and sparsify ---------------------------------------------------------------------------

SHRINK = ("shrink", "chain.onnx", "--ratio", "0.5", "--check", "tensorrt")
SPARSIFY = ("sparsify", "chain.onnx", "--check", "tensorrt")


@pytest.mark.parametrize("arguments", [SHRINK, SPARSIFY], ids=["shrink", "sparsify"])
def test_result_that_is_built_is_written_and_the_report_says_so(
    call: Call, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    library = answers(monkeypatch, BUILT)
    found = call.json(*arguments, "-o", "made.onnx")
    assert len(library.asked) == 1
    assert found["check"]["passed"]
    assert found["next"]["command"].startswith("trtexec --onnx=made.onnx")
    assert left() == BEFORE | {"made.onnx"}
    answers(monkeypatch, BUILT)
    _, out, _ = call(*arguments, "-o", "again.onnx")
    assert "TensorRT-RTX 9 parsed it in 0.10 s and built it in 1.00 s" in out


@pytest.mark.parametrize("arguments", [SHRINK, SPARSIFY], ids=["shrink", "sparsify"])
def test_result_that_is_not_built_is_not_written(
    call: Call, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    answers(monkeypatch, FAILED, BUILT)
    code, out, err = call(*arguments)
    assert (code, out) == (4, "")
    assert "does not build the model: Conv 'c1': bad (nothing was written)" in err
    assert left() == BEFORE


def test_original_that_is_not_built_either_is_said_and_still_refused(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers(monkeypatch, FAILED, FAILED)
    code, _, err = call(*SHRINK)
    assert code == 4
    assert "nothing was written; it does not build the original either" in err
    assert left() == BEFORE


@pytest.mark.usefixtures("missing")
def test_check_without_the_extra_warns_that_rules_alone_spoke(call: Call) -> None:
    found = call(*SHRINK, "--json", "-q")
    report = json.loads(found[1])
    assert found[0] == 0
    assert report["check"]["build"] is None
    assert any("TensorRT itself was not asked" in one for one in report["warnings"])


def test_dry_run_checks_and_writes_nothing(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    library = answers(monkeypatch, BUILT)
    found = call.json(*SHRINK, "--dry-run")
    assert len(library.asked) == 1
    assert found["next"] is None
    assert left() == BEFORE


def test_shapes_of_a_dynamic_result_are_in_the_line_to_run_next(call: Call) -> None:
    found = call.json("shrink", "open.onnx", "--ratio", "0.5", "-o", "made.onnx")
    assert "--minShapes=x:1x3x8x8" in found["next"]["command"]
    assert "--maxShapes=x:3x3x8x8" in found["next"]["command"]


# -- the real library ------------------------------------------------------------------------------


@pytest.mark.trt
@trt
def test_check_by_tensorrt_itself(call: Call) -> None:
    assert call.json("check", "chain.onnx", "--build")["check"]["build"]["status"] == "built"
    found = call.json("check", "uint8.onnx", "--build", code=4)
    assert found["check"]["build"]["status"] == "refused"
    assert found["check"]["findings"][0]["rule"] == "parser"


@pytest.mark.trt
@trt
def test_shrink_checked_by_tensorrt_itself(call: Call) -> None:
    found = call.json("shrink", "open.onnx", "--ratio", "0.5", "--check", "tensorrt")
    assert found["check"]["build"]["status"] == "built"


@pytest.mark.trt
@trt
def test_pipes_stay_clean(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "onnxprune", "check", "chain.onnx", "--json"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (ran.returncode, ran.stderr) == (0, "")
    assert json.loads(ran.stdout)["check"]["passed"]


def test_weights_of_the_file_are_what_is_built(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    library = answers(monkeypatch, BUILT)
    call(*SHRINK)
    assert [w.shape for w in library.asked[0].weights().values() if len(w.shape) == 4] == [
        (8, 3, 3, 3),
        (12, 8, 3, 3),
    ]
    assert np.isfinite(library.asked[0].weights()["head"].read()).all()
