"""Rewrites compute the same function, in plain ONNX Runtime; their gradients are in test_ort."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnxprune.model import Model
from onnxprune.runtime import session
from onnxprune.train import spatial
from onnxprune.train.ort import _WITHOUT_GRADIENT
from onnxprune.train.rewrites import rewritten
from tests.rewriting import CASES, HEADS, inputs, model_of

assert spatial


@pytest.mark.parametrize("head", HEADS, ids=["opset 13", "opset 17", "opset 21"])
@pytest.mark.parametrize("name", CASES)
def test_a_rewrite_is_the_same_function(name: str, head: str) -> None:
    model = model_of(name, head)
    if model is None:
        pytest.skip("not in this opset")
    made = onnx.ModelProto()
    made.CopyFrom(model.proto)
    assert rewritten(made, frozenset({"bn"})) == {}
    onnx.checker.check_model(made, full_check=True)
    before = session(model, optimise=False).run(inputs(name))["y"]
    after = session(Model(made), optimise=False).run(inputs(name))["y"]
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_a_rewrite_leaves_nothing_without_a_gradient(name: str) -> None:
    model = model_of(name, HEADS[-1])
    if model is None:
        pytest.skip("not in this opset")
    rewritten(model.proto, frozenset({"bn"}))
    left = {node.op_type for node in model.proto.graph.node}
    assert not left & (_WITHOUT_GRADIENT - {"Resize"})
    assert not any(
        attribute.name == "auto_pad" and attribute.s.startswith(b"SAME")
        for node in model.proto.graph.node
        if node.op_type == "Conv"
        for attribute in node.attribute
    )


def test_weights_keep_their_names_and_values() -> None:
    model = model_of("deconv groups", HEADS[1])
    assert model is not None
    before = {t.name: onnx.numpy_helper.to_array(t) for t in model.proto.graph.initializer}
    rewritten(model.proto, frozenset())
    after = {t.name: onnx.numpy_helper.to_array(t) for t in model.proto.graph.initializer}
    assert all(np.array_equal(after[name], value) for name, value in before.items())


def test_a_case_that_is_not_covered_is_left_and_said() -> None:
    model = onnx.parser.parse_model(
        HEADS[1] + "g (float[n,4,h,w] x) => (float[n,1,a,b] y) {y = DepthToSpace<blocksize=2>(x)}"
    )
    assert rewritten(model, frozenset()) == {"y": "on a tensor of open height or width"}
    assert [node.op_type for node in model.graph.node] == ["DepthToSpace"]
