"""The command line: parses, calls the pipeline, prints. What it does stands in `pipeline`."""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from onnxprune import __version__
from onnxprune.commands.check import check
from onnxprune.commands.compare import compare
from onnxprune.commands.finetune import finetune
from onnxprune.commands.inspect import inspect
from onnxprune.commands.options import Command
from onnxprune.commands.schema import schema
from onnxprune.commands.sensitivity import sensitivity
from onnxprune.commands.shrink import shrink
from onnxprune.commands.sparsify import sparsify
from onnxprune.commands.sweep import sweep
from onnxprune.errors import OnnxPruneError
from onnxprune.terminal import discard_output, printing

_INTERRUPTED = 130
_OUR_BUG = 1
_USAGE = 2
_ORDERS_TO_END = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)
)
# typer brings its own click or takes the one that is installed: ask it for the class.
_ClickError: type[Any] = next(
    kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException"
)

app = typer.Typer(
    help="Make ONNX models smaller by structured pruning, proved exact, without training code.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        with printing():
            typer.echo(f"onnxprune {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Print the version and stop."
        ),
    ] = False,
) -> None:
    pass


# Each verb with what `--help` says of it, in the order in which it lists them.
_VERBS: dict[Callable[..., None], str] = {
    inspect: "Show what can be pruned and what cannot.",
    shrink: "Prune, prove, and write a smaller model.",
    sparsify: "Impose a fine-grained sparsity pattern, such as 2:4.",
    sensitivity: "Measure what each group of channels can lose.",
    sweep: "Measure the model cut at several ratios.",
    compare: "Measure how far two models are apart.",
    check: "Say what TensorRT will mind, and let it build the model.",
    finetune: "Train the weights of a model on.",
    schema: "Print a JSON Schema.",
}
for _verb, _help in _VERBS.items():
    app.command(cls=Command, short_help=_help)(_verb)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; the exit code of DESIGN §11. Errors are one line on stderr."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        result = app(arguments, prog_name="onnxprune", standalone_mode=False)
    except BrokenPipeError:
        # Whoever read the output has gone: that is no error of ours.
        discard_output()
        return 0
    except (Exception, KeyboardInterrupt) as error:
        if "--debug" in arguments:
            traceback.print_exc()
        return _complain(*_said(error))
    if result == _INTERRUPTED:  # how newer typers hand an interruption on
        return _complain("interrupted", _INTERRUPTED)
    return result if isinstance(result, int) else 0


def _complain(message: str, code: int) -> int:
    print(f"onnxprune: {' '.join(message.split())}", file=sys.stderr)
    return code


def _said(error: BaseException) -> tuple[str, int]:
    """What to tell a person of an error, and the exit code."""
    match error:
        case OnnxPruneError():
            return str(error), error.exit_code
        case KeyboardInterrupt() | typer.Abort():
            return "interrupted", _INTERRUPTED
        case OSError():
            where = f"'{error.filename}': " if error.filename else ""
            if not where and error.errno == errno.ENOSPC:
                where = (
                    "standard output: "  # files that fill a disk are named where they are written
                )
            return f"{where}{error.strerror or error}", _USAGE
        case MemoryError():
            return "not enough memory for this model", _OUR_BUG
    if isinstance(error, _ClickError):
        return error.format_message().replace("Value error, ", ""), _USAGE
    what = f"{type(error).__name__}: {error}"
    return f"internal error: {what} (please report it; --debug shows more)", _OUR_BUG


def _interrupt(*_: object) -> NoReturn:
    """Take an order to end as an interruption, once: what cleans up is not to be ended itself."""
    for number in _ORDERS_TO_END:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def main() -> NoReturn:
    """Entry point of the ``onnxprune`` command."""
    for number in _ORDERS_TO_END:
        if signal.getsignal(number) == signal.SIG_DFL:  # nohup has SIGHUP ignored
            signal.signal(number, _interrupt)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # started with it closed, as daemons do
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115  (as long as we run)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character still prints
    code = run()
    try:
        sys.stdout.flush()
    except OSError:
        discard_output()
    sys.exit(code)
