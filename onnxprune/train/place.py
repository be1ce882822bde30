"""Where onnxruntime-training lives: a folder in the user's cache, never an environment.

The package replaces ``onnxruntime`` on import, is frozen at 1.19.2, and has wheels up to Python
3.12. So it is put into a folder of its own without its dependencies, and runs in an interpreter
that may be another one.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from onnxprune.errors import MissingExtraError

PACKAGE = "onnxruntime-training-cpu"
VERSION = "1.19.2"
_NEWEST = (3, 12)
_OLDEST = (3, 11)
_ASK = (
    "import sys, json, importlib.util as u; "
    "print(json.dumps([sys.version_info[:2], [n for n in ('numpy', 'onnx') "
    "if u.find_spec(n) is None]]))"
)


@dataclass(frozen=True, slots=True)
class Place:
    """An interpreter, and the folder that goes in front of its path."""

    python: str
    folder: Path

    @property
    def ready(self) -> bool:
        """Whether the package is there."""
        return (self.folder / "onnxruntime" / "training").is_dir()


def place(python: str | None = None) -> Place:
    """Where the package is, or would be.

    Args:
        python: Interpreter to run it with; None takes our own.

    Raises:
        MissingExtraError: The interpreter cannot be run, or there is no wheel for it.
    """
    chosen = python or sys.executable
    version, missing = _asked(chosen)
    if not _OLDEST <= version <= _NEWEST:
        spelled = ".".join(map(str, version))
        raise MissingExtraError(
            f"{PACKAGE} {VERSION} has no wheel for Python {spelled}",
            hint="give --train-python PATH of Python 3.11 or 3.12, or --trainer torch",
        )
    name = f"ort-training-{VERSION}-py{version[0]}{version[1]}" + ("-full" if missing else "")
    return Place(chosen, _cache() / name)


def set_up(where: Place, tell: Callable[[str], object]) -> None:
    """Install the package there, whole or not at all.

    Args:
        where: From ``place``.
        tell: Called with one line that says what is done.

    Raises:
        MissingExtraError: It cannot be had; the message has the command.
    """
    full = where.folder.name.endswith("-full")
    wanted = [f"{PACKAGE}=={VERSION}", *(("numpy", "onnx") if full else ())]
    command = [
        where.python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
        *(() if full else ("--no-deps",)), "--target",
    ]  # fmt: skip
    tell(f"installing {PACKAGE} {VERSION} (9 MB) into {where.folder}")
    try:
        where.folder.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=".new-", dir=where.folder.parent))
    except OSError as error:
        raise MissingExtraError(
            f"cannot write to '{where.folder.parent}': {error.strerror}",
            hint="set XDG_CACHE_HOME to a folder of yours",
        ) from error
    try:
        done = subprocess.run(
            [*command, str(folder), *wanted], capture_output=True, text=True, check=False
        )
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            reason = (said or done.stderr.splitlines() or ["pip failed"])[-1]
            spelled = " ".join([*command, f"'{where.folder}'", *wanted])
            raise MissingExtraError(
                f"{PACKAGE} could not be installed: {reason.removeprefix('ERROR: ')}",
                hint=f"where there is a network, run: {spelled}",
            )
        if where.folder.exists():
            shutil.rmtree(where.folder)
        folder.replace(where.folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _asked(python: str) -> tuple[tuple[int, int], list[str]]:
    """Version of an interpreter, and which of numpy and onnx it lacks."""
    hint = "give --train-python PATH of Python 3.11 or 3.12"
    try:
        done = subprocess.run(
            [python, "-c", _ASK], capture_output=True, text=True, check=True, timeout=60
        )
        version, missing = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise MissingExtraError(f"'{python}' is no Python that runs", hint=hint) from error
    return (version[0], version[1]), missing


def _cache() -> Path:
    """Our folder in the user's cache."""
    given = os.environ.get("XDG_CACHE_HOME")
    if given:
        return Path(given) / "onnxprune"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home())) / "onnxprune" / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "onnxprune"
    return Path.home() / ".cache" / "onnxprune"
