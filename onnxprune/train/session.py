"""One training: what follows from the options, and its run on a trainer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import onnx

from onnxprune.errors import UnsupportedModelError, UsageError
from onnxprune.recipe import Recipe
from onnxprune.runtime import session, usable_cores
from onnxprune.train.backends import check_supported
from onnxprune.train.batching import with_open_batch, with_sizes
from onnxprune.train.checkpoint import Checkpoint
from onnxprune.train.classes import check_classes
from onnxprune.train.copying import TrainingCopy
from onnxprune.train.given import Given
from onnxprune.train.gradcheck import check_gradients
from onnxprune.train.judge import Judge
from onnxprune.train.loop import Course, Loop, single
from onnxprune.train.objective import Aim, Objective, aims, choose
from onnxprune.train.protocol import Arrays, Job, Kind, Trainer
from onnxprune.train.samples import Teacher
from onnxprune.train.zeros import masks

_RATES = {"adamw": 1e-3, "sgd": 0.02}
_CLIP = 5.0  # norm of all gradients; what runs away starts above
_SMALL_BATCH = 8  # whose statistics are no good
_CHECKED = 32  # samples that gradients are checked on
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Training:
    """Everything decided, nothing run.

    Attributes:
        copy: Of the model.
        proto: What the trainer gets.
        job: What the trainer is told.
        course: Epochs and samples.
        key: What of the options changes the result.
        heard: Called with a line on how it stands.
    """

    copy: TrainingCopy
    proto: onnx.ModelProto
    job: Job
    course: Course
    key: str
    heard: Callable[[str], object]

    @classmethod
    def of(
        cls,
        copy: TrainingCopy,
        given: Given,
        recipe: Recipe | None,
        *,
        keep_zeros: str,
        optimizer: str,
        rate: float | None,
        batch_size: int,
        epochs: int,
        temperature: float,
        l1_bn: float,
        l1_weights: float,
        weight_decay: float,
        freeze_bn: bool,
        threads: int,
        seed: int,
        heard: Callable[[str], object],
    ) -> Training:
        """Decide everything.

        Raises:
            UsageError: Options do not go together with the model.
        """
        proto, size = _batched(copy, given, batch_size)
        pairs = wanted_of(copy, proto, given)
        taught, shown = _teachers(given, pairs, heard)
        objective = Objective(pairs, temperature, _scales(taught, len(given.train)))
        weights = tuple(_reaching(proto, [t.tensor for t in objective.terms], copy.weights))
        statistics = () if freeze_bn else copy.statistics
        if statistics and size < _SMALL_BATCH:
            _log.warning(
                "batches of %d are too small for BatchNormalization: its statistics stay", size
            )
            statistics = ()
        if l1_bn and not copy.scales:
            raise UsageError(
                "--l1-bn needs BatchNormalization, and the model has none",
                hint="most exporters fold it away: export without that, or use --l1-weights",
            )
        l1 = dict.fromkeys(copy.scales, l1_bn) if l1_bn else {}
        l1 |= dict.fromkeys(copy.matrices, l1_weights) if l1_weights else {}
        held = masks(copy, recipe, keep_zeros)
        job = Job(
            weights=weights,
            terms=objective.terms,
            statistics=tuple(
                name for name in statistics if name in {t.name for t in proto.graph.initializer}
            ),
            masks={name: mask for name, mask in held.items() if name in weights},
            l1={name: factor for name, factor in l1.items() if name in weights},
            decayed=frozenset(copy.matrices) & set(weights),
            optimizer=cast("Literal['adamw', 'sgd']", optimizer),
            weight_decay=weight_decay,
            clip=_CLIP,
            batch_size=size,
            seed=seed,
            threads=threads or usable_cores(),
        )
        aim = objective.labelled or next((a for a, _ in pairs if a.axis is not None), None)
        judge = Judge(
            copy.graph.source, copy.written, given.held_out, shown, objective, aim,
            given.fixed or 64, threads or None,
        )  # fmt: skip
        peak = _RATES[optimizer] if rate is None else rate
        course = Course(
            given.train, taught, objective, judge, epochs, size, peak, seed, penalised=bool(l1)
        )
        key = repr((
            job.terms, job.weights, job.statistics, sorted(job.l1.items()), sorted(job.decayed),
            job.optimizer, job.weight_decay, size, peak, seed, keep_zeros,
        ))  # fmt: skip
        return cls(copy, proto, job, course, key, heard)

    def run(
        self, trainer: Trainer, checkpoint: Path | None, key: str, resume: Checkpoint | None
    ) -> tuple[Loop, int]:
        """Train; the loop at its end, and how many gradients were checked.

        Raises:
            OnnxPruneError: The model cannot be trained, or training did not come to its end.
        """
        loop = Loop(trainer, self.course, checkpoint, key, self.heard)
        checked = 0
        try:
            if self.course.epochs:
                check_supported(trainer, self.proto)
                trainer.prepare(self.proto, self.job)
                if resume is None:
                    some = self.course.order(0)[: min(_CHECKED, self.course.batch_size)]
                    if self._fixed:
                        some = self.course.order(0)[: self.course.batch_size]
                    self.heard("checking gradients")
                    checked = check_gradients(trainer, self.job, *self.course.batch(some))
            loop.run(resume)
        finally:
            trainer.close()
            for teacher in (self.course.teacher, self.course.judge.teacher):
                if teacher is not None:
                    teacher.close()
        return loop, checked

    @property
    def _fixed(self) -> bool:
        """Whether the model takes one size of batch only."""
        value = self.proto.graph.input[0].type.tensor_type.shape.dim
        return bool(value) and value[0].HasField("dim_value")

    def changed(self, values: Arrays) -> Iterator[str]:
        """Names of the weights whose values are no longer the file's."""
        for name, value in values.items():
            old = self.copy.graph.constants[name].weight.read()
            if not np.array_equal(np.asarray(value, np.float32).astype(old.dtype), old):
                yield name


def wanted_of(
    copy: TrainingCopy, proto: onnx.ModelProto, given: Given
) -> tuple[tuple[Aim, Kind], ...]:
    """What is asked of which output of a model, of which trainers get ``proto``.

    Raises:
        UsageError: Labels or teacher are missing, or the labels are no classes of the model.
        UnsupportedModelError: The model is quantized.
    """
    if copy.quantized is not None:
        raise UnsupportedModelError(
            f"the weights of {copy.quantized} are quantized, and such cannot be trained",
            hint="fine-tune the float model, before quantize",
        )
    pairs = choose(
        aims(proto),
        given.losses,
        labels=given.train.labels is not None,
        teacher=given.teacher is not None,
    )
    aim = next((aim for aim, kind in pairs if kind == "ce"), None)
    if aim is not None:
        count = given.fixed or 1
        inputs = {name: array[:count] for name, array in given.train.inputs.items()}
        scores = np.shape(session(copy.graph.source).run(inputs)[aim.output])
        for labels in (given.train.labels, given.held_out.labels):
            if labels is not None:
                axis = -1 if aim.axis is None else aim.axis
                check_classes(labels, scores, axis, aim.output)
    return pairs


def _batched(copy: TrainingCopy, given: Given, asked: int) -> tuple[onnx.ModelProto, int]:
    """What the trainer gets, and samples of a step."""
    size = min(asked, len(given.train))
    first = {name: single(array[: given.fixed or 1]) for name, array in given.train.inputs.items()}
    proto = with_sizes(copy.proto, first)
    if given.fixed is None or given.fixed == size:
        return proto, size
    wide = with_open_batch(proto, first)
    if wide is not None:
        return wide, size
    _log.warning("the model takes %d samples at a time, and so does training", given.fixed)
    return proto, given.fixed


def _teachers(
    given: Given, pairs: Iterable[tuple[Any, str]], heard: Callable[[str], object]
) -> tuple[Teacher | None, Teacher | None]:
    """What the teacher says of the samples to train on, and of those held out."""
    names = list(dict.fromkeys(aim.output for aim, kind in pairs if kind != "ce"))
    if given.teacher is None or not names:
        return None, None
    loaded, batch = session(given.teacher), given.fixed or 64

    def told(done: float) -> None:
        heard(f"asking the teacher, {100 * done:.0f} %")

    return (
        Teacher(loaded, given.train, names, batch, told),
        Teacher(loaded, given.held_out, names, batch),
    )


def _scales(teacher: Teacher | None, count: int) -> dict[str, float]:
    """One over the mean square of what the teacher says, by output."""
    if teacher is None:
        return {}
    said = teacher.outputs(np.arange(min(count, 256)))
    powers = {name: float(np.mean(np.square(one, dtype=np.float64))) for name, one in said.items()}
    return {name: 1 / power if power > 0 else 1.0 for name, power in powers.items()}


def _reaching(
    model: onnx.ModelProto, tensors: Iterable[str], names: Iterable[str]
) -> Iterator[str]:
    """Those of ``names`` that have a say in one of ``tensors``."""
    read = set(tensors)
    for node in reversed(model.graph.node):
        if read & set(node.output):
            read.update(name for name in node.input if name)
    held = {tensor.name for tensor in model.graph.initializer}
    for name in names:
        if name in read and name in held:
            yield name
