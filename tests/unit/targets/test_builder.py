"""The process that asks TensorRT: it may crash, hang, talk nonsense; we go on in any case."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from onnxprune.errors import MissingExtraError
from onnxprune.model import Model
from onnxprune.targets import builder
from onnxprune.targets.builder import build, build_model
from onnxprune.targets.findings import Profile
from onnxprune.targets.worker import _said, plainly
from tests.small import conv_chain, reloaded

ANSWER = """
import json, sys
request = json.load(sys.stdin)
print("chatter")
answer = {"version": "9", "status": "built", "seconds": {"parse": 1}, "errors": [],
          "engine_bytes": len(open(request["model"], "rb").read())}
open(request["result"], "w").write(json.dumps(answer))
"""


def fake(code: str) -> list[str]:
    return [sys.executable, "-c", code]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    reloaded(conv_chain(), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


def test_answer_is_read_whatever_else_is_printed(path: Path) -> None:
    made = build(path, {}, worker=fake(ANSWER))
    assert made.built
    assert made.version == "TensorRT-RTX 9"
    assert made.engine_bytes == path.stat().st_size


def test_model_in_memory_is_asked_about_in_a_file_that_goes_again() -> None:
    made = build_model(conv_chain(), {}, worker=fake(ANSWER))
    assert made.engine_bytes > 0


def test_worker_that_crashes_is_an_error_finding(path: Path) -> None:
    made = build(path, {}, worker=fake("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"))
    assert made.status == "crashed"
    assert [one.severity for one in made.findings] == ["error"]
    assert "SIGSEGV" in made.findings[0].message


def test_worker_that_is_killed_may_have_wanted_memory(path: Path) -> None:
    made = build(path, {}, worker=fake("import os, signal; os.kill(os.getpid(), signal.SIGKILL)"))
    assert "for want of memory" in made.findings[0].message


def test_worker_that_hangs_is_ended(path: Path) -> None:
    made = build(path, {}, timeout=1, worker=fake("import time; time.sleep(600)"))
    assert made.status == "timeout"
    assert "--timeout" in made.findings[0].cure


def test_worker_that_fails_is_quoted_by_its_last_line(path: Path) -> None:
    made = build(path, {}, worker=fake("raise OSError('no such library')"))
    assert made.status == "crashed"
    assert made.findings[0].message.endswith("OSError: no such library")


def test_worker_that_says_nothing_is_an_error(path: Path) -> None:
    assert build(path, {}, worker=fake("pass")).status == "crashed"


def test_refusal_without_a_reason_is_an_error_all_the_same(path: Path) -> None:
    code = ANSWER.replace('"built"', '"failed"')
    made = build(path, {}, worker=fake(code))
    assert not made.built
    assert "no reason" in made.findings[0].message


def test_profiles_reach_the_worker(path: Path) -> None:
    code = ANSWER.replace('"9"', 'str(request["profiles"])')
    made = build(path, {"x": Profile((1,), (2,), (3,))}, worker=fake(code))
    assert "{'x': [[1], [2], [3]]}" in made.version


def test_worker_finds_the_packages_that_we_find(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path.parent / "only_here.py").write_text("VERSION = 'found'")
    monkeypatch.chdir(path.parent)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    code = "import only_here\n" + ANSWER.replace('"9"', "only_here.VERSION")
    assert build(path, {}, worker=fake(code)).version == "TensorRT-RTX found"


def test_extra_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder, "MODULE", "no_such_module_anywhere")
    with pytest.raises(MissingExtraError, match=r"onnxprune\[tensorrt\]"):
        builder.check_installed("--build")


def test_noise_about_the_driver_is_left_out_unless_there_is_nothing_else() -> None:
    noise = "catchCudaError: cudaError 35"
    assert [one["message"] for one in _said([noise, "bad layer"], ())] == ["bad layer"]
    assert [one["message"] for one in _said([noise], ())] == [noise]


def test_error_of_the_builder_names_the_longest_layer_in_it() -> None:
    said = _said(["no tactic for head/fc here"], ["head", "head/fc", ""])
    assert said[0]["node"] == "head/fc"


def test_source_files_of_nvidia_are_left_out() -> None:
    text = "Assertion failed: x\n is  bad. In operator() at /_src/runtime/shapeMachine.cpp:628"
    assert plainly(text) == "x is bad."


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Invalid Node - n\nE: bad (x In f() at /a.cpp:4)\n[m.cpp::catchCudaError::2] 35",
         "E: bad (x)"),
        ('creator && "Plugin not found?"', "Plugin not found?"),
        ("false", "TensorRT does not know this operator"),
        ("[m.cpp::catchCudaError::2] cudaError 35", "[m.cpp::catchCudaError::2] cudaError 35"),
    ],
    ids=["frame", "condition", "unknown", "noise"],
)  # fmt: skip
def test_what_the_library_says_is_put_plainly(text: str, said: str) -> None:
    assert plainly(text) == said


def test_model_with_deferred_weights_is_written_first(path: Path) -> None:
    from dataclasses import replace

    from onnxprune.io import load

    loaded = load(path)
    weight = loaded.weights()["w0"]
    made = replace(loaded, deferred={"w0": weight})
    assert isinstance(made, Model)
    size = build_model(made, {}, worker=fake(ANSWER)).engine_bytes
    assert size > 0
