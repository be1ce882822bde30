"""The verb ``quantize``: load, choose types, convert, verify, save."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from onnxprune import __version__
from onnxprune.analysing import analysed
from onnxprune.checking import check_target, checked_result
from onnxprune.checks import AnyModel, Check, check_level, check_outputs, check_sources
from onnxprune.cost import stats, stored_bytes
from onnxprune.data import AnyData, as_data
from onnxprune.io import as_model
from onnxprune.model import Model
from onnxprune.quantize.asked import options_of
from onnxprune.quantize.convert import check_zeros, convert
from onnxprune.recipe import read
from onnxprune.recording import quantized_before, requantized
from onnxprune.report.build import NOT_VERIFIED
from onnxprune.report.clock import Clock, Heard, Progress, peak_memory
from onnxprune.report.layers import layer_reports
from onnxprune.request import Mode
from onnxprune.select import patterns
from onnxprune.targets.trtexec import next_step
from onnxprune.types import Limits, Report, Shape
from onnxprune.verdicts import made_up_data, quantized_verdict
from onnxprune.writing import Writing


def quantize(
    model: AnyModel,
    *,
    to: str,
    method: str = "auto",
    ignore: str | Sequence[str] = (),
    only: str | Sequence[str] = (),
    convert_io: bool = False,
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
    """Write a float32 model in 16-bit floats, or with 8-bit integers as Q/DQ pairs.

    What TensorRT builds engines of: it takes the types that the model has. Nodes that a type would
    spoil stay in float32, and the report names them: those whose constants or activations float16
    cannot hold, those that count or compute with sizes, and what the operators do not take.

    Args:
        model: A path, a loaded model, or a message.
        to: ``fp16``, ``bf16`` or ``int8``.
        method: How int8 finds the ranges of activations: ``minmax``, ``percentile`` (99.99) or
            ``entropy``; ``auto`` takes the one with the least error on held-out data.
        ignore: Pattern or patterns of nodes and constants that stay as they are.
        only: Pattern or patterns; all other nodes stay as they are.
        convert_io: Inputs and outputs become 16-bit floats as well; by default they keep their
            types, and casts stand behind and before them.
        input_shapes: Concrete shapes for symbolic inputs.
        data: Inputs to calibrate and to verify on: an ``.npz`` file, arrays by input name, or
            ``Data``. int8 needs them.
        seed: For random inputs.
        verify: ``none``, ``twin`` (is it valid, does it load and run, are zeros still zero) or
            ``full`` (drift too).
        max_drift: Most relative L2 difference of any output that is allowed.
        min_cosine: Least cosine of any output that is allowed.
        min_top1: Least share of samples with the same arg max that is allowed.
        check_for: A target that must take the result, as in ``shrink``.
        output: File to write, or None.
        recipe_out: File to write the recipe to, or None.
        force: Overwrite what exists.
        progress: Called with the name of each stage as it begins.

    Returns:
        The quantized model and the report.

    Raises:
        UsageError: An option or an output path cannot be used.
        ModelError: The model is unreadable or invalid.
        UnsupportedModelError: Nothing in it can be quantized.
        RecipeError: The model carries a recipe of another version.
        VerificationError: The result is wrong (our bug), or passes a limit, or cannot be run.
    """
    limits = Limits(max_drift, min_cosine, min_top1)
    check_level(verify, limits)
    check_target(check_for)
    wished = options_of(
        to, data, called="to", method=method, ignore=patterns(ignore), only=patterns(only),
        convert_io=convert_io,
    )  # fmt: skip
    check_outputs(model, output, recipe_out, force=force, read=(data,))
    clock, writing = Clock(progress), Writing(output, force, recipe_out, check_for)
    with Heard() as heard:
        with clock.stage("load"):
            original = as_model(model)
            check_sources(original, output, recipe_out)
            check = Check(verify, limits, as_data(data, original), seed)
        graph = analysed(original, input_shapes or {}, Mode(), clock)
        measured = check.data if check.data is not None else made_up_data(graph, seed)
        with clock.stage("quantize"):
            made = convert(original, wished, check.data, measured)
        verdict = NOT_VERIFIED
        if verify != "none":
            with clock.stage("verify"):
                check_zeros(made.plain, made.model)
                verdict = quantized_verdict(original, made, measured, check)
        done = made.options.model_copy(update={"before": quantized_before(original)})
        final = requantized(made.model, original, done, __version__)
        before = stats(graph)
        known = [env.inputs for env in graph.envs]
        checked = None
        if check_for is not None:
            checked = checked_result(original, final, output, known, clock)
        with clock.stage("save"):
            written = writing.save(
                final,
                lambda: read(final),
                check=None if verify == "none" else lambda again: check_zeros(made.plain, again),
            )
    unwritten = replace(before, bytes=stored_bytes(final))
    return final, Report(
        verb="quantize",
        input_path=str(original.path or ""),
        before=before,
        output_path=None if output is None else str(output),
        after=written.of(unwritten),
        importance="",
        importance_why="",
        exact=None,
        groups=(),
        verdict=verdict,
        stand_ins=graph.stand_ins,
        seconds=clock.seconds,
        peak_memory_bytes=peak_memory(),
        warnings=tuple(heard.messages),
        recipe=read(final).as_json(),
        written=tuple(written.files),
        layers=layer_reports(graph, before),
        quantized=made.found,
        checked=checked,
        following=None if output is None else next_step(final, str(output), known),
    )
