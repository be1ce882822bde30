"""The verb ``sparsify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from onnxprune.commands.options import (
    CheckFor,
    DataPath,
    Debug,
    DryRun,
    FoldBn,
    Force,
    Json,
    Level,
    MaxDrift,
    Method,
    MinCosine,
    MinTop1,
    ModelPath,
    Quiet,
    RecipeOut,
    Seed,
    Shapes,
    Simplify,
    SparseScope,
    Threads,
    Timed,
    Verbose,
    number,
    refuse_beside,
    shapes,
)
from onnxprune.terminal import print_json, printing, session, show


def sparsify(
    model: ModelPath,
    *,
    pattern: Annotated[
        str | None,
        typer.Option(
            "--pattern",
            metavar="PATTERN",
            help="2:4 (the default) or another N:M, 1xN or Nx1 vectors, BxB blocks, kernel, or "
            "unstructured.",
            show_default=False,
        ),
    ] = None,
    sparsity: Annotated[
        float | None,
        typer.Option(
            "--sparsity",
            parser=number,
            metavar="S",
            help="Share that goes, 0 < S < 1; N:M implies its own.",
        ),
    ] = None,
    scope: Annotated[
        SparseScope,
        typer.Option("--scope", help="Take that share of each layer, or of all together."),
    ] = SparseScope.local,
    method: Annotated[
        Method,
        typer.Option("--method", help="How the values that stay are chosen."),
    ] = Method.auto,
    recipe: Annotated[
        Path | None,
        typer.Option("--recipe", metavar="FILE", help="Repeat a recipe: .json, or a sparse model."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="Default: MODEL.sparse.onnx."),
    ] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option("--ignore", metavar="GLOB", help="Leave these layers or weights dense."),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="GLOB", help="Leave all other layers dense."),
    ] = None,
    permute: Annotated[
        bool,
        typer.Option(
            "--permute", help="First put channels into an order in which N:M keeps more of them."
        ),
    ] = False,
    only_gain: Annotated[
        bool,
        typer.Option("--only-gain", help="Leave layers dense that no GPU is expected to speed up."),
    ] = False,
    fold_bn: FoldBn = False,
    simplify: Simplify = False,
    latency: Timed = None,
    threads: Threads = 1,
    xz: Annotated[
        bool | None,
        typer.Option(
            "--xz/--no-xz",
            help="Measure the file compressed with xz; by default where that is quick.",
            show_default=False,
        ),
    ] = None,
    csv: Annotated[
        Path | None, typer.Option("--csv", metavar="FILE", help="Write the layers as a table.")
    ] = None,
    verify: Annotated[
        Level,
        typer.Option(
            "--verify",
            help="Check the pattern in the file, and that it loads and runs (twin); measure the "
            "drift too (full).",
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
    """Set weights of every layer to zero in a pattern, smallest first, and prove it holds."""
    if recipe is not None:
        refuse_beside(
            "--recipe",
            pattern=pattern is not None,
            sparsity=sparsity is not None,
            scope=scope is not SparseScope.local,
            method=method is not Method.auto,
            ignore=ignore,
            only=only,
            only_gain=only_gain,
            permute=permute,
            fold_bn=fold_bn,
            simplify=simplify,
            input_shape=input_shape,
        )
    with session(quiet=quiet, verbose=verbose, debug=debug) as progress:
        from onnxprune import sparsifying

        _, report = sparsifying.sparsify(
            model,
            pattern="2:4" if pattern is None else pattern,
            sparsity=sparsity,
            scope=scope.value,
            method=method.value,
            recipe=recipe,
            ignore=ignore or (),
            only=only or (),
            only_gain=only_gain,
            permute=permute,
            xz=xz,
            fold_bn=fold_bn,
            simplify=simplify,
            latency=latency,
            threads=threads or None,
            input_shapes=shapes(input_shape),
            data=data,
            seed=seed,
            verify=verify.value,
            max_drift=max_drift,
            min_cosine=min_cosine,
            min_top1=min_top1,
            check_for=None if check is None else check.value,
            output=None if dry_run else output or model.parent / f"{model.stem}.sparse.onnx",
            recipe_out=None if dry_run else recipe_out,
            table=None if dry_run else csv,
            force=force,
            progress=progress,
        )
    with printing(*report.written):
        if json:
            from onnxprune.report.build import as_json

            print_json(as_json(report))
        elif not quiet:
            from onnxprune.report.tables import sparsify_report

            show(sparsify_report(report, verbose=verbose))
