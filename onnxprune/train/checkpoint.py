"""Where a training stands, in one file that is written whole or not at all."""

from __future__ import annotations

import json
import logging
import os
import secrets
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from onnxprune.errors import UsageError
from onnxprune.train.protocol import Arrays
from onnxprune.types import Epoch

_log = logging.getLogger(__name__)
_ABOUT = "about"  # key of the JSON text; keys of arrays have a slash


@dataclass(frozen=True)
class Checkpoint:
    """All that is needed to go on to the same result.

    Attributes:
        key: Digest of model, data and options that change the result.
        epochs: How many the run is to have.
        epoch: Epoch that runs, from 0: so many are done.
        step: Steps of it that are done.
        losses: Loss of each of these steps.
        history: Epochs that are done.
        best: Weights of the best epoch so far, None where that is the start.
        best_epoch: Which, 0 for the start.
        state: The trainer's.
    """

    key: str
    epochs: int
    epoch: int
    step: int
    losses: tuple[float, ...]
    history: tuple[Epoch, ...]
    best_epoch: int
    best: Arrays | None = field(repr=False)
    state: Arrays = field(repr=False)

    def write(self, path: Path) -> None:
        """Write it, in place of one that is there.

        Raises:
            OSError: It cannot be written; the old one stays.
        """
        about = {
            "key": self.key,
            "epochs": self.epochs,
            "epoch": self.epoch,
            "step": self.step,
            "losses": list(self.losses),
            "history": [asdict(one) for one in self.history],
            "best_epoch": self.best_epoch,
            "improved": self.best is not None,
        }
        arrays: dict[str, Any] = {_ABOUT: np.array(json.dumps(about))}
        arrays |= {f"state/{name}": array for name, array in self.state.items()}
        arrays |= {f"best/{name}": array for name, array in (self.best or {}).items()}
        temporary = path.with_name(f".onnxprune-{secrets.token_hex(8)}.tmp")
        try:
            with temporary.open("xb") as file:
                np.savez(file, **arrays)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def read(cls, path: Path, key: str, epochs: int) -> Checkpoint:
        """Read one of a run of ``epochs``, or one in which just so many are done.

        Raises:
            UsageError: There is none, it is damaged, or it belongs to another run.
        """
        if not path.is_file():
            raise UsageError(f"there is no checkpoint '{path}'", hint="leave out --resume")
        try:
            with np.load(path, allow_pickle=False) as held:
                about: Mapping[str, Any] = json.loads(str(held[_ABOUT]))
                planned, done = about["epochs"], about["epoch"]
                state = _under(held, "state/")
                best = _under(held, "best/") if about["improved"] else None
                history = tuple(Epoch(**one) for one in about["history"])
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile, zlib.error) as error:
            raise UsageError(
                f"'{path}' is no checkpoint that can be read", hint="delete it, and start again"
            ) from error
        if not state:
            raise UsageError(
                f"'{path}' holds no state of the trainer", hint="delete it, and start again"
            )
        if about["key"] != key:
            raise UsageError(
                f"checkpoint '{path}' is of another model, other data or other options",
                hint="give the same ones, or leave out --resume",
            )
        if epochs not in (planned, done):
            raise UsageError(
                f"checkpoint '{path}' is of a run of {planned} epochs, not {epochs}: the learning "
                "rate went by that",
                hint=f"--epochs {planned} goes on"
                + (f", --epochs {done} takes what it has" if done else ""),
            )
        if epochs != planned:
            _log.warning("the result is what %d of %d epochs gave", done, planned)
        return cls(
            key, planned, done, about["step"], tuple(about["losses"]), history,
            about["best_epoch"], best, state,
        )  # fmt: skip


def _under(held: Any, prefix: str) -> dict[str, Any]:
    return {name[len(prefix) :]: held[name] for name in held.files if name.startswith(prefix)}


def place_of(output: Path, *, resume: bool, force: bool) -> Path:
    """Where the checkpoint lies while training runs.

    Raises:
        UsageError: There is one that may not be used, or nothing can be written there: a folder
            that says it is writable may still take no file, and training is too long to find out
            behind it.
    """
    path = output.with_name(f"{output.name}.checkpoint.npz")
    if path.exists() and not resume and not force:
        raise UsageError(
            f"there is a checkpoint '{path}' of a run that did not end",
            hint="--resume goes on from it, --force starts again",
        )
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".onnxprune-", suffix=".tmp"):
            pass
    except OSError as error:
        raise UsageError(
            f"folder '{path.parent}' takes no file: {error.strerror}", hint="choose another output"
        ) from error
    return path
