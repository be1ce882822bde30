"""Layers refitted to calibration data: what is linear comes back, the rest is left alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np
import onnx
import pytest

from onnxprune.analyse import analyse
from onnxprune.data import Data, load_data
from onnxprune.io import as_model
from onnxprune.model import Model
from onnxprune.planning import Judge
from onnxprune.restore import refit
from onnxprune.rewrite import operate
from onnxprune.runtime import session
from onnxprune.score import score
from onnxprune.select import PruningPlan, select
from onnxprune.sites import _Walk
from onnxprune.skeleton import skeleton
from onnxprune.types import Refitted
from tests.oracle import plan_without
from tests.small import MODELS, array, conv_chain, parsed


def smooth(n: int, *shape: int, seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, *shape)).astype(np.float32)


def given(x: np.ndarray, *, size: int = 32, name: str = "x") -> Data:
    batches = [{name: x[start : start + size]} for start in range(0, len(x), size)]
    return Data(batches, "given", random=False, samples=len(x))


@dataclass
class Done:
    """One refit and what it did."""

    plan: PruningPlan
    plain: Model
    made: Model
    layers: tuple[Refitted, ...]
    changed: tuple[str, ...]
    data: Data

    def drift(self, model: Model) -> float:
        return Judge(self.plan.graph, self.data).drift(model)

    @property
    def gains(self) -> tuple[float, float]:
        """Drift of the plain cut and after the refit."""
        return self.drift(self.plain), self.drift(self.made)


def done(model: Model, gone: Sequence[int], data: Data, group: int | None = None) -> Done:
    """Units of one group go, and what stays is refitted."""
    graph = analyse(model)
    group = graph.prunable[0].id if group is None else group
    plan = plan_without(graph, {group: gone})
    assert plan.removes == len(gone)
    plain = operate(plan).model
    made, layers, changed = refit(plan, plain, data)
    assert_same_interface(plain, made)
    return Done(plan, plain, made, layers, changed, data)


def assert_same_interface(plain: Model, made: Model) -> None:
    """Names, shapes and validity of the plain model; only values and added biases differ."""
    onnx.checker.check_model(skeleton(made), full_check=True)
    assert plain.proto.graph.input == made.proto.graph.input
    assert plain.proto.graph.output == made.proto.graph.output
    assert plain.proto.opset_import == made.proto.opset_import
    assert [n.name for n in plain.proto.graph.node] == [n.name for n in made.proto.graph.node]
    assert [n.output for n in plain.proto.graph.node] == [n.output for n in made.proto.graph.node]
    before, after = plain.weights(), made.weights()
    for name, weight in before.items():
        assert after[name].shape == weight.shape, name
        assert after[name].dtype == weight.dtype, name
    assert all(name.endswith("_bias") for name in set(after) - set(before))


# -------------------------------------------------- dropped channels that others can stand in for


def mixed(made: np.ndarray, axis: int, dropped: Sequence[int], seed: int = 8) -> np.ndarray:
    """A weight whose ``dropped`` outputs are linear combinations of all others."""
    rng = np.random.default_rng(seed)
    kept = np.setdiff1d(np.arange(made.shape[axis]), dropped)
    moved = np.moveaxis(made, axis, 0).copy()
    how = rng.standard_normal((len(dropped), len(kept))) / 2
    moved[list(dropped)] = np.tensordot(how, moved[kept], 1)
    return np.ascontiguousarray(np.moveaxis(moved, 0, axis)).astype(np.float32)


GONE = (1, 4)
_IMAGE = "g (float[N,3,9,9] x) => (float[N,{y}] y) {{h = Conv<pads=[1,1,1,1]>(x, a) {rest}}}"
_ROWS = "g (float[N,{t}6] x) => (float[N,{t}5] y) {{{rest}}}"


@dataclass
class Kind:
    """A layer that reads what was cut."""

    text: str
    shape: tuple[int, ...]  # of its weight w
    extra: Mapping[str, tuple[int, ...]]
    rows: tuple[int, ...] = (3, 9, 9)
    first: tuple[int, ...] = (8, 3, 3, 3)
    axis: int = 0  # along which the maker's outputs lie
    adds: bool = False  # a bias where there was none


def conv(
    rest: str, shape: tuple[int, ...], out: str, *, adds: bool = False, **extra: tuple
) -> Kind:
    return Kind(_IMAGE.format(y=out, rest=rest), shape, extra, adds=adds)


def rows(rest: str, shape: tuple[int, ...], *, tokens: str = "", **extra: tuple) -> Kind:
    size = (7, 6) if tokens else (6,)
    text = _ROWS.format(t=tokens, rest=rest)
    return Kind(text, shape, extra, size, (6, 8), 1)


KINDS = {
    "conv": conv("y = Conv(h, w, b)", (5, 8, 3, 3), "5,7,7", b=(5,)),
    "conv_without_bias": conv("y = Conv(h, w)", (5, 8, 3, 3), "5,7,7", adds=True),
    "conv_stride_dilation_pads": conv(
        "y = Conv<strides=[2,1], dilations=[2,1], pads=[1,0,2,1]>(h, w, b)",
        (5, 8, 3, 2), "5,4,9", b=(5,)),
    "conv_same_upper": conv(
        'y = Conv<strides=[2,2], auto_pad="SAME_UPPER">(h, w, b)', (5, 8, 3, 3), "5,5,5", b=(5,)),
    "conv_same_lower": conv(
        'y = Conv<strides=[2,2], auto_pad="SAME_LOWER">(h, w, b)', (5, 8, 2, 2), "5,5,5", b=(5,)),
    "transposed_conv": conv(
        "y = ConvTranspose<strides=[2,2], pads=[1,0,1,2], output_padding=[1,0]>(h, w, b)",
        (8, 5, 3, 3), "5,18,17", b=(5,)),
    "transposed_conv_without_bias": conv(
        "y = ConvTranspose<dilations=[2,1]>(h, w)", (8, 5, 2, 3), "5,11,11", adds=True),
    "batch_norm": conv(
        "c = Conv(h, w) y = BatchNormalization(c, s, b, m, v)", (5, 8, 3, 3), "5,7,7",
        s=(5,), b=(5,), m=(5,), v=(5,)),
    "batch_norm_over_bias": conv(
        "c = Conv(h, w, d) y = BatchNormalization<epsilon=0.1>(c, s, b, m, v)", (5, 8, 3, 3),
        "5,7,7", s=(5,), b=(5,), m=(5,), v=(5,), d=(5,)),
    "gemm": rows("h = Gemm(x, a) y = Gemm(h, w, b)", (8, 5), b=(5,)),
    "gemm_turned": rows("h = Gemm(x, a) y = Gemm<transB=1>(h, w, b)", (5, 8), b=(5,)),
    "gemm_alpha_beta": rows(
        "h = Gemm(x, a) y = Gemm<alpha=0.25, beta=3.0, transB=1>(h, w, b)", (5, 8), b=(1, 5)),
    "gemm_without_bias": replace(rows("h = Gemm(x, a) y = Gemm(h, w)", (8, 5)), adds=True),
    "gemm_beta_without_bias": replace(
        rows("h = Gemm(x, a) y = Gemm<alpha=2.0, beta=0.5>(h, w)", (8, 5)), adds=True),
    "matmul": rows("h = MatMul(x, a) y = MatMul(h, w)", (8, 5), tokens="7,"),
    "matmul_add": rows(
        "h = MatMul(x, a) p = MatMul(h, w) y = Add(b, p)", (8, 5), tokens="7,", b=(5,)),
    "behind_transpose": rows(
        "h = MatMul(x, a) t = Transpose<perm=[1,0]>(w) p = MatMul(h, t) y = Add(p, b)",
        (5, 8), tokens="7,", b=(5,)),
    "behind_transpose_of_no_perm": rows(
        "h = MatMul(x, a) t = Transpose(w) y = MatMul(h, t)", (5, 8), tokens="7,"),
    "behind_identity_and_cast": rows(
        "h = Gemm(x, a) i = Identity(w) t = Cast<to=1>(i) y = Gemm(h, t, b)", (8, 5), b=(5,)),
}  # fmt: skip


def teacher(kind: Kind, *, seed: int = 0) -> Model:
    rng = np.random.default_rng(seed)
    weights = {"a": mixed(rng.standard_normal(kind.first), kind.axis, GONE)}
    weights["w"] = rng.standard_normal(kind.shape).astype(np.float32)
    for name, shape in kind.extra.items():
        low = 0.5 if name in "sv" else -1.0
        weights[name] = rng.uniform(low, 2, shape).astype(np.float32)
    return parsed(kind.text, **weights)


@pytest.mark.parametrize("name", KINDS)
def test_what_others_can_stand_in_for_comes_back_exactly(name: str) -> None:
    kind = KINDS[name]
    ran = done(teacher(kind), GONE, given(smooth(300, *kind.rows)))
    before, after = ran.gains
    assert before > 0.03
    assert after < 1e-8
    unseen = {"x": smooth(9, *kind.rows, seed=77)}
    whole, less = (session(model).run(unseen)["y"] for model in (teacher(kind), ran.made))
    assert np.abs(whole - less).max() < 1e-4 * np.abs(whole).max() + 1e-4
    (layer,) = ran.layers
    assert layer.before > 0.03
    assert 0 <= layer.after < 1e-6
    assert layer.ridge is not None
    added = set(ran.made.weights()) - set(ran.plain.weights())
    assert bool(added) == kind.adds


@pytest.mark.parametrize("group", [2, 8])
def test_grouped_and_depthwise_convolutions_are_fitted_group_by_group(group: int) -> None:
    """Within a group only its own inputs can stand in; what moves comes from a layer before."""
    rng = np.random.default_rng(0)
    model = parsed(
        f"""g (float[N,3,9,9] x) => (float[N,8,7,7] y) {{
            h = Conv(x, a) m = Conv(h, k, kb)
            y = Conv<group={group}, pads=[1,1,1,1]>(m, w, b)
        }}""",
        a=mixed(rng.standard_normal((8, 3, 3, 3)), 0, GONE),
        k=rng.standard_normal((8, 8, 1, 1)).astype(np.float32),
        kb=rng.standard_normal(8).astype(np.float32),
        w=rng.standard_normal((8, 8 // group, 3, 3)).astype(np.float32),
        b=rng.standard_normal(8).astype(np.float32),
    )
    ran = done(model, GONE, given(smooth(200, 3, 9, 9)))
    before, after = ran.gains
    assert before > 0.03
    assert after < 1e-8
    assert [layer.node for layer in ran.layers] == ["m", "y"]


def test_groups_cut_whole_leave_a_grouped_convolution_that_is_refitted_behind() -> None:
    rng = np.random.default_rng(1)
    model = parsed(
        """g (float[N,8,6,6] x) => (float[N,5,6,6] y) {
            h = Conv(x, a) r = Relu(h)
            m = Conv<group=4, pads=[1,1,1,1]>(r, w, b) s = Relu(m)
            y = Conv(s, v, c)
        }""",
        a=rng.standard_normal((8, 8, 1, 1)).astype(np.float32),
        w=rng.standard_normal((8, 2, 3, 3)).astype(np.float32),
        b=rng.standard_normal(8).astype(np.float32),
        v=rng.standard_normal((5, 8, 1, 1)).astype(np.float32),
        c=rng.standard_normal(5).astype(np.float32),
    )
    graph = analyse(model)
    plan = select(graph, score(graph, "l1"), ratio=0.5)
    plain = operate(plan).model
    data = given(smooth(120, 8, 6, 6))
    made, layers, _ = refit(plan, plain, data)
    assert_same_interface(plain, made)
    assert made.weights()["w"].shape[0] < 8
    judge = Judge(graph, data)
    assert judge.drift(made) < 0.9 * judge.drift(plain)
    assert layers[-1].node == "y"


# ----------------------------------------------------------------------------------- joins, sums


def test_layers_behind_concat_and_split_are_refitted() -> None:
    rng = np.random.default_rng(2)
    model = parsed(
        """g (float[N,3,6,6] x) => (float[N,5,6,6] y) {
            h = Conv(x, a) k = Conv(x, d)
            j = Concat<axis=1>(h, k)
            p, q = Split<axis=1>(j, parts)
            u = Conv(p, w) v = Conv(q, z)
            y = Add(u, v)
        }""",
        a=mixed(rng.standard_normal((8, 3, 1, 1)), 0, GONE),
        d=rng.standard_normal((4, 3, 1, 1)).astype(np.float32),
        w=rng.standard_normal((5, 8, 1, 1)).astype(np.float32),
        z=rng.standard_normal((5, 4, 1, 1)).astype(np.float32),
        parts=np.array([8, 4], np.int64),
    )
    ran = done(model, GONE, given(smooth(100, 3, 6, 6)))
    before, after = ran.gains
    assert before > 0.01
    assert after < 1e-8


RESIDUAL = """g (float[N,8,6,6] x) => (float[N,8,6,6] y) {
    h = Conv(x, a) r = Relu(h) m = Conv(r, w, b)
    s = Add(x, m)
    k = Conv(s, c) t = Relu(k) n = Conv(t, v, d)
    y = Add(n, s)
}"""


def residual() -> Model:
    rng = np.random.default_rng(4)
    shapes = {"a": (8, 8, 1, 1), "w": (8, 8, 1, 1), "c": (16, 8, 1, 1), "v": (8, 16, 1, 1)}
    made = {name: (rng.standard_normal(s) / 2).astype(np.float32) for name, s in shapes.items()}
    bias = {name: rng.standard_normal(8).astype(np.float32) for name in "bd"}
    return parsed(RESIDUAL, **made, **bias)


def test_aiming_at_the_sum_corrects_what_earlier_layers_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    graph = analyse(residual())
    groups = {group.name: group.id for group in graph.prunable}
    first = min(groups.values())
    data, unseen = given(smooth(200, 8, 6, 6)), given(smooth(200, 8, 6, 6, seed=9))
    plan = plan_without(graph, {first: [0, 1, 2, 3]})
    plain = operate(plan).model
    judge = Judge(graph, unseen)
    aware = judge.drift(refit(plan, plain, data)[0])
    monkeypatch.setattr(_Walk, "_aimed_at_sum", lambda _, site: site)
    alone = judge.drift(refit(plan, plain, data)[0])
    assert aware < 0.9 * alone < alone < 0.7 * judge.drift(plain)


def test_a_sum_that_spreads_its_summand_is_no_target() -> None:
    """What is added to every position is compared itself: the sum has other rows."""
    rng = np.random.default_rng(5)
    model = parsed(
        """g (float[N,3,6,6] x) => (float[N,5,6,6] y) {
            o = Conv(x, e) h = Conv(x, a) p = GlobalAveragePool(h) m = Conv(p, w, b)
            y = Add(o, m)
        }""",
        e=rng.standard_normal((5, 3, 1, 1)).astype(np.float32),
        a=mixed(rng.standard_normal((8, 3, 1, 1)), 0, GONE),
        w=rng.standard_normal((5, 8, 1, 1)).astype(np.float32),
        b=rng.standard_normal(5).astype(np.float32),
    )
    ran = done(model, GONE, given(smooth(100, 3, 6, 6)))
    assert ran.gains[1] < 1e-8
    assert ran.layers[0].after < 1e-6


def test_target_loses_what_was_cut_along_any_axis() -> None:
    """Token mixing: the layer sums over tokens, its rows are channels, and channels were cut."""
    rng = np.random.default_rng(6)
    model = parsed(
        """g (float[N,7,6] x) => (float[N,7,5] y) {
            h = MatMul(x, a) t = Transpose<perm=[0,2,1]>(h)
            m = MatMul(t, k) u = Transpose<perm=[0,2,1]>(m)
            p = MatMul(u, w) y = Add(p, b)
        }""",
        a=mixed(rng.standard_normal((6, 8)), 1, GONE),
        k=rng.standard_normal((7, 7)).astype(np.float32),
        w=rng.standard_normal((8, 5)).astype(np.float32),
        b=rng.standard_normal(5).astype(np.float32),
    )
    ran = done(model, GONE, given(smooth(100, 7, 6)))
    assert ran.gains[0] > 0.01
    assert ran.gains[1] < 1e-8
    # Channels before it move the token mixer where a layer in front of them was refitted.
    deeper = parsed(
        """g (float[N,7,6] x) => (float[N,7,5] y) {
            i = MatMul(x, f) r = Relu(i)
            h = MatMul(r, a) t = Transpose<perm=[0,2,1]>(h)
            m = MatMul(t, k) q = Add(m, kb)
            u = Transpose<perm=[0,2,1]>(q)
            p = MatMul(u, w) y = Add(p, b)
        }""",
        f=rng.standard_normal((6, 12)).astype(np.float32),
        a=rng.standard_normal((12, 8)).astype(np.float32),
        k=rng.standard_normal((7, 7)).astype(np.float32),
        kb=rng.standard_normal(7).astype(np.float32),
        w=rng.standard_normal((8, 5)).astype(np.float32),
        b=rng.standard_normal(5).astype(np.float32),
    )
    graph = analyse(deeper)
    plan = select(graph, score(graph, "l1"), ratio=0.4)
    data = given(smooth(100, 7, 6))
    plain = operate(plan).model
    made, layers, _ = refit(plan, plain, data)
    assert [layer.node for layer in layers] == ["h", "m", "p"]
    judge = Judge(graph, data)
    assert judge.drift(made) < 0.9 * judge.drift(plain)


def test_layer_behind_scores_over_cut_channels_is_refitted() -> None:
    """Queries and keys lose channels: behind them no weight is narrower, and yet scores differ."""
    rng = np.random.default_rng(6)
    model = parsed(
        """g (float[N,7,6] x) => (float[N,7,5] y) {
            q = MatMul(x, a) k = MatMul(x, c) t = Transpose<perm=[0,2,1]>(k)
            s = MatMul(q, t) p = Softmax(s) v = MatMul(x, e)
            m = MatMul(p, v) z = MatMul(m, w) y = Add(z, b)
        }""",
        a=rng.standard_normal((6, 8)).astype(np.float32),
        c=rng.standard_normal((6, 8)).astype(np.float32),
        e=rng.standard_normal((6, 6)).astype(np.float32),
        w=rng.standard_normal((6, 5)).astype(np.float32),
        b=rng.standard_normal(5).astype(np.float32),
    )
    graph = analyse(model, attention="dims")
    keys = next(g for g in graph.prunable if any("c" in axis.tensor for axis in g.producers))
    plan = plan_without(graph, {keys.id: GONE})
    plain, data = operate(plan).model, given(smooth(200, 7, 6))
    made, layers, _ = refit(plan, plain, data)
    assert [layer.node for layer in layers] == ["q", "k", "z"]
    judge = Judge(graph, given(smooth(200, 7, 6, seed=44)))
    assert judge.drift(made) < 0.95 * judge.drift(plain)


# ----------------------------------------------------------------------------- what is left alone


def test_channel_scaled_by_almost_nothing_keeps_its_weights() -> None:
    kind = KINDS["batch_norm"]
    model = teacher(kind)
    scale = array(model, "s").copy()
    scale[3] = 1e-7
    for tensor in model.proto.graph.initializer:
        if tensor.name == "s":
            tensor.CopyFrom(onnx.numpy_helper.from_array(scale, "s"))
    ran = done(Model(model.proto), GONE, given(smooth(200, *kind.rows)))
    plain, made = array(ran.plain, "w"), array(ran.made, "w")
    np.testing.assert_allclose(made[3], plain[3], atol=1e-6)
    assert (np.abs(made[:3] - plain[:3]).max(axis=(1, 2, 3)) > 0.01).all()
    assert ran.gains[1] < 1e-7


def test_half_precision_stays_so() -> None:
    rng = np.random.default_rng(7)
    model = parsed(
        "g (float16[N,6] x) => (float16[N,5] y) {h = MatMul(x, a) p = MatMul(h, w) y = Add(p, b)}",
        a=(mixed(rng.standard_normal((6, 8)), 1, GONE) / 4).astype(np.float16),
        w=(rng.standard_normal((8, 5)) / 4).astype(np.float16),
        b=rng.standard_normal(5).astype(np.float16),
    )
    ran = done(model, GONE, given(smooth(300, 6).astype(np.float16)))
    before, after = ran.gains
    assert before > 0.01
    assert after < 1e-4
    assert {w.dtype for w in ran.made.weights().values()} == {np.dtype(np.float16)}
    assert ran.changed == ("b", "w")


@pytest.mark.parametrize("kind", [np.float16, ml_dtypes.bfloat16])
def test_weight_stored_in_half_and_used_in_single_stays_stored_in_half(kind: type) -> None:
    rng = np.random.default_rng(7)
    model = parsed(
        "g (float[N,6] x) => (float[N,5] y) {h = MatMul(x, a) c = Cast<to=1>(w) y = MatMul(h, c)}",
        a=mixed(rng.standard_normal((6, 8)), 1, GONE),
        w=rng.standard_normal((8, 5)).astype(kind),
    )
    ran = done(model, GONE, given(smooth(300, 6)))
    before, after = ran.gains
    assert before > 0.01
    assert after < (1e-6 if kind is np.float16 else 1e-4)
    assert ran.changed == ("w",)
    assert ran.made.weights()["w"].dtype == kind


def test_weight_beyond_half_precision_is_not_written() -> None:
    """Inputs cancel unless weights are huge: what half precision cannot hold leaves the old."""
    rng = np.random.default_rng(7)
    model = parsed(
        """g (float16[N,6] x) => (float16[N,5] y) {
            h = MatMul(x, a) t = Mul(h, tiny) p = MatMul(t, w) y = Add(p, b)
        }""",
        a=(mixed(rng.standard_normal((6, 8)), 1, GONE) / 4).astype(np.float16),
        tiny=np.array(2**-13, np.float16),
        w=np.full((8, 5), 40000, np.float16) * np.sign(rng.standard_normal((8, 5))).astype("f2"),
        b=rng.standard_normal(5).astype(np.float16),
    )
    ran = done(model, GONE, given(smooth(300, 6).astype(np.float16)))
    assert np.isfinite(array(ran.made, "w")).all()
    assert [layer.ridge for layer in ran.layers] == [None]
    before, after = ran.gains
    assert after <= before


def test_bias_that_is_added_to_half_precision_is_half_too() -> None:
    rng = np.random.default_rng(7)
    model = parsed(
        "g (float16[N,6] x) => (float16[N,5] y) {h = Gemm(x, a) y = Gemm(h, w)}",
        a=(mixed(rng.standard_normal((6, 8)), 1, GONE) / 4).astype(np.float16),
        w=(rng.standard_normal((8, 5)) / 4).astype(np.float16),
    )
    x = smooth(300, 6).astype(np.float16) + np.float16(1)
    ran = done(model, GONE, given(x))
    assert ran.gains[1] < 1e-4
    assert {w.dtype for w in ran.made.weights().values()} == {np.dtype(np.float16)}


def test_zero_bias_of_a_layer_that_stays_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """One sample: no row can be held out, so nothing is taken and nothing added."""
    kind = KINDS["gemm_without_bias"]
    ran = done(teacher(kind), GONE, given(smooth(1, *kind.rows)))
    assert [layer.ridge for layer in ran.layers] == [None]
    assert ran.changed == ()
    assert ran.made.proto.SerializeToString() == ran.plain.proto.SerializeToString()


def test_a_weight_that_is_also_an_output_keeps_its_values_there() -> None:
    rng = np.random.default_rng(8)
    model = parsed(
        """g (float[N,6] x) => (float[N,5] y, float[5] b) {
            h = Gemm(x, a) y = Gemm(h, w, b)
        }""",
        a=mixed(rng.standard_normal((6, 8)), 1, GONE),
        w=rng.standard_normal((8, 5)).astype(np.float32),
        b=rng.standard_normal(5).astype(np.float32),
    )
    graph = analyse(model)
    plan = plan_without(graph, {graph.prunable[0].id: GONE})
    data = given(smooth(200, 6) + 1)
    made, _, _ = refit(plan, operate(plan).model, data)
    ran = session(made).run(data.batches[0])
    np.testing.assert_array_equal(ran["b"], array(model, "b"))
    assert Judge(graph, data).drift(made) < 1e-8


def test_bias_that_counts_for_nothing_is_not_fitted() -> None:
    rng = np.random.default_rng(8)
    nothing = parsed(
        "g (float[N,6] x) => (float[N,5] y) {h = Gemm(x, a) y = Gemm<beta=0.0>(h, w, b)}",
        a=mixed(rng.standard_normal((6, 8)), 1, GONE),
        w=rng.standard_normal((8, 5)).astype(np.float32),
        b=rng.standard_normal(5).astype(np.float32),
    )
    ran = done(nothing, GONE, given(smooth(300, 6) + 1))
    assert ran.changed == ("w",)
    assert ran.gains[1] < 1e-8


@pytest.mark.parametrize("row", [7, 30], ids=["fitted", "held_out"])
def test_data_that_overflow_leave_a_layer_as_it_is(row: int) -> None:
    kind = KINDS["gemm"]
    x = smooth(300, *kind.rows)
    x[row, 2] = np.inf
    with np.errstate(invalid="ignore"):
        ran = done(teacher(kind), GONE, given(x))
    (layer,) = ran.layers
    assert layer.ridge is None
    assert layer.why == ("no gain on held-out data" if row == 7 else "its data overflow")
    assert ran.changed == ()


# ------------------------------------------------------------------------------- whole networks


def test_same_data_give_the_same_bytes_and_layers_are_told() -> None:
    model = conv_chain(batch="N")
    graph = analyse(model)
    plan = select(graph, score(graph, "l1"), ratio=0.4)
    plain = operate(plan).model
    data = given(smooth(70, 3, 8, 8))
    heard: list[tuple[int, int, str]] = []
    first = refit(plan, plain, data, heard=lambda *one: heard.append(one))
    second = refit(plan, plain, data)
    for name, weight in first[0].weights().items():
        assert weight.read().tobytes() == second[0].weights()[name].read().tobytes()
    assert first[1:] == second[1:]
    assert heard == [(0, 2, "c1"), (1, 2, "y")]
    judge = Judge(graph, data)
    assert judge.drift(first[0]) < 0.6 * judge.drift(plain)


def test_outputs_in_the_middle_and_several_are_all_brought_back() -> None:
    rng = np.random.default_rng(9)
    model = parsed(
        """g (float[N,3,6,6] x) => (float[N,5,6,6] u, float[N,4,6,6] v, float[N,5,6,6] y) {
            h = Conv(x, a) u = Conv(h, w, b) v = Conv(h, k)
            r = Relu(u) y = Conv(r, z)
        }""",
        a=mixed(rng.standard_normal((8, 3, 1, 1)), 0, GONE),
        w=rng.standard_normal((5, 8, 1, 1)).astype(np.float32),
        b=rng.standard_normal(5).astype(np.float32),
        k=rng.standard_normal((4, 8, 1, 1)).astype(np.float32),
        z=rng.standard_normal((5, 5, 1, 1)).astype(np.float32),
    )
    ran = done(model, GONE, given(smooth(70, 3, 6, 6)))
    assert [layer.node for layer in ran.layers] == ["u", "v", "y"]
    for name in ("u", "v", "y"):
        whole, made = (
            np.concatenate([session(m).run(b)[name] for b in ran.data.batches])
            for m in (as_model(model), ran.made)
        )
        assert np.abs(whole - made).max() < 1e-4 * np.abs(whole).max()


def test_batch_of_one_is_refitted_without_learning_by_heart() -> None:
    """One row a batch behind global pooling: unseen samples must gain too."""
    model = conv_chain((3, 8, 40))
    graph = analyse(model)
    plan = select(graph, score(graph, "l1"), ratio=0.5)
    plain = operate(plan).model
    made, _, _ = refit(plan, plain, given(smooth(24, 3, 8, 8), size=1))
    judge = Judge(graph, given(smooth(60, 3, 8, 8, seed=99), size=1))
    assert judge.drift(made) < 0.8 * judge.drift(plain)


def test_heads_of_attention_are_made_up_for() -> None:
    graph = analyse(onnx.load(MODELS / "fashion_vit.onnx"), attention="heads")
    data = load_data(MODELS / "fashion_calib.npz", graph.graph.source, limit=96)
    plan = select(graph, score(graph, "l2"), ratio=0.5)
    plain = operate(plan).model
    made, layers, _ = refit(plan, plain, data)
    assert_same_interface(plain, made)
    judge = Judge(graph, load_data(MODELS / "fashion_test.npz", graph.graph.source, limit=64))
    before, after = judge.drift(plain), judge.drift(made)
    assert after < 0.5 * before
    assert len([layer for layer in layers if layer.ridge is not None]) >= 5
