"""Means of dropped channels from weights alone, and what they are worth in biases."""

from __future__ import annotations

from dataclasses import replace
from math import erf, sqrt

import numpy as np
import onnx
import pytest

from onnxprune.analyse import analyse
from onnxprune.compensate import compensated
from onnxprune.model import Model
from onnxprune.moments import spreads
from onnxprune.pipeline import shrink
from onnxprune.rewrite import operate
from onnxprune.runtime import session
from onnxprune.select import PruningPlan
from tests.small import conv_chain, parsed

RNG = np.random.default_rng(0)
PHI = np.exp(-0.5 * 0.3**2) / np.sqrt(2 * np.pi)


@pytest.fixture(autouse=True)
def _same_numbers_in_any_order() -> None:
    RNG.bit_generator.state = np.random.default_rng(0).bit_generator.state


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def norm_then(middle: str, *, opset: int = 21) -> Model:
    """Conv and BatchNormalization to N(beta, gamma²), then ``middle`` from n to r."""
    made = parsed(
        f"""g (float[1,3,4,4] x) => (float[1,2,4,4] y) {{
        a = Conv(x, w0) n = BatchNormalization(a, gamma, beta, mean, var) {middle}
        y = Conv(r, w1)}}""",
        w0=normal(5, 3, 1, 1), w1=normal(2, 5, 1, 1), gamma=np.float32([1, 2, 0.5, -1, 0]),
        beta=np.float32([0, 0.6, -1, 0.3, 0.7]), mean=normal(5), var=np.abs(normal(5)) + 1,
    )  # fmt: skip
    made.proto.opset_import[0].version = opset
    return made


ACTIVATIONS = {
    "r = Relu(n)": lambda z: np.maximum(z, 0),
    "r = LeakyRelu<alpha=0.1>(n)": lambda z: np.where(z > 0, z, 0.1 * z),
    "r = Sigmoid(n)": lambda z: 1 / (1 + np.exp(-z)),
    "r = HardSwish(n)": lambda z: z * np.clip(z / 6 + 0.5, 0, 1),
    "s = Sigmoid(n) r = Mul(n, s)": lambda z: z / (1 + np.exp(-z)),
    "low = Constant<value = float {0}>() high = Constant<value = float {6}>() "
    "r = Clip(n, low, high)": lambda z: np.clip(z, 0, 6),
}


@pytest.mark.parametrize("middle", ACTIVATIONS, ids=lambda text: text.split("(")[0])
def test_mean_behind_an_activation_is_that_of_many_draws(middle: str) -> None:
    graph = analyse(norm_then(middle))
    found = spreads(graph.graph, graph.envs[0])["r"].mean
    draws = np.random.default_rng(1).standard_normal(400_000)
    for channel, (gamma, beta) in enumerate([(1, 0), (2, 0.6), (0.5, -1), (-1, 0.3), (0, 0.7)]):
        expected = np.mean(ACTIVATIONS[middle](beta + gamma * draws))
        assert found[channel] == pytest.approx(expected, abs=0.01)


def test_mean_behind_relu_is_the_closed_form() -> None:
    graph = analyse(norm_then("r = Relu(n)"))
    found = spreads(graph.graph, graph.envs[0])["r"].mean
    assert found[0] == pytest.approx(1 / np.sqrt(2 * np.pi), abs=1e-4)
    closed = 0.3 * 0.5 * (1 + erf(0.3 / sqrt(2))) + PHI
    assert found[3] == pytest.approx(closed, abs=1e-4)
    assert found[4] == pytest.approx(0.7, abs=1e-6)


def test_tensors_of_different_origin_add_means_and_variances() -> None:
    model = norm_then(
        "b = Conv(n, w2) m = BatchNormalization(b, beta, gamma, mean, var) r = Add(n, m)"
    )
    model.proto.graph.initializer.append(onnx.numpy_helper.from_array(normal(5, 5, 1, 1), "w2"))
    graph = analyse(model)
    found = spreads(graph.graph, graph.envs[0])["r"]
    gamma, beta = np.asarray([1, 2, 0.5, -1, 0]), np.asarray([0, 0.6, -1, 0.3, 0.7])
    np.testing.assert_allclose(found.mean, beta + gamma, atol=1e-3)
    np.testing.assert_allclose(found.variance, gamma**2 + beta**2, rtol=1e-2, atol=1e-3)


def test_a_bias_that_the_exporter_reshapes_is_followed() -> None:
    """Paddle writes a bias as Add(Conv, Reshape(bias)), behind which nothing was known."""
    model = norm_then(
        "shape = Constant<value_ints=[1,5,1,1]>() b = Reshape(beta, shape) r = Add(n, b)"
    )
    graph = analyse(model)
    found = spreads(graph.graph, graph.envs[0])["r"]
    np.testing.assert_allclose(found.mean, 2 * np.asarray([0, 0.6, -1, 0.3, 0.7]), atol=1e-6)


def test_channels_laid_out_position_by_position_keep_their_means() -> None:
    model = norm_then("f = Flatten(n) g = Gemm(f, w2) s = Constant<value_ints=[1,5,1,1]>() "
                      "r = Reshape(g, s)")  # fmt: skip
    weight = normal(80, 5)
    model.proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w2"))
    graph = analyse(model)
    found = spreads(graph.graph, graph.envs[0])
    beta = np.repeat(np.asarray([0, 0.6, -1, 0.3, 0.7]), 16)
    np.testing.assert_allclose(found["f"].mean, beta, atol=1e-6)
    np.testing.assert_allclose(found["g"].mean, beta @ weight, atol=1e-4)


def test_gate_of_a_squeeze_and_excitation_is_that_of_the_mean() -> None:
    model = norm_then("p = GlobalAveragePool(n) q = Conv(p, w2) g = HardSigmoid(q) r = Mul(n, g)")
    weight = normal(5, 5, 1, 1)
    model.proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w2"))
    graph = analyse(model)
    found = spreads(graph.graph, graph.envs[0])["r"]
    beta, gamma = np.asarray([0, 0.6, -1, 0.3, 0.7]), np.asarray([1, 2, 0.5, -1, 0])
    gate = np.clip(0.2 * weight[:, :, 0, 0] @ beta + 0.5, 0, 1)
    np.testing.assert_allclose(found.mean, beta * gate, atol=1e-5)
    np.testing.assert_allclose(found.variance, np.square(gamma * gate), atol=1e-4)


BORDERS = {
    "3x3, padded": "Conv<pads=[1,1,1,1]>",
    "strided and dilated": "Conv<pads=[2,0,1,2], strides=[2,1], dilations=[1,2]>",
    "SAME_UPPER": 'Conv<auto_pad="SAME_UPPER", strides=[2,2]>',
    "unpadded": "Conv",
    "two groups": "Conv<pads=[1,1,1,1], group=2>",
    "transposed": "ConvTranspose<pads=[1,0,1,0], strides=[2,2]>",
    "transposed, two groups": "ConvTranspose<group=2, output_padding=[1,1], strides=[2,2]>",
}


@pytest.mark.parametrize("reader", BORDERS.values(), ids=BORDERS)
def test_bias_is_the_mean_over_the_positions_of_a_padded_output(reader: str) -> None:
    """Constant channels are dropped: what is left of the difference averages to nothing."""
    groups = 2 if "group=2" in reader else 1
    gamma = np.float32([1, 0, 1, 1, 0, 1])
    shape = (6, 4 // groups, 3, 3) if "Transpose" in reader else (4, 6 // groups, 3, 3)
    model = parsed(
        f"""g (float[1,3,5,6] x) => (float[1,4,M,N] y) {{
        a = Conv(x, w0) n = BatchNormalization(a, gamma, beta, mean, var) y = {reader}(n, w1)}}""",
        w0=normal(6, 3, 1, 1), w1=normal(*shape), gamma=gamma, beta=normal(6), mean=normal(6),
        var=np.abs(normal(6)) + 1,
    )  # fmt: skip
    graph = analyse(model)
    (group,) = graph.prunable
    keep = np.asarray([0, 2, 3, 5])  # those that are no constants
    plan = compensated(PruningPlan(graph, {group.id: keep}, {group.id: ""}))
    x = normal(1, 3, 5, 6)
    wanted = session(model).run({"x": x})["y"]
    made = session(operate(plan).model).run({"x": x})["y"]
    plain = session(operate(replace(plan, absorbed=())).model).run({"x": x})["y"]
    assert np.abs((plain - wanted).mean(axis=(0, 2, 3))).max() > 0.05
    np.testing.assert_allclose((made - wanted).mean(axis=(0, 2, 3)), 0, atol=1e-5)
    if reader == "Conv":
        np.testing.assert_allclose(made, wanted, atol=1e-5)


def test_constant_channels_are_made_up_for_exactly() -> None:
    """A channel with gamma 0 carries its mean and nothing else: the outputs stay what they were."""
    model = norm_then("r = Relu(n)")
    graph = analyse(model)
    (group,) = graph.prunable
    plan = PruningPlan(graph, {group.id: np.arange(4)}, {group.id: ""})
    x = normal(1, 3, 4, 4)
    wanted = session(model).run({"x": x})["y"]
    plain = session(operate(plan).model).run({"x": x})["y"]
    made = session(operate(compensated(plan)).model).run({"x": x})["y"]
    assert np.abs(plain - wanted).max() > 0.1
    np.testing.assert_allclose(made, wanted, rtol=1e-4, atol=1e-5)


def test_shrink_moves_means_into_biases_where_the_model_takes_no_picture() -> None:
    _, report = shrink(conv_chain((6, 16, 16)), ratio=0.5)
    assert report.recipe["options"]["restore"] == "bias"  # type: ignore[index]  # JSON
    assert report.recipe["restored"]
    assert report.verdict.twin is not None
    assert report.verdict.twin.passed
    _, plain = shrink(conv_chain((6, 16, 16)), ratio=0.5, restore="none")
    assert plain.recipe["restored"] == []


@pytest.mark.parametrize("bn", [True, False])
def test_report_says_where_means_are_those_of_random_inputs(bn: bool) -> None:
    _, report = shrink(conv_chain((6, 8, 12, 6), bn=bn), ratio=0.5)
    said = any("random inputs, of mean 0" in note for note in report.verdict.notes)
    assert said is not bn
