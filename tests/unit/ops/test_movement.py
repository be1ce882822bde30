from __future__ import annotations

import numpy as np
import pytest

from onnxprune.analyse import analyse
from tests.unit.ops.models import (
    assert_coupled,
    assert_exact,
    assert_frozen,
    between_convs,
    between_matmuls,
    halved,
    model,
    reason,
    units,
)

LAST = 1 << 60


def ints(*values: int) -> np.ndarray:
    return np.asarray(values, np.int64)


def test_transpose_takes_channels_to_the_last_axis() -> None:
    text = """g (float[2,3,4,4] x) => (float[2,4,4,5] y) {
        a = Conv(x, w1)  t = Transpose<perm=[0,2,3,1]>(a)  y = MatMul(t, w2)}"""
    found = model(text, w1=(8, 3, 1, 1), w2=(8, 5))
    assert_coupled(analyse(found), ("w1", 0), ("w2", 0))
    assert_exact(found)


@pytest.mark.parametrize("op", ["Flatten(a)", "Reshape(a, to)"])
def test_flattened_channels_are_read_as_blocks_of_space(op: str) -> None:
    text = f"""g (float[2,3,4,4] x) => (float[2,5] y) {{
        a = Conv(x, w1)  f = {op}  y = Gemm(f, w2)}}"""
    found = model(text, w1=(8, 3, 1, 1), w2=(128, 5), to=ints(2, 128))
    graph = analyse(found)
    assert units(graph, "w2", 0) == [unit for unit in units(graph, "w1", 0) for _ in range(16)]
    assert_exact(found)


def test_reshape_target_names_the_channels_that_are_left() -> None:
    found = between_matmuls("r = Reshape(a, to)  n = Neg(r)  m = Reshape(n, back)",
                            to=ints(12, 8), back=ints(2, 6, 8))  # fmt: skip
    assert_coupled(analyse(found), ("w1", 1), ("w2", 0))
    assert_exact(found)


def test_squeeze_and_unsqueeze_move_the_channel_axis() -> None:
    middle = "u = Unsqueeze(a, axes)  n = Neg(u)  m = Squeeze(n, axes)"
    found = between_convs(middle, axes=ints(1))
    assert_coupled(analyse(found), ("w1", 0), ("w2", 1))
    assert_exact(found)


def test_expand_repeats_labels_along_the_new_extent() -> None:
    middle = "g = GlobalAveragePool(a)  e = Expand(g, to)  m = Add(a, e)"
    for target in (ints(2, 8, 8, 8), ints(1, 1, 8, 8), ints(8, 8)):
        found = between_convs(middle, to=target)
        assert_coupled(analyse(found), ("w1", 0), ("w2", 1))
        assert_exact(found)


def test_tile_along_channels_repeats_them() -> None:
    found = between_convs("m = Tile(a, r)", r=ints(1, 2, 1, 1), reads=16)
    graph = analyse(found)
    assert units(graph, "w2", 1) == units(graph, "w1", 0) * 2
    assert_exact(found)


@pytest.mark.parametrize(
    ("start", "end", "step"),
    [(2, 6, 1), (0, LAST, 2), (7, -LAST, -1), (-3, LAST, 1), (1, -1, 3), (-1, -9, -2)],
)
def test_slice_picks_the_channels_of_its_range(start: int, end: int, step: int) -> None:
    picked = np.arange(8)[slice(start, end if end > -LAST else None, step)]
    found = between_convs("m = Slice(a, s, e, ax, st)", s=ints(start), e=ints(end), ax=ints(1),
                          st=ints(step), reads=picked.size)  # fmt: skip
    graph = analyse(found)
    made = units(graph, "w1", 0)
    read = units(graph, "w2", 1)
    assert all(made[position] in (read[i], None) for i, position in enumerate(picked))
    assert_exact(found)


def test_slice_of_space_lets_channels_pass() -> None:
    found = between_convs("m = Slice(a, s, e, ax)", s=ints(1), e=ints(-1), ax=ints(-1))
    assert_coupled(analyse(found), ("w1", 0), ("w2", 1))
    assert_exact(found)


def test_split_gives_each_part_its_channels() -> None:
    text = """g (float[2,3,4,4] x) => (float[2,4,4,4] y, float[2,4,4,4] z) {
        a = Conv(x, w1)  p, q = Split<axis=1>(a, sizes)  y = Conv(p, w2)  z = Conv(q, w3)}"""
    found = model(text, w1=(8, 3, 1, 1), w2=(4, 5, 1, 1), w3=(4, 3, 1, 1), sizes=ints(5, 3))
    graph = analyse(found)
    assert units(graph, "w1", 0) == [*units(graph, "w2", 1), *units(graph, "w3", 1)]
    assert_exact(found)


@pytest.mark.parametrize(("opset", "flag"), [(11, ""), (13, ""), (18, ", num_outputs=2")])
def test_equal_split_is_told_its_sizes_where_they_differ(opset: int, flag: str) -> None:
    text = f"""g (float[2,3,4,4] x) => (float[2,4,4,4] y, float[2,8,4,4] z) {{
        a = Conv(x, w1)  p, q = Split<axis=1{flag}>(a)
        y = Conv(p, w2)  z = Concat<axis=1>(q, q)}}"""
    found = model(text, opset=opset, w1=(8, 3, 1, 1), w2=(4, 4, 1, 1))
    assert_exact(found)


@pytest.mark.parametrize("picked", [[3, 1, 2], [-1, 0, -8], [5, 5, 5, 2], [0, 1, 2, 3, 4, 5, 6, 7]])
def test_gather_picks_channels_by_a_list(picked: list[int]) -> None:
    found = between_convs("m = Gather<axis=1>(a, i)", i=ints(*picked), reads=len(picked))
    graph = analyse(found)
    made, read = units(graph, "w1", 0), units(graph, "w2", 1)
    assert [made[i] for i in picked] == read
    assert_exact(found)


def test_gather_of_one_channel_freezes_it_as_content() -> None:
    middle = "o = Gather<axis=1>(a, i)  u = Unsqueeze(o, one)  m = Mul(a, u)"
    found = between_convs(middle, i=np.asarray(2), one=ints(1))
    graph = analyse(found)
    assert [n for n, unit in enumerate(units(graph, "w1", 0)) if unit is None] == [2]
    assert_exact(found)


def test_gather_by_a_table_makes_a_grid() -> None:
    middle = "t = Gather<axis=1>(a, i)  n = Neg(t)  m = Reshape(n, back)"
    table = np.arange(8).reshape(2, 4)
    found = between_convs(middle, i=table, back=ints(2, 8, 8, 8))
    assert analyse(found).prunable
    assert_exact(found)


def test_gather_by_indices_of_run_time_reads_a_table_whose_columns_may_go() -> None:
    text = """g (int64[2,6] ids) => (float[2,6,4] y) {
        a = Gather(table, ids)  m = Relu(a)  y = MatMul(m, w2)}"""
    found = model(text, table=(20, 8), w2=(8, 4))
    assert_coupled(analyse(found), ("table", 1), ("w2", 0))
    assert_exact(found)


@pytest.mark.parametrize("mode", ["DCR", "CRD"])
def test_depth_to_space_keeps_four_channels_together(mode: str) -> None:
    found = between_convs(f'm = DepthToSpace<blocksize=2, mode="{mode}">(a)', reads=2)
    graph = analyse(found)
    assert len(set(units(graph, "w1", 0))) == 2
    assert set(units(graph, "w1", 0)) == set(units(graph, "w2", 1))
    assert_exact(found)


def test_space_to_depth_reads_each_channel_four_times() -> None:
    found = between_convs("m = SpaceToDepth<blocksize=2>(a)", reads=32)
    graph = analyse(found)
    assert units(graph, "w2", 1) == units(graph, "w1", 0) * 4
    assert_exact(found)


def test_channel_shuffle_is_written_as_one_node_and_constrains_nothing() -> None:
    middle = """g1 = Reshape(a, split)  g2 = Transpose<perm=[0,2,1,3,4]>(g1)
        m = Reshape(g2, merge)"""
    found = between_convs(middle, split=ints(2, 2, 4, 8, 8), merge=ints(2, 8, 8, 8))
    assert [len(group.cells) for group in analyse(found).prunable] == [1]
    assert not {"g1", "g2"} & set(halved(found))
    assert_exact(found)


def test_slice_with_a_computed_start_that_moves_channels_freezes_them() -> None:
    text = """g (float[2,3,8,8] x, int64[1] s) => (float[2,4,8,8] y) {
        a = Conv(x, w1)  m = Slice(a, s, e, ax)  y = Conv(m, w2)}"""
    found = model(text, w1=(8, 3, 1, 1), w2=(4, 8, 1, 1), e=ints(8), ax=ints(1))
    assert "'m'" in reason(analyse(found), "w1")


def test_copies_for_every_channel_of_another_tensor_go_with_them() -> None:
    """A map of weights spread over all channels: `gate.expand_as(x) * x`."""
    middle = "s = Shape(a) g = Conv(a, w) e = Expand(g, s) m = Mul(a, e)"
    found = between_convs(middle, w=(1, 8, 1, 1))
    assert_coupled(analyse(found), ("w1", 0), ("w2", 1))
    assert_exact(found)


def test_constant_of_the_shape_of_data_is_cut_with_it() -> None:
    middle = "s = Shape(a) o = ConstantOfShape<value = float[1] {1.5}>(s) m = Sub(a, o)"
    found = between_convs(middle)
    assert_coupled(analyse(found), ("w1", 0), ("w2", 1))
    assert_exact(found)


@pytest.mark.parametrize(
    "middle",
    [
        "g = Conv(a, w) e = Expand(g, s) m = Mul(a, e)",
        "g = Conv(a, w) e = Expand(g, s) i = Sigmoid(e) j = Mul(i, half) m = Mul(j, a)",
        "g = Conv(a, w) e = Expand(g, s) t = Transpose<perm=[1,0,2,3]>(e)"
        " u = Transpose<perm=[1,0,2,3]>(a) n = Mul(t, u) m = Transpose<perm=[1,0,2,3]>(n)",
        "b = Expand(half, s) m = Add(a, b)",
        "b = ConstantOfShape<value = float[1] {1.5}>(s) m = Add(a, b)",
    ],
    ids=["mul", "through others", "moved", "constant", "of shape"],
)
def test_copies_are_as_many_as_the_channels_that_they_meet(middle: str) -> None:
    half = np.full((), 0.5, np.float32)
    found = between_convs(middle, w=(1, 8, 1, 1), s=np.array([2, 8, 8, 8]), half=half)
    assert_coupled(analyse(found), ("w1", 0), ("w2", 1))
    assert_exact(found)


def test_channels_that_meet_the_same_copies_go_together() -> None:
    middle = """g = Conv(a, w) e = Expand(g, s) b = Conv(x, w3) n = Mul(b, e) o = Conv(n, w4)
        l = Mul(a, e) m = Add(l, o)"""
    weights = {"w": (1, 8, 1, 1), "w3": (8, 3, 1, 1), "w4": (8, 8, 1, 1)}
    found = between_convs(middle, s=np.array([2, 8, 8, 8]), **weights)
    assert_coupled(analyse(found), ("w1", 0), ("w3", 0))
    assert_exact(found)


def test_copies_that_are_an_output_keep_the_channels_that_they_meet() -> None:
    text = """g (float[2,3,8,8] x) => (float[2,4,8,8] y, float[2,8,8,8] e) {
        a = Conv(x, w1) g = Conv(a, w) e = Expand(g, s) m = Mul(a, e) y = Conv(m, w2)}"""
    found = model(text, w1=(8, 3, 1, 1), w=(1, 8, 1, 1), w2=(4, 8, 1, 1), s=ints(2, 8, 8, 8))
    assert_frozen(found, "w1", "reaches output 'e' through Expand 'e'")


MASKED = """g (float[n,6,12] x, bool[n,6] keep) => (float[n,6,12] y) {
    q0 = MatMul(x, wq)  q1 = Reshape(q0, split)  q = Transpose<perm=[0,2,1,3]>(q1)
    k0 = MatMul(x, wk)  k1 = Reshape(k0, split)  k = Transpose<perm=[0,2,3,1]>(k1)
    v0 = MatMul(x, wv)  v1 = Reshape(v0, split)  v = Transpose<perm=[0,2,1,3]>(v1)
    b = Shape<start=0, end=1>(x)  t = Concat<axis=0>(b, four, one, six)
    u = Unsqueeze(keep, axes)  e = Expand(u, t)  f = Not(e)
    s0 = MatMul(q, k) {scores}  p = Softmax<axis=-1>(s)
    o = MatMul(p, v)  o1 = Transpose<perm=[0,2,1,3]>(o)  o2 = Reshape(o1, merge)
    y = MatMul(o2, wo)}"""


@pytest.mark.parametrize("attention", ["heads", "dims"])
@pytest.mark.parametrize(
    "scores",
    [
        "s = Where(f, low, s0)",
        """h = Mul(b, four) j = Concat<axis=0>(h, six, six) r = Reshape(s0, j)
        k2 = Concat<axis=0>(h, one, six) f2 = Reshape(f, k2) w = Where(f2, low, r)
        l = Concat<axis=0>(b, four, six, six) s = Reshape(w, l)""",
    ],
    ids=["by head", "heads in the batch"],
)
def test_mask_that_is_expanded_over_the_heads_lets_them_go(scores: str, attention: str) -> None:
    sizes = {"split": ints(0, 6, 4, 3), "merge": ints(0, 6, 12), "axes": ints(1, 2)}
    sizes |= {"four": ints(4), "one": ints(1), "six": ints(6)}
    weights = dict.fromkeys(("wq", "wk", "wv", "wo"), (12, 12))
    text = MASKED.replace("{scores}", scores)
    found = model(text, low=np.asarray(-9.0, np.float32), **sizes, **weights)
    graph = analyse(found, attention=attention)
    assert [group.size for group in graph.prunable] == ([4] if attention == "heads" else [12, 12])
    assert_exact(found, attention=attention)
