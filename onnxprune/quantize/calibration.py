"""Ranges of activations on calibration data, by the collectors of onnxruntime.quantization.

Activations are streamed batch by batch, a limited number of tensors at a time, into one histogram
each; every method then reads the same histograms.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxprune.calibrate import stream
from onnxprune.data import Data
from onnxprune.model import Model

if TYPE_CHECKING:
    from onnxruntime.quantization.calibrate import HistogramCollector

METHODS = ("minmax", "percentile", "entropy")
_BINS = 1024  # over both signs
_COARSE = 512  # of them, for entropy
_LEVELS = 128  # of an int8 magnitude
_PERCENTILE = 99.99
_MOST_BYTES = 1 << 28  # activations of one batch that are out of the runtime at a time

_log = logging.getLogger(__name__)


class Ranges:
    """Histograms of some tensors, from which thresholds are made.

    Args:
        model: What to run.
        names: Float32 tensors to look at.
        data: What to run it on.

    Raises:
        VerificationError: ONNX Runtime cannot run the model.
    """

    def __init__(self, model: Model, names: Sequence[str], data: Data) -> None:
        self._collectors: list[HistogramCollector] = []
        self.unusable: set[str] = set()
        for some in _portions(model, names, data):
            self._collect(model, some, data)

    def _collect(self, model: Model, names: Sequence[str], data: Data) -> None:
        from onnxruntime.quantization.calibrate import HistogramCollector

        collector = HistogramCollector("entropy", True, _BINS, _LEVELS, _PERCENTILE, "same")
        for made in stream(model, names, data):
            usable = {}
            for name, values in made.items():
                if values.dtype != np.float32 or not np.isfinite(values).all():
                    self.unusable.add(name)
                elif values.size:
                    usable[name] = values
            with _silent():
                collector.collect(usable)
        for name in self.unusable:
            collector.histogram_dict.pop(name, None)
        self._collectors.append(collector)

    def thresholds(self, method: str) -> Mapping[str, float]:
        """Largest magnitude that int8 is to hold, by tensor; 0 where all values are zero."""
        found: dict[str, float] = {}
        for collector in self._collectors:
            for name, (_, _, low, high, _) in collector.histogram_dict.items():
                found[name] = max(abs(float(low)), abs(float(high)))
            if method == "minmax" or not collector.histogram_dict:
                continue
            collector.method, collector.symmetric = method, False
            histograms = collector.histogram_dict
            if method == "entropy":
                collector.histogram_dict = {n: _coarser(one) for n, one in histograms.items()}
            with _silent(), np.errstate(all="ignore"):
                result = collector.compute_collection_result()
            collector.histogram_dict = histograms
            for name, (low, high, *_) in result.items():
                clipped = max(abs(float(low)), abs(float(high)))
                if 0 < clipped < found[name]:
                    found[name] = clipped
        return found


def _coarser(histogram: tuple[Any, ...]) -> tuple[Any, ...]:
    """Fewer bins: the search for the least divergence takes the square of their number."""
    counts, edges, *rest = histogram
    while len(counts) > _COARSE and len(counts) % 4 == 0:
        counts, edges = counts.reshape(-1, 2).sum(axis=1), edges[::2]
    return (counts, edges, *rest)


def _portions(model: Model, names: Sequence[str], data: Data) -> Iterator[Sequence[str]]:
    """As many tensors at a time as memory may hold of one batch."""
    some: list[str] = []
    total = 0
    first = dict.fromkeys(names, 0)
    for at in range(0, len(names), 32):
        part = names[at : at + 32]
        made = next(iter(stream(model, part, _first(data))))
        first.update((name, made[name].nbytes) for name in part)
    for name in names:
        if some and total + first[name] > _MOST_BYTES:
            yield some
            some, total = [], 0
        some.append(name)
        total += first[name]
    if some:
        yield some


def _first(data: Data) -> Data:
    from dataclasses import replace

    return replace(data, batches=data.batches[:1])


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """The collectors print on their own account."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
