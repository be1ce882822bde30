"""The exception tree: exit codes and one-line messages."""

from __future__ import annotations

import pytest

from onnxprune import errors


@pytest.mark.parametrize(
    ("kind", "exit_code"),
    [
        (errors.UsageError, 2),
        (errors.RecipeError, 2),
        (errors.ModelError, 3),
        (errors.UnsupportedModelError, 3),
        (errors.TargetError, 3),
        (errors.VerificationError, 4),
        (errors.MissingExtraError, 5),
        (errors.InvariantError, 1),
    ],
)
def test_every_error_has_its_exit_code_and_the_common_base(
    kind: type[errors.OnnxPruneError], exit_code: int
) -> None:
    assert kind.exit_code == exit_code
    assert issubclass(kind, errors.OnnxPruneError)


def test_message_and_hint_are_printed_in_one_line() -> None:
    error = errors.ModelError("no such\n  file", hint="check\nthe path", node="conv1")
    assert str(error) == "no such file (check the path)"
    assert error.node == "conv1"


def test_message_without_hint_stands_alone() -> None:
    assert str(errors.UsageError("bad value")) == "bad value"
