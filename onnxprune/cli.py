"""The command line: parses, calls the pipeline, prints. What it does stands in `pipeline`."""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeAlias

import typer
from typer.core import TyperCommand

from onnxprune import __version__
from onnxprune.errors import OnnxPruneError, UsageError
from onnxprune.terminal import discard_output, print_json, printing, session, show

if TYPE_CHECKING:
    from onnxprune.groups import DependencyGraph
    from onnxprune.types import ChannelGroup, Shape

_INTERRUPTED = 130
_OUR_BUG = 1
_USAGE = 2
_ORDERS_TO_END = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)
)
# typer brings its own click or takes the one that is installed: ask it for the class.
_ClickError: type[Any] = next(
    kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException"
)

app = typer.Typer(
    help="Make ONNX models smaller by structured pruning, proved exact, without training code.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Scope(StrEnum):
    """Where the ratio is taken from."""

    local = "local"
    global_ = "global"
    isomorphic = "isomorphic"


class Aggregate(StrEnum):
    """How several weights of one channel combine."""

    sum = "sum"
    mean = "mean"
    max = "max"


class Attention(StrEnum):
    """What is cut in attention."""

    heads = "heads"
    dims = "dims"
    none = "none"


class CutAttention(StrEnum):
    """What is cut in attention, or what does less harm."""

    auto = "auto"
    heads = "heads"
    dims = "dims"
    none = "none"


class Schedule(StrEnum):
    """How much goes in each step."""

    polynomial = "polynomial"
    linear = "linear"


class Restoring(StrEnum):
    """How accuracy is restored."""

    auto = "auto"
    none = "none"
    bias = "bias"
    pictures = "pictures"
    refit = "refit"


class RestoringAlone(StrEnum):
    """How accuracy is restored where every group is cut alone."""

    none = "none"
    bias = "bias"
    refit = "refit"


class Level(StrEnum):
    """How much is verified."""

    none = "none"
    twin = "twin"
    full = "full"


class SparseScope(StrEnum):
    """Where the sparsity is taken from."""

    local = "local"
    global_ = "global"


class Method(StrEnum):
    """How the values of a sparse weight are chosen."""

    auto = "auto"
    magnitude = "magnitude"
    wanda = "wanda"
    sparsegpt = "sparsegpt"


class SchemaName(StrEnum):
    """What there is a JSON Schema of."""

    report = "report"
    recipe = "recipe"
    sensitivity = "sensitivity"
    sweep = "sweep"


class _Command(TyperCommand):
    """A verb that refuses an option given twice, rather than forget the first."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse as always, once it is known that nothing is said twice."""
        _, _, order = self.make_parser(ctx).parse_args(args=list(args))
        given = Counter(
            param.opts[-1]
            for param in order
            if not (param.multiple or getattr(param, "is_flag", True))
        )
        for name, count in given.items():
            if count > 1:
                raise UsageError(f"{name} is given {count} times", hint="give it once")
        return super().parse_args(ctx, args)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"'{text}' is not a number") from None


def _whole(least: int) -> Callable[[str], int]:
    """Reads whole numbers of ``least`` or more."""

    def whole(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise typer.BadParameter(f"'{text}' is not a whole number") from None
        if value < least:
            raise typer.BadParameter(f"'{text}' is less than {least}")
        return value

    return whole


ModelPath: TypeAlias = Annotated[
    Path, typer.Argument(metavar="MODEL", help="The .onnx file.", show_default=False)
]
Shapes: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--input-shape",
        metavar="NAME:1x3x224x224",
        help="Concrete shape of a symbolic input; repeatable.",
        show_default=False,
    ),
]
Labels: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--labels",
        metavar="Y.npy",
        help="Class of each sample (or FILE.npz with labels): measure accuracy.",
    ),
]
Metric: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--metric",
        metavar="path.py:function",
        help="Measure function(outputs, labels); higher is better.",
    ),
]
Plot: TypeAlias = Annotated[
    Path | None, typer.Option("--plot", metavar="FILE", help="Draw it: .png or .svg.")
]
DataPath: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--data", metavar="FILE.npz", help="Inputs of yours: to rank, to restore and to verify on."
    ),
]
Importance: TypeAlias = Annotated[
    str,
    typer.Option(
        "--importance",
        metavar="NAME",
        help="How channels are ranked: auto, bn_scale, l1, l2, bn_l1, reader, path, fpgm, lamp, "
        "random; with --data activation, wanda, obs; or path.py:function.",
    ),
]
Seed: TypeAlias = Annotated[
    int, typer.Option("--seed", parser=_whole(0), metavar="N", help="For everything random.")
]
AttentionMode: TypeAlias = Annotated[
    Attention,
    typer.Option(
        "--attention", help="Cut whole attention heads, dimensions of every head, or none."
    ),
]
AllowNorm: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--allow-norm", help="Also cut what a normalisation averages over; not exact, and said so."
    ),
]
DryRun: TypeAlias = Annotated[
    bool, typer.Option("--dry-run", help="Do everything but write files.")
]
Outlook: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Say what would be measured and about how long it takes; write nothing."
    ),
]
Json: TypeAlias = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Force: TypeAlias = Annotated[bool, typer.Option("--force", help="Overwrite existing files.")]
Quiet: TypeAlias = Annotated[bool, typer.Option("-q", "--quiet", help="Print errors only.")]
Verbose: TypeAlias = Annotated[
    bool, typer.Option("-v", "--verbose", help="Print every group and what the analysis noted.")
]
Debug: TypeAlias = Annotated[
    bool, typer.Option("--debug", help="Show tracebacks and debug messages.")
]


def _show_version(wanted: bool) -> None:
    if wanted:
        with printing():
            typer.echo(f"onnxprune {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Print the version and stop."
        ),
    ] = False,
) -> None:
    pass


@app.command(cls=_Command, short_help="Show what can be pruned and what cannot.")
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
            input_shapes=_shapes(input_shape),
            attention=attention.value,
            allow_norm=allow_norm,
            sparsity=sparsity,
            progress=progress,
        )
        chosen = None if group is None else _groups(graph, group)
        operators = operators_of(graph, report.before) if ops else None
        if csv is not None:
            from onnxprune.io import write_texts
            from onnxprune.report.tables import groups_csv, held_csv

            check_sources(graph.graph.model, csv)
            text = groups_csv(report.groups) if report.held is None else held_csv(report.held)
            write_texts({csv: text})
    with printing(*([] if csv is None else [csv])):
        if json:
            from onnxprune.report.build import as_json, only_groups

            shown = report if chosen is None else only_groups(report, chosen)
            print_json(as_json(shown, operators))
        elif not quiet:
            from onnxprune.report.tables import group_details, inspect_report

            details = None if chosen is None else group_details(graph, chosen)
            show(details or inspect_report(report, operators, verbose=verbose))


@app.command(cls=_Command, short_help="Prune, prove, and write a smaller model.")
def shrink(
    model: ModelPath,
    *,
    ratio: Annotated[
        float | None,
        typer.Option(
            "--ratio", parser=_number, metavar="R", help="Share of channels to remove, 0 <= R < 1."
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
            parser=_multiple,
            metavar="N|auto",
            help="Leave multiples of N channels, or of what suits the hardware.",
        ),
    ] = 1,
    min_channels: Annotated[
        int,
        typer.Option(
            "--min-channels", parser=_whole(1), metavar="N", help="Leave N in every group."
        ),
    ] = 1,
    max_ratio: Annotated[
        float,
        typer.Option(
            "--max-ratio", parser=_number, metavar="R", help="Most of one group that global takes."
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
        CutAttention,
        typer.Option(
            "--attention",
            help="Cut whole attention heads, dimensions of every head, or none; auto takes heads, "
            "or after a refit what moves the outputs less.",
        ),
    ] = CutAttention.auto,
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
            parser=_whole(1),
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
            "it.",
        ),
    ] = None,
    verify: Annotated[
        Level,
        typer.Option(
            "--verify", help="Prove the surgery (twin), and measure the drift too (full)."
        ),
    ] = Level.full,
    max_drift: Annotated[
        float | None,
        typer.Option(
            "--max-drift", parser=_number, metavar="X", help="Most relative L2 difference allowed."
        ),
    ] = None,
    min_cosine: Annotated[
        float | None,
        typer.Option("--min-cosine", parser=_number, metavar="X", help="Least cosine allowed."),
    ] = None,
    min_top1: Annotated[
        float | None,
        typer.Option(
            "--min-top1", parser=_number, metavar="X", help="Least share of equal top-1 classes."
        ),
    ] = None,
    data: DataPath = None,
    input_shape: Shapes = None,
    seed: Seed = 0,
    recipe_out: Annotated[
        Path | None,
        typer.Option("--recipe-out", metavar="FILE", help="Write the recipe as JSON."),
    ] = None,
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
        _refuse_beside(
            "--lossless, which takes all that has no effect",
            scope=scope,
            importance=importance != "auto",
            aggregate=aggregate,
            round_to=round_to != 1,
            min_channels=min_channels != 1,
            max_ratio=max_ratio != 0.9,
            ratio_for=ratio_for,
            allow_norm=allow_norm,
            steps=steps != 1,
            schedule=schedule is not Schedule.polynomial,
        )
    if recipe is not None:
        _refuse_beside(
            "--recipe, which fixes it",
            scope=scope,
            importance=importance != "auto",
            aggregate=aggregate,
            round_to=round_to != 1,
            min_channels=min_channels != 1,
            max_ratio=max_ratio != 0.9,
            ignore=ignore,
            only=only,
            ratio_for=ratio_for,
            max_loss=max_loss,
            attention=attention is not CutAttention.auto,
            steps=steps != 1,
            schedule=schedule is not Schedule.polynomial,
            then=then,
            allow_norm=allow_norm,
            input_shape=input_shape,
        )
    with session(quiet=quiet, verbose=verbose, debug=debug) as progress:
        from onnxprune import pipeline

        written = output or model.parent / f"{model.stem}.pruned.onnx"
        _, report = pipeline.shrink(
            model,
            ratio=ratio,
            targets=_shares(target),
            lossless=lossless,
            recipe=recipe,
            scope=None if scope is None else scope.value,
            importance=importance,
            aggregate=None if aggregate is None else aggregate.value,
            round_to=round_to,
            min_channels=min_channels,
            max_ratio=max_ratio,
            ignore=ignore or (),
            only=only or (),
            ratio_for=_ratios(ratio_for),
            sensitivity=sensitivity,
            max_loss=max_loss,
            attention=attention.value,
            allow_norm=allow_norm,
            restore=restore.value,
            steps=steps,
            schedule=schedule.value,
            then=then,
            input_shapes=_shapes(input_shape),
            data=data,
            seed=seed,
            verify=verify.value,
            max_drift=max_drift,
            min_cosine=min_cosine,
            min_top1=min_top1,
            output=None if dry_run else written,
            recipe_out=None if dry_run else recipe_out,
            force=force,
            progress=progress,
        )
    with printing(*report.written):
        if json:
            from onnxprune.report.build import as_json

            print_json(as_json(report))
        elif not quiet:
            from onnxprune.report.tables import shrink_report

            show(shrink_report(report, verbose=verbose))


@app.command(cls=_Command, short_help="Impose a fine-grained sparsity pattern, such as 2:4.")
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
            parser=_number,
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
    max_drift: Annotated[
        float | None,
        typer.Option(
            "--max-drift", parser=_number, metavar="X", help="Most relative L2 difference allowed."
        ),
    ] = None,
    min_cosine: Annotated[
        float | None,
        typer.Option("--min-cosine", parser=_number, metavar="X", help="Least cosine allowed."),
    ] = None,
    min_top1: Annotated[
        float | None,
        typer.Option(
            "--min-top1", parser=_number, metavar="X", help="Least share of equal top-1 classes."
        ),
    ] = None,
    data: DataPath = None,
    input_shape: Shapes = None,
    seed: Seed = 0,
    recipe_out: Annotated[
        Path | None,
        typer.Option("--recipe-out", metavar="FILE", help="Write the recipe as JSON."),
    ] = None,
    dry_run: DryRun = False,
    json: Json = False,
    force: Force = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Set weights of every layer to zero in a pattern, smallest first, and prove it holds."""
    if recipe is not None:
        _refuse_beside(
            "--recipe",
            pattern=pattern,
            sparsity=sparsity is not None,
            scope=scope is not SparseScope.local,
            method=method is not Method.auto,
            ignore=ignore,
            only=only,
            only_gain=only_gain,
            permute=permute,
            input_shape=input_shape,
        )
    with session(quiet=quiet, verbose=verbose, debug=debug) as progress:
        from onnxprune import sparsifying

        _, report = sparsifying.sparsify(
            model,
            pattern=pattern or "2:4",
            sparsity=sparsity,
            scope=scope.value,
            method=method.value,
            recipe=recipe,
            ignore=ignore or (),
            only=only or (),
            only_gain=only_gain,
            permute=permute,
            xz=xz,
            input_shapes=_shapes(input_shape),
            data=data,
            seed=seed,
            verify=verify.value,
            max_drift=max_drift,
            min_cosine=min_cosine,
            min_top1=min_top1,
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


@app.command(cls=_Command, short_help="Measure what each group of channels can lose.")
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
        typer.Option("--jobs", parser=_whole(1), metavar="N", help="Processes on this machine."),
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
            ratios=_numbers(ratios),
            data=data,
            labels=labels,
            metric=metric,
            importance=importance,
            attention=attention.value,
            restore=restore.value,
            input_shapes=_shapes(input_shape),
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


@app.command(cls=_Command, short_help="Measure the model cut at several ratios.")
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
            "--round-to", parser=_whole(1), metavar="N", help="Leave multiples of N channels."
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
            ratios=_numbers(ratios),
            data=data,
            labels=labels,
            metric=metric,
            scope=scope.value,
            importance=importance,
            round_to=round_to,
            attention=attention.value,
            input_shapes=_shapes(input_shape),
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


@app.command(cls=_Command, short_help="Measure how far two models are apart.")
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
    threads: Annotated[
        int,
        typer.Option(
            "--threads", parser=_whole(0), metavar="N", help="For --latency; 0: all usable cores."
        ),
    ] = 1,
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
            input_shapes=_shapes(input_shape),
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


@app.command(cls=_Command, short_help="Print a JSON Schema.")
def schema(
    name: Annotated[SchemaName, typer.Argument(metavar="NAME", show_default=False)],
) -> None:
    """Print the JSON Schema of what --json prints, or of a recipe."""
    from importlib.resources import files

    # Read here, not through `report.schemas`, which would import pydantic for nothing.
    stored = files("onnxprune").joinpath("schemas", f"{name.value}.json")
    with printing():
        sys.stdout.write(stored.read_text("utf-8"))


# -- values ----------------------------------------------------------------------------------------


def _shapes(given: Sequence[str] | None) -> dict[str, Shape]:
    """``NAME:1x3x224x224`` to a shape by name; the name may have colons."""
    shapes: dict[str, Shape] = {}
    for text in given or ():
        name, colon, spelled = text.rpartition(":")
        sizes = spelled.lower().split("x") if spelled else []
        if not name or not colon or not all(size.isdecimal() and int(size) > 0 for size in sizes):
            raise UsageError(f"--input-shape {text} is not NAME:1x3x224x224")
        if name in shapes:
            raise UsageError(f"--input-shape gives two shapes for '{name}'", hint="give one")
        shapes[name] = tuple(map(int, sizes))
    return shapes


def _numbers(given: str) -> list[float]:
    """``0.1,0.3`` to numbers."""
    try:
        return [float(text) for text in given.split(",")]
    except ValueError:
        raise UsageError(f"--ratios {given} is no list of numbers", hint="0.1,0.3,0.5") from None


def _shares(given: Sequence[str] | None) -> dict[str, float]:
    """``macs=0.5`` to a share by cost."""
    found: dict[str, float] = {}
    for text in given or ():
        name, _, spelled = text.partition("=")
        try:
            share = float(spelled)
        except ValueError:
            raise UsageError(
                f"--target {text} is not COST=SHARE", hint="--target macs=0.5"
            ) from None
        if name in found:
            raise UsageError(f"--target {name} is given twice", hint="give it once")
        found[name] = share
    return found


def _multiple(text: str) -> int | str:
    """What ``--round-to`` says: a whole number, or auto."""
    return text if text == "auto" else _whole(1)(text)


def _ratios(given: Sequence[str] | None) -> dict[str, float]:
    """``GLOB=R`` to a ratio by pattern."""
    ratios: dict[str, float] = {}
    for text in given or ():
        pattern, _, spelled = text.rpartition("=")
        try:
            ratio = float(spelled)
        except ValueError:
            pattern = ""
        if not pattern:
            raise UsageError(f"--ratio-for {text} is not GLOB=R", hint="--ratio-for 'layer4*=0.3'")
        if pattern in ratios:
            raise UsageError(f"--ratio-for gives two ratios for '{pattern}'", hint="give one")
        ratios[pattern] = ratio
    return ratios


def _refuse_beside(what: str, **given: object) -> None:
    """Refuse options that another one leaves without effect, or would contradict."""
    for name, value in given.items():
        if value:
            raise UsageError(f"--{name.replace('_', '-')} cannot go with {what}")


def _groups(graph: DependencyGraph, wanted: str) -> tuple[ChannelGroup, ...]:
    found = graph.named(wanted)
    if not found:
        raise UsageError(
            f"--group {wanted} names no channel group, and none that can be pruned passes there",
            hint="`onnxprune inspect MODEL -v` lists the names",
        )
    return found


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; the exit code of DESIGN §11. Errors are one line on stderr."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        result = app(arguments, prog_name="onnxprune", standalone_mode=False)
    except BrokenPipeError:
        # Whoever read the output has gone: that is no error of ours.
        discard_output()
        return 0
    except (Exception, KeyboardInterrupt) as error:
        if "--debug" in arguments:
            traceback.print_exc()
        return _complain(*_said(error))
    if result == _INTERRUPTED:  # how newer typers hand an interruption on
        return _complain("interrupted", _INTERRUPTED)
    return result if isinstance(result, int) else 0


def _complain(message: str, code: int) -> int:
    print(f"onnxprune: {' '.join(message.split())}", file=sys.stderr)
    return code


def _said(error: BaseException) -> tuple[str, int]:
    """What to tell a person of an error, and the exit code."""
    match error:
        case OnnxPruneError():
            return str(error), error.exit_code
        case KeyboardInterrupt() | typer.Abort():
            return "interrupted", _INTERRUPTED
        case OSError():
            where = f"'{error.filename}': " if error.filename else ""
            if not where and error.errno == errno.ENOSPC:
                where = (
                    "standard output: "  # files that fill a disk are named where they are written
                )
            return f"{where}{error.strerror or error}", _USAGE
        case MemoryError():
            return "not enough memory for this model", _OUR_BUG
    if isinstance(error, _ClickError):
        return error.format_message().replace("Value error, ", ""), _USAGE
    what = f"{type(error).__name__}: {error}"
    return f"internal error: {what} (please report it; --debug shows more)", _OUR_BUG


def _interrupt(*_: object) -> NoReturn:
    """Take an order to end as an interruption, once: what cleans up is not to be ended itself."""
    for number in _ORDERS_TO_END:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def main() -> NoReturn:
    """Entry point of the ``onnxprune`` command."""
    for number in _ORDERS_TO_END:
        if signal.getsignal(number) == signal.SIG_DFL:  # nohup has SIGHUP ignored
            signal.signal(number, _interrupt)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # started with it closed, as daemons do
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115  (as long as we run)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character still prints
    code = run()
    try:
        sys.stdout.flush()
    except OSError:
        discard_output()
    sys.exit(code)
