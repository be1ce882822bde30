"""Latency as a target: predicted while plans are searched, then measured and corrected."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from onnxprune.aim import Keep
from onnxprune.data import Data, random_data
from onnxprune.errors import TargetError
from onnxprune.groups import DependencyGraph
from onnxprune.latency import LatencyTable
from onnxprune.model import Model
from onnxprune.rewrite import operate
from onnxprune.runtime import RuntimeUnavailable, cannot_run
from onnxprune.select import PruningPlan
from onnxprune.timed import batch_of, p90
from onnxprune.timing import compare_timings, measure, timing
from onnxprune.types import AnyArray, Latency

_log = logging.getLogger(__name__)
_CLOSE = 0.03  # of the target: a measured share this near is near enough
_MISSED = 0.05  # of the target: more than that is warned of
_CORRECTIONS = 3
_SESSIONS = 3  # of which a measurement is made: where their memory lies matters too
_SECONDS = 1.0  # for each
_THREADS = 1

Found = tuple[PruningPlan, str, str]  # a plan, the method that ranked, and why that one


class LatencyTarget:
    """What a plan leaves of the latency, and whether it does.

    Attributes:
        predict: Seconds of the model after a plan's ``keep``; of the original for ``{}``.
        timed: Times the original and the result of a plan.
        whole: Predicted seconds of the original.
        met: Predicted share and measured share of each plan that was measured, and of the original.
    """

    def __init__(
        self, predict: Callable[[Keep], float], timed: Callable[[PruningPlan], Latency]
    ) -> None:
        """Take a prediction and a measurement."""
        self.predict, self.timed = predict, timed
        self.whole = predict({})
        self.met: dict[float, float] = {0.0: 0.0, 1.0: 1.0}
        self._least = 1.0  # share that was predicted of any plan

    @staticmethod
    def of(graph: DependencyGraph, data: Data | None, seed: int) -> LatencyTarget:
        """Time the kernels of a model on this machine.

        Args:
            graph: The analysis.
            data: What it is timed on where the sizes of the stand-ins can be cut from it.
            seed: For random inputs otherwise.

        Raises:
            VerificationError: ONNX Runtime cannot run the model.
        """
        source, feeds = graph.graph.source, feeds_of(graph, data, seed)

        def timed(plan: PruningPlan) -> Latency:
            try:
                return _compared(source, operate(plan).model, feeds)
            except RuntimeUnavailable as error:
                raise cannot_run(error, source) from error

        try:
            table = LatencyTable(graph, feeds, threads=_THREADS)
        except RuntimeUnavailable as error:
            raise cannot_run(error, source) from error
        return LatencyTarget(table.predict, timed)

    def left(self, keep: Keep) -> float:
        """Predicted share of the original's latency, between what was measured so far."""
        share = self.predict(keep) / self.whole
        self._least = min(self._least, share)
        known = sorted(self.met)
        if share >= known[-1]:
            return share * self.met[known[-1]] / known[-1]
        return float(np.interp(share, known, [self.met[one] for one in known]))

    def confirmed(self, target: float, search: Callable[[], Found]) -> tuple[Found, Latency]:
        """Search, measure what is found, and search again where the prediction was off.

        Args:
            target: Share of the latency to be left.
            search: Makes a plan by ``left``.

        Returns:
            Of the plans found the one that is measured nearest to the target, and its times.

        Raises:
            TargetError: The target is out of reach.
            VerificationError: ONNX Runtime cannot run the result.
        """
        tried: list[tuple[Found, Latency]] = []
        for _ in range(1 + _CORRECTIONS):
            try:
                found = search() if tried else self._first(target, search)
            except TargetError:
                if not tried:
                    raise
                break  # once corrected it is out of reach
            if any(_same(found[0], other[0]) for other, _ in tried):
                break  # no other plan comes nearer
            tried.append((found, self._measured(found[0])))
            if _off(tried[-1][1], target) <= _CLOSE:
                break
        nearest = min(tried, key=lambda one: _off(one[1], target))
        if nearest[1].ratio > target * (1 + _MISSED):
            _log.warning(
                "the result takes %.3f of the original's time, more than the target %.3f",
                nearest[1].ratio,
                target,
            )
        return nearest

    def _first(self, target: float, search: Callable[[], Found]) -> Found:
        """A plan by the prediction; where that says out of reach, the strongest is measured."""
        try:
            return search()
        except TargetError as beyond:
            strongest = self._least
            if not target < strongest < 1:
                raise
            self.met[strongest] = target  # for once, so that the search gives the strongest cut
            try:
                found = search()
            except TargetError:
                raise beyond from None
            del self.met[strongest]
            left = self._measured(found[0]).ratio
            if left > target * (1 + _CLOSE):
                raise TargetError(
                    f"target latency={target:g} cannot be reached: the strongest cut leaves "
                    f"{left:.3f}, measured",
                    hint=beyond.hint,
                ) from beyond
            return search()

    def _measured(self, plan: PruningPlan) -> Latency:
        seconds = self.predict(plan.keep)
        times = replace(self.timed(plan), predicted=seconds)
        self.met[seconds / self.whole] = times.ratio
        return times


def _compared(source: Model, made: Model, feeds: Mapping[str, AnyArray]) -> Latency:
    """Both models timed in turn, in several sessions of each.

    The interval is that of all sessions together: how far their medians lie apart is often more
    than any one of them would tell.
    """
    pairs = [
        measure([source, made], feeds, seconds=_SECONDS, threads=_THREADS) for _ in range(_SESSIONS)
    ]
    old, new = (
        timing([one for t in side for one in t.samples]) for side in zip(*pairs, strict=True)
    )
    ratio, _, _ = compare_timings(old, new)
    intervals = [compare_timings(*pair)[1:] for pair in pairs]
    low, high = min(low for low, _ in intervals), max(high for _, high in intervals)
    return Latency(
        old.seconds, new.seconds, ratio, low, high, new.runs, _THREADS,
        before_p90=p90(old), after_p90=p90(new), batch=batch_of(feeds),
    )  # fmt: skip


def feeds_of(graph: DependencyGraph, data: Data | None, seed: int) -> Mapping[str, AnyArray]:
    """An array for every input, of the stand-in sizes: cut from data, else random."""
    shapes = graph.stand_ins
    if data is not None:
        batch = data.batches[0]
        fits = all(
            name in batch
            and batch[name].ndim == len(shape)
            and all(have >= size for have, size in zip(batch[name].shape, shape, strict=True))
            for name, shape in shapes.items()
        )
        if fits:
            return {
                name: np.ascontiguousarray(array[tuple(map(slice, shapes[name]))])
                for name, array in batch.items()
                if name in shapes
            }
    return random_data(graph.graph.model, seed=seed, shapes=shapes, batches=1).batches[0]


def _off(times: Latency, target: float) -> float:
    return abs(times.ratio / target - 1)


def _same(one: PruningPlan, other: PruningPlan) -> bool:
    return all(np.array_equal(keep, other.keep[group]) for group, keep in one.keep.items())
