"""Options and paths, checked as far as they can be before any work is done."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from onnxprune.data import Data
from onnxprune.errors import UsageError
from onnxprune.model import Model
from onnxprune.types import Limits

AnyModel = Model | onnx.ModelProto | bytes | str | Path

_LEVELS = ("none", "twin", "full")


@dataclass(frozen=True)
class Check:
    """How a result is to be verified; ``data`` is None for random inputs."""

    level: str
    limits: Limits
    data: Data | None
    seed: int


def check_kinds(
    *,
    numbers: Mapping[str, object] | None = None,
    wholes: Mapping[str, object] | None = None,
    texts: Mapping[str, object] | None = None,
) -> None:
    """Refuse option values of a kind that means nothing, by option; None is none given.

    Raises:
        UsageError: One is of another kind.
    """
    for kinds, given, wanted in (
        ((int, float, np.integer, np.floating), numbers, "a number"),
        ((int, np.integer), wholes, "a whole number"),
        (str, texts, "a text"),
    ):
        for name, value in (given or {}).items():
            if value is None or (isinstance(value, kinds) and not isinstance(value, bool)):
                continue
            raise UsageError(
                f"{name.replace('_', '-')} is {value!r}, not {wanted}", hint=f"give {wanted}"
            )


def check_patterns(**given: object) -> None:
    """Refuse what is neither a pattern of names nor a sequence of such.

    Raises:
        UsageError: It is something else.
    """
    for name, value in given.items():
        if isinstance(value, str):
            continue
        if not (isinstance(value, Sequence) and all(isinstance(one, str) for one in value)):
            raise UsageError(f"{name} is {value!r}", hint="give one pattern, or a list of them")


def check_mappings(**given: object) -> None:
    """Refuse what maps no names to numbers or shapes; None is none given.

    Raises:
        UsageError: It is something else.
    """
    for name, value in given.items():
        if value is not None and not isinstance(value, Mapping):
            raise UsageError(f"{name} is {value!r}", hint="give a mapping by name")
        for key, one in (value or {}).items():
            sizes = one if isinstance(one, tuple | list) else (one,)
            if not all(_is_number(size) for size in sizes):
                raise UsageError(f"{name} of '{key}' is {one!r}", hint="give numbers")


def _is_number(value: object) -> bool:
    number = isinstance(value, int | float | np.integer | np.floating)
    return number and not isinstance(value, bool)


def check_level(level: str, limits: Limits) -> None:
    """Refuse a level that does not exist, or that leaves other options without effect."""
    if level not in _LEVELS:
        raise UsageError(f"verify is '{level}'", hint="give none, twin or full")
    flags = {
        "--max-drift": limits.max_drift,
        "--min-cosine": limits.min_cosine,
        "--min-top1": limits.min_top1,
    }
    given = {flag: value for flag, value in flags.items() if value is not None}
    if given and level != "full":
        raise UsageError(f"{next(iter(given))} needs --verify full, not {level}")
    for flag, value in given.items():
        low, high = {"--max-drift": (0.0, float("inf")), "--min-cosine": (-1.0, 1.0)}.get(
            flag, (0.0, 1.0)
        )
        if not low <= value <= high:
            upper = f" <= {high:g}" if high < float("inf") else ""
            raise UsageError(f"{flag} is {value:g}", hint=f"give {low:g} <= value{upper}")


def check_allowance(sensitivity: object, max_loss: float | None, scope: str | None) -> None:
    """Refuse half of a pair of options, and what it contradicts."""
    if sensitivity is None and max_loss is not None:
        raise UsageError("--max-loss needs a sensitivity file", hint="--sensitivity FILE.json")
    if sensitivity is not None and max_loss is None:
        raise UsageError("--sensitivity needs to know how much may be lost", hint="--max-loss 0.01")
    if sensitivity is not None and scope == "global":
        raise UsageError(
            "--sensitivity says what each group loses", hint="leave out --scope global"
        )


def check_restore(restore: str, data: object) -> None:
    """Refuse a way to restore that does not exist, or lacks what it needs."""
    if restore not in ("auto", "none", "bias", "pictures", "refit"):
        raise UsageError(f"restore is '{restore}'", hint="give auto, none, bias, pictures or refit")
    if restore == "refit" and data is None:
        raise UsageError("restore refit needs calibration data", hint="--data FILE.npz")


def check_outputs(
    model: AnyModel, *outputs: Path | str | None, force: bool, read: Sequence[object] = ()
) -> None:
    """Refuse an output that cannot be written, before any work is done.

    Args:
        model: The input.
        outputs: Where the model goes, then other files; None for what is not written.
        force: They may exist.
        read: Other things that are read; those that are paths must not be overwritten.

    Raises:
        UsageError: It is the input, something read or another output, exists, or its folder does
            not take it.
    """
    source = Path(model) if isinstance(model, str | Path) else getattr(model, "path", None)
    inputs = [Path(one) for one in read if isinstance(one, str | Path)]
    seen: list[Path] = []
    for given in outputs:
        if given is None:
            continue
        path = Path(given)
        if source is not None and _same(path, source):
            raise UsageError(
                f"'{path}' is the input itself, which is never overwritten",
                hint="choose another output",
            )
        for other in inputs:
            if any(_same(one, two) for one in (path, _data_of(path)) for two in _with_data(other)):
                raise UsageError(
                    f"writing '{path}' would overwrite '{other}', which this run reads",
                    hint="choose another output",
                )
        if any(_same(path, other) for other in seen):
            raise UsageError(f"'{path}' is given for two outputs")
        if seen and _same(path, _data_of(seen[0])):
            raise UsageError(
                f"'{path}' is where '{seen[0]}' may keep its weights", hint="choose another name"
            )
        seen.append(path)
        if path.is_dir():
            raise UsageError(f"'{path}' is a directory", hint="give the output a file name")
        if path.exists() and not path.is_file():
            raise UsageError(f"'{path}' is not a regular file", hint="choose another output")
        if not path.parent.is_dir():
            raise UsageError(f"folder '{path.parent}' does not exist", hint="create it first")
        if os.path.lexists(path) and not force:
            raise UsageError(
                f"'{path}' exists", hint="give --force to overwrite it, in Python force=True"
            )
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise UsageError(
                f"folder '{path.parent}' is not writable", hint="choose another output"
            )


def _data_of(path: Path) -> Path:
    """Where a model keeps its weights if they are not inside."""
    return path.with_name(path.name + ".data")


def _with_data(path: Path) -> tuple[Path, ...]:
    return (path, _data_of(path)) if path.suffix == ".onnx" else (path,)


def check_sources(model: Model, *outputs: Path | str | None) -> None:
    """Refuse an output that is a file the model's weights are read from, whatever its name.

    Raises:
        UsageError: It is the input or its external data.
    """
    for given in outputs:
        if given is not None and any(_same(Path(given), source) for source in model.sources):
            raise UsageError(
                f"'{given}' belongs to the input, which is never overwritten",
                hint="choose another output",
            )


def _same(path: Path, other: Path) -> bool:
    if path.exists() and other.exists():
        return path.samefile(other)
    return path.resolve() == other.resolve()
