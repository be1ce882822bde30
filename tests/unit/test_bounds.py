from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnxprune.analyse import analyse
from onnxprune.bounds import Bounds, find_bounds
from onnxprune.feeds import random_feeds
from onnxprune.intervals import Interval, add, between, divide, multiply, unknown, weighted
from onnxprune.model import Model
from onnxprune.runtime import accepts, session
from tests.masked import masked
from tests.property.graphs import random_model
from tests.small import parsed


def bounds_of(model: Model) -> Bounds:
    return find_bounds(analyse(model))


def ends(bounds: Bounds, name: str) -> tuple[list[float], list[float]]:
    found = bounds.of(name)
    assert found is not None
    return found.low.reshape(-1).tolist(), found.high.reshape(-1).tolist()


def test_zero_times_no_bound_is_zero() -> None:
    product = multiply(unknown(1), Interval(np.array([0.0, 2.0]), np.array([0.0, 2.0])))
    assert product.zero.tolist() == [True, False]
    assert not np.isnan(product.low).any()


def test_quotient_has_no_bound_where_the_divisor_may_be_zero() -> None:
    found = divide(between(1, 2, 1), Interval(np.array([-1.0, 4.0]), np.array([1.0, 8.0])))
    assert (found.low.tolist(), found.high.tolist()) == ([-np.inf, 0.125], [np.inf, 0.5])


def test_sum_of_opposite_infinities_has_no_bound() -> None:
    found = add(unknown(1), Interval(np.array([np.inf]), np.array([np.inf])))
    assert (found.low.tolist(), found.high.tolist()) == ([-np.inf], [np.inf])


def test_weighted_sum_ignores_what_a_zero_weight_reads() -> None:
    x = Interval(np.array([[-np.inf, 1.0]]), np.array([[np.inf, 2.0]]))
    found = weighted(np.array([[[0.0, 3.0], [1.0, 3.0], [0.0, -3.0]]]), x)
    assert found.low.reshape(-1).tolist() == [3, -np.inf, -6]
    assert found.high.reshape(-1).tolist() == [6, np.inf, -3]


def test_padding_lets_a_constant_fall_to_zero() -> None:
    model = parsed(
        "g (float[1,2,4,4] x) => (float[1,1,4,4] y, float[1,1,2,2] z) {\n"
        "c = Conv(x, w, b) y = Conv<pads=[1,1,1,1]>(c, v) z = Conv(c, u) }",
        w=np.zeros((1, 2, 1, 1), np.float32),
        b=np.array([2], np.float32),
        v=np.ones((1, 1, 3, 3), np.float32),
        u=np.ones((1, 1, 3, 3), np.float32),
    )
    bounds = bounds_of(model)
    assert ends(bounds, "c") == ([2], [2])
    assert ends(bounds, "y") == ([0], [18])
    assert ends(bounds, "z") == ([18], [18])


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [
        ("y = HardSwish(s)", -0.375, 0.0),
        ("y = Relu(s)", 0, 0),
        ("y = Clip(s, zero, one)", 0, 0),
        ("y = LeakyRelu<alpha=0.5>(s)", -1.5, 0),
        ("y = Abs(s)", 0, 3),
        ("a = Neg(s) y = Max(a, one)", 1, 3),
        ("a = Softmax(s) y = Mul(a, s)", -3, 0),
        ("y = ReduceMean(s)", -3, 0),
    ],
)
def test_function_of_a_bounded_tensor(text: str, low: float, high: float) -> None:
    model = parsed(
        f"g (float[2,4] x) => (float[a,b] y) {{ t = Sigmoid(x) s = Mul(t, scale) {text} }}",
        scale=np.array(-3, np.float32),
        zero=np.array(0, np.float32),
        one=np.array(1, np.float32),
    )
    assert ends(bounds_of(model), "y") == ([low], [high])


def test_any_function_of_a_constant_is_a_constant() -> None:
    model = parsed(
        "g (float[1,2,4,4] x) => (float[1,2,4,4] y) { c = Conv(x, w, b) y = Mish(c) }",
        w=np.zeros((2, 2, 1, 1), np.float32),
        b=np.array([0, 1], np.float32),
    )
    low, high = ends(bounds_of(model), "y")
    assert low == high
    assert low == pytest.approx([0, 0.8650984], abs=1e-6)


def test_quantized_constant_is_followed() -> None:
    model = parsed(
        "g (float[1,2,4,4] x) => (float[1,2,4,4] y) {\n"
        "c = Conv(x, w, b) q = QuantizeLinear(c, s, z) y = DequantizeLinear(q, s, z) }",
        w=np.zeros((2, 2, 1, 1), np.float32),
        b=np.array([0, 1.06], np.float32),
        s=np.array(0.25, np.float32),
        z=np.array(3, np.int8),
    )
    assert ends(bounds_of(model), "y") == ([0, 1], [0, 1])


def test_padding_that_shifts_channels_tells_them_no_longer_apart() -> None:
    model = parsed(
        "g (float[1,2,4,4] x) => (float[1,2,4,4] y, float[1,2,6,4] z) {\n"
        'c = Conv(x, w, b) y = Pad(c, shift) z = Pad<mode="edge">(c, around) }',
        w=np.zeros((2, 2, 1, 1), np.float32),
        b=np.array([1, 2], np.float32),
        shift=np.array([0, 1, 0, 0, 0, -1, 0, 0]),
        around=np.array([0, 0, 1, 0, 0, 0, 1, 0]),
    )
    bounds = bounds_of(model)
    assert ends(bounds, "y") == ([0], [2])
    assert ends(bounds, "z") == ([1, 2], [1, 2])


def test_batch_normalization_in_training_says_nothing() -> None:
    model = parsed(
        "g (float[1,2,4,4] x) => (float[1,2,4,4] y) {\n"
        "y, m, v = BatchNormalization<training_mode=1>(x, g, b, mean, var) }",
        g=np.zeros(2, np.float32),
        b=np.ones(2, np.float32),
        mean=np.zeros(2, np.float32),
        var=np.ones(2, np.float32),
    )
    assert "y" not in bounds_of(model).by_name


def test_nan_in_a_weight_makes_what_follows_wild() -> None:
    model = parsed(
        "g (float[1,2,4,4] x) => (float[1,2,4,4] y) { c = Conv(x, w) y = Relu(c) }",
        w=np.full((2, 2, 1, 1), np.nan, np.float32),
    )
    assert bounds_of(model).wild == {"c", "y"}


def test_every_tensor_of_random_graphs_lies_within_its_bounds() -> None:
    bounded = 0
    for seed in range(60):
        model = Model(random_model(seed))
        if any(node.domain for node in model.proto.graph.node):
            continue
        _, model = masked(model, 0.5, "filters", seed)
        graph = analyse(model)
        bounds = find_bounds(graph)
        feeds = random_feeds(model, [graph.stand_ins], seed=0, batches=1)[0]
        if accepts(model, feeds) is not None:
            continue
        found = _observed(graph.graph.model, bounds, feeds)
        for name, array in found.items():
            interval = bounds.by_name[name]
            slack = 1e-2 * max(1.0, float(np.abs(array).max(initial=0)))  # some are in 16 bits
            ordinary = np.isfinite(array)
            assert (array >= interval.low - slack)[ordinary].all(), (seed, name)
            assert (array <= interval.high + slack)[ordinary].all(), (seed, name)
            bounded += 1
    assert bounded > 200


def _observed(model: Model, bounds: Bounds, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    shown = {value.name for value in proto.graph.output}
    made = {name for node in proto.graph.node for name in node.output}
    for name in bounds.by_name:
        if name in made - shown:
            proto.graph.output.append(onnx.ValueInfoProto(name=name))
    outputs = session(Model(proto), optimise=False).run(feeds)
    return {n: a.astype(np.float64) for n, a in outputs.items() if n in bounds.by_name}
