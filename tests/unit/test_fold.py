"""Weights computed from constants: followed where that is exact, folded elsewhere."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnxprune.analyse import analyse
from onnxprune.cost import count_params
from onnxprune.fold import fold
from onnxprune.model import Model
from onnxprune.pipeline import shrink
from onnxprune.prepare import prepare
from onnxprune.rewrite import operate
from onnxprune.runtime import session
from tests.oracle import assert_equals_masked_twin, assert_rewrites, plan_at
from tests.small import array, parsed

F32 = np.float32
NET = """g (float[1,3,8,8] x) => (float[1,4,8,8] y) {{
    {}
    a = Conv<pads=[1,1,1,1]>(x, w1)
    {}
    r = Relu(a)
    b = Conv(r, {})
    s = Relu(b)
    y = Conv(s, w3)}}"""


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(F32)


def net(weight: str, name: str = "w", before: str = "", **extra: np.ndarray) -> Model:
    """A convolution between two others whose weight ``name`` (12, 8, 1, 1) is computed from v."""
    return parsed(
        NET.format(before, weight, name), w1=normal(8, 3, 3, 3), v=normal(12, 8, 1, 1),
        w3=normal(4, 12, 1, 1), **extra,
    )  # fmt: skip


STANDARDISED = (
    "m = ReduceMean<axes=[1,2,3]>(v) c = Sub(v, m) q = Mul(c, c) "
    "d = ReduceMean<axes=[1,2,3]>(q) e = Sqrt(d) w = Div(c, e)"
)


def old(model: Model) -> Model:
    """The same at an opset whose reductions have their axes as attributes."""
    model.proto.opset_import[0].version = 17
    model.proto.ir_version = 8
    return model


def test_standardised_weight_is_cut_on_both_axes() -> None:
    model = old(net(STANDARDISED))
    graph = analyse(model)
    assert [(group.size, group.frozen) for group in graph.prunable] == [(8, None), (12, None)]
    surgery = operate(plan_at(graph, 0.5))
    assert array(surgery.model, "w").shape == (6, 4, 1, 1)
    assert surgery.folded == ("w",)
    assert_equals_masked_twin(model, plan_at(graph, 0.5))


def test_folded_weight_is_what_the_runtime_computes() -> None:
    model = old(net(STANDARDISED))
    folded, names = fold(model)
    assert names == ("w",)
    v = array(model, "v").astype(np.float64)
    centred = v - v.mean(axis=(1, 2, 3), keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(axis=(1, 2, 3), keepdims=True))
    np.testing.assert_allclose(array(folded, "w"), expected, rtol=1e-5, atol=1e-6)
    x = normal(1, 3, 8, 8)
    before, after = session(model).run({"x": x})["y"], session(folded).run({"x": x})["y"]
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)
    assert "v" not in folded.weights()


def test_scaled_weight_is_followed_not_folded() -> None:
    model = net("w = Mul(v, g)", g=normal(12, 1, 1, 1))
    assert fold(model) == (model, ())
    surgery = operate(plan_at(analyse(model), 0.5))
    assert array(surgery.model, "v").shape == (6, 4, 1, 1)
    assert array(surgery.model, "g").shape == (6, 1, 1, 1)


BIAS = (
    "n = Shape<end=1>(w1) i = Constant<value_ints=[1]>() k = Expand(n, i) "
    "z = Constant<value = float {0.5}>() f = CastLike(z, x) bias = Expand(f, k)"
)


def raw() -> Model:
    """A convolution with its bias as the raw exporter writes it."""
    model = net("", "v", before=BIAS)
    conv = next(node for node in model.proto.graph.node if node.output[0] == "a")
    conv.input.append("bias")
    return model


def test_expanded_bias_follows_its_channels_and_no_weight_is_copied() -> None:
    model = raw()
    graph = analyse(model)
    assert not graph.prunable[0].frozen
    surgery = operate(plan_at(graph, 0.5))
    assert array(surgery.model, "bias").shape == (4,)
    assert count_params(surgery.model) < count_params(model) / 2 + 16
    assert_equals_masked_twin(model, plan_at(graph, 0.5))


def test_model_of_which_nothing_goes_keeps_its_computed_weights() -> None:
    model = raw()
    made, _ = shrink(model, ratio=0.0, verify="none")
    assert made.proto == model.proto


def test_parameters_before_are_those_of_the_file() -> None:
    _, report = shrink(raw(), ratio=0.5)
    assert report.before.params == count_params(raw())
    assert report.recipe["folded"] == ["bias"]


def test_weight_that_asks_only_for_a_shape_is_no_second_copy() -> None:
    model = net("n = Shape<start=3,end=4>(v) h = Expand(a, n)", "v")
    assert sorted(prepare(model).constants) == ["v", "w1", "w3"]


@pytest.mark.parametrize(
    ("middle", "name", "extra"),
    [
        pytest.param("u = RandomNormalLike(v) w = Add(v, u)", "w", {}, id="drawn anew each time"),
        pytest.param("w = Expand(g, s)", "w",
                     {"g": normal(1, 1, 1, 1), "s": np.asarray([500, 8, 8, 8])}, id="would grow"),
    ],
)  # fmt: skip
def test_weight_that_must_stay_computed_is_not_folded(
    middle: str, name: str, extra: dict[str, np.ndarray]
) -> None:
    assert fold(net(middle, name, **extra))[1] == ()


def test_weight_that_a_caller_may_override_is_not_folded() -> None:
    model = old(net(STANDARDISED))
    model.proto.graph.input.append(
        onnx.helper.make_tensor_value_info("v", onnx.TensorProto.FLOAT, [12, 8, 1, 1])
    )
    assert fold(model)[1] == ()


def test_file_from_before_private_initializers_gets_a_constant_node() -> None:
    model = old(net(STANDARDISED))
    model.proto.ir_version, model.proto.opset_import[0].version = 3, 8
    for name, weight in model.weights().items():
        model.proto.graph.input.append(
            onnx.helper.make_tensor_value_info(name, weight.data_type, weight.shape)
        )
    folded, names = fold(model)
    assert names == ("w",)
    assert folded.proto.graph.node[0].op_type == "Constant"
    assert [value.name for value in folded.proto.graph.input] == ["x", "w1", "v", "w3"]
    graph = analyse(model)
    assert_equals_masked_twin(model, plan_at(graph, 0.5))


def test_large_folded_weight_is_computed_when_it_is_read_and_cut_on_both_axes() -> None:
    wide = normal(12, 8, 5, 5)
    axes = np.array([1, 2, 3])
    model = net("d = ReduceMax(u, axes) w = Div(u, d)", "w", u=wide, axes=axes)
    folded, names = fold(model)
    assert names == ("w",)
    expected = wide / wide.max(axis=(1, 2, 3), keepdims=True)
    np.testing.assert_allclose(array(folded, "w"), expected, rtol=1e-6)
    graph = analyse(model)
    assert array(operate(plan_at(graph, 0.5)).model, "w").shape == (6, 4, 5, 5)
    assert_equals_masked_twin(model, plan_at(graph, 0.5))


CHOSEN = """w = If (c) <then_branch = t () => (float[12,8,1,1] p) {p = Neg(v)},
    else_branch = e () => (float[12,8,1,1] q) {q = Relu(v)}>"""


def test_weight_that_a_branch_makes_of_a_constant_stays_and_freezes_what_it_reads() -> None:
    model = net(CHOSEN, "w", c=np.array(True))
    assert fold(model) == (model, ())
    graph = analyse(model)
    assert not graph.prunable
    assert "Conv 'b' has a weight that is computed at run time" in str(graph.groups[0].frozen)


def test_weight_computed_by_what_the_runtime_lacks_is_followed_to_where_it_starts() -> None:
    model = net("h = Softsign(u) w = Cast<to=1>(h)", "w", u=np.ones((12, 8, 1, 1)))  # of doubles
    assert fold(model) == (model, ())
    made = assert_rewrites(model, plan_at(analyse(model), 0.5)).model
    assert [array(made, name).shape for name in ("w1", "u")] == [(4, 3, 3, 3), (6, 4, 1, 1)]
