"""The verb ``sweep``."""

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
    Scope,
    Seed,
    Shapes,
    Verbose,
    numbers,
    shapes,
    whole,
)
from onnxprune.terminal import print_json, printing, session, show


def sweep(
    model: ModelPath,
    *,
    ratios: Annotated[
        str, typer.Option("--ratios", metavar="R,R,...", help="Ratios to cut the model at.")
    ] = "0,0.25,0.5,0.75",
    data: DataPath = None,
    labels: Labels = None,
    metric: Metric = None,
    scope: Annotated[
        Scope, typer.Option("--scope", help="The ratio of each group, or of the whole model.")
    ] = Scope.local,
    importance: Importance = "auto",
    round_to: Annotated[
        int,
        typer.Option(
            "--round-to", parser=whole(1), metavar="N", help="Leave multiples of N channels."
        ),
    ] = 1,
    attention: AttentionMode = Attention.heads,
    input_shape: Shapes = None,
    seed: Seed = 0,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="Write what --json prints."),
    ] = None,
    plot: Plot = None,
    dry_run: Outlook = False,
    json: Json = False,
    force: Force = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Cut the whole model at several ratios: cost, latency, and drift or accuracy of each."""
    with session(quiet=quiet, verbose=verbose, debug=debug) as progress:
        from onnxprune import studies

        found = studies.sweep(
            model,
            ratios=numbers(ratios),
            data=data,
            labels=labels,
            metric=metric,
            scope=scope.value,
            importance=importance,
            round_to=round_to,
            attention=attention.value,
            input_shapes=shapes(input_shape),
            seed=seed,
            output=output,
            plot=plot,
            force=force,
            dry_run=dry_run,
            progress=progress,
        )
    with printing():
        if json:
            print_json(found.as_json())
        elif not quiet:
            from onnxprune.report.studies import sweep_report

            show(sweep_report(found))
