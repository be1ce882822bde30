from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxprune.analyse import analyse
from onnxprune.errors import InvariantError
from onnxprune.model import Model
from onnxprune.ops import registry
from tests.oracle import plan_at
from tests.unit.ops.models import (
    assert_coupled,
    assert_exact,
    assert_frozen,
    between_convs,
    between_matmuls,
    model,
    overridable,
)

DYNAMIC = """g (float[N,3,8,8] x) => (float[n,c,h,w] y) {{
    a = Conv(x, w1)  {}  y = Conv(m, w2)}}"""


def dynamic(middle: str, **constants: Any) -> Model:
    return model(DYNAMIC.format(middle), w1=(8, 3, 1, 1), w2=(4, 8, 1, 1), **constants)


def test_extent_of_channels_used_as_data_keeps_its_old_value() -> None:
    middle = """s = Shape(a)  k = Gather(s, one)  f = Cast<to=1>(k)  r = Sqrt(f)  m = Div(a, r)"""
    found = dynamic(middle, one=np.asarray(1))
    assert_exact(found)


def test_size_used_as_data_keeps_its_old_value_or_the_channels() -> None:
    found = between_convs("s = Size(a)  f = Cast<to=1>(s)  r = Log(f)  m = Div(a, r)")
    assert_coupled(analyse(found), ("w1", 0), ("w2", 1))
    assert_exact(found)


def test_constant_of_the_shape_of_channels_follows_or_freezes_them() -> None:
    found = between_convs("s = Shape(a)  o = ConstantOfShape(s)  m = Add(a, o)")
    assert_exact(found, some=False)
    found = between_convs("s = Shape<start=2>(a)  o = ConstantOfShape(s)  m = Add(a, o)")
    assert_coupled(analyse(found), ("w1", 0), ("w2", 1))
    assert_exact(found)


def test_range_along_space_meets_channels_without_harm() -> None:
    middle = """s = Shape(a)  k = Gather(s, at)  i = Range(zero, k, one)
        f = Cast<to=1>(i)  m = Add(a, f)"""
    found = between_convs(middle, at=np.asarray(3), zero=np.asarray(0), one=np.asarray(1))
    assert_coupled(analyse(found), ("w1", 0), ("w2", 1))
    assert_exact(found)


@pytest.mark.parametrize("op", ["RandomNormal", "RandomUniform"])
def test_noise_of_a_fixed_shape_carries_no_channels(op: str) -> None:
    found = between_convs(f"r = {op}<shape=[1,1,8,8], seed=1.0>()  m = Add(a, r)")
    assert_coupled(analyse(found), ("w1", 0), ("w2", 1))
    assert_exact(found)


@pytest.mark.parametrize("op", ["RandomNormalLike", "RandomUniformLike"])
def test_noise_in_the_shape_of_the_data_freezes_it(op: str) -> None:
    found = between_convs(f"r = {op}<seed=1.0>(a)  m = Add(a, r)")
    assert_frozen(found, "w1", f"{op} 'r'", "makes data of this shape")


def test_eye_like_freezes_its_input() -> None:
    text = """g (float[8,3] x) => (float[8,4] y) {
        a = MatMul(x, w1)  e = EyeLike(a)  m = Add(a, e)  y = MatMul(m, w2)}"""
    found = model(text, w1=(3, 8), w2=(8, 4))
    assert_frozen(found, "w1", "EyeLike 'e'", "makes data of this shape")


SCALE = np.linspace(0.02, 0.05, 8, dtype=np.float32)


@pytest.mark.parametrize("scale", [SCALE, SCALE[:1].reshape(())], ids=["each channel", "all"])
def test_quantization_of_data_takes_scale_and_zero_point_along(scale: np.ndarray) -> None:
    zero = np.zeros(scale.shape, np.int8)
    middle = "q = QuantizeLinear<axis=1>(a, s, z)  m = DequantizeLinear<axis=1>(q, s, z)"
    found = between_convs(middle, s=scale, z=zero)
    assert_coupled(analyse(found), ("w1", 0), ("w2", 1))
    assert_exact(found)


@pytest.mark.parametrize("axis", [0, 1])
def test_quantized_weight_is_cut_with_its_scales(axis: int) -> None:
    rng = np.random.default_rng(0)
    text = """g (float[2,3,8,8] x) => (float[2,4,8,8] y) {
        a = Conv(x, w1)  w2 = DequantizeLinear<axis=AXIS>(q, s, z)  y = Conv(a, w2)}"""
    size = (4, 8)[axis]
    found = model(
        text.replace("AXIS", str(axis)),
        w1=(8, 3, 1, 1),
        q=rng.integers(-100, 100, (4, 8, 1, 1)).astype(np.int8),
        s=SCALE[:size],
        z=rng.integers(-9, 9, size).astype(np.int8),
    )
    assert_coupled(analyse(found), ("w1", 0), ("q", 1), *([("s", 0)] if axis else []))
    assert_exact(found)


def test_unknown_operator_freezes_what_it_reads_and_is_named() -> None:
    found = between_convs("b = Conv(x, v)  r = NonZero(b)  c = Cast<to=1>(r)  d = ReduceMax(c)"
                          "  m = Add(a, d)", v=(8, 3, 1, 1))  # fmt: skip
    graph = analyse(found)
    frozen = [group.frozen or "" for group in graph.groups if group.producers[0].tensor == "v"]
    assert any("NonZero 'r' has no rule" in why for why in frozen)
    assert plan_at(graph, 0.5).removes


@pytest.mark.parametrize("op_type", sorted({op for domain, op in registry.entries() if not domain}))
def test_every_operator_of_the_table_stands_in_some_unit_test(op_type: str) -> None:
    texts = [path.read_text() for path in Path(__file__).parent.glob("test_*.py")]
    assert any(re.search(rf"\b{op_type}\b", text) for text in texts)


def test_gather_of_places_found_at_run_time_lets_channels_pass() -> None:
    middle = (
        "i = ArgMax<axis=1, keepdims=0>(x) v = Gather<axis=1>(a, i) m = ReduceSum<keepdims=0>(v, k)"
    )
    found = between_matmuls(middle, k=np.array([1]))
    assert_coupled(analyse(found), ("w1", 1), ("w2", 0))
    assert_exact(found)


def test_grid_quantized_along_one_of_its_axes_stays() -> None:
    middle = """r = Reshape(a, g) q = QuantizeLinear<axis=3>(r, s, z)
        d = DequantizeLinear<axis=3>(q, s, z) m = Reshape(d, back)"""
    scale = {"s": np.full(4, 0.05, np.float32), "z": np.zeros(4, np.int8)}
    shapes = {"g": np.array([2, 6, 2, 4]), "back": np.array([2, 6, 8])}
    found = between_matmuls(middle, **scale, **shapes)
    assert_frozen(found, "w1", "is quantized along one axis of a grid")


def test_recurrent_layer_without_its_optional_inputs_freezes_what_it_reads() -> None:
    text = """g (float[5,2,3] x) => (float[n,t,c,d] y) {
        a = MatMul(x, w1) y, h, c = LSTM<hidden_size=4>(a, k, r)}"""
    found = model(text, w1=(3, 8), k=(1, 16, 8), r=(1, 16, 4))
    found.proto.graph.node[1].input.extend(["", ""])
    assert_frozen(found, "w1", "LSTM 'y' has no rule")


def test_second_rule_for_an_operator_is_refused() -> None:
    before = list(registry.entries()["", "Relu"])
    with pytest.raises(InvariantError, match="rule for Relu since 1 registered twice"):
        registry.rule("Relu")(lambda op: iter(()))
    assert registry.entries()["", "Relu"] == before
    assert not registry.is_unary("NoSuchOperator", 21)


def test_places_looked_up_in_several_axes_let_channels_behind_them_pass() -> None:
    places = np.array([[[0, 1], [1, 5]], [[1, 2], [0, 0]]])  # of batch and position
    middle = "i = Add(given, places) m = GatherND(a, i)"
    found = between_matmuls(middle, places=places, given=np.zeros((2, 2, 2), np.int64))
    assert_coupled(analyse(overridable(found, "given")), ("w1", 1), ("w2", 0))
    assert_exact(found)


def test_places_looked_up_along_the_channels_freeze_them() -> None:
    middle = "i = Add(given, places) g = GatherND(a, i) m = MatMul(g, v)"
    places, given = np.array([[[0, 1, 3]]]), np.zeros((1, 1, 3), np.int64)
    found = between_matmuls(middle, places=places, given=given, v=(1, 8))
    assert_frozen(overridable(found, "given"), "w1", "is looked up by an index")


@pytest.mark.parametrize("target", ["b", "k"], ids=["data", "constant"])
def test_rows_written_to_places_tie_with_what_they_are_written_to(target: str) -> None:
    middle = f"""b = MatMul(x, v) i = Add(given, places)
        m = ScatterND<reduction="add">({target}, i, a)"""
    places = np.stack([np.indices((2, 6))[0], np.indices((2, 6))[1][:, ::-1]], -1)
    weights, given = {"v": (3, 8), "k": (2, 6, 8)}, np.zeros((2, 6, 2), np.int64)
    found = between_matmuls(middle, places=places, given=given, **weights)
    axis = ("v", 1) if target == "b" else ("k", 2)
    graph = analyse(overridable(found, "given"))
    assert_coupled(graph, ("w1", 1), ("w2", 0), axis)
    assert_exact(found)


def test_rows_written_to_data_that_stays_are_frozen() -> None:
    middle = """b = Expand(zero, like) i = Add(given, places) m = ScatterND(b, i, a)"""
    places = np.stack(np.indices((2, 6)), -1)
    given = np.zeros((2, 6, 2), np.int64)
    found = between_matmuls(
        middle, places=places, given=given, zero=np.zeros(1, np.float32), like=np.array([2, 6, 8])
    )
    for name in ("given", "zero"):
        overridable(found, name)
    assert_frozen(found, "w1", "ScatterND 'm'", "meets")
