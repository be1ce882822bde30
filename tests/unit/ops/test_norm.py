from __future__ import annotations

import numpy as np
import pytest

from onnxprune.analyse import analyse
from onnxprune.data import random_data
from onnxprune.model import Model
from onnxprune.rewrite import operate
from onnxprune.verify import verify
from tests.oracle import assert_rewrites, plan_at
from tests.unit.ops.models import (
    assert_coupled,
    assert_exact,
    assert_frozen,
    attribute,
    between_convs,
    between_matmuls,
    halved,
    model,
    reason,
    units,
)

VARIANCE = np.linspace(0.5, 1.5, 8, dtype=np.float32)


def test_batch_normalization_takes_its_four_parameters_along() -> None:
    found = between_convs("m = BatchNormalization(a, s, b, e, v)", s=(8,), b=(8,), e=(8,),
                          v=VARIANCE)  # fmt: skip
    assert_coupled(analyse(found), ("w1", 0), ("s", 0), ("b", 0), ("e", 0), ("v", 0), ("w2", 1))
    assert_exact(found)


def test_batch_normalization_in_training_takes_running_statistics_along() -> None:
    middle = """n, r, t = BatchNormalization<training_mode=1>(a, s, b, e, v)
        r1 = Unsqueeze(r, axes)  t1 = Unsqueeze(t, axes)  r2 = Mul(n, r1)  m = Add(r2, t1)"""
    found = between_convs(middle, axes=np.array([1, 2]), s=(8,), b=(8,), e=(8,), v=VARIANCE)
    assert_coupled(analyse(found), ("w1", 0), ("s", 0), ("v", 0), ("w2", 1))
    assert_exact(found)


def test_instance_normalization_takes_scale_and_shift_along() -> None:
    found = between_convs("m = InstanceNormalization(a, s, b)", s=(8,), b=(8,))
    assert_coupled(analyse(found), ("w1", 0), ("s", 0), ("b", 0), ("w2", 1))
    assert_exact(found)


@pytest.mark.parametrize(("opset", "size"), [(18, 4), (21, 8)])
def test_group_normalization_goes_by_whole_groups(opset: int, size: int) -> None:
    found = between_convs("m = GroupNormalization<num_groups=4>(a, s, b)", opset=opset, s=(size,),
                          b=(size,))  # fmt: skip
    graph = analyse(found)
    assert [group.size for group in graph.prunable] == [4]
    assert attribute(halved(found)["m"], "num_groups") == 2
    assert_exact(found)


@pytest.mark.parametrize("op", ["LayerNormalization", "RMSNormalization"])
def test_norm_over_channels_freezes_them(op: str) -> None:
    found = between_matmuls(f"m = {op}(a, s)", opset=23, s=(8,))
    assert_frozen(found, "w1", op, "'m'", "works over channels")


@pytest.mark.parametrize("op", ["LayerNormalization", "RMSNormalization"])
def test_norm_over_space_lets_channels_pass(op: str) -> None:
    found = between_convs(f"m = {op}<axis=2>(a, s)", opset=23, s=(8, 8))
    assert_coupled(analyse(found), ("w1", 0), ("w2", 1))
    assert_exact(found)


SOFT = ["Softmax", "LogSoftmax", "Hardmax"]


@pytest.mark.parametrize("op", SOFT)
@pytest.mark.parametrize("opset", [11, 13])
def test_softmax_over_channels_freezes_them(op: str, opset: int) -> None:
    found = between_convs(f"m = {op}<axis=1>(a)", opset=opset)
    assert_frozen(found, "w1", f"{op} 'm'", "works over channels")


@pytest.mark.parametrize("op", SOFT)
def test_softmax_over_space_lets_channels_pass(op: str) -> None:
    found = between_convs(f"m = {op}<axis=-1>(a)")
    assert_coupled(analyse(found), ("w1", 0), ("w2", 1))
    assert_exact(found)


@pytest.mark.parametrize("op", SOFT)
def test_old_softmax_looks_over_all_axes_from_its_own_on(op: str) -> None:
    found = between_matmuls(f"m = {op}<axis=1>(a)", opset=11)
    assert_frozen(found, "w1", f"{op} 'm'", "works over channels")


def test_cumulative_sum_freezes_the_axis_it_runs_along() -> None:
    assert_frozen(between_convs("m = CumSum(a, k)", k=np.asarray(1)), "w1", "CumSum 'm'")
    found = between_convs("m = CumSum(a, k)", k=np.asarray(-1))
    assert_coupled(analyse(found), ("w1", 0), ("w2", 1))
    assert_exact(found)


def test_running_product_passes_channels_off_its_axis() -> None:
    found = between_convs("m = CumProd(a, k)", opset=26, k=np.asarray(2))
    assert_coupled(analyse(found), ("w1", 0), ("w2", 1))
    assert_exact(found)


def test_local_response_normalization_freezes_channels() -> None:
    assert_frozen(between_convs("m = LRN<size=3>(a)"), "w1", "LRN 'm'", "works over channels")


def test_lp_normalization_freezes_its_axis_only() -> None:
    assert_frozen(between_convs("m = LpNormalization<axis=1>(a)"), "w1", "LpNormalization 'm'")
    found = between_convs("m = LpNormalization<axis=2>(a)")
    assert_coupled(analyse(found), ("w1", 0), ("w2", 1))
    assert_exact(found)


@pytest.mark.parametrize("axes", ["<axes=[0,2,3]>", "<axes=[2,3]>"])
def test_mean_variance_normalization_over_space_lets_channels_pass(axes: str) -> None:
    found = between_convs(f"m = MeanVarianceNormalization{axes}(a)", opset=13)
    assert_coupled(analyse(found), ("w1", 0), ("w2", 1))
    assert_exact(found)


def test_mean_variance_normalization_over_channels_freezes_them() -> None:
    found = between_convs("m = MeanVarianceNormalization<axes=[1,2,3]>(a)", opset=13)
    assert_frozen(found, "w1", "MeanVarianceNormalization 'm'")


def exact_after_allow_norm(found: Model) -> bool:
    graph = analyse(found, allow_norm=True)
    plan = plan_at(graph, 0.5)
    assert plan.removes > 0
    pruned = operate(plan).model
    verdict = verify(found, pruned, twin=None, data=random_data(found), level="twin")
    assert verdict.status == "passed", verdict.reason
    return graph.exact(plan.keep)


def test_allow_norm_cuts_under_layer_normalization_and_is_not_exact() -> None:
    middle = "m = LayerNormalization<axis=-1>(a, s, t)"
    found = between_matmuls(middle, s=(8,), t=(8,))
    assert_frozen(found, "w1", "LayerNormalization", "m")
    assert not exact_after_allow_norm(found)
    assert_coupled(analyse(found, allow_norm=True), ("w1", 1), ("s", 0), ("t", 0), ("w2", 0))


def test_allow_norm_takes_equal_counts_from_every_group_of_a_group_normalization() -> None:
    found = between_convs("m = GroupNormalization<num_groups=2>(a, s, t)", s=(8,), t=(8,))
    graph = analyse(found, allow_norm=True)
    (group,) = graph.prunable
    assert [cell.size for cell in group.cells] == [4, 4]
    assert not exact_after_allow_norm(found)


def test_allow_norm_leaves_what_no_normalization_touches_exact() -> None:
    assert exact_after_allow_norm(between_convs("m = Relu(a)"))


def test_instance_normalization_of_channels_in_the_batch_keeps_its_parameters() -> None:
    middle = """t = Transpose<perm=[1,0,2,3]>(a) i = InstanceNormalization(t, s, b)
        m = Transpose<perm=[1,0,2,3]>(i)"""
    found = between_convs(middle, s=(2,), b=(2,))
    graph = analyse(found)
    assert_coupled(graph, ("w1", 0), ("w2", 1))
    assert units(graph, "s", 0) == [None, None]
    assert_exact(found)


def test_allow_norm_keeps_parameters_that_stand_for_whole_groups() -> None:
    found = between_convs("m = GroupNormalization<num_groups=2>(a, s, b)", opset=18, s=(2,), b=(2,))
    graph = analyse(found, allow_norm=True)
    assert [cell.size for cell in graph.prunable[0].cells] == [4, 4]
    assert units(graph, "s", 0) == [None, None]
    plan = plan_at(graph, 0.5)
    assert not graph.exact(plan.keep)
    assert assert_rewrites(found, plan).model.weights()["s"].shape == (2,)


def test_layer_normalization_without_a_bias_lets_other_channels_pass() -> None:
    middle = (
        "t = Transpose<perm=[0,2,1]>(a) n = LayerNormalization(t, s) m = Transpose<perm=[0,2,1]>(n)"
    )
    found = between_matmuls(middle, s=(6,))
    found.proto.graph.node[2].input.append("")
    assert_coupled(analyse(found), ("w1", 1), ("w2", 0))
    assert_exact(found)


def test_cumulative_sum_along_an_axis_given_at_run_time_freezes_its_input() -> None:
    text = """g (float[2,6,3] x, int64 axis) => (float[n,t,c] y) {
        a = MatMul(x, w1) m = CumSum(a, axis) y = MatMul(m, w2)}"""
    graph = analyse(model(text, w1=(3, 8), w2=(8, 4)))
    assert "CumSum 'm' runs along an axis that is not known" in reason(graph, "w1")


def test_allow_norm_takes_the_same_number_from_every_row_under_a_mean() -> None:
    middle = "r = Reshape(a, g) n = LayerNormalization(r, s) m = Reshape(n, back)"
    shapes = {"g": np.array([2, 6, 2, 4]), "back": np.array([2, 6, 8])}
    found = between_matmuls(middle, s=(4,), **shapes)
    graph = analyse(found, allow_norm=True)
    assert units(graph, "w1", 1) == units(graph, "s", 0) * 2
    plan = plan_at(graph, 0.5)
    assert not graph.exact(plan.keep)
    weights = assert_rewrites(found, plan).model.weights()
    assert [weights[name].shape for name in ("w1", "s", "w2")] == [(3, 4), (2,), (4, 4)]


@pytest.mark.parametrize(
    "middle",
    [
        "m = LpNormalization<axis=-1>(a)",
        "r = ReduceL2<axes=[2]>(a) n = Max(r, tiny) m = Div(a, n)",
    ],
    ids=["one node", "decomposed"],
)
def test_allow_norm_cuts_under_a_length_too(middle: str) -> None:
    given = {"tiny": np.array([1e-6], np.float32)} if "tiny" in middle else {}
    found = between_matmuls(middle, opset=13, **given)
    assert_frozen(found, "w1", "channels that a cut would change")
    assert not exact_after_allow_norm(found)
    assert_coupled(analyse(found, allow_norm=True), ("w1", 1), ("w2", 0))
