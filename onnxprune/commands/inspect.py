"""The verb ``inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from onnxprune.commands.options import (
    AllowNorm,
    Attention,
    AttentionMode,
    Debug,
    Force,
    Json,
    ModelPath,
    Quiet,
    Shapes,
    Verbose,
    shapes,
)
from onnxprune.errors import UsageError
from onnxprune.terminal import print_json, printing, session, show

if TYPE_CHECKING:
    from onnxprune.groups import DependencyGraph
    from onnxprune.types import ChannelGroup


def inspect(
    model: ModelPath,
    *,
    group: Annotated[
        str | None,
        typer.Option(
            "--group", metavar="NAME", help="Show the groups of a tensor or node, or by number."
        ),
    ] = None,
    ops: Annotated[
        bool, typer.Option("--ops", help="Show the model's operators and how each is treated.")
    ] = False,
    sparsity: Annotated[
        bool,
        typer.Option("--sparsity", help="Show what sparsity the weight of every layer has."),
    ] = False,
    csv: Annotated[
        Path | None,
        typer.Option(
            "--csv",
            metavar="FILE",
            help="Write the groups as a table; with --sparsity the weights.",
        ),
    ] = None,
    attention: AttentionMode = Attention.heads,
    allow_norm: AllowNorm = False,
    input_shape: Shapes = None,
    json: Json = False,
    force: Force = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Show which channels can be pruned, which cannot and why, and what the model costs."""
    with session(quiet=quiet, verbose=verbose, debug=debug) as progress:
        from onnxprune import pipeline
        from onnxprune.checks import check_outputs, check_sources
        from onnxprune.report.ops import operators_of

        check_outputs(model, csv, force=force)
        graph, report = pipeline.inspect(
            model,
            input_shapes=shapes(input_shape),
            attention=attention.value,
            allow_norm=allow_norm,
            sparsity=sparsity,
            progress=progress,
        )
        chosen = None if group is None else _named(graph, group)
        operators = operators_of(graph, report.before) if ops else None
        if csv is not None:
            from onnxprune.files import write_texts
            from onnxprune.report.channels import groups_csv
            from onnxprune.report.sparse import held_csv

            check_sources(graph.graph.model, csv)
            text = groups_csv(report.groups) if report.held is None else held_csv(report.held)
            write_texts({csv: text})
    with printing(*([] if csv is None else [csv])):
        if json:
            from onnxprune.report.build import as_json, only_groups

            shown = report if chosen is None else only_groups(report, chosen)
            print_json(as_json(shown, operators))
        elif not quiet:
            from onnxprune.report.channels import group_details
            from onnxprune.report.tables import inspect_report

            details = None if chosen is None else group_details(graph, chosen)
            show(details or inspect_report(report, operators, verbose=verbose))


def _named(graph: DependencyGraph, wanted: str) -> tuple[ChannelGroup, ...]:
    found = graph.named(wanted)
    if not found:
        raise UsageError(
            f"--group {wanted} names no channel group, and none that can be pruned passes there",
            hint="`onnxprune inspect MODEL -v` lists the names",
        )
    return found
