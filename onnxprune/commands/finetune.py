"""The verb ``finetune``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from onnxprune.commands.options import (
    Debug,
    DryRun,
    Force,
    Json,
    Level,
    MaxDrift,
    MinCosine,
    MinTop1,
    Quiet,
    Seed,
    Shapes,
    Verbose,
    number,
    shapes,
    whole,
)
from onnxprune.errors import UsageError
from onnxprune.terminal import print_json, printing, session, show


class Optimizer(StrEnum):
    """What changes weights by their gradients."""

    adamw = "adamw"
    sgd = "sgd"


class TrainerName(StrEnum):
    """What computes gradients."""

    ort = "ort"
    torch = "torch"


class Zeros(StrEnum):
    """Which zeros stay."""

    auto = "auto"
    all = "all"
    none = "none"


def share_or_file(text: str) -> float | Path:
    """What ``--val`` says: a share, or a file."""
    try:
        return float(text)
    except ValueError:
        return Path(text)


def finetune(
    model: Annotated[
        Path | None, typer.Argument(metavar="MODEL", help="The .onnx file.", show_default=False)
    ] = None,
    *,
    data: Annotated[
        Path | None, typer.Option("--data", metavar="FILE.npz", help="Inputs to train on.")
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(
            "--labels", metavar="Y.npy", help="Class of each sample (or FILE.npz with labels)."
        ),
    ] = None,
    teacher: Annotated[
        Path | None,
        typer.Option(
            "--teacher",
            metavar="FILE.onnx",
            help="Model to imitate, which needs no labels: the one MODEL was pruned from, which is "
            "found by itself where it lies beside it.",
        ),
    ] = None,
    loss: Annotated[
        str | None,
        typer.Option(
            "--loss",
            metavar="ce|kd|mse",
            help="Learn labels (ce), imitate classes (kd) or numbers (mse); or several: ce,kd. "
            "Default: ce with labels, kd with a teacher; mse for outputs that are no classes.",
            show_default=False,
        ),
    ] = None,
    epochs: Annotated[
        int, typer.Option("--epochs", parser=whole(0), metavar="N", help="Times through the data.")
    ] = 3,
    lr: Annotated[
        float | None,
        typer.Option(
            "--lr",
            parser=number,
            metavar="X",
            help="Largest learning rate, after a warm-up and before a cosine to zero; default "
            "0.001 for adamw, 0.02 for sgd.",
        ),
    ] = None,
    batch_size: Annotated[
        int,
        typer.Option("--batch-size", parser=whole(1), metavar="N", help="Samples of a step."),
    ] = 64,
    optimizer: Annotated[
        Optimizer, typer.Option("--optimizer", help="AdamW, or SGD with momentum 0.9.")
    ] = Optimizer.adamw,
    temperature: Annotated[
        float,
        typer.Option("--temperature", parser=number, metavar="T", help="Of kd, softens classes."),
    ] = 2.0,
    l1_bn: Annotated[
        float,
        typer.Option(
            "--l1-bn",
            parser=number,
            metavar="X",
            help="L1 penalty on scales of BatchNormalization, before pruning by them.",
        ),
    ] = 0.0,
    l1_weights: Annotated[
        float,
        typer.Option(
            "--l1-weights", parser=number, metavar="X", help="L1 penalty on all weights of layers."
        ),
    ] = 0.0,
    weight_decay: Annotated[
        float,
        typer.Option(
            "--weight-decay", parser=number, metavar="X", help="Of weights, not biases and norms."
        ),
    ] = 1e-4,
    freeze_bn: Annotated[
        bool,
        typer.Option("--freeze-bn", help="Leave the statistics of BatchNormalization as they are."),
    ] = False,
    keep_zeros: Annotated[
        Zeros,
        typer.Option(
            "--keep-zeros",
            help="Weights that a pattern made sparse keep their zeros (auto); or all do, or none.",
        ),
    ] = Zeros.auto,
    val: Annotated[
        str,
        typer.Option(
            "--val",
            metavar="SHARE|FILE.npz",
            help="Held out to judge by; the best epoch is kept.",
        ),
    ] = "0.1",
    trainer: Annotated[
        TrainerName,
        typer.Option("--trainer", help="onnxruntime-training in a folder of its own, or PyTorch."),
    ] = TrainerName.ort,
    train_python: Annotated[
        str | None,
        typer.Option(
            "--train-python", metavar="PATH", help="Python 3.11 or 3.12 that runs --trainer ort."
        ),
    ] = None,
    setup: Annotated[
        bool, typer.Option("--setup", help="Install what --trainer ort needs (9 MB), and stop.")
    ] = False,
    threads: Annotated[
        int,
        typer.Option("--threads", parser=whole(0), metavar="N", help="0 takes all cores."),
    ] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the checkpoint beside the output.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="Default: MODEL.tuned.onnx."),
    ] = None,
    verify: Annotated[
        Level,
        typer.Option(
            "--verify",
            help="Check the zeros in the file, and that it loads and runs (twin); measure the "
            "drift too (full).",
        ),
    ] = Level.full,
    max_drift: MaxDrift = None,
    min_cosine: MinCosine = None,
    min_top1: MinTop1 = None,
    input_shape: Shapes = None,
    seed: Seed = 0,
    dry_run: DryRun = False,
    json: Json = False,
    force: Force = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Train the weights of a model on: with labels, or without by imitating the original."""
    if setup:
        _set_up(train_python, quiet=quiet, debug=debug)
        return
    if model is None:
        raise UsageError("which model?", hint="onnxprune finetune MODEL.onnx --data FILE.npz")
    if data is None:
        raise UsageError("training needs inputs", hint="--data FILE.npz")
    with session(quiet=quiet, verbose=verbose, debug=debug) as progress:
        from onnxprune import tuning

        _, report = tuning.finetune(
            model,
            data=data,
            labels=labels,
            teacher=teacher,
            loss=loss or (),
            epochs=epochs,
            rate=lr,
            batch_size=batch_size,
            optimizer=optimizer.value,
            temperature=temperature,
            l1_bn=l1_bn,
            l1_weights=l1_weights,
            weight_decay=weight_decay,
            freeze_bn=freeze_bn,
            keep_zeros=keep_zeros.value,
            validation=share_or_file(val),
            trainer=trainer.value,
            train_python=train_python,
            threads=threads,
            resume=resume,
            input_shapes=shapes(input_shape),
            seed=seed,
            verify=verify.value,
            max_drift=max_drift,
            min_cosine=min_cosine,
            min_top1=min_top1,
            output=None if dry_run else output or model.parent / f"{model.stem}.tuned.onnx",
            force=force,
            progress=progress,
        )
    with printing(*report.written):
        if json:
            from onnxprune.report.build import as_json

            print_json(as_json(report))
        elif not quiet:
            from onnxprune.report.tuned import finetune_report

            show(finetune_report(report))


def _set_up(python: str | None, *, quiet: bool, debug: bool) -> None:
    """Install onnxruntime-training into the user's cache."""
    import logging

    from onnxprune.train.place import PACKAGE, VERSION, place, set_up

    with session(quiet=quiet, verbose=False, debug=debug):
        where = place(python)
        if not where.ready:
            set_up(where, logging.getLogger("onnxprune.train").warning)
    with printing():
        if not quiet:
            typer.echo(f"{PACKAGE} {VERSION} is in {where.folder}")
