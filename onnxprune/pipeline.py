"""The arrows of DESIGN §2, one function for each verb."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from onnxprune import __version__
from onnxprune.analyse import analyse_graph
from onnxprune.cost import stats, stats_after, stats_of
from onnxprune.data import Data, load_data, random_data
from onnxprune.density import warnings
from onnxprune.drift import measure_drift
from onnxprune.errors import UnsupportedModelError, UsageError, VerificationError
from onnxprune.groups import DependencyGraph
from onnxprune.io import Model, as_model, save
from onnxprune.latency import compare_timings, measure
from onnxprune.prepare import prepare
from onnxprune.recipe import Options, Recipe, build, embed, read
from onnxprune.report.build import NOT_VERIFIED, group_reports
from onnxprune.report.clock import Clock, Heard, Progress, peak_memory
from onnxprune.request import (
    AnyModel,
    Check,
    Mode,
    Request,
    check_level,
    check_outputs,
    check_sources,
)
from onnxprune.rewrite import Surgery, operate
from onnxprune.score import Scorer, choose
from onnxprune.select import PruningPlan
from onnxprune.shapes import environment
from onnxprune.standins import find_stand_ins
from onnxprune.twin import masked_twin
from onnxprune.types import Latency, Limits, Report, Shape, Verdict
from onnxprune.verify import verify as run_checks

_log = logging.getLogger(__name__)
_TRIES = 4  # random inputs tried until one shows more than the model's own noise
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
    allow_norm: bool = False,
    restore: str = "none",
    input_shapes: Mapping[str, Shape] | None = None,
    data: Path | str | Data | None = None,
    seed: int = 0,
    verify: str = "full",
    max_drift: float | None = None,
    min_cosine: float | None = None,
    min_top1: float | None = None,
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
        scope: ``local`` takes the ratio of each group, ``global`` of the whole model.
        importance: How channels are ranked, as in ``score``.
        round_to: Units left are a multiple of this.
        min_channels: Units that stay in every group.
        max_ratio: Most that ``global`` takes from any one group.
        ignore: Patterns of nodes and tensors whose groups are kept whole.
        only: Patterns; all other groups are kept whole.
        ratio_for: Another ratio for the groups that match a pattern.
        attention: As in ``analyse``.
        allow_norm: As in ``analyse``; such a cut is not exact, and the report says so.
        restore: Only ``none`` so far.
        input_shapes: Concrete shapes for symbolic inputs.
        data: Inputs for verification: an ``.npz`` file or ``Data``; None makes random ones.
        seed: For random inputs and ``importance="random"``.
        verify: ``none``, ``twin`` (is the surgery right) or ``full`` (drift too).
        max_drift: Most relative L2 difference of any output that is allowed.
        min_cosine: Least cosine of any output that is allowed.
        min_top1: Least share of samples with the same arg max that is allowed.
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
    limits = Limits(max_drift, min_cosine, min_top1)
    check_level(verify, limits, data)
    if ratio is not None and not 0 <= ratio < 1:
        raise UsageError(f"ratio is {ratio:g}", hint="give 0 <= ratio < 1")
    check_outputs(model, output, recipe_out, force=force)
    clock = Clock(progress)
    with Heard() as heard:
        given = None if recipe is None else recipe if isinstance(recipe, Recipe) else read(recipe)
        asked = Request(
            ratio, given, scope, importance, round_to, min_channels, max_ratio,
            tuple(ignore), tuple(only), dict(ratio_for or {}), attention, allow_norm,
            dict(input_shapes or {}), seed,
        )  # fmt: skip
        with clock.stage("load"):
            original = as_model(model)
            check_sources(original, output, recipe_out)
            check = Check(verify, limits, _given_data(data, original), seed)
        graph = _analyse(original, asked.shapes, asked.analysis, clock)
        if not graph.prunable:
            raise UnsupportedModelError(_nothing_prunable(graph))
        plan, method, why = asked.plan(graph, clock)
        with clock.stage("rewrite"):
            surgery = operate(plan)
            made, written = _with_recipe(surgery, original, asked.options(method))
        if not surgery.removed:
            _log.warning("nothing was cut: %s", _why_nothing(plan, round_to, ratio))
        verdict = _verify(graph, plan, made, check, clock)
        before, after = stats(graph), stats_after(graph, made, plan.keep)
        for said in warnings(before, after):
            _log.warning("%s", said)
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


def _analyse(
    model: Model, shapes: Mapping[str, Shape], mode: Mode, clock: Clock
) -> DependencyGraph:
    """``analyse`` with its two stages timed apart."""
    with clock.stage("prepare"):
        prepared = prepare(model)
        envs = tuple(
            environment(prepared, choice) for choice in find_stand_ins(prepared, shapes or None)
        )
    with clock.stage("analyse"):
        found = analyse_graph(prepared, envs, attention=mode.attention, allow_norm=mode.allow_norm)
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
    if all(plan.why[group.id].startswith("kept") for group in plan.graph.prunable):
        return "--ignore and --only keep every group"
    if round_to > 1:
        return f"ratio {ratio:g} and --round-to {round_to} leave every group whole"
    return f"ratio {ratio:g} is less than one channel of every group, or --min-channels keeps them"


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


def _given_data(data: Path | str | Data | None, model: Model) -> Data | None:
    return load_data(data, model) if isinstance(data, str | Path) else data


def made_up_data(graph: DependencyGraph, seed: int) -> Data:
    """Random inputs at the stand-in sizes of an analysis: two runs, of two sizes if it has two."""
    model = graph.graph.model
    if len(graph.envs) == 1:
        return random_data(model, seed=seed, shapes=graph.stand_ins)
    parts = [random_data(model, seed=seed, shapes=env.inputs, batches=1) for env in graph.envs]
    batches = tuple(batch for part in parts for batch in part.batches)
    return replace(parts[0], batches=batches, samples=sum(part.samples for part in parts))


def _verify(
    graph: DependencyGraph, plan: PruningPlan, made: Model, check: Check, clock: Clock
) -> Verdict:
    """The verdict on a result that may be written; a failed one raises."""
    if check.level == "none":
        return NOT_VERIFIED
    source, prepared = graph.graph.source, graph.graph.model
    twin = masked_twin(plan) if graph.exact(plan.keep) else None
    tries = range(check.seed, check.seed + (_TRIES if check.data is None else 1))
    with clock.stage("verify"):
        for seed in tries:
            data = check.data if check.data is not None else made_up_data(graph, seed)
            verdict = run_checks(
                source, made, twin=twin, data=data, level=check.level, limits=check.limits
            )
            if prepared is not source and verdict.status == "passed":
                # The twin has computed weights as constants: that must be the same function.
                same = run_checks(
                    source, prepared, twin=None, data=data, level="twin", lossless=True
                )
                if same.status == "failed":
                    verdict = replace(same, reason=f"weights computed ahead: {same.reason}")
            # What one random input cannot tell from rounding, another may.
            if verdict.status != "not_run":
                break
    if verdict.status == "failed":
        hint = _BUG if verdict.ours else "nothing was written"
        raise VerificationError(verdict.reason, hint=hint)
    if verdict.status == "not_run" and check.limits != Limits():
        raise VerificationError(
            f"{verdict.reason}, so your limit cannot be judged", hint="nothing was written"
        )
    if verdict.status == "not_run":
        _log.warning("not verified: %s", verdict.reason)
    return verdict


# -- inspect and compare ---------------------------------------------------------------------------


def inspect(
    model: AnyModel,
    *,
    input_shapes: Mapping[str, Shape] | None = None,
    attention: str = "heads",
    allow_norm: bool = False,
    progress: Progress | None = None,
) -> tuple[DependencyGraph, Report]:
    """What can be pruned, what cannot and why, and what it all costs.

    Args:
        model: A path, a loaded model, or a message.
        input_shapes: Concrete shapes for symbolic inputs.
        attention: As in ``analyse``.
        allow_norm: As in ``analyse``.
        progress: Called with the name of each stage as it begins.

    Returns:
        The analysis and the report.
    """
    clock = Clock(progress)
    with Heard() as heard:
        with clock.stage("load"):
            original = as_model(model)
        graph = _analyse(original, input_shapes or {}, Mode(attention, allow_norm), clock)
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
    latency: bool = False,
    threads: int | None = 1,
    progress: Progress | None = None,
) -> Report:
    """How far the outputs of ``second`` lie from those of ``first``, and what each costs.

    Args:
        first: The reference: a path, a loaded model, or a message.
        second: The model to compare with it; it has the same inputs and outputs.
        input_shapes: Concrete shapes for symbolic inputs.
        data: Inputs: an ``.npz`` file or ``Data``; None makes random ones.
        seed: For random inputs.
        latency: Also time both models, in turn.
        threads: For that; None takes one for each usable core.
        progress: Called with the name of each stage as it begins.

    Raises:
        UsageError: Inputs or outputs have other names.
        VerificationError: ONNX Runtime cannot run one of the models.
    """
    clock = Clock(progress)
    with Heard() as heard:
        with clock.stage("load"):
            before, after = as_model(first), as_model(second)
            _check_interfaces(before, after)
            fed = _given_data(data, before)
        graph = _analyse(before, input_shapes or {}, Mode(), clock)
        with clock.stage("verify"):
            fed = fed if fed is not None else made_up_data(graph, seed)
            drift = measure_drift(before, after, fed)
        timed = _latency(before, after, fed, threads) if latency else None
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
        latency=timed,
    )


def _latency(first: Model, second: Model, data: Data, threads: int | None) -> Latency:
    old, new = measure([first, second], data.batches[0], threads=threads)
    value, low, high = compare_timings(old, new)
    return Latency(old.seconds, new.seconds, value, low, high, new.runs, threads)


def _check_interfaces(first: Model, second: Model) -> None:
    for kind in ("input", "output"):
        names, other = (
            [value.name for value in getattr(model.proto.graph, kind)] for model in (first, second)
        )
        if names != other:
            raise UsageError(f"the models have different {kind}s: {names} and {other}")
