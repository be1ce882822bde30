"""What each layer and group should be a multiple of, and what the report says of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from onnxprune.alignment import Alignment, Coming, holds_pattern, steps
from onnxprune.analyse import DependencyGraph, analyse
from onnxprune.cost import stats, stats_after
from onnxprune.io import load
from onnxprune.model import Model
from onnxprune.pipeline import shrink
from onnxprune.planning import Planner, Wish
from onnxprune.report.layers import layer_reports
from onnxprune.rewrite import operate
from onnxprune.score import score
from onnxprune.select import select
from onnxprune.types import ChannelGroup, LayerReport, Width
from tests.small import MODELS, conv_chain, parsed

RNG = np.random.default_rng(0)


def widths(*sizes: int) -> DependencyGraph:
    return analyse(conv_chain((3, *sizes), bn=False))


def real(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def two_of_four(*shape: int, axis: int = 1) -> np.ndarray:
    """Every second channel that is summed over is zero."""
    weight = np.moveaxis(real(*shape), axis, 0).copy()
    weight[::2] = 0
    return np.moveaxis(weight, 0, axis)


def reported(model: Model, ratio: float = 0.0, *, auto: bool = True) -> dict[str, LayerReport]:
    graph = analyse(model)
    if not ratio:
        return {one.before.node: one for one in layer_reports(graph, stats(graph))}
    round_to = steps(graph) if auto else 1
    plan = select(graph, score(graph, "l1"), ratio=ratio, round_to=round_to)
    made = operate(plan).model
    found = layer_reports(graph, stats(graph), stats_after(graph, made, plan.keep))
    return {one.before.node: one for one in found}


def two_convs(first: np.ndarray, second: np.ndarray) -> Model:
    made = first.shape[0]
    return parsed(
        f"""g (float[1,{first.shape[1]},4,4] x) => (float[1,{second.shape[0]},4,4] y) {{
            h = Conv(x, w) r = Relu(h) y = Conv<group={made // second.shape[1]}>(r, v)
        }}""",
        w=first,
        v=second,
    )


# -- what groups are rounded to


@pytest.mark.parametrize(
    ("size", "step"),
    [(64, 8), (16, 8), (15, 4), (12, 4), (24, 8), (8, 4), (6, 2), (4, 2), (2, 1), (20, 8)],
)
def test_round_to_auto_takes_eights_or_what_a_narrow_group_can_keep(size: int, step: int) -> None:
    assert list(steps(widths(size)).values()) == [step]


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "double"])
def test_every_type_of_float_goes_by_eights(kind: str) -> None:
    dtype = {"float16": np.float16, "double": np.float64, "bfloat16": ml_dtypes.bfloat16}[kind]
    model = parsed(
        f"""g ({kind}[2,8] x) => ({kind}[2,8] y) {{
            h = MatMul(x, w) r = Relu(h) y = MatMul(r, v)
        }}""",
        w=real(8, 64).astype(dtype),
        v=real(64, 8).astype(dtype),
    )
    graph = analyse(model)
    assert list(steps(graph).values()) == [8]
    spelled = {"double": "float64"}.get(kind, kind)
    assert {want.kind for want in Alignment(graph).wants.values()} == {spelled}


def quantized(*, second: np.ndarray) -> Model:
    """A float Conv that an int8 one reads."""
    return parsed(
        """g (float[1,8,4,4] x) => (float[1,8,4,4] y) {
            h = Conv(x, w) r = Relu(h) e = DequantizeLinear(v, s) y = Conv(r, e)
        }""",
        w=real(128, 8, 1, 1),
        v=second,
        s=np.array(0.01, np.float32),
    )


INT8 = RNG.integers(-99, 99, (8, 128, 1, 1)).astype(np.int8)


def test_int8_weights_go_by_thirty_twos_and_so_does_what_feeds_them() -> None:
    model = quantized(second=INT8)
    assert list(steps(analyse(model)).values()) == [32]
    found = reported(model, 0.3)
    assert found["y"].inputs == Width(128, 96, 32, 32, aligned=True, why="32 for int8")
    assert found["h"].outputs == Width(
        128, 96, 8, 32, aligned=True, why="32 for int8 of 'y', tied to it"
    )
    last = found["y"].outputs
    assert last is not None
    assert (last.before, last.after, last.wants, last.aligned) == (8, 8, 32, False)
    assert last.why.startswith("frozen at 8: reaches output 'y'")


def test_floats_that_are_to_become_int8_go_by_thirty_twos() -> None:
    model = two_convs(real(96, 8, 1, 1), real(8, 96, 1, 1))
    graph = analyse(model)
    assert list(steps(graph).values()) == [8]
    assert list(steps(graph, Coming.pattern).values()) == [16]
    assert list(steps(graph, Coming.int8).values()) == [32]
    data = {"x": RNG.standard_normal((8, 8, 4, 4)).astype(np.float32)}
    _, report = shrink(model, ratio=0.5, round_to="auto", quantize="int8", data=data)
    (group,) = (one for one in report.groups if one.frozen is None)
    assert group.kept == 64
    assert "aligned to 64" in group.why


def test_weights_that_hold_two_of_four_go_by_sixteens() -> None:
    model = two_convs(real(96, 8, 1, 1), two_of_four(8, 96, 1, 1))
    assert list(steps(analyse(model)).values()) == [16]
    found = reported(model, 0.3)  # 68 left: 72 by eights
    assert found["y"].inputs == Width(96, 80, 16, 16, aligned=True, why="16 for the 2:4 pattern")
    assert found["h"].outputs == Width(
        96, 80, 8, 16, aligned=True, why="16 for the 2:4 pattern of 'y', tied to it"
    )


@pytest.mark.parametrize(
    ("weight", "axis", "holds"),
    [
        pytest.param(two_of_four(8, 16, 3, 3), 1, True, id="conv"),
        pytest.param(two_of_four(8, 16, 3, 3), 0, False, id="the other axis"),
        pytest.param(two_of_four(16, 8, axis=0), -2, True, id="matmul"),
        pytest.param(two_of_four(8, 18), 1, True, id="a rest of two"),
        pytest.param(np.pad(two_of_four(8, 16), [(0, 0), (0, 3)], constant_values=1), 1, False,
                     id="three in the rest"),
        pytest.param(two_of_four(8, 16).astype(np.float16), 1, True, id="half precision"),
        pytest.param(two_of_four(8, 16).astype(ml_dtypes.bfloat16), 1, True, id="bfloat16"),
        pytest.param(real(8, 16), 1, False, id="dense"),
        pytest.param(np.zeros((8, 16), np.float32), 1, False, id="nothing but zeros"),
        pytest.param(np.eye(2, dtype=np.float32), 1, False, id="too narrow for it"),
    ],
)  # fmt: skip
def test_pattern_is_seen_along_the_axis_that_is_summed_over(
    weight: np.ndarray, axis: int, holds: bool
) -> None:
    assert holds_pattern(weight, axis) is holds


def test_pattern_of_a_gemm_and_a_matmul_is_seen_the_way_the_node_reads_it() -> None:
    model = parsed(
        """g (float[2,8] x) => (float[2,8] y) {
            h = Gemm<transB=1>(x, w) r = Relu(h) t = Transpose<perm=[1,0]>(v) m = MatMul(r, t)
            y = Relu(m)
        }""",
        w=two_of_four(64, 8),
        v=two_of_four(8, 64),
    )
    found = {name: want.multiple for (name, _), want in Alignment(analyse(model)).wants.items()}
    assert found == {"h": 16, "m": 16}


def test_sixty_four_is_taken_where_not_one_channel_more_stays_for_it() -> None:
    found = reported(conv_chain((3, 128, 128), bn=False), 0.5)
    assert found["c1"].inputs == Width(128, 64, 8, 64, aligned=True, why="64 costs nothing")
    found = reported(conv_chain((3, 128, 128), bn=False), 0.4)
    assert found["c1"].inputs == Width(128, 80, 8, 8, aligned=True, why="8 for float32")


def test_what_auto_rounds_to_is_kept() -> None:
    graph = widths(64, 12, 48)
    plan = Planner(graph, Wish(ratio=0.4, round_to=steps(graph))).plan(score(graph, "l1"))
    kept = [plan.keep[group.id].size for group in graph.prunable]
    assert kept == [40, 8, 32]
    found = Alignment(graph)
    said = [found.said(g, k) for g, k in zip(graph.prunable, kept, strict=True)]
    assert said == ["aligned to 8", "aligned to 8", "aligned to 32"]
    first, second, _ = graph.prunable
    assert found.said(first, 39) == "not aligned to 8: keeps 39, --round-to 8 would align it"
    assert found.said(second, 11) == "not aligned to 8: only 12 to begin with"
    assert found.said(replace(first, frozen="held"), 39) == "not aligned to 8: frozen at 39"


def test_heads_are_aligned_by_their_width_so_any_number_of_them_may_go() -> None:
    graph = analyse(load(MODELS / "fashion_vit.onnx"))
    units = steps(graph)
    assert {units[g.id] for g in graph.prunable if g.unit == "head"} == {1}
    assert {units[g.id] for g in graph.prunable if g.unit == "channel"} == {8}
    found = {one.before.node: one for one in layer_reports(graph, stats(graph))}
    qkv = found["/blocks/blocks.0/attention/qkv/MatMul"].outputs
    out = found["/blocks/blocks.0/attention/out/MatMul"].inputs
    assert qkv is not None
    assert out is not None
    assert (qkv.before, qkv.step, out.before, out.step) == (192, 64, 64, 64)
    assert found["/blocks/blocks.0/attention/MatMul"].inputs is None  # of two activations


# -- why a layer is not aligned


def test_each_side_that_is_not_aligned_says_why() -> None:
    found = reported(conv_chain((3, 40, 12), bn=False), 0.35, auto=False)
    sides = {(name, way): getattr(one, way) for name, one in found.items()
             for way in ("inputs", "outputs")}  # fmt: skip
    assert {place: side.why for place, side in sides.items() if not side.aligned} == {
        ("c0", "inputs"): "3 channels of input 'x'",
        ("c0", "outputs"): "26 are left: a cut by --round-to auto would align them",
        ("c1", "inputs"): "26 are left: a cut by --round-to auto would align them",
        ("y", "outputs"): "frozen at 4: reaches output 'y' through Gemm 'y'",
    }
    whole = reported(conv_chain((3, 20, 12), bn=False))
    assert whole["c1"].inputs == Width(
        20, None, 8, 8, aligned=False,
        why="20 to begin with: a cut by --round-to auto would align them",
    )  # fmt: skip
    assert whole["c1"].outputs == Width(12, None, 8, 4, aligned=False, why="only 12 to begin with")
    assert not whole["c1"].aligned


def test_side_of_several_groups_says_how_narrow_the_narrowest_is() -> None:
    model = parsed(
        """g (float[1,3,8,8] x) => (float[1,8,8,8] y) {
            a = Conv(x, u) b = Conv(x, v) r = Concat<axis=1>(a, b) s = Relu(r) y = Conv(s, w)
        }""",
        u=real(20, 3, 1, 1),
        v=real(4, 3, 1, 1),
        w=real(8, 24, 1, 1),
    )
    assert reported(model, 0.5)["y"].inputs == Width(
        24, 18, 8, 2, aligned=False,
        why="2 channel groups lie along it and are rounded apart, the narrowest of 4",
    )  # fmt: skip


def test_side_of_which_a_part_is_frozen_says_how_much() -> None:
    model = parsed(
        """g (float[1,3,8,8] x) => (float[1,4,8,8] z, float[1,8,8,8] y) {
            z = Conv(x, u) b = Conv(x, v) r = Concat<axis=1>(z, b) s = Relu(r) y = Conv(s, w)
        }""",
        u=real(4, 3, 1, 1),
        v=real(20, 3, 1, 1),
        w=real(8, 24, 1, 1),
    )
    inputs = reported(model, 0.5)["y"].inputs
    assert inputs is not None
    assert (inputs.before, inputs.after, inputs.aligned) == (24, 20, False)
    assert inputs.why.startswith("4 of 20 are frozen: reaches output 'z'")


def test_heads_too_wide_to_round_are_counted() -> None:
    model = parsed(
        """g (float[1,4,24] x) => (float[1,4,8] y) {
            q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv)
            q4 = Reshape(q, split) k4 = Reshape(k, split) v4 = Reshape(v, split)
            qt = Transpose<perm=[0,2,1,3]>(q4) kt = Transpose<perm=[0,2,3,1]>(k4)
            vt = Transpose<perm=[0,2,1,3]>(v4)
            z = MatMul(qt, kt) p = Softmax<axis=-1>(z) o = MatMul(p, vt)
            ot = Transpose<perm=[0,2,1,3]>(o) f = Reshape(ot, join) y = MatMul(f, wo)
        }""",
        wq=real(24, 60),
        wk=real(24, 60),
        wv=real(24, 60),
        wo=real(60, 8),
        split=np.array([1, 4, 4, 15]),
        join=np.array([1, 4, 60]),
    )
    found = reported(model, 0.5)
    assert found["y"].inputs == Width(
        60, 30, 8, 30, aligned=False, why="only 4 heads of 15 to begin with"
    )


def test_inputs_of_a_grouped_convolution_count_in_each_group() -> None:
    wide = two_convs(real(64, 8, 1, 1), real(64, 32, 1, 1))
    assert sorted(steps(analyse(wide)).values()) == [16]  # 8 in each of 2 groups
    found = reported(wide, 0.3)["y"]
    assert found.inputs == Width(32, 24, 8, 8, aligned=True, why="8 for float32")
    narrow = two_convs(real(64, 8, 1, 1), real(64, 4, 1, 1))
    assert list(steps(analyse(narrow)).values()) == [8]
    inputs = reported(narrow)["y"].inputs
    assert inputs == Width(
        4, None, 8, 1, aligned=False, why="only 4 in each of 16 groups to begin with"
    )


def test_depthwise_filters_read_one_channel_and_are_aligned_by_what_they_make() -> None:
    model = parsed(
        """g (float[1,8,4,4] x) => (float[1,8,4,4] y) {
            h = Conv(x, w) d = Conv<group=48>(h, k) r = Relu(d) y = Conv(r, v)
        }""",
        w=real(48, 8, 1, 1),
        k=real(48, 1, 1, 1),
        v=real(8, 48, 1, 1),
    )
    found = reported(model, 0.5)["d"]
    assert found.outputs == Width(48, 24, 8, 8, aligned=True, why="8 for float32")
    assert found.inputs == Width(1, 1, 8, 8, aligned=False, why="each filter reads 1 channel")


def test_width_under_a_normalisation_is_frozen_by_its_name() -> None:
    model = parsed(
        """g (float[2,3,8] x) => (float[2,3,8] y) {
            h = MatMul(x, w) n = LayerNormalization(h, s) y = MatMul(n, v)
        }""",
        w=real(8, 12),
        s=np.ones(12, np.float32),
        v=real(12, 8),
    )
    inputs = reported(model)["y"].inputs
    assert inputs is not None
    assert not inputs.aligned
    assert inputs.why.startswith("frozen at 12: LayerNormalization 'n' works over channels")


def test_layer_of_one_output_says_that_it_stays() -> None:
    model = parsed(
        "g (float[1,8,6] x) => (float[1,8,6] y) { h = Conv<pads=[1,1]>(x, w) y = Mul(x, h) }",
        w=real(1, 8, 3),
    )
    outputs = reported(model)["h"].outputs
    assert outputs is not None
    assert (outputs.before, outputs.aligned) == (1, False)


def test_members_of_a_group_are_asked_once_however_many_layers_it_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    graph = analyse(load(MODELS / "fashion_resnet.onnx"))
    plain, asked = Alignment._asked, Counter[int]()

    def counted(self: Alignment, group: ChannelGroup) -> object:
        asked[group.id] += 1
        return plain(self, group)

    monkeypatch.setattr(Alignment, "_asked", counted)
    layer_reports(graph, stats(graph))
    assert max(asked.values()) == 1
    assert len(asked) > 1
