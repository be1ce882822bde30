from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest

from onnxprune.model import Model
from onnxprune.runtime import RuntimeUnavailable, _kernel, accepts, session

HEAD = '<ir_version: 10, opset_import: ["" : 21]>\n'


def model(text: str) -> Model:
    return Model(onnx.parser.parse_model(HEAD + text))


ADD_ONE = "g (float[N,3] x) => (float[N,3] y) <float one = {1}> { y = Add(x, one) }"


def test_run_returns_every_output_by_name() -> None:
    loaded = session(model("g (float[2] x) => (float[2] y, float[2] z) {y = Relu(x) z = Neg(x)}"))
    got = loaded.run({"x": np.array([-1, 2], np.float32)})
    assert loaded.inputs == {"x": np.dtype(np.float32)}
    assert loaded.outputs == ("y", "z")
    np.testing.assert_array_equal(got["y"], [0, 2])
    np.testing.assert_array_equal(got["z"], [1, -2])


def test_sequence_output_is_skipped_and_named() -> None:
    loaded = session(
        model("g (float[2] x) => (seq(float[2]) q, float[2] y) {q = SequenceConstruct(x) y=Neg(x)}")
    )
    assert loaded.skipped == ("q",)
    assert set(loaded.run({"x": np.zeros(2, np.float32)})) == {"y"}


def test_model_with_only_a_sequence_output_runs() -> None:
    loaded = session(model("g (float[2] x) => (seq(float[2]) q) {q = SequenceConstruct(x)}"))
    assert loaded.run({"x": np.zeros(2, np.float32)}) == {}


def test_bfloat16_goes_in_and_comes_out() -> None:
    loaded = session(model("g (bfloat16[N] x) => (bfloat16[N] y, float[N] z) {y = Identity(x)\n"
                           "z = Cast<to = 1>(x)}"))  # fmt: skip
    x = np.array([1.25, -3], ml_dtypes.bfloat16)
    got = loaded.run({"x": x})
    assert got["y"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(got["y"], x)
    np.testing.assert_array_equal(got["z"], [1.25, -3])


def test_strings_go_in_and_come_out() -> None:
    loaded = session(model("g (string[N] x) => (string[N] y) {y = Identity(x)}"))
    assert list(loaded.run({"x": np.array(["a", "bcd"])})["y"]) == ["a", "bcd"]


def test_optimisation_off_gives_the_same_numbers() -> None:
    x = np.ones((2, 3), np.float32)
    got = [
        session(model(ADD_ONE), optimise=on, threads=1).run({"x": x})["y"] for on in (True, False)
    ]
    np.testing.assert_array_equal(*got)


@pytest.mark.parametrize(
    ("feeds", "says"),
    [
        pytest.param({"x": np.zeros((2, 5), np.float32)}, "Got: 5 Expected: 3", id="shape"),
        pytest.param({"x": np.zeros((2, 3))}, "tensor(double)", id="dtype"),
        pytest.param({}, "missing", id="missing"),
    ],
)
def test_bad_feeds_give_one_clean_line(feeds: dict[str, np.ndarray], says: str) -> None:
    reason = accepts(model(ADD_ONE), feeds)
    assert reason is not None
    assert says in reason
    assert "\n" not in reason
    assert "ONNXRuntimeError" not in reason


def test_accepts_says_none_for_what_runs() -> None:
    assert accepts(model(ADD_ONE), {"x": np.zeros((1, 3), np.float32)}) is None


def test_load_failure_has_no_source_paths_and_no_signature() -> None:
    broken = model(ADD_ONE)
    broken.proto.ir_version = 99
    with pytest.raises(RuntimeUnavailable) as caught:
        session(broken)
    assert caught.value.reason.startswith("Unsupported model IR version: 99")
    assert caught.value.exit_code == 4


def test_sequence_input_is_refused_by_name() -> None:
    with pytest.raises(RuntimeUnavailable, match="'q'"):
        session(model("g (seq(float[2]) q) => (int64 n) {n = SequenceLength(q)}"))


def test_nothing_is_printed_when_the_runtime_fails(capfd: pytest.CaptureFixture[str]) -> None:
    assert accepts(model("g (float[2] x) => (float[2] y) {y = Foo(x)}"), {}) is not None
    gather = model("g (int64[N] i) => (float[N] y) <float[2] w = {1, 2}> {y = Gather(w, i)}")
    assert accepts(gather, {"i": np.array([7])}) is not None
    assert capfd.readouterr() == ("", "")


def test_kernel_that_had_to_wait_in_most_runs_is_not_the_slower_for_it() -> None:
    events = [{"dur": dur, "args": {"op_name": "Conv"}} for dur in (6000, 700, 5000, 702, 7000)]
    assert _kernel("c", events, None, 0).seconds == pytest.approx(701e-6)
