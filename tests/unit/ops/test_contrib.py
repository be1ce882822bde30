"""Operators of ONNX Runtime's own domain: no schema of ONNX's knows them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from onnxprune.analyse import analyse
from onnxprune.cost import stats
from onnxprune.data import random_data
from onnxprune.model import Model
from onnxprune.rewrite import operate
from onnxprune.runtime import session
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
)


def in_microsoft_domain(found: Model, *operators: str) -> Model:
    """The same model with some of its nodes in ONNX Runtime's domain."""
    for node in found.proto.graph.node:
        if node.op_type in operators:
            node.domain = "com.microsoft"
    found.proto.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    return found


def run(found: Model) -> None:
    for batch in random_data(found).probes:
        session(found).run(batch)


@pytest.mark.parametrize("operator", ["Gelu", "QuickGelu"])
def test_activation_passes_channels(operator: str) -> None:
    found = in_microsoft_domain(between_convs(f"m = {operator}(a)"), operator)
    assert_coupled(analyse(found), ("w1", 0), ("w2", 1))
    assert_exact(found)


@pytest.mark.parametrize("operator", ["BiasGelu", "FastGelu"])
def test_bias_of_activation_follows_the_channels(operator: str) -> None:
    found = in_microsoft_domain(between_matmuls(f"m = {operator}(a, b)", b=(8,)), operator)
    assert_coupled(analyse(found), ("w1", 1), ("b", 0), ("w2", 0))
    assert_exact(found)


def test_fused_conv_reads_makes_and_adds_as_its_parts_would() -> None:
    middle = 'm = FusedConv<activation="Relu">(a, w, b, a)'
    found = in_microsoft_domain(between_convs(middle, w=(8, 8, 1, 1), b=(8,)), "FusedConv")
    assert_coupled(analyse(found), ("w1", 0), ("w", 1), ("w", 0), ("b", 0), ("w2", 1))
    assert_exact(found)


def test_depthwise_fused_conv_follows_with_its_group() -> None:
    middle = 'm = FusedConv<activation="Relu", group=8>(a, w)'
    found = in_microsoft_domain(between_convs(middle, w=(8, 1, 1, 1)), "FusedConv")
    assert attribute(halved(found)["m"], "group") == 4
    assert_exact(found)


def test_fused_gemm_reads_makes_and_adds_as_its_parts_would() -> None:
    text = """g (float[3,5] x) => (float[3,4] y) {
        a = FusedGemm<activation="Relu", transB=1>(x, w1, b1)
        y = FusedGemm<activation="Tanh">(a, w2)}"""
    found = in_microsoft_domain(model(text, w1=(8, 5), b1=(8,), w2=(8, 4)), "FusedGemm")
    assert_coupled(analyse(found), ("w1", 0), ("b1", 0), ("w2", 0))
    assert_exact(found)
    assert stats(analyse(found)).macs == 3 * 8 * (5 + 4)


@pytest.mark.parametrize(
    ("attributes", "left", "right"),
    [
        pytest.param("alpha=0.5", (3, 8), (8, 4), id="alpha"),
        pytest.param("transB=1", (3, 8), (4, 8), id="transposed-weight"),
        pytest.param("transA=1", (8, 3), (8, 4), id="transposed-data"),
        pytest.param("transA=1, transB=1", (8, 3), (4, 8), id="both"),
    ],
)
def test_fused_matmul_contracts_the_axes_that_its_attributes_name(
    attributes: str, left: tuple[int, ...], right: tuple[int, ...]
) -> None:
    turn = "t = Transpose<perm=[1,0]>(a)" if left[0] == 8 else "t = Relu(a)"
    text = f"""g (float[3,5] x) => (float[3,4] y) {{
        a = MatMul(x, w1)  {turn}  y = FusedMatMul<{attributes}>(t, w2)}}"""
    found = in_microsoft_domain(model(text, w1=(5, 8), w2=right), "FusedMatMul")
    assert_coupled(analyse(found), ("w1", 1), ("w2", right.index(8)))
    assert_exact(found)
    assert stats(analyse(found)).macs == 3 * 8 * (5 + 4)


@pytest.mark.parametrize("turned", ["", "transA=1", "transBatchA=1", "transA=1, transBatchA=1"])
@pytest.mark.parametrize("mode", ["heads", "dims"])
def test_fused_matmul_of_queries_and_keys_is_attention(turned: str, mode: str) -> None:
    """Queries come as (batch, head, token, size), in whatever order the operator then turns."""
    order = {
        "": [0, 2, 1, 3],
        "transA=1": [0, 2, 3, 1],
        "transBatchA=1": [1, 0, 2, 3],
        "transA=1, transBatchA=1": [3, 0, 2, 1],
    }[turned]
    attributes = ", ".join(filter(None, ["transB=1, alpha=0.5", turned]))
    text = f"""g (float[2,6,12] x) => (float[2,6,12] y) {{
        q0 = MatMul(x, wq)  q1 = Reshape(q0, split)  q = Transpose<perm={order}>(q1)
        k0 = MatMul(x, wk)  k1 = Reshape(k0, split)  k = Transpose<perm=[0,2,1,3]>(k1)
        v0 = MatMul(x, wv)  v1 = Reshape(v0, split)  v = Transpose<perm=[0,2,1,3]>(v1)
        s = FusedMatMul<{attributes}>(q, k)  p = Softmax<axis=-1>(s)  o = MatMul(p, v)
        o1 = Transpose<perm=[0,2,1,3]>(o)  o2 = Reshape(o1, merge)  y = MatMul(o2, wo)}}"""
    sizes: dict[str, Any] = {"split": np.array([2, 6, 4, 3]), "merge": np.array([2, 6, 12])}
    weights = dict.fromkeys(("wq", "wk", "wv", "wo"), (12, 12))
    found = in_microsoft_domain(model(text, **weights, **sizes), "FusedMatMul")
    sizes = [group.size for group in analyse(found, attention=mode).prunable]
    assert sizes == ([4] if mode == "heads" else [12, 12])
    assert_exact(found, attention=mode)
    products = 4 * 2 * 6 * 12 * 12 + 2 * (2 * 4 * 6 * 6 * 3)
    assert stats(analyse(found)).macs == products


def test_fused_matmul_with_a_turned_matrix_for_each_head_cuts_every_head_alike() -> None:
    text = """g (float[2,4,6,3] x) => (float[2,4,6,5] y) {
        a = FusedMatMul<transB=1>(x, w1)  m = Relu(a)  y = FusedMatMul(m, w2)}"""
    found = model(text, w1=(4, 8, 3), w2=(4, 8, 5))
    found = in_microsoft_domain(found, "FusedMatMul")
    assert [len(cell) for cell in analyse(found).prunable[0].cells] == [8] * 4
    assert_exact(found)


def test_fused_matmul_with_a_stack_turned_to_its_first_axis_ties_the_matrices() -> None:
    text = """g (float[2,4,6,3] x) => (float[2,4,6,5] y) {
        a = MatMul(x, w1)  m = Relu(a)  y = FusedMatMul<transBatchB=1>(m, w2)}"""
    found = in_microsoft_domain(model(text, w1=(3, 8), w2=(8, 2, 4, 5)), "FusedMatMul")
    assert_coupled(analyse(found), ("w1", 1), ("w2", 0))
    assert_exact(found)


def skipping(norm: str, *, sums: bool) -> Model:
    """Width 8 from two MatMuls, a fused norm, and a MatMul that reads it and its sum."""
    outputs = "n, , , s" if sums else "n"
    text = f"""g (float[2,6,3] x) => (float[2,6,4] y) {{
        a = MatMul(x, w1)  r = MatMul(x, w2)  {outputs} = {norm}
        t = {"Add(n, s)" if sums else "Relu(n)"}
        y = MatMul(t, w3)}}"""
    weights = {"w1": (3, 8), "w2": (3, 8), "w3": (8, 4)}
    found = model(text, **weights, g=(8,), b=(8,), bias=(8,))
    return in_microsoft_domain(found, norm.partition("(")[0])


@pytest.mark.parametrize("sums", [True, False])
@pytest.mark.parametrize(
    "norm",
    [
        "SkipLayerNormalization(a, r, g)",
        "SkipLayerNormalization(a, r, g, b, bias)",
        "SkipSimplifiedLayerNormalization(a, r, g, bias)",
    ],
)
def test_sum_and_norm_in_one_keep_the_width_unless_asked(norm: str, sums: bool) -> None:
    found = skipping(norm, sums=sums)
    assert_frozen(
        found, "w1", norm.partition("(")[0], "works over channels that a cut would change"
    )
    asked = analyse(found, allow_norm=True)
    rides = [(name, 0) for name in ("g", "b", "bias") if f"{name}," in norm or f"{name})" in norm]
    assert_coupled(asked, ("w1", 1), ("w2", 1), ("w3", 0), *rides)
    plan = plan_at(asked, 0.5)
    assert not asked.exact(plan.keep)
    run(operate(plan).model)


def test_simplified_norm_keeps_the_width_unless_asked() -> None:
    text = """g (float[2,6,3] x) => (float[2,6,4] y) {
        a = MatMul(x, w1)  n = SimplifiedLayerNormalization(a, g)  y = MatMul(n, w3)}"""
    found = model(text, w1=(3, 8), w3=(8, 4), g=(8,))
    assert_frozen(found, "w1", "SimplifiedLayerNormalization 'n'", "works over channels")
    assert_coupled(analyse(found, allow_norm=True), ("w1", 1), ("g", 0), ("w3", 0))


def test_norm_of_embeddings_keeps_their_width_unless_asked() -> None:
    text = """g (int32[2,6] ids) => (float[2,6,4] y) {
        n, mask, s = EmbedLayerNormalization(ids, kinds, words, places, types, g, b)
        y = MatMul(n, w)}"""
    tables = {"words": (9, 8), "places": (7, 8), "types": (2, 8)}
    kinds = np.zeros((2, 6), np.int32)
    found = model(text, **tables, g=(8,), b=(8,), w=(8, 4), kinds=kinds)
    found = in_microsoft_domain(found, "EmbedLayerNormalization")
    assert_frozen(found, "words", "EmbedLayerNormalization 'n'", "works over channels")
    asked = analyse(found, allow_norm=True)
    assert_coupled(asked, *((name, 1) for name in tables), ("g", 0), ("b", 0), ("w", 0))
    run(operate(plan_at(asked, 0.5)).model)
