"""The verb ``check``."""

from __future__ import annotations

from typing import Annotated

import typer

from onnxprune.commands.options import (
    Debug,
    Json,
    ModelPath,
    Quiet,
    Shapes,
    Target,
    Verbose,
    number,
    shapes,
)
from onnxprune.errors import UsageError, VerificationError
from onnxprune.terminal import print_json, printing, session, show


def check(
    model: ModelPath,
    *,
    target: Annotated[
        Target, typer.Option("--target", help="What is to run the model.")
    ] = Target.tensorrt,
    build: Annotated[
        bool | None,
        typer.Option(
            "--build/--no-build",
            help="Let TensorRT-RTX parse and build it; by default where it is installed "
            "(pip install 'onnxprune[tensorrt]'). No GPU is needed.",
            show_default=False,
        ),
    ] = None,
    min_shape: Annotated[
        list[str] | None,
        typer.Option(
            "--min-shape",
            metavar="NAME:1x3x224x224",
            help="Smallest shape of a dynamic input that the engine takes; repeatable.",
            show_default=False,
        ),
    ] = None,
    opt_shape: Annotated[
        list[str] | None,
        typer.Option(
            "--opt-shape", metavar="NAME:…", help="Shape it is tuned for.", show_default=False
        ),
    ] = None,
    max_shape: Annotated[
        list[str] | None,
        typer.Option("--max-shape", metavar="NAME:…", help="Largest shape.", show_default=False),
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option(
            "--timeout",
            parser=number,
            metavar="SECONDS",
            help="Longest that TensorRT-RTX may take; 900.",
            show_default=False,
        ),
    ] = None,
    input_shape: Shapes = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Say what TensorRT will mind in a model, and let it build the model; exit 4 if it does not."""
    if timeout is not None and not timeout > 0:
        raise UsageError(f"--timeout is {timeout:g}", hint="give seconds, more than 0")
    if timeout is not None and build is False:
        raise UsageError("--timeout cannot go with --no-build")
    with session(quiet=quiet, verbose=verbose, debug=debug) as progress:
        from onnxprune import checking
        from onnxprune.targets import builder

        report = checking.check(
            model,
            target=target.value,
            build=build,
            min_shapes=shapes(min_shape, "--min-shape"),
            opt_shapes=shapes(opt_shape, "--opt-shape"),
            max_shapes=shapes(max_shape, "--max-shape"),
            input_shapes=shapes(input_shape),
            timeout=builder.TIMEOUT if timeout is None else timeout,
            progress=progress,
        )
    with printing():
        if json:
            from onnxprune.report.build import as_json

            print_json(as_json(report))
        elif not quiet:
            from onnxprune.report.checks import check_report

            show(check_report(report, verbose=verbose))
    assert report.checked is not None
    if not report.checked.passed:
        raise VerificationError(f"'{model}': {checking.complaint(report.checked)}")
