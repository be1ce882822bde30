"""TensorRT-RTX asked from outside: a process of its own, a time limit, an answer in any case."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from onnxprune.errors import MissingExtraError
from onnxprune.io import save
from onnxprune.model import Model
from onnxprune.targets.findings import ERROR, Build, Finding, Profile

MODULE = "tensorrt_rtx"
EXTRA = "pip install 'onnxprune[tensorrt]'"
TIMEOUT = 900.0  # seconds: a network of 350 MB takes 8 on two cores
_WORKER = (sys.executable, "-P", "-m", "onnxprune.targets.worker")
_LIBRARY = "TensorRT-RTX"


def installed() -> bool:
    """Whether TensorRT-RTX can be asked at all."""
    return find_spec(MODULE) is not None


def check_installed(wanted_by: str) -> None:
    """Refuse, before any work is done, where it is not.

    Raises:
        MissingExtraError: It is not installed.
    """
    if not installed():
        raise MissingExtraError(f"{wanted_by} needs {_LIBRARY}", hint=EXTRA)


def build_model(
    model: Model,
    profiles: Mapping[str, Profile],
    *,
    sparse: bool = False,
    timeout: float = TIMEOUT,
    worker: Sequence[str] = _WORKER,
) -> Build:
    """``build`` for a model that need not be in a file yet.

    It is asked about the very file where there is one that holds all of the model.
    """
    if model.path is not None and not model.deferred:
        return build(model.path, profiles, sparse=sparse, timeout=timeout, worker=worker)
    with tempfile.TemporaryDirectory(prefix="onnxprune-") as folder:
        path = Path(folder, "model.onnx")
        save(model, path)
        return build(path, profiles, sparse=sparse, timeout=timeout, worker=worker)


def build(
    path: Path,
    profiles: Mapping[str, Profile],
    *,
    sparse: bool = False,
    timeout: float = TIMEOUT,
    worker: Sequence[str] = _WORKER,
) -> Build:
    """Let TensorRT-RTX parse and build the model in a file.

    Args:
        path: The file; external data lies where it says.
        profiles: Shapes of dynamic inputs; what is missing gets TensorRT's smallest.
        sparse: Permit sparse kernels.
        timeout: Seconds after which it is ended.
        worker: Command that answers a request.
    """
    with tempfile.TemporaryDirectory(prefix="onnxprune-") as folder:
        result, log = Path(folder, "result.json"), Path(folder, "log.txt")
        request = {
            "model": str(Path(path).resolve()),
            "result": str(result),
            "build": True,
            "sparse": sparse,
            "profiles": {n: [p.least, p.best, p.most] for n, p in profiles.items()},
        }
        with log.open("wb") as out:
            try:
                done = subprocess.run(
                    list(worker),
                    input=json.dumps(request).encode(),
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    timeout=timeout,
                    env=os.environ | {"PYTHONPATH": _search_path()},
                    cwd=folder,
                    check=False,
                )
            except subprocess.TimeoutExpired:
                return _dead("timeout", f"the model was not built in {timeout:g} s",
                             "give it longer with --timeout")  # fmt: skip
        if done.returncode or not result.exists():
            return _dead("crashed", _last_words(done.returncode, log),
                         "`onnxprune check --no-build` asks our rules alone")  # fmt: skip
        return _answered(json.loads(result.read_text("utf-8")))


def _search_path() -> str:
    """Where this process finds packages: the other one is to find the same."""
    return os.pathsep.join(path or str(Path.cwd()) for path in sys.path)


def _answered(answer: Mapping[str, object]) -> Build:
    status, errors, seconds = str(answer["status"]), answer["errors"], answer["seconds"]
    assert isinstance(errors, list)
    assert isinstance(seconds, dict)
    rule = "parser" if status == "refused" else "builder"
    size = answer.get("engine_bytes", 0)
    return Build(
        status=status,
        version=f"{_LIBRARY} {answer['version']}",
        findings=tuple(
            Finding(ERROR, rule, one["node"], one["message"]) for one in errors
        ) or _silent(status, rule),
        seconds=seconds,
        engine_bytes=size if isinstance(size, int) else 0,
    )  # fmt: skip


def _silent(status: str, rule: str) -> tuple[Finding, ...]:
    """A refusal without a word is one all the same."""
    if status == "built":
        return ()
    return (Finding(ERROR, rule, "", f"{_LIBRARY} gave no engine, and no reason"),)


def _dead(status: str, what: str, cure: str) -> Build:
    return Build(status, "", (Finding(ERROR, "builder", "", what, cure),))


def _last_words(code: int, log: Path) -> str:
    """How a process ended that gave no answer."""
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        perhaps = ", perhaps for want of memory" if name == "SIGKILL" else ""
        return f"{_LIBRARY} crashed: {name}{perhaps}"
    lines = [line.strip() for line in log.read_text("utf-8", "replace").splitlines()]
    said = next((line for line in reversed(lines) if line), "nothing was said")
    return f"{_LIBRARY} ended with status {code}: {said[:300]}"
