"""The verb ``sparsify``: load, find layers, thin them, verify, save."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from onnxprune.checking import check_target
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
from onnxprune.data import AnyData, as_data
from onnxprune.errors import RecipeError, UsageError
from onnxprune.impose import check_method, options_of
from onnxprune.io import as_model
from onnxprune.model import Model
from onnxprune.patterns import NM
from onnxprune.recipe import Recipe, SparsifyOptions, read
from onnxprune.replay import same_layout, warn_of_other_data
from onnxprune.report.clock import Clock, Heard, Progress
from onnxprune.select import patterns as globs
from onnxprune.thin import MAGNITUDE, Wish
from onnxprune.thinning import Thinner, Thinning
from onnxprune.types import Limits, Report, Shape
from onnxprune.valued import chosen
from onnxprune.writing import Writing


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
        wished = _wished(wish, permute=permute)
    else:
        wished = _recorded(given)
        method = wished.method
        input_shapes = given.options.input_shape
        fold_bn, simplify = given.options.fold_bn, given.options.simplify
    clock = Clock(progress)
    writing = Writing(output, force, recipe_out, check_for, latency, threads)
    with Heard() as heard:
        with clock.stage("load"):
            original = as_model(model)
            check_sources(original, output, recipe_out, table)
            check = Check(verify, limits, as_data(data, original), seed)
            how = chosen(method, check.data, wished.scope, recorded=given is not None)
            if given is not None:
                same_layout(original, given)
                warn_of_other_data(given, check.data)
        asked = Thinner(
            wished.model_copy(update={"method": how}),
            given, input_shapes or {}, (fold_bn, simplify), xz, table,
        )  # fmt: skip
        run = Thinning(asked, original, check, clock)
        made = run.run(writing)
    return made, run.report(writing, tuple(heard.messages))


def _wished(wish: Wish, *, permute: bool) -> SparsifyOptions:
    """Options as a recipe has them.

    Raises:
        UsageError: There is no order of channels that would help the pattern.
    """
    if permute and not isinstance(wish.pattern, NM):
        raise UsageError(
            f"no order of channels is sought for pattern {wish.pattern}",
            hint="--permute goes with --pattern N:M",
        )
    return options_of(wish, MAGNITUDE).model_copy(update={"permute": permute})


def _recorded(recipe: Recipe) -> SparsifyOptions:
    options = recipe.options.sparsify
    if options is None:
        raise RecipeError("the recipe thins no weights", hint="shrink --recipe repeats it")
    if not recipe.thins_only:
        raise RecipeError(
            "the recipe removes channels before it thins weights", hint="shrink --recipe repeats it"
        )
    return options
