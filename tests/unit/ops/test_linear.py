from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from onnxprune.analyse import analyse
from onnxprune.io import Model
from tests.unit.ops.models import (
    assert_coupled,
    assert_exact,
    assert_frozen,
    between_matmuls,
    model,
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


def test_product_of_two_activations_ties_what_it_sums_over() -> None:
    text = """g (float[2,6,3] x) => (float[2,6,6] y) {
        a = MatMul(x, w1)  b = MatMul(x, w2)  t = Transpose<perm=[0,2,1]>(b)  y = MatMul(a, t)}"""
    found = model(text, w1=(3, 8), w2=(3, 8))
    assert_coupled(analyse(found), ("w1", 1), ("w2", 1))
    assert_exact(found)
