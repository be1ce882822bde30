"""The verb ``shrink``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from onnxprune.commands.finetune import TrainerName
from onnxprune.commands.options import (
    Aggregate,
    AllowNorm,
    Attention,
    CheckFor,
    DataPath,
    Debug,
    DryRun,
    FoldBn,
    Force,
    Importance,
    Json,
    Level,
    MaxDrift,
    MinCosine,
    MinTop1,
    ModelPath,
    Precision,
    Quiet,
    RecipeOut,
    Restoring,
    Schedule,
    Scope,
    Seed,
    Shapes,
    Simplify,
    Threads,
    Timed,
    Verbose,
    Verify,
    multiple,
    number,
    ratios,
    refuse_beside,
    shapes,
    shares,
    whole,
)
from onnxprune.commands.training import (
    L1,
    Backend,
    BatchSize,
    Epochs,
    FineTune,
    Rate,
    Resume,
    Soft,
    TrainData,
    TrainLabels,
    TrainPython,
    Validation,
    check_round_options,
    run_rounds,
)
from onnxprune.errors import UsageError
from onnxprune.terminal import print_json, printing, session, show


def shrink(
    model: ModelPath,
    *,
    ratio: Annotated[
        float | None,
        typer.Option(
            "--ratio", parser=number, metavar="R", help="Share of channels to remove, 0 <= R < 1."
        ),
    ] = None,
    lossless: Annotated[
        bool,
        typer.Option("--lossless", help="Remove the channels that provably have no effect."),
    ] = False,
    target: Annotated[
        list[str] | None,
        typer.Option(
            "--target",
            metavar="COST=SHARE",
            help="Leave this share of macs, params, bytes or latency, e.g. macs=0.5; repeatable.",
        ),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option("--recipe", metavar="FILE", help="Repeat a recipe: .json, or a pruned model."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="Default: MODEL.pruned.onnx."),
    ] = None,
    scope: Annotated[
        Scope | None,
        typer.Option(
            "--scope",
            help="Where the ratio is taken: of each group (local, the default for --ratio), of the "
            "whole model (global), or of groups of a kind (isomorphic, the default for --target).",
            show_default=False,
        ),
    ] = None,
    importance: Importance = "auto",
    aggregate: Annotated[
        Aggregate | None,
        typer.Option("--aggregate", help="How weights that make one channel combine."),
    ] = None,
    round_to: Annotated[
        Any,
        typer.Option(
            "--round-to",
            parser=multiple,
            metavar="N|auto",
            help="Leave multiples of N channels, or of what suits the hardware; a --target takes "
            "16 where it can, else less.",
            show_default=False,
        ),
    ] = None,
    min_channels: Annotated[
        int,
        typer.Option(
            "--min-channels", parser=whole(1), metavar="N", help="Leave N in every group."
        ),
    ] = 1,
    max_ratio: Annotated[
        float,
        typer.Option(
            "--max-ratio", parser=number, metavar="R", help="Most of one group that global takes."
        ),
    ] = 0.9,
    ignore: Annotated[
        list[str] | None,
        typer.Option(
            "--ignore", metavar="GLOB", help="Keep groups made by these nodes or tensors whole."
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="GLOB", help="Keep all other groups whole."),
    ] = None,
    ratio_for: Annotated[
        list[str] | None,
        typer.Option("--ratio-for", metavar="GLOB=R", help="Another ratio for some groups."),
    ] = None,
    sensitivity: Annotated[
        Path | None,
        typer.Option(
            "--sensitivity",
            metavar="FILE",
            help="Take of each group what --max-loss allows, at most --ratio if given.",
        ),
    ] = None,
    max_loss: Annotated[
        float | None,
        typer.Option("--max-loss", metavar="X", help="Most a group may lose, by --sensitivity."),
    ] = None,
    attention: Annotated[
        Attention,
        typer.Option(
            "--attention",
            help="Cut whole attention heads, dimensions of every head, or none; auto takes heads, "
            "or after a refit what moves the outputs less.",
        ),
    ] = Attention.auto,
    allow_norm: AllowNorm = False,
    restore: Annotated[
        Restoring,
        typer.Option(
            "--restore",
            help="Give accuracy back without training: refit every layer to --data, or without "
            "data to made-up pictures, or fold the mean of what was dropped into biases; auto is "
            "refit with --data and bias without.",
        ),
    ] = Restoring.auto,
    steps: Annotated[
        int,
        typer.Option(
            "--steps",
            parser=whole(1),
            metavar="K",
            help="Cut in K steps; what is left is ranked and restored again after each.",
        ),
    ] = 1,
    schedule: Annotated[
        Schedule,
        typer.Option("--schedule", help="Much goes in the first steps, or as much in each."),
    ] = Schedule.polynomial,
    then: Annotated[
        str | None,
        typer.Option(
            "--then",
            metavar="PATTERN",
            help="Impose a sparsity pattern on what is left, such as 2:4; widths are rounded for "
            "N:M, for blocks of more than 8 give --round-to.",
        ),
    ] = None,
    sparsity: Annotated[
        float | None,
        typer.Option(
            "--sparsity",
            parser=number,
            metavar="S",
            help="Share of weights that --then takes; N:M implies its own, others take half.",
            show_default=False,
        ),
    ] = None,
    fold_bn: FoldBn = False,
    simplify: Simplify = False,
    latency: Timed = None,
    threads: Threads = 1,
    finetune: FineTune = False,
    train_data: TrainData = None,
    labels: TrainLabels = None,
    epochs: Epochs = 3,
    lr: Rate = None,
    batch_size: BatchSize = 64,
    l1_bn: L1 = 0.0,
    val: Validation = "0.1",
    trainer: Backend = TrainerName.ort,
    soft: Soft = False,
    train_python: TrainPython = None,
    resume: Resume = False,
    quantize: Annotated[
        Precision | None,
        typer.Option(
            "--quantize", help="Then write it in 16-bit floats, or in 8-bit integers as Q/DQ pairs."
        ),
    ] = None,
    verify: Verify = Level.full,
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
    """Remove the least important channels, prove the result right, and write a smaller model."""
    by_ratio = ratio is not None or sensitivity is not None
    if [by_ratio, bool(target), lossless, recipe is not None].count(True) != 1:
        raise UsageError(
            "give one of --ratio, --target, --lossless and --recipe", hint="--ratio 0.5"
        )
    if lossless:
        refuse_beside(
            "--lossless, which takes all that has no effect",
            scope=scope,
            importance=importance != "auto",
            aggregate=aggregate,
            round_to=round_to is not None,
            min_channels=min_channels != 1,
            max_ratio=max_ratio != 0.9,
            ratio_for=ratio_for,
            allow_norm=allow_norm,
            steps=steps != 1,
            schedule=schedule is not Schedule.polynomial,
            restore=restore is not Restoring.auto,
        )
    if steps == 1 and schedule is not Schedule.polynomial:
        raise UsageError("--schedule says how --steps share the work", hint="--steps 3")
    if recipe is not None:
        refuse_beside(
            "--recipe, which fixes it",
            scope=scope,
            importance=importance != "auto",
            aggregate=aggregate,
            round_to=round_to is not None,
            min_channels=min_channels != 1,
            max_ratio=max_ratio != 0.9,
            ignore=ignore,
            only=only,
            ratio_for=ratio_for,
            max_loss=max_loss,
            attention=attention is not Attention.auto,
            steps=steps != 1,
            schedule=schedule is not Schedule.polynomial,
            then=then,
            sparsity=sparsity is not None,
            allow_norm=allow_norm,
            fold_bn=fold_bn,
            simplify=simplify,
            input_shape=input_shape,
        )
    check_round_options(
        finetune=finetune, train_data=train_data, dry_run=dry_run, labels=labels, lr=lr,
        l1_bn=l1_bn, soft=soft, train_python=train_python, resume=resume, lossless=lossless,
        recipe=recipe, then=then, recipe_out=recipe_out, sensitivity=sensitivity,
        max_drift=max_drift, min_cosine=min_cosine, min_top1=min_top1, fold_bn=fold_bn,
        simplify=simplify, check=check, latency=latency, quantize=quantize,
    )  # fmt: skip
    written = output or model.parent / f"{model.stem}.pruned.onnx"
    cut: dict[str, Any] = {
        "scope": None if scope is None else scope.value,
        "importance": importance,
        "aggregate": None if aggregate is None else aggregate.value,
        "round_to": round_to,
        "min_channels": min_channels,
        "max_ratio": max_ratio,
        "ignore": ignore or (),
        "only": only or (),
        "ratio_for": ratios(ratio_for),
        "attention": attention.value,
        "allow_norm": allow_norm,
        "restore": restore.value,
        "input_shapes": shapes(input_shape),
        "data": data,
        "seed": seed,
        "verify": verify.value,
    }
    goal: dict[str, Any] = {
        "ratio": ratio,
        "targets": shares(target),
        "steps": steps,
        "schedule": schedule.value,
        "max_loss": max_loss,
        "force": force,
    }
    with session(quiet=quiet, verbose=verbose, debug=debug) as progress:
        if finetune:
            report = run_rounds(
                model, written, train_data=train_data, labels=labels, epochs=epochs, lr=lr,
                batch_size=batch_size, val=val, trainer=trainer, train_python=train_python,
                cut=cut, progress=progress, l1_bn=l1_bn, soft=soft, resume=resume, **goal,
            )  # fmt: skip
        else:
            from onnxprune import pipeline

            _, report = pipeline.shrink(
                model,
                **cut,
                **goal,
                lossless=lossless,
                recipe=recipe,
                sensitivity=sensitivity,
                then=then,
                sparsity=sparsity,
                quantize=None if quantize is None else quantize.value,
                fold_bn=fold_bn,
                simplify=simplify,
                latency=latency,
                threads=threads or None,
                max_drift=max_drift,
                min_cosine=min_cosine,
                min_top1=min_top1,
                check_for=None if check is None else check.value,
                output=None if dry_run else written,
                recipe_out=None if dry_run else recipe_out,
                progress=progress,
            )
    with printing(*report.written):
        if json:
            from onnxprune.report.build import as_json

            print_json(as_json(report))
        elif finetune and not quiet:
            from onnxprune.report.tuned import rounds_report

            show(rounds_report(report))
        elif not quiet:
            from onnxprune.report.tables import shrink_report

            show(shrink_report(report, verbose=verbose))
