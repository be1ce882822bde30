"""The verb ``finetune``: load, copy, train, verify, save."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np

from onnxprune.analysing import analysed
from onnxprune.checks import (
    AnyModel,
    Check,
    check_kinds,
    check_level,
    check_mappings,
    check_outputs,
    check_sources,
)
from onnxprune.cost import stats
from onnxprune.data import AnyData, Data, digest_of
from onnxprune.drift import measure_drift
from onnxprune.io import as_model
from onnxprune.model import Model
from onnxprune.recording import digest, embed
from onnxprune.report.build import NOT_VERIFIED
from onnxprune.report.clock import Clock, Heard, Progress, peak_memory
from onnxprune.report.layers import layer_reports
from onnxprune.request import Mode
from onnxprune.train.backends import trainer_of
from onnxprune.train.checkpoint import Checkpoint, place_of
from onnxprune.train.copying import TrainingCopy
from onnxprune.train.given import Given, check_numbers
from onnxprune.train.protocol import Trainer
from onnxprune.train.session import Training, wanted_of
from onnxprune.train.zeros import check_zeros, recipe_of
from onnxprune.types import AnyArray, Limits, Report, Shape, Tuned, Verdict
from onnxprune.verdicts import judged
from onnxprune.verify import verify as run_checks
from onnxprune.writing import Writing

_log = logging.getLogger(__name__)


def finetune(
    model: AnyModel,
    *,
    data: AnyData,
    labels: Path | str | AnyArray | None = None,
    teacher: AnyModel | None = None,
    loss: str | Sequence[str] = (),
    epochs: int = 3,
    rate: float | None = None,
    batch_size: int = 64,
    optimizer: str = "adamw",
    temperature: float = 2.0,
    l1_bn: float = 0.0,
    l1_weights: float = 0.0,
    weight_decay: float = 1e-4,
    freeze_bn: bool = False,
    keep_zeros: str = "auto",
    validation: float | Path | str = 0.1,
    trainer: str | Trainer = "ort",
    train_python: str | None = None,
    threads: int = 0,
    resume: bool = False,
    input_shapes: Mapping[str, Shape] | None = None,
    seed: int = 0,
    verify: str = "full",
    max_drift: float | None = None,
    min_cosine: float | None = None,
    min_top1: float | None = None,
    output: Path | str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> tuple[Model, Report]:
    """Train the weights of a model on, in place in its untouched graph.

    Args:
        model: A path, a loaded model, or a message.
        data: Inputs to train on: an ``.npz`` file, a mapping of input name to array, or ``Data``.
        labels: Class of each sample: an ``.npy`` file, an ``.npz`` with ``labels``, or an array.
        teacher: The model to imitate, which needs no labels; None takes the one that the recipe
            of ``model`` was made from, where it lies beside it.
        loss: ``ce`` (labels), ``kd`` (imitate the classes), ``mse`` (imitate the numbers), or
            several; none takes what labels and teacher allow.
        epochs: Times through the data.
        rate: Largest learning rate; None takes 1e-3 for ``adamw`` and 0.02 for ``sgd``.
        batch_size: Samples of a step.
        optimizer: ``adamw``, or ``sgd`` with momentum 0.9.
        temperature: Of ``kd``.
        l1_bn: Factor of an L1 penalty on scales of BatchNormalization (Network Slimming).
        l1_weights: Factor of an L1 penalty on weights that multiply.
        weight_decay: Of weights that multiply; biases and norms do not decay.
        freeze_bn: BatchNormalization works with its running statistics in training too.
        keep_zeros: ``auto``: weights that a pattern made sparse keep their zeros; ``all`` or
            ``none``.
        validation: Share of the data that is held out, or a file of other data (with an array
            ``labels`` where there are labels).
        trainer: ``ort``, ``torch``, or an object with the protocol ``Trainer``.
        train_python: Interpreter that runs onnxruntime-training; None takes our own.
        threads: To compute on; 0 takes all cores.
        resume: Go on from the checkpoint beside ``output``.
        input_shapes: Concrete shapes for symbolic inputs.
        seed: For the order of samples, and what is random in the model.
        verify: ``none``, ``twin`` (are zeros kept, does it load and run) or ``full`` (drift too).
        max_drift: Most relative L2 difference of any output from the teacher's, or from the
            model's before, that is allowed.
        min_cosine: Least cosine of any output that is allowed.
        min_top1: Least share of samples with the same arg max that is allowed.
        output: File to write, or None; the checkpoint lies beside it while training runs.
        force: Overwrite what exists.
        progress: Called with a line on how it stands.

    Returns:
        The model of the epoch that was best on the samples held out, and the report.

    Raises:
        UsageError: An option, a file of data or an output path cannot be used.
        ModelError: The model is unreadable or invalid.
        UnsupportedModelError: It has no weights to train, or operators the trainer does not know.
        MissingExtraError: The trainer is not installed, and cannot be.
        TrainingError: Training did not come to its end; a checkpoint is left.
        VerificationError: Gradients or the result are wrong, or the result passes a limit.
    """
    check_kinds(
        numbers={"max_drift": max_drift, "min_cosine": min_cosine, "min_top1": min_top1},
        wholes={"seed": seed, "threads": threads},
        texts={"keep_zeros": keep_zeros, "verify": verify, "train_python": train_python},
    )
    check_mappings(input_shapes=input_shapes)
    limits = Limits(max_drift, min_cosine, min_top1)
    check_level(verify, limits)
    check_numbers(
        epochs=epochs, rate=rate, batch_size=batch_size, temperature=temperature, l1_bn=l1_bn,
        l1_weights=l1_weights, weight_decay=weight_decay, optimizer=optimizer,
    )  # fmt: skip
    read = (data, labels, teacher, validation if isinstance(validation, str | Path) else None)
    check_outputs(model, output, force=force, read=read)
    checkpoint = None if output is None else place_of(Path(output), resume=resume, force=force)
    clock = Clock(progress)
    with Heard() as heard:
        with clock.stage("load"):
            original = as_model(model)
            check_sources(original, output)
            recipe = recipe_of(original)
            given = Given.read(
                original, data, labels, teacher, recipe, validation, loss, seed, batch_size
            )
        graph = analysed(original, input_shapes or {}, Mode(), clock)
        with clock.stage("prepare"):
            training = Training.of(
                TrainingCopy.of(original), given, recipe, keep_zeros=keep_zeros,
                optimizer=optimizer, rate=rate, batch_size=batch_size, epochs=epochs,
                temperature=temperature, l1_bn=l1_bn, l1_weights=l1_weights,
                weight_decay=weight_decay, freeze_bn=freeze_bn, threads=threads, seed=seed,
                heard=progress or (lambda _: None),
            )  # fmt: skip
            key = sha256(f"{digest(original)} {_digest(given)} {training.key}".encode()).hexdigest()
            before = Checkpoint.read(checkpoint, key, epochs) if resume and checkpoint else None
            chosen = trainer_of(trainer, train_python)
        with clock.stage("train"):
            loop, checked = training.run(chosen, checkpoint, key, before)
        if loop.best is None and epochs:
            _log.warning("no epoch was better than the weights that came in, which are kept")
        with clock.stage("verify"):
            best = loop.best or {}
            made = training.copy.written(best) if best else original
            if recipe is not None and best:
                changed = dict.fromkeys((*recipe.restored, *training.changed(best)))
                made = embed(made, recipe.model_copy(update={"restored": tuple(changed)}))
            seen = given.held_out_data()
            check = Check(verify, limits, seen, seed)
            verdict = _verdict(given, original, made, check)
        costs = stats(graph)
        with clock.stage("save"):
            written = Writing(output, force).save(
                made,
                check=None
                if verify == "none"
                else lambda again: check_zeros(again, training.job.masks),
            )
            if checkpoint is not None:
                checkpoint.unlink(missing_ok=True)
    tuned = _tuned(training, chosen, loop.history, loop.best_epoch, checked)
    if given.teacher is not None and verify == "full":
        drift = measure_drift(given.teacher, original, seen)
        tuned = replace(tuned, drift_before=drift, drift_after=verdict.drift)
    return made, Report(
        verb="finetune",
        input_path=str(original.path or ""),
        before=costs,
        output_path=None if output is None else str(output),
        after=written.of(costs),
        importance="",
        importance_why="",
        exact=None,
        groups=(),
        verdict=verdict,
        stand_ins=graph.stand_ins,
        seconds=clock.seconds,
        peak_memory_bytes=peak_memory(),
        warnings=tuple(heard.messages),
        recipe={} if recipe is None else recipe.as_json(),
        written=tuple(written.files),
        layers=layer_reports(graph, costs),
        tuned=tuned,
    )


def check_training(
    model: Model,
    *,
    data: AnyData,
    labels: Path | str | AnyArray | None = None,
    loss: str | Sequence[str] = (),
    epochs: int = 3,
    rate: float | None = None,
    batch_size: int = 64,
    optimizer: str = "adamw",
    validation: float | Path | str = 0.1,
    trainer: str | Trainer = "ort",
    train_python: str | None = None,
    seed: int = 0,
    **_others: object,
) -> None:
    """Refuse what ``finetune`` would refuse of models cut from ``model``, which they imitate.

    Raises:
        OnnxPruneError: As ``finetune``.
    """
    check_numbers(epochs=epochs, rate=rate, batch_size=batch_size, optimizer=optimizer)
    kinds = set(loss.split(",") if isinstance(loss, str) else loss)
    teacher = None if kinds == {"ce"} else model
    given = Given.read(model, data, labels, teacher, None, validation, loss, seed, batch_size)
    wanted_of(copy := TrainingCopy.of(model), copy.proto, given)
    trainer_of(trainer, train_python)


def _digest(given: Given) -> str:
    """Of everything that is learned from."""
    labels = given.train.labels
    held = given.held_out.labels
    parts = [
        digest_of(Data([given.train.inputs], "", random=False, samples=len(given.train))),
        digest_of(Data([given.held_out.inputs], "", random=False, samples=len(given.held_out))),
        *("" if one is None else sha256(one.tobytes()).hexdigest() for one in (labels, held)),
        "" if given.teacher is None else digest(given.teacher),
    ]
    return " ".join(str(part) for part in parts)


def _verdict(given: Given, original: Model, made: Model, check: Check) -> Verdict:
    """Does the result load and run, and how far is it from the teacher, else from what came in?"""
    if check.level == "none":
        return NOT_VERIFIED
    assert check.data is not None
    reference = original if given.teacher is None else given.teacher
    found = run_checks(
        reference, made, twin=None, data=check.data, level=check.level, limits=check.limits
    )
    return judged(found, check.limits)


def _tuned(
    training: Training, trainer: Trainer, history: Sequence[object], best: int, checked: int
) -> Tuned:
    job, copy = training.job, training.copy
    sizes = [copy.graph.constants[name].weight.size for name in job.weights]
    zeros = sum(int(np.count_nonzero(mask == 0)) for mask in job.masks.values())
    return Tuned(
        trainer=trainer.name,
        losses=tuple(dict.fromkeys(term.kind for term in job.terms)),
        optimizer=job.optimizer,
        rate=training.course.rate,
        batch_size=training.course.batch_size,
        samples=(len(training.course.samples), len(training.course.judge.samples)),
        weights=(len(sizes), sum(sizes)),
        zeros=zeros,
        measure=training.course.judge.measure,
        epochs=tuple(history),  # type: ignore[arg-type]  # epochs
        best=best,
        checked=checked,
    )
