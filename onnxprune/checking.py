"""The verb ``check``, and the check of a result for a target before it is written."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from onnxprune.analyse import analyse_graph
from onnxprune.checks import AnyModel
from onnxprune.cost import stats
from onnxprune.errors import UsageError, VerificationError
from onnxprune.groups import DependencyGraph
from onnxprune.io import as_model
from onnxprune.model import Model
from onnxprune.prepare import prepare
from onnxprune.report.build import NOT_VERIFIED
from onnxprune.report.clock import Clock, Heard, Progress, peak_memory
from onnxprune.report.layers import layer_reports
from onnxprune.shapes import environment
from onnxprune.standins import find_stand_ins
from onnxprune.targets.builder import TIMEOUT, build_model, check_installed, installed
from onnxprune.targets.findings import ERROR, Build, Checked, Profile
from onnxprune.targets.profiles import Wanted
from onnxprune.targets.tensorrt import checked
from onnxprune.types import NextStep, Report, Shape

TARGETS = ("tensorrt",)
_log = logging.getLogger(__name__)
_Shapes = Mapping[str, Shape]


def check(
    model: AnyModel,
    *,
    target: str = "tensorrt",
    build: bool | None = None,
    min_shapes: _Shapes | None = None,
    opt_shapes: _Shapes | None = None,
    max_shapes: _Shapes | None = None,
    input_shapes: _Shapes | None = None,
    timeout: float = TIMEOUT,
    progress: Progress | None = None,
) -> Report:
    """Say what a target will mind in a model, and let it build the model where that can be done.

    Args:
        model: A path, a loaded model, or a message.
        target: ``tensorrt``.
        build: Let TensorRT-RTX parse and build the model; None does so if it is installed.
        min_shapes: Smallest shapes of dynamic inputs that the engine takes.
        opt_shapes: Shapes that it is tuned for.
        max_shapes: Largest shapes.
        input_shapes: Concrete shapes for symbolic inputs, at which the model is analysed.
        timeout: Seconds that TensorRT-RTX may take.
        progress: Called with the name of each stage as it begins.

    Returns:
        A report whose ``checked`` has the findings; it passes or it does not, nothing is raised
        for that.

    Raises:
        UsageError: The target is unknown, or a shape does not fit.
        MissingExtraError: ``build`` is True and TensorRT-RTX is not installed.
        ModelError: The model is unreadable or invalid.
    """
    check_target(target)
    if build:
        check_installed("--build")
    clock = Clock(progress)
    with Heard() as heard:
        with clock.stage("load"):
            original = as_model(model)
        asked = Wanted.read(original, least=min_shapes, best=opt_shapes, most=max_shapes)
        graph = _analysed(original, {**asked.settled, **(input_shapes or {})}, clock)
        profiles = asked.profiles([env.inputs for env in graph.envs])
        cost = stats(graph)
        layers = layer_reports(graph, cost)
        wanted = build is not False
        builder = partial(_build, timeout=timeout) if wanted and installed() else None
        with clock.stage("check"):
            path = str(original.path or "model.onnx")
            found = checked(original, path, layers, profiles, builder, wanted=wanted)
    return Report(
        verb="check",
        input_path=str(original.path or ""),
        before=cost,
        output_path=None,
        after=None,
        importance="",
        importance_why="",
        exact=None,
        groups=(),
        verdict=NOT_VERIFIED,
        stand_ins=graph.stand_ins,
        seconds=clock.seconds,
        peak_memory_bytes=peak_memory(),
        warnings=tuple(heard.messages),
        layers=layers,
        checked=found,
        following=NextStep(found.command, found.expect),
    )


def check_target(target: str | None) -> None:
    """Refuse a target that there are no rules for."""
    if target is not None and target not in TARGETS:
        raise UsageError(f"target is '{target}'", hint=f"give {', '.join(TARGETS)}")


def checked_result(
    original: Model,
    made: Model,
    path: Path | str | None,
    known: Sequence[_Shapes],
    clock: Clock,
) -> Checked:
    """A result that a target takes; one that it does not raises, before anything is written.

    A result that TensorRT-RTX does not build is refused even where it does not build the original
    either: who asks for the check wants a file that it takes. The message says so then, since no
    other ratio will help.

    Args:
        original: What was there before.
        made: The result.
        path: Where it will be written, None for a dry run.
        known: Input shapes at which the original was analysed.
        clock: Times it.

    Raises:
        VerificationError: The target does not take the result.
    """
    with clock.stage("analyse"):
        prepared = prepare(made)
        graph = analyse_graph(prepared, tuple(environment(prepared, one) for one in known))
    profiles = Wanted.read(made).profiles(known)
    builder = _build if installed() else None
    with clock.stage("check"):
        layers = layer_reports(graph, stats(graph))
        found = checked(made, str(path or "model.onnx"), layers, profiles, builder)
        if not found.passed:
            hint = "nothing was written"
            if found.build is not None and not _build(original, profiles, False).built:
                hint = f"{hint}; it does not build the original either"
            raise VerificationError(complaint(found), hint=hint)
    if found.unasked:
        _log.warning("%s", found.unasked)
    return found


def complaint(found: Checked) -> str:
    """Why a check did not pass, in one line."""
    errors = [one for one in found.findings if one.severity == ERROR]
    who = found.build.version if found.build is not None and found.build.version else "TensorRT"
    what = "does not take the model" if found.build is None else "does not build the model"
    if found.build is not None and found.build.status == "timeout":
        what = "gave no answer"
    first = errors[0]
    where = f"{first.node}: " if first.node else ""
    more = f", and {len(errors) - 1} more" if len(errors) > 1 else ""
    cure = f"; {first.cure}" if first.cure else ""
    other = next((one for one in errors if one.node and one.cure), None)
    if not first.node and other is not None:  # a crash, which a rule may explain
        cure = f"; {other.node}: {other.message}; {other.cure}"
    return f"{who} {what}: {where}{first.message}{more}{cure}"


def _build(
    model: Model, profiles: Mapping[str, Profile], sparse: bool, *, timeout: float = TIMEOUT
) -> Build:
    return build_model(model, profiles, sparse=sparse, timeout=timeout)


def _analysed(model: Model, shapes: _Shapes, clock: Clock) -> DependencyGraph:
    with clock.stage("prepare"):
        prepared = prepare(model)
        choices = find_stand_ins(prepared, shapes or None)
        envs = tuple(environment(prepared, choice) for choice in choices)
    with clock.stage("analyse"):
        return analyse_graph(prepared, envs)
