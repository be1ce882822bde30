"""Orders of channels in which an N:M pattern keeps more."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from onnxprune.patterns import NM
from onnxprune.permute import Order, kept, search

TWO_OF_FOUR = NM(2, 4)


@pytest.mark.parametrize("draw", ["normal", "uniform"])
def test_a_random_matrix_gets_a_third_of_the_gap_back(draw: str) -> None:
    rng = np.random.default_rng(1)
    scores = np.abs(rng.standard_normal((128, 64))) if draw == "normal" else rng.random((128, 64))
    found = search(scores, TWO_OF_FOUR, work=2e7)
    assert found.recovered >= 0.3
    np.testing.assert_allclose(found.after, kept(scores, TWO_OF_FOUR, found.channels), rtol=1e-12)
    assert sorted(found.channels) == list(range(64))


def test_two_runs_get_their_best_order() -> None:
    scores = np.random.default_rng(0).random((6, 8))
    best = max(kept(scores, TWO_OF_FOUR, np.array(one)) for one in permutations(range(8)))
    np.testing.assert_allclose(search(scores, TWO_OF_FOUR).after, best)


def test_large_channels_in_one_run_are_spread_out() -> None:
    scores = np.full((5, 16), 0.01)
    scores[:, :8] = 1  # two runs hold all that matters
    found = search(scores, TWO_OF_FOUR)
    assert found.recovered == pytest.approx(1)


@pytest.mark.parametrize("pattern", [NM(1, 4), NM(4, 8), NM(1, 2), NM(8, 16)], ids=str)
def test_other_patterns_gain_too(pattern: NM) -> None:
    scores = np.abs(np.random.default_rng(3).standard_normal((40, 64)))
    found = search(scores, pattern, work=3e6)
    assert found.after > found.before
    assert found.best >= found.after


def test_the_same_work_gives_the_same_order_and_progress_ends() -> None:
    scores = np.abs(np.random.default_rng(3).standard_normal((600, 32)))
    heard: list[float] = []
    first = search(scores, TWO_OF_FOUR, work=1e6, heard=heard.append)
    second = search(scores, TWO_OF_FOUR, work=1e6)
    np.testing.assert_array_equal(first.channels, second.channels)
    assert heard == sorted(heard)
    assert heard[-1] == 1


def test_one_run_has_nothing_to_exchange() -> None:
    found = search(np.ones((3, 4)), TWO_OF_FOUR)
    assert isinstance(found, Order)
    np.testing.assert_array_equal(found.channels, np.arange(4))
