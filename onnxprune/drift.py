"""Drift: how far a model's outputs lie from another's. Polygraphy runs and compares the two."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np

from onnxprune.data import Data
from onnxprune.feeds import Batch
from onnxprune.model import Model
from onnxprune.runtime import RuntimeUnavailable, Session, cannot_run, session
from onnxprune.types import AnyArray, Drift, Float64Array

_SILENT = 100  # Polygraphy severity above CRITICAL, which raises besides logging


def measure_drift(original: Model, pruned: Model | Session, data: Data) -> dict[str, Drift]:
    """How far each output of ``pruned`` lies from ``original``, over all of ``data``.

    Raises:
        VerificationError: ONNX Runtime cannot run one of them.
    """
    other = original if isinstance(pruned, Session) else pruned
    with _named(original):
        before = session(original)
    with _named(other):
        after = pruned if isinstance(pruned, Session) else session(pruned)
    with _quiet_polygraphy():
        return _measure(_AsOnnxrt(before, original), _AsOnnxrt(after, other), data.batches)


@contextlib.contextmanager
def _named(model: Model) -> Iterator[None]:
    """Say which of two models the runtime does not take."""
    try:
        yield
    except RuntimeUnavailable as error:
        raise cannot_run(error, model) from error


@dataclass(slots=True)
class _Sums:
    """What drift is made of, added up batch by batch."""

    signal: float = 0.0  # sum of squares of the original's output
    pruned: float = 0.0  # of the pruned model's
    noise: float = 0.0  # of their difference
    product: float = 0.0  # sum of their products
    max_abs: float = 0.0
    agreed: int = 0
    rows: int = 0
    classes: bool = True  # rank 2 in every batch
    broken: bool = False  # shapes differ, or non-finite values

    def add(
        self, before: Float64Array, after: Float64Array, *, distance: float, cosine: float
    ) -> None:
        """Take in one batch: its arrays, their L2 distance and their cosine."""
        signal, pruned = _energy(before), _energy(after)
        self.signal += signal
        self.pruned += pruned
        self.noise += distance**2
        self.product += cosine * math.sqrt(signal) * math.sqrt(pruned)
        self.max_abs = max(self.max_abs, float(np.max(np.abs(before - after), initial=0.0)))
        if self.classes:
            self.agreed += int(np.sum(before.argmax(axis=-1) == after.argmax(axis=-1)))
            self.rows += before.shape[0]

    def drift(self) -> Drift:
        """The figures over all batches; NaN where there is nothing to compare."""
        if self.broken:
            return Drift(math.nan, math.nan, math.nan, math.nan, None)
        if self.noise == 0.0:
            return Drift(1.0, math.inf, 0.0, self.max_abs, self._top1())
        if self.signal == 0.0:
            snr, relative = -math.inf, math.inf
        else:
            snr = 10.0 * math.log10(self.signal / self.noise)
            relative = math.sqrt(self.noise / self.signal)
        norms = math.sqrt(self.signal) * math.sqrt(self.pruned)
        cosine = max(-1.0, min(1.0, self.product / norms)) if norms else 0.0
        return Drift(cosine, snr, relative, self.max_abs, self._top1())

    def _top1(self) -> float | None:
        return self.agreed / self.rows if self.classes and self.rows else None


def _energy(array: Float64Array) -> float:
    """Sum of squares."""
    flat = array.reshape(-1)
    return float(np.dot(flat, flat))


def _measure(before: _AsOnnxrt, after: _AsOnnxrt, batches: Sequence[Batch]) -> dict[str, Drift]:
    """Drift of every tensor output of ``after`` from ``before``.

    Polygraphy compares one iteration at a time and would average; here its figures of each batch
    go into sums, so that the result is that of one comparison over all the data.
    """
    from polygraphy.backend.onnxrt import OnnxrtRunner
    from polygraphy.comparator import CosineSimilarityCompareFunc, IterationResult, L2CompareFunc

    l2, cosine = L2CompareFunc(), CosineSimilarityCompareFunc()
    sums = {name: _Sums() for name in before.outputs if name in after.outputs}
    with OnnxrtRunner(before) as first, OnnxrtRunner(after) as second:
        for batch in batches:
            # Polygraphy's own check of the inputs would reshape what does not fit.
            was = first.infer(batch, check_inputs=False)
            now = second.infer(batch, check_inputs=False)
            pairs = _comparable(was, now, sums)
            if not pairs:
                continue
            results = [
                IterationResult({name: pair[side] for name, pair in pairs.items()})
                for side in (0, 1)
            ]
            distances, angles = l2(*results), cosine(*results)
            for name, (a, b) in pairs.items():
                sums[name].add(
                    a, b, distance=distances[name].l2_norm, cosine=angles[name].cosine_similarity
                )
    return {name: total.drift() for name, total in sums.items()}


def _comparable(
    was: Mapping[str, AnyArray], now: Mapping[str, AnyArray], sums: Mapping[str, _Sums]
) -> dict[str, tuple[Float64Array, Float64Array]]:
    """Both sides of each output in float64, equal infinities and NaNs as zero.

    Outputs that cannot be compared are marked in ``sums`` and left out.
    """
    pairs: dict[str, tuple[Float64Array, Float64Array]] = {}
    for name, total in sums.items():
        before, after = was[name], now[name]
        if before.dtype.kind in "OUS" or before.shape != after.shape:
            total.broken = True
            continue
        a, b = before.astype(np.float64), after.astype(np.float64)
        odd = ~np.isfinite(a) | ~np.isfinite(b)
        if odd.any():
            if not np.array_equal(a[odd], b[odd], equal_nan=True):
                total.broken = True
                continue
            a[odd] = b[odd] = 0.0
        total.classes &= before.dtype.kind == "f" and a.ndim == 2 and a.shape[-1] >= 2
        pairs[name] = (a, b)
    return pairs


class _AsOnnxrt:
    """A session in the clothes of ``onnxruntime.InferenceSession``, as ``OnnxrtRunner`` takes it.

    Outputs that are no tensors do not appear. ``model`` is what to blame if it does not run.
    """

    def __init__(self, wrapped: Session, model: Model) -> None:
        self._wrapped = wrapped
        self._model = model
        self.outputs = wrapped.outputs

    def get_outputs(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(name=name) for name in self.outputs]

    def run(self, _names: None, feeds: Mapping[str, AnyArray]) -> list[AnyArray]:
        with _named(self._model):
            return list(self._wrapped.run(feeds).values())


@contextlib.contextmanager
def _quiet_polygraphy() -> Iterator[None]:
    """Import Polygraphy, which logs to stdout on its own account, and keep it silent."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        from polygraphy.logger import G_LOGGER
    before = G_LOGGER.use_python_logging_system
    G_LOGGER.use_python_logging_system = True
    try:
        with G_LOGGER.verbosity(_SILENT):
            yield
    finally:
        G_LOGGER.use_python_logging_system = before
