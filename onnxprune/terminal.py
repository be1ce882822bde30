"""What the command line prints: results on stdout, everything else on stderr."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from onnxprune.errors import InterruptionError, UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType


@contextmanager
def printing(*files: Path) -> Iterator[None]:
    """Write on stdout; where it fails, nothing of the run stays.

    Args:
        files: What the run has written already; an error leaves no file.

    Raises:
        UsageError: Stdout cannot be written. A reader that has gone is a ``BrokenPipeError``.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except (OSError, KeyboardInterrupt) as error:
        for path in files:
            path.unlink(missing_ok=True)
        if isinstance(error, KeyboardInterrupt):
            raise
        discard_output()
        hint = "no file was kept" if files else ""
        raise UsageError(f"standard output: {error.strerror or error}", hint=hint) from error


def discard_output() -> None:
    """Let what stdout still holds go nowhere, so that Python does not try once more at exit."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def show(parts: Iterable[RenderableType]) -> None:
    """Print tables and lines on stdout; where that is no terminal, plain and unwrapped."""
    from onnxprune.report.layout import console

    terminal = sys.stdout.isatty()
    out = console(terminal=terminal)
    for part in parts:
        if terminal:
            out.print(part)
            continue
        with out.capture() as captured:
            out.print(part)
        sys.stdout.writelines(f"{line.rstrip()}\n" for line in captured.get().splitlines())


def print_json(report: Mapping[str, object]) -> None:
    """Print one JSON object on stdout."""
    import json

    sys.stdout.write(json.dumps(report, indent=2, allow_nan=False) + "\n")


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
        with warnings.catch_warnings():
            if not debug:  # numpy's, of NaN and infinities: what they come to, we say ourselves
                warnings.simplefilter("ignore", RuntimeWarning)
            if quiet or debug or not sys.stderr.isatty():
                yield None
            else:
                from rich.console import Console

                with Console(stderr=True).status("starting") as status:
                    yield lambda stage: status.update(f"{stage} …")
    except KeyboardInterrupt as order:
        if not order.args:
            raise
        raise InterruptionError(str(order)) from order  # the parser would drop what it says
    finally:
        log.removeHandler(handler)
        log.setLevel(before)
