"""What a caller gave to learn from: samples, labels, a teacher, samples to be held out."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from onnxprune.checks import AnyModel, check_kinds, check_patterns
from onnxprune.data import AnyData, Data, as_data, load_data
from onnxprune.dims import size_of
from onnxprune.errors import OnnxPruneError, UsageError
from onnxprune.feeds import inputs_of, spell
from onnxprune.gauges import read_labels
from onnxprune.io import as_model, load
from onnxprune.model import Model
from onnxprune.recipe import Recipe
from onnxprune.recording import digest
from onnxprune.train.batching import fixed_batch
from onnxprune.train.samples import Samples
from onnxprune.types import AnyArray

_KINDS = ("ce", "kd", "mse")
_OPTIMIZERS = ("adamw", "sgd")
_BESIDE = 32  # models in a folder that may be the one that a recipe was made for
_SEEN = 1024  # held-out samples that drift is measured on
_log = logging.getLogger(__name__)


def check_numbers(*, optimizer: str, epochs: int, batch_size: int, **numbers: float | None) -> None:
    """Refuse numbers that no training can run with.

    Raises:
        UsageError: The first of them.
    """
    check_kinds(
        numbers={{"rate": "lr"}.get(name, name): value for name, value in numbers.items()},
        wholes={"epochs": epochs, "batch_size": batch_size},
        texts={"optimizer": optimizer},
    )
    if epochs is None or batch_size is None:
        raise UsageError("epochs and batch-size are whole numbers", hint="leave out what is None")
    if optimizer not in _OPTIMIZERS:
        raise UsageError(f"optimizer is '{optimizer}'", hint=f"give {' or '.join(_OPTIMIZERS)}")
    if epochs < 0:
        raise UsageError(f"epochs is {epochs}", hint="give 0 or more")
    if batch_size < 1:
        raise UsageError(f"batch-size is {batch_size}", hint="give 1 or more")
    for name, value in numbers.items():
        if value is None:
            continue
        positive = name in ("rate", "temperature")
        if not math.isfinite(value) or value < 0 or (positive and not value):
            spelled = {"rate": "lr"}.get(name, name.replace("_", "-"))
            hint = "give a number greater than 0" if positive else "give 0 or more"
            raise UsageError(f"{spelled} is {value:g}", hint=hint)


@dataclass(frozen=True)
class Given:
    """What to learn from.

    Attributes:
        train: Samples to train on.
        held_out: Samples to judge on.
        teacher: The model to imitate, or None.
        losses: Kinds of loss that were asked for; none leaves the choice.
        fixed: Samples that the model takes at a time, None where that is open.
    """

    train: Samples = field(repr=False)
    held_out: Samples = field(repr=False)
    teacher: Model | None
    losses: tuple[str, ...]
    fixed: int | None

    @classmethod
    def read(
        cls,
        model: Model,
        data: AnyData,
        labels: Path | str | AnyArray | None,
        teacher: AnyModel | None,
        recipe: Recipe | None,
        validation: float | Path | str,
        loss: str | Sequence[str],
        seed: int,
        batch: int,
    ) -> Given:
        """Read and check all of it.

        Raises:
            UsageError: Something is missing, or does not fit.
        """
        check_patterns(loss=loss)
        losses = tuple(loss.split(",")) if isinstance(loss, str) else tuple(loss)
        for one in losses:
            if one not in _KINDS:
                raise UsageError(f"loss is '{one}'", hint=f"give {', '.join(_KINDS)}")
        samples = _samples(data, labels, model, batch)
        imitates = set(losses) & {"kd", "mse"} or (not losses and labels is None)
        found = _teacher(model, teacher, recipe, needed=bool(imitates))
        if "ce" in losses and not imitates and teacher is not None:
            _log.warning("--teacher is not used: --loss ce learns from labels alone")
            found = None
        if isinstance(validation, str | Path):
            train, held = samples, _held_out(validation, model, samples, batch)
        else:
            check_kinds(numbers={"val": validation})
            if validation is None or not 0 < validation < 1:
                raise UsageError(f"val is {validation}", hint="give a share, 0 < share < 1")
            train, held = samples.split(validation, seed)
        fixed = fixed_batch(model.proto)
        return cls(train, held, found, losses, fixed)

    def held_out_data(self) -> Data:
        """Some of the samples held out, as verification takes them."""
        size = self.fixed or 64
        some = self.held_out.take(np.arange(min(len(self.held_out), max(size, _SEEN))))
        count = len(some) // size * size if self.fixed else len(some)
        batches = [dict(inputs) for inputs, part in some.batches(size) if part.start < count]
        label = f"{self.held_out.label}; {count} held out"
        return Data(batches, label, random=False, samples=count)


def _samples(
    data: AnyData, labels: Path | str | AnyArray | None, model: Model, batch: int
) -> Samples:
    if isinstance(data, str | Path):
        read: Data | None = load_data(data, model, batch=max(batch, 64))
    else:
        read = as_data(data, model)
    if read is None or read.random:
        raise UsageError("training needs inputs of yours", hint="--data FILE.npz")
    if isinstance(labels, str | Path):
        labels = read_labels(labels, read.samples, fixed_batch(model.proto) or 1)
    return Samples.of(read, labels)


def _held_out(path: Path | str, model: Model, samples: Samples, batch: int) -> Samples:
    """Samples of another file, with its own labels where there are labels."""
    read = load_data(path, model, batch=max(batch, 64))
    if samples.labels is None:
        return Samples.of(read, None)
    if "labels" in {value.name for value in inputs_of(model)}:
        raise UsageError(f"'{path}' cannot hold labels beside an input 'labels'", hint="--val 0.1")
    return Samples.of(read, read_labels(path, read.samples, fixed_batch(model.proto) or 1))


def _teacher(
    model: Model, given: AnyModel | None, recipe: Recipe | None, *, needed: bool
) -> Model | None:
    """The model to imitate."""
    if given is not None:
        found = as_model(given)
        for kind in ("input", "output"):
            ours, theirs = (
                [value.name for value in getattr(one.proto.graph, kind)] for one in (model, found)
            )
            if ours != theirs:
                raise UsageError(
                    f"the teacher has other {kind}s: {theirs} instead of {ours}",
                    hint="give the model it was pruned from",
                )
            _check_shapes(model, found, kind)
        return found
    if not needed:
        return None
    beside = _original(model, recipe)
    if beside is None:
        raise UsageError(
            "there is no model to imitate and there are no labels"
            if recipe is None
            else "the model it was pruned from does not lie beside it",
            hint="--teacher ORIGINAL.onnx, or --labels Y.npy",
        )
    return beside


def _check_shapes(model: Model, teacher: Model, kind: str) -> None:
    """Refuse a teacher whose inputs or outputs are of another rank, or another fixed size."""
    for ours, theirs in zip(
        *(getattr(one.proto.graph, kind) for one in (model, teacher)), strict=True
    ):
        sizes = [[size_of(dim) for dim in v.type.tensor_type.shape.dim] for v in (ours, theirs)]
        apart = len(sizes[0]) != len(sizes[1]) or any(
            one is not None and two is not None and one != two
            for one, two in zip(*sizes, strict=True)
        )
        if apart:
            raise UsageError(
                f"{kind} '{ours.name}' of the teacher is {spell(sizes[1])}, not {spell(sizes[0])}",
                hint="give the model it was pruned from",
            )


def _original(model: Model, recipe: Recipe | None) -> Model | None:
    """The file that a recipe was made for, if it lies beside the model: its digest tells."""
    if recipe is None or model.path is None:
        return None
    for path in _beside(model.path):
        try:
            found = load(path)
            same = digest(found) == recipe.input_sha256
        except (OnnxPruneError, OSError):  # whatever else lies there
            continue
        if same:
            _log.info("teacher: '%s', which the recipe was made for", path)
            return found
    return None


def _beside(path: Path) -> list[Path]:
    """Models in the same folder: those of like names first, then, up to a number, all others."""
    stem, likely = path.stem, []
    while (cut := re.sub(r"\.[^.]*$", "", stem)) != stem:
        stem = cut
        likely.append(path.with_name(f"{stem}.onnx"))
    others = [one for one in sorted(path.parent.glob("*.onnx")) if one != path]
    # An original is hardly smaller than what was cut from it: where there are many, large ones.
    others.sort(key=lambda one: one.stat().st_size if one.is_file() else 0, reverse=True)
    return [one for one in dict.fromkeys([*likely, *others[:_BESIDE]]) if one.is_file()]
