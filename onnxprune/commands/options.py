"""Options that several verbs share, and how their values are read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer
from typer.core import TyperCommand

from onnxprune.errors import UsageError

if TYPE_CHECKING:
    from onnxprune.types import Shape


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
    """What is cut in attention; auto leaves it to the verb."""

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


class Target(StrEnum):
    """What is to run a model."""

    tensorrt = "tensorrt"


class Precision(StrEnum):
    """What numbers become."""

    fp16 = "fp16"
    bf16 = "bf16"
    int8 = "int8"


class Calibration(StrEnum):
    """How ranges of activations are found."""

    auto = "auto"
    minmax = "minmax"
    percentile = "percentile"
    entropy = "entropy"


class SchemaName(StrEnum):
    """What there is a JSON Schema of."""

    report = "report"
    recipe = "recipe"
    sensitivity = "sensitivity"
    sweep = "sweep"


class Command(TyperCommand):
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


def number(text: str) -> float:
    """A number, or a line that says it is none."""
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"'{text}' is not a number") from None


def whole(least: int) -> Callable[[str], int]:
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
    int, typer.Option("--seed", parser=whole(0), metavar="N", help="For everything random.")
]
AttentionMode: TypeAlias = Annotated[
    Attention,
    typer.Option(
        "--attention",
        help="Cut whole attention heads (auto means these), dimensions of every head, or none.",
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
Verify: TypeAlias = Annotated[
    Level,
    typer.Option("--verify", help="Prove the surgery (twin), and measure the drift too (full)."),
]
MaxDrift: TypeAlias = Annotated[
    float | None,
    typer.Option(
        "--max-drift", parser=number, metavar="X", help="Most relative L2 difference allowed."
    ),
]
MinCosine: TypeAlias = Annotated[
    float | None,
    typer.Option("--min-cosine", parser=number, metavar="X", help="Least cosine allowed."),
]
MinTop1: TypeAlias = Annotated[
    float | None,
    typer.Option(
        "--min-top1", parser=number, metavar="X", help="Least share of equal top-1 classes."
    ),
]
CheckFor: TypeAlias = Annotated[
    Target | None,
    typer.Option(
        "--check",
        help="Before anything is written, see that this target takes the result.",
        show_default=False,
    ),
]
FoldBn: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--fold-bn",
        help="At last fold BatchNormalization, scales and shifts into the layers beside them.",
    ),
]
Simplify: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--simplify",
        help="At last compute what is constant and leave out what does nothing or is there twice.",
    ),
]
Timed: TypeAlias = Annotated[
    bool | None,
    typer.Option(
        "--latency/--no-latency",
        help="Time original and result in ONNX Runtime, in turn; by default where that is quick.",
        show_default=False,
    ),
]
Threads: TypeAlias = Annotated[
    int,
    typer.Option(
        "--threads", parser=whole(0), metavar="N", help="For --latency; 0: all usable cores."
    ),
]
RecipeOut: TypeAlias = Annotated[
    Path | None,
    typer.Option("--recipe-out", metavar="FILE", help="Write the recipe as JSON."),
]


def shapes(given: Sequence[str] | None, flag: str = "--input-shape") -> dict[str, Shape]:
    """``NAME:1x3x224x224`` to a shape by name; the name may have colons."""
    shapes: dict[str, Shape] = {}
    for text in given or ():
        name, colon, spelled = text.rpartition(":")
        sizes = spelled.lower().split("x") if spelled else []
        if not name or not colon or not all(size.isdecimal() and int(size) > 0 for size in sizes):
            raise UsageError(f"{flag} {text} is not NAME:1x3x224x224")
        if name in shapes:
            raise UsageError(f"{flag} gives two shapes for '{name}'", hint="give one")
        shapes[name] = tuple(map(int, sizes))
    return shapes


def numbers(given: str) -> list[float]:
    """``0.1,0.3`` to numbers."""
    try:
        return [float(text) for text in given.split(",")]
    except ValueError:
        raise UsageError(f"--ratios {given} is no list of numbers", hint="0.1,0.3,0.5") from None


def shares(given: Sequence[str] | None) -> dict[str, float]:
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


def multiple(text: str) -> int | str:
    """What ``--round-to`` says: a whole number, or auto."""
    try:
        return text if text == "auto" else whole(1)(text)
    except typer.BadParameter as error:
        raise typer.BadParameter(f"{error}; give a whole number, or auto") from None


def ratios(given: Sequence[str] | None) -> dict[str, float]:
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


def refuse_beside(what: str, cures: Mapping[str, str] | None = None, /, **given: object) -> None:
    """Refuse options that another one leaves without effect, or would contradict.

    Args:
        what: The other one.
        cures: What to do instead, by the name of an option.
        given: Values by the names of options.
    """
    for name, value in given.items():
        if value:
            raise UsageError(
                f"--{name.replace('_', '-')} cannot go with {what}",
                hint=(cures or {}).get(name, ""),
            )
