"""Constructs that few networks have: each is cut exactly, or stays for a reason that names it."""

# ruff: noqa: E501  (models are written as ONNX text)

from __future__ import annotations

import sys

import numpy as np
import onnx
import pytest

from onnxprune import fields, slots
from onnxprune.analyse import analyse
from onnxprune.model import Model
from onnxprune.rewrite import operate
from tests.oracle import plan_at
from tests.unit.ops.models import (
    assert_coupled,
    assert_exact,
    assert_frozen,
    attribute,
    between_convs,
    between_matmuls,
    halved,
    model,
    reason,
    units,
)

INTS = {
    "two": np.array([2]), "four": np.array([4]), "free": np.array([-1]), "zero": np.array([0]),
    "at1": np.array([1]), "at2": np.array([2]), "at3": np.array([3]), "at4": np.array([4]),
}  # fmt: skip


def used(text: str) -> dict[str, np.ndarray]:
    """The small integer constants that a model's text mentions."""
    return {name: array for name, array in INTS.items() if name in text}


def test_shuffle_whose_shapes_are_computed_within_is_written_as_one_selection() -> None:
    middle = """sa = Shape(a) n = Gather(sa, zero) h = Gather(sa, at2) w = Gather(sa, at3)
        t = Concat<axis=0>(n, two, four, h, w) r = Reshape(a, t)
        p = Transpose<perm=[0,2,1,3,4]>(r) sp = Shape(p) b = Gather(sp, zero) k = Gather(sp, at3)
        l = Gather(sp, at4) u = Concat<axis=0>(b, free, k, l) m = Reshape(p, u)"""
    found = between_convs(middle, **used(middle))
    graph = analyse(found)
    assert len(graph.tracer.runs) == 1
    assert [cell.size for cell in graph.prunable[0].cells] == [8]
    assert "Transpose" not in {node.op_type for node in halved(found).values()}
    assert_exact(found)


def test_shuffle_whose_inner_shape_is_read_elsewhere_keeps_its_rows() -> None:
    middle = """g = Constant<value = int64[5] {2, 2, 4, 8, 8}>() r = Reshape(a, g)
        p = Transpose<perm=[0,2,1,3,4]>(r) sp = Shape(p) f = Cast<to=1>(sp) q = ReduceMax<keepdims=0>(f)
        back = Constant<value = int64[4] {2, 8, 8, 8}>() s = Reshape(p, back) m = Div(s, q)"""
    found = between_convs(middle)
    assert not analyse(found).tracer.runs
    assert_exact(found, some=False)


def test_constant_shown_through_a_cast_to_two_layers_is_cut_for_each() -> None:
    text = """g (float[2,3,4,4] x) => (float[n,c,h,w] y) {
        b = Cast<to=1>(bias) a = Conv(x, w1, b) r = Relu(a) d = Conv(r, w2, b) e = Relu(d)
        y = Conv(e, w3)}"""
    bias = np.linspace(-1, 1, 8).astype(np.float16)
    found = model(text, bias=bias, w1=(8, 3, 1, 1), w2=(8, 8, 1, 1), w3=(2, 8, 1, 1))
    graph = analyse(found)
    assert units(graph, "w1", 0) != units(graph, "w2", 0)
    assert_exact(found)


@pytest.mark.parametrize("step", [2, -1])
def test_strided_slice_over_channels_becomes_a_selection(step: int) -> None:
    ends = {2: 8, -1: -9}[step]
    starts = {2: 0, -1: -1}[step]
    constants = {"s": np.array([starts]), "e": np.array([ends]), "k": np.array([step])}
    middle = "m = Slice(a, s, e, at1, k)"
    found = between_convs(middle, reads=8 // abs(step), **constants, **used(middle))
    assert_exact(found)


def test_slice_of_opset_9_follows_in_its_attributes() -> None:
    middle = "m = Slice<axes=[1], starts=[2], ends=[8]>(a)"
    found = between_convs(middle, opset=9, reads=6)
    assert_exact(found)
    assert halved(found)["m"].op_type == "Slice"


def test_gather_by_an_index_computed_from_shapes_is_renumbered() -> None:
    middle = """sa = Shape(a) c = Gather(sa, at1) z = Constant<value_int=0>() one = Constant<value_int=1>()
        q = Squeeze(c) i = Range(z, q, one) m = Gather<axis=1>(a, i)"""
    assert_exact(between_convs(middle, **used(middle)))


def test_convolution_with_a_weight_computed_at_run_time_freezes_its_input() -> None:
    middle = (
        "p = GlobalAveragePool(a) r = Reshape(p, s) t = Slice(r, zero, at1, zero) m = Conv(a, t)"
    )
    constants = {"s": np.array([2, 8, 1, 1]), **used(middle)}
    assert_frozen(between_convs(middle, reads=1, **constants), "w1", "computed at run time", "m")


def test_transposed_convolution_with_a_weight_computed_at_run_time_freezes_its_input() -> None:
    middle = "p = GlobalAveragePool(a) t = Reshape(p, s) m = ConvTranspose(a, t)"
    found = between_convs(middle, reads=2, s=np.array([8, 2, 1, 1]))
    assert_frozen(found, "w1", "computed at run time", "m")


def test_grouped_convolutions_on_the_input_make_channels_that_may_go() -> None:
    text = """g (float[1,4,4,4] x) => (float[n,c,h,w] y) {
        a = Conv<group=2>(x, w1) b = ConvTranspose<group=2>(x, w3) s = Add(a, b) r = Relu(s)
        y = Conv(r, w2)}"""
    found = model(text, w1=(8, 2, 1, 1), w3=(4, 4, 1, 1), w2=(3, 8, 1, 1))
    assert units(analyse(found), "w1", 1) == [None, None]
    assert_exact(found)


def test_transposed_convolution_in_whole_groups_follows_a_group_normalization() -> None:
    middle = "n = GroupNormalization<num_groups=4>(a, s, t) m = ConvTranspose<group=4>(n, d)"
    found = between_convs(middle, s=(8,), t=(8,), d=(8, 2, 1, 1))
    assert attribute(halved(found)["m"], "group") == 2
    assert_exact(found)


def test_convolution_in_whole_groups_follows_a_group_normalization() -> None:
    middle = "n = GroupNormalization<num_groups=4>(a, s, t) m = Conv<group=4>(n, d)"
    found = between_convs(middle, s=(8,), t=(8,), d=(8, 2, 1, 1))
    assert attribute(halved(found)["m"], "group") == 2
    assert_exact(found)


def test_convolution_over_channels_as_space_freezes_them() -> None:
    middle = """p = GlobalAveragePool(a) s = Squeeze(p, at3) t = Transpose<perm=[0,2,1]>(s)
        c = Conv<pads=[1,1]>(t, k) u = Transpose<perm=[0,2,1]>(c) e = Unsqueeze(u, at3) m = Mul(a, e)"""
    found = between_convs(middle, k=(1, 1, 3), **used(middle))
    assert_frozen(found, "w1", "slides over an axis", "c")


def test_grid_meeting_data_on_one_axis_keeps_that_axis() -> None:
    middle = """r = Reshape(a, g) q = ReduceMean<keepdims=1>(x, ax) z = Expand(q, full) e = Mul(r, z)
        m = Reshape(e, back)"""
    constants = {
        "g": np.array([2, 2, 4, 8, 8]), "ax": np.array([1, 2, 3]),
        "full": np.array([2, 2, 1, 1, 1]), "back": np.array([2, 8, 8, 8]),
    }  # fmt: skip
    text = middle.replace("x, ax)", "x, ax) q5 = Unsqueeze(q, at4)").replace(
        "(q, full)", "(q5, full)"
    )
    assert_exact(between_convs(text, **constants, **used(text)), some=False)


def test_channels_joined_to_a_grid_of_constants_take_its_elements_along() -> None:
    middle = "r = Reshape(a, g) c = Concat<axis=1>(r, k) m = Reshape(c, back)"
    constants = {
        "g": np.array([6, 1, 2, 4]), "k": np.ones((6, 1, 2, 4), np.float32),
        "back": np.array([12, 8]),
    }  # fmt: skip
    head, tail = "g (float[6,3] x) => (float[n,c] y) {a = MatMul(x, w1) ", " y = MatMul(m, w2)}"
    text = head + middle + tail
    assert_exact(model(text, w1=(3, 8), w2=(8, 4), **constants), some=False)


@pytest.mark.parametrize("operator", ["RandomNormalLike", "RandomUniformLike", "EyeLike"])
def test_data_made_of_a_tensors_shape_freezes_it(operator: str) -> None:
    text = f"""g (float[4,3] x) => (float[n,c] y) {{
        a = MatMul(x, w1) r = {operator}(a) s = Sub(r, r) m = Add(a, s) y = MatMul(m, w2)}}"""
    assert_frozen(model(text, w1=(3, 8), w2=(8, 2)), "w1", operator)


def test_weight_quantized_in_blocks_stays() -> None:
    stored = np.random.default_rng(0).integers(-9, 9, (8, 4)).astype(np.int8)
    scales = np.full((4, 4), 0.1, np.float32)
    middle = "q = DequantizeLinear<axis=0, block_size=2>(k, s) m = MatMul(a, q)"
    found = between_matmuls(middle, reads=4, k=stored, s=scales)
    graph = analyse(found)
    assert units(graph, "w1", 1) == [None] * 8
    assert_exact(found, some=False)


def test_reshape_by_a_target_that_is_an_input_freezes_the_channels() -> None:
    text = """g (float[2,3,4,4] x, int64[2] t) => (float[n,c] y) {
        a = Conv(x, w1) r = Reshape(a, t) y = Relu(r)}"""
    found = model(text, w1=(8, 3, 1, 1))
    graph = analyse(found, input_shapes={})
    assert all(group.frozen for group in graph.groups)


def test_number_of_channels_used_as_data_keeps_its_value() -> None:
    middle = """sa = Shape(a) c = Gather(sa, at1) f = Cast<to=1>(c) q = Sqrt(f) d = Div(a, q) m = Relu(d)"""
    found = between_convs(middle, **used(middle))
    assert_coupled(analyse(found), ("w1", 0), ("w2", 1))
    assert_exact(found)


def test_new_names_never_meet_old_ones() -> None:
    found = between_convs("i = Shape(a) m = Slice(a, s, e, at1, k)", reads=4,
                          s=np.array([0]), e=np.array([8]), k=np.array([2]), at1=np.array([1]))  # fmt: skip
    found.proto.graph.node[1].name = "m_picked"
    found.proto.graph.node[0].output[0] = "a"
    names = [o for node in halved(found).values() for o in node.output]
    assert len(names) == len(set(names))
    assert isinstance(found.proto, onnx.ModelProto)


def test_graph_is_shown_as_a_table_with_the_reason_for_what_stays() -> None:
    assert str(analyse(between_convs("m = Relu(a)"))).splitlines() == [
        "group   size  unit     producers -> consumers",
        "    0      8  channel  w1 -> w2",
        "    1      4  channel  w2 frozen: reaches output 'y' through Conv 'y'",
    ]


def test_rows_that_lose_unequal_numbers_do_not_form_a_box() -> None:
    array = np.arange(4).reshape(2, 2)
    unequal = fields.Dead(np.array([[True, False], [False, False]]))
    assert not fields.rectangular(unequal)
    with pytest.raises(ValueError, match="survivors do not form a box"):
        fields.compact(array, unequal)
    assert fields.compact(array, fields.Dead(~np.eye(2, dtype=np.bool_))).tolist() == [[0], [3]]


def test_columns_that_lose_equal_numbers_shrink_where_rows_do_not() -> None:
    dead = np.array([[1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], np.bool_)
    left = fields.compact(np.arange(12).reshape(3, 4), fields.Dead(dead))
    assert left.tolist() == [[4, 5, 2, 3], [8, 9, 10, 7]]


def test_wide_grid_whose_rows_leave_two_axes_open_is_cut_along_one_of_them() -> None:
    text = """g (float[6,3] x, float[6,2,1,1] z) => (float[n,c] y) {a = MatMul(x, w1)
        r = Reshape(a, s) e = Mul(r, z) m = Reshape(e, b) y = MatMul(m, w2)}"""
    shapes = {"s": np.array([6, 2, 4, 8]), "b": np.array([6, 64])}
    found = model(text, w1=(3, 64), w2=(64, 4), **shapes)
    graph = analyse(found)
    assert units(graph, "w1", 1) == [(0, n) for n in range(64)]
    assert not graph.notes
    assert_exact(found)


def test_two_cuts_on_one_axis_that_leave_no_box_together_freeze_the_channels() -> None:
    middle = """u = Unsqueeze(a, at3) v = Unsqueeze(a, at2) p = Mul(u, v) r = Reshape(p, s)
        m = Gather<axis=2>(r, d)"""
    constants = {"s": np.array([2, 6, 64]), "d": np.arange(8) * 9}
    found = between_matmuls(middle, **constants, **used(middle))
    assert_frozen(found, "w1", "'r' would put its channels out of order")


def test_channels_of_nothing_pass_no_labels_on() -> None:
    middle = """z = Slice(a, s, s, at2) u = Flatten(z) w = ReduceSum<keepdims=1>(u) q = Unsqueeze(w, at2)
        k = Unsqueeze(q, at3) m = Add(a, k)"""
    found = between_convs(middle, s=np.array([0]), **used(middle))
    assert_coupled(analyse(found), ("w1", 0), ("w2", 1))
    assert_exact(found)


@pytest.mark.parametrize("most", [7, 10])
def test_constant_with_too_many_elements_freezes_the_grid_it_meets(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "_MOST_ELEMENT_SLOTS", most)
    middle = "r = Reshape(a, s) e = Add(r, k) m = Reshape(e, back)"
    shapes = {"s": np.array([2, 6, 2, 4]), "back": np.array([2, 6, 8])}
    found = between_matmuls(middle, k=(6, 2, 4), **shapes)
    graph = analyse(found)
    why = {7: "no group", 10: "Add 'e' meets a constant that cannot be cut (tensor 'k')"}
    assert reason(graph, "w1") == why[most]
    assert units(graph, "w2", 0) == [None] * 8
    assert_exact(found, some=False)


def test_range_of_a_constant_that_nobody_knows_freezes_what_it_meets() -> None:
    middle = "j = Slice(k, zero, o) i = Cast<to=7>(j) t = Slice(c, i, e, zero) m = Add(a, t)"
    many = np.ones(65, np.float32)  # too many to follow
    constants = {"k": many, "e": np.array([9]), "o": np.array([1]), **used("zero")}
    found = between_matmuls(middle, c=(9,), **constants)
    assert_frozen(found, "w1", "Add 'm' meets a constant that cannot be cut (tensor 't')")


STORED = np.random.default_rng(0).integers(-99, 99, (8, 4)).astype(np.int8)
SCALE = {"s": np.array(0.02, np.float32), "z": np.array(3, np.int8)}


def test_quantized_weight_seen_transposed_is_masked_in_the_twin() -> None:
    text = """g (float[2,6,3] x) => (float[n,t,c] y) {
        a = MatMul(x, w1) k = Transpose(q) d = DequantizeLinear(k, s, z) y = MatMul(a, d)}"""
    found = model(text, w1=(3, 8), q=STORED.T.copy(), **SCALE)
    assert units(analyse(found), "q", 1) == [(0, n) for n in range(8)]
    assert_exact(found)


def test_computed_weight_that_is_read_along_both_axes_is_masked_on_both() -> None:
    text = """g (float[6,3] x) => (float[n,c] y) {a = MatMul(x, w1) k = Add(w, c) h = Gemm(a, k)
        e = Gemm<transB=1>(h, k) r = Relu(e) y = MatMul(r, w2)}"""
    found = model(text, w1=(3, 8), w=(8, 8), c=(8, 8), w2=(8, 4))
    graph = analyse(found)
    assert [group.size for group in graph.prunable] == [8, 8]
    assert_exact(found)


def test_quantized_weight_whose_zero_point_is_an_input_is_cut() -> None:
    text = """g (float[2,6,3] x, int8 z) => (float[n,t,c] y) {
        a = MatMul(x, w1) d = DequantizeLinear(q, s, z) y = MatMul(a, d)}"""
    found = model(text, w1=(3, 8), q=STORED, s=SCALE["s"])
    surgery = operate(plan_at(analyse(found), 0.5))
    assert surgery.model.weights()["q"].shape == (4, 4)
    assert_exact(found)


def test_grouped_convolution_on_the_input_whose_channels_are_one_norm_group_keeps_them() -> None:
    text = """g (float[2,4,6,6] x) => (float[n,c,h,w] y) {
        a = Conv<group=2>(x, w1) e = GroupNormalization<num_groups=1>(a, s, t) y = Conv(e, w2)}"""
    found = model(text, w1=(8, 2, 1, 1), s=(8,), t=(8,), w2=(4, 8, 1, 1))
    assert_frozen(found, "w1", "Conv 'a' turns one channel into content")


def two_cuts() -> Model:
    """Channels of a row times other channels, of which some products are taken."""
    text = """g (float[6,3] x) => (float[n,c] y, float[n,d] z) {
        a = MatMul(x, w1) b = MatMul(x, w2) y = MatMul(a, v1) z = MatMul(b, v2)
        g = Reshape(a, s) u = Unsqueeze(g, at3) t = Unsqueeze(b, at) p = Mul(u, t) r = Reshape(p, w)
        m = Gather<axis=2>(r, d)}"""
    taken = [0, 9, 21, 26, 38, 47]  # of 6 channels of a row, each with one of 8
    numbers = {"s": [6, 2, 6], "at": [1, 2], "w": [6, 2, 48], "d": taken, "at3": [3]}
    arrays = {name: np.array(values) for name, values in numbers.items()}
    return model(text, w1=(3, 12), w2=(3, 8), v1=(12, 4), v2=(8, 4), **arrays)


def test_grids_that_still_misfit_after_the_last_repair_are_frozen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys.modules[analyse.__module__], "_MOST_REPAIRS", 1)
    found = two_cuts()
    for weight in ("w1", "w2"):
        assert_frozen(found, weight, "'r' does not keep its order")


def test_two_cuts_that_leave_rows_of_unequal_length_together_share_rows_and_then_stay() -> None:
    found = two_cuts()
    notes = analyse(found).notes
    assert notes[0] == "'m': every row keeps the same channels"
    assert len(set(notes)) == len(notes)
    for weight in ("w1", "w2"):
        assert_frozen(found, weight, "'r' would put its channels out of order")
