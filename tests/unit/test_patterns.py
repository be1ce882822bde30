"""Patterns: what they mean, and that masks keep the most they allow."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from onnxprune.errors import UsageError
from onnxprune.patterns import (
    NM,
    Block,
    Kernel,
    Unstructured,
    holds,
    mask,
    misfit,
    parse,
    sparsity_of,
)


def scores(*shape: int, seed: int = 0) -> np.ndarray:
    return np.abs(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("2:4", NM(2, 4)),
        ("1:16", NM(1, 16)),
        ("1x4", Block(1, 4)),
        ("8x1", Block(8, 1)),
        ("2x2", Block(2, 2)),
        ("kernel", Kernel()),
        ("Unstructured", Unstructured()),
    ],
)
def test_pattern_is_read_and_spelled_back(text: str, pattern: object) -> None:
    assert parse(text) == pattern
    assert str(parse(text)) == text.lower()


@pytest.mark.parametrize("text", ["", "2", "4:2", "2:2", "0:4", "2x3", "1x1", "0x4", "x", "2:4:8"])
def test_text_that_is_no_pattern_is_refused_with_a_way_out(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(text)
    assert caught.value.hint


def test_sparsity_is_implied_by_a_run_and_asked_for_elsewhere() -> None:
    assert sparsity_of(NM(1, 4), None) == 0.75
    assert sparsity_of(Block(1, 4), 0.3) == 0.3
    for pattern, asked in [(NM(2, 4), 0.4), (Kernel(), None), (Unstructured(), 1.0)]:
        with pytest.raises(UsageError):
            sparsity_of(pattern, asked)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (4, 8), (1, 2), (5, 16), (1, 32)])
def test_runs_keep_the_largest_sum_there_is(n: int, m: int) -> None:
    given = scores(2, 6, 32)
    keep = mask(NM(n, m), given, n / m)
    runs = given.reshape(-1, m)
    best = np.sort(runs, axis=1)[:, -n:].sum(dtype=np.float64)
    assert given[keep].sum(dtype=np.float64) == pytest.approx(best, rel=1e-12)
    assert (keep.reshape(-1, m).sum(axis=1) == n).all()
    assert holds(NM(n, m), given * keep, 0.0)


def test_runs_are_as_good_as_every_choice_tried_one_by_one() -> None:
    given = scores(1, 3, 4)
    keep = mask(NM(2, 4), given, 0.5)
    for row, kept in zip(given[0], keep[0], strict=True):
        assert row[kept].sum() == max(row[list(two)].sum() for two in combinations(range(4), 2))


@pytest.mark.parametrize("text", ["1x4", "4x1", "2x2", "kernel", "unstructured"])
@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.9])
def test_blocks_go_whole_and_as_many_as_asked(text: str, sparsity: float) -> None:
    pattern, given, taps = parse(text), scores(2, 8, 9 * 4), 9
    keep = mask(pattern, given, sparsity, taps=taps)
    cut = {
        "1x4": keep.reshape(2, 8, 9, 4),
        "4x1": keep.reshape(2, 2, 4, 36).swapaxes(2, 3),
        "2x2": keep.reshape(2, 4, 2, 18, 2).transpose(0, 1, 3, 2, 4).reshape(2, 4, 18, 4),
        "kernel": keep.reshape(2, 8, 9, 4).swapaxes(2, 3),
        "unstructured": keep.reshape(2, 8, 36, 1),
    }[text]
    assert (cut.all(axis=-1) | ~cut.any(axis=-1)).all()
    whole = cut[..., 0]
    assert (~whole).sum() == int(sparsity * whole.size + 1e-9)
    assert holds(pattern, given * keep, sparsity, taps=taps)
    assert not holds(pattern, given, sparsity, taps=taps)


def test_no_block_that_goes_outweighs_one_that_stays() -> None:
    given = scores(1, 8, 16)
    keep = mask(Block(2, 2), given, 0.5)
    sums = given.reshape(1, 4, 2, 8, 2).sum(axis=(2, 4))
    stays = keep.reshape(1, 4, 2, 8, 2).all(axis=(2, 4))
    assert sums[~stays].max() <= sums[stays].min()


@pytest.mark.parametrize("text", ["2:4", "5:16", "1x2", "2x1", "unstructured"])
def test_of_equal_scores_the_first_stay(text: str) -> None:
    keep = mask(parse(text), np.ones((1, 2, 16), np.float32), 0.5)
    first = {
        "2:4": [True, True, False, False] * 4,
        "5:16": [True] * 5 + [False] * 11,
        "2x1": [True] * 8 + [False] * 8,
    }.get(text, [True] * 16)
    assert keep[0, 0].tolist() == first


def test_shape_that_cannot_hold_a_pattern_says_which_side() -> None:
    assert "6 channels" in (misfit(NM(2, 4), (1, 8, 6), 1) or "")
    assert "3 channels" in (misfit(NM(2, 4), (1, 8, 27), 9) or ""), "runs stay at one tap"
    assert "8 outputs" in (misfit(Block(3, 3), (1, 8, 9), 1) or "")
    assert misfit(Unstructured(), (1, 7, 13), 1) is None
