from __future__ import annotations

import json
import math
from collections.abc import Callable
from importlib import import_module

import numpy as np
import onnx
import pytest

from onnxprune.data import Data, random_data
from onnxprune.drift import measure_drift
from onnxprune.errors import VerificationError
from onnxprune.model import Model
from onnxprune.types import Limits, Verdict
from onnxprune.verify import verify

# The function has the module's name, and the package means the function.
verify_module = import_module("onnxprune.verify")

HEAD = '<ir_version: 10, opset_import: ["" : 21]>\n'


def model(text: str, **weights: np.ndarray) -> Model:
    proto = onnx.parser.parse_model(HEAD + text)
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return Model(proto)


def given(*batches: dict[str, np.ndarray]) -> Data:
    return Data(batches, "given", random=False, samples=len(batches))


def linear(hidden: int = 8, *, shift: float = 0.0, dtype: type = np.float32) -> Model:
    """Two layers, the second of which reads only the first four hidden units."""
    rng = np.random.default_rng(0)
    first, second = rng.standard_normal((6, 8)), rng.standard_normal((8, 5))
    second[4:] = 0
    name = {np.float32: "float", np.float16: "float16"}[dtype]
    return model(
        f"g ({name}[N,6] x) => ({name}[N,5] y) {{h = MatMul(x, w1) r = Relu(h) m = MatMul(r, w2)\n"
        "y = Add(m, b)}",
        w1=first[:, :hidden].astype(dtype),
        w2=second[:hidden].astype(dtype),
        b=np.full(5, shift, dtype),
    )


def check(pruned: Model, original: Model, *, level: str = "twin", **options: object) -> Verdict:
    data = options.pop("data", None) or random_data(original)
    twin = options.pop("twin", original)
    return verify(original, pruned, twin=twin, data=data, level=level, **options)  # type: ignore[arg-type]  # test


def test_right_surgery_passes_at_two_sizes() -> None:
    verdict = check(linear(4), linear(), level="full")
    assert verdict.status == "passed"
    assert verdict.passed
    assert verdict.twin is not None
    assert verdict.twin.passed
    assert verdict.twin.max_rel < 1e-6
    assert verdict.inputs == "random, seed 0"
    assert verdict.drift["y"].cosine == pytest.approx(1)
    assert verdict.drift["y"].top1 == 1


def test_bias_off_by_a_thousandth_of_the_scale_fails_as_our_bug() -> None:
    x = random_data(linear())
    scale = max(np.abs(verify_module.session(linear()).run(one)["y"]).max() for one in x.batches)
    verdict = check(linear(4, shift=1e-3 * scale), linear(), level="full")
    assert (verdict.status, verdict.ours) == ("failed", True)
    assert "output 'y'" in verdict.reason
    assert verdict.twin is not None
    assert verdict.twin.max_rel == pytest.approx(1e-3, rel=0.01)
    assert verdict.twin.tolerance < 2e-4
    assert verdict.drift == {}


def test_half_precision_gets_the_tolerance_of_its_epsilon() -> None:
    fine = check(linear(4, dtype=np.float16, shift=0.01), linear(dtype=np.float16))
    assert fine.status == "passed"
    assert check(linear(4, dtype=np.float16, shift=1), linear(dtype=np.float16)).status == "failed"


def test_level_none_runs_nothing() -> None:
    verdict = verify(linear(), Model(onnx.ModelProto()), twin=None, data=given({}), level="none")
    assert (verdict.status, verdict.reason, verdict.passed) == ("none", "not asked for", True)


def test_without_a_twin_only_loading_and_drift_are_checked() -> None:
    verdict = check(linear(4, shift=1), linear(), twin=None, level="full")
    assert verdict.status == "passed"
    assert verdict.twin is None
    assert verdict.drift["y"].rel_l2 > 0.01


def test_lossless_is_held_against_the_original_at_a_tighter_tolerance() -> None:
    assert check(linear(4), linear(), twin=None, lossless=True).status == "passed"
    verdict = check(linear(4, shift=3e-4), linear(), twin=None, lossless=True)
    assert (verdict.status, verdict.ours) == ("failed", True)
    assert check(linear(4, shift=3e-4), linear()).status == "passed"


def test_changed_size_is_seen_where_only_the_second_size_shows_it() -> None:
    baked = model("g (float[N,3] x) => (float[N,3] y) <int64[2] s = {1, 3}> {y = Reshape(x, s)}")
    free = model("g (float[N,3] x) => (float[N,3] y) <int64[2] s = {-1, 3}> {y = Reshape(x, s)}")
    one, three = ({"x": np.ones((size, 3), np.float32)} for size in (1, 3))
    assert check(baked, free, data=given(one)).status == "passed"
    verdict = check(baked, free, data=given(one, three))
    assert (verdict.status, verdict.ours) == ("failed", True)
    assert "cannot run" in verdict.reason


# ------------------------------------------------------------------------------ loads at all


def test_renamed_output_fails() -> None:
    verdict = check(
        model("g (float[2] x) => (float[2] z) {z = Relu(x)}"),
        model("g (float[2] x) => (float[2] y) {y = Relu(x)}"),
    )
    assert (verdict.status, verdict.ours) == ("failed", True)
    assert "outputs changed" in verdict.reason


def test_output_that_changed_its_declared_shape_fails() -> None:
    verdict = check(
        model("g (float[2] x) => (float[N] y) {y = Relu(x)}"),
        model("g (float[2] x) => (float[2] y) {y = Relu(x)}"),
    )
    assert (verdict.status, verdict.ours) == ("failed", True)
    assert "shape of 'y' changed" in verdict.reason


def test_weight_that_is_also_an_input_may_change_its_shape() -> None:
    old, cut = linear(), linear(4)
    for one in (old, cut):
        one.proto.ir_version = 3
        for tensor in one.proto.graph.initializer:
            value = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            one.proto.graph.input.append(value)
    assert check(cut, old).status == "passed"


def test_pruned_model_that_fails_the_checker_fails() -> None:
    bad = linear(4)
    bad.proto.graph.initializer[1].CopyFrom(
        onnx.numpy_helper.from_array(np.ones((7, 5), np.float32), "w2")
    )
    verdict = check(bad, linear())
    assert (verdict.status, verdict.ours) == ("failed", True)
    assert verdict.reason.startswith("onnx.checker: ")
    assert "\n" not in verdict.reason


def test_what_the_checker_says_of_the_original_too_is_no_failure() -> None:
    text = """g (float[1,4,2] x) => (float[1,4,2] y) <float[2] s = {1, 1}, float[2] b = {0, 0}>
        {y = GroupNormalization<num_groups = 2>(x, s, b)}"""
    old = model(text)
    old.proto.opset_import[0].version = 18
    assert check(old, old).status == "passed"


def test_original_that_the_runtime_cannot_run_is_said_to_be_so() -> None:
    unknown = model("g (float[2] x) => (float[2] y) {y = com.acme.Foo(x)}")
    unknown.proto.opset_import.add(domain="com.acme", version=1)
    with pytest.raises(VerificationError, match="ONNX Runtime cannot run this model") as caught:
        check(unknown, unknown, data=given({"x": np.zeros(2, np.float32)}))
    assert caught.value.hint == "--verify none writes the result without a proof"
    assert caught.value.exit_code == 4


def test_pruned_model_that_does_not_run_while_the_original_does_is_our_bug() -> None:
    text = "g (int64[N] i) => (float[N] y) {y = Gather(w, i)}"
    verdict = check(
        model(text, w=np.ones(2, np.float32)),
        model(text, w=np.ones(9, np.float32)),
        data=given({"i": np.array([8])}),
    )
    assert (verdict.status, verdict.ours) == ("failed", True)
    assert "indices element out of data bounds" in verdict.reason


# ------------------------------------------------------------------- outputs of every kind

RELU = "g (float[N] x) => (float[N] y) {y = Relu(x)}"


def replies(monkeypatch: pytest.MonkeyPatch, reply: Callable[[str, bool], np.ndarray]) -> Verdict:
    """Verdict on three models whose output ``y`` is whatever ``reply`` says."""

    class Fake:
        skipped = ()

        def __init__(self, which: str, plain: bool) -> None:
            self.key = (which, plain)

        def run(self, _feeds: object) -> dict[str, np.ndarray]:
            return {"y": reply(*self.key)}

    original, pruned, twin = model(RELU), model(RELU), model(RELU)
    monkeypatch.setattr(
        verify_module,
        "session",
        lambda which, *, optimise=True: Fake("pruned" if which is pruned else "twin", not optimise),
    )
    return verify(original, pruned, twin=twin, data=given({}), level="twin")


def test_difference_below_ten_times_the_models_own_noise_passes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def reply(which: str, plain: bool) -> np.ndarray:
        return np.array([1, 0.5 + (5e-4 if which == "pruned" else 1e-4 if plain else 0)], "f")

    verdict = replies(monkeypatch, reply)
    assert verdict.status == "passed"
    assert verdict.twin is not None
    assert verdict.twin.tolerance == pytest.approx(1e-3, rel=0.01)


def test_difference_above_ten_times_the_noise_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def reply(which: str, plain: bool) -> np.ndarray:
        return np.array([1, 0.5 + (5e-3 if which == "pruned" else 1e-4 if plain else 0)], "f")

    assert replies(monkeypatch, reply).status == "failed"


def test_model_noisier_than_a_hundredth_is_untestable(monkeypatch: pytest.MonkeyPatch) -> None:
    def reply(which: str, plain: bool) -> np.ndarray:
        return np.array([1, 0.5 + (0.3 if which == "pruned" else 0.05 if plain else 0)], "f")

    verdict = replies(monkeypatch, reply)
    assert (verdict.status, verdict.passed, verdict.ours) == ("not_run", False, False)
    assert "numerical noise is 0.05" in verdict.reason
    assert "untestable" in verdict.reason


@pytest.mark.parametrize(
    ("twin", "pruned", "status"),
    [
        pytest.param([1, np.nan], [1, np.nan], "passed", id="same NaN"),
        pytest.param([1, np.inf], [1, np.inf], "passed", id="same Inf"),
        pytest.param([np.nan], [np.nan], "not_run", id="nothing but NaN"),
        pytest.param([1, np.nan], [1, 2], "failed", id="NaN gone"),
        pytest.param([1, 2], [1, np.nan], "failed", id="NaN new"),
        pytest.param([1, np.inf], [1, -np.inf], "failed", id="other Inf"),
        pytest.param([0, 0], [0, 0], "passed", id="all zero"),
        pytest.param([0, 0], [0, 1e-3], "failed", id="zero scale"),
        pytest.param([], [], "passed", id="empty"),
        pytest.param([1, -3.4028235e38], [1.01, -3.4028235e38], "failed", id="masked by finfo.min"),
        pytest.param([1, 2, 3], [1, 2], "failed", id="shape"),
    ],
)
def test_special_float_outputs(
    monkeypatch: pytest.MonkeyPatch, twin: list[float], pruned: list[float], status: str
) -> None:
    verdict = replies(
        monkeypatch, lambda which, _: np.array(pruned if which == "pruned" else twin, np.float32)
    )
    assert verdict.status == status


@pytest.mark.parametrize(
    ("wrong", "status"),
    [pytest.param(1, "passed", id="a tie"), pytest.param(20, "failed", id="many")],
)
@pytest.mark.parametrize("dtype", [np.int64, np.bool_, np.uint8, object])
def test_integer_outputs_may_differ_in_a_thousandth(
    monkeypatch: pytest.MonkeyPatch, dtype: type, wrong: int, status: str
) -> None:
    def reply(which: str, _: bool) -> np.ndarray:
        array = np.zeros(2000, dtype)
        array[: wrong if which == "pruned" else 0] = 1
        return array

    verdict = replies(monkeypatch, reply)
    assert verdict.status == status


def test_shape_that_depends_on_noise_is_untestable(monkeypatch: pytest.MonkeyPatch) -> None:
    def reply(which: str, plain: bool) -> np.ndarray:
        return np.zeros(3 if which == "pruned" else 4 if plain else 5, np.float32)

    assert replies(monkeypatch, reply).status == "not_run"


def test_wrong_shape_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    verdict = replies(monkeypatch, lambda which, _: np.zeros(2 if which == "pruned" else 3, "f"))
    assert "has shape [2] instead of [3]" in verdict.reason


def test_sequence_output_is_noted_and_the_rest_compared() -> None:
    both = model("g (float[2] x) => (seq(float[2]) q, float[2] y) {q = SequenceConstruct(x)\n"
                 "y = Relu(x)}")  # fmt: skip
    verdict = check(both, both, level="full")
    assert verdict.status == "passed"
    assert verdict.notes == ("not compared, no tensor: 'q'",)
    assert set(verdict.drift) == {"y"}


def test_model_without_tensor_outputs_is_not_run() -> None:
    only = model("g (float[2] x) => (seq(float[2]) q) {q = SequenceConstruct(x)}")
    verdict = check(only, only, level="full")
    assert (verdict.status, verdict.reason) == ("not_run", "no output is a tensor")


# ----------------------------------------------------------------------------------- drift

SCALE = "g (float[N,4] x) => (float[N,4] y) {y = Mul(x, s)}"
SCALES = np.array([1, 1.1, 0.9, 1.2], np.float32)


def test_drift_over_batches_equals_one_comparison_of_everything() -> None:
    rng = np.random.default_rng(3)
    x = rng.standard_normal((11, 4)).astype(np.float32) * np.arange(1, 12, dtype="f")[:, None]
    before, after = model(SCALE, s=np.ones(4, np.float32)), model(SCALE, s=SCALES)
    parts = given({"x": x[:5]}, {"x": x[5:10]}, {"x": x[10:]})
    got = measure_drift(before, after, parts)["y"]
    a, b = x.astype(np.float64), (x * SCALES).astype(np.float64)
    relative = np.linalg.norm(a - b) / np.linalg.norm(a)
    assert got.rel_l2 == pytest.approx(relative, rel=1e-9)
    assert got.snr_db == pytest.approx(-20 * math.log10(relative), rel=1e-9)
    cosine = (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)
    assert got.cosine == pytest.approx(cosine, rel=1e-9)
    assert got.max_abs == np.abs(a - b).max()
    assert got.top1 == np.mean(a.argmax(1) == b.argmax(1))


def test_drift_of_a_model_from_itself_is_nothing() -> None:
    one = measure_drift(linear(), linear(), random_data(linear()))["y"]
    assert (one.rel_l2, one.snr_db, one.max_abs, one.top1) == (0, math.inf, 0, 1)
    assert one.cosine == pytest.approx(1, abs=1e-12)


def test_top1_only_where_the_output_looks_like_classes() -> None:
    text = """g (float[N,4] x) => (float[N,4] y, float[4,N] z, int64[N,4] i, float[1,N,4] r)
        {y = Neg(x) z = Transpose(x) i = Cast<to = 7>(x) r = Unsqueeze(x, a)}"""
    net = model(text, a=np.array([0]))
    drift = measure_drift(net, net, given({"x": np.ones((2, 4), np.float32)}))
    assert [drift[name].top1 for name in "yzir"] == [1, 1, None, None]


def test_drift_with_equal_infinities_leaves_them_out() -> None:
    before, after = model(SCALE, s=np.ones(4, np.float32)), model(SCALE, s=SCALES)
    x = np.array([[1, -np.inf, 2, 3]], np.float32)
    assert measure_drift(before, after, given({"x": x}))["y"].max_abs == pytest.approx(
        0.6, rel=1e-5
    )


def test_drift_with_new_nan_has_no_figures() -> None:
    before = model(SCALE, s=np.ones(4, np.float32))
    after = model(SCALE, s=np.array([1, np.nan, 1, 1], np.float32))
    drift = measure_drift(before, after, given({"x": np.ones((1, 4), np.float32)}))["y"]
    assert math.isnan(drift.cosine)
    assert drift.top1 is None


@pytest.mark.parametrize(
    "dtype", ["float16", "bfloat16", "double", "int64", "uint8", "bool", "string"]
)
def test_every_input_type_goes_through_polygraphy(dtype: str) -> None:
    net = model(f"g ({dtype}[N] x, {dtype}[N] xx) => ({dtype}[N] y, {dtype}[N] yy) {{\n"
                "y = Identity(x) yy = Identity(xx)}")  # fmt: skip
    if dtype == "string":
        data = given({"x": np.array(["a"], object), "xx": np.array(["b"], object)})
        assert math.isnan(measure_drift(net, net, data)["y"].cosine)
    else:
        assert measure_drift(net, net, random_data(net))["yy"].max_abs == 0


def test_nothing_reaches_stdout_or_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    assert check(linear(4, shift=1), linear(), twin=None, level="full").drift
    check(linear(4, shift=1), linear())
    assert capfd.readouterr() == ("", "")


# ----------------------------------------------------------------------------------- limits


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        pytest.param(Limits(max_drift=0.01), "--max-drift 0.01", id="drift"),
        pytest.param(Limits(min_cosine=0.9999), "--min-cosine 0.9999", id="cosine"),
        pytest.param(Limits(min_top1=0.99), "--min-top1 0.99", id="top1"),
    ],
)
def test_passed_limit_fails_as_the_users_own(limits: Limits, says: str) -> None:
    pruned = linear(4)
    shifted = np.array([4, 0, 0, 0, 0], np.float32)
    pruned.proto.graph.initializer[2].CopyFrom(onnx.numpy_helper.from_array(shifted, "b"))
    verdict = check(pruned, linear(), twin=None, level="full", limits=limits)
    assert (verdict.status, verdict.ours) == ("failed", False)
    assert verdict.reason.startswith(f"your limit: {says}")
    assert verdict.drift
    assert json.dumps(verdict.reason)


def test_limit_on_classes_fails_where_no_output_looks_like_classes() -> None:
    image = model("g (float[1,2,4,4] x) => (float[1,2,4,4] y) {y = Relu(x)}")
    verdict = check(image, image, twin=None, level="full", limits=Limits(min_top1=0.5))
    assert verdict.reason == "your limit: --min-top1 0.5, but no output looks like classes"


def test_limits_that_hold_change_nothing() -> None:
    limits = Limits(max_drift=0.1, min_cosine=0.99, min_top1=1.0)
    assert check(linear(4), linear(), level="full", limits=limits).status == "passed"


def test_drift_that_cannot_be_measured_passes_a_limit() -> None:
    before = model(SCALE, s=np.ones(4, np.float32))
    after = model(SCALE, s=np.full(4, np.nan, np.float32))
    data = given({"x": np.ones((1, 4), np.float32)})
    verdict = check(after, before, twin=None, level="full", data=data, limits=Limits(max_drift=1))
    assert "cannot be measured" in verdict.reason
