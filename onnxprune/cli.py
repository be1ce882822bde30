"""The command line: parses, calls the pipeline, prints. What it does stands in `pipeline`."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeAlias

import typer

from onnxprune import __version__
from onnxprune.errors import OnnxPruneError, UsageError
from onnxprune.terminal import print_json, session, show, write

if TYPE_CHECKING:
    from onnxprune.groups import DependencyGraph
    from onnxprune.types import ChannelGroup, Shape

_INTERRUPTED = 130
_OUR_BUG = 1
_USAGE = 2
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


class Method(StrEnum):
    """How channels are ranked."""

    auto = "auto"
    bn_scale = "bn_scale"
    l1 = "l1"
    l2 = "l2"
    bn_l1 = "bn_l1"
    random = "random"


class Attention(StrEnum):
    """What is cut in attention."""

    heads = "heads"
    dims = "dims"
    none = "none"


class Restoring(StrEnum):
    """How accuracy is restored."""

    none = "none"


class Level(StrEnum):
    """How much is verified."""

    none = "none"
    twin = "twin"
    full = "full"


class SchemaName(StrEnum):
    """What there is a JSON Schema of."""

    report = "report"
    recipe = "recipe"


ModelPath: TypeAlias = Annotated[Path, typer.Argument(metavar="MODEL", show_default=False)]
Shapes: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--input-shape",
        metavar="NAME:1x3x224x224",
        help="Concrete shape of a symbolic input; repeatable.",
        show_default=False,
    ),
]
DataPath: TypeAlias = Annotated[
    Path | None,
    typer.Option("--data", metavar="FILE.npz", help="Inputs to run the models on."),
]
Seed: TypeAlias = Annotated[int, typer.Option("--seed", min=0, help="For everything random.")]
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


@app.command()
def inspect(
    model: ModelPath,
    *,
    group: Annotated[
        str | None,
        typer.Option("--group", metavar="NAME", help="Show one group, by number, tensor or node."),
    ] = None,
    ops: Annotated[
        bool, typer.Option("--ops", help="Show the model's operators and how each is treated.")
    ] = False,
    csv: Annotated[
        Path | None, typer.Option("--csv", metavar="FILE", help="Write the groups as a table.")
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
        from onnxprune.report.ops import operators_of
        from onnxprune.request import check_outputs, check_sources

        check_outputs(model, csv, force=force)
        graph, report = pipeline.inspect(
            model,
            input_shapes=_shapes(input_shape),
            attention=attention.value,
            allow_norm=allow_norm,
            progress=progress,
        )
        chosen = None if group is None else _group(graph, group)
        operators = operators_of(graph, report.before) if ops else None
        if csv is not None:
            from onnxprune.report.tables import groups_csv

            check_sources(graph.graph.model, csv)
            write(csv, groups_csv(report.groups))
    if json:
        from onnxprune.report.build import as_json, only_group

        shown = report if chosen is None else only_group(report, chosen.id)
        print_json(as_json(shown, operators))
    elif not quiet:
        from onnxprune.report.tables import group_detail, inspect_report

        show(
            inspect_report(report, operators, verbose=verbose)
            if chosen is None
            else group_detail(graph, chosen)
        )


@app.command()
def shrink(
    model: ModelPath,
    *,
    ratio: Annotated[
        float | None,
        typer.Option("--ratio", metavar="R", help="Share of channels to remove, 0 <= R < 1."),
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
        Scope, typer.Option("--scope", help="The ratio of each group, or of the whole model.")
    ] = Scope.local,
    importance: Annotated[
        Method, typer.Option("--importance", help="How channels are ranked.")
    ] = Method.auto,
    round_to: Annotated[
        int,
        typer.Option("--round-to", min=1, metavar="N", help="Leave multiples of N channels."),
    ] = 1,
    min_channels: Annotated[
        int,
        typer.Option("--min-channels", min=1, metavar="N", help="Leave N in every group."),
    ] = 1,
    max_ratio: Annotated[
        float,
        typer.Option("--max-ratio", metavar="R", help="Most of one group that global takes."),
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
    attention: AttentionMode = Attention.heads,
    allow_norm: AllowNorm = False,
    restore: Annotated[
        Restoring, typer.Option("--restore", help="Restore accuracy: not in this version.")
    ] = Restoring.none,
    verify: Annotated[
        Level,
        typer.Option(
            "--verify", help="Prove the surgery (twin), and measure the drift too (full)."
        ),
    ] = Level.full,
    max_drift: Annotated[
        float | None,
        typer.Option("--max-drift", metavar="X", help="Most relative L2 difference allowed."),
    ] = None,
    min_cosine: Annotated[
        float | None, typer.Option("--min-cosine", metavar="X", help="Least cosine allowed.")
    ] = None,
    min_top1: Annotated[
        float | None,
        typer.Option("--min-top1", metavar="X", help="Least share of equal top-1 classes."),
    ] = None,
    data: DataPath = None,
    input_shape: Shapes = None,
    seed: Seed = 0,
    recipe_out: Annotated[
        Path | None,
        typer.Option("--recipe-out", metavar="FILE", help="Write the recipe as JSON."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Do everything but write files.")
    ] = False,
    json: Json = False,
    force: Force = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Remove the least important channels, prove the result right, and write a smaller model."""
    if (ratio is None) == (recipe is None):
        raise UsageError("give one of --ratio and --recipe", hint="--ratio 0.5")
    if recipe is not None:
        _refuse_beside_recipe(
            scope=scope is not Scope.local,
            importance=importance is not Method.auto,
            round_to=round_to != 1,
            min_channels=min_channels != 1,
            max_ratio=max_ratio != 0.9,
            ignore=ignore,
            only=only,
            ratio_for=ratio_for,
            attention=attention is not Attention.heads,
            allow_norm=allow_norm,
            input_shape=input_shape,
        )
    with session(quiet=quiet, verbose=verbose, debug=debug) as progress:
        from onnxprune import pipeline

        written = output or model.parent / f"{model.stem}.pruned.onnx"
        _, report = pipeline.shrink(
            model,
            ratio=ratio,
            recipe=recipe,
            scope=scope.value,
            importance=importance.value,
            round_to=round_to,
            min_channels=min_channels,
            max_ratio=max_ratio,
            ignore=ignore or (),
            only=only or (),
            ratio_for=_ratios(ratio_for),
            attention=attention.value,
            allow_norm=allow_norm,
            restore=restore.value,
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
    if json:
        from onnxprune.report.build import as_json

        print_json(as_json(report))
    elif not quiet:
        from onnxprune.report.tables import shrink_report

        show(shrink_report(report, verbose=verbose))


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(metavar="A", show_default=False)],
    second: Annotated[Path, typer.Argument(metavar="B", show_default=False)],
    *,
    latency: Annotated[
        bool, typer.Option("--latency", help="Time both models in ONNX Runtime, in turn.")
    ] = False,
    threads: Annotated[
        int,
        typer.Option("--threads", min=0, metavar="N", help="For --latency; 0: all usable cores."),
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
    if json:
        from onnxprune.report.build import as_json

        print_json(as_json(report))
    elif not quiet:
        from onnxprune.report.tables import compare_report

        show(compare_report(report, verbose=verbose))


@app.command()
def schema(
    name: Annotated[SchemaName, typer.Argument(show_default=False)],
) -> None:
    """Print the JSON Schema of what --json prints, or of a recipe."""
    from importlib.resources import files

    # Read here, not through `report.schemas`, which would import pydantic for nothing.
    stored = files("onnxprune").joinpath("schemas", f"{name.value}.json")
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
        shapes[name] = tuple(map(int, sizes))
    return shapes


def _ratios(given: Sequence[str] | None) -> dict[str, float]:
    """``GLOB=R`` to a ratio by pattern."""
    ratios: dict[str, float] = {}
    for text in given or ():
        pattern, _, spelled = text.rpartition("=")
        try:
            ratios[pattern] = float(spelled)
        except ValueError:
            pattern = ""
        if not pattern:
            raise UsageError(f"--ratio-for {text} is not GLOB=R", hint="--ratio-for 'layer4*=0.3'")
    return ratios


def _refuse_beside_recipe(**given: object) -> None:
    """A recipe says all that changes the weights: what would contradict it is refused."""
    for name, value in given.items():
        if value:
            raise UsageError(f"--{name.replace('_', '-')} cannot go with --recipe, which fixes it")


def _group(graph: DependencyGraph, wanted: str) -> ChannelGroup:
    """A group by its number, or the first one made by a tensor or node."""
    for group in graph.groups:
        names = {name for axis in group.producers for name in (axis.tensor, axis.node)}
        if wanted in names or wanted == str(group.id):
            return group
    raise UsageError(f"--group {wanted} names no channel group", hint="`inspect` lists them")


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; the exit code of DESIGN §11. Errors are one line on stderr."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        result = app(arguments, prog_name="onnxprune", standalone_mode=False)
    except BrokenPipeError:
        # Whoever read the output has gone: that is no error of ours.
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
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
            return f"{where}{error.strerror or error}", _USAGE
        case MemoryError():
            return "not enough memory for this model", _OUR_BUG
    if isinstance(error, _ClickError):
        return error.format_message(), _USAGE
    what = f"{type(error).__name__}: {error}"
    return f"internal error: {what} (please report it; --debug shows more)", _OUR_BUG


def main() -> NoReturn:
    """Entry point of the ``onnxprune`` command."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # started with it closed, as daemons do
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115  (as long as we run)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character still prints
    code = run()
    with suppress(BrokenPipeError):
        sys.stdout.flush()
    sys.exit(code)
