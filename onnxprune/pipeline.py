"""The arrows of DESIGN §2, one function for each verb."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from onnxprune.aim import check_targets
from onnxprune.analysing import analysed
from onnxprune.checking import check_target
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
from onnxprune.cost import stats
from onnxprune.curves import Allowance
from onnxprune.data import AnyData, as_data
from onnxprune.drift import measure_drift
from onnxprune.errors import RecipeError, UsageError
from onnxprune.groups import DependencyGraph
from onnxprune.held import held_weights
from onnxprune.impose import afterwards
from onnxprune.io import as_model
from onnxprune.iterate import shares
from onnxprune.lossless import without_effect
from onnxprune.model import Model
from onnxprune.quantize.asked import check_options, options_of
from onnxprune.recipe import Recipe, read
from onnxprune.report.build import NOT_VERIFIED, group_reports
from onnxprune.report.clock import Clock, Heard, Progress, peak_memory
from onnxprune.report.layers import layer_reports
from onnxprune.report.ops import nothing_prunable
from onnxprune.request import Mode, Request
from onnxprune.score import Scorer, choose
from onnxprune.select import patterns
from onnxprune.shrinking import Shrinking
from onnxprune.timed import latency_of
from onnxprune.types import Limits, Report, Shape, Verdict
from onnxprune.verdicts import made_up_data
from onnxprune.writing import Writing

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
    wished = None if quantize is None else options_of(quantize, data, called="quantize")
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
        if asked.precision is not None:
            check_options(asked.precision, data)
        with clock.stage("load"):
            original = as_model(model)
            check_sources(original, output, recipe_out)
            check = Check(verify, limits, as_data(data, original), seed)
        writing = Writing(output, force, recipe_out, check_for, latency, threads)
        run = Shrinking(asked, original, check, clock)
        made = run.run(writing)
    return made, run.report(writing, tuple(heard.messages))


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
