"""Shapes and selections after a cut: what is rewritten in place, behind a node, or not at all."""

# ruff: noqa: E501  (models are written as ONNX text)

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from onnxprune.analyse import analyse
from onnxprune.errors import InvariantError
from onnxprune.model import Model
from onnxprune.rewrite import operate
from tests.oracle import assert_equals_masked_twin, assert_rewrites, plan_at, plan_without
from tests.unit.ops.models import (
    assert_exact,
    assert_frozen,
    attribute,
    between_convs,
    halved,
    model,
    reason,
    shapes,
    units,
    unknown,
    without,
)

NUMBERS = {
    "at0": [0], "at1": [1], "at2": [2], "at3": [3], "eight": [8], "free": [-1],
    "split": [2, 2, 4, 8, 8], "back": [2, 8, 8, 8],
}  # fmt: skip
EXTENTS = "sx = Shape(x) n = Gather(sx, at0) h = Gather(sx, at2) w = Gather(sx, at3)"


def used(text: str) -> dict[str, np.ndarray]:
    return {name: np.array(values) for name, values in NUMBERS.items() if name in text}


def dynamic(middle: str, **constants: Any) -> Model:
    text = f"""g (float[n,3,h,w] x) => (float[b,c,p,q] y) {{
        a = Conv(x, w1) {middle} y = Conv(m, w2)}}"""
    return model(text, w1=(8, 3, 1, 1), w2=(4, 8, 1, 1), **constants, **used(middle))


# -- selections ------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", ["", "axes=[0,1], "], ids=["without axes", "with axes"])
def test_range_in_attributes_follows_the_channels_in_front_of_it(axes: str) -> None:
    middle = f"p = Slice<{axes}starts=[0,2], ends=[2,6]>(a) m = Concat<axis=1>(a, p)"
    found = between_convs(middle, opset=9, reads=12)
    graph = analyse(found)
    assert [group.size for group in graph.prunable] == [4, 4]
    surgery = without(found, "w1", [0, 2])  # channels 0 and 6; the slice takes 2 to 5
    node = next(n for n in surgery.model.proto.graph.node if n.op_type == "Slice")
    assert (attribute(node, "starts"), attribute(node, "ends")) == ([0, 1], [2, 5])
    assert_exact(found)


def test_range_without_steps_follows_the_channels_in_front_of_it() -> None:
    middle = "p = Slice(a, s, e, at1) m = Concat<axis=1>(a, p)"
    constants = {"s": np.array([2]), "e": np.array([6])}
    found = between_convs(middle, reads=12, **constants, **used(middle))
    surgery = without(found, "w1", [0, 2])
    assert [surgery.model.weights()[name].read().tolist() for name in "se"] == [[1], [5]]
    assert_exact(found)


def test_gather_of_channels_in_front_of_all_that_go_keeps_its_indices() -> None:
    middle = "p = Gather<axis=1>(a, i) m = Concat<axis=1>(a, p)"
    found = between_convs(middle, reads=10, i=np.array([0, 1]))
    graph = analyse(found)
    assert [group.size for group in graph.prunable] == [2, 6]
    surgery = operate(plan_without(graph, {1: [0, 3, 5]}))
    assert surgery.model.weights()["i"].read().tolist() == [0, 1]
    assert [change for change in surgery.changes if change.what == {"tensor": "i"}] == []
    assert_exact(found)


def test_gather_of_one_group_is_renumbered_past_the_groups_in_front_of_it() -> None:
    middle = """n = GroupNormalization<num_groups=4>(a, s, t) r = Reshape(n, u)
        q = Gather<axis=1>(r, two) w = Reshape(r, back) m = Concat<axis=1>(w, q)"""
    constants = {"two": np.array(2), "u": np.array([2, 4, 2, 8, 8]), **used("back")}
    found = between_convs(middle, s=(8,), t=(8,), reads=10, **constants)
    kept = units(analyse(found), "w1", 0)
    assert kept == [(0, 0), (0, 0), (0, 1), (0, 1), None, None, (0, 2), (0, 2)]
    surgery = without(found, "w1", [0])
    assert surgery.model.weights()["two"].read().tolist() == 1
    assert_exact(found)


def test_shuffle_of_space_is_one_selection_along_space_whatever_channels_go() -> None:
    middle = "r = Reshape(a, s) t = Transpose<perm=[0,1,3,2,4]>(r) m = Reshape(t, back)"
    found = between_convs(middle, s=np.array([2, 8, 2, 4, 8]), **used(middle))
    surgery = without(found, "w1")
    node = next(n for n in surgery.model.proto.graph.node if n.op_type == "Gather")
    assert attribute(node, "axis") == 2
    order = surgery.model.weights()[node.input[1]].read()
    assert order.tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert_exact(found)


# -- shapes that are computed ----------------------------------------------------------------------


@pytest.mark.parametrize("joined", ["t = Add(sx, k)", "s = Add(sx, k) t = Concat<axis=0>(s)"])
def test_one_number_of_a_computed_shape_is_replaced_behind_it(joined: str) -> None:
    middle = f"sx = Shape(x) {joined} r = Reshape(a, t) m = Relu(r)"
    found = between_convs(middle, k=np.array([0, 5, 0, 0]))
    made = halved(found)
    where = made[made["r"].input[1]]
    assert where.op_type == "Where"
    assert where.input[2] == "t"
    assert_exact(found)


def test_product_of_channels_and_space_becomes_free_where_the_size_is() -> None:
    middle = f"""{EXTENTS} ch = Mul(h, eight) t = Concat<axis=0>(n, ch, w) r = Reshape(a, t)
        q = Relu(r) b = Concat<axis=0>(n, eight, h, w) m = Reshape(q, b)"""
    surgery = without(dynamic(middle), "w1")
    shape = {
        node.output[0]: node.input[1]
        for node in surgery.model.proto.graph.node
        if node.op_type == "Reshape"
    }
    parts = {
        node.output[0]: list(node.input)
        for node in surgery.model.proto.graph.node
        if node.op_type == "Concat"
    }
    weights = surgery.model.weights()
    assert weights[parts[shape["r"]][1]].read().tolist() == [-1]
    assert weights[parts[shape["m"]][1]].read().tolist() == [5]
    assert_exact(dynamic(middle))


@pytest.mark.parametrize(
    "middle",
    [
        "s = Size(a) f = Cast<to=1>(s) m = Div(a, f)",
        "sa = Shape(a) s = ReduceProd<keepdims=0>(sa) k = Where(t, s, s) f = Cast<to=1>(k) m = Div(a, f)",
    ],
    ids=["size", "product"],
)
def test_number_of_elements_used_as_data_freezes_the_channels_of_a_dynamic_model(
    middle: str,
) -> None:
    found = dynamic(middle, **({"t": np.array(True)} if "(t," in middle else {}))
    assert_frozen(found, "w1", "'m'")


def test_number_that_cannot_be_computed_after_the_cut_is_written_down() -> None:
    middle = """sa = Shape(a) c = Gather(sa, at1) d = Mul(c, two) i = Sub(k, d) v = Gather(table, i)
        t = Concat<axis=0>(v, free, eight, eight) r = Reshape(a, t) m = Relu(r)"""
    constants = {"two": np.array([2]), "k": np.array([23]), "table": np.array([0] * 7 + [2])}
    found = between_convs(middle, **constants, **used(middle))
    surgery = without(found, "w1")
    nodes = {node.output[0]: node for node in surgery.model.proto.graph.node}
    parts = nodes[nodes["r"].input[1]].input
    assert surgery.model.weights()[parts[0]].read().tolist() == [2]
    assert list(parts[1:]) == ["free", "eight", "eight"]
    assert_exact(found)


def test_shape_arithmetic_of_opset_11_is_followed() -> None:
    middle = """sa = Shape(a) n0 = Gather(sa, i0) n = Unsqueeze<axes=[0]>(n0) h0 = Gather(sa, i2)
        h = Unsqueeze<axes=[0]>(h0) t = Concat<axis=0>(n, eight, h, h) r = Reshape(a, t) m = Relu(r)"""
    constants = {"i0": np.array(0), "i2": np.array(2)}
    found = between_convs(middle, opset=11, **constants, **used(middle))
    assert shapes(without(found, "w1"))["w2"] == (4, 5, 1, 1)
    assert_exact(found)


# -- runs of movements -----------------------------------------------------------------------------


def test_more_movements_than_a_run_holds_make_two_runs() -> None:
    names = [f"t{number}" for number in range(15)]
    steps = (f"{b} = Transpose<perm=[0,1,3,2]>({a})" for a, b in pairwise(names))
    found = between_convs(f"t0 = Relu(a) {' '.join(steps)} m = Relu(t14)")
    runs = analyse(found).tracer.runs
    assert [len(run.nodes) for run in runs.values()] == [12, 2]
    assert [node.op_type for node in halved(found).values()].count("Identity") == 2
    assert_exact(found)


def test_run_ends_at_a_graph_output() -> None:
    text = """g (float[2,3,8,8] x) => (float[n,c,h,w] y, float[i,j,k,l,o] r) {
        a = Conv(x, w1) r = Reshape(a, split) t = Transpose<perm=[0,2,1,3,4]>(r)
        m = Reshape(t, back) y = Conv(m, w2)}"""
    found = model(text, w1=(8, 3, 1, 1), w2=(4, 8, 1, 1), **used(text))
    assert not analyse(found).tracer.runs
    assert_frozen(found, "w1", "reaches output 'r' through Reshape 'r'")


def test_ranges_along_two_axes_are_no_run() -> None:
    middle = "p = Slice(a, s, e, at) m = Slice(p, s, f, at)"
    constants = {"s": [1, 1], "e": [7, 7], "f": [4, 4], "at": [1, 2]}
    arrays = {name: np.array(values) for name, values in constants.items()}
    found = between_convs(middle, reads=3, **arrays)
    graph = analyse(found)
    assert not graph.tracer.runs
    assert [unit is not None for unit in units(graph, "w1", 0)] == [2 <= n <= 4 for n in range(8)]
    assert_exact(found)


def test_reshapes_alone_are_no_run() -> None:
    middle = "p = GlobalAveragePool(a) f = Flatten(p) m = Reshape(f, s)"
    found = between_convs(middle, s=np.array([2, 8, 1, 1]))
    assert not analyse(found).tracer.runs
    assert shapes(without(found, "w1"))["s"] == (4,)
    assert without(found, "w1").model.weights()["s"].read().tolist() == [2, 5, 1, 1]


@pytest.mark.parametrize(
    ("middle", "why"),
    [
        ("q = Slice(p, i, e, at2)", "Slice 'q' moves data in a way that is not known"),
        ("q = Reshape(p, t)", "Reshape 'q' has a tensor of unknown shape ('q')"),
    ],
    ids=["range", "shape"],
)
def test_movement_by_numbers_nobody_knows_ends_a_run(middle: str, why: str) -> None:
    text = f"""g (float[2,3,8,8] x, int64[4] t) => (float[n,c,h,w] y) {{
        a = Conv(x, w1) p = Transpose<perm=[0,1,3,2]>(a) g = Slice(f, z, o) i = Cast<to=7>(g)
        {middle} y = Relu(q)}}"""
    numbers = {"e": np.array([7]), "f": np.ones(65, np.float32)}  # too many to follow
    numbers |= {"z": np.array([0]), "o": np.array([1])}
    graph = analyse(model(text, w1=(8, 3, 1, 1), **numbers, **used(text)))
    assert not graph.tracer.runs
    assert why in reason(graph, "w1")


def test_movements_behind_an_operator_nobody_knows_are_no_run() -> None:
    middle = """z = Neg(x) t = Transpose<perm=[0,1,3,2]>(z) u = Transpose<perm=[0,1,3,2]>(t)
        m = Relu(a)"""
    graph = analyse(unknown(between_convs(middle), "z"))
    assert not graph.tracer.runs
    assert [group.size for group in graph.prunable] == [8]


def test_shape_that_is_read_through_more_arithmetic_than_is_followed_ends_a_run() -> None:
    steps = " ".join(f"s{number + 1} = Add(s{number}, at0)" for number in range(70))
    middle = f"""r = Reshape(a, split) t = Transpose<perm=[0,2,1,3,4]>(r) s0 = Shape(t) {steps}
        b = ReduceProd<keepdims=1>(s70, at0) u = Div(b, k) v = Concat<axis=0>(u, eight, eight, eight)
        m = Reshape(t, v)"""
    found = between_convs(middle, k=np.array([512]), **used(middle))
    graph = analyse(found)
    assert not graph.tracer.runs
    assert units(graph, "w2", 1) == [(0, n // 2) for n in range(8)]
    assert_exact(found)


def test_split_of_which_one_part_is_not_asked_for_stays() -> None:
    found = between_convs("p, m = Split<axis=1>(a, k)", reads=5, k=np.array([3, 5]))
    found.proto.graph.node[1].output[0] = ""
    graph = analyse(found)
    assert "Split 'm' moves data in a way that is not known" in reason(graph, "w1")
    assert units(graph, "w2", 1) == [None] * 5


def test_range_that_has_no_step_after_the_cut_keeps_its_numbers() -> None:
    middle = """sa = Shape(a) c = Gather(sa, one) d = Sub(c, k) i = Range(zero, c, d)
        m = Gather<axis=2>(a, i)"""
    scalars = {"one": np.array(1), "zero": np.array(0), "k": np.array(4)}
    found = between_convs(middle, **scalars)
    graph = analyse(found)
    assert [group.size for group in graph.prunable] == [8]
    surgery = operate(plan_without(graph, {0: [1, 2, 5, 6]}))  # 4 - 4 is no step
    assert [(change.before, change.after) for change in surgery.changes] == [(8, [8]), (4, [4])]
    assert_exact(found)


def test_part_of_nothing_that_is_not_asked_for_leaves_a_split_to_follow_its_channels() -> None:
    found = between_convs("p, m = Split<axis=1>(a, k)", k=np.array([0, 8]))
    found.proto.graph.node[1].output[0] = ""
    plan = plan_at(analyse(found), 0.5)
    weights = assert_rewrites(found, plan).model.weights()
    assert weights["k"].read().tolist() == [0, 4]
    assert weights["w2"].shape == (4, 4, 1, 1)


def test_plan_with_a_number_of_channels_that_no_shape_can_be_written_for_is_refused() -> None:
    middle = """sa = Shape(a) c = Gather(sa, at1) h = Gather(sa, at2) g = Add(h, at1) e = Equal(c, k)
        q = Where(e, g, h) f = Cast<to=1>(q) m = Mul(a, f)"""
    found = dynamic(middle, k=np.array([7]))
    graph = analyse(found)
    assert [group.size for group in graph.prunable] == [8]
    with pytest.raises(InvariantError, match="a shape at 'm' cannot be written"):
        operate(plan_without(graph, {0: [3]}))
    assert_equals_masked_twin(found, plan_without(graph, {0: [3, 4]}))
