"""Einsum, as products of two, whatever its letters."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from onnxprune.analyse import analyse
from onnxprune.model import Model
from tests.oracle import assert_equals_masked_twin
from tests.unit.ops.models import assert_coupled, assert_exact, assert_frozen, model

ATTENTION = """g (float[2,6,12] x) => (float[2,6,12] y) {
    q = Einsum<equation="bnc,chd->bhnd">(x, wq)  k = Einsum<equation="bnc,chd->bhnd">(x, wk)
    v = Einsum<equation="bnc,chd->bhnd">(x, wv)  s = Einsum<equation="bhnd,bhmd->bhnm">(q, k)
    p = Softmax<axis=-1>(s)  o = Einsum<equation="bhnm,bhmd->bnhd">(p, v)
    y = Einsum<equation="bnhd,hdc->bnc">(o, wo)}"""


def attention() -> Model:
    return model(ATTENTION, wq=(12, 4, 6), wk=(12, 4, 6), wv=(12, 4, 6), wo=(4, 6, 12))


def between(middle: str, read: str, w2: tuple[int, ...], **constants: Any) -> Model:
    text = f"""g (float[2,6,5] x) => (float[n,m,k] y) {{
        a = MatMul(x, w1) {middle} y = Einsum<equation="{read}">(m, w2)}}"""
    return model(text, w1=(5, 8), w2=w2, **constants)


@pytest.mark.parametrize("equation", ["bnc,cd->bnd", "...c,cd->...d", "abc, cx", "abc,cx->abx"])
def test_einsum_with_a_matrix_reads_its_rows_and_makes_its_columns(equation: str) -> None:
    text = f"""g (float[2,6,5] x) => (float[2,6,4] y) {{
        a = MatMul(x, w1) e = Einsum<equation="{equation}">(a, w2) y = MatMul(e, w3)}}"""
    found = model(text, w1=(5, 8), w2=(8, 10), w3=(10, 4))
    assert_coupled(analyse(found), ("w1", 1), ("w2", 0))
    assert_coupled(analyse(found), ("w2", 1), ("w3", 0))
    assert_exact(found)


def test_einsum_with_the_weight_first_makes_its_rows() -> None:
    found = between("m = Relu(a)", "bnc,dc->bdn", (4, 8))
    found.proto.graph.node[2].input[:] = ["m", "w2"]
    assert_coupled(analyse(found), ("w1", 1), ("w2", 1))
    assert_exact(found)


def test_heads_of_attention_by_einsum_go_whole() -> None:
    graph = analyse(attention())
    assert [(group.unit, group.size) for group in graph.prunable] == [("head", 4)]
    assert_exact(attention())


def test_dimensions_of_attention_by_einsum_are_cut_in_each_head() -> None:
    found = attention()
    graph = analyse(found, attention="dims")
    assert sorted(group.size for group in graph.prunable) == [24, 24]
    assert all(len(group.cells) == 4 for group in graph.prunable)
    assert_exact(found, attention="dims")


def test_experts_that_einsum_stacks_slice_their_own_channels() -> None:
    text = """g (float[2,6,5] x) => (float[2,4,6,3] y) {
        a = Einsum<equation="bnc,ecd->bend">(x, w1) m = Relu(a)
        y = Einsum<equation="bend,edo->beno">(m, w2)}"""
    found = model(text, w1=(4, 5, 8), w2=(4, 8, 3))
    graph = analyse(found)
    assert [len(group.cells) for group in graph.prunable] == [4]
    assert_exact(found)


def test_two_maps_that_einsum_correlates_lose_the_same_channels() -> None:
    text = """g (float[1,3,4,4] x, float[1,3,4,4] z) => (float[1,4,4,4,4] y) {
        a = Conv(x, w1) b = Conv(z, w2) y = Einsum<equation="nchw,ncij->nhwij">(a, b)}"""
    found = model(text, w1=(8, 3, 1, 1), w2=(8, 3, 1, 1))
    assert_coupled(analyse(found), ("w1", 0), ("w2", 0))
    assert_exact(found)


def test_outer_product_by_einsum_keeps_both_axes_apart() -> None:
    text = """g (float[2,5] x) => (float[2,4,3] y) {
        a = MatMul(x, w1) b = MatMul(x, w2) o = Einsum<equation="bi,bj->bij">(a, b)
        m = Einsum<equation="bij,jk->bki">(o, w3) y = MatMul(m, w4)}"""
    found = model(text, w1=(5, 8), w2=(5, 6), w3=(6, 4), w4=(8, 3))
    assert len(analyse(found).prunable) == 2
    assert_exact(found)


def test_einsum_of_one_operand_moves_its_axes() -> None:
    found = between('m = Einsum<equation="bnc->ncb">(a)', "ncb,cd->bnd", (8, 4))
    assert_coupled(analyse(found), ("w1", 1), ("w2", 0))
    assert_exact(found)


def test_channels_that_einsum_sums_alone_stay() -> None:
    text = """g (float[2,6,5] x) => (float[2,6] y) {
        a = MatMul(x, w1) y = Einsum<equation="bnc->bn">(a)}"""
    assert_frozen(model(text, w1=(5, 8)), "w1", "works over channels")


@pytest.mark.parametrize("equation", ["bnn,nd->bnd", "bnc,cd,de->bne"])
def test_einsum_of_a_diagonal_or_of_three_keeps_its_channels(equation: str) -> None:
    three = equation.count(",") > 1
    text = f"""g (float[2,6,5] x) => (float[n,m,k] y) {{
        a = MatMul(x, w1) y = Einsum<equation="{equation}">(a, w2{", w3" if three else ""})}}"""
    found = model(text, w1=(5, 8 if three else 6), w2=(8 if three else 6, 4), w3=(4, 4))
    assert_frozen(found, "w1", "has terms that are not understood")


_SIZES = {"a": 2, "b": 4, "c": 6, "d": 8, "e": 3}


def equation(rng: np.random.Generator, left: str) -> tuple[str, str]:
    """Letters of a second operand and of the result, at random."""
    right = "".join(rng.permutation(list(_SIZES))[: rng.integers(1, 4)])
    both = rng.permutation(sorted(set(left + right)))
    return right, "".join(both[: rng.integers(1, min(4, both.size) + 1)])


@pytest.mark.parametrize("attention", ["heads", "dims"])
@pytest.mark.parametrize("seed", range(8))
def test_chains_of_random_equations_are_cut_exactly(seed: int, attention: str) -> None:
    rng = np.random.default_rng(seed)
    letters, lines, weights, last = "bac", [], dict[str, Any](), "x"
    for number in range(4):
        right, out = equation(rng, letters)
        weights[f"w{number}"] = tuple(_SIZES[x] for x in right)
        text = f'e{number} = Einsum<equation="{letters},{right}->{out}">({last}, w{number})'
        lines.append(f"{text} r{number} = Relu(e{number})")
        letters, last = out, f"r{number}"
    shapes = [",".join(str(_SIZES[x]) for x in term) for term in ("bac", letters)]
    body = "\n".join(lines)
    text = f"g (float[{shapes[0]}] x) => (float[{shapes[1]}] {last}) {{ {body} }}"
    assert_exact(model(text, **weights), some=False, attention=attention)


def test_rows_of_one_grid_that_cross_keep_it_whole() -> None:
    """The first product asks for equal counts for each a, the second for each e."""
    text = """g (float[4,2,6] x) => (float[4,3] y) { a = Einsum<equation="bac,cea->abe">(x, w1)
        y = Einsum<equation="abe,bea->be">(a, w2)}"""
    found = model(text, w1=(6, 3, 2), w2=(4, 3, 2))
    assert "crossing rows" in analyse(found).notes[0]
    assert_exact(found, some=False)


def test_einsum_masks_its_left_operand_in_the_twin() -> None:
    text = """g (float[1,5,4] x) => (float[1,4,4] y) {
        a = MatMul(w1, x) b = MatMul(w2, x) y = Einsum<equation="bkn,bkm->bnm">(a, b)}"""
    found = model(text, w1=(8, 5), w2=(8, 5))
    outcome = assert_equals_masked_twin(found)
    assert outcome.cut == 4
    assert np.isfinite(outcome.effect)
