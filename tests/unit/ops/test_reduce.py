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
)

REDUCTIONS = [
    "ReduceMean",
    "ReduceSum",
    "ReduceMax",
    "ReduceMin",
    "ReduceProd",
    "ReduceL1",
    "ReduceL2",
    "ReduceLogSum",
    "ReduceLogSumExp",
    "ReduceSumSquare",
]
BOUNDED = "s = Sigmoid(a)  h = Add(s, half)"
HALF = np.asarray(0.5, np.float32)


@pytest.mark.parametrize("op", REDUCTIONS)
def test_reduction_over_space_lets_channels_pass(op: str) -> None:
    found = between_convs(f"{BOUNDED}  r = {op}(h, axes)  t = Tanh(r)  m = Add(a, t)", half=HALF,
                          axes=np.asarray([2, -1]))  # fmt: skip
    assert_coupled(analyse(found), ("w1", 0), ("w2", 1))
    assert_exact(found)


@pytest.mark.parametrize("op", REDUCTIONS)
def test_reduction_that_drops_an_axis_moves_channels_along(op: str) -> None:
    middle = f"{BOUNDED}  r = {op}<keepdims=0>(h, axes)  m = Unsqueeze(r, axes)"
    found = between_convs(middle, half=HALF, axes=np.asarray([2]))
    assert_coupled(analyse(found), ("w1", 0), ("w2", 1))
    assert_exact(found)


@pytest.mark.parametrize("op", REDUCTIONS)
def test_reduction_over_channels_freezes_them(op: str) -> None:
    found = between_convs(f"{BOUNDED}  r = {op}(h, axes)  m = Mul(a, r)", half=HALF,
                          axes=np.asarray([1]))  # fmt: skip
    assert_frozen(found, "w1", f"{op} 'r'", "works over channels")


def test_reduction_over_all_axes_by_default_freezes_channels() -> None:
    found = between_convs("r = ReduceMean(a)  m = Mul(a, r)")
    assert_frozen(found, "w1", "ReduceMean 'r'")


def test_reduction_over_no_axes_lets_everything_pass() -> None:
    found = between_convs("m = ReduceSum<noop_with_empty_axes=1>(a)")
    assert_coupled(analyse(found), ("w1", 0), ("w2", 1))
    assert_exact(found)


@pytest.mark.parametrize("op", ["ArgMax", "ArgMin"])
def test_search_over_space_lets_channels_pass_and_over_channels_freezes_them(op: str) -> None:
    middle = "r = {}<axis={}>(a)  n = Cast<to=1>(r)  m = Add(a, n)"
    found = between_convs(middle.format(op, 2))
    assert_coupled(analyse(found), ("w1", 0), ("w2", 1))
    assert_exact(found)
    assert_frozen(between_convs(middle.format(op, 1)), "w1", f"{op} 'r'", "works over channels")


def test_top_k_passes_labels_to_values_and_places() -> None:
    middle = "v, i = TopK<axis=2>(a, k)  n = Cast<to=1>(i)  m = Add(v, n)"
    found = between_convs(middle, k=np.asarray([3]))
    assert_coupled(analyse(found), ("w1", 0), ("w2", 1))
    assert_exact(found)


def test_top_k_over_channels_freezes_them() -> None:
    found = between_convs("m, i = TopK<axis=1>(a, k)", k=np.asarray([3]), reads=3)
    assert_frozen(found, "w1", "TopK 'm'", "works over channels")


def test_reduction_over_axes_nobody_knows_freezes_what_it_reads() -> None:
    middle = "j = Slice(k, z, o) axes = Cast<to=7>(j) r = ReduceSum(a, axes) m = Add(a, r)"
    many = np.ones(65, np.float32)  # too many to follow
    found = between_matmuls(middle, k=many, z=np.array([0]), o=np.array([1]))
    assert_frozen(found, "w1", "ReduceSum 'r' reduces axes that are not known")
