"""Epochs: batches in a seeded order, learning rate, validation, best weights, checkpoints."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from onnxprune.errors import OnnxPruneError, TrainingError
from onnxprune.train.checkpoint import Checkpoint
from onnxprune.train.interrupts import uninterrupted
from onnxprune.train.judge import Judge
from onnxprune.train.objective import Objective
from onnxprune.train.protocol import Arrays, Trainer
from onnxprune.train.samples import Samples, Teacher
from onnxprune.train.schedule import Schedule
from onnxprune.types import AnyArray, Epoch, IntArray

_log = logging.getLogger(__name__)
_SAVE_EVERY = 300.0  # seconds, within an epoch


@dataclass(frozen=True)
class Course:
    """What a training goes through.

    Attributes:
        samples: To train on.
        teacher: What it imitates, or None.
        objective: The loss.
        judge: Measures weights on the samples held out.
        epochs: How many.
        batch_size: Samples of a step; what is left over at the end of an epoch waits for the next.
        rate: Largest learning rate.
        seed: For the order of samples.
        penalised: There is an L1 penalty: then the last weights count, not those best before it.
    """

    samples: Samples
    teacher: Teacher | None
    objective: Objective
    judge: Judge
    epochs: int
    batch_size: int
    rate: float
    seed: int
    penalised: bool = False

    @property
    def steps(self) -> int:
        """Steps of one epoch."""
        return max(1, len(self.samples) // self.batch_size)

    @property
    def schedule(self) -> Schedule:
        """Rates of all steps."""
        return Schedule(self.rate, self.steps * self.epochs)

    def order(self, epoch: int) -> IntArray:
        """Samples of an epoch in the order in which they are seen."""
        return np.random.default_rng([self.seed, 2, epoch]).permutation(len(self.samples))

    def batch(self, at: IntArray) -> tuple[Arrays, Arrays]:
        """Inputs in single precision, and targets, of some samples."""
        part = self.samples.take(at)
        taught = {} if self.teacher is None else self.teacher.outputs(at)
        inputs = {name: single(array) for name, array in part.inputs.items()}
        return inputs, self.objective.targets(taught, part.labels)


def single(array: AnyArray) -> AnyArray:
    """Floats of half precision as float32; anything else as it is."""
    half = array.dtype.kind in "fV" and array.dtype.itemsize == 2
    return array.astype(np.float32) if half else array


@dataclass
class Loop:
    """A training on its way.

    Attributes:
        trainer: Prepared, its gradients checked.
        course: What it goes through.
        checkpoint: File to go on from, or None for none.
        key: Of this run, as in ``Checkpoint``.
        heard: Called with a line on how it stands.
    """

    trainer: Trainer
    course: Course
    checkpoint: Path | None
    key: str
    heard: Callable[[str], object]
    history: list[Epoch] = field(default_factory=list)
    best: Arrays | None = None
    best_epoch: int = 0
    _epoch: int = 0
    _losses: list[float] = field(default_factory=list)
    _saved: float = 0.0
    _begun: float = 0.0
    _full: bool = False
    _whole: bool = True  # the trainer is between two exchanges, so its state is worth keeping

    def run(self, resume: Checkpoint | None = None) -> None:
        """Train to the end, or from where a checkpoint stands to the end.

        Raises:
            OnnxPruneError: The trainer died, or the loss is no number any more; the checkpoint
                stays, and has the best weights so far.
            KeyboardInterrupt: An order to end, followed between two steps; it says where the
                checkpoint is.
        """
        if resume is None:
            self.history = [replace(self.course.judge.epoch(None), number=0)]
        else:
            self._take_up(resume)
        self._saved = time.monotonic()
        begun, done = time.monotonic(), self._steps_done()
        total = self.course.steps * self.course.epochs
        try:
            while self._epoch < self.course.epochs:
                for step, loss in self._steps():
                    spent = time.monotonic() - begun
                    left = spent / (self._steps_done() - done) * (total - self._steps_done())
                    self.heard(self._line(step, loss, left))
                    if time.monotonic() - self._saved > _SAVE_EVERY:
                        self._save()
                self._end_epoch()
        except KeyboardInterrupt as order:
            if self._whole:
                with contextlib.suppress(OnnxPruneError):  # then the one before stays
                    self._save()
            said = self._what_is_left("")
            raise (KeyboardInterrupt(f"interrupted ({said})") if said else order) from None
        except OnnxPruneError as error:
            raise type(error)(error.message, hint=self._what_is_left(error.hint)) from error

    def _take_up(self, resume: Checkpoint) -> None:
        self.trainer.load(resume.state)
        self.history = list(resume.history)
        self.best, self.best_epoch = resume.best, resume.best_epoch
        self._epoch, self._losses = resume.epoch, list(resume.losses)

    def _steps_done(self) -> int:
        return self._epoch * self.course.steps + len(self._losses)

    def _steps(self) -> Iterator[tuple[int, float]]:
        """The rest of the epoch, step by step."""
        course, schedule = self.course, self.course.schedule
        order = course.order(self._epoch)
        self._begun = time.monotonic()
        for step in range(len(self._losses), course.steps):
            at = order[step * course.batch_size : (step + 1) * course.batch_size]
            inputs, targets = course.batch(at)
            rate = schedule.rate(self._epoch * course.steps + step)
            with self._exchange():
                loss = self.trainer.step(inputs, targets, rate=rate, l1=1.0)
                if math.isfinite(loss):
                    self._losses.append(loss)
            if not math.isfinite(loss):
                raise TrainingError(
                    f"the loss became {loss} at step {step + 1} of epoch {self._epoch + 1}",
                    hint="give a smaller --lr",
                )
            yield step, loss

    @contextlib.contextmanager
    def _exchange(self) -> Iterator[None]:
        """Ask the trainer, whom no order to end shall find half-way."""
        with uninterrupted():
            self._whole = False
            yield
            self._whole = True

    def _end_epoch(self) -> None:
        with self._exchange():
            weights = self.trainer.weights()
        judged = self.course.judge.epoch(weights)
        with uninterrupted():  # figures of an epoch are taken over all together
            self._take_over(judged, weights)

    def _take_over(self, judged: Epoch, weights: Arrays) -> None:
        number = self._epoch + 1
        loss = sum(self._losses) / len(self._losses)
        spent = time.monotonic() - self._begun
        self.history.append(replace(judged, number=number, loss=loss, seconds=spent))
        # Only a strict gain counts: weights that came in stay where training brings nothing.
        ahead = self.course.judge.better(judged, self._held())
        if ahead or self.course.penalised:
            self.best = {name: np.array(one) for name, one in weights.items()}
            self.best_epoch = number
        _log.info("%s", self.course.judge.line(self.history[-1], self.course.epochs))
        self._epoch, self._losses = number, []
        self._save()

    def _held(self) -> Epoch:
        return self.history[self.best_epoch]

    def _line(self, step: int, loss: float, left: float) -> str:
        spent = f"{left / 60:.0f} min" if left > 90 else f"{left:.0f} s"
        held = self.course.judge.short(self.history[-1])
        return (
            f"epoch {self._epoch + 1}/{self.course.epochs} · step {step + 1}/{self.course.steps} · "
            f"loss {loss:.4g} · {held} · {spent} left"
        )

    def _save(self) -> None:
        """Write the checkpoint; a disk that is full costs it, not the training."""
        if self.checkpoint is None:
            return
        with self._exchange():
            state = dict(self.trainer.state())
        point = Checkpoint(
            self.key, self.course.epochs, self._epoch, len(self._losses), tuple(self._losses),
            tuple(self.history), self.best_epoch, self.best, state,
        )  # fmt: skip
        try:
            point.write(self.checkpoint)
            self._full = False
        except OSError as error:
            if not self._full:
                _log.warning(
                    "checkpoint '%s' cannot be written: %s; training goes on without",
                    self.checkpoint, error.strerror or error,
                )  # fmt: skip
            self._full = True
        self._saved = time.monotonic()

    def _what_is_left(self, hint: str) -> str:
        said = [hint] if hint else []
        if self.checkpoint is not None and self.checkpoint.exists():
            said.append(f"--resume goes on from '{self.checkpoint}', which has the best so far")
        return "; ".join(said)
