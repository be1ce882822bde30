"""The verb ``sensitivity``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from onnxprune.commands.options import (
    Attention,
    AttentionMode,
    DataPath,
    Debug,
    Force,
    Importance,
    Json,
    Labels,
    Metric,
    ModelPath,
    Outlook,
    Plot,
    Quiet,
    RestoringAlone,
    Seed,
    Shapes,
    Verbose,
    numbers,
    shapes,
    whole,
)
from onnxprune.terminal import print_json, printing, session, show


def sensitivity(
    model: ModelPath,
    *,
    ratios: Annotated[
        str,
        typer.Option("--ratios", metavar="R,R,...", help="Shares to remove from each group."),
    ] = "0.1,0.3,0.5,0.7,0.9",
    data: DataPath = None,
    labels: Labels = None,
    metric: Metric = None,
    importance: Importance = "auto",
    attention: AttentionMode = Attention.heads,
    restore: Annotated[
        RestoringAlone,
        typer.Option(
            "--restore",
            help="Measure cuts as they are, with the mean of what goes in biases, or with the "
            "layers that read the group refitted to --data.",
        ),
    ] = RestoringAlone.none,
    input_shape: Shapes = None,
    seed: Seed = 0,
    jobs: Annotated[
        int,
        typer.Option("--jobs", parser=whole(1), metavar="N", help="Processes on this machine."),
    ] = 1,
    scheduler: Annotated[
        str | None,
        typer.Option("--scheduler", metavar="ADDRESS", help="Use the workers of a Dask cluster."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="Default: MODEL.sensitivity.json."),
    ] = None,
    plot: Plot = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from what the output file holds.")
    ] = False,
    dry_run: Outlook = False,
    json: Json = False,
    force: Force = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Cut every channel group alone at several ratios, and measure what that costs."""
    written = output or model.parent / f"{model.stem}.sensitivity.json"
    with session(quiet=quiet, verbose=verbose, debug=debug) as progress:
        from onnxprune import studies

        found = studies.sensitivity(
            model,
            ratios=numbers(ratios),
            data=data,
            labels=labels,
            metric=metric,
            importance=importance,
            attention=attention.value,
            restore=restore.value,
            input_shapes=shapes(input_shape),
            seed=seed,
            jobs=jobs,
            scheduler=scheduler,
            output=written,
            plot=plot,
            resume=resume,
            force=force,
            dry_run=dry_run,
            progress=progress,
        )
    with printing(*([] if dry_run else [written])):
        if json:
            print_json(found.as_json())
        elif not quiet:
            from onnxprune.report.studies import sensitivity_report

            show(sensitivity_report(found, str(written)))
