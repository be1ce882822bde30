"""Options of ``shrink --finetune``, and what they run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from onnxprune.commands.finetune import TrainerName, share_or_file
from onnxprune.commands.options import number, refuse_beside, whole
from onnxprune.errors import UsageError

if TYPE_CHECKING:
    from onnxprune.report.clock import Progress
    from onnxprune.types import Report

FineTune: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--finetune", help="Train after each of --steps: prune, train, prune … (see finetune)."
    ),
]
TrainData: TypeAlias = Annotated[
    Path | None,
    typer.Option("--train-data", metavar="FILE.npz", help="With --finetune: inputs to train on."),
]
TrainLabels: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--labels", metavar="Y.npy", help="With --finetune: classes; else MODEL is imitated."
    ),
]
Epochs: TypeAlias = Annotated[
    int, typer.Option("--epochs", parser=whole(1), metavar="N", help="Of each round.")
]
Rate: TypeAlias = Annotated[
    float | None,
    typer.Option("--lr", parser=number, metavar="X", help="With --finetune: learning rate."),
]
BatchSize: TypeAlias = Annotated[
    int, typer.Option("--batch-size", parser=whole(1), metavar="N", help="Samples of a step.")
]
L1: TypeAlias = Annotated[
    float,
    typer.Option(
        "--l1-bn",
        parser=number,
        metavar="X",
        help="With --finetune: before the first cut train with an L1 penalty on scales.",
    ),
]
Validation: TypeAlias = Annotated[
    str, typer.Option("--val", metavar="SHARE|FILE.npz", help="With --finetune: held out.")
]
Backend: TypeAlias = Annotated[
    TrainerName, typer.Option("--trainer", help="With --finetune: what computes gradients.")
]
Soft: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--soft",
        help="With --finetune: cut in the last step only; before it set to zero what would go, and "
        "let training bring it back.",
    ),
]
TrainPython: TypeAlias = Annotated[
    str | None,
    typer.Option("--train-python", metavar="PATH", help="As for finetune."),
]
Resume: TypeAlias = Annotated[
    bool, typer.Option("--resume", help="With --finetune: go on behind the rounds that are done.")
]


_TRAINING = ("labels", "lr", "l1_bn", "soft", "train_python", "resume")
_COMPARE = "then onnxprune compare MODEL RESULT --data FILE.npz"
# What to do with the result instead, by option.
_AFTERWARDS = {
    "then": "then onnxprune sparsify RESULT --pattern P, and finetune of that keeps the zeros",
    "quantize": "then onnxprune quantize RESULT --to TYPE",
    "fold_bn": "then onnxprune shrink RESULT --lossless --fold-bn",
    "simplify": "then onnxprune shrink RESULT --lossless --simplify",
    "check": "then onnxprune check RESULT",
    "latency": f"{_COMPARE} --latency",
    "recipe_out": "the models of the rounds carry their recipes",
    "max_drift": _COMPARE,
    "min_cosine": _COMPARE,
    "min_top1": f"--max-loss stops in time; {_COMPARE}",
}


def check_round_options(
    *, finetune: bool, train_data: Path | None, dry_run: bool, **others: object
) -> None:
    """Refuse options of the loop without it, and options that do not go with it.

    Raises:
        UsageError: The first of them.
    """
    if not finetune:
        lone = {"train_data": train_data, **others}
        for name in ("train_data", *_TRAINING):
            if lone[name]:
                raise UsageError(f"--{name.replace('_', '-')} goes with --finetune")
        return
    if train_data is None:
        raise UsageError("--finetune needs inputs to train on", hint="--train-data FILE.npz")
    if dry_run:
        raise UsageError("--dry-run cannot go with --finetune, which keeps every round")
    beside = {name: value for name, value in others.items() if name not in _TRAINING}
    refuse_beside("--finetune", _AFTERWARDS, **beside)


def run_rounds(
    model: Path,
    output: Path,
    *,
    train_data: Path | None,
    labels: Path | None,
    epochs: int,
    lr: float | None,
    batch_size: int,
    val: str,
    trainer: TrainerName,
    train_python: str | None,
    cut: Mapping[str, Any],
    progress: Progress | None,
    **options: Any,
) -> Report:
    """Cut and train in rounds; the report."""
    from onnxprune.rounds import shrink_in_rounds

    training = {
        "data": train_data,
        "labels": labels,
        "epochs": epochs,
        "rate": lr,
        "batch_size": batch_size,
        "validation": share_or_file(val),
        "trainer": trainer.value,
        "train_python": train_python,
        "seed": cut["seed"],
        "input_shapes": cut["input_shapes"],
    }
    _, report = shrink_in_rounds(
        model, output, cut=cut, training=training, progress=progress, **options
    )
    return report
