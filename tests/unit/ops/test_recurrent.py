"""LSTM, GRU and RNN: what reads, what makes, and what follows along."""

from __future__ import annotations

import numpy as np
import pytest

from onnxprune.analyse import analyse
from onnxprune.model import Model
from tests.unit.ops.models import (
    assert_coupled,
    assert_exact,
    assert_frozen,
    attribute,
    halved,
    model,
)

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
HIDDEN = 6


def layer(
    kind: str, ways: int = 1, more: str = "", states: str = "", opset: int = 21, **extra: object
) -> Model:
    """MatMul w1 feeds the layer, whose states of every step MatMul w2 reads."""
    way = ', direction="bidirectional"' if ways > 1 else ""
    text = f"""g (float[5,2,3] x) => (float[5,2,4] y) {{
        a = MatMul(x, w1) s = {kind}<hidden_size={HIDDEN}{way}{more}>(a, k, r, b{states})
        t = Transpose<perm=[0,2,1,3]>(s) m = Reshape(t, flat) y = MatMul(m, w2)}}"""
    wide = GATES[kind] * HIDDEN
    found = {"w1": (3, 8), "k": (ways, wide, 8), "r": (ways, wide, HIDDEN), "b": (ways, 2 * wide)}
    found |= {"w2": (ways * HIDDEN, 4), "flat": np.array([5, 2, -1])}  # type: ignore[dict-item]
    return model(text, opset=opset, **found, **extra)


@pytest.mark.parametrize("kind", GATES)
def test_input_of_a_recurrent_layer_is_read_by_the_columns_of_its_first_weight(kind: str) -> None:
    found = layer(kind)
    assert_coupled(analyse(found), ("w1", 1), ("k", 2))
    assert_exact(found)


@pytest.mark.parametrize("kind", GATES)
def test_hidden_channels_go_from_every_gate_and_from_what_reads_them(kind: str) -> None:
    graph = analyse(layer(kind))
    assert_coupled(graph, ("r", 2), ("w2", 0))
    assert [group.size for group in graph.prunable] == [8, HIDDEN]
    node = halved(layer(kind))["s"]
    assert attribute(node, "hidden_size") == HIDDEN // 2


@pytest.mark.parametrize("opset", [7, 14, 22])
@pytest.mark.parametrize("kind", GATES)
def test_directions_choose_their_own_hidden_channels(kind: str, opset: int) -> None:
    found = layer(kind, ways=2, opset=opset)
    graph = analyse(found)
    hidden = next(group for group in graph.prunable if group.size == 2 * HIDDEN)
    assert [len(cell) for cell in hidden.cells] == [HIDDEN, HIDDEN]
    assert_exact(found)


def test_gru_that_resets_behind_its_product_is_cut_alike() -> None:
    assert_exact(layer("GRU", ways=2, more=", linear_before_reset=1"))


def test_constant_states_and_peepholes_follow_the_hidden_channels() -> None:
    states = {"h0": (2, 2, HIDDEN), "c0": (2, 2, HIDDEN), "p": (2, 3 * HIDDEN)}
    found = layer("LSTM", ways=2, states=", , h0, c0, p", **states)
    assert len(analyse(found).prunable) == 2
    assert_exact(found)


def test_states_that_another_layer_gave_lose_what_it_lost() -> None:
    wide = 4 * HIDDEN
    text = f"""g (float[5,2,3] x) => (float[2,4] y) {{
        s, h, c = LSTM<hidden_size={HIDDEN}>(x, k1, r1)
        u, e, d = LSTM<hidden_size={HIDDEN}>(x, k2, r2, , , h, c)
        m = Squeeze(e, zero) y = MatMul(m, w2)}}"""
    shapes = {"k1": (1, wide, 3), "r1": (1, wide, HIDDEN), "w2": (HIDDEN, 4)}
    shapes |= {"k2": (1, wide, 3), "r2": (1, wide, HIDDEN)}
    found = model(text, zero=np.array([0]), **shapes)
    assert_coupled(analyse(found), ("r1", 2), ("r2", 2), ("w2", 0))
    assert_exact(found)


@pytest.mark.parametrize(
    "zeros",
    [
        "h = ConstantOfShape(d)",
        "h = Expand(nought, d)",
        "e = ConstantOfShape(twice) h = Slice(e, zero, one)",
        "e = Shape<start=1, end=2>(x) f = Concat<axis=0>(one, e, six) h = ConstantOfShape(f)",
        "e = Shape<start=1, end=2>(x) f = Concat<axis=0>(one, e, six) h = Expand(nought, f)",
    ],
)
def test_computed_states_of_zeros_are_left_out(zeros: str) -> None:
    wide = 4 * HIDDEN
    text = f"""g (float[5,n,3] x) => (float[5,1,n,4] y) {{
        {zeros} s = LSTM<hidden_size={HIDDEN}>(x, k, r, , , h, h) y = MatMul(s, w2)}}"""
    size = {"d": np.array([1, 1, HIDDEN]), "twice": np.array([2, 1, HIDDEN])}
    size |= {"zero": np.array([0]), "one": np.array([1]), "six": np.array([HIDDEN])}
    size["nought"] = np.zeros(1, np.float32)
    if "Shape<" not in zeros:
        text = text.replace("n,", "1,")
    found = model(text, k=(1, wide, 3), r=(1, wide, HIDDEN), w2=(HIDDEN, 4), **size)
    assert_coupled(analyse(found), ("r", 2), ("w2", 0))
    assert_exact(found)
    if "Shape<" in zeros:  # others are folded into constants, which are cut
        assert list(halved(found)["s"].input)[5:] == ["", ""]


def test_hidden_channels_that_continue_an_input_stay() -> None:
    wide = 3 * HIDDEN
    text = f"""g (float[5,2,3] x, float[1,2,{HIDDEN}] h) => (float[5,1,2,4] y) {{
        s = GRU<hidden_size={HIDDEN}>(x, k, r, , , h) y = MatMul(s, w2)}}"""
    found = model(text, k=(1, wide, 3), r=(1, wide, HIDDEN), w2=(HIDDEN, 4))
    assert_frozen(found, "k", "continues input 'h'")


def test_recurrent_layer_with_a_computed_weight_freezes_what_it_reads() -> None:
    text = """g (float[5,2,3] x, float[1,16,8] k) => (float[n,t,c,d] y) {
        a = MatMul(x, w1) y, h, c = LSTM<hidden_size=4>(a, k, r)}"""
    found = model(text, w1=(3, 8), r=(1, 16, 4))
    assert_frozen(found, "w1", "has a weight that is computed at run time")


def test_axis_that_a_recurrent_layer_runs_over_stays() -> None:
    text = """g (float[3,2,8] x) => (float[n,t,c,d] y) {
        t = Transpose<perm=[1,0,2]>(x) a = MatMul(w1, t) u = Transpose<perm=[1,0,2]>(a)
        y, h, c = LSTM<hidden_size=4>(u, k, r)}"""
    found = model(text, w1=(9, 3), k=(1, 16, 8), r=(1, 16, 4))
    assert_frozen(found, "w1", "runs over an axis that would be cut")
