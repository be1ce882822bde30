"""Sparsity patterns: which weights of a matrix are zero together, and which of them to keep.

A layer is seen as matrices of shape (groups, outputs, taps * channels): what is summed over runs
along the last axis, channels fastest, so that neighbours are channels next to one another at one
kernel position. Everything here works on whole arrays of that form.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from onnxprune.errors import UsageError
from onnxprune.types import AnyArray, BoolArray, Shape

_PAIRWISE = 8  # up to so many in a run every two are compared; beyond, sorting is faster
_CHUNK = 1 << 16  # runs ranked at a time, so that they stay in the processor's cache
_KNOWN = "2:4, N:M, 1xN, Nx1, BxB, kernel or unstructured"


@dataclass(frozen=True, slots=True)
class NM:
    """At most ``n`` weights other than zero in each run of ``m`` channels."""

    n: int
    m: int

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


@dataclass(frozen=True, slots=True)
class Block:
    """Blocks of ``outputs`` by ``channels`` weights, zero as a whole: vectors where one is 1."""

    outputs: int
    channels: int

    def __str__(self) -> str:
        return f"{self.outputs}x{self.channels}"


@dataclass(frozen=True, slots=True)
class Kernel:
    """Kernels of a convolution, all taps from one channel to one output, zero as a whole."""

    def __str__(self) -> str:
        return "kernel"


@dataclass(frozen=True, slots=True)
class Unstructured:
    """Single weights, wherever they are."""

    def __str__(self) -> str:
        return "unstructured"


Pattern = NM | Block | Kernel | Unstructured


def parse(text: str) -> Pattern:
    """The pattern that a person writes.

    Raises:
        UsageError: It is none.
    """
    spelled = text.strip().lower()
    if spelled == "kernel":
        return Kernel()
    if spelled == "unstructured":
        return Unstructured()
    if match := re.fullmatch(r"(\d{1,4}):(\d{1,4})", spelled):
        n, m = map(int, match.groups())
        if not 0 < n < m:
            raise UsageError(f"pattern {text} is not N:M with 0 < N < M", hint="--pattern 2:4")
        return NM(n, m)
    if match := re.fullmatch(r"(\d{1,4})x(\d{1,4})", spelled):
        outputs, channels = map(int, match.groups())
        if not (outputs and channels and outputs * channels > 1):
            raise UsageError(
                f"pattern {text} has no blocks of more than one weight",
                hint="--pattern unstructured thins single weights",
            )
        if 1 != outputs != channels != 1:
            raise UsageError(
                f"pattern {text} is neither a vector nor a square block", hint=f"give {_KNOWN}"
            )
        return Block(outputs, channels)
    raise UsageError(f"pattern '{text}' is not known", hint=f"give {_KNOWN}")


def sparsity_of(pattern: Pattern, asked: float | None) -> float:
    """Share of zeros that a pattern means, or that was asked for beside it.

    Raises:
        UsageError: N:M means another share, or the pattern needs one and has none.
    """
    if isinstance(pattern, NM):
        implied = 1 - pattern.n / pattern.m
        if asked is not None and abs(asked - implied) > 1e-9:
            raise UsageError(
                f"pattern {pattern} means sparsity {implied:g}, not {asked:g}",
                hint="leave out --sparsity",
            )
        return implied
    if asked is None:
        raise UsageError(
            f"pattern {pattern} needs to know how much is to be zero", hint="--sparsity 0.5"
        )
    if not 0 < asked < 1:
        raise UsageError(f"sparsity is {asked:g}", hint="give 0 < sparsity < 1")
    return asked


def misfit(pattern: Pattern, shape: Shape, taps: int) -> str | None:
    """Why (groups, outputs, taps * channels) weights cannot hold a pattern; None if they can."""
    outputs, channels = shape[-2], shape[-1] // max(1, taps)
    match pattern:
        case NM(_, run) | Block(_, run) if channels % run or not channels:
            many = "1 channel" if channels == 1 else f"{channels} channels"
            return f"{many} to sum over, not a multiple of {run}"
        case Block(height, _) if outputs % height:
            return f"{outputs} output{'s' if outputs != 1 else ''}, not a multiple of {height}"
    return None


def mask(pattern: Pattern, scores: AnyArray, sparsity: float, *, taps: int = 1) -> BoolArray:
    """What to keep, so that the scores kept are the most that the pattern allows.

    Args:
        pattern: The pattern; ``misfit`` has nothing against it.
        scores: Score of each weight, >= 0, shape (..., outputs, taps * channels).
        sparsity: Share of blocks, kernels or weights that goes, rounded down; N:M implies its own.
        taps: Kernel positions, which run slower than channels along the last axis.

    Returns:
        True = keep, in the shape of ``scores``. Of equal scores the first stays.
    """
    if isinstance(pattern, NM):
        return _best_of_runs(scores.reshape(-1, pattern.m), pattern.n).reshape(scores.shape)
    found = units(pattern, scores, taps=taps)
    keep = best(found.reshape(-1), gone(found.size, sparsity)).reshape(found.shape)
    return spread(pattern, keep, scores.shape, taps=taps)


def gone(count: int, sparsity: float) -> int:
    """How many of ``count`` units a sparsity takes: never more than asked."""
    return int(np.floor(sparsity * count + 1e-9))


def best(scores: AnyArray, fewer: int) -> BoolArray:
    """All but the ``fewer`` lowest of a row of scores; of equal ones the first stay."""
    if fewer <= 0:
        return np.ones(scores.size, np.bool_)
    limit = np.partition(scores, fewer - 1)[fewer - 1]
    keep: BoolArray = scores > limit
    level = np.flatnonzero(scores == limit)
    keep[level[: scores.size - fewer - int(keep.sum())]] = True
    return keep


def units(pattern: Pattern, scores: AnyArray, *, taps: int = 1) -> AnyArray:
    """Sum of the scores of what goes or stays together, of any pattern but N:M.

    Returns:
        Shape (..., outputs / height, taps * channels / width) for blocks, (..., outputs, channels)
        for kernels.
    """
    match pattern:
        case Block(height, width):
            *lead, outputs, columns = scores.shape
            cut = scores.reshape(*lead, outputs // height, height, columns // width, width)
            return np.asarray(cut.sum(axis=(-3, -1)))
        case Kernel():
            *lead, columns = scores.shape
            return np.asarray(scores.reshape(*lead, taps, columns // taps).sum(axis=-2))
    return scores


def spread(pattern: Pattern, keep: BoolArray, shape: Shape, *, taps: int = 1) -> BoolArray:
    """What ``units`` summed up, weight by weight again: a mask of ``shape``."""
    match pattern:
        case Block(height, width):
            return np.repeat(np.repeat(keep, height, axis=-2), width, axis=-1)
        case Kernel():
            return np.tile(keep, taps)
    return keep.reshape(shape)


def zero_units(pattern: Pattern, weights: AnyArray, *, taps: int = 1) -> tuple[int, int]:
    """How many units are zero as a whole, and how many there are; runs of N:M that hold it."""
    filled = weights != 0
    if isinstance(pattern, NM):
        runs = filled.reshape(-1, pattern.m)
        left = np.zeros(runs.shape[0], np.uint16)
        for column in range(pattern.m):
            left += runs[:, column]
        return int(np.count_nonzero(left <= pattern.n)), runs.shape[0]
    single = isinstance(pattern, Unstructured)
    whole = units(pattern, filled if single else filled.astype(np.uint32), taps=taps)
    return int(whole.size - np.count_nonzero(whole)), whole.size


def holds(pattern: Pattern, weights: AnyArray, sparsity: float, *, taps: int = 1) -> bool:
    """Whether weights of shape (..., outputs, taps * channels) have the pattern."""
    if misfit(pattern, weights.shape, taps) is not None:
        return False
    zero, count = zero_units(pattern, weights, taps=taps)
    return zero == count if isinstance(pattern, NM) else zero >= gone(count, sparsity)


def _best_of_runs(runs: AnyArray, n: int) -> BoolArray:
    """The ``n`` largest of each run; of equal ones the first stay. Shape (runs, m)."""
    count, m = runs.shape
    keep = np.empty((count, m), np.bool_)
    for start in range(0, count, _CHUNK):
        part = runs[start : start + _CHUNK]
        if m > _PAIRWISE:
            order = np.argsort(np.negative(part), axis=1, kind="stable")
            chosen = np.zeros(part.shape, np.bool_)
            np.put_along_axis(chosen, order[:, :n], True, axis=1)
            keep[start : start + _CHUNK] = chosen
            continue
        columns = np.ascontiguousarray(part.T)
        behind = np.zeros(columns.shape, np.uint8)  # how many of its run each weight stands behind
        for i in range(m):
            for j in range(i + 1, m):
                ahead = (columns[i] >= columns[j]).view(np.uint8)
                behind[j] += ahead
                behind[i] += 1 - ahead
        keep[start : start + _CHUNK] = (behind < n).T
    return keep
