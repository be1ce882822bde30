"""JSON Schemas of the reports and of the recipe, as they ship in ``onnxprune/schemas``."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

from onnxprune.curves import Sensitivity
from onnxprune.recipe import Recipe
from onnxprune.report.model import ReportJson
from onnxprune.sweep import Sweep

_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def generate() -> dict[str, str]:
    """Text of each schema file, by the name that the verb ``schema`` takes."""
    made = {
        "report": ReportJson.model_json_schema(by_alias=True, mode="serialization"),
        "recipe": Recipe.model_json_schema(by_alias=True),
        "sensitivity": Sensitivity.model_json_schema(by_alias=True, mode="serialization"),
        "sweep": Sweep.model_json_schema(by_alias=True, mode="serialization"),
    }
    return {
        name: json.dumps({"$schema": _DIALECT, **schema}, indent=2) + "\n"
        for name, schema in made.items()
    }


def stored(name: str) -> str:
    """Text of one schema as it ships."""
    return files("onnxprune").joinpath("schemas", f"{name}.json").read_text("utf-8")


def write(folder: Path) -> None:
    """Store what ``generate`` makes; to be called when the models change."""
    for name, text in generate().items():
        (folder / f"{name}.json").write_text(text, "utf-8", newline="\n")


if __name__ == "__main__":
    write(Path(__file__).resolve().parent.parent / "schemas")
