from __future__ import annotations

from onnxprune.analyse import analyse
from tests.unit.ops.models import (
    assert_coupled,
    assert_exact,
    assert_frozen,
    between_convs,
    between_matmuls,
    model,
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
    assert_frozen(found, "w1", "Concat 'm'", "is joined to data that stays")


def test_input_joined_twice_is_cut_in_both_places() -> None:
    found = between_convs("m = Concat<axis=1>(a, a)", reads=16)
    graph = analyse(found)
    assert units(graph, "w2", 1) == units(graph, "w1", 0) * 2
    assert_exact(found)
