"""What the command line prints: results on stdout, everything else on stderr."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from onnxprune.errors import UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType


def show(parts: Iterable[RenderableType]) -> None:
    """Print tables and lines on stdout."""
    from onnxprune.report.tables import console

    out = console(terminal=sys.stdout.isatty())
    for part in parts:
        out.print(part)


def print_json(report: Mapping[str, object]) -> None:
    """Print one JSON object on stdout."""
    import json

    sys.stdout.write(json.dumps(report, indent=2, allow_nan=False) + "\n")


def write(path: Path, text: str) -> None:
    """Write a text file.

    Raises:
        UsageError: It cannot be written.
    """
    try:
        path.write_text(text, "utf-8", newline="\n")
    except OSError as error:
        raise UsageError(f"cannot write '{path}': {error.strerror}") from error


class _Stderr(logging.Handler):
    """Log records as lines on stderr; what repeats is said once."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        message = " ".join(record.getMessage().split())
        if message not in self.said:
            self.said.add(message)
            print(f"{record.levelname.lower()}: {message}", file=sys.stderr)


@contextmanager
def session(*, quiet: bool, verbose: bool, debug: bool) -> Iterator[Callable[[str], None] | None]:
    """Logging to stderr for the time of one verb; gives the progress callback for a terminal."""
    level = logging.DEBUG if debug else logging.INFO if verbose else logging.WARNING
    handler, log = _Stderr(logging.ERROR if quiet else level), logging.getLogger("onnxprune")
    before = log.level
    log.addHandler(handler)
    log.setLevel(min(level, logging.WARNING))
    try:
        if quiet or debug or not sys.stderr.isatty():
            yield None
        else:
            from rich.console import Console

            with Console(stderr=True).status("starting") as status:
                yield lambda stage: status.update(f"{stage} …")
    finally:
        log.removeHandler(handler)
        log.setLevel(before)
