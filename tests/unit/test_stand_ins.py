"""Sizes for symbolic dimensions: what the model accepts, and what is known where nothing runs."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnxprune.analyse import analyse
from onnxprune.errors import ModelError
from onnxprune.prepare import prepare
from onnxprune.rewrite import operate
from onnxprune.shapes import environment
from onnxprune.standins import stand_ins
from tests.oracle import assert_rewrites, plan_at
from tests.unit.ops.models import between_convs, model, reason, unknown

IMAGE = "g (float[n,{channels},h,w] x) => (float[n,m,o,p] y) {{a = Conv(x, w1) y = {last}}}"
W1 = {"w1": (8, 3, 1, 1)}


def test_symbolic_channels_are_those_that_the_first_weight_reads() -> None:
    found = model(IMAGE.format(channels="c", last="Relu(a)"), **W1)
    assert stand_ins(found) == ({"x": (1, 3, 64, 96)}, {"x": (3, 3, 224, 224)})


def test_size_that_a_constant_demands_is_found() -> None:
    found = model(IMAGE.format(channels="3", last="Add(a, k)"), k=(1, 8, 224, 224), **W1)
    assert stand_ins(found) == ({"x": (1, 3, 224, 224)}, {"x": (3, 3, 224, 224)})


def test_size_at_which_a_range_has_no_step_is_passed_over() -> None:
    text = """g (float[n,3,h,w] x) => (float[m,c,i,j] y) {a = Conv(x, w1) s = Shape(x)
        e = Gather(s, two) d = Sub(e, k) r = Range(zero, e, d) y = Gather<axis=2>(a, r)}"""
    scalars = {"two": np.array(2), "k": np.array(64), "zero": np.array(0)}
    found = model(text, **scalars, **W1)
    assert stand_ins(found) == ({"x": (1, 3, 96, 160)}, {"x": (3, 3, 224, 224)})


def test_model_that_contradicts_itself_at_every_size_is_refused_with_the_complaint() -> None:
    text = """g (float[n,k,l] x) => (float[n,m,o] y) {
        a = MatMul(x, w1) b = MatMul(a, w2) y = Relu(b)}"""
    found = model(text, w1=(3, 8), w2=(9, 4))
    with pytest.raises(ModelError, match=r"at the first one, b: .*Incompatible dimensions"):
        stand_ins(found)
    errors = environment(prepare(found), {"x": (1, 5, 3)}).errors
    assert [node.label for node, _ in errors] == ["b"]


def test_model_that_the_runtime_takes_at_no_size_is_analysed_at_the_first() -> None:
    found = unknown(model(IMAGE.format(channels="3", last="Neg(a)"), **W1), "y")
    assert stand_ins(found) == ({"x": (1, 3, 64, 96)}, {"x": (3, 3, 224, 224)})


def test_layers_behind_an_operator_nobody_knows_are_cut() -> None:
    text = """g (float[n,3,8,8] x) => (float[n,c,h,w] y) {
        z = Relu(x) q = Relu(w0) b = Conv(z, q) a = Conv(z, w1) r = Relu(a) y = Conv(r, w2)}"""
    found = model(text, w0=(3, 3, 1, 1), w2=(4, 8, 1, 1), **W1)
    graph = analyse(unknown(found, "z", "q"))
    weights = assert_rewrites(found, plan_at(graph, 0.5)).model.weights()
    assert [weights[name].shape for name in ("w0", "w1", "w2")] == [
        (3, 3, 1, 1), (4, 3, 1, 1), (4, 4, 1, 1),
    ]  # fmt: skip


def test_constant_of_a_size_that_was_only_assumed_freezes_what_it_meets() -> None:
    text = """g (float[n,3,8,8] x) => (float[n,c,h,w] y) {
        z = Relu(x) a = Conv(z, w1) s = Add(a, k) r = Relu(s) y = Conv(r, w2)}"""
    found = unknown(model(text, k=(1, 8, 7, 7), w2=(4, 8, 1, 1), **W1), "z")
    assert "Add 's' has a tensor of unknown shape ('s')" in reason(analyse(found), "w1")


def test_shapes_given_to_what_nobody_knows_leave_the_rest_to_be_cut() -> None:
    sizes = {"s": np.array([2, 3, 16, 16]), "e": np.array([2, 3, 8, 8])}
    found = between_convs("z = Relu(x) i = Resize(z, s) j = Expand(z, e) m = Relu(a)", **sizes)
    del found.proto.graph.node[2].input[1:]
    found.proto.graph.node[2].input.extend(["", "", "s"])
    graph = analyse(unknown(found, "z"))
    weights = assert_rewrites(found, plan_at(graph, 0.5)).model.weights()
    assert weights["w2"].shape == (4, 4, 1, 1)
    assert [weights[name].read().tolist() for name in "se"] == [[2, 3, 16, 16], [2, 3, 8, 8]]


def test_input_that_is_given_no_size_has_the_one_that_it_declares() -> None:
    text = "g (float[n,3] x, float[8] k) => (float[a,b] y) {p = MatMul(x, w) y = Add(p, k)}"
    env = environment(prepare(model(text, w=(3, 8))), {"x": (5, 3)})
    assert (env.shape("k"), env.shape("y")) == ((8,), (5, 8))


def test_layer_behind_an_operator_of_the_runtime_is_cut_where_a_sequence_leaves_too() -> None:
    text = """g (float[2,3,8,8] x) => (float[n,c,h,w] y, seq(float[n,c,h,w]) s) {
        a = Conv(x, w1) r = Relu(a) y = Conv(r, w2) q = Relu(x) s = SplitToSequence(q)}"""
    found = model(text, w2=(4, 8, 1, 1), **W1)
    for node in found.proto.graph.node:
        if node.op_type == "Relu":
            node.op_type, node.domain = "QuickGelu", "com.microsoft"
    found.proto.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    graph = analyse(found)
    assert graph.envs[0].shape("r") == (2, 8, 8, 8)
    weights = operate(plan_at(graph, 0.5)).model.weights()
    assert weights["w2"].shape == (4, 4, 1, 1)
