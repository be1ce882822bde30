"""Models on which random graphs once found a fault, made small; each is named after the symptom."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnxprune.analyse import analyse
from onnxprune.model import Model
from onnxprune.rewrite import operate
from tests.oracle import assert_equals_masked_twin, plan_at, plan_without
from tests.unit.ops.models import (
    assert_exact,
    between_convs,
    between_matmuls,
    model,
    reason,
    unknown,
)

F32 = np.float32


def ints(*values: int) -> np.ndarray:
    return np.asarray(values, np.int64)


def test_rewritten_constant_node_keeps_its_name() -> None:
    found = between_convs("k = Constant<value = float[8,1,1] {1,2,3,4,5,6,7,8}>()  m = Mul(a, k)")
    found.proto.graph.node[1].name = "/Constant_3"
    pruned = operate(plan_at(analyse(found), 0.5)).model.proto
    assert [node.name for node in pruned.graph.node if node.op_type == "Constant"] == [
        "/Constant_3"
    ]


def filled(*shape: int) -> np.ndarray:
    return np.linspace(0.5, 1.5, int(np.prod(shape)), dtype=F32).reshape(shape)


SHAPED = """g (float[N,3,8,8] x) => (float[n,c,h,w] y) {{
    a = Conv(x, w1)  s = Shape(a)  n = Gather(s, i0)  c = Gather(s, i1)  h = Gather(s, i2)
    n1 = Unsqueeze(n, i3)  h1 = Unsqueeze(h, i3)  d = Div(c, two)  d1 = Unsqueeze(d, i3)
    {}
    y = Conv(m, w2)}}"""
INDICES = {"i0": np.asarray(0), "i1": np.asarray(1), "i2": np.asarray(2), "i3": ints(0)}


def shaped(middle: str, **constants: np.ndarray) -> Model:
    weights = {"w1": (8, 3, 1, 1), "w2": (4, 8, 1, 1)}
    return model(SHAPED.format(middle), **weights, **INDICES, two=np.asarray(2), **constants)


@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (2, 4, 1, 1), (2, 1, 1, 1), (4, 1, 1)], ids=str)
def test_computed_grid_target_follows_the_channels(shape: tuple[int, ...]) -> None:
    """A Reshape to [N, 2, C/2, H, W] with C/2 computed from the tensor that is cut kept its C/2."""
    middle = """t = Concat<axis=0>(n1, g2, d1, h1, h1)  r = Reshape(a, t)  e = Mul(r, k)
        m = Reshape(e, back)"""
    assert_exact(shaped(middle, g2=ints(2), k=filled(*shape), back=ints(0, -1, 8, 8)))


def test_computed_space_beside_literal_grid_follows_the_channels() -> None:
    """Reshape to (-1, 4, 2, H, W) with H and W computed, and back by the Shape of the source."""
    middle = """t = Concat<axis=0>(free, four, g2, h1, h1)  r = Reshape(a, t)  e = Mul(r, k)
        m = Reshape(e, s)"""
    for shape in ((4, 1, 1, 1), (4, 2, 1, 1)):
        sizes = {"free": ints(-1), "four": ints(4), "g2": ints(2)}
        assert_exact(shaped(middle, k=filled(*shape), **sizes))


def test_computed_merge_of_a_grid_follows_the_channels() -> None:
    text = """g (float[1,3,8,8] x) => (float[n,c,h,w] y) {
        a = Conv(x, w1)  r = Reshape(a, t)  e = Mul(r, k)  s = Shape(e)  p = Gather(s, i1)
        q = Gather(s, i2)  c = Mul(p, q)  c1 = Unsqueeze(c, i3)  b = Concat<axis=0>(one, c1, hw)
        m = Reshape(e, b)  y = Conv(m, w2)}"""
    sizes = {"t": ints(1, 2, 4, 8, 8), "one": ints(1), "hw": ints(8, 8), "k": filled(2, 4, 1, 1)}
    found = model(text, w1=(8, 3, 1, 1), w2=(4, 8, 1, 1), **INDICES, **sizes)
    assert_exact(found)


TABLES = [
    np.arange(6).reshape(2, 3),
    np.asarray([[0, 2, 5], [1, 3, 4]]),
    np.arange(6).reshape(3, 2),
]


@pytest.mark.parametrize("table", TABLES, ids=["in order", "mixed", "tall"])
@pytest.mark.parametrize("along", [1, 2])
def test_table_of_indices_with_a_constant_on_the_grid_is_cut_along_one_axis(
    table: np.ndarray, along: int
) -> None:
    """Equal counts along both axes of the grid were compacted along the wrong one."""
    text = """g (float[2,7] x) => (float[2,3] y) {
        a = MatMul(x, w1)  t = Gather<axis=1>(a, i)  e = Mul(t, k)  m = Reshape(e, to)
        y = MatMul(m, w2)}"""
    k = filled(1, *(n if axis == along else 1 for axis, n in enumerate(table.shape, 1)))
    assert_exact(model(text, w1=(7, 6), w2=(6, 3), i=table, k=k, to=ints(-1, 6)), some=False)


def test_constant_behind_reshape_meets_a_table_of_indices() -> None:
    middle = "t = Gather<axis=2>(a, i)  k = Reshape(q, s)  e = Mul(t, k)  m = Reshape(e, back)"
    found = between_matmuls(middle, i=np.arange(8).reshape(2, 4), q=(16,), s=ints(2, 1, 2, 4),
                            back=ints(2, 6, 8))  # fmt: skip
    assert_exact(found)


def test_ones_in_the_shape_of_dynamic_data_are_analysed() -> None:
    """The analysis raised KeyError: the value of a ConstantOfShape was not known."""
    text = """g (float[N,3,H,W] x) => (float[n,c,h,w] y) {
        a = Conv(x, w1)  s = Shape(a)  o = ConstantOfShape(s)  m = Add(a, o)  y = Conv(m, w2)}"""
    found = model(text, w1=(8, 3, 1, 1), w2=(4, 8, 1, 1))
    assert_exact(found, some=False)


def test_value_info_of_a_grouped_weight_behind_a_chain_is_refreshed() -> None:
    for chain in ("d = Identity(v)", "d = Cast<to=1>(v)"):
        found = between_convs(f"{chain}  m = Conv<group=2>(a, d)", v=(8, 4, 1, 1))
        found = Model(onnx.shape_inference.infer_shapes(found.proto))
        assert_exact(found)
        found = between_convs(f"{chain}  m = ConvTranspose<group=2>(a, d)", v=(8, 4, 1, 1))
        assert_exact(Model(onnx.shape_inference.infer_shapes(found.proto)))


# -- old versions ----------------------------------------------------------------------------------

SHUFFLE = """g (float[N,3,8] x) => (float[n,c,w] y) {
    a = Conv(x, w1)  r = Reshape(a, split)  t = Transpose<perm=[0,2,1,3]>(r)  q = Reshape(t, merge)
    m = Gather<axis=1>(q, i)  y = Conv(m, w2)}"""


@pytest.mark.parametrize(("ir_version", "opset"), [(3, 7), (3, 9), (4, 8), (7, 9)])
def test_index_written_for_a_shuffle_is_readable_by_old_versions(
    ir_version: int, opset: int
) -> None:
    """An integer Constant before opset 9; inputs without initializer in IR version 3."""
    sizes = {"split": ints(0, 2, 4, 8), "merge": ints(0, 8, 8), "i": ints(7, 0, 3, 2, 2, 5)}
    found = model(SHUFFLE, ir_version=ir_version, opset=opset, w1=(8, 3, 1), w2=(4, 6, 1), **sizes)
    assert_exact(found)


def test_replaced_scalar_index_of_ir_version_3_is_no_required_input() -> None:
    text = """g (float[N,6,5] x) => (float[n,t,c] y) {
        a = MatMul(x, w1)  o = Gather<axis=2>(a, i)  u = Unsqueeze<axes=[2]>(o)  m = Mul(a, u)
        y = MatMul(m, w2)}"""
    found = model(text, ir_version=3, opset=9, w1=(5, 8), w2=(8, 3), i=np.asarray(5))
    assert_exact(found)


def test_extent_used_as_data_in_ir_version_3_leaves_no_required_input() -> None:
    text = """g (float[N,7] x) => (float[n,c] y) {
        a = MatMul(x, w1)  s = Shape(a)  k = Gather(s, i)  f = Cast<to=1>(k)  m = Div(a, f)
        y = MatMul(m, w2)}"""
    found = model(text, ir_version=3, opset=9, w1=(7, 8), w2=(8, 3), i=np.asarray(1))
    assert_exact(found)


# -- weights that are shared -----------------------------------------------------------------------


def test_vector_that_is_bias_and_weight_is_cut_in_both_places() -> None:
    text = """g (float[3,6,5] x) => (float[n,t,c] y) {
        a = MatMul(x, w1)  b = Add(a, v)  p = MatMul(b, v)  u = Unsqueeze(p, i)  m = Mul(b, u)
        y = MatMul(m, w2)}"""
    assert_exact(model(text, w1=(5, 8), w2=(8, 3), v=(8,), i=ints(2)))


def test_weight_read_plainly_and_with_a_gain_is_zeroed_in_the_twin_for_both() -> None:
    text = """g (float[3,6,5] x) => (float[n,t,c] y, float[n,t,d] z) {
        a = MatMul(x, w1)  k = Mul(w2, g2)  y = MatMul(a, k)  z = MatMul(a, w2)}"""
    assert_exact(model(text, w1=(5, 8), w2=(8, 3), g2=(8, 1)))


def test_weight_of_a_dense_and_of_a_grouped_conv_is_not_cut_by_the_other() -> None:
    text = """g (float[1,3,4,4] x) => (float[n,c,h,w] y) {
        a = Conv(x, w1)  b = Conv<group=2>(a, w1)  y = Conv(b, w2)}"""
    found = model(text, w1=(6, 3, 1, 1), w2=(5, 6, 1, 1))
    assert_exact(found, some=False)


def test_twin_of_a_grouped_conv_with_a_zero_point_for_each_channel() -> None:
    middle = "d = DequantizeLinear<axis=0>(q, s, z)  m = Conv<group=2>(a, d)"
    rng = np.random.default_rng(0)
    found = between_convs(
        middle,
        q=rng.integers(-100, 100, (8, 4, 1, 1)).astype(np.int8),
        s=np.linspace(0.01, 0.02, 8, dtype=F32),
        z=rng.integers(-20, 20, 8).astype(np.int8),
    )
    assert_exact(found)


# -- what is left ----------------------------------------------------------------------------------


def test_two_signals_of_symbolic_length_that_are_joined_get_one_length() -> None:
    text = """g (float[N,3,T] x, float[N,3,U] z) => (float[n,c,t] y) {
        a = Conv(x, w1)  m = Concat<axis=1>(a, z)  y = Conv(m, w2)}"""
    assert_exact(model(text, w1=(8, 3, 1), w2=(4, 11, 1)))


def test_outputs_of_a_group_that_nobody_reads_keep_the_others_in_a_box() -> None:
    middle = "b = Conv<group=2>(a, d)  m = Slice(b, s, e, ax)"
    found = between_convs(middle, d=(4, 4, 1, 1), s=ints(0), e=ints(2), ax=ints(1), reads=2)
    assert_exact(found, some=False)


@pytest.mark.parametrize("opset", [12, 13])
def test_squeeze_without_axes_leaves_a_single_channel_alone(opset: int) -> None:
    text = """g (float[2,3,8,8] x) => (float[n,c] y) {
        a = Conv(x, w1)  p = GlobalAveragePool(a)  m = Squeeze(p)  y = MatMul(m, w2)}"""
    found = model(text, opset=opset, w1=(6, 3, 1, 1), w2=(6, 5))
    graph = analyse(found)
    assert_equals_masked_twin(found, plan_without(graph, {graph.prunable[0].id: [0, 1, 2, 4, 5]}))


def test_scale_along_the_input_axis_of_a_quantized_grouped_conv_follows() -> None:
    """Groups kept columns of their own, but the scale has one for all of them."""
    stored = np.random.default_rng(0).integers(-90, 90, (8, 4, 1, 1)).astype(np.int8)
    scales = np.linspace(0.005, 0.02, 4, dtype=np.float32)
    middle = "q = DequantizeLinear<axis=1>(k, s, z)  m = Conv<group=2>(a, q)"
    zero = np.zeros(4, np.int8)
    assert_exact(between_convs(middle, k=stored, s=scales, z=zero))


def test_reshape_to_a_size_given_at_run_time_freezes_what_it_shows() -> None:
    """A size was made up for its output, though it moves elements whose number is known."""
    found = model(
        """g (float[2,3,8,8] x, int64[4] t) => (float[a,8,b,c] y) {
        u = Conv(x, w0) p = Transpose<perm=[0,1,3,2]>(u) r = Reshape(p, t) y = Conv(r, w1)}""",
        w0=(8, 3, 1, 1), w1=(8, 3, 1, 1),
    )  # fmt: skip
    reasons = [group.frozen for group in analyse(found).groups]
    assert reasons
    assert all(
        "unknown shape" in (reason or "") or "output" in (reason or "") for reason in reasons
    )


@pytest.mark.parametrize("seed", range(6))
def test_grid_of_three_axes_with_one_row_axis_given_is_cut_along_one(seed: int) -> None:
    """Two axes were left open, so that survivors formed no box."""
    found = model(
        """g (float[6,3] x, float[6,2,1,1] z) => (float[6,4] y) {
        a = MatMul(x, w1) r = Reshape(a, s) e = Mul(r, z) m = Reshape(e, b) y = MatMul(m, w2)}""",
        w1=(3, 16), w2=(16, 4), s=ints(6, 2, 2, 4), b=ints(6, 16),
    )  # fmt: skip
    assert assert_equals_masked_twin(found, plan_at(analyse(found), 0.5, seed=seed)).cut == 8


@pytest.mark.parametrize("show", ["Identity", "Squeeze"])
def test_zero_point_shown_through_a_node_is_what_the_twin_writes(show: str) -> None:
    point = np.asarray(30 if show == "Identity" else [30], np.int8)
    found = model(
        f"""g (float[2,3] x) => (float[2,4] y) {{
        a = MatMul(x, w1) z = {show}(p) k = DequantizeLinear(q, s, z) y = MatMul(a, k)}}""",
        w1=(3, 8), p=point, s=np.asarray(0.02, F32),
        q=np.random.default_rng(0).integers(-100, 100, (8, 4)).astype(np.int8),
    )  # fmt: skip
    assert assert_equals_masked_twin(found, plan_at(analyse(found), 0.5)).error < 1e-5


def test_shape_that_cannot_be_repaired_freezes_what_it_acts_on() -> None:
    """It was noticed, but what was blamed for it had no channels to freeze."""
    found = model(
        """g (float[n,3,h,w] x) => (float[n,4,h,w] y) {
        a = Conv(x, w1)  sx = Shape(x)  n = Gather(sx, i0)  h = Gather(sx, i2)  v = Gather(sx, i3)
        hc = Mul(h, eight)  t = Concat<axis=0>(n, hc, minus)  r = Reshape(a, t)
        b = Concat<axis=0>(n, eight, h, v)  m = Reshape(r, b)  y = Conv(m, w2)}""",
        w1=(8, 3, 1, 1), w2=(4, 8, 1, 1), i0=ints(0), i2=ints(2), i3=ints(3), eight=ints(8),
        minus=ints(-1),
    )  # fmt: skip
    graph = analyse(found)
    assert not graph.prunable
    assert graph.notes == ("'r': channels that do not stay in order are frozen",)


BEHIND_UNKNOWN = """g (float[2,3,8,8] x) => (float[n,c] y) {{
    z = Relu(x)  a = Conv(z, w1)  {}  y = Gemm(f, w2)}}"""


def behind_unknown(middle: str, reads: int, **constants: np.ndarray) -> Model:
    text = BEHIND_UNKNOWN.format(middle)
    return unknown(model(text, w1=(8, 3, 1, 1), w2=(reads, 4), **constants), "z")


@pytest.mark.parametrize("middle", ["f = Flatten(a)", "f = Reshape(a, s)"])
def test_declared_shape_behind_one_that_was_assumed_freezes(middle: str) -> None:
    """The analysis raised ValueError: the sizes of ``a`` are made up, those of ``f`` declared."""
    found = behind_unknown(middle, 512, s=ints(2, 512))
    entry = onnx.helper.make_tensor_value_info("f", onnx.TensorProto.FLOAT, [2, 512])
    found.proto.graph.value_info.append(entry)
    assert "has a tensor of unknown shape ('f')" in reason(analyse(found), "w1")


@pytest.mark.parametrize(("target", "frozen"), [((2, 8), True), ((-1, 8), False)])
def test_reshape_to_another_number_of_elements_freezes(
    target: tuple[int, ...], frozen: bool
) -> None:
    """The analysis raised ValueError where a batch of one had been assumed."""
    found = behind_unknown("p = GlobalAveragePool(a)  f = Reshape(p, s)", 8, s=ints(*target))
    why = reason(analyse(found), "w1")
    assert ("moves data in a way that is not known" in why) if frozen else not why


# -- slices ----------------------------------------------------------------------------------------


def outer(middle: str, *, reads: int = 6, opset: int = 21, **constants: np.ndarray) -> Model:
    """Two rows of 8 channels multiplied to a square ``p``, of which ``s`` is read on both axes."""
    last, inner = ("(a, at3)", "(b, at2)") if opset > 12 else ("<axes=[3]>(a)", "<axes=[2]>(b)")
    axes = {"at2": ints(2), "at3": ints(3)} if opset > 12 else {}
    text = f"""g (float[2,6,3] x) => (float[n,t,h,c] y) {{
        a = MatMul(x, w1)  b = MatMul(x, wb)  u = Unsqueeze{last}  v = Unsqueeze{inner}
        p = Mul(u, v)  {middle}  e = MatMul(s, w2)  t = Transpose<perm=[0,1,3,2]>(e)
        y = MatMul(t, w3)}}"""
    weights = {"w1": (3, 8), "wb": (3, 8), "w2": (reads, 5), "w3": (reads, 4)}
    return model(text, opset=opset, **weights, **axes, **constants)


@pytest.mark.parametrize("opset", [9, 21])
def test_slice_along_two_axes_that_are_both_cut_is_written_on_both(opset: int) -> None:
    """What was written for the second axis took back what was written for the first."""
    if opset == 9:
        found = outer("s = Slice<starts=[1,1], ends=[7,7], axes=[2,3]>(p)", opset=9)
    else:
        sizes = {"st": ints(1, 1), "en": ints(7, 7), "ax": ints(2, 3)}
        found = outer("s = Slice(p, st, en, ax)", **sizes)
    assert_exact(found)
    surgery = operate(plan_at(analyse(found), 0.5))
    ends = [change.after for change in surgery.changes if change.before == [7, 7]]
    assert ends == [[4, 4]]


@pytest.mark.parametrize(
    ("starts", "ends", "axes", "steps"),
    [((0, 0), (8, 8), (2, 3), (2, 2)), ((0, 2), (8, 6), (2, 3), (2, 1)),
     ((7, -1), (0, -9), (-1, 2), (-2, -2))],
    ids=["both", "one", "backwards"],
)  # fmt: skip
def test_slice_with_steps_along_two_axes_that_are_both_cut(
    starts: tuple[int, ...], ends: tuple[int, ...], axes: tuple[int, ...], steps: tuple[int, ...]
) -> None:
    """The two Gathers behind it stood in the wrong order."""
    sizes = {"st": ints(*starts), "en": ints(*ends), "ax": ints(*axes), "k": ints(*steps)}
    assert_exact(outer("s = Slice(p, st, en, ax, k)", reads=4, **sizes))


OTHER_USES = {
    "end of space": ("e = Gather(c, i11)  m = Slice(a, k22, e, at12)", 6),
    "both ends": ("e = Gather(c, i12)  m = Slice(a, k22, e, at12)", 6),
    "start": ("d = Gather(c, i11)  s = Div(d, k4)  m = Slice(a, s, k88, at12)", 6),
    "step": ("d = Gather(c, i11)  s = Div(d, k4)  m = Slice(a, k00, k88, at12, s)", 4),
    "sizes": ("d = Gather(c, i11)  s = Div(d, k2)  m, o = Split<axis=2>(a, s)", 8),
    "indices": ("d = Gather(c, i11)  s = Sub(d, k14)  m = Gather<axis=1>(a, s)", 2),
}


@pytest.mark.parametrize(("middle", "reads"), OTHER_USES.values(), ids=OTHER_USES)
def test_number_of_channels_that_says_where_to_cut_another_axis_keeps_its_value(
    middle: str, reads: int
) -> None:
    """Slices along an axis that was cut had none of their other numbers looked at."""
    sizes = {"i11": ints(1, 1), "i12": ints(1, 2), "at12": ints(1, 2), "k22": ints(2, 2)}
    sizes |= {"k88": ints(8, 8), "k00": ints(0, 0), "k4": ints(4), "k2": ints(2), "k14": ints(1, 4)}
    assert_exact(between_convs(f"c = Shape(a)  {middle}", reads=reads, **sizes))


def test_slice_along_axes_given_at_run_time_is_not_followed() -> None:
    found = model(
        """g (float[2,3,8,8] x, int64[1] axes) => (float[n,c,h,w] y) {
        a = Conv(x, w1)  s = Slice(a, st, en, axes)  y = Conv(s, w2)}""",
        w1=(8, 3, 1, 1), w2=(4, 8, 1, 1), st=ints(0), en=ints(8),
    )  # fmt: skip
    assert reason(analyse(found), "w1") == "'s' would put its channels out of order"
