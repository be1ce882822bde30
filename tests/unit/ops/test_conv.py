from __future__ import annotations

import pytest

from onnxprune.analyse import analyse
from tests.unit.ops.models import (
    assert_coupled,
    assert_exact,
    assert_frozen,
    attribute,
    between_convs,
    halved,
    model,
    units,
)


def test_conv_makes_axis_0_of_its_weight_and_reads_axis_1() -> None:
    found = between_convs("m = Relu(a)")
    assert_coupled(analyse(found), ("w1", 0), ("b1", 0), ("w2", 1))
    assert_exact(found)


def test_conv_input_that_is_a_graph_input_stays() -> None:
    graph = analyse(between_convs("m = Relu(a)"))
    assert units(graph, "w1", 1) == [None] * 3
    assert units(graph, "w2", 0) == [None] * 4


def test_depthwise_conv_ties_input_to_output_channels_and_follows_with_its_group() -> None:
    found = between_convs("m = Conv<group=8, pads=[1,1,1,1]>(a, d, e)", d=(8, 1, 3, 3), e=(8,))
    assert_coupled(analyse(found), ("w1", 0), ("d", 0), ("e", 0), ("w2", 1))
    assert attribute(halved(found)["m"], "group") == 4
    assert_exact(found)


def test_depthwise_conv_with_multiplier_takes_all_outputs_of_a_channel() -> None:
    found = between_convs("m = Conv<group=8>(a, d)", d=(16, 1, 1, 1), reads=16)
    graph = analyse(found)
    made = units(graph, "w1", 0)
    assert units(graph, "d", 0) == [unit for unit in made for _ in range(2)]
    assert_exact(found)


def test_grouped_conv_keeps_equal_counts_in_every_group() -> None:
    found = between_convs("m = Conv<group=2>(a, d)", d=(12, 4, 1, 1), reads=12)
    graph = analyse(found)
    assert units(graph, "d", 0) == units(graph, "w2", 1)
    assert [[len(cell) for cell in group.cells] for group in graph.prunable] == [[4, 4], [6, 6]]
    assert attribute(halved(found)["m"], "group") == 2
    assert_exact(found)


def test_conv_with_a_weight_computed_at_run_time_freezes_its_input() -> None:
    text = """g (float[2,3,8,8] x, float[4,8,1,1] w) => (float[2,4,8,8] y, float[2,5,8,8] z) {
        a = Conv(x, w1)  y = Conv(a, w)  z = Conv(a, w2)}"""
    found = model(text, w1=(8, 3, 1, 1), w2=(5, 8, 1, 1))
    assert_frozen(found, "w1", "Conv 'y'", "computed at run time")


def test_conv_that_slides_over_what_were_channels_freezes_them() -> None:
    middle = "t = Transpose<perm=[0,2,1,3]>(a)  m = Conv<pads=[1,1,1,1]>(t, d)"
    found = between_convs(middle, d=(8, 8, 3, 3))
    assert_frozen(found, "w1", "slides over an axis")


def test_convolution_over_one_axis_and_over_three_cut_alike() -> None:
    for space, kernel in (("8", 1), ("4,4,4", 3)):
        text = f"""g (float[2,3,{space}] x) => (float[n,c,{"w" if kernel == 1 else "d,h,w"}] y) {{
            a = Conv(x, w1)  m = Relu(a)  y = Conv(m, w2)}}"""
        ones = (1,) * kernel
        found = model(text, w1=(8, 3, *ones), w2=(4, 8, *ones))
        assert_coupled(analyse(found), ("w1", 0), ("w2", 1))
        assert_exact(found)


@pytest.mark.parametrize("bias", ["", ", e"])
def test_transposed_conv_reads_axis_0_and_makes_axis_1(bias: str) -> None:
    found = between_convs(f"m = ConvTranspose<strides=[2,2]>(a, d{bias})", d=(8, 6, 2, 2), e=(6,),
                          reads=6)  # fmt: skip
    graph = analyse(found)
    assert_coupled(graph, ("w1", 0), ("d", 0))
    assert_coupled(graph, ("d", 1), ("w2", 1), *([("e", 0)] if bias else []))
    assert_exact(found)


def test_depthwise_transposed_conv_ties_input_to_output_channels() -> None:
    found = between_convs("m = ConvTranspose<group=8>(a, d)", d=(8, 1, 2, 2))
    assert_coupled(analyse(found), ("w1", 0), ("d", 0), ("w2", 1))
    assert attribute(halved(found)["m"], "group") == 4
    assert_exact(found)


def test_grouped_transposed_conv_keeps_equal_counts_in_every_group() -> None:
    found = between_convs("m = ConvTranspose<group=2>(a, d)", d=(8, 3, 1, 1), reads=6)
    assert attribute(halved(found)["m"], "group") == 2
    assert_exact(found)
