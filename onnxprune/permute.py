"""Which order of channels keeps most of a layer in an N:M pattern.

Runs of M channels meet in pairs, each pair once a sweep; the best way to share out its 2 M channels
is taken. Where a sweep finds nothing more, a few channels change places at random and the search
goes on from there, as long as that pays and there is work left to be spent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from onnxprune.patterns import NM
from onnxprune.types import BoolArray, Float32Array, FloatArray, IntArray

_WORK = 1e8  # sums of runs that are looked at, times rows
_LEAST_WORK = 2e4  # that a meeting counts for, however small
_PATIENCE = 4  # times as many shakes as there are runs without a gain end the search
_MOST_ROWS = 512  # of a tall matrix: a sample of them tells gains apart
_ALL_SHARES = 4  # up to this M every way to share out 2 M channels is tried, beyond single swaps
_CHUNK = 1 << 22  # elements that are worked on at once
_SHAKEN = 4  # channels that change places, at most
_LEAST_GAIN = 1e-6  # of what is kept, in a sweep: less is rounding

Heard = Callable[[float], None]  # share of the work that is done


@dataclass(frozen=True)
class Order:
    """An order of channels.

    Attributes:
        channels: Which channel comes at each place.
        before, after: Sum of the scores that the pattern keeps, in the old order and in the new.
        best: The same without runs: the largest scores, as many of them.
    """

    channels: IntArray
    before: float
    after: float
    best: float

    @property
    def recovered(self) -> float:
        """Share of what the runs cost that the new order gives back."""
        return (self.after - self.before) / max(self.best - self.before, 1e-300)


def search(
    scores: FloatArray, pattern: NM, seed: int = 0, work: float = _WORK, heard: Heard | None = None
) -> Order:
    """An order of channels in which the pattern keeps more.

    Args:
        scores: Of each weight, >= 0, shape (rows, channels): rows of all that reads the channels.
        pattern: N:M, where M divides the number of channels.
        seed: Draws the order of meetings, and what changes places.
        work: Where to stop; the same work gives the same order.
        heard: Called with the share of it that is done.

    Source: exhaustive search over pairs of stripes as in Pool & Yu 2021, Channel Permutations for
        N:M Sparsity; meetings in rounds and shaking are ours.
    """
    rng = np.random.default_rng(seed)
    rows, channels = scores.shape
    some = np.sort(rng.choice(rows, _MOST_ROWS, replace=False)) if rows > _MOST_ROWS else slice(0)
    seen = scores[some] if rows > _MOST_ROWS else scores
    whole = np.ascontiguousarray(seen.T.astype(np.float32))
    found = _Search(whole, pattern, rng, work, heard).run()
    before, after = (kept(scores, pattern, one) for one in (np.arange(channels), found))
    if after <= before:
        found, after = np.arange(channels), before
    flat = scores.reshape(-1)
    stay = flat.size * pattern.n // pattern.m
    best = float(np.partition(flat, flat.size - stay)[flat.size - stay :].sum(dtype=np.float64))
    return Order(found, before, after, best)


def kept(scores: FloatArray, pattern: NM, order: IntArray) -> float:
    """Sum of the scores that a pattern keeps where channels stand in some order."""
    runs = scores[:, order].reshape(len(scores), -1, pattern.m)
    first = pattern.m - pattern.n
    return float(np.partition(runs, first - 1, axis=2)[:, :, first:].sum(dtype=np.float64))


class _Search:
    def __init__(
        self,
        scores: Float32Array,
        pattern: NM,
        rng: np.random.Generator,
        work: float,
        heard: Heard | None,
    ) -> None:
        """``scores``: shape (channels, rows)."""
        self.scores, self.pattern, self.rng, self.heard = scores, pattern, rng, heard
        self.left = self.work = work
        self.groups, self.shares = _shares(pattern.m)
        self.rows = scores.shape[1]

    def run(self) -> IntArray:
        """The best order that the work allows."""
        order = np.arange(len(self.scores)).reshape(-1, self.pattern.m)
        if len(order) < 2:  # nothing to exchange with
            return order.reshape(-1)
        lost = self._kept(order)
        self._settle(order, np.ones(len(order), np.bool_))
        best, idle = order.copy(), 0
        while self.left > 0 and idle < _PATIENCE * len(order):
            order = best.copy()
            touched = self._shake(order)
            gained = self._kept(order[touched]) - self._kept(best[touched])
            gained += self._settle(order, touched)
            if gained > _LEAST_GAIN * lost:
                best, idle = order, 0
            else:
                idle += 1
        if self.heard is not None:
            self.heard(1.0)
        return np.asarray(best.reshape(-1), np.int64)

    def _settle(self, order: IntArray, touched: BoolArray) -> float:
        """Let runs that have changed meet all others until nothing is gained; what was."""
        total, enough = 0.0, _LEAST_GAIN * self._kept(order)
        while self.left > 0:
            gained, new = 0.0, np.zeros_like(touched)
            for pairs in _meetings(self.rng.permutation(len(order))):
                some = pairs[touched[pairs].any(axis=1) | new[pairs].any(axis=1)]
                if len(some):
                    gained += self._meet(order, some, new)
                if self.left <= 0:
                    break
            total, touched = total + gained, new
            if gained <= enough:
                break
        return total

    def _kept(self, order: IntArray) -> float:
        return float(sum(self._sums(self.scores[run][None]).sum() for run in order))

    def _meet(self, order: IntArray, pairs: IntArray, changed: BoolArray) -> float:
        """Share out the channels of pairs of runs anew, each in its best way; what that gains."""
        m, gained = self.pattern.m, 0.0
        step = max(1, _CHUNK // (len(self.groups) * self.rows))
        for first in range(0, len(pairs), step):
            some = pairs[first : first + step]
            channels = order[some].reshape(len(some), 2 * m)
            values = self.scores[channels]  # (pairs, 2 M, rows)
            sums = np.stack(
                [
                    self._sums(values[:, group]).sum(axis=1, dtype=np.float64)
                    for group in self.groups
                ]
            )
            totals = sums[self.shares[:, 0]] + sums[self.shares[:, 1]]  # (shares, pairs)
            chosen = totals.argmax(axis=0)
            better = totals[chosen, np.arange(len(some))] - totals[0]
            taken = np.where(better > 0, chosen, 0)
            changed[some[better > 0]] = True
            gained += float(np.maximum(better, 0).sum())
            places = self.groups[self.shares[taken]].reshape(len(some), 2 * m)
            order[some] = np.take_along_axis(channels, places, axis=1).reshape(len(some), 2, m)
            self.left -= max(_LEAST_WORK, float(len(self.groups) * len(some) * self.rows))
        if self.heard is not None:
            self.heard(min(1.0, 1 - self.left / self.work))
        return gained

    def _sums(self, runs: Float32Array) -> Float32Array:
        """Sum of the N largest of each run, from shape (pairs, M, rows) to (pairs, rows)."""
        n, m = self.pattern.n, self.pattern.m
        if (n, m) == (2, 4):
            a, b, c, d = (runs[:, at] for at in range(4))
            one, other = np.maximum(a, b), np.maximum(c, d)
            most = np.maximum(np.maximum(a + b, c + d), one + other)
            return np.asarray(most, np.float32)
        largest = np.partition(runs, m - n - 1, axis=1)[:, m - n :]
        return np.asarray(largest.sum(axis=1), np.float32)

    def _shake(self, order: IntArray) -> BoolArray:
        """Let a few channels of different runs change places; tells which runs."""
        m = self.pattern.m
        count = min(len(order), int(self.rng.integers(2, _SHAKEN + 1)))
        runs = self.rng.choice(len(order), count, replace=False)
        places = self.rng.integers(0, m, count)
        order[runs, places] = order[np.roll(runs, 1), np.roll(places, 1)]
        touched = np.zeros(len(order), np.bool_)
        touched[runs] = True
        return touched


def _shares(m: int) -> tuple[IntArray, IntArray]:
    """Runs that can be made of two, and which two of them share out all channels; first as it is.

    Returns:
        Groups, shape (groups, M), positions among 2 M channels; and shares, (shares, 2), positions
        among the groups.
    """
    everyone = range(2 * m)
    if m <= _ALL_SHARES:
        firsts = [some for some in combinations(everyone, m) if 0 in some]
    else:
        here = tuple(range(m))
        swaps = [(*here[:i], j, *here[i + 1 :]) for i in here for j in range(m, 2 * m)]
        firsts = [here, *swaps]
    groups: list[tuple[int, ...]] = []
    for some in firsts:
        groups += [tuple(some), tuple(at for at in everyone if at not in some)]
    shares = np.arange(len(groups)).reshape(-1, 2)
    return np.array(groups), shares


def _meetings(players: IntArray) -> Iterator[IntArray]:
    """Rounds in which everyone meets someone, until everyone has met everyone: (pairs, 2) each."""
    ring = [*players.tolist(), *([-1] if len(players) % 2 else [])]
    half = len(ring) // 2
    for _ in range(len(ring) - 1):
        pairs = np.array([ring[:half], ring[: half - 1 : -1]]).T
        yield pairs[(pairs >= 0).all(axis=1)]
        ring = [ring[0], ring[-1], *ring[1:-1]]
