"""Which operators TensorRT takes, in which element types: as measured, not as remembered.

`tensorrt.json` beside this file is written by `tools/tensorrt_support.py`, which puts one-node
models to TensorRT-RTX's own parser and builder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

PARSER = "parser"


@dataclass(frozen=True, slots=True)
class Complaint:
    """Why something was not taken: ``who`` said so, the parser or the builder, and what."""

    who: str
    text: str

    @property
    def sure(self) -> bool:
        """It is a refusal; an internal error, or one while building, may be that of the test."""
        return self.who == PARSER and "Internal Error" not in self.text

    @property
    def plugin(self) -> bool:
        """The parser looks for a plugin, which another build of TensorRT may have."""
        return "plugin" in self.text.lower()


@dataclass(frozen=True, slots=True)
class Operator:
    """What was found of one operator.

    Attributes:
        types: Element types of its first input in which it is taken, as ONNX names them.
        refused: What was said of other types, by type.
        said: What was said where it is taken in none, None where it is taken.
    """

    types: frozenset[str]
    refused: Mapping[str, Complaint]
    said: Complaint | None


@cache
def operators() -> Mapping[str, Operator]:
    """The operators of ONNX's standard domain that were asked about."""
    return {
        name: Operator(
            types=frozenset(entry["types"]),
            refused={kind: Complaint(*said) for kind, said in entry.get("refused", {}).items()},
            said=Complaint(*entry["said"]) if "said" in entry else None,
        )
        for name, entry in _table()["operators"].items()
    }


def source() -> str:
    """What was asked, with its version."""
    return str(_table()["source"]["asked"]).split(",", maxsplit=1)[0]


@cache
def _table() -> Mapping[str, Any]:
    text = files("onnxprune").joinpath("targets", "tensorrt.json").read_text("utf-8")
    found: dict[str, Any] = json.loads(text)
    return found
