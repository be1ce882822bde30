"""What is written: constants that part, nodes that are shared, names, notes and sparse tensors."""

# ruff: noqa: E501  (models are written as ONNX text)

from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnxprune.analyse import analyse
from onnxprune.errors import InvariantError
from onnxprune.rewrite import Surgery, operate, rewrite
from onnxprune.select import PruningPlan
from tests.oracle import assert_equals_masked_twin, plan_at
from tests.small import conv_chain
from tests.unit.ops.models import (
    assert_exact,
    assert_frozen,
    between_convs,
    model,
    shapes,
    units,
    without,
)

TWO_LAYERS = """g (float[2,3,4,4] x) => (float[n,c,h,w] y) {
    %s a = Conv(x, w1, b) r = Relu(a) d = Conv(r, w2, b) e = Relu(d) y = Conv(e, w3)}"""
WEIGHTS = {"w1": (8, 3, 1, 1), "w2": (8, 8, 1, 1), "w3": (2, 8, 1, 1)}


def operators(surgery: Surgery) -> list[str]:
    return [node.op_type for node in surgery.model.proto.graph.node]


@pytest.mark.parametrize("ir_version", [3, 10])
@pytest.mark.parametrize("stored", ["initializer", "node"])
def test_bias_of_two_layers_parts_where_one_of_them_is_cut(ir_version: int, stored: str) -> None:
    node = "b = Constant<value = float[8] {1,-1,2,0.5,3,1,-2,1}>()" if stored == "node" else ""
    bias = {} if node else {"b": (8,)}
    found = model(TWO_LAYERS % node, ir_version=ir_version, opset=11, **WEIGHTS, **bias)
    surgery = without(found, "w1")
    assert shapes(surgery)["b"] == (5,)
    assert shapes(surgery)["b__2"] == (8,)
    constants = {("node", 3): 2, ("node", 10): 2, ("initializer", 3): 1}
    assert operators(surgery).count("Constant") == constants.get((stored, ir_version), 0)
    assert_exact(found)


def test_node_that_shows_a_bias_to_two_layers_is_written_once_if_both_stay() -> None:
    text = TWO_LAYERS.replace("y = Conv(e, w3)", "f = Conv(e, w3) y = Conv(f, w4)")
    bias = np.linspace(-1, 1, 8).astype(np.float16)
    weights = {**WEIGHTS, "w3": (8, 8, 1, 1), "w4": (2, 8, 1, 1)}
    found = model(text % "b = Cast<to=1>(k)", k=bias, **weights)
    assert operators(without(found, "w3")).count("Cast") == 1
    assert operators(without(found, "w1")).count("Cast") == 2


@pytest.mark.parametrize(("cut", "told"), [("w1", "b"), ("w2", "b__2")])
def test_squeeze_of_a_shared_bias_is_told_its_axes_where_one_channel_is_left(
    cut: str, told: str
) -> None:
    small = {"w1": (2, 3, 1, 1), "w2": (2, 2, 1, 1), "w3": (2, 2, 1, 1)}
    found = model(TWO_LAYERS % "b = Squeeze(k)", k=(1, 2, 1), **small)
    surgery = without(found, cut, [0])
    nodes = {n.output[0]: n for n in surgery.model.proto.graph.node if n.op_type == "Squeeze"}
    assert [len(nodes[name].input) for name in ("b", "b__2")] == [
        1 + (told == "b"),
        1 + (told != "b"),
    ]
    assert surgery.model.weights()[nodes[told].input[1]].read().tolist() == [0, 2]


def test_copies_of_a_named_node_have_names_that_nothing_else_has() -> None:
    text = TWO_LAYERS.replace("r = Relu(a) d = Conv(r,", "b__2 = Relu(a) d = Conv(b__2,")
    constants = {"zero": np.array([0]), "end": np.array([8]), "one": np.array([1])}
    found = model(text % "b = Slice(k, zero, end, zero, one)", k=(9,), **constants, **WEIGHTS)
    node = found.proto.graph.node[0]
    node.name, node.input[3] = "shown", ""
    nodes = without(found, "w1").model.proto.graph.node
    slices = {n.name: list(n.output) for n in nodes if n.op_type == "Slice"}
    assert slices == {"shown": ["b"], "shown__3": ["b__3"]}
    assert [n.input[3] for n in nodes if n.op_type == "Slice"] == ["", ""]


def test_new_constant_avoids_the_name_of_a_tensor() -> None:
    middle = "r_shape = Relu(a) sx = Shape(x) t = Add(sx, k) r = Reshape(r_shape, t) m = Relu(r)"
    found = between_convs(middle, k=np.array([0, 5, 0, 0]))
    nodes = operate(plan_at(analyse(found), 0.5)).model.proto.graph.node
    inputs = {node.output[0]: list(node.input) for node in nodes}
    assert inputs["r"] == ["r_shape", "r_shape_2"]
    assert_exact(found)


def test_sparse_constant_becomes_dense_where_it_is_cut_and_stays_sparse_elsewhere() -> None:
    text = """g (float[2,3] x) => (float[n,c] y, float[n,c] z) {
        q = Add(x, t) a = MatMul(q, w1) b = Add(a, s) y = MatMul(b, w2) d = MatMul(x, v) z = Add(d, s)}"""
    found = model(text, w1=(3, 8), w2=(8, 4), v=(3, 8))
    for name, values, places, extent in (("s", [1, -2, 3], [1, 4, 6], 8), ("t", [2], [1], 3)):
        stored = onnx.numpy_helper.from_array(np.array(values, np.float32), name)
        where = onnx.numpy_helper.from_array(np.array(places))
        found.proto.graph.sparse_initializer.append(
            onnx.helper.make_sparse_tensor(stored, where, [extent])
        )
    surgery = without(found, "w1")
    assert surgery.model.weights()["s"].read().tolist() == [0, 0, -2, 3, 0]
    assert surgery.model.weights()["s__2"].read().tolist() == [0, 1, 0, 0, -2, 0, 3, 0]
    assert [t.values.name for t in surgery.model.proto.graph.sparse_initializer] == ["t"]


def test_notes_on_graph_and_weights_are_carried_over() -> None:
    found = conv_chain()
    found.proto.graph.doc_string = "of the graph"
    found.proto.graph.initializer[0].doc_string = "of a weight"
    after = operate(plan_at(analyse(found), 0.5)).model.proto.graph
    assert after.doc_string == "of the graph"
    assert [tensor.doc_string for tensor in after.initializer][:2] == ["of a weight", ""]


def test_shown_constant_that_is_also_an_output_stays() -> None:
    text = (TWO_LAYERS % "b = Identity(k)").replace("w] y)", "w] y, float[k] b)")
    found = model(text, k=(8,), **WEIGHTS)
    assert_frozen(found, "w1", "reaches output 'b' through Identity 'b'")


def test_plan_for_another_model_is_refused() -> None:
    found = conv_chain()
    plan = plan_at(analyse(found), 0.5)
    with pytest.raises(InvariantError, match="the plan was made for another model"):
        rewrite(conv_chain(), plan)
    assert rewrite(found, plan).weights()["w0"].shape == (4, 3, 3, 3)


def test_group_that_a_plan_does_not_name_stays_whole() -> None:
    found = conv_chain()
    graph = analyse(found)
    plan = PruningPlan(graph, {graph.prunable[1].id: np.arange(5)})
    assert rewrite(found, plan).weights()["w0"].shape == (8, 3, 3, 3)
    assert rewrite(found, plan).weights()["w1"].shape == (5, 8, 3, 3)
    assert_equals_masked_twin(found, plan)


IF = """g (float[2,3,8,8] x, bool c) => (float[n,c,h,w] y) {
    a = Conv(x, w1, b) d = Conv(x, w3, b)
    i = If (c) <then_branch = t () => (float[n,c,h,w] p) {p = Add(d, k)},
                else_branch = e () => (float[n,c,h,w] %s) {q = Relu(d)}>
    s = Add(a, k) f = Concat<axis=1>(i, s) y = Conv(f, w2)}"""
IF_WEIGHTS = {
    "w1": (8, 3, 1, 1),
    "w3": (8, 3, 1, 1),
    "b": (8,),
    "k": (8, 1, 1),
    "w2": (4, 16, 1, 1),
}


def test_constant_that_a_branch_reads_is_copied_for_the_layer_that_is_cut() -> None:
    found = model(IF % "q", **IF_WEIGHTS)
    assert_frozen(found, "w3", "'d' is read inside a subgraph of If 'i'")
    surgery = without(found, "w1")
    assert [shapes(surgery)[name] for name in ("k", "k__2", "w2")] == [
        (8, 1, 1),
        (5, 1, 1),
        (4, 13, 1, 1),
    ]


def test_branch_that_hands_on_an_outer_tensor_freezes_it() -> None:
    graph = analyse(model(IF % "d", **IF_WEIGHTS))
    assert units(graph, "w3", 0) == [None] * 8
    assert graph.graph.captured == {"d", "k"}
