from __future__ import annotations

import numpy as np
import pytest

from onnxprune.analyse import analyse
from tests.unit.ops.models import (
    assert_coupled,
    assert_exact,
    assert_frozen,
    between_convs,
    model,
    reason,
)

ROIS = np.asarray([[0, 0, 4, 4], [1, 1, 6, 6]], np.float32)


@pytest.mark.parametrize("op", ["MaxPool", "AveragePool", "LpPool"])
def test_pool_lets_channels_pass(op: str) -> None:
    found = between_convs(f"m = {op}<kernel_shape=[2,2], strides=[2,2]>(a)")
    assert_coupled(analyse(found), ("w1", 0), ("w2", 1))
    assert_exact(found)


@pytest.mark.parametrize("op", ["GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"])
def test_global_pool_lets_channels_pass(op: str) -> None:
    found = between_convs(f"m = {op}(a)")
    assert_coupled(analyse(found), ("w1", 0), ("w2", 1))
    assert_exact(found)


def test_indices_of_max_pool_freeze_the_channels_they_count_through() -> None:
    middle = "p, i = MaxPool<kernel_shape=[2,2]>(a)  n = Cast<to=1>(i)  m = Add(p, n)"
    assert_frozen(between_convs(middle), "w1", "MaxPool 'p'", "count through its channels")


@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_resize_lets_channels_pass(mode: str) -> None:
    scales = np.asarray([1, 1, 2, 2], np.float32)
    found = between_convs(f'm = Resize<mode="{mode}">(a, , s)', s=scales)
    assert_coupled(analyse(found), ("w1", 0), ("w2", 1))
    assert_exact(found)


def test_resize_by_sizes_is_given_the_channels_that_are_left() -> None:
    found = between_convs("m = Resize(a, , , s)", s=np.asarray([2, 8, 16, 16]))
    assert_coupled(analyse(found), ("w1", 0), ("w2", 1))
    assert_exact(found)


def test_upsample_lets_channels_pass() -> None:
    scales = np.asarray([1, 1, 2, 2], np.float32)
    found = between_convs("m = Upsample(a, s)", opset=9, s=scales)
    assert_coupled(analyse(found), ("w1", 0), ("w2", 1))
    assert_exact(found)


@pytest.mark.parametrize("mode", ["constant", "reflect", "edge"])
def test_padding_of_space_lets_channels_pass(mode: str) -> None:
    found = between_convs(f'm = Pad<mode="{mode}">(a, p)', p=np.asarray([0, 0, 1, 1, 0, 0, 1, 1]))
    assert_coupled(analyse(found), ("w1", 0), ("w2", 1))
    assert_exact(found)


def test_constant_padding_of_channels_shifts_what_reads_them() -> None:
    found = between_convs("m = Pad(a, p, v)", p=np.asarray([0, 2, 0, 0, 0, 1, 0, 0]), reads=11,
                          v=np.asarray(0.7, np.float32))  # fmt: skip
    assert analyse(found).prunable
    assert_exact(found)


def test_mirrored_padding_of_channels_freezes_them() -> None:
    found = between_convs('m = Pad<mode="reflect">(a, p)', p=np.asarray([0, 2, 0, 0, 0, 1, 0, 0]),
                          reads=11)  # fmt: skip
    assert_frozen(found, "w1", "Pad 'm'", "pads along channels")


def test_grid_sample_lets_channels_of_the_map_pass() -> None:
    grid = np.random.default_rng(0).uniform(-1, 1, (2, 4, 4, 2)).astype(np.float32)
    found = between_convs('m = GridSample<mode="linear">(a, g)', g=grid)
    assert_coupled(analyse(found), ("w1", 0), ("w2", 1))
    assert_exact(found)


def test_grid_sample_freezes_what_says_where_to_sample() -> None:
    middle = """p = Conv(x, v)  q = Tanh(p)  r = Transpose<perm=[0,2,3,1]>(q)
        z = Conv(q, u)  s = GridSample<mode="linear">(a, r)  m = Add(s, z)"""
    found = between_convs(middle, v=(2, 3, 1, 1), u=(8, 2, 1, 1))
    assert_frozen(found, "v", "GridSample 's'", "says where to sample")


def test_roi_align_lets_channels_pass() -> None:
    middle = "m = RoiAlign<output_height=2, output_width=2>(a, r, i)"
    found = between_convs(middle, opset=16, r=ROIS, i=np.asarray([0, 1]))
    assert_coupled(analyse(found), ("w1", 0), ("w2", 1))
    assert_exact(found)


def test_max_roi_pool_lets_channels_pass() -> None:
    rois = np.concatenate([np.asarray([[0], [1]], np.float32), ROIS], axis=1)
    found = between_convs("m = MaxRoiPool<pooled_shape=[2,2]>(a, r)", opset=16, r=rois)
    assert_coupled(analyse(found), ("w1", 0), ("w2", 1))
    assert_exact(found)


def test_padding_by_an_input_freezes_the_channels() -> None:
    text = """g (float[2,3,8,8] x, int64[8] k) => (float[n,c,h,w] y) {
        a = Conv(x, w1) m = Pad(a, k) y = Relu(m)}"""
    graph = analyse(model(text, w1=(8, 3, 1, 1)))
    assert "Pad 'm' pads along channels (tensor 'a')" in reason(graph, "w1")


def test_padding_by_computed_numbers_freezes_the_channels() -> None:
    numbers = np.tile(np.array([0, 0, 1, 1, 0, 0, 1, 1], np.float32), 9)  # too many to follow
    middle = "f = Slice(many, zero, eight) k = Cast<to=7>(f) m = Pad(a, k)"
    found = between_convs(middle, many=numbers, zero=np.array([0]), eight=np.array([8]))
    assert_frozen(found, "w1", "'m'")
    assert analyse(found).notes[0] == "'m': channels that do not stay in order are frozen"


def test_grid_sample_of_channels_in_space_freezes_them() -> None:
    middle = (
        "t = Transpose<perm=[0,2,3,1]>(a) s = GridSample(t, k) m = Transpose<perm=[0,3,1,2]>(s)"
    )
    found = between_convs(middle, k=np.zeros((2, 8, 8, 2), np.float32))
    assert_frozen(found, "w1", "GridSample 's' samples across it (tensor 't')")


def test_padding_that_is_computed_in_floats_lets_channels_pass() -> None:
    """TensorFlow's SAME, as TorchScript spells it: half of what is missing, rounded."""
    middle = """missing = Sub(wanted, had) half = Div(missing, two) floor = Floor(half)
        side = Cast<to=7>(floor) pads = Concat<axis=0>(none, side, none, side)
        m = Pad(a, pads)"""
    numbers = {"wanted": [13.0, 11.0], "had": [8.0, 8.0], "two": [2.0, 2.0]}
    floats = {name: np.array(given, np.float32) for name, given in numbers.items()}
    found = between_convs(middle, none=np.array([0, 0]), **floats)
    assert_coupled(analyse(found), ("w1", 0), ("w2", 1))
    assert_exact(found)
