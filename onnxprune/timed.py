"""Two models timed in turn in ONNX Runtime, as reports say it."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np

from onnxprune.errors import VerificationError
from onnxprune.model import Model
from onnxprune.runtime import UNPROVED, RuntimeUnavailable, cannot_run
from onnxprune.timing import Timing, compare_timings, measure
from onnxprune.types import AnyArray, Latency, ModelStats, Verdict

# What is timed unasked: some twenty runs of each model must take a second or less in all.
_QUICK_MACS, _QUICK_BYTES = 500_000_000, 64_000_000
_QUICK_SECONDS, _SECONDS = 0.3, 5.0

_log = logging.getLogger(__name__)


def latency_of(
    first: Model,
    second: Model,
    feeds: Mapping[str, AnyArray],
    *,
    threads: int | None = 1,
    seconds: float = _SECONDS,
) -> Latency:
    """Times of two models, pairs interleaved: medians, 90th percentiles, and the ratio.

    Args:
        first: The original.
        second: What became of it.
        feeds: An array for every input.
        threads: As in ``measure``.
        seconds: Time to spend.

    Raises:
        RuntimeUnavailable: The runtime cannot load or run a model.
    """
    old, new = measure([first, second], feeds, seconds=seconds, threads=threads)
    value, low, high = compare_timings(old, new)
    return Latency(
        before=old.seconds,
        after=new.seconds,
        ratio=value,
        low=low,
        high=high,
        runs=new.runs,
        threads=threads,
        before_p90=p90(old),
        after_p90=p90(new),
        batch=batch_of(feeds),
    )


def p90(found: Timing) -> float:
    """Seconds that nine of ten runs stay under."""
    return float(np.quantile(found.samples, 0.9))


def batch_of(feeds: Mapping[str, AnyArray]) -> int | None:
    """Length of axis 0 of the first input that has one."""
    return next((array.shape[0] for array in feeds.values() if array.ndim), None)


def timing_wanted(latency: bool | None, verdict: Verdict, cost: ModelStats) -> bool:
    """Whether to time: if asked, or where nobody forbids it, it is quick, and the models run."""
    if latency is not None:
        return latency
    quick = cost.macs <= _QUICK_MACS and cost.bytes <= _QUICK_BYTES
    return quick and verdict.status not in ("none", "failed")


def timed_in_turn(
    first: Model,
    second: Model,
    feeds: Mapping[str, AnyArray],
    threads: int | None,
    *,
    quick: bool,
) -> Latency | None:
    """``latency_of``; a quick look that nobody asked for gives None where the runtime fails.

    Raises:
        VerificationError: It fails, and was asked for.
    """
    seconds = _QUICK_SECONDS if quick else _SECONDS
    try:
        return latency_of(first, second, feeds, threads=threads, seconds=seconds)
    except RuntimeUnavailable as error:
        if quick:
            _log.info("not timed: %s", error)
            return None
        raise VerificationError(
            cannot_run(error, first, hint=UNPROVED).message, hint="leave out --latency"
        ) from error
