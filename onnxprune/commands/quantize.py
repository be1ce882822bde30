"""The verb ``quantize``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from onnxprune.commands.options import (
    Calibration,
    CheckFor,
    DataPath,
    Debug,
    DryRun,
    Force,
    Json,
    Level,
    MaxDrift,
    MinCosine,
    MinTop1,
    ModelPath,
    Precision,
    Quiet,
    RecipeOut,
    Seed,
    Shapes,
    Verbose,
    shapes,
)
from onnxprune.terminal import print_json, printing, session, show


def quantize(
    model: ModelPath,
    *,
    to: Annotated[
        Precision,
        typer.Option(
            "--to", help="16-bit floats, or 8-bit integers as Q/DQ pairs.", show_default=False
        ),
    ],
    method: Annotated[
        Calibration,
        typer.Option(
            "--method",
            help="How int8 finds the ranges of activations; auto takes what does best on held-out "
            "data.",
        ),
    ] = Calibration.auto,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="Default: MODEL.fp16.onnx and so on."),
    ] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option("--ignore", metavar="GLOB", help="Leave these nodes or weights as they are."),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="GLOB", help="Leave all other nodes as they are."),
    ] = None,
    convert_io: Annotated[
        bool,
        typer.Option(
            "--convert-io", help="Inputs and outputs become 16-bit too; else they keep their types."
        ),
    ] = False,
    verify: Annotated[
        Level,
        typer.Option(
            "--verify",
            help="Check that it is valid, loads and runs, and that zeros are zero (twin); measure "
            "the drift too (full).",
        ),
    ] = Level.full,
    max_drift: MaxDrift = None,
    min_cosine: MinCosine = None,
    min_top1: MinTop1 = None,
    check: CheckFor = None,
    data: DataPath = None,
    input_shape: Shapes = None,
    seed: Seed = 0,
    recipe_out: RecipeOut = None,
    dry_run: DryRun = False,
    json: Json = False,
    force: Force = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Write a model in fewer bits, in the form TensorRT takes, and measure what it loses."""
    with session(quiet=quiet, verbose=verbose, debug=debug) as progress:
        from onnxprune import quantizing

        named = model.parent / f"{model.stem}.{to.value}.onnx"
        _, report = quantizing.quantize(
            model,
            to=to.value,
            method=method.value,
            ignore=ignore or (),
            only=only or (),
            convert_io=convert_io,
            input_shapes=shapes(input_shape),
            data=data,
            seed=seed,
            verify=verify.value,
            max_drift=max_drift,
            min_cosine=min_cosine,
            min_top1=min_top1,
            check_for=None if check is None else check.value,
            output=None if dry_run else output or named,
            recipe_out=None if dry_run else recipe_out,
            force=force,
            progress=progress,
        )
    with printing(*report.written):
        if json:
            from onnxprune.report.build import as_json

            print_json(as_json(report))
        elif not quiet:
            from onnxprune.report.tables import quantize_report

            show(quantize_report(report, verbose=verbose))
