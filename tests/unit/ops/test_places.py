"""GatherElements and ScatterElements."""

from __future__ import annotations

import numpy as np
import pytest

from onnxprune.analyse import analyse
from tests.unit.ops.models import assert_coupled, assert_exact, assert_frozen, between_matmuls

PLACES = np.array([[0, 5, 2], [1, 1, 4]])[:, :, None]  # (batch, picked, 1)


@pytest.mark.parametrize("axis", [1, -2])
def test_elements_picked_along_another_axis_let_channels_pass(axis: int) -> None:
    middle = f"e = Expand(i, s) m = GatherElements<axis={axis}>(a, e)"
    found = between_matmuls(middle, i=PLACES, s=np.array([2, 3, 8]))
    assert_coupled(analyse(found), ("w1", 1), ("w2", 0))
    assert_exact(found)


def test_indices_that_are_written_down_are_cut_with_the_channels() -> None:
    found = between_matmuls("m = GatherElements<axis=1>(a, i)", i=PLACES.repeat(8, axis=2))
    assert_coupled(analyse(found), ("w1", 1), ("w2", 0))
    assert_exact(found)


def test_elements_picked_along_the_channels_keep_them() -> None:
    index = np.random.default_rng(0).integers(0, 8, (2, 6, 5))
    found = between_matmuls("m = GatherElements<axis=2>(a, i)", reads=5, i=index)
    assert_frozen(found, "w1", "is indexed along it")


def test_elements_picked_with_fewer_indices_keep_their_channels() -> None:
    index = PLACES.repeat(5, axis=2)
    found = between_matmuls("m = GatherElements<axis=1>(a, i)", reads=5, i=index)
    assert_frozen(found, "w1", "is indexed element by element")


@pytest.mark.parametrize("reduction", ["none", "add"])
def test_elements_written_along_another_axis_tie_old_and_new(reduction: str) -> None:
    middle = f"""s = Shape(a) z = ConstantOfShape(s) e = Expand(i, t) b = MatMul(x, w3)
        n = Slice(b, zero, three, one)
        m = ScatterElements<axis=1, reduction="{reduction}">(z, e, n)"""
    bounds = {"zero": np.array([0]), "three": np.array([3]), "one": np.array([1])}
    index = np.array([[0, 5, 2], [1, 3, 4]])[:, :, None]
    found = between_matmuls(middle, i=index, t=np.array([2, 3, 8]), w3=(3, 8), **bounds)
    assert_coupled(analyse(found), ("w3", 1), ("w2", 0))
    assert_exact(found)
