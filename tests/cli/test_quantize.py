"""The verb quantize, and shrink --quantize, from the command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxprune import io, shrinking
from onnxprune.recipe import read
from onnxprune.types import Latency
from tests.calls import Call
from tests.small import conv_chain, parsed, reloaded


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    reloaded(conv_chain((3, 16, 16), batch="N"), tmp_path / "chain.onnx")
    x = np.random.default_rng(0).standard_normal((96, 3, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=x)


def kinds(path: str) -> set[str]:
    return {weight.dtype.name for weight in io.load(path).weights().values()}


def test_fp16_is_written_beside_the_model_and_reported(call: Call) -> None:
    found = call.json("quantize", "chain.onnx", "--to", "fp16")
    assert found["verb"] == "quantize"
    assert found["quantized"]["to"] == "fp16"
    assert (
        found["quantized"]["weight_bytes"]["after"] * 2
        == (found["quantized"]["weight_bytes"]["before"])
    )
    assert found["output"]["path"] == "chain.fp16.onnx"
    assert found["output"]["bytes"] == Path("chain.fp16.onnx").stat().st_size
    assert kinds("chain.fp16.onnx") == {"float16"}
    assert found["verify"]["status"] == "passed"


def test_int8_calibrates_on_the_data_and_tells_which_method_did_best(call: Call) -> None:
    found = call.json("quantize", "chain.onnx", "--to", "int8", "--data", "data.npz")
    tried = found["quantized"]["tried"]
    assert set(tried) == {"minmax", "percentile", "entropy"}
    assert found["quantized"]["method"] == min(tried, key=tried.__getitem__)
    assert "int8" in kinds("chain.int8.onnx")
    _, out, _ = call("quantize", "chain.onnx", "--to", "int8", "--data", "data.npz", "--force")
    assert "ranges of activations by" in out
    last = out.splitlines()[-1]
    assert last.startswith("next: trtexec --onnx=chain.int8.onnx ")
    assert last.endswith(" --stronglyTyped")


def test_bf16_says_that_its_drift_is_emulated(call: Call) -> None:
    code, out, err = call("quantize", "chain.onnx", "--to", "bf16", "--data", "data.npz")
    assert code == 0
    assert "no bfloat16 kernels" in out
    assert "valid, emulated" in out
    assert "opset raised from 21 to 22" in err
    assert kinds("chain.bf16.onnx") == {"bfloat16"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        pytest.param(["--to", "int8"], "int8 needs calibration data (--data FILE.npz)", id="data"),
        pytest.param(["--to", "fp16", "--method", "minmax"], "--method is for int8", id="method"),
        pytest.param(
            ["--to", "int8", "--data", "data.npz", "--convert-io"],
            "--convert-io is for fp16 and bf16",
            id="io",
        ),
        pytest.param(
            ["--to", "fp16", "--ignore", "nothing*"],
            "--ignore 'nothing*' matches no node or constant",
            id="glob",
        ),
        pytest.param(["--to", "fp8"], "'fp8' is not one of", id="type"),
        pytest.param([], "Missing option '--to'", id="none"),
        pytest.param(["--to", "fp16", "-o", "chain.onnx"], "is the input itself", id="input"),
    ],
)
def test_what_cannot_be_asked_is_one_line_and_leaves_nothing(
    call: Call, arguments: list[str], said: str
) -> None:
    before = {path.name for path in Path().iterdir()}
    code, out, err = call("quantize", "chain.onnx", *arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1
    assert {path.name for path in Path().iterdir()} == before


def test_model_without_layers_for_int8_is_code_3(call: Call) -> None:
    reloaded(parsed("g (float[1,4] x) => (float[1,4] y) {y = Relu(x)}"), Path("plain.onnx"))
    np.savez("four.npz", x=np.ones((4, 4), np.float32))
    code, out, err = call("quantize", "plain.onnx", "--to", "int8", "--data", "four.npz")
    assert (code, out) == (3, "")
    assert "nothing in it can become int8: no layer in it has weights" in err


def test_limit_of_the_user_is_code_4_and_nothing_is_written(call: Call) -> None:
    code, out, err = call(
        "quantize", "chain.onnx", "--to", "int8", "--data", "data.npz", "--max-drift", "1e-6"
    )
    assert (code, out) == (4, "")
    assert "nothing was written" in err
    assert not Path("chain.int8.onnx").exists()


def test_dry_run_writes_nothing_and_an_existing_file_needs_force(call: Call) -> None:
    found = call.json("quantize", "chain.onnx", "--to", "fp16", "--dry-run")
    assert found["output"]["path"] is None
    assert 0 < found["output"]["bytes"] < found["input"]["bytes"]
    Path("chain.fp16.onnx").write_text("mine")
    code, _, err = call("quantize", "chain.onnx", "--to", "fp16")
    assert code == 2
    assert "--force" in err
    assert Path("chain.fp16.onnx").read_text() == "mine"
    assert call("quantize", "chain.onnx", "--to", "fp16", "--force", "-q")[:2] == (0, "")


def test_cut_refit_pattern_and_int8_in_one_run_and_again_from_its_recipe(call: Call) -> None:
    run_ = ("--data", "data.npz", "-q", "--force")
    asked = ("--ratio", "0.5", "--then", "2:4", "--quantize", "int8")
    assert call("shrink", "chain.onnx", *asked, *run_, "-o", "one.onnx")[0] == 0
    recipe = read(Path("one.onnx"))
    assert recipe.options.quantize is not None
    assert recipe.options.quantize.to == "int8"
    assert recipe.options.restore == "refit"
    assert recipe.options.sparsify is not None
    assert recipe.removed
    assert call("shrink", "chain.onnx", "--recipe", "one.onnx", *run_, "-o", "two.onnx")[0] == 0
    assert Path("one.onnx").read_bytes() == Path("two.onnx").read_bytes()
    small = np.asarray(io.load("one.onnx").weights()["w1"].read())
    runs = small.reshape(small.shape[0], -1, 4, 9)
    assert small.dtype == np.int8
    assert np.all(np.count_nonzero(runs, axis=2) <= 2)
    onnx.checker.check_model("one.onnx", full_check=True)


def test_recipe_with_int8_asks_for_data_when_it_is_repeated(call: Call) -> None:
    asked = ("--ratio", "0.5", "--quantize", "int8", "--data", "data.npz", "-q")
    assert call("shrink", "chain.onnx", *asked, "-o", "one.onnx")[0] == 0
    code, _, err = call("shrink", "chain.onnx", "--recipe", "one.onnx", "-o", "two.onnx")
    assert code == 2
    assert "int8 needs calibration data" in err


def test_pruned_model_that_is_quantized_keeps_its_recipe(call: Call) -> None:
    assert call("shrink", "chain.onnx", "--ratio", "0.5", "-q")[0] == 0
    before = read(Path("chain.pruned.onnx"))
    assert call("quantize", "chain.pruned.onnx", "--to", "fp16", "-q")[0] == 0
    after = read(Path("chain.pruned.fp16.onnx"))
    assert after.removed == before.removed
    assert after.options.quantize is not None
    again = call("shrink", "chain.onnx", "--recipe", "chain.pruned.fp16.onnx", "-o", "r.onnx", "-q")
    assert again[0] == 0
    assert kinds("r.onnx") == {"float16"}


def test_int8_then_fp16_keeps_both_in_the_recipe_and_is_repeated_so(call: Call) -> None:
    run_ = ("--data", "data.npz", "-q")
    asked = ("--ratio", "0.5", "--quantize", "int8", "-o", "i.onnx")
    assert call("shrink", "chain.onnx", *asked, *run_)[0] == 0
    assert call("quantize", "i.onnx", "--to", "fp16", *run_)[0] == 0
    assert kinds("i.fp16.onnx") == {"float16", "int8"}
    found = read(Path("i.fp16.onnx")).options.quantize
    assert found is not None
    assert (found.to, found.before and found.before.to) == ("fp16", "int8")
    again = ("--recipe", "i.fp16.onnx", "-o", "two.onnx")
    assert call("shrink", "chain.onnx", *again, *run_)[0] == 0
    assert Path("i.fp16.onnx").read_bytes() == Path("two.onnx").read_bytes()


def test_what_is_in_few_bits_already_is_refused_in_one_line(call: Call) -> None:
    chain = ("quantize", "chain.onnx", "--data", "data.npz", "--to")
    call(*chain, "fp16", "-o", "half.onnx")
    call(*chain, "fp16", "--convert-io", "-o", "io.onnx")
    call(*chain, "fp16", "--ignore", "w1", "-o", "mixed.onnx")
    call(*chain, "bf16", "-o", "brain.onnx")
    call(*chain, "int8", "-o", "eight.onnx")
    for name, said in (
        ("half", "in float16 already: all its layers"),
        ("io", "in float16 already: all its layers"),
        ("mixed", "in float16 already: 2 of its 3 layers, first "),
        ("brain", "in bfloat16 already: all its layers"),
    ):
        for to in ("fp16", "bf16", "int8"):
            code, _, err = call("quantize", f"{name}.onnx", "--to", to, "--data", "data.npz")
            assert (code, err.count("\n")) == (3, 1), err
            assert said in err
    code, _, err = call("quantize", "eight.onnx", "--to", "int8", "--data", "data.npz")
    assert (code, err.count("\n")) == (3, 1)
    assert "quantized already" in err
    for to in ("fp16", "bf16"):
        assert call("quantize", "eight.onnx", "--to", to, "--data", "data.npz")[0] == 0


def test_bfloat16_that_cannot_be_run_is_said_with_a_way_on(call: Call) -> None:
    call("quantize", "chain.onnx", "--to", "bf16", "-o", "brain.onnx")
    for command in (
        ("shrink", "brain.onnx", "--ratio", "0.5"),
        ("shrink", "brain.onnx", "--ratio", "0.5", "--data", "data.npz"),
        ("sparsify", "brain.onnx", "--pattern", "2:4"),
        ("compare", "chain.onnx", "brain.onnx"),
    ):
        code, _, err = call(*command)
        assert (code, err.count("\n")) == (4, 1), command
        assert "it has no bfloat16 kernels on a CPU" in err
        assert "work on the float32 model, and quantize last" in err
    assert call("shrink", "brain.onnx", "--ratio", "0.5", "--verify", "none")[0] == 0


def test_int8_behind_a_pattern_takes_a_finer_step_rather_than_no_cut(call: Call) -> None:
    reloaded(conv_chain((3, 64, 64)), Path("wide.onnx"))
    asked = ("shrink", "wide.onnx", "--ratio", "0.4", "--then", "2:4", "--quantize", "int8",
             "--data", "data.npz")  # fmt: skip
    assert call(*asked, "-o", "o.onnx")[0] == 0
    assert io.load("o.onnx").weights()["w1"].shape[:2] == (48, 48), "sixteens, not thirty-twos"
    _, _, err = call(*asked, "--round-to", "auto", "--dry-run")
    assert "round-to auto leave every group whole; --round-to 16 cuts most of them" in err


def test_data_that_give_no_ranges_are_named_and_few_of_them_warned_of(call: Call) -> None:
    x = np.load("data.npz")["x"]
    np.savez("few.npz", x=x[:4])
    code, _, err = call("quantize", "chain.onnx", "--to", "int8", "--data", "few.npz", "--dry-run")
    assert code == 0
    assert "int8 takes its ranges from 4 samples only" in err
    x[3, 0, 0, 0] = np.inf
    np.savez("inf.npz", x=x)
    for command in (
        ("quantize", "chain.onnx", "--to", "int8"),
        ("shrink", "chain.onnx", "--ratio", "0.5"),
        ("sparsify", "chain.onnx", "--pattern", "2:4"),
    ):
        code, _, err = call(*command, "--data", "inf.npz")
        assert (code, err.count("\n")) == (2, 1)
        assert "inf.npz: the array for input 'x' has infinite values in it" in err


def test_int8_that_is_slower_here_is_said_to_be_for_tensorrt(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("shrink", "chain.onnx", "--ratio", "0.5", "--quantize", "int8", "--data", "data.npz",
             "--latency", "--dry-run")  # fmt: skip
    for ratio, slower in ((2.0, True), (0.5, False)):
        times = Latency(1e-3, ratio * 1e-3, ratio, ratio, ratio, 10, 1)
        monkeypatch.setattr(shrinking, "timed_in_turn", lambda *_, found=times, **__: found)
        code, out, _ = call(*asked)
        assert code == 0
        assert ("runs Q/DQ pairs slower than float32; TensorRT is what" in out) is slower
