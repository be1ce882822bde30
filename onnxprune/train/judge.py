"""How good weights are, in the file that would be written, on samples training does not see."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from onnxprune.model import Model
from onnxprune.runtime import session
from onnxprune.train.objective import Aim, Objective
from onnxprune.train.protocol import Arrays
from onnxprune.train.samples import Samples, Teacher
from onnxprune.types import AnyArray, Epoch


@dataclass(frozen=True)
class Judge:
    """Runs the model with given weights in ONNX Runtime.

    Attributes:
        model: The model that came in.
        written: Puts weights into it.
        samples: Those held out.
        teacher: What it imitates on them, or None.
        objective: The loss.
        aim: Output whose classes are counted, or None.
        batch: Samples in one run.
        threads: For ONNX Runtime, None for all cores.
    """

    model: Model
    written: Callable[[Arrays], Model]
    samples: Samples
    teacher: Teacher | None
    objective: Objective
    aim: Aim | None
    batch: int
    threads: int | None

    @property
    def measure(self) -> str:
        """``top1`` with labels, ``agreement`` with the teacher's class, or ""."""
        if self.aim is None:
            return ""
        return "top1" if self.samples.labels is not None else "agreement"

    def epoch(self, weights: Arrays | None) -> Epoch:
        """Measure weights; None for those of the file."""
        begun = time.monotonic()
        model = self.model if weights is None else self.written(weights)
        loaded = session(model, threads=self.threads)
        loss, right, rows, count = 0.0, 0, 0, 0
        for inputs, part in self.samples.batches(self.batch):
            outputs = loaded.run(inputs)
            taught = {} if self.teacher is None else self.teacher.outputs(part)
            labels = None if self.samples.labels is None else self.samples.labels[part]
            size = len(next(iter(inputs.values())))
            loss += size * self.objective.loss(outputs, self.objective.targets(taught, labels))
            count += size
            if self.aim is not None:
                got = self._classes(outputs[self.aim.output])
                wanted = labels if labels is not None else self._classes(taught[self.aim.output])
                right += int(np.sum(got == wanted))
                rows += got.size
        metric = right / rows if rows else math.nan
        return Epoch(0, math.nan, loss / max(1, count), metric, time.monotonic() - begun)

    def _classes(self, output: AnyArray) -> AnyArray:
        assert self.aim is not None
        found: AnyArray = np.asarray(output).argmax(
            axis=-1 if self.aim.axis is None else self.aim.axis
        )
        return found

    def better(self, one: Epoch, than: Epoch) -> bool:
        """Whether weights did better: by right classes as far as labels tell them apart, then loss.

        Of few samples a class more or less is chance: shares count from one standard error on.
        """
        if self.measure == "top1":
            mean = (one.metric + than.metric) / 2
            chance = math.sqrt(max(mean * (1 - mean), 0.0) / max(1, len(self.samples)))
            if abs(one.metric - than.metric) > chance:
                return one.metric > than.metric
        first, second = (math.inf if math.isnan(e.held_out) else e.held_out for e in (one, than))
        return first < second

    def short(self, epoch: Epoch) -> str:
        """Its figures for a progress line."""
        if not self.measure:
            return f"held out {epoch.held_out:.4g}"
        return f"{self.measure} {100 * epoch.metric:.2f} %"

    def line(self, epoch: Epoch, of: int) -> str:
        """Its figures in words."""
        metric = f", {self.measure} {100 * epoch.metric:.2f} %" if self.measure else ""
        return (
            f"epoch {epoch.number}/{of}: loss {epoch.loss:.4g}, held out {epoch.held_out:.4g}"
            f"{metric}"
        )
