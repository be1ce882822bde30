"""Trainers by name."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import onnx

from onnxprune.errors import UnsupportedModelError, UsageError
from onnxprune.train.ort import OrtTrainer
from onnxprune.train.place import place, set_up
from onnxprune.train.protocol import Blocking, Trainer
from onnxprune.train.torch_trainer import TorchTrainer

NAMES = ("ort", "torch")
_MOST = 3  # nodes that a message names
_log = logging.getLogger(__name__)


def trainer_of(given: str | Trainer, python: str | None = None) -> Trainer:
    """The trainer of a name, ready to use, or the one that was given.

    Args:
        given: ``ort``, ``torch`` (``torch:cpu``, ``torch:cuda:1`` say where), or an object with
            the protocol.
        python: Interpreter for ``ort``; None takes our own.

    Raises:
        UsageError: There is no such trainer, or it is none.
        MissingExtraError: What it needs is not installed and cannot be.
    """
    if not isinstance(given, str):
        if not isinstance(given, Trainer):
            raise UsageError(f"{type(given).__name__} is no trainer: methods are missing")
        return given
    if given == "ort":
        where = place(python)
        if not where.ready:
            set_up(where, _log.warning)
        return OrtTrainer(where)
    if python is not None:
        raise UsageError("--train-python goes with --trainer ort")
    name, _, device = given.partition(":")
    if name != "torch":
        raise UsageError(f"trainer is '{given}'", hint=f"give {' or '.join(NAMES)}")
    return TorchTrainer(device or "auto")


def check_supported(trainer: Trainer, model: onnx.ModelProto) -> None:
    """Refuse a model that the trainer cannot train through.

    Raises:
        UnsupportedModelError: So it is; the message names the nodes.
    """
    blocking: Sequence[Blocking] = trainer.supports(model)
    if not blocking:
        return
    named = [f"{one.reason}" + (f" ('{one.node}')" if one.node else "") for one in blocking]
    more = f", and {len(named) - _MOST} more" if len(named) > _MOST else ""
    other = next(name for name in NAMES if name != trainer.name)
    raise UnsupportedModelError(
        f"cannot train through {', '.join(named[:_MOST])}{more}", hint=f"--trainer {other}"
    )
