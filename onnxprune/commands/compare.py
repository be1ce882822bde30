"""The verb ``compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from onnxprune.commands.options import (
    DataPath,
    Debug,
    Json,
    Quiet,
    Seed,
    Shapes,
    Threads,
    Verbose,
    shapes,
)
from onnxprune.terminal import print_json, printing, session, show


def compare(
    first: Annotated[
        Path, typer.Argument(metavar="A", help="The reference, an .onnx file.", show_default=False)
    ],
    second: Annotated[
        Path, typer.Argument(metavar="B", help="The .onnx file to compare.", show_default=False)
    ],
    *,
    latency: Annotated[
        bool, typer.Option("--latency", help="Time both models in ONNX Runtime, in turn.")
    ] = False,
    threads: Threads = 1,
    data: DataPath = None,
    input_shape: Shapes = None,
    seed: Seed = 0,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Show how far the outputs of B lie from those of A, and what each costs."""
    with session(quiet=quiet, verbose=verbose, debug=debug) as progress:
        from onnxprune import pipeline

        report = pipeline.compare(
            first,
            second,
            input_shapes=shapes(input_shape),
            data=data,
            seed=seed,
            latency=latency,
            threads=threads or None,
            progress=progress,
        )
    with printing():
        if json:
            from onnxprune.report.build import as_json

            print_json(as_json(report))
        elif not quiet:
            from onnxprune.report.tables import compare_report

            show(compare_report(report, verbose=verbose))
