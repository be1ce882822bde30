"""The verb ``schema``."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from onnxprune.commands.options import SchemaName
from onnxprune.terminal import printing


def schema(
    name: Annotated[SchemaName, typer.Argument(metavar="NAME", show_default=False)],
) -> None:
    """Print the JSON Schema of what --json prints, or of a recipe."""
    from importlib.resources import files

    # Read here, not through `report.schemas`, which would import pydantic for nothing.
    stored = files("onnxprune").joinpath("schemas", f"{name.value}.json")
    with printing():
        sys.stdout.write(stored.read_text("utf-8"))
