"""The command line, called in this process."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from onnxprune.cli import run
from onnxprune.report.schemas import stored


class Call:
    """Runs one command line: exit code, what it wrote on stdout and on stderr."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *arguments: object) -> tuple[int, str, str]:
        self.capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        out, err = self.capsys.readouterr()
        return code, out, err

    def json(self, *arguments: object, code: int = 0, warns: bool = False) -> dict[str, Any]:
        """What ``--json`` prints, held against the schema; without a word on stderr."""
        got, out, err = self(*arguments, "--json")
        assert got == code, err
        assert warns or code or not err, err
        found: dict[str, Any] = json.loads(out)
        jsonschema.validate(found, json.loads(stored("report")))
        return found
