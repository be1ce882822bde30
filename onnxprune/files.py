"""Write several files at once: all of them, or none and no leftovers."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO

from onnxprune.errors import UsageError

Job = Callable[[IO[bytes]], int]  # writes one file, and gives the bytes written


def write_texts(texts: Mapping[Path, str]) -> Mapping[Path, int]:
    """Write text files in UTF-8, all of them or none; bytes of each.

    Raises:
        UsageError: One cannot be written.
    """
    return write_files({target: text_job(text) for target, text in texts.items()})


def text_job(text: str) -> Job:
    """What writes the text in UTF-8."""
    return lambda out: out.write(text.encode())


def write_files(
    jobs: Mapping[Path, Job], check: Callable[[Mapping[Path, Path]], None] | None = None
) -> Mapping[Path, int]:
    """Write beside the targets, then move all into place, in the order given.

    Whatever goes wrong, an interruption too, leaves neither temporary files nor some of the
    targets. ``check`` sees where each lies before it is moved, and may raise.
    """
    temporary = {
        target: target.with_name(f".onnxprune-{secrets.token_hex(8)}.tmp") for target in jobs
    }
    for target in jobs:
        # Moving a file over a device or a pipe would replace it for the whole machine.
        if target.exists() and not target.is_file():
            raise UsageError(f"'{target}' is not a regular file", hint="choose another output")
    written: dict[Path, int] = {}
    moving = done = False
    try:
        for target, job in jobs.items():
            with named(target), temporary[target].open("xb") as out:
                written[target] = job(out)
                out.flush()
                os.fsync(out.fileno())
        if check is not None:
            check(temporary)
        moving = True
        for target in jobs:
            with named(target):
                temporary[target].replace(target)
        done = True
    finally:
        for target in () if done else jobs:
            # Once files move, a temporary file that is gone has become its target.
            moved = moving and not temporary[target].exists()
            (target if moved else temporary[target]).unlink(missing_ok=True)
    for folder in {target.parent for target in jobs}:
        _sync_folder(folder)
    return written


@contextlib.contextmanager
def named(target: Path) -> Iterator[None]:
    """Say which file an error of the system is about."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise UsageError(
                f"disk full while writing '{target}'", hint="nothing was kept; free some space"
            ) from error
        raise UsageError(f"cannot write '{target}': {error.strerror or error}") from error


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable, on systems where a folder can be opened."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
