from __future__ import annotations

import numpy as np
import onnx
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
    overridable,
    reason,
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


def test_transposed_conv_to_one_channel_reads_what_may_go() -> None:
    found = between_convs("m = ConvTranspose(a, d)", d=(8, 1, 1, 1), reads=1)
    assert_coupled(analyse(found), ("w1", 0), ("d", 0))
    assert_exact(found)


@pytest.mark.parametrize(
    ("operator", "group", "shape", "why"),
    [
        ("Conv", 1, (2, 8, 3, 3), "reads it with a weight that cannot be cut (tensor 'k')"),
        ("Conv", 2, (4, 4, 3, 3), "ties it to what stays"),
        ("Conv", 8, (8, 1, 3, 3), "ties it to what stays"),
        ("ConvTranspose", 1, (8, 3, 3, 3), "reads it with a weight that cannot be cut"),
        ("ConvTranspose", 2, (8, 3, 3, 3), "ties it to what stays"),
        ("ConvTranspose", 8, (8, 3, 3, 3), "ties it to what stays"),
    ],
)
def test_convolution_with_a_weight_that_no_rule_follows_freezes_what_it_reads(
    operator: str, group: int, shape: tuple[int, ...], why: str
) -> None:
    reads = shape[0] if operator == "Conv" else shape[1] * group
    middle = f"k = Trilu(d) m = {operator}<group={group}>(a, k)"
    found = overridable(between_convs(middle, d=shape, reads=reads), "d")
    assert_frozen(found, "w1", why)


def test_depthwise_conv_of_a_graph_input_keeps_its_filters() -> None:
    text = "g (float[2,8,4,4] x) => (float[n,c,h,w] y) {d = Conv<group=8>(x, k) y = Conv(d, w2)}"
    found = model(text, k=(8, 1, 3, 3), w2=(4, 8, 1, 1))
    graph = analyse(found)
    assert units(graph, "k", 0) == units(graph, "w2", 1) == [None] * 8
    assert_exact(found, some=False)


def test_grouped_conv_with_one_output_for_each_group_keeps_its_outputs() -> None:
    found = between_convs("m = Conv<group=2>(a, k)", k=(2, 4, 1, 1), reads=2)
    graph = analyse(found)
    assert units(graph, "w1", 0) == [(0, unit) for unit in range(8)]
    assert [cell.size for cell in graph.prunable[0].cells] == [4, 4]
    assert_frozen(found, "k", "every row must keep its only channel")
    assert_exact(found)


def test_grouped_convs_with_a_shuffle_between_keep_the_same_channels_in_every_group() -> None:
    middle = """n = Conv<group=2>(a, k) r = Reshape(n, s) t = Transpose<perm=[0,2,1,3,4]>(r)
        u = Reshape(t, back) c = Relu(u) m = Conv<group=2>(c, l)"""
    shapes = {"s": np.array([2, 2, 2, 8, 8]), "back": np.array([2, 4, 8, 8])}
    found = between_convs(middle, reads=4, k=(4, 4, 1, 1), l=(4, 2, 1, 1), **shapes)
    graph = analyse(found)
    assert units(graph, "k", 0) == [(1, 0), (1, 1), (1, 0), (1, 1)]
    assert units(graph, "l", 0) == [(1, 0), (1, 0), (1, 1), (1, 1)]
    assert graph.notes == ("crossing rows: every row keeps the same channels",)
    assert_exact(found)


def test_two_and_three_groups_on_one_stream_of_six_leave_equal_counts_in_every_group() -> None:
    """Rows of 2 + 1 and of 1 + 1 + 1 cells: what goes by the size of a cell differs."""
    middle = "d = Conv<group=2>(a, u) m = Conv<group=3>(d, v)"
    found = between_convs(middle, reads=12, u=(6, 4, 1, 1), v=(12, 2, 1, 1))
    assert_exact(found)


@pytest.mark.parametrize("group", [1, 2])
def test_conv_that_reads_a_product_of_two_cuts_lets_one_of_them_go(group: int) -> None:
    """Heads of queries that share their keys: whole heads go, or dimensions, not both."""
    middle = """b = Conv(x, w3) p = Reshape(a, s1) q = Reshape(b, s2) o = Mul(p, q)
        m = Reshape(o, s3)"""
    shapes = {"s1": [2, 8, 1, 8, 8], "s2": [2, 1, 6, 8, 8], "s3": [2, 48, 8, 8]}
    given = {name: np.array(shape) for name, shape in shapes.items()}
    found = between_convs(middle, reads=48 // group, w3=(6, 3, 1, 1), **given)
    if group > 1:
        found.proto.graph.node[-1].attribute.append(onnx.helper.make_attribute("group", group))
    graph = analyse(found)
    assert [group.name for group in graph.prunable] == ["w1"]
    assert "reads channels that two cuts share" in reason(graph, "w3")
    assert_exact(found)
