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
from onnxprune.rewrite import operate
from onnxprune.runtime import RuntimeUnavailable, cannot_run
from onnxprune.select import PruningPlan
from onnxprune.timing import compare_timings, measure
from onnxprune.types import AnyArray, Latency

_log = logging.getLogger(__name__)
_CLOSE = 0.05  # of the target: what a measured share may be off
_SAME = 0.01  # a prediction this near to the measurement is not corrected
_CORRECTIONS = 2
_SECONDS = 3.0  # for one measurement
_THREADS = 1

Found = tuple[PruningPlan, str, str]  # a plan, the method that ranked, and why that one


class LatencyTarget:
    """What a plan leaves of the latency, and whether it does.

    Attributes:
        whole: Predicted seconds of the original.
        correction: Measured share over predicted share, of the last plan that was measured.
    """

    def __init__(
        self, predict: Callable[[Keep], float], timed: Callable[[PruningPlan], Latency]
    ) -> None:
        """Take a prediction and a measurement.

        Args:
            predict: Seconds of the model after a plan's ``keep``; of the original for ``{}``.
            timed: Times the original and the result of a plan.
        """
        self._predict, self._timed = predict, timed
        self.whole = predict({})
        self.correction = 1.0

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
            made = operate(plan).model
            try:
                old, new = measure([source, made], feeds, seconds=_SECONDS, threads=_THREADS)
            except RuntimeUnavailable as error:
                raise cannot_run(error, source) from error
            ratio, low, high = compare_timings(old, new)
            return Latency(old.seconds, new.seconds, ratio, low, high, new.runs, _THREADS)

        try:
            table = LatencyTable(graph, feeds, threads=_THREADS)
        except RuntimeUnavailable as error:
            raise cannot_run(error, source) from error
        return LatencyTarget(table.predict, timed)

    def left(self, keep: Keep) -> float:
        """Predicted share of the original's latency, corrected by what was measured so far."""
        return self.correction * self._predict(keep) / self.whole

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
        nearest: tuple[Found, Latency] | None = None
        for _ in range(1 + _CORRECTIONS):
            try:
                found = search()
            except TargetError:
                if nearest is None:
                    raise
                break  # once corrected it is out of reach
            times = self._measured(found[0])
            if nearest is None or _off(times, target) < _off(nearest[1], target):
                nearest = found, times
            discrepancy = times.ratio / self.left(found[0].keep)
            if _off(times, target) <= _CLOSE or abs(discrepancy - 1) <= _SAME:
                break
            self.correction *= discrepancy
        assert nearest is not None
        if nearest[1].ratio > target * (1 + _CLOSE):
            _log.warning(
                "the result takes %.3f of the original's time, more than the target %.3f",
                nearest[1].ratio,
                target,
            )
        return nearest

    def _measured(self, plan: PruningPlan) -> Latency:
        return replace(self._timed(plan), predicted=self._predict(plan.keep))


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
