"""16-bit floats and int8: what the arithmetic gives, what stays in float32, and what holds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from onnxprune.data import Data, random_data
from onnxprune.drift import measure_drift
from onnxprune.errors import UnsupportedModelError, VerificationError
from onnxprune.impose import impose
from onnxprune.io import load, save
from onnxprune.model import Model
from onnxprune.pipeline import shrink
from onnxprune.quantize.calibration import METHODS, Ranges
from onnxprune.quantize.convert import Converted, check_zeros, convert
from onnxprune.quantize.int8 import find_layers, quantized, steps_of, to_int8
from onnxprune.quantize.ready import without_batch_norms
from onnxprune.quantizing import quantize
from onnxprune.recipe import QuantizeOptions, SparsifyOptions, read
from onnxprune.runtime import session
from onnxprune.sparsifying import sparsify
from onnxprune.stream import serialize
from onnxprune.weights import sparse_layers
from tests.oracle import assert_equals_masked_twin
from tests.small import array, conv_chain, parsed


def normal(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def given(*batches: np.ndarray) -> Data:
    return Data(tuple({"x": one} for one in batches), "the data", False, sum(map(len, batches)))


def made(model: Model, to: str, data: Data | None = None, **options: object) -> Converted:
    asked = QuantizeOptions.model_validate({"to": to, **options})
    result = convert(model, asked, data, data or random_data(model, seed=0))
    onnx.checker.check_model(onnx.load_model_from_string(serialize(result.model)), full_check=True)
    return result


def ops(model: Model) -> list[str]:
    return [node.op_type for node in model.proto.graph.node]


def kept(result: Converted) -> dict[str, str]:
    return {one.op_type: one.why for one in result.found.kept}


# -- 16-bit floats ---------------------------------------------------------------------------------


def test_fp16_weights_are_the_rounded_ones_and_the_interface_keeps_its_types() -> None:
    model = conv_chain()
    result = made(model, "fp16")
    assert array(result.model, "w0").dtype == np.float16
    assert np.array_equal(array(result.model, "w0"), array(model, "w0").astype(np.float16))
    assert result.model.proto.graph.input == model.proto.graph.input
    assert result.model.proto.graph.output == model.proto.graph.output
    assert [op for op in ops(result.model) if op != "Cast"] == ops(model)
    assert ops(result.model).count("Cast") == 2
    assert result.found.kept == ()


def test_convert_io_gives_16_bit_inputs_and_outputs_under_the_same_names_and_no_cast() -> None:
    model = made(conv_chain(), "fp16", convert_io=True).model
    (x,), (y,) = model.proto.graph.input, model.proto.graph.output
    kinds = x.type.tensor_type.elem_type, y.type.tensor_type.elem_type
    assert (x.name, y.name, *kinds) == ("x", "y", TensorProto.FLOAT16, TensorProto.FLOAT16)
    assert "Cast" not in ops(model)


def test_emulation_shows_the_overflow_that_the_runtime_hides() -> None:
    model = parsed("g (float[1,4] x) => (float[1,4] y) {a = Mul(x, x) y = Sqrt(a)}")
    x = np.array([[1, 2, 300, 400]], np.float32)
    small = given(x / 100)  # the range was measured on these
    result = made(model, "fp16", small)
    assert result.runs_as is not None
    assert np.isinf(session(result.runs_as).run({"x": x})["y"]).any()
    assert np.isfinite(session(result.model).run({"x": x})["y"]).all()


def test_node_whose_activation_leaves_the_range_stays_in_float32() -> None:
    model = parsed("g (float[1,4] x) => (float[1,4] y) {a = Mul(x, x) b = Sqrt(a) y = Neg(b)}")
    result = made(model, "fp16", given(np.array([[1, 2, 300, 400]], np.float32)))
    assert kept(result) == dict.fromkeys(("Mul", "Sqrt"), "'a' reaches 1.6e+05 when it runs")
    assert len(result.found.done) == 1


@pytest.mark.parametrize(
    ("value", "why"),
    [
        pytest.param(1e5, "constant 'c' reaches 1e+05", id="too large"),
        pytest.param(1e-12, "constant 'c' would be zero: 1e-12", id="too small"),
    ],
)
def test_node_whose_constant_float16_cannot_hold_stays_in_float32(value: float, why: str) -> None:
    model = parsed(
        "g (float[1,4] x) => (float[1,4] y) {a = Add(x, c) y = Neg(a)}",
        c=np.full(1, value, np.float32),
    )
    result = made(model, "fp16")
    assert kept(result)["Add"] == why
    assert array(result.model, "c").dtype == np.float32


def test_what_stands_for_minus_infinity_becomes_the_largest_number_and_no_row_is_nan() -> None:
    model = parsed(
        "g (float[1,4] x, bool[1,4] m) => (float[1,4] y) {a = Where(m, x, c) y = Softmax(a)}",
        c=np.full(1, np.finfo(np.float32).min),
    )
    masked = Data(({"x": normal(1, 4), "m": np.zeros((1, 4), np.bool_)},), "", False, 1)
    result = made(model, "fp16", masked)
    assert array(result.model, "c") == np.float16(-65504)
    assert result.runs_as is not None
    assert np.allclose(session(result.runs_as).run(masked.batches[0])["y"], 0.25)


def test_bf16_keeps_large_constants_and_raises_the_opset_to_one_that_has_the_type() -> None:
    model = parsed(
        "g (float[1,4] x) => (float[1,4] y) {a = Add(x, c) y = Neg(a)}",
        c=np.full(1, 1e5, np.float32),
    )
    result = made(model, "bf16")
    assert result.found.kept == ()
    assert array(result.model, "c").dtype.name == "bfloat16"
    assert result.model.proto.opset_import[0].version == 22


def test_raised_opset_leaves_the_shapes_of_the_interface_as_they_are_spelled() -> None:
    model = parsed(
        "g (float[N,4] x) => (float[M,2] y) {t = Transpose(w) y = MatMul(x, t)}", w=normal(2, 4)
    )
    result = made(model, "bf16")
    assert result.model.proto.graph.output == model.proto.graph.output
    assert result.model.proto.graph.input == model.proto.graph.input


def test_floats_made_of_sizes_stay_in_float32() -> None:
    model = parsed(
        """g (float[N,2,H,4] x) => (float[P,Q,R,S] y) {
            s = Shape<start=2, end=3>(x) f = Cast<to=1>(s) n = Div(f, three)
            scales = Concat<axis=0>(ones, n, one) a = Relu(x) y = Resize(a, , scales)
        }""",
        three=np.full(1, 3, np.float32), ones=np.ones(2, np.float32), one=np.ones(1, np.float32),
    )  # fmt: skip
    x = normal(1, 2, 7, 4)
    result = made(model, "fp16", given(x))
    assert kept(result) == dict.fromkeys(
        ("Cast", "Div", "Concat"), "it computes with sizes or positions"
    )
    assert session(result.model).run({"x": x})["y"].shape == session(model).run({"x": x})["y"].shape


def test_tensor_that_a_body_reads_comes_to_it_in_float32() -> None:
    model = parsed(
        """g (float[1,4] x, bool c) => (float[1,4] y) {
            a = Relu(x)
            b = If(c) <then_branch = t () => (float[1,4] p) {p = Neg(a)},
                       else_branch = e () => (float[1,4] q) {q = Mul(a, w)}>
            y = Relu(b)
        }""",
        w=normal(1, 4),
    )
    result = made(model, "fp16", Data(({"x": normal(1, 4), "c": np.array(False)},), "", False, 1))
    assert kept(result) == {"If": "it has a body"}
    assert array(result.model, "w").dtype == np.float32
    for flag in (True, False):
        feeds = {"x": normal(1, 4), "c": np.array(flag)}
        assert np.allclose(
            session(result.model).run(feeds)["y"], session(model).run(feeds)["y"], atol=1e-2
        )


def test_local_functions_are_converted_too() -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 21, "own" : 1]>
        g (float[1,4] x) => (float[1,4] y) {y = own.twice(x)}
        <domain: "own", opset_import: ["" : 21]> twice (a) => (b) {b = Add(a, a)}"""
    )
    result = made(Model(proto), "fp16")
    assert ops(result.model) == ["Cast", "Add", "Cast"]


def test_constant_nodes_become_16_bit_whatever_attribute_holds_them() -> None:
    model = parsed(
        "g (float[1,4] x) => (float[1,4] y) {c = Constant<value_float=0.5>() y = Mul(x, c)}"
    )
    result = made(model, "fp16")
    assert array(result.model, "c").dtype == np.float16


def test_model_without_float32_has_nothing_to_convert() -> None:
    model = parsed("g (float16[1,4] x) => (float16[1,4] y) {y = Neg(x)}")
    with pytest.raises(UnsupportedModelError, match="in float16 already: 'x'"):
        made(model, "fp16")


# -- int8 ------------------------------------------------------------------------------------------


def calibration(model: Model, batches: int = 4) -> Data:
    return random_data(model, seed=0, batches=batches)


def test_int8_has_the_form_that_tensorrt_takes() -> None:
    model = conv_chain()
    result = made(model, "int8", calibration(model))
    weights = result.model.weights()
    nodes = {name: node for node in result.model.proto.graph.node for name in node.output}
    for layer in (nodes["n0"], nodes["n1"], nodes["y"]):
        assert [nodes[name].op_type for name in layer.input[:2]] == ["DequantizeLinear"] * 2
        small, scale, zero = nodes[layer.input[1]].input
        assert weights[small].dtype == np.int8
        assert weights[scale].shape == weights[zero].shape == (weights[small].shape[0],)
    zeros = [weight for name, weight in weights.items() if "zero_point" in name]
    assert zeros
    assert all(zero.dtype == np.int8 and not zero.read().any() for zero in zeros)
    assert nodes["y"].output[0] == "y", "nothing stands behind a layer"
    assert "BatchNormalization" not in ops(result.model)


def test_int8_weights_keep_the_name_of_the_tensor_they_were() -> None:
    model = conv_chain(bn=False)
    result = made(model, "int8", calibration(model))
    back = array(result.model, "w0").astype(np.float32) * array(result.model, "w0_scale").reshape(
        -1, 1, 1, 1
    )
    step = np.abs(array(model, "w0")).max(axis=(1, 2, 3)) / 127
    assert np.all(np.abs(back - array(model, "w0")) <= 0.501 * step.reshape(-1, 1, 1, 1))


def test_bias_stays_a_float_and_of_a_sum_the_branch_no_convolution_makes_is_quantized() -> None:
    model = parsed(
        """g (float[1,4,5,5] x) => (float[1,4,5,5] y) {
            a = Relu(x) c = Conv<pads=[1,1,1,1]>(a, w, b) s = Add(c, a) y = Relu(s)
        }""",
        w=normal(4, 4, 3, 3), b=normal(4),
    )  # fmt: skip
    result = made(model, "int8", calibration(model))
    nodes = {name: node for node in result.model.proto.graph.node for name in node.output}
    assert array(result.model, "b").dtype == np.float32
    assert list(nodes["s"].input) == ["c", "a_dequantized"]
    assert ops(result.model).count("QuantizeLinear") == 1, "one for both that read it"


def test_weight_that_two_layers_read_is_stored_once_and_along_two_axes_twice() -> None:
    model = parsed(
        """g (float[2,6] x) => (float[2,6] y) {
            a = MatMul(x, w) b = MatMul(a, w) y = Gemm<transB=1>(b, w)
        }""",
        w=normal(6, 6),
    )
    result = made(model, "int8", calibration(model))
    small = [name for name, one in result.model.weights().items() if one.shape == (6, 6)]
    assert len(small) == 2


def test_zero_channels_and_zeros_of_a_pattern_stay_zero() -> None:
    model = conv_chain((3, 8, 16), bn=False)
    sparse = impose(model, SparsifyOptions(pattern="2:4", sparsity=0.5)).model
    result = made(sparse, "int8", calibration(sparse))
    check_zeros(sparse, result.model)
    small, plain = array(result.model, "w1"), array(sparse, "w1")
    assert np.all(small[plain == 0] == 0)
    assert np.all(to_int8(np.zeros((2, 3), np.float32), np.ones(2, np.float32), 0) == 0)
    assert np.array_equal(steps_of(np.zeros((2, 3), np.float32), 0), [1, 1])


def test_zeros_that_are_none_are_refused() -> None:
    model = conv_chain((3, 8, 16), bn=False)
    sparse = impose(model, SparsifyOptions(pattern="2:4", sparsity=0.5)).model
    with pytest.raises(VerificationError, match="zeros in the weight of 'c1' are none"):
        check_zeros(sparse, model)


def test_folded_batch_norms_compute_the_same() -> None:
    model = conv_chain()
    flat, folded = without_batch_norms(model)
    assert folded == ("n0", "n1")
    drift = measure_drift(model, flat, calibration(model))["y"]
    assert drift.rel_l2 < 1e-6


def test_batch_norm_behind_a_convolution_that_something_else_reads_is_not_folded() -> None:
    model = parsed(
        """g (float[1,3,5,5] x) => (float[1,4,5,5] y) {
            c = Conv(x, w) n = BatchNormalization(c, s, b, m, v) y = Add(c, n)
        }""",
        w=normal(4, 3, 1, 1), s=normal(4), b=normal(4), m=normal(4), v=np.ones(4, np.float32),
    )  # fmt: skip
    assert without_batch_norms(model)[1] == ()


def test_thresholds_by_each_method_come_from_the_data() -> None:
    model = conv_chain(bn=False)
    data = calibration(model)
    ranges = Ranges(model, ("x", "r0"), data)
    values = np.concatenate([np.abs(batch["x"]).ravel() for batch in data.batches])
    assert ranges.thresholds("minmax")["x"] == pytest.approx(values.max())
    for method in METHODS:
        found = ranges.thresholds(method)
        assert set(found) == {"x", "r0"}
        assert 0 < found["x"] <= values.max() * 1.0001


def test_layer_with_an_outlier_in_its_input_is_left_in_float_for_its_drift() -> None:
    model = parsed(
        """g (float[N,4] x) => (float[N,4] y) {
            a = MatMul(x, w) b = Mul(a, tall) c = MatMul(b, v) y = MatMul(c, u)
        }""",
        w=normal(4, 4), tall=np.array([1e4, 1, 1, 1], np.float32),
        v=normal(4, 4, seed=2) * np.array([[1e-4], [1], [1], [1]], np.float32),
        u=normal(4, 4, seed=3),
    )  # fmt: skip
    data = given(*(normal(16, 4, seed=seed) for seed in range(4)))
    result = made(model, "int8", data)
    assert [one.why for one in result.found.kept] == ["in int8 the outputs drift too far"]
    assert [one.node for one in result.found.kept] == ["c"]
    assert measure_drift(model, result.model, data)["y"].rel_l2 < 0.05


def test_quantized_model_is_not_quantized_again() -> None:
    model = conv_chain()
    data = calibration(model)
    with pytest.raises(UnsupportedModelError, match="quantized already"):
        made(made(model, "int8", data).model, "int8", data)


def test_filters_leave_layers_as_they_are_and_say_so() -> None:
    model = conv_chain(bn=False)
    result = made(model, "int8", calibration(model), ignore=["w0"])
    assert {one.node: one.why for one in result.found.kept}["c0"] == "you asked for it"
    assert "c0" not in result.found.done
    assert array(result.model, "w0").dtype == np.float32


def test_transposed_weight_is_stored_in_the_form_its_layer_reads() -> None:
    model = parsed(
        "g (float[2,6] x) => (float[2,3] y) {t = Transpose<perm=[1,0]>(w) y = MatMul(x, t)}",
        w=normal(3, 6),
    )
    result = made(model, "int8", calibration(model))
    assert "Transpose" not in ops(result.model)
    assert array(result.model, "t_int8").shape == (6, 3)
    assert "w" not in result.model.weights()


# -- with pruning ----------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["fp16", "int8"])
def test_quantized_model_cut_equals_its_masked_twin(to: str) -> None:
    model = conv_chain((3, 8, 12, 8))
    assert_equals_masked_twin(made(model, to, calibration(model)).model)


@pytest.mark.parametrize("zero", [0, 3], ids=["symmetric", "with a zero point"])
@pytest.mark.parametrize("wide", [True, False], ids=["a scale for each channel", "one scale"])
def test_scales_and_zero_points_of_activations_follow_the_cut(zero: int, wide: bool) -> None:
    size = (8,) if wide else ()
    model = parsed(
        """g (float[1,3,6,6] x) => (float[1,5,6,6] y) {
            c = Conv(x, a) r = Relu(c)
            q = QuantizeLinear<axis=1>(r, s, z) d = DequantizeLinear<axis=1>(q, s, z)
            k = DequantizeLinear<axis=0>(w, t, u) y = Conv(d, k)
        }""",
        a=normal(8, 3, 1, 1), s=np.abs(normal(8) * 0.02 + 0.05)[: 8 if wide else 1].reshape(size),
        z=np.full(size, zero, np.int8),
        w=np.random.default_rng(3).integers(-80, 80, (5, 8, 1, 1)).astype(np.int8),
        t=np.full(5, 0.02, np.float32), u=np.full(5, zero, np.int8),
    )  # fmt: skip
    outcome = assert_equals_masked_twin(model)
    assert outcome.cut > 0
    assert "QuantizeLinear" in outcome.touched


def test_refit_of_int8_weights_chooses_their_scales_anew_and_zero_points_stay_zero() -> None:
    model = conv_chain((3, 16, 16), bn=False, batch="N")
    x = np.random.default_rng(5).standard_normal((256, 3, 8, 8)).astype(np.float32)
    data = given(*np.split(x, 8))
    plain = made(model, "int8", data).model
    pruned, report = shrink(plain, ratio=0.5, data=data)
    assert report.verdict.twin is not None
    assert report.verdict.twin.passed
    small, scale = array(pruned, "w1"), array(pruned, "w1_scale")
    assert (small.dtype, small.shape, scale.shape) == (np.int8, (8, 8, 3, 3), (8,))
    assert np.all(np.abs(small.astype(int)).max(axis=(1, 2, 3)) == 127), "nothing is cut off"
    assert not np.isin(scale, array(plain, "w1_scale")).any()
    assert not array(pruned, "w1_zero_point").any()


def test_cast_of_an_activation_to_integers_takes_16_bits() -> None:
    model = parsed("g (float[1,4] x) => (int64[1,4] y) {a = Relu(x) y = Cast<to=7>(a)}")
    result = made(model, "fp16")
    assert result.found.kept == ()
    assert ops(result.model) == ["Cast", "Relu", "Cast"]


# -- the verb --------------------------------------------------------------------------------------


def test_recipe_of_a_sparse_model_survives_and_says_what_was_done(tmp_path: Path) -> None:
    model = conv_chain((3, 8, 16))
    model.proto.metadata_props.add(key="author", value="someone")
    sparse, _ = sparsify(model, verify="none")
    save(sparse, tmp_path / "s.onnx")
    result, _ = quantize(
        tmp_path / "s.onnx", to="int8", data=calibration(model), output=tmp_path / "q.onnx"
    )
    found = read(load(tmp_path / "q.onnx"))
    assert found.options.quantize is not None
    assert (found.options.quantize.to, found.options.quantize.ignore) == ("int8", ())
    assert found.options.sparsify == read(sparse).options.sparsify
    assert found.input_sha256 == read(sparse).input_sha256
    assert {entry.key: entry.value for entry in result.proto.metadata_props}["author"] == "someone"


def test_same_model_and_data_give_the_same_bytes(tmp_path: Path) -> None:
    model = conv_chain()
    for name in ("a", "b"):
        quantize(model, to="int8", data=calibration(model), output=tmp_path / f"{name}.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_layers_of_a_quantized_model_are_still_found_for_patterns() -> None:
    model = conv_chain((3, 8, 16))
    result = made(model, "int8", calibration(model))
    assert [layer.why_not for layer in sparse_layers(result.model)] == [None, None, None]
    thinned = impose(result.model, SparsifyOptions(pattern="2:4", sparsity=0.5))
    small = array(thinned.model, "w1").reshape(16, 2, 4, 9)
    assert np.all(np.count_nonzero(small, axis=2) <= 2)
    assert small.dtype == np.int8


def test_find_layers_says_why_a_layer_cannot_be_int8() -> None:
    model = parsed(
        "g (float[4,2] x) => (float[3,2] y) {y = MatMul(w, x)}",
        w=normal(3, 4),
    )
    found = find_layers(model, lambda _node: True)
    assert [(one.node, one.why) for one in found.kept] == [("y", "its weight is the first operand")]
    assert ops(quantized(model, found, {})) == ["MatMul"]
