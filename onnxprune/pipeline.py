"""The arrows of DESIGN §2, one function for each verb."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx

from onnxprune import __version__
from onnxprune.analyse import DependencyGraph, analyse_graph
from onnxprune.cost import stats, stats_after, stats_of
from onnxprune.data import Data, load_data, random_data
from onnxprune.drift import measure_drift
from onnxprune.errors import UnsupportedModelError, UsageError, VerificationError
from onnxprune.io import Model, as_model, save
from onnxprune.prepare import prepare
from onnxprune.recipe import Options, Recipe, build, embed, read, replay
from onnxprune.report.build import NOT_VERIFIED, group_reports
from onnxprune.report.clock import Clock, Progress, peak_memory
from onnxprune.rewrite import Surgery, masked_twin, operate
from onnxprune.score import Scorer, choose, score
from onnxprune.select import PruningPlan, select
from onnxprune.shapes import environment
from onnxprune.standins import find_stand_ins
from onnxprune.types import Limits, Report, Shape, Verdict
from onnxprune.verify import verify

AnyModel = Model | onnx.ModelProto | bytes | str | Path

_log = logging.getLogger(__name__)
_LEVELS = ("none", "twin", "full")
_BUG = "this is a bug in onnxprune: please report it with the model"


# -- shrink ----------------------------------------------------------------------------------------


def shrink(
    model: AnyModel,
    *,
    ratio: float | None = None,
    recipe: Path | str | Recipe | None = None,
    scope: str = "local",
    importance: str | Scorer = "auto",
    round_to: int = 1,
    min_channels: int = 1,
    max_ratio: float = 0.9,
    ignore: Sequence[str] = (),
    only: Sequence[str] = (),
    ratio_for: Mapping[str, float] | None = None,
    attention: str = "heads",
    restore: str = "none",
    input_shapes: Mapping[str, Shape] | None = None,
    data: Path | str | Data | None = None,
    seed: int = 0,
    level: str = "full",
    limits: Limits = Limits(),  # noqa: B008  (frozen)
    output: Path | str | None = None,
    recipe_out: Path | str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> tuple[Model, Report]:
    """Make a model smaller: load, analyse, score, select, rewrite, verify and save.

    Args:
        model: A path, a loaded model, or a message.
        ratio: Share of channels to remove, 0 <= ratio < 1; this or ``recipe``.
        recipe: A recipe to repeat, or the file that has it (.json, or a model made by onnxprune).
        scope, round_to, min_channels, max_ratio, ignore, only, ratio_for: As in ``select``.
        importance: As in ``score``.
        attention: As in ``analyse``.
        restore: Only ``none`` so far.
        input_shapes: Concrete shapes for symbolic inputs.
        data: Inputs for verification: an ``.npz`` file or ``Data``; None makes random ones.
        seed: For random inputs and ``importance="random"``.
        level: ``none``, ``twin`` or ``full`` verification.
        limits: Limits on drift; they need ``level="full"``.
        output: File to write, or None.
        recipe_out: File to write the recipe to, or None.
        force: Overwrite what exists.
        progress: Called with the name of each stage as it begins.

    Returns:
        The smaller model and the report.

    Raises:
        UsageError: An option or an output path cannot be used.
        ModelError: The model is unreadable or invalid.
        UnsupportedModelError: Nothing in it can be pruned.
        RecipeError: The recipe does not fit.
        VerificationError: The result is wrong (our bug), or passes a limit, or cannot be run.
    """
    if (ratio is None) == (recipe is None):
        raise UsageError("give either a ratio or a recipe", hint="--ratio 0.5")
    if restore != "none":
        raise UsageError(f"restore is '{restore}'", hint="only none exists in this version")
    _check_level(level, limits)
    check_outputs(model, output, recipe_out, force=force)
    clock = Clock(progress)
    with _Heard() as heard:
        given = None if recipe is None else recipe if isinstance(recipe, Recipe) else read(recipe)
        asked = _Request(
            ratio, given, scope, importance, round_to, min_channels, max_ratio,
            tuple(ignore), tuple(only), dict(ratio_for or {}), attention,
            dict(input_shapes or {}), seed,
        )  # fmt: skip
        with clock.stage("load"):
            original = as_model(model)
            fed = _given_data(data, original) if level != "none" else None
        graph = _analyse(original, asked.shapes, asked.attention_mode, clock)
        if not graph.prunable:
            raise UnsupportedModelError(_nothing_prunable(graph))
        plan, method, why = asked.plan(graph, clock)
        with clock.stage("rewrite"):
            surgery = operate(plan)
            made, written = _with_recipe(surgery, original, asked.options(method))
        if not surgery.removed:
            _log.warning("nothing was cut: %s", _why_nothing(plan, round_to, ratio))
        verdict = _verify(graph, plan, made, fed, seed, level, limits, clock)
        before, after = stats(graph), stats_after(graph, made, plan.keep)
        with clock.stage("save"):
            if output is not None:
                after = replace(after, bytes=save(made, output, force=force))
            if recipe_out is not None:
                _write_recipe(Path(recipe_out), written, made, original, asked.options(method))
    return made, Report(
        verb="shrink",
        input_path=str(original.path or ""),
        before=before,
        output_path=None if output is None else str(output),
        after=after,
        importance=method,
        importance_why=why,
        exact=graph.exact(plan.keep),
        groups=group_reports(graph, plan.keep, plan.why),
        verdict=verdict,
        stand_ins=graph.stand_ins,
        seconds=clock.seconds,
        peak_memory_bytes=peak_memory(),
        warnings=tuple(heard.messages),
        recipe={} if written is None else written.as_json(),
    )


@dataclass(frozen=True)
class _Request:
    """What was asked for, by ratio or by recipe."""

    ratio: float | None
    recipe: Recipe | None
    scope: str
    importance: str | Scorer
    round_to: int
    min_channels: int
    max_ratio: float
    ignore: tuple[str, ...]
    only: tuple[str, ...]
    ratio_for: Mapping[str, float]
    attention: str
    input_shapes: Mapping[str, Shape]
    seed: int

    @property
    def shapes(self) -> Mapping[str, Shape]:
        return self.input_shapes if self.recipe is None else self.recipe.options.input_shape

    @property
    def attention_mode(self) -> str:
        return self.attention if self.recipe is None else self.recipe.options.attention

    def plan(self, graph: DependencyGraph, clock: Clock) -> tuple[PruningPlan, str, str]:
        """The plan, the method that ranked, and why that one."""
        if self.recipe is not None:
            with clock.stage("select"):
                return replay(graph, self.recipe), self.recipe.options.importance, "from the recipe"
        assert self.ratio is not None
        with clock.stage("score"):
            values = score(graph, self.importance, seed=self.seed)
        with clock.stage("select"):
            plan = select(
                graph,
                values,
                ratio=self.ratio,
                scope=self.scope,
                round_to=self.round_to,
                min_channels=self.min_channels,
                max_ratio=self.max_ratio,
                ignore=self.ignore,
                only=self.only,
                ratio_for=self.ratio_for,
            )
        return plan, values.method, values.why

    def options(self, method: str) -> Options:
        """Options as a recipe keeps them, with the importance that was taken."""
        if self.recipe is not None:
            return self.recipe.options
        return Options(
            ratio=self.ratio,
            scope=self.scope,  # type: ignore[arg-type]  # select checked it
            importance=method,
            round_to=self.round_to,
            min_channels=self.min_channels,
            max_ratio=self.max_ratio,
            ignore=self.ignore,
            only=self.only,
            ratio_for=dict(self.ratio_for),
            attention=self.attention,  # type: ignore[arg-type]  # analyse checked it
            input_shape={name: tuple(shape) for name, shape in self.input_shapes.items()},
            seed=self.seed,
        )


def _analyse(
    model: Model, shapes: Mapping[str, Shape], attention: str, clock: Clock
) -> DependencyGraph:
    """``analyse`` with its two stages timed apart."""
    if attention not in ("heads", "dims"):
        raise UsageError(f"attention is '{attention}'", hint="give heads or dims")
    with clock.stage("prepare"):
        prepared = prepare(model)
        envs = tuple(
            environment(prepared, choice) for choice in find_stand_ins(prepared, shapes or None)
        )
    with clock.stage("analyse"):
        found = analyse_graph(prepared, envs, attention=attention)
    for note in found.notes:
        _log.info("%s", note)
    return found


def _nothing_prunable(graph: DependencyGraph) -> str:
    """Why no group may be cut, the commonest reasons first."""
    if not graph.groups:
        return "nothing can be pruned: no Conv, Gemm or MatMul has a constant weight"
    reasons = Counter(group.frozen or "" for group in graph.groups)
    shown = "; ".join(reason for reason, _ in reasons.most_common(3))
    every = "every channel is frozen" if len(graph.groups) > 1 else "its only channels are frozen"
    return f"nothing can be pruned: {every}: {shown}"


def _why_nothing(plan: PruningPlan, round_to: int, ratio: float | None) -> str:
    if not ratio:
        return "the ratio is 0" if ratio is not None else "the recipe removes nothing"
    if all(why.startswith("kept") for why in map(plan.why.get, _prunable_ids(plan)) if why):
        return "--ignore and --only keep every group"
    if round_to > 1:
        return f"ratio {ratio:g} and --round-to {round_to} leave every group whole"
    return f"ratio {ratio:g} is less than one channel of every group, or --min-channels keeps them"


def _prunable_ids(plan: PruningPlan) -> list[int]:
    return [group.id for group in plan.graph.prunable]


def _with_recipe(
    surgery: Surgery, original: Model, options: Options
) -> tuple[Model, Recipe | None]:
    """The new model with its recipe inside; unchanged, and no recipe, where nothing was removed."""
    if not surgery.removed:
        return surgery.model, None
    written = build(original, surgery, options, __version__)
    return embed(surgery.model, written), written


def _write_recipe(
    path: Path, written: Recipe | None, made: Model, original: Model, options: Options
) -> None:
    if written is None:
        written = build(original, Surgery(made, (), {}, (), ()), options, __version__)
    try:
        path.write_text(written.readable(), "utf-8", newline="\n")
    except OSError as error:
        raise UsageError(f"cannot write '{path}': {error.strerror}") from error


# -- verification ----------------------------------------------------------------------------------


def _check_level(level: str, limits: Limits) -> None:
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


def _given_data(data: Path | str | Data | None, model: Model) -> Data | None:
    return load_data(data, model) if isinstance(data, str | Path) else data


def made_up_data(graph: DependencyGraph, seed: int) -> Data:
    """Random inputs at the stand-in sizes of an analysis: two runs, of two sizes if it has two."""
    model = graph.graph.model
    if len(graph.envs) == 1:
        return random_data(model, seed=seed, shapes=graph.stand_ins)
    parts = [
        random_data(model, seed=seed, shapes=env.inputs, batches=1) for env in graph.envs
    ]
    batches = tuple(batch for part in parts for batch in part.batches)
    return replace(parts[0], batches=batches, samples=sum(part.samples for part in parts))


def _verify(
    graph: DependencyGraph,
    plan: PruningPlan,
    made: Model,
    data: Data | None,
    seed: int,
    level: str,
    limits: Limits,
    clock: Clock,
) -> Verdict:
    """The verdict on a result that may be written; a failed one raises."""
    if level == "none":
        return NOT_VERIFIED
    with clock.stage("verify"):
        twin = masked_twin(plan) if graph.exact(plan.keep) else None
        verdict = verify(
            graph.graph.model,
            made,
            twin=twin,
            data=data if data is not None else made_up_data(graph, seed),
            level=level,
            limits=limits,
        )
    if verdict.status == "failed":
        hint = _BUG if verdict.ours else "nothing was written"
        raise VerificationError(verdict.reason, hint=hint)
    if verdict.status == "not_run":
        _log.warning("not verified: %s", verdict.reason)
    return verdict


# -- inspect and compare ---------------------------------------------------------------------------


def inspect(
    model: AnyModel,
    *,
    input_shapes: Mapping[str, Shape] | None = None,
    attention: str = "heads",
    progress: Progress | None = None,
) -> tuple[DependencyGraph, Report]:
    """What can be pruned, what cannot and why, and what it all costs.

    Args:
        model: A path, a loaded model, or a message.
        input_shapes: Concrete shapes for symbolic inputs.
        attention: As in ``analyse``.
        progress: Called with the name of each stage as it begins.

    Returns:
        The analysis and the report.
    """
    clock = Clock(progress)
    with _Heard() as heard:
        with clock.stage("load"):
            original = as_model(model)
        graph = _analyse(original, input_shapes or {}, attention, clock)
        method, why = choose(graph) if graph.prunable else ("", "nothing can be pruned")
    return graph, Report(
        verb="inspect",
        input_path=str(original.path or ""),
        before=stats(graph),
        output_path=None,
        after=None,
        importance=method,
        importance_why=why,
        exact=None,
        groups=group_reports(graph),
        verdict=NOT_VERIFIED,
        stand_ins=graph.stand_ins,
        seconds=clock.seconds,
        peak_memory_bytes=peak_memory(),
        warnings=tuple(heard.messages),
    )


def compare(
    first: AnyModel,
    second: AnyModel,
    *,
    input_shapes: Mapping[str, Shape] | None = None,
    data: Path | str | Data | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Report:
    """How far the outputs of ``second`` lie from those of ``first``, and what each costs.

    Args:
        first: The reference: a path, a loaded model, or a message.
        second: The model to compare with it; it has the same inputs and outputs.
        input_shapes: Concrete shapes for symbolic inputs.
        data: Inputs: an ``.npz`` file or ``Data``; None makes random ones.
        seed: For random inputs.
        progress: Called with the name of each stage as it begins.

    Raises:
        UsageError: Inputs or outputs have other names.
        VerificationError: ONNX Runtime cannot run one of the models.
    """
    clock = Clock(progress)
    with _Heard() as heard:
        with clock.stage("load"):
            before, after = as_model(first), as_model(second)
            _check_interfaces(before, after)
            fed = _given_data(data, before)
        graph = _analyse(before, input_shapes or {}, "heads", clock)
        with clock.stage("verify"):
            fed = fed if fed is not None else made_up_data(graph, seed)
            drift = measure_drift(before, after, fed)
    return Report(
        verb="compare",
        input_path=str(before.path or ""),
        before=stats(graph),
        output_path=str(after.path or ""),
        after=stats_of(after, graph.stand_ins),
        importance="",
        importance_why="",
        exact=None,
        groups=(),
        verdict=Verdict("none", "compared, not verified", None, drift, fed.label),
        stand_ins=graph.stand_ins,
        seconds=clock.seconds,
        peak_memory_bytes=peak_memory(),
        warnings=tuple(heard.messages),
    )


def _check_interfaces(first: Model, second: Model) -> None:
    for kind in ("input", "output"):
        names, other = (
            [value.name for value in getattr(model.proto.graph, kind)] for model in (first, second)
        )
        if names != other:
            raise UsageError(f"the models have different {kind}s: {names} and {other}")


# -- outputs and warnings --------------------------------------------------------------------------


def check_outputs(model: AnyModel, *outputs: Path | str | None, force: bool) -> None:
    """Refuse an output that cannot be written, before any work is done.

    Raises:
        UsageError: It is the input or another output, exists, or its folder does not take it.
    """
    source = Path(model) if isinstance(model, str | Path) else getattr(model, "path", None)
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
        if any(_same(path, other) for other in seen):
            raise UsageError(f"'{path}' is given for two outputs")
        seen.append(path)
        if path.is_dir():
            raise UsageError(f"'{path}' is a directory", hint="give the output a file name")
        if not path.parent.is_dir():
            raise UsageError(f"folder '{path.parent}' does not exist", hint="create it first")
        if os.path.lexists(path) and not force:
            raise UsageError(f"'{path}' exists", hint="give --force to overwrite it")
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise UsageError(f"folder '{path.parent}' is not writable", hint="choose another output")


def _same(path: Path, other: Path) -> bool:
    if path.exists() and other.exists():
        return path.samefile(other)
    return path.resolve() == other.resolve()


class _Heard(logging.Handler):
    """Collects the warnings of the package while it is entered, each once."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Remember one warning."""
        message = record.getMessage()
        if message not in self.messages:
            self.messages.append(message)

    def __enter__(self) -> _Heard:
        logging.getLogger("onnxprune").addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("onnxprune").removeHandler(self)
