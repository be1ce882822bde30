"""The verbs that measure and write no model: ``sensitivity`` and ``sweep``."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from onnxprune import __version__, curves, estimate
from onnxprune.checks import (
    AnyModel,
    check_kinds,
    check_mappings,
    check_outputs,
    check_restore,
    check_sources,
)
from onnxprune.curves import CurveEntry, Sensitivity
from onnxprune.data import AnyData
from onnxprune.errors import UsageError
from onnxprune.groups import DependencyGraph
from onnxprune.jobs import check_cluster, each
from onnxprune.model import Model
from onnxprune.report.clock import Progress
from onnxprune.report.plots import check_plot, sensitivity_plot, sweep_plot
from onnxprune.restored_twin import WAYS
from onnxprune.score import Importance
from onnxprune.sensitivity import BUDGET, Bench, Point, Study, portable
from onnxprune.subjects import Subject, checked_ratios, path_of, say
from onnxprune.suffix import families
from onnxprune.sweep import Sweep, SweepPoint, cut_at, measured
from onnxprune.types import AnyArray, Shape
from onnxprune.verdicts import made_up_data

RATIOS = (0.1, 0.3, 0.5, 0.7, 0.9)
WHOLE_RATIOS = (0.0, 0.25, 0.5, 0.75)


def sensitivity(
    model: AnyModel,
    *,
    ratios: Sequence[float] = RATIOS,
    data: AnyData | None = None,
    labels: Path | str | AnyArray | None = None,
    metric: str | None = None,
    importance: str = "auto",
    attention: str = "heads",
    restore: str = "none",
    input_shapes: Mapping[str, Shape] | None = None,
    seed: int = 0,
    jobs: int = 1,
    scheduler: str | None = None,
    output: Path | str | None = None,
    plot: Path | str | None = None,
    resume: bool = False,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Sensitivity:
    """Cut every channel group alone at each ratio, and measure what that costs.

    Groups whose rows must keep equal counts are cut together. Only what lies behind the cut is run
    again; without restoring, the result is that of the masked twin.

    Args:
        model: A path, a loaded model, or a message.
        ratios: Shares of units to remove, 0 <= ratio < 1.
        data: Inputs: an ``.npz`` file, arrays by input name, or ``Data``; None makes random ones.
        labels: Class of each sample, an ``.npy`` file or an array; the loss is then that of top-1
            accuracy, else the drift (relative L2) of the output that lies farthest off.
        metric: ``path.py:function``, a function of the outputs by name and of the labels (or
            None) that gives a number, the higher the better; the loss is how far it falls.
        importance: How channels are ranked, as in ``score``.
        attention: As in ``analyse``.
        restore: How each cut is made up for before it is measured: ``none``, ``bias`` (the mean of
            what goes, without data) or ``refit`` (the layers that read the group are fitted to
            ``data``, layers behind them are not: what is left after ``shrink`` refits all is less).
        input_shapes: Concrete shapes for symbolic inputs.
        seed: For random inputs and ``importance="random"``.
        jobs: Processes on this machine.
        scheduler: Address of a Dask scheduler, whose workers do it instead.
        output: JSON file, written anew after each group, or None.
        plot: PNG or SVG file, or None.
        resume: Go on from what ``output`` holds of the same measurement.
        force: Overwrite what exists.
        dry_run: Say what would be measured and about how long it would take in this process
            (``estimate``), and write nothing.
        progress: Called with what is done now.

    Returns:
        What was found, one curve for each family of groups.

    Raises:
        UsageError: An option, a file or an output path cannot be used.
        ModelError: The model is unreadable or invalid.
        UnsupportedModelError: Nothing in it can be pruned.
        VerificationError: ONNX Runtime cannot run it.
        MissingExtraError: Dask or matplotlib is asked for and not installed.
    """
    begun = time.perf_counter()
    check_kinds(
        wholes={"seed": seed, "jobs": jobs},
        texts={
            "importance": importance, "attention": attention, "restore": restore, "metric": metric
        },
    )  # fmt: skip
    check_mappings(input_shapes=input_shapes)
    if restore not in WAYS:
        raise UsageError(f"restore is '{restore}'", hint="give none, bias or refit")
    check_restore(restore, data)
    if jobs < 1:
        raise UsageError(f"jobs is {jobs}", hint="give 1 or more")
    if resume and output is None:
        raise UsageError("--resume needs an output to go on from")
    if scheduler is not None:
        check_cluster()
    chosen = checked_ratios(ratios)
    check_outputs(model, output, plot, force=force or resume or dry_run)
    check_plot(plot)
    subject = Subject.of(
        model, importance, attention, input_shapes or {}, data, labels, metric, seed, progress
    )
    check_sources(subject.model, output, plot)
    run = subject.document(chosen, attention, restore, input_shapes or {}, seed)
    family_of = dict(enumerate(families(subject.graph)))
    found = {}
    if resume and output is not None and Path(output).exists():
        found = curves.done_before(output, run)
    # In the order of the graph: what is cut first has most behind it, so no long one comes last.
    todo = tuple(number for number, family in family_of.items() if family not in found)
    abroad = (jobs > 1 or scheduler is not None) and not dry_run
    study = Study(
        model=portable(subject.model, shipped=scheduler is not None) if abroad else b"",
        attention=attention,
        input_shapes=dict(input_shapes or {}),
        importance=subject.importance.method,
        seed=seed,
        ratios=chosen,
        batches=tuple(subject.data.batches),
        gauge=subject.gauge,
        baseline=subject.baseline,
        todo=todo,
        budget=BUDGET // jobs,
        restore=restore,
    )
    if dry_run:
        return _foretold(subject, study, run, found, begun)
    here = _Here(study, subject.graph, subject.importance)
    left = _Left(len(todo), progress)
    for number, points in each(study if abroad else here, todo, jobs=jobs, scheduler=scheduler):
        found[family_of[number]] = curves.curve(subject.graph, family_of[number], points)
        left.one_done()
        if output is not None:
            so_far = time.perf_counter() - begun
            curves.write(output, run.with_curves(found, complete=False, seconds=so_far))
    run = run.with_curves(found, complete=True, seconds=time.perf_counter() - begun)
    if output is not None:
        curves.write(output, run)
    if plot is not None:
        sensitivity_plot(run, Path(plot))
    return run


def _foretold(
    subject: Subject,
    study: Study,
    run: Sensitivity,
    done: Mapping[tuple[int, ...], CurveEntry],
    begun: float,
) -> Sensitivity:
    """What would be measured, and about how long that would take in this process."""
    bench, found = Bench(study, subject.graph, subject.importance), dict(done)
    family_of = families(subject.graph)
    for number in study.todo:
        points = bench.unmeasured(number)
        found[family_of[number]] = curves.curve(subject.graph, family_of[number], points)
    expected = estimate.of_sensitivity(bench, subject.graph, study.batches)
    run = run.with_curves(found, complete=False, seconds=time.perf_counter() - begun)
    return run.model_copy(update={"estimate": expected})


@dataclass(frozen=True)
class _Here:
    """A study done in this process, on the analysis there is already."""

    study: Study
    graph: DependencyGraph
    importance: Importance

    def open(self, threads: int | None) -> Callable[[int], list[Point]]:
        return Bench(self.study, self.graph, self.importance, threads).measure


@dataclass
class _Left:
    """Says how many items are done and about how long the others will take."""

    total: int
    progress: Progress | None
    done: int = 0
    begun: float = field(default_factory=time.perf_counter)

    def one_done(self) -> None:
        self.done += 1
        spent = time.perf_counter() - self.begun
        seconds = round(spent / self.done * (self.total - self.done))
        say(
            self.progress,
            f"{self.done} of {self.total} groups, {timedelta(seconds=seconds)} left",
        )


def sweep(
    model: AnyModel,
    *,
    ratios: Sequence[float] = WHOLE_RATIOS,
    data: AnyData | None = None,
    labels: Path | str | AnyArray | None = None,
    metric: str | None = None,
    scope: str = "local",
    importance: str = "auto",
    round_to: int = 1,
    attention: str = "heads",
    input_shapes: Mapping[str, Shape] | None = None,
    seed: int = 0,
    output: Path | str | None = None,
    plot: Path | str | None = None,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Sweep:
    """Cut the whole model at each ratio: cost, latency, and drift or accuracy of what is left.

    Args:
        model: A path, a loaded model, or a message.
        ratios: Shares of units to remove, 0 <= ratio < 1.
        data: As in ``sensitivity``.
        labels: As in ``sensitivity``.
        metric: As in ``sensitivity``.
        scope: As in ``select``.
        round_to: As in ``select``.
        importance: How channels are ranked, as in ``score``.
        attention: As in ``analyse``.
        input_shapes: Concrete shapes for symbolic inputs; latency is measured at them.
        seed: For random inputs and ``importance="random"``.
        output: JSON file, or None.
        plot: PNG or SVG file, or None.
        force: Overwrite what exists.
        dry_run: Say what each ratio leaves and about how long measuring it would take
            (``estimate``); measure and write nothing.
        progress: Called with what is done now.

    Raises:
        UsageError: An option, a file or an output path cannot be used.
        ModelError: The model is unreadable or invalid.
        UnsupportedModelError: Nothing in it can be pruned.
        VerificationError: ONNX Runtime cannot run it, or what was made of it.
        MissingExtraError: A plot is asked for, and matplotlib is not installed.
    """
    begun = time.perf_counter()
    check_kinds(
        wholes={"seed": seed, "round_to": round_to},
        texts={"scope": scope, "importance": importance, "attention": attention, "metric": metric},
    )
    check_mappings(input_shapes=input_shapes)
    chosen = checked_ratios(ratios)
    check_outputs(model, output, plot, force=force or dry_run)
    check_plot(plot)
    subject = Subject.of(
        model, importance, attention, input_shapes or {}, data, labels, metric, seed, progress
    )
    check_sources(subject.model, output, plot)
    graph = subject.graph
    made: list[Model] = []
    points: Sequence[SweepPoint] = ()
    for ratio in chosen:
        say(progress, f"cut {ratio:g}")
        one, point = cut_at(graph, subject.importance, ratio, scope=scope, round_to=round_to)
        made.append(one)
        points = (*points, point)
    expected = None
    if dry_run:
        expected = estimate.of_sweep(graph, points, subject.data.batches)
    else:
        say(progress, "run")
        points = measured(
            made,
            points,
            original=subject.model,
            batches=subject.data.batches,
            probe=made_up_data(graph, seed).batches[0],
            gauge=subject.gauge,
            baseline=subject.baseline,
        )
    found = Sweep(
        schema=1,
        version=__version__,
        path=path_of(subject.model),
        importance=subject.importance.method,
        scope=scope,  # type: ignore[arg-type]  # select checked it
        round_to=round_to,
        measure=subject.gauge.measure,
        data=subject.data.label,
        samples=subject.data.samples,
        baseline=curves.finite(subject.baseline),
        stand_ins=dict(graph.stand_ins),
        points=tuple(points),
        seconds=round(time.perf_counter() - begun, 3),
        estimate=expected,
    )
    if output is not None and not dry_run:
        curves.write(output, found)
    if plot is not None and not dry_run:
        sweep_plot(found, Path(plot))
    return found
