"""What a cut costs: drift of the outputs, or loss of a figure that is the better the higher."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

import numpy as np

from onnxprune.errors import UsageError
from onnxprune.functions import UserFunction
from onnxprune.types import AnyArray, Float64Array, IntArray

Measure: TypeAlias = Literal["drift", "top1", "metric"]
Outputs = Mapping[str, AnyArray]


class Tally(Protocol):
    """Takes in the outputs of one model, batch by batch."""

    def add(self, reference: Outputs, outputs: Outputs) -> None:
        """Take in one batch, of the original and of the model."""

    def result(self) -> float:
        """The figure over all batches; NaN or infinite where there is none."""


@dataclass(frozen=True)
class Gauge:
    """How a model is judged; may be pickled.

    Attributes:
        labels: Class of each sample, shape (samples,), or None.
        metric: A user's function of outputs and labels, or None.
    """

    labels: AnyArray | None = None
    metric: UserFunction | None = None

    @property
    def measure(self) -> Measure:
        """``drift``, ``top1`` or ``metric``."""
        if self.metric is not None:
            return "metric"
        return "drift" if self.labels is None else "top1"

    def tally(self) -> Tally:
        """A new tally."""
        if self.metric is not None:
            return _Metric(self.metric, self.labels)
        return Drifted() if self.labels is None else _Top1(np.asarray(self.labels, np.int64))

    def loss(self, figure: float, baseline: float) -> float:
        """What was lost: the drift itself, or how far the figure fell from the original's."""
        return figure if self.measure == "drift" else baseline - figure


def read_labels(path: Path | str, samples: int, step: int) -> AnyArray:
    """Labels from an ``.npy`` file, or from the array ``labels`` of an ``.npz`` file.

    Args:
        path: The file.
        samples: How many samples the models are run on.
        step: Samples in one run; as many less one may have been left out at the end.

    Raises:
        UsageError: It cannot be read, or has another number of entries.
    """
    hint = "np.save(path, array) writes such a file"
    try:
        held = np.load(path, allow_pickle=False)
        labels = held["labels"] if isinstance(held, np.lib.npyio.NpzFile) else held
    except KeyError:
        raise UsageError(f"'{path}' has no array 'labels'", hint=hint) from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError(f"cannot read labels from '{path}'", hint=hint) from error
    if labels.ndim == 0:
        raise UsageError(f"'{path}' holds no array with an entry for each sample", hint=hint)
    if not samples <= len(labels) < samples + max(step, 1):
        raise UsageError(f"'{path}' has {len(labels)} labels for {samples} samples")
    return labels[:samples]


@dataclass
class Drifted:
    """Relative L2 distance of the outputs, of the output that lies farthest off."""

    signal: dict[str, float] = field(default_factory=dict)
    noise: dict[str, float] = field(default_factory=dict)

    def add(self, reference: Outputs, outputs: Outputs) -> None:
        """Take in one batch; an output that both lack a number at the same places has none."""
        for name, after in outputs.items():
            before = reference[name]
            if before.dtype.kind in "OUS":
                continue
            signal, noise = (
                _energies(before, after) if before.shape == after.shape else (0.0, math.inf)
            )
            self.signal[name] = self.signal.get(name, 0.0) + signal
            self.noise[name] = self.noise.get(name, 0.0) + noise

    def result(self) -> float:
        """Largest distance of any output by the norm of the original's, >= 0."""
        worst = 0.0
        for name, noise in self.noise.items():
            if noise:
                signal = self.signal[name]
                worst = max(worst, math.sqrt(noise / signal) if signal else math.inf)
        return worst


def _energies(before: AnyArray, after: AnyArray) -> tuple[float, float]:
    """Sum of squares of the original's output, and of the difference."""
    a, b = before.astype(np.float64).reshape(-1), after.astype(np.float64).reshape(-1)
    odd = ~np.isfinite(a) | ~np.isfinite(b)
    if odd.any():
        if not np.array_equal(a[odd], b[odd], equal_nan=True):
            return 0.0, math.inf
        a, b = a[~odd], b[~odd]
    off: Float64Array = a - b
    return float(np.dot(a, a)), float(np.dot(off, off))


@dataclass
class _Top1:
    """Share of samples whose arg max is their label."""

    labels: IntArray
    right: int = 0
    seen: int = 0

    def add(self, reference: Outputs, outputs: Outputs) -> None:
        scores = next(
            (a for a in {**reference, **outputs}.values() if a.ndim == 2 and a.shape[-1] > 1), None
        )
        if scores is None:
            raise UsageError("no output has a score for each class", hint="--metric")
        wanted = self.labels.reshape(-1)[self.seen : self.seen + len(scores)]
        if len(wanted) != len(scores):
            raise UsageError(f"output of {len(scores)} rows meets {len(wanted)} labels")
        self.right += int(np.sum(scores.argmax(axis=-1) == wanted))
        self.seen += len(scores)

    def result(self) -> float:
        return self.right / self.seen if self.seen else math.nan


@dataclass
class _Metric:
    """What a user's function says of all outputs together."""

    function: UserFunction
    labels: AnyArray | None
    batches: list[Outputs] = field(default_factory=list)

    def add(self, reference: Outputs, outputs: Outputs) -> None:
        self.batches.append({**reference, **outputs})

    def result(self) -> float:
        outputs = {name: _joined([b[name] for b in self.batches]) for name in self.batches[0]}
        given = self.function.load()(outputs, self.labels)
        try:
            return float(given)  # type: ignore[arg-type]  # whatever a user gives
        except (TypeError, ValueError) as error:
            raise UsageError(
                f"'{self.function.name}' gave {type(given).__name__}, not a number"
            ) from error


def _joined(arrays: Sequence[AnyArray]) -> AnyArray:
    return np.concatenate([np.atleast_1d(array) for array in arrays], axis=0)
