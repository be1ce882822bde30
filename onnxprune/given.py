"""Functions that users bring: ``path.py:function``."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from onnxprune.errors import UsageError


def function_from(spelled: str) -> Callable[..., Any]:
    """The function that ``path.py:function`` names.

    Raises:
        UsageError: There is no such file or function, or the file cannot be run.
    """
    path, _, name = spelled.rpartition(":")
    if not Path(path).is_file():
        raise UsageError(f"'{path}': no such file", hint="give path.py:function")
    spec = importlib.util.spec_from_file_location("onnxprune_given", path)
    if spec is None or spec.loader is None:
        raise UsageError(f"'{path}' is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UsageError(f"'{path}' fails: {type(error).__name__}: {error}") from error
    found = getattr(module, name, None)
    if not callable(found):
        raise UsageError(f"'{path}' has no function '{name}'")
    return found  # type: ignore[no-any-return]  # what it gives is checked where it is called
