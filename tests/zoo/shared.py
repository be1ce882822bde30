"""Where the material beside the project lies, and how to read it."""

from __future__ import annotations

import importlib.util
import json
from functools import cache
from pathlib import Path

import onnx
import pytest

SHARED = Path(__file__).resolve().parents[3] / "shared"
ZOO, CASES = SHARED / "zoo", SHARED / "cases"
needs_zoo = pytest.mark.skipif(not ZOO.is_dir(), reason="the zoo is not beside the project")
needs_cases = pytest.mark.skipif(not CASES.is_dir(), reason="the cases are not beside the project")


def manifest(folder: Path) -> list[dict[str, object]]:
    """Entries of a folder's manifest, none where the folder is absent."""
    path = folder / "manifest.json"
    return json.loads(path.read_text("utf-8")) if path.is_file() else []


@cache
def _materialize() -> object:
    spec = importlib.util.spec_from_file_location("materialize", ZOO / "materialize.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def network(file: str) -> onnx.ModelProto:
    """One network of the zoo with its seeded weights."""
    return _materialize().materialize(ZOO / file)
