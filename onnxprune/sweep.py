"""The whole model cut at several ratios: what is left, how fast it is, how far it drifts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from onnxprune.cost import stats, stats_after
from onnxprune.curves import Estimate, finite
from onnxprune.feeds import Batch
from onnxprune.gauges import Gauge, Measure
from onnxprune.groups import DependencyGraph
from onnxprune.model import Model
from onnxprune.rewrite import operate
from onnxprune.runtime import RuntimeUnavailable, cannot_run, session
from onnxprune.score import Importance
from onnxprune.select import select
from onnxprune.timing import measure_sessions

TIMED = 0.2  # seconds for each model


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class SweepPoint(_Part):
    """The model at one ratio; null stands for a figure that is not finite."""

    ratio: float
    removed: int = Field(description="Units that went.")
    params: int
    macs: int
    bytes: int
    latency_ms: float | None = Field(
        description="Median of runs at the stand-in shapes; null in a dry run."
    )
    figure: float | None = Field(description="Drift, accuracy, or what the metric gave.")
    loss: float | None = Field(description="Drift, or how far the figure fell.")


class Sweep(_Part):
    """What the verb ``sweep`` found."""

    schema_: Literal[1] = Field(1, alias="schema")
    verb: Literal["sweep"] = "sweep"
    version: str
    path: str | None
    importance: str
    scope: Literal["local", "global"]
    round_to: int
    measure: Measure
    data: str
    samples: int
    baseline: float | None = Field(description="The original's figure; 0 for drift.")
    stand_ins: dict[str, tuple[int, ...]]
    points: tuple[SweepPoint, ...]
    seconds: float
    estimate: Estimate | None = Field(
        default=None, description="Of a dry run, which measures nothing."
    )

    def as_json(self) -> dict[str, object]:
        """One JSON object."""
        left_out = {"estimate"} if self.estimate is None else set()
        return self.model_dump(mode="json", by_alias=True, exclude=left_out)


def cut_at(
    graph: DependencyGraph, importance: Importance, ratio: float, *, scope: str, round_to: int
) -> tuple[Model, SweepPoint]:
    """The model at one ratio and what is left of it; latency and figures are still to come."""
    plan = select(graph, importance, ratio=ratio, scope=scope, round_to=round_to)
    if plan.removes:
        made = operate(plan).model
        left = stats_after(graph, made, plan.keep)
    else:
        made, left = graph.graph.source, stats(graph)
    point = SweepPoint(
        ratio=ratio,
        removed=plan.removes,
        params=left.params,
        macs=left.macs,
        bytes=left.bytes,
        latency_ms=None,
        figure=None,
        loss=None,
    )
    return made, point


def measured(
    models: Sequence[Model],
    points: Sequence[SweepPoint],
    *,
    original: Model,
    batches: Sequence[Batch],
    probe: Batch,
    gauge: Gauge,
    baseline: float,
) -> tuple[SweepPoint, ...]:
    """Each point with its latency and its figure.

    Args:
        models: One for each point.
        points: From ``cut_at``.
        original: What drift is measured from.
        batches: What the models are judged on.
        probe: What they are timed on.
        gauge: How they are judged.
        baseline: The gauge's figure for the original.

    Raises:
        VerificationError: ONNX Runtime cannot run one of them.
    """
    try:
        first, loaded = session(original), [session(model) for model in models]
        tallies = [gauge.tally() for _ in loaded]
        for batch in batches:
            reference = first.run(batch)
            for tally, one in zip(tallies, loaded, strict=True):
                tally.add(reference, one.run(batch))
        spent = measure_sessions(loaded, probe, seconds=TIMED * len(loaded), threads=None)
    except RuntimeUnavailable as error:
        raise cannot_run(error, original) from error
    found = []
    for point, tally, timing in zip(points, tallies, spent, strict=True):
        figure = tally.result()
        loss = gauge.loss(figure, baseline)
        found.append(
            point.model_copy(
                update={
                    "latency_ms": round(1e3 * timing.seconds, 4),
                    "figure": finite(figure),
                    "loss": finite(loss),
                }
            )
        )
    return tuple(found)
