from __future__ import annotations

import numpy as np
import pytest

from onnxprune.analyse import analyse
from tests.unit.ops.models import (
    assert_coupled,
    assert_exact,
    assert_frozen,
    between_convs,
    between_matmuls,
    model,
    overridable,
    units,
)


def test_concat_puts_later_channels_behind_earlier_ones() -> None:
    found = between_convs("b = Conv(x, v)  m = Concat<axis=1>(a, b)", v=(4, 3, 1, 1), reads=12)
    graph = analyse(found)
    assert units(graph, "w2", 1) == [*units(graph, "w1", 0), *units(graph, "v", 0)]
    assert_exact(found)


def test_concat_of_a_graph_input_keeps_its_channels() -> None:
    found = between_convs("m = Concat<axis=-3>(x, a)", reads=11)
    graph = analyse(found)
    assert units(graph, "w2", 1) == [None, None, None, *units(graph, "w1", 0)]
    assert_exact(found)


def test_concat_of_constant_channels_keeps_them() -> None:
    found = between_convs("m = Concat<axis=1>(a, k)", k=(2, 2, 8, 8), reads=10)
    graph = analyse(found)
    assert units(graph, "w2", 1) == [*units(graph, "w1", 0), None, None]
    assert_exact(found)


def test_concat_along_another_axis_ties_its_inputs() -> None:
    found = between_convs("b = Conv(x, v)  m = Concat<axis=2>(a, b)", v=(8, 3, 1, 1))
    assert_coupled(analyse(found), ("w1", 0), ("v", 0), ("w2", 1))
    assert_exact(found)


def test_class_token_is_cut_with_the_channels_it_joins() -> None:
    found = between_matmuls("m = Concat<axis=1>(k, a)", k=(2, 1, 8))
    assert_coupled(analyse(found), ("w1", 1), ("k", 2), ("w2", 0))
    assert_exact(found)


def test_concat_with_data_that_cannot_be_cut_freezes_what_it_joins() -> None:
    text = """g (float[2,6,3] x, float[2,1,8] k) => (float[2,7,4] y) {
        a = MatMul(x, w1)  m = Concat<axis=1>(k, a)  y = MatMul(m, w2)}"""
    found = model(text, w1=(3, 8), w2=(8, 4))
    assert_frozen(found, "w1", "Concat 'm'", "is joined to input 'k'", "interface")


def test_input_joined_twice_is_cut_in_both_places() -> None:
    found = between_convs("m = Concat<axis=1>(a, a)", reads=16)
    graph = analyse(found)
    assert units(graph, "w2", 1) == units(graph, "w1", 0) * 2
    assert_exact(found)


@pytest.mark.parametrize(
    ("middle", "reads"),
    [
        ("s = Reshape(a, g1) c = Concat<axis=2>(s, t) m = Reshape(c, m1)", 24),
        ("s = Reshape(a, g2) e = Expand(s, h) c = Concat<axis=1>(e, t) m = Reshape(c, m2)", 16),
    ],
    ids=["along the rows", "along another axis"],
)
def test_channels_joined_to_a_grid_tie_its_rows(middle: str, reads: int) -> None:
    h = [2, 6, 2, 8] if reads == 24 else [2, 6, 8, 2]
    shapes = {"h": h, "g1": [2, 6, 1, 8], "g2": [2, 6, 8, 1]}
    shapes |= {"m1": [2, 6, 24], "m2": [2, 12, 16]}
    arrays = {name: np.array(shape) for name, shape in shapes.items()}
    found = between_matmuls(
        f"b = MatMul(x, v) t = Reshape(b, h) {middle}", reads=reads, v=(3, 16), **arrays
    )
    group = analyse(found).groups[0]
    assert group.size == 8
    assert group.producers[0].unit.tolist() == list(range(8))
    rows = group.producers[1].unit
    assert rows.tolist() == (list(range(8)) * 2 if reads == 24 else [n // 2 for n in range(16)])
    assert_exact(found, some=False)


@pytest.mark.parametrize(
    ("middle", "shape"),
    [
        ("m = Concat<axis=1>(a, z)", [2, 6, 8]),
        ("r = Reshape(a, s) j = Concat<axis=1>(r, z) m = Reshape(j, back)", [2, 6, 2, 4]),
    ],
    ids=["channels", "grid"],
)
def test_channels_joined_to_a_constant_that_no_rule_follows_stay(
    middle: str, shape: list[int]
) -> None:
    shapes = {"s": np.array(shape), "back": np.array([2, 12, 8])}
    found = between_matmuls(
        f"k = Trilu(c) z = Expand(k, s) {middle}", c=(6, 8) if len(shape) == 3 else (2, 4), **shapes
    )
    assert_frozen(overridable(found, "c"), "w1", "is joined to a constant that stays")


def test_cache_that_is_written_into_goes_with_what_is_written() -> None:
    middle = (
        "s = Unsqueeze(a, one) t = TensorScatter(cache, s, at) m = ReduceSum<keepdims=0>(t, two)"
    )
    places = {"one": np.array([1]), "two": np.array([2]), "at": np.array([1, 0])}
    found = between_matmuls(middle, opset=24, cache=(2, 1, 7, 8), **places)
    assert_coupled(analyse(found), ("w1", 1), ("cache", 3), ("w2", 0))
    assert_exact(found)


def test_cache_that_the_interface_keeps_freezes_what_is_written() -> None:
    text = """g (float[2,6,3] x, float[2,7,8] cache) => (float[2,7,4] y) {
        a = MatMul(x, w1)  t = TensorScatter(cache, a, at)  y = MatMul(t, w2)}"""
    found = model(text, opset=24, w1=(3, 8), w2=(8, 4), at=np.array([1, 0]))
    assert_frozen(found, "w1", "TensorScatter 't' meets input 'cache', whose shape is the model's")
