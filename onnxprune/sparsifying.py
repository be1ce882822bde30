"""The verb ``sparsify``: load, find layers, thin them, verify, save."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from onnxprune import __version__
from onnxprune.analysing import analysed
from onnxprune.checking import check_target, checked_result
from onnxprune.checks import (
    AnyModel,
    Check,
    check_kinds,
    check_level,
    check_mappings,
    check_outputs,
    check_patterns,
    check_sources,
)
from onnxprune.cost import stats
from onnxprune.data import AnyData, as_data, digest_of
from onnxprune.errors import BUG, RecipeError, UsageError, VerificationError
from onnxprune.files import write_texts
from onnxprune.groups import DependencyGraph
from onnxprune.held import check_held
from onnxprune.impose import (
    by_method,
    check_method,
    check_replay,
    impose,
    measured_against,
    options_of,
    sparsified,
    wish_of,
)
from onnxprune.io import as_model, save_with
from onnxprune.latency_target import feeds_of
from onnxprune.model import Model
from onnxprune.patterns import NM
from onnxprune.recipe import (
    Options,
    Recipe,
    SparsifyOptions,
    build,
    embed,
    read,
    same_layout,
    warn_of_other_data,
)
from onnxprune.reorder import Reordered, reordered, repeated
from onnxprune.report.build import NOT_VERIFIED
from onnxprune.report.clock import Clock, Heard, Progress, peak_memory
from onnxprune.report.layers import layer_reports
from onnxprune.report.sparse import thin_csv
from onnxprune.request import Mode
from onnxprune.rewrite import Surgery
from onnxprune.select import patterns as globs
from onnxprune.targets.trtexec import next_step
from onnxprune.thin import MAGNITUDE, Thinned, Wish, candidates
from onnxprune.timed import timed_in_turn, timing_wanted
from onnxprune.types import Limits, Moved, Report, Shape, Verdict
from onnxprune.valued import chosen, valued
from onnxprune.verdicts import judged, made_tidy, made_up_data
from onnxprune.verify import verify as run_checks

_log = logging.getLogger(__name__)


def sparsify(
    model: AnyModel,
    *,
    pattern: str = "2:4",
    sparsity: float | None = None,
    scope: str = "local",
    method: str = "auto",
    recipe: Path | str | Recipe | None = None,
    ignore: str | Sequence[str] = (),
    only: str | Sequence[str] = (),
    only_gain: bool = False,
    permute: bool = False,
    xz: bool | None = None,
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
    table: Path | str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> tuple[Model, Report]:
    """Impose a fine-grained sparsity pattern on the weights of all layers that can take it.

    Zeros are stored like any other value. By magnitude nothing but those weights changes; with data
    biases and norms of the layers do too.

    Args:
        model: A path, a loaded model, or a message.
        pattern: ``2:4`` or another N:M (N of every M weights stay, along the axis that is summed
            over), ``1xN`` and ``Nx1`` vectors, ``BxB`` blocks, ``kernel`` or ``unstructured``.
        sparsity: Share that goes, 0 < sparsity < 1; N:M implies its own.
        scope: ``local`` takes the share of each layer, ``global`` of all layers together, the
            smallest magnitudes first.
        method: How values are chosen: ``magnitude`` keeps the largest; ``wanda`` weighs them by
            what they read, ``sparsegpt`` gives those that stay new values; both need ``data``.
            ``auto`` is ``sparsegpt`` with data and scope ``local``, ``magnitude`` otherwise.
        recipe: A recipe to repeat, or the file that has it (.json, or a model made by onnxprune);
            then ``pattern`` and what follows it are not used.
        ignore: Pattern or patterns of nodes and tensors that stay dense.
        only: Pattern or patterns; all other layers stay dense.
        only_gain: Leave layers dense that no GPU is expected to run faster.
        permute: First put channels into an order in which an N:M pattern keeps more; the function
            stays the same.
        xz: Measure what xz makes of the model before and after; None does so where it is quick.
        fold_bn: As in ``shrink``; the pattern still holds.
        simplify: As in ``shrink``.
        latency: As in ``shrink``.
        threads: As in ``shrink``.
        input_shapes: Concrete shapes for symbolic inputs.
        data: Inputs to choose values by and to verify on: an ``.npz`` file, arrays by input name,
            or ``Data``; None verifies on random ones.
        seed: For random inputs.
        verify: ``none``, ``twin`` (is the pattern in the file, does it load and run) or ``full``
            (drift too).
        max_drift: Most relative L2 difference of any output that is allowed.
        min_cosine: Least cosine of any output that is allowed.
        min_top1: Least share of samples with the same arg max that is allowed.
        check_for: A target that must take the result, as in ``shrink``.
        output: File to write, or None.
        recipe_out: File to write the recipe to, or None.
        table: File to write the layers to, as comma-separated values, or None.
        force: Overwrite what exists.
        progress: Called with the name of each stage as it begins.

    Returns:
        The sparse model and the report.

    Raises:
        UsageError: An option or an output path cannot be used.
        ModelError: The model is unreadable or invalid.
        UnsupportedModelError: No layer can take the pattern.
        RecipeError: The recipe does not fit.
        VerificationError: The result is wrong (our bug), or passes a limit, or cannot be run.
    """
    check_kinds(
        numbers={
            "sparsity": sparsity, "max_drift": max_drift, "min_cosine": min_cosine,
            "min_top1": min_top1,
        },
        wholes={"seed": seed},
        texts={"pattern": pattern, "scope": scope, "method": method, "verify": verify},
    )  # fmt: skip
    if pattern is None:
        raise UsageError("pattern is None", hint="give 2:4, or another pattern")
    check_patterns(ignore=ignore, only=only)
    check_mappings(input_shapes=input_shapes)
    check_method(method)
    limits = Limits(max_drift, min_cosine, min_top1)
    check_level(verify, limits)
    check_target(check_for)
    check_outputs(model, output, recipe_out, table, force=force, read=(recipe, data))
    given = None if recipe is None else recipe if isinstance(recipe, Recipe) else read(recipe)
    if given is None:
        wish = Wish.read(
            pattern, sparsity, scope=scope, ignore=globs(ignore), only=globs(only),
            only_gain=only_gain,
        )  # fmt: skip
        if permute and not isinstance(wish.pattern, NM):
            raise UsageError(
                f"no order of channels is sought for pattern {wish.pattern}",
                hint="--permute goes with --pattern N:M",
            )
        wished = options_of(wish, MAGNITUDE).model_copy(update={"permute": permute})
    else:
        wished = _recorded(given)
    clock = Clock(progress)
    with Heard() as heard:
        with clock.stage("load"):
            original = as_model(model)
            check_sources(original, output, recipe_out, table)
            check = Check(verify, limits, as_data(data, original), seed)
            asked = method if given is None else wished.method
            how = chosen(asked, check.data, wished.scope, recorded=given is not None)
            options = wished.model_copy(update={"method": how})
            if given is not None:
                same_layout(original, given)
                warn_of_other_data(given, check.data)
        graph = analysed(original, _shapes(given, input_shapes), Mode(), clock)
        with clock.stage("sparsify"):
            turned = _turned(graph, options, given, check, clock)
            start = graph
            if turned.moved:
                start = analysed(turned.model, _shapes(given, input_shapes), Mode(), clock)
            fitted = valued(start, options, check.data, seed=seed, heard=clock.step)
            found = by_method(impose(fitted.model, options), fitted.layers, how)
            if fitted.changed:
                found = measured_against(turned.model, found)
            if given is not None:
                check_replay(given, found)
        if not found.done:
            _log.warning("nothing was thinned: ignore, only or only-gain leave every layer dense")
        if check.level != "none":
            check_held(fitted.model, found.model, found)
        how_tidy = (fold_bn, simplify)
        if given is not None:
            how_tidy = (given.options.fold_bn, given.options.simplify)
        final, tidy = found.model, None
        if any(how_tidy):
            with clock.stage("fold"):
                tidy = made_tidy(final, graph, found, how_tidy, check)
            final = tidy.model
        verdict = _checked(original, final, graph, found, check, clock)
        changed = dict.fromkeys((*fitted.changed, *(() if tidy is None else tidy.changed)))
        written = build(
            original,
            Surgery(final, (), {}, (), (), restored=tuple(changed)),
            Options(
                seed=seed,
                sparsify=options,
                data_sha256=None if how == MAGNITUDE else digest_of(check.data),
                input_shape=dict(_shapes(given, input_shapes)),
                fold_bn=how_tidy[0],
                simplify=how_tidy[1],
            ),
            __version__,
            found.done,
            turned.moved,
            () if tidy is None else tidy.into,
        )
        did = bool(found.done) or (tidy is not None and tidy.anything)
        made = embed(final, written) if did else final
        before, times = stats(graph), None
        if timing_wanted(latency, verdict, before):
            with clock.stage("time"):
                feeds = feeds_of(graph, check.data, seed)
                times = timed_in_turn(original, made, feeds, threads, quick=latency is None)
        known = [env.inputs for env in graph.envs]
        checked = None
        if check_for is not None:
            checked = checked_result(original, made, output, known, clock)
        with clock.stage("save"):
            texts = {} if recipe_out is None else {Path(recipe_out): written.readable()}
            texts |= {} if table is None else {Path(table): thin_csv(found.layers)}
            files = (
                write_texts(texts)
                if output is None
                else save_with(
                    made,
                    output,
                    texts,
                    force=force,
                    check=None
                    if verify == "none"
                    else lambda again: check_held(
                        fitted.model if tidy is None else None, again, found
                    ),
                )
            )
        after = before
        if output is not None:
            size = sum(count for path, count in files.items() if path not in texts)
            after = replace(before, bytes=size)
        with clock.stage("pack"):
            result = sparsified(found, options, original, made, xz=xz)
    return made, Report(
        verb="sparsify",
        input_path=str(original.path or ""),
        before=before,
        output_path=None if output is None else str(output),
        after=after,
        importance="",
        importance_why="",
        exact=None,
        groups=(),
        verdict=verdict,
        stand_ins=graph.stand_ins,
        seconds=clock.seconds,
        peak_memory_bytes=peak_memory(),
        warnings=tuple(heard.messages),
        recipe=written.as_json() if did else {},
        written=tuple(files),
        layers=layer_reports(graph, before),
        sparsified=result,
        checked=checked,
        following=None if output is None else next_step(made, str(output), known),
        latency=times,
        tidied=None if tidy is None else tidy.said,
    )


def _recorded(recipe: Recipe) -> SparsifyOptions:
    options = recipe.options.sparsify
    if options is None:
        raise RecipeError("the recipe thins no weights", hint="shrink --recipe repeats it")
    if not recipe.thins_only:
        raise RecipeError(
            "the recipe removes channels before it thins weights", hint="shrink --recipe repeats it"
        )
    return options


def _shapes(recipe: Recipe | None, given: Mapping[str, Shape] | None) -> Mapping[str, Shape]:
    return (given or {}) if recipe is None else recipe.options.input_shape


def _turned(
    graph: DependencyGraph,
    options: SparsifyOptions,
    recipe: Recipe | None,
    check: Check,
    clock: Clock,
) -> Reordered:
    """The model with channels in a better order, where that was asked for and is the same model."""
    source, wish = graph.graph.source, wish_of(options)
    if not options.permute or not isinstance(wish.pattern, NM):
        return Reordered(source)
    if recipe is not None:
        entries = recipe.permuted
        found = repeated(graph, [Moved(e.tensor, e.axis, e.role, e.kept) for e in entries])
    else:
        able = candidates(source, wish)
        eligible = {able.layers[at].stored.name for at in able.owners}
        found = reordered(
            graph, wish.pattern, eligible, data=check.data, seed=check.seed, heard=clock.step
        )
    for one in found.groups:
        _log.info("order of '%s': %s", one.group, one.why or "new")
    if not found.moved or check.level == "none":
        return found
    same = run_checks(
        source,
        found.model,
        twin=None,
        data=check.data if check.data is not None else made_up_data(graph, check.seed),
        level="twin",
        lossless=True,
    )
    if same.status == "failed":
        raise VerificationError(f"channels in another order: {same.reason}", hint=BUG)
    return found


def _checked(
    original: Model,
    made: Model,
    graph: DependencyGraph,
    found: Thinned,
    check: Check,
    clock: Clock,
) -> Verdict:
    """The verdict on a sparse model that may be written; a failed one raises."""
    if check.level == "none":
        return NOT_VERIFIED
    with clock.stage("verify"):
        check_held(None, made, found)
        verdict = run_checks(
            original,
            made,
            twin=None,
            data=check.data if check.data is not None else made_up_data(graph, check.seed),
            level=check.level,
            limits=check.limits,
        )
    return judged(verdict, check.limits)
