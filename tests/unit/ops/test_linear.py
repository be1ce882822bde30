from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from onnxprune.analyse import analyse
from onnxprune.model import Model
from tests.unit.ops.models import (
    assert_coupled,
    assert_exact,
    assert_frozen,
    between_matmuls,
    model,
    overridable,
    reason,
)

ATTENTION = """g (float[2,6,12] x) => (float[2,6,12] y) {
    q0 = MatMul(x, wq)  q1 = Reshape(q0, split)  q = Transpose<perm=[0,2,1,3]>(q1)
    k0 = MatMul(x, wk)  k1 = Reshape(k0, split)  k = Transpose<perm=[0,2,3,1]>(k1)
    v0 = MatMul(x, wv)  v1 = Reshape(v0, split)  v = Transpose<perm=[0,2,1,3]>(v1)
    s = MatMul(q, k)  p = Softmax<axis=-1>(s)  o = MatMul(p, v)
    o1 = Transpose<perm=[0,2,1,3]>(o)  o2 = Reshape(o1, merge)  y = MatMul(o2, wo)}"""


def attention() -> Model:
    sizes: dict[str, Any] = {"split": np.array([2, 6, 4, 3]), "merge": np.array([2, 6, 12])}
    return model(ATTENTION, wq=(12, 12), wk=(12, 12), wv=(12, 12), wo=(12, 12), **sizes)


@pytest.mark.parametrize("flag", [0, 1])
def test_gemm_makes_the_columns_of_its_weight_and_reads_the_rows(flag: int) -> None:
    text = f"""g (float[3,5] x) => (float[3,4] y) {{
        a = Gemm<transB={flag}>(x, w1, b1)  m = Relu(a)  y = Gemm(m, w2, b2)}}"""
    found = model(text, w1=(8, 5) if flag else (5, 8), b1=(8,), w2=(8, 4), b2=(4,))
    assert_coupled(analyse(found), ("w1", 0 if flag else 1), ("b1", 0), ("w2", 0))
    assert_exact(found)


def test_gemm_with_a_transposed_left_operand_reads_its_rows() -> None:
    text = """g (float[3,5] x) => (float[3,4] y) {
        a = Gemm(x, w1)  t = Transpose<perm=[1,0]>(a)  y = Gemm<transA=1>(t, w2)}"""
    found = model(text, w1=(5, 8), w2=(8, 4))
    assert_coupled(analyse(found), ("w1", 1), ("w2", 0))
    assert_exact(found)


def test_gemm_with_the_weight_on_the_left_makes_its_rows() -> None:
    text = """g (float[3,5] x) => (float[4,3] y) {
        a = Gemm<transB=1>(w1, x, b1)  m = Relu(a)  y = Gemm(w2, m)}"""
    found = model(text, w1=(8, 5), b1=(8, 1), w2=(4, 8))
    assert_coupled(analyse(found), ("w1", 0), ("b1", 0), ("w2", 1))
    assert_exact(found)


def test_matmul_makes_the_columns_of_its_weight_and_reads_the_rows() -> None:
    found = between_matmuls("m = Relu(a)")
    assert_coupled(analyse(found), ("w1", 1), ("w2", 0))
    assert_exact(found)


def test_matmul_with_the_weight_on_the_left_makes_its_rows() -> None:
    text = """g (float[2,3,6] x) => (float[2,4,6] y) {
        a = MatMul(w1, x)  m = Relu(a)  y = MatMul(w2, m)}"""
    found = model(text, w1=(8, 3), w2=(4, 8))
    assert_coupled(analyse(found), ("w1", 0), ("w2", 1))
    assert_exact(found)


def test_matmul_with_a_one_dimensional_weight_reads_all_of_it() -> None:
    text = """g (float[2,6,3] x) => (float[2,6] y) {a = MatMul(x, w1)  y = MatMul(a, v)}"""
    found = model(text, w1=(3, 8), v=(8,))
    assert_coupled(analyse(found), ("w1", 1), ("v", 0))
    assert_exact(found)


def test_matmul_with_a_matrix_for_each_head_cuts_every_head_by_as_much() -> None:
    text = """g (float[2,4,6,3] x) => (float[2,4,6,5] y) {
        a = MatMul(x, w1)  m = Relu(a)  y = MatMul(m, w2)}"""
    found = model(text, w1=(4, 3, 8), w2=(4, 8, 5))
    assert [len(cell) for cell in analyse(found).prunable[0].cells] == [8] * 4
    assert_exact(found)


def test_matmul_with_data_that_cannot_be_cut_freezes_the_other_side() -> None:
    text = """g (float[2,6,3] x, float[2,8,4] b) => (float[2,6,4] y, float[2,6,5] z) {
        a = MatMul(x, w1)  y = MatMul(a, b)  z = MatMul(a, w2)}"""
    found = model(text, w1=(3, 8), w2=(8, 5))
    assert_frozen(found, "w1", "MatMul 'y'", "sums over channels the other side cannot cut")


def test_attention_goes_by_whole_heads_or_by_dimensions_of_every_head() -> None:
    found = attention()
    heads = [(group.unit, group.size) for group in analyse(found, attention="heads").prunable]
    assert heads == [("head", 4)]
    dims = analyse(found, attention="dims").prunable
    assert [[len(cell) for cell in group.cells] for group in dims] == [[3] * 4] * 2
    for mode in ("heads", "dims"):
        assert_exact(found, attention=mode)


@pytest.mark.parametrize("mode", ["heads", "dims"])
def test_heads_of_attention_between_channels_go_whole(mode: str) -> None:
    """A Softmax over the channels of the values keeps them; heads it does not see."""
    text = """g (float[2,6,8] x) => (float[2,6,4] y) {
        q0 = MatMul(x, wq)  q1 = Reshape(q0, split)  q = Transpose<perm=[0,2,3,1]>(q1)
        k0 = MatMul(x, wk)  k1 = Reshape(k0, split)  k = Transpose<perm=[0,2,3,1]>(k1)
        v0 = MatMul(x, wv)  v1 = Reshape(v0, split)  v = Transpose<perm=[0,2,1,3]>(v1)
        s = MatMul(k, v)  p = Softmax<axis=-1>(s)  o = MatMul(p, q)
        o1 = Transpose<perm=[0,3,1,2]>(o)  o2 = Reshape(o1, merge)  y = MatMul(o2, wo)}"""
    sizes: dict[str, Any] = {"split": np.array([2, 6, 4, 3]), "merge": np.array([2, 6, 12])}
    found = model(text, wq=(8, 12), wk=(8, 12), wv=(8, 12), wo=(12, 4), **sizes)
    graph = analyse(found, attention=mode)
    (group,) = graph.prunable
    assert group.size == 4
    assert {axis.tensor for axis in group.producers} == {"wq", "wk", "wv"}
    assert {axis.tensor for axis in group.consumers} == {"wo"}
    assert_exact(found, attention=mode)


def test_product_of_two_activations_ties_what_it_sums_over() -> None:
    text = """g (float[2,6,3] x) => (float[2,6,6] y) {
        a = MatMul(x, w1)  b = MatMul(x, w2)  t = Transpose<perm=[0,2,1]>(b)  y = MatMul(a, t)}"""
    found = model(text, w1=(3, 8), w2=(3, 8))
    assert_coupled(analyse(found), ("w1", 1), ("w2", 1))
    assert_exact(found)


def test_matmul_of_a_vector_makes_channels_that_may_go() -> None:
    text = "g (float[3] x) => (float[c] y) {a = MatMul(x, w1) r = Relu(a) y = MatMul(r, w2)}"
    found = model(text, w1=(3, 8), w2=(8, 4))
    assert_coupled(analyse(found), ("w1", 1), ("w2", 0))
    assert_exact(found)


def test_matrix_for_each_head_that_no_rule_follows_freezes_what_it_reads() -> None:
    middle = """r = Reshape(a, s) t = Transpose<perm=[2,0,1,3]>(r) k = Trilu(v) p = MatMul(t, k)
        o = Transpose<perm=[1,2,0,3]>(p) m = Reshape(o, back)"""
    shapes = {"s": np.array([2, 6, 2, 4]), "back": np.array([2, 6, 8])}
    found = overridable(between_matmuls(middle, v=(2, 1, 4, 4), **shapes), "v")
    assert_frozen(found, "w1", "MatMul 'p' meets a batch axis that cannot be cut (tensor 't')")


def test_matrix_for_each_group_of_a_normalization_is_one_unit_with_its_group() -> None:
    middle = """n = GroupNormalization<num_groups=4>(r0, s, t) r = Reshape(n, u)
        o = Transpose<perm=[1,0,3,2]>(r) p = MatMul(o, v) q = Transpose<perm=[1,0,3,2]>(p)
        z = Reshape(q, back) m = Transpose<perm=[0,2,1]>(z)"""
    shapes = {"u": np.array([2, 4, 2, 6]), "back": np.array([2, 8, 6])}
    found = between_matmuls(
        f"r0 = Transpose<perm=[0,2,1]>(a) {middle}", s=(8,), t=(8,), v=(4, 1, 2, 2), **shapes
    )
    group = analyse(found).groups[0]
    assert [axis.tensor for axis in group.producers] == ["w1", "v"]
    assert group.producers[0].unit.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert_exact(found, some=False)


def test_product_of_two_constants_is_cut_at_both_ends() -> None:
    found = between_matmuls("k = MatMul(u, v) m = MatMul(a, k)", reads=6, u=(8, 5), v=(5, 6))
    graph = analyse(overridable(found, "v"))
    assert [group.size for group in graph.prunable] == [8, 6]
    assert_coupled(graph, ("w1", 1), ("u", 0))
    assert_exact(found)


def test_attention_none_keeps_queries_and_keys() -> None:
    middle = """q = Reshape(a, s) t = Transpose<perm=[0,2,1,3]>(q) b = MatMul(x, v)
        p = Reshape(b, s) o = Transpose<perm=[0,2,3,1]>(p) m = MatMul(t, o)"""
    found = between_matmuls(middle, reads=6, v=(3, 8), s=np.array([2, 6, 2, 4]))
    graph = analyse(found, attention="none")
    why = "MatMul 'm' is attention, which --attention none keeps"
    assert [reason(graph, "w1"), reason(graph, "v")] == [
        f"{why} (tensor 't')",
        f"{why} (tensor 'o')",
    ]
    assert reason(analyse(found, attention="dims"), "w1") == ""
