"""What it costs to cut one channel group, measured group by group and ratio by ratio."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, nan
from pathlib import Path

from onnxprune.analyse import analyse
from onnxprune.feeds import Batch
from onnxprune.gauges import Gauge
from onnxprune.groups import DependencyGraph
from onnxprune.io import as_model
from onnxprune.model import Model
from onnxprune.restored_twin import Restored, Restorer, data_of
from onnxprune.runtime import RuntimeUnavailable, Session, cannot_run, session
from onnxprune.score import Importance, Scorer, score
from onnxprune.select import PruningPlan, select
from onnxprune.stream import serialize
from onnxprune.suffix import Borders, Suffix, border_bytes, families
from onnxprune.types import Shape

BUDGET = 1 << 30  # bytes of border tensors kept at a time, by all processes together


@dataclass(frozen=True, slots=True)
class Point:
    """One cut of one group: what was asked for, units removed, the figure and what was lost."""

    ratio: float
    removed: int
    figure: float
    loss: float


@dataclass(frozen=True)
class Study:
    """Everything a measurement depends on; may be pickled.

    Attributes:
        model: Path, or the whole model as bytes.
        attention, input_shapes: As in ``analyse``.
        importance, seed: As in ``score``.
        ratios: Ascending, each of every group.
        batches: What models are run on.
        gauge: How they are judged.
        baseline: The gauge's figure for the original.
        todo: Numbers of the families in the order they are likely to be done.
        budget: Bytes of border tensors that one process keeps.
        restore: How each cut is made up for, as in ``Restorer``.
    """

    model: Path | bytes
    attention: str
    input_shapes: Mapping[str, Shape]
    importance: str | Scorer
    seed: int
    ratios: tuple[float, ...]
    batches: tuple[Batch, ...]
    gauge: Gauge
    baseline: float
    todo: tuple[int, ...]
    budget: int = BUDGET
    restore: str = "none"

    def open(self, threads: int | None) -> Callable[[int], list[Point]]:
        """The function that measures one family of groups, after an analysis of its own."""
        graph = analyse(
            as_model(self.model),
            input_shapes=self.input_shapes,
            attention=self.attention,
        )
        importance = score(graph, self.importance, seed=self.seed)
        return Bench(self, graph, importance, threads).measure


class Bench:
    """Measures one family of groups after another on one analysis.

    Attributes:
        suffixes: What is run again for each family of which something goes, by its number.
        rounds: How often the original is run.
    """

    def __init__(
        self,
        study: Study,
        graph: DependencyGraph,
        importance: Importance,
        threads: int | None = None,
    ) -> None:
        self._study = study
        self._graph = graph
        self._importance = importance
        self._threads = threads
        self._families = families(graph)
        self._plans = {number: self._plan(number) for number in study.todo}
        samples = sum(samples_of(batch) for batch in study.batches)
        self._restorer = Restorer(graph, study.restore, samples=samples, seed=study.seed)
        self.suffixes = {
            number: Suffix.of(plans, self._restorer.readers(plans))
            for number, plans in self._plans.items()
            if plans
        }
        outputs = [name for name in graph.graph.outputs if name in graph.graph.producer]
        self._outputs = tuple(dict.fromkeys(outputs))
        wanted = {
            number: tuple(dict.fromkeys((*suffix.border, *self._outputs, *data_of(suffix.readers))))
            for number, suffix in self.suffixes.items()
        }
        sizes = border_bytes(graph, {n for names in wanted.values() for n in names}, study.batches)
        self.rounds = max(1, ceil(sum(sizes.values()) / max(study.budget, 1)))
        self._borders = Borders(
            graph.graph, study.batches, wanted, sizes, study.budget, self._threads
        )

    def _plan(self, number: int) -> list[PruningPlan]:
        """The different plans of a family that remove anything, least first."""
        found: list[PruningPlan] = []
        for ratio in self._study.ratios:
            plan = one_family(self._graph, self._importance, self._families[number], ratio)
            if plan.removes and plan.removes != (found[-1].removes if found else 0):
                found.append(plan)
        return found

    def unmeasured(self, number: int) -> list[Point]:
        """How many units go at each ratio; the figures are not numbers."""
        return [
            Point(ratio, self._removes(number, ratio), nan, nan) for ratio in self._study.ratios
        ]

    def _removes(self, number: int, ratio: float) -> int:
        family = self._families[number]
        return one_family(self._graph, self._importance, family, ratio).removes

    def measure(self, number: int) -> list[Point]:
        """A point for each ratio.

        Raises:
            VerificationError: ONNX Runtime cannot run the model.
        """
        try:
            figures = self._figures(number)
        except RuntimeUnavailable as error:
            raise cannot_run(error, self._graph.graph.source) from error
        points = []
        for ratio in self._study.ratios:
            removes = self._removes(number, ratio)
            figure = figures[removes]
            loss = self._study.gauge.loss(figure, self._study.baseline) if removes else 0.0
            points.append(Point(ratio, removes, figure, loss))
        return points

    def _figures(self, number: int) -> dict[int, float]:
        """The figure by how many units went."""
        none = 0.0 if self._study.gauge.measure == "drift" else self._study.baseline
        if number not in self.suffixes:
            return {0: none}
        suffix, plans = self.suffixes[number], self._plans[number]
        tallies = [self._study.gauge.tally() for _ in plans]
        restored: Sequence[Restored | None] = [None for _ in plans]
        if suffix.readers:
            restored = self._restorer.restored(
                plans, suffix.readers, lambda: self._borders.of(number)
            )
        runner = _Runner(suffix, restored, self._threads)
        for kept in self._borders.of(number):
            border = {name: kept[name] for name in suffix.border}
            reference = {name: kept[name] for name in self._outputs if name in kept}
            for tally, outputs in zip(tallies, runner.run(border), strict=True):
                tally.add(reference, outputs)
        return {0: none} | {
            plan.removes: tally.result() for plan, tally in zip(plans, tallies, strict=True)
        }


class _Runner:
    """Runs a suffix for every plan; the session is made for the first batch and serves all."""

    def __init__(
        self, suffix: Suffix, restored: Sequence[Restored | None], threads: int | None
    ) -> None:
        self._suffix = suffix
        self._feeds = [suffix.feeds(number, one) for number, one in enumerate(restored)]
        self._threads = threads
        self._session: Session | None = None

    def run(self, border: Batch) -> Iterator[Batch]:
        """Outputs behind each cut."""
        if self._session is None:
            self._session = self._suffix.load(border, self._feeds[0], threads=self._threads)
        for feeds in self._feeds:
            yield self._session.run({**border, **feeds})


def samples_of(batch: Batch) -> int:
    """How many samples a batch has."""
    return max((array.shape[0] for array in batch.values() if array.ndim), default=1)


def one_family(
    graph: DependencyGraph, importance: Importance, family: Iterable[int], ratio: float
) -> PruningPlan:
    """The plan that cuts one family of groups and nothing else."""
    return select(graph, importance, ratio=0.0, group_ratios=dict.fromkeys(family, ratio))


def baseline(graph: DependencyGraph, batches: Iterable[Batch], gauge: Gauge) -> float:
    """The gauge's figure for the original; 0 for drift.

    Raises:
        VerificationError: ONNX Runtime cannot run it.
    """
    if gauge.measure == "drift":
        return 0.0
    tally = gauge.tally()
    try:
        loaded = session(graph.graph.source)
        for batch in batches:
            outputs = loaded.run(batch)
            tally.add(outputs, outputs)
    except RuntimeUnavailable as error:
        raise cannot_run(error, graph.graph.source) from error
    return tally.result()


def portable(model: Model, *, shipped: bool) -> Path | bytes:
    """What another process makes the same model of: its path, or where that will not do all of it.

    Args:
        model: The model.
        shipped: The process may be on another machine.

    Raises:
        UsageError: All of it is more than 2 GiB.
    """
    if model.path is None or shipped:
        return serialize(model)
    return model.path.resolve()
