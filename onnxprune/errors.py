"""Everything that can go wrong, by exit code; each error says what to do next."""

from __future__ import annotations

from typing import ClassVar

BUG = "this is a bug in onnxprune: please report it with the model"


class OnnxPruneError(Exception):
    """Base of all errors of this package; raise one of its subclasses.

    Attributes:
        exit_code: Exit status of the command line for this kind of error.
        message: What happened, with the file, node or tensor by its name.
        hint: What to do next, or "".
        node: Name of the node it happened to, or None.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str = "", node: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.node = node

    def __str__(self) -> str:
        text = f"{self.message} ({self.hint})" if self.hint else self.message
        return " ".join(text.split())


class UsageError(OnnxPruneError):
    """A flag, a value or an output path that cannot be used."""

    exit_code = 2


class RecipeError(OnnxPruneError):
    """The recipe does not fit this model or this version."""

    exit_code = 2


class ModelError(OnnxPruneError):
    """The model is unreadable or invalid."""

    exit_code = 3


class UnsupportedModelError(OnnxPruneError):
    """A valid model with nothing to prune."""

    exit_code = 3


class TargetError(OnnxPruneError):
    """The ratio or target cannot be met under the constraints."""

    exit_code = 3


class VerificationError(OnnxPruneError):
    """The result is not what the surgery should give, or passes a limit the user set."""

    exit_code = 4


class TrainingError(OnnxPruneError):
    """Training did not come to its end: the process died, memory or the loss ran away."""

    exit_code = 4


class InterruptionError(OnnxPruneError):
    """A verb of the command line was ordered to end, and left something to go on from."""

    exit_code = 130


class MissingExtraError(OnnxPruneError):
    """An optional dependency is not installed."""

    exit_code = 5


class InvariantError(OnnxPruneError):
    """A rule of our own is broken: a bug in onnxprune, not in the model."""

    exit_code = 1
