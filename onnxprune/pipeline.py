"""The arrows of DESIGN §2, one function for each verb."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from onnx import TensorProto

from onnxprune import __version__
from onnxprune.aim import check_targets
from onnxprune.analyse import analyse_graph
from onnxprune.checking import check_target, checked_result
from onnxprune.checks import (
    AnyModel,
    Check,
    check_allowance,
    check_kinds,
    check_level,
    check_mappings,
    check_outputs,
    check_patterns,
    check_restore,
    check_sources,
)
from onnxprune.cost import stats, stats_after, stored_bytes
from onnxprune.curves import Allowance
from onnxprune.data import AnyData, Data, as_data, random_data
from onnxprune.density import warnings
from onnxprune.drift import measure_drift
from onnxprune.errors import BUG, RecipeError, UnsupportedModelError, UsageError, VerificationError
from onnxprune.feeds import Batch
from onnxprune.groups import DependencyGraph
from onnxprune.held import check_held, held_weights
from onnxprune.impose import (
    afterwards,
    by_method,
    check_replay,
    impose,
    measured_against,
    sparsified,
    wants_rounding,
)
from onnxprune.io import Model, as_model, save_with, write_texts
from onnxprune.iterate import shares
from onnxprune.latency_target import feeds_of
from onnxprune.lossless import without_effect
from onnxprune.prepare import prepare
from onnxprune.quantize.convert import TYPES, Converted, check_options, check_zeros, convert
from onnxprune.recipe import (
    Options,
    QuantizeOptions,
    Recipe,
    build,
    embed,
    read,
    requantized,
    warn_of_other_data,
)
from onnxprune.report.build import NOT_VERIFIED, group_reports
from onnxprune.report.clock import Clock, Heard, Progress, peak_memory
from onnxprune.report.layers import layer_reports
from onnxprune.report.ops import nothing_prunable
from onnxprune.request import Mode, Request
from onnxprune.restoring import Restored, restored
from onnxprune.rewrite import Surgery, operate
from onnxprune.runtime import accepts
from onnxprune.score import Scorer, choose
from onnxprune.select import PruningPlan, patterns
from onnxprune.shapes import environment
from onnxprune.standins import find_stand_ins
from onnxprune.targets.trtexec import next_step
from onnxprune.thin import Thinned
from onnxprune.tidy import Tidy, check_tidied, tidied
from onnxprune.timed import latency_of, timed_in_turn, timing_wanted
from onnxprune.twin import masked_twin
from onnxprune.types import Limits, Report, Shape, Verdict
from onnxprune.valued import imposed
from onnxprune.verify import ABSORBED_TOLERANCE
from onnxprune.verify import verify as run_checks

_log = logging.getLogger(__name__)
_TRIES = 4  # random inputs tried until one shows more than the model's own noise


# -- shrink ----------------------------------------------------------------------------------------


def shrink(
    model: AnyModel,
    *,
    ratio: float | None = None,
    lossless: bool = False,
    recipe: Path | str | Recipe | None = None,
    targets: Mapping[str, float] | None = None,
    scope: str | None = None,
    importance: str | Scorer = "auto",
    aggregate: str | None = None,
    round_to: int | str | None = None,
    min_channels: int = 1,
    max_ratio: float = 0.9,
    ignore: str | Sequence[str] = (),
    only: str | Sequence[str] = (),
    ratio_for: Mapping[str, float] | None = None,
    sensitivity: Path | str | None = None,
    max_loss: float | None = None,
    attention: str = "auto",
    allow_norm: bool = False,
    restore: str = "auto",
    steps: int = 1,
    schedule: str = "polynomial",
    then: str | None = None,
    sparsity: float | None = None,
    quantize: str | None = None,
    fold_bn: bool = False,
    simplify: bool = False,
    latency: bool | None = False,
    threads: int | None = 1,
    input_shapes: Mapping[str, Shape] | None = None,
    data: AnyData | None = None,
    seed: int = 0,
    verify: str = "full",
    max_drift: float | None = None,
    min_cosine: float | None = None,
    min_top1: float | None = None,
    check_for: str | None = None,
    output: Path | str | None = None,
    recipe_out: Path | str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> tuple[Model, Report]:
    """Make a model smaller: load, analyse, score, select, rewrite, verify and save.

    Args:
        model: A path, a loaded model, or a message.
        ratio: Share of channels to remove, 0 <= ratio < 1; this, ``sensitivity``, ``lossless`` or
            ``recipe``.
        lossless: Remove every channel that provably has no effect, and no other.
        recipe: A recipe to repeat, or the file that has it (.json, or a model made by onnxprune).
        targets: Instead of a ratio the share to be left of ``macs``, ``params``, ``bytes`` or
            ``latency``, by name; of several the hardest binds. Latency is that of one thread of
            ONNX Runtime on this machine: predicted, then measured.
        scope: ``local`` takes the ratio of each group, ``global`` of the whole model,
            ``isomorphic`` of all groups of a kind. None: local for a ratio, isomorphic for targets.
        importance: How channels are ranked, as in ``score``. ``auto`` tries several rankings on
            calibration data and takes the one whose cut moves the outputs least.
        aggregate: As in ``score``.
        round_to: Units left are a multiple of this; ``auto`` takes what suits the hardware. None:
            1 for a ratio; for targets 16, 8, 4 or 1, the first that comes within 0.01;
            ``auto`` where latency or ``then`` counts.
        min_channels: Units that stay in every group.
        max_ratio: Most that ``global`` takes from any one group.
        ignore: Pattern or patterns of nodes and tensors whose groups are kept whole.
        only: Pattern or patterns; all other groups are kept whole.
        ratio_for: Another ratio for the groups that match a pattern.
        sensitivity: What the verb ``sensitivity`` wrote for this model: each group loses as much
            as ``max_loss`` allows it alone, and no more than ``ratio`` if that is given too.
        max_loss: Most that a group may lose, in the measure of that file.
        attention: As in ``analyse``; ``auto`` tries heads and dims where a refit follows and takes
            what moves the outputs less, and takes heads elsewhere.
        allow_norm: As in ``analyse``; such a cut is not exact, and the report says so.
        restore: How accuracy comes back without training: ``bias`` folds the mean of what was
            dropped into its readers' biases and needs no data, ``refit`` fits every layer to
            calibration data, ``pictures`` to made-up pictures where there is no data and the model
            takes a picture (else it is ``bias``), ``none`` leaves plain slices; ``auto`` is
            ``refit`` with data and ``bias`` without.
        steps: In how many steps to cut: what is left is ranked again, and restored, after each.
        schedule: How much goes in each step: ``polynomial`` takes much at first, ``linear`` equal
            shares.
        then: Sparsity pattern such as ``2:4`` to impose on what is left: as a part of the refit
            where there is one, else the smallest weights go. Patterns that imply no share take
            half.
        sparsity: Share of weights that ``then`` takes; None is what N:M implies, or half.
        quantize: ``fp16``, ``bf16`` or ``int8``: write what is left in that, as the verb
            ``quantize`` does. A recipe that says so is repeated so.
        fold_bn: At last fold BatchNormalization, and scales and shifts, into the layers beside.
        simplify: At last compute what is constant, and leave out what does nothing or is there
            twice.
        latency: Time original and result in ONNX Runtime, in turn; None does so where it is quick.
        threads: For that; None takes one for each usable core.
        input_shapes: Concrete shapes for symbolic inputs.
        data: Calibration data, for ranking, restoring and verification: an ``.npz`` file,
            arrays by input name, or ``Data``; None verifies on random inputs.
        seed: For random inputs and ``importance="random"``.
        verify: ``none``, ``twin`` (is the surgery right) or ``full`` (drift too).
        max_drift: Most relative L2 difference of any output that is allowed.
        min_cosine: Least cosine of any output that is allowed.
        min_top1: Least share of samples with the same arg max that is allowed.
        check_for: A target that must take the result, ``tensorrt``: our rules say what it minds,
            and TensorRT-RTX builds the result if it is installed.
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
        RecipeError: The recipe does not fit, or is one of ``sparsify``.
        VerificationError: The result is wrong (our bug), or passes a limit, or cannot be run.
        TargetError: A target is out of reach.
    """
    check_kinds(
        numbers={
            "ratio": ratio, "sparsity": sparsity, "max_ratio": max_ratio, "max_loss": max_loss,
            "max_drift": max_drift, "min_cosine": min_cosine, "min_top1": min_top1,
        },
        wholes={"min_channels": min_channels, "seed": seed},
        texts={
            "scope": scope, "aggregate": aggregate, "attention": attention, "restore": restore,
            "schedule": schedule, "then": then, "verify": verify,
        },
    )  # fmt: skip
    check_patterns(ignore=ignore, only=only)
    check_mappings(targets=targets, ratio_for=ratio_for, input_shapes=input_shapes)
    by_ratio = ratio is not None or sensitivity is not None
    if [by_ratio, bool(targets), lossless, recipe is not None].count(True) != 1:
        raise UsageError("give one of ratio, target, lossless and recipe", hint="--ratio 0.5")
    check_targets(targets or {})
    if round_to != "auto" and isinstance(round_to, bool | str | float):
        raise UsageError(f"round-to is '{round_to}'", hint="give a whole number, or auto")
    if not (isinstance(importance, str) or callable(importance)):
        raise UsageError(f"importance is {importance!r}", hint="give a name, or a function")
    check_allowance(sensitivity, max_loss, scope)
    check_restore(restore, data)
    shares(steps, schedule)
    limits = Limits(max_drift, min_cosine, min_top1)
    check_level(verify, limits)
    check_target(check_for)
    if ratio is not None and not 0 <= ratio < 1:
        raise UsageError(f"ratio is {ratio:g}", hint="give 0 <= ratio < 1")
    check_outputs(model, output, recipe_out, force=force, read=(recipe, data))
    pattern = afterwards(then, sparsity)
    wished = None if quantize is None else precision(quantize, data)
    clock = Clock(progress)
    with Heard() as heard:
        given = None if recipe is None else recipe if isinstance(recipe, Recipe) else read(recipe)
        if given is not None and given.thins_only:
            raise RecipeError(
                "the recipe thins weights and removes no channels",
                hint="sparsify --recipe repeats it",
            )
        asked = Request(
            ratio, given, scope, importance, round_to, min_channels, max_ratio,
            patterns(ignore), patterns(only), dict(ratio_for or {}), attention, allow_norm,
            dict(input_shapes or {}), seed, lossless,
            None if sensitivity is None else Allowance.read(sensitivity, max_loss or 0.0),
            dict(targets or {}), aggregate, restore, steps, schedule, pattern, fold_bn, simplify,
            wished,
        )  # fmt: skip
        wished = asked.precision
        if wished is not None:
            check_options(wished, data)
        with clock.stage("load"):
            original = as_model(model)
            check_sources(original, output, recipe_out)
            check = Check(verify, limits, as_data(data, original), seed)
        graph = analysed(original, asked.shapes, asked.analysis, clock)
        if not graph.prunable and not (asked.exactly and any(asked.tidying)):
            raise UnsupportedModelError(nothing_prunable(graph))
        (plan, method, why), times, rounding = asked.timed_plan(graph, check.data, clock)
        graph = plan.graph  # without effect may be what no weight reads
        with clock.stage("rewrite"):
            surgery = operate(plan)
        if not surgery.removed:
            _log.warning("nothing was cut: %s", _why_nothing(plan, asked))
        to_restore = surgery.removed or asked.sparse is not None
        restoring = asked.restoring(check.data) if to_restore else "none"
        if given is not None and given.options.restore == "refit" and restoring != "refit":
            _log.warning(
                "the recipe's weights were refitted to data, these are not: "
                "give data to refit them again"
            )
        elif given is not None:
            warn_of_other_data(given, check.data)
        later = (  # then drift is measured at the end
            restoring != "none" or asked.sparse is not None or any(asked.tidying)
        ) or wished is not None
        level = "twin" if later and check.level == "full" else check.level
        verdict = _verify(
            graph, plan, surgery.model, replace(check, level=level), clock, lossless=asked.exactly
        )
        recovered = thinned = None
        whole = surgery.model
        plain, sparse = whole, asked.sparse_after(restoring)
        unfitted = sparse is not None and sparse.method == "magnitude" and given is None
        if (
            sparse is not None
            and unfitted
            and (restoring == "pictures" or _left_to_us(asked, check))
        ):
            _log.warning("without a refit to data %s takes the smallest weights", sparse.pattern)
        if restoring != "none":
            with clock.stage("restore"):
                patterned = {} if sparse is None else imposed(whole, sparse)
                recovered = restored(plan, surgery, restoring, check, clock, patterned)
            surgery, restoring = recovered.surgery, recovered.how
            whole = surgery.model
        if sparse is not None:
            with clock.stage("sparsify"):
                thinned = impose(whole, sparse)
                if recovered is not None:
                    thinned = by_method(thinned, recovered.layers, sparse.method)
                    thinned = measured_against(plain, thinned)
                if given is not None:
                    check_replay(given, thinned)
                elif (said := wants_rounding(thinned, rounding)) is not None:
                    _log.warning("%s", said)
            surgery = replace(surgery, model=thinned.model)
        tidy, shifted = None, len(surgery.restored)
        if any(asked.tidying):
            with clock.stage("fold"):
                tidy = made_tidy(surgery.model, graph, thinned, asked.tidying, check)
            names = dict.fromkeys((*surgery.restored, *tidy.changed))
            surgery = replace(surgery, model=tidy.model, restored=tuple(names))
        narrow = None
        if wished is not None:
            with clock.stage("quantize"):
                measured = check.data if check.data is not None else made_up_data(graph, seed)
                narrow = convert(surgery.model, wished, check.data, measured)
                if verify != "none":
                    check_zeros(narrow.plain, narrow.model)
        if later:
            verdict = _measured(graph, surgery.model, verdict, check, clock, recovered, narrow)
        mode = plan.graph.tracer.attention
        options = asked.options(method, restoring, mode, sparse, check.data, rounding)
        made, written = _with_recipe(surgery, original, options, thinned, tidy)
        before, after = stats(graph), stats_after(graph, made, plan.keep)
        for said in warnings(before, after):
            _log.warning("%s", said)
        if narrow is not None:
            base = made if written else embed(made, _empty_recipe(made, original, options))
            made = requantized(narrow.model, base, narrow.options, __version__)
            written = read(made)
            after = replace(after, bytes=stored_bytes(made))
        changed = tidy is not None or narrow is not None
        if timing_wanted(latency, verdict, before) and (times is None or changed):
            with clock.stage("time"):
                feeds = feeds_of(graph, check.data, seed)
                times = timed_in_turn(original, made, feeds, threads, quick=latency is None)
        known = [env.inputs for env in graph.envs]
        checked = None
        if check_for is not None:
            checked = checked_result(original, made, output, known, clock)
        with clock.stage("save"):
            recipes: dict[Path, str] = {}
            if recipe_out is not None:
                kept = written or _empty_recipe(made, original, options)
                recipes[Path(recipe_out)] = kept.readable()
            files = write_texts(recipes) if output is None else save_with(
                made, output, recipes, force=force,
                check=None if verify == "none" else _pattern_check(
                    None if tidy is not None else whole, thinned, narrow
                ),
            )  # fmt: skip
            if output is not None:
                size = sum(count for path, count in files.items() if path not in recipes)
                after = replace(after, bytes=size)
    return made, Report(
        verb="shrink",
        input_path=str(original.path or ""),
        before=before,
        output_path=None if output is None else str(output),
        after=after,
        importance=method,
        importance_why=why,
        exact=graph.exact(plan.keep),
        groups=group_reports(
            graph,
            plan.keep,
            plan.why,
            aligned=asked.round_to not in (None, 1),
            coming=asked.coming,
        ),
        verdict=verdict,
        stand_ins=graph.stand_ins,
        seconds=clock.seconds,
        peak_memory_bytes=peak_memory(),
        warnings=tuple(heard.messages),
        recipe={} if written is None else written.as_json(),
        restored=() if recovered is None else recovered.layers,
        shifted=shifted,
        written=tuple(files),
        latency=times,
        layers=layer_reports(graph, before, after, asked.coming),
        rounded=asked.rounding != 1,
        round_to=options.round_to,
        sparsified=None
        if thinned is None or sparse is None
        else sparsified(thinned, sparse, whole, made, xz=False),
        checked=checked,
        following=None if output is None else next_step(made, str(output), known),
        tidied=None if tidy is None else tidy.said,
        quantized=None if narrow is None else narrow.found,
    )


def analysed(
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


def _left_to_us(asked: Request, check: Check) -> bool:
    """Whether there are data, and nobody said what to do with them."""
    return asked.restore == "auto" and check.data is not None


def _why_nothing(plan: PruningPlan, asked: Request) -> str:
    round_to, ratio = asked.rounding, asked.ratio
    if asked.exactly:
        return "no channel is without effect"
    if asked.allowance is not None:
        return f"no group may lose a channel at --max-loss {asked.allowance.max_loss:g}"
    if not ratio and not asked.targets:
        return "the ratio is 0" if ratio is not None else "the recipe removes nothing"
    if all(plan.why[group.id].startswith("kept") for group in plan.graph.prunable):
        return "ignore and only keep every group"
    if asked.targets:
        return "the targets ask for nothing less than there is"
    if round_to != 1:
        return f"ratio {ratio:g} and round-to {round_to} leave every group whole"
    return f"ratio {ratio:g} is less than one channel of every group, or min-channels keeps them"


def _with_recipe(
    surgery: Surgery,
    original: Model,
    options: Options,
    thinned: Thinned | None,
    tidy: Tidy | None,
) -> tuple[Model, Recipe | None]:
    """The new model with its recipe inside; unchanged, and no recipe, where nothing was done."""
    sparse = () if thinned is None else thinned.done
    same = tidy is None or not tidy.anything
    if not surgery.removed and not sparse and same:
        return surgery.model, None
    merged = () if tidy is None else tidy.into
    written = build(original, surgery, options, __version__, sparse, merged=merged)
    return embed(surgery.model, written), written


def precision(to: str, data: object) -> QuantizeOptions:
    """What ``shrink`` asks of quantization.

    Raises:
        UsageError: There is no such type, or it lacks what it needs.
    """
    if to not in TYPES:
        raise UsageError(f"quantize is '{to}'", hint="give fp16, bf16 or int8")
    options = QuantizeOptions(to=to)  # type: ignore[arg-type]  # checked above
    check_options(options, data)
    return options


def _pattern_check(
    whole: Model | None, thinned: Thinned | None, narrow: Converted | None
) -> Callable[[Model], None] | None:
    """What is asked of the written file where a pattern was imposed, or weights quantized."""
    if narrow is not None:
        return lambda written: check_zeros(narrow.plain, written)
    if thinned is None:
        return None
    return lambda written: check_held(whole, written, thinned)


def made_tidy(
    model: Model,
    graph: DependencyGraph,
    thinned: Thinned | None,
    how: tuple[bool, bool],
    check: Check,
) -> Tidy:
    """Norms folded and the rest simplified, as ``how`` says, and checked to compute the same.

    Raises:
        VerificationError: It does not.
    """
    keep = () if thinned is None else tuple(str(one.tensor) for one in thinned.done)
    tidy = tidied(model, fold_bn=how[0], simplify=how[1], keep=keep)
    if check.level != "none" and tidy.anything:
        data = check.data if check.data is not None else made_up_data(graph, check.seed)
        check_tidied(model, tidy.model, data)
    return tidy


def _empty_recipe(made: Model, original: Model, options: Options) -> Recipe:
    """What was asked for, where that removed nothing."""
    return build(original, Surgery(made, (), {}, (), ()), options, __version__)


# -- verification ----------------------------------------------------------------------------------


def made_up_data(graph: DependencyGraph, seed: int) -> Data:
    """Random inputs at the stand-in sizes of an analysis: two runs, of two sizes if it has two."""
    model = graph.graph.model
    if len(graph.envs) == 1:
        return random_data(model, seed=seed, shapes=graph.stand_ins)
    parts = [random_data(model, seed=seed, shapes=env.inputs, batches=1) for env in graph.envs]
    batches = tuple(batch for part in parts for batch in part.batches)
    return replace(parts[0], batches=batches, samples=sum(part.samples for part in parts))


def _verify(
    graph: DependencyGraph,
    plan: PruningPlan,
    made: Model,
    check: Check,
    clock: Clock,
    *,
    lossless: bool,
) -> Verdict:
    """The verdict on a result that may be written; a failed one raises."""
    if check.level == "none":
        return NOT_VERIFIED
    source, prepared = graph.graph.source, graph.graph.model
    twin = masked_twin(plan) if graph.exact(plan.keep) and not lossless else None
    tries = range(check.seed, check.seed + (_TRIES if check.data is None else 1))
    with clock.stage("verify"):
        for seed in tries:
            data = check.data if check.data is not None else made_up_data(graph, seed)
            verdict = run_checks(
                source,
                made,
                twin=twin,
                data=data,
                level=check.level,
                limits=check.limits,
                lossless=lossless,
                tolerance=ABSORBED_TOLERANCE if plan.absorbed else None,
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
    return judged(verdict, check.limits)


def quantized_verdict(original: Model, made: Converted, data: Data, check: Check) -> Verdict:
    """The verdict on a quantized model that may be written; a failed one raises.

    Raises:
        VerificationError: It is wrong, or passes a limit, or cannot be run.
    """
    verdict = run_checks(
        original,
        made.model,
        twin=None,
        data=data,
        level=check.level,
        limits=check.limits,
        runs_as=made.runs_as,
    )
    notes = verdict.notes
    if made.found.to == "bf16":
        notes += ("ONNX Runtime has no bfloat16 kernels on a CPU: this is an emulation that rounds "
                  "after every node",)  # fmt: skip
    elif made.found.to == "fp16":
        refused = accepts(made.model, _halved(made.model, data.probes[0]))
        if refused is not None:
            raise VerificationError(f"quantized model: {refused}", hint=BUG)
        notes += ("rounded after every node, as hardware does and ONNX Runtime on a CPU does not",)
    return judged(replace(verdict, notes=notes), check.limits)


def _halved(model: Model, batch: Batch) -> Batch:
    """A batch in the types of a model's inputs."""
    wanted = {value.name: value.type.tensor_type.elem_type for value in model.proto.graph.input}
    return {
        name: array.astype(np.float16) if wanted.get(name) == TensorProto.FLOAT16 else array
        for name, array in batch.items()
    }


def judged(verdict: Verdict, limits: Limits) -> Verdict:
    """A verdict on a result that may be written; a failed one raises."""
    if verdict.status == "failed":
        hint = BUG if verdict.ours else "nothing was written"
        raise VerificationError(verdict.reason, hint=hint)
    if verdict.status == "not_run" and limits != Limits():
        raise VerificationError(
            f"{verdict.reason}, so your limit cannot be judged", hint="nothing was written"
        )
    if verdict.status == "not_run":
        _log.warning("not verified: %s", verdict.reason)
    return verdict


def _measured(
    graph: DependencyGraph,
    made: Model,
    proved: Verdict,
    check: Check,
    clock: Clock,
    recovered: Restored | None,
    narrow: Converted | None,
) -> Verdict:
    """The verdict on what is written: the proof of the plain cut, and its own drift."""
    if check.level == "none":
        return proved
    unseen = None if recovered is None else recovered.unseen
    data = check.data if check.data is not None else unseen
    data = data if data is not None else made_up_data(graph, check.seed)
    with clock.stage("verify"):
        source = graph.graph.source
        if narrow is not None:
            found = quantized_verdict(source, narrow, data, check)
        else:
            found = run_checks(
                source, made, twin=None, data=data, level=check.level, limits=check.limits
            )
    if found.status == "failed":
        hint = BUG if found.ours else "nothing was written"
        raise VerificationError(found.reason, hint=hint)
    notes = (*proved.notes, *found.notes)
    if recovered is None:
        return replace(proved, drift=found.drift, inputs=found.inputs, notes=notes)
    if recovered.how == "refit" and found.drift:
        notes = (*notes, "the model was refitted to these inputs: on others the drift is larger")
    if recovered.note and recovered.surgery.restored:
        notes = (*notes, recovered.note)
    return replace(proved, drift=found.drift, inputs=found.inputs, notes=notes)


# -- inspect and compare ---------------------------------------------------------------------------


def inspect(
    model: AnyModel,
    *,
    input_shapes: Mapping[str, Shape] | None = None,
    attention: str = "heads",
    allow_norm: bool = False,
    sparsity: bool = False,
    progress: Progress | None = None,
) -> tuple[DependencyGraph, Report]:
    """What can be pruned, what cannot and why, and what it all costs.

    Args:
        model: A path, a loaded model, or a message.
        input_shapes: Concrete shapes for symbolic inputs.
        attention: As in ``analyse``.
        allow_norm: As in ``analyse``.
        sparsity: Also look what sparsity the weight of every layer has.
        progress: Called with the name of each stage as it begins.

    Returns:
        The analysis and the report.
    """
    check_kinds(texts={"attention": attention})
    check_mappings(input_shapes=input_shapes)
    clock = Clock(progress)
    with Heard() as heard:
        with clock.stage("load"):
            original = as_model(model)
        graph = analysed(original, input_shapes or {}, Mode(attention, allow_norm), clock)
        method, why = choose(graph) if graph.prunable else ("", nothing_prunable(graph))
        with clock.stage("select"):
            idle = without_effect(graph)
        with clock.stage("sparsity"):
            held = tuple(held_weights(original)) if sparsity else None
    cost = stats(graph)
    return graph, Report(
        verb="inspect",
        input_path=str(original.path or ""),
        before=cost,
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
        without_effect=idle,
        layers=layer_reports(graph, cost),
        held=held,
    )


def compare(
    first: AnyModel,
    second: AnyModel,
    *,
    input_shapes: Mapping[str, Shape] | None = None,
    data: AnyData | None = None,
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
        data: Inputs: an ``.npz`` file, arrays by input name, or ``Data``; None makes random ones.
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
            fed = as_data(data, before)
        graph = analysed(before, input_shapes or {}, Mode(), clock)
        with clock.stage("verify"):
            fed = fed if fed is not None else made_up_data(graph, seed)
            drift = measure_drift(before, after, fed)
        other = analysed(after, graph.stand_ins, Mode(), clock)
        timed = latency_of(before, after, fed.batches[0], threads=threads) if latency else None
    costs = stats(graph), stats(other)
    return Report(
        verb="compare",
        input_path=str(before.path or ""),
        before=costs[0],
        output_path=str(after.path or ""),
        after=costs[1],
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
        layers=layer_reports(other, *costs),
    )


def _check_interfaces(first: Model, second: Model) -> None:
    for kind in ("input", "output"):
        names, other = (
            [value.name for value in getattr(model.proto.graph, kind)] for model in (first, second)
        )
        if names != other:
            raise UsageError(f"the models have different {kind}s: {names} and {other}")
