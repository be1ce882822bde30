"""What a caller asked for: checked as far as it can be before any work is done."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx

from onnxprune.alignment import steps
from onnxprune.curves import Allowance
from onnxprune.data import Data
from onnxprune.errors import UsageError
from onnxprune.groups import DependencyGraph
from onnxprune.io import Model
from onnxprune.latency_target import LatencyTarget
from onnxprune.lossless import lossless_plan
from onnxprune.planning import Planner, Wish
from onnxprune.recipe import Options, Recipe, replay
from onnxprune.report.clock import Clock
from onnxprune.score import Scorer, score
from onnxprune.select import PruningPlan
from onnxprune.types import Latency, Limits, Shape

AnyModel = Model | onnx.ModelProto | bytes | str | Path

LOSSLESS = "lossless"  # instead of a method that ranks: nothing is ranked
_LEVELS = ("none", "twin", "full")


@dataclass(frozen=True, slots=True)
class Mode:
    """How to analyse: what is cut in attention, and whether normalised channels may go."""

    attention: str = "heads"
    allow_norm: bool = False

    def __post_init__(self) -> None:
        if self.attention not in ("heads", "dims", "none"):
            raise UsageError(f"attention is '{self.attention}'", hint="give heads, dims or none")


@dataclass(frozen=True)
class Request:
    """What was asked for, by ratio, by recipe, or by what a sensitivity run allows."""

    ratio: float | None
    recipe: Recipe | None
    scope: str | None
    importance: str | Scorer
    round_to: int | str
    min_channels: int
    max_ratio: float
    ignore: tuple[str, ...]
    only: tuple[str, ...]
    ratio_for: Mapping[str, float]
    attention: str
    allow_norm: bool
    input_shapes: Mapping[str, Shape]
    seed: int
    lossless: bool = False
    allowance: Allowance | None = None
    targets: Mapping[str, float] = field(default_factory=dict)
    aggregate: str | None = None
    restore: str = "none"

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Input shapes to analyse at."""
        return self.input_shapes if self.recipe is None else self.recipe.options.input_shape

    @property
    def rounding(self) -> int | str:
        """``round_to``; where latency is a target and nothing is asked for, what suits hardware.

        With odd widths a smaller model is often a slower one.
        """
        return "auto" if "latency" in self.targets and self.round_to == 1 else self.round_to

    @property
    def exactly(self) -> bool:
        """Whether the result must equal the original itself."""
        return self.lossless if self.recipe is None else self.recipe.options.lossless

    @property
    def analysis(self) -> Mode:
        """How to analyse."""
        if self.recipe is None:
            return Mode(self.attention, self.allow_norm)
        return Mode(self.recipe.options.attention, self.recipe.options.allow_norm)

    def timed_plan(
        self, graph: DependencyGraph, data: Data | None, clock: Clock
    ) -> tuple[tuple[PruningPlan, str, str], Latency | None]:
        """What ``plan`` gives, and its measured times where latency is a target.

        Raises:
            TargetError: A target is out of reach.
            VerificationError: Latency is a target, and ONNX Runtime cannot run the model.
        """
        if "latency" not in self.targets:
            return self.plan(graph, data, clock), None
        with clock.stage("time"):
            timer = LatencyTarget.of(graph, data, self.seed)
        return timer.confirmed(
            self.targets["latency"], lambda: self.plan(graph, data, clock, timer)
        )

    def plan(
        self,
        graph: DependencyGraph,
        data: Data | None,
        clock: Clock,
        timer: LatencyTarget | None = None,
    ) -> tuple[PruningPlan, str, str]:
        """The plan, the method that ranked, and why that one."""
        latency = None if timer is None else timer.left
        if self.recipe is not None:
            options = self.recipe.options
            method = LOSSLESS if options.lossless else options.importance
            with clock.stage("select"):
                return replay(graph, self.recipe), method, "from the recipe"
        if self.lossless:
            with clock.stage("select"):
                plan = lossless_plan(graph, ignore=self.ignore, only=self.only)
            return plan, LOSSLESS, "only what has no effect goes"
        calibrating = self.importance == "auto" and data is not None and not data.random
        if calibrating and self.allowance is None:
            with clock.stage("score"):
                planner = Planner(graph, self._wish(graph, None), data, self.aggregate, latency)
                refitted = self.restoring(data) == "refit"
                best = planner.best_restored if refitted else planner.best
                return best(self.seed)
        with clock.stage("score"):
            values = score(
                graph, self.importance, aggregate=self.aggregate, data=data, seed=self.seed
            )
        allowed = None
        if self.allowance is not None:
            allowed = self.allowance.ratios(graph, values.method, self.ratio, self.restoring(data))
        with clock.stage("select"):
            plan = Planner(graph, self._wish(graph, allowed), data, latency=latency).plan(values)
        return plan, values.method, values.why

    def _wish(self, graph: DependencyGraph, allowed: Mapping[int, float] | None) -> Wish:
        return Wish(
            ratio=self.ratio or 0.0,
            targets=self.targets,
            scope=self.scope,
            round_to=steps(graph) if isinstance(self.rounding, str) else self.rounding,
            min_channels=self.min_channels,
            max_ratio=self.max_ratio,
            ignore=self.ignore,
            only=self.only,
            ratio_for=self.ratio_for,
            group_ratios=allowed,
        )

    def restoring(self, data: Data | None) -> str:
        """How the result is restored: ``none``, ``bias`` or ``refit``."""
        given = data is not None and not data.random
        if self.exactly:
            return "none"
        asked = self.restore
        if asked == "auto" and self.recipe is not None:
            asked = self.recipe.options.restore
            return "none" if asked == "refit" and not given else asked
        if asked == "auto":
            return "refit" if given else "bias"
        return asked

    def options(self, method: str, restored: str) -> Options:
        """Options as a recipe keeps them, with the importance that was taken."""
        if self.recipe is not None:
            return self.recipe.options.model_copy(update={"restore": restored})
        return Options(
            restore=restored,  # type: ignore[arg-type]  # one of the three
            ratio=self.ratio,
            targets=dict(self.targets),
            scope=self.scope or ("isomorphic" if self.targets else "local"),  # type: ignore[arg-type]  # select checked it
            aggregate=self.aggregate,  # type: ignore[arg-type]  # score checked it
            lossless=self.lossless,
            importance="auto" if self.lossless else method,
            round_to=self.rounding,  # type: ignore[arg-type]  # checked on the way in
            min_channels=self.min_channels,
            max_ratio=self.max_ratio,
            ignore=self.ignore,
            only=self.only,
            ratio_for=dict(self.ratio_for),
            sensitivity_sha256=None if self.allowance is None else self.allowance.sha256,
            max_loss=None if self.allowance is None else self.allowance.max_loss,
            attention=self.attention,  # type: ignore[arg-type]  # Mode checked it
            allow_norm=self.allow_norm,
            input_shape={name: tuple(shape) for name, shape in self.input_shapes.items()},
            seed=self.seed,
        )


@dataclass(frozen=True)
class Check:
    """How a result is to be verified; ``data`` is None for random inputs."""

    level: str
    limits: Limits
    data: Data | None
    seed: int


def check_level(level: str, limits: Limits) -> None:
    """Refuse a level that does not exist, or that leaves other options without effect."""
    if level not in _LEVELS:
        raise UsageError(f"verify is '{level}'", hint="give none, twin or full")
    flags = {
        "--max-drift": limits.max_drift,
        "--min-cosine": limits.min_cosine,
        "--min-top1": limits.min_top1,
    }
    given = {flag: value for flag, value in flags.items() if value is not None}
    if given and level != "full":
        raise UsageError(f"{next(iter(given))} needs --verify full, not {level}")
    for flag, value in given.items():
        low, high = {"--max-drift": (0.0, float("inf")), "--min-cosine": (-1.0, 1.0)}.get(
            flag, (0.0, 1.0)
        )
        if not low <= value <= high:
            upper = f" <= {high:g}" if high < float("inf") else ""
            raise UsageError(f"{flag} is {value:g}", hint=f"give {low:g} <= value{upper}")


def check_allowance(sensitivity: object, max_loss: float | None, scope: str | None) -> None:
    """Refuse half of a pair of options, and what it contradicts."""
    if sensitivity is None and max_loss is not None:
        raise UsageError("--max-loss needs a sensitivity file", hint="--sensitivity FILE.json")
    if sensitivity is not None and max_loss is None:
        raise UsageError("--sensitivity needs to know how much may be lost", hint="--max-loss 0.01")
    if sensitivity is not None and scope == "global":
        raise UsageError(
            "--sensitivity says what each group loses", hint="leave out --scope global"
        )


def check_restore(restore: str, data: object) -> None:
    """Refuse a way to restore that does not exist, or lacks what it needs."""
    if restore not in ("auto", "none", "bias", "refit"):
        raise UsageError(f"restore is '{restore}'", hint="give auto, none, bias or refit")
    if restore == "refit" and data is None:
        raise UsageError("restore refit needs calibration data", hint="--data FILE.npz")


def check_outputs(
    model: AnyModel, *outputs: Path | str | None, force: bool, read: Sequence[object] = ()
) -> None:
    """Refuse an output that cannot be written, before any work is done.

    Args:
        model: The input.
        outputs: Where the model goes, then other files; None for what is not written.
        force: They may exist.
        read: Other things that are read; those that are paths must not be overwritten.

    Raises:
        UsageError: It is the input, something read or another output, exists, or its folder does
            not take it.
    """
    source = Path(model) if isinstance(model, str | Path) else getattr(model, "path", None)
    inputs = [Path(one) for one in read if isinstance(one, str | Path)]
    seen: list[Path] = []
    for given in outputs:
        if given is None:
            continue
        path = Path(given)
        if source is not None and _same(path, source):
            raise UsageError(
                f"'{path}' is the input itself, which is never overwritten",
                hint="choose another output",
            )
        for other in inputs:
            if any(_same(one, two) for one in (path, _data_of(path)) for two in _with_data(other)):
                raise UsageError(
                    f"writing '{path}' would overwrite '{other}', which this run reads",
                    hint="choose another output",
                )
        if any(_same(path, other) for other in seen):
            raise UsageError(f"'{path}' is given for two outputs")
        if seen and _same(path, _data_of(seen[0])):
            raise UsageError(
                f"'{path}' is where '{seen[0]}' may keep its weights", hint="choose another name"
            )
        seen.append(path)
        if path.is_dir():
            raise UsageError(f"'{path}' is a directory", hint="give the output a file name")
        if path.exists() and not path.is_file():
            raise UsageError(f"'{path}' is not a regular file", hint="choose another output")
        if not path.parent.is_dir():
            raise UsageError(f"folder '{path.parent}' does not exist", hint="create it first")
        if os.path.lexists(path) and not force:
            raise UsageError(
                f"'{path}' exists", hint="give --force to overwrite it, in Python force=True"
            )
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise UsageError(
                f"folder '{path.parent}' is not writable", hint="choose another output"
            )


def _data_of(path: Path) -> Path:
    """Where a model keeps its weights if they are not inside."""
    return path.with_name(path.name + ".data")


def _with_data(path: Path) -> tuple[Path, ...]:
    return (path, _data_of(path)) if path.suffix == ".onnx" else (path,)


def check_sources(model: Model, *outputs: Path | str | None) -> None:
    """Refuse an output that is a file the model's weights are read from, whatever its name.

    Raises:
        UsageError: It is the input or its external data.
    """
    for given in outputs:
        if given is not None and any(_same(Path(given), source) for source in model.sources):
            raise UsageError(
                f"'{given}' belongs to the input, which is never overwritten",
                hint="choose another output",
            )


def _same(path: Path, other: Path) -> bool:
    if path.exists() and other.exists():
        return path.samefile(other)
    return path.resolve() == other.resolve()
