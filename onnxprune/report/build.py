"""Put a report together from what the arrows of the pipeline gave."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace

import numpy as np

from onnxprune.alignment import Alignment, Coming
from onnxprune.cost import stats, stats_after
from onnxprune.groups import DependencyGraph
from onnxprune.model import Model
from onnxprune.report.checks import as_check_json
from onnxprune.report.clock import peak_memory
from onnxprune.report.layers import layer_reports
from onnxprune.report.model import (
    ChangeJson,
    CostJson,
    DensityJson,
    DriftJson,
    EpochJson,
    GroupJson,
    HeldJson,
    KeptNodeJson,
    LatencyJson,
    LayerJson,
    NextJson,
    OperatorJson,
    QuantizedJson,
    RefittedJson,
    ReportJson,
    RoundJson,
    SparsityJson,
    StatsJson,
    ThinLayerJson,
    TidiedJson,
    TunedJson,
    TwinJson,
    VerifyJson,
    WidthJson,
    XzJson,
)
from onnxprune.report.ops import OperatorUse
from onnxprune.select import PruningPlan
from onnxprune.types import (
    ChannelGroup,
    Drift,
    GroupReport,
    HeldWeight,
    IntArray,
    Latency,
    LayerReport,
    ModelStats,
    NextStep,
    Quantized,
    Report,
    Sparsified,
    ThinLayer,
    Tidied,
    Tuned,
    TwinResult,
    Verdict,
    Width,
)

NOT_VERIFIED = Verdict("none", "not asked for", None, {}, "")


def report(
    model: Model, pruned: Model, plan: PruningPlan, verdict: Verdict = NOT_VERIFIED
) -> Report:
    """What a plan did to a model.

    Args:
        model: The original the plan was made for.
        pruned: What ``rewrite`` made of it.
        plan: From ``select``.
        verdict: From ``verify``.
    """
    before, after = stats(plan.graph), stats_after(plan.graph, pruned, plan.keep)
    return Report(
        verb="shrink",
        input_path=str(model.path or ""),
        before=before,
        output_path=None,
        after=after,
        importance="",
        importance_why="",
        exact=plan.graph.exact(plan.keep),
        groups=group_reports(plan.graph, plan.keep, plan.why),
        verdict=verdict,
        stand_ins=plan.graph.stand_ins,
        seconds={},
        peak_memory_bytes=peak_memory(),
        layers=layer_reports(plan.graph, before, after),
    )


def group_reports(
    graph: DependencyGraph,
    keep: Mapping[int, IntArray] | None = None,
    why: Mapping[int, str] | None = None,
    *,
    aligned: bool = False,
    coming: Coming | None = None,
) -> tuple[GroupReport, ...]:
    """Every group as reports show it; without ``keep`` nothing went.

    With ``aligned`` each says whether its width suits the hardware, and if not, why; with
    ``coming``, whether it suits what its weights are to become.
    """
    found = (
        _group(group, (keep or {}).get(group.id), (why or {}).get(group.id, ""))
        for group in graph.groups
    )
    if not aligned:
        return tuple(found)
    alignment = Alignment(graph, coming)
    return tuple(
        replace(one, why=_joined(one.why, alignment.said(group, one.kept)))
        for one, group in zip(found, graph.groups, strict=True)
    )


def _joined(*parts: str) -> str:
    return "; ".join(part for part in parts if part)


def _group(group: ChannelGroup, kept: IntArray | None, why: str) -> GroupReport:
    size = group.width
    if kept is None:
        left = size
    elif group.producers:
        left = int(np.isin(group.producers[0].unit, kept).sum())
    else:
        left = int(kept.size)
    return GroupReport(
        id=group.id,
        size=size,
        kept=left,
        unit=group.unit,
        units=group.size,
        nodes=_names(axis.node for axis in group.producers),
        producers=_names(axis.tensor for axis in group.producers),
        consumers=_names(axis.tensor for axis in group.consumers),
        frozen=group.frozen,
        why=why,
    )


def _names(names: Iterable[str]) -> tuple[str, ...]:
    """Each name once, in order."""
    return tuple(dict.fromkeys(names))


def only_groups(report: Report, chosen: Iterable[ChannelGroup]) -> Report:
    """The report with some groups left in it."""
    wanted = {group.id for group in chosen}
    return replace(report, groups=tuple(g for g in report.groups if g.id in wanted))


def as_json(report: Report, operators: Sequence[OperatorUse] | None = None) -> dict[str, object]:
    """The report as one JSON object (DESIGN §11); NaN and infinities become null."""
    verdict = report.verdict
    found = ReportJson(
        schema=1,
        verb=report.verb,  # type: ignore[arg-type]  # pydantic checks it
        input=_stats(report.before, report.input_path or None),
        output=None if report.after is None else _stats(report.after, report.output_path),
        importance=report.importance or None,
        importance_why=report.importance_why,
        exact=report.exact,
        groups=[_group_json(group) for group in report.groups],
        operators=None
        if operators is None
        else [OperatorJson.model_validate(asdict(use)) for use in operators],
        verify=VerifyJson(
            status=verdict.status,  # type: ignore[arg-type]  # pydantic checks it
            reason=verdict.reason,
            twin=None if verdict.twin is None else _twin(verdict.twin),
            drift={name: _drift(one) for name, one in verdict.drift.items()},
            inputs=verdict.inputs,
            notes=list(verdict.notes),
        ),
        stand_ins={name: list(shape) for name, shape in report.stand_ins.items()},
        seconds={stage: round(spent, 4) for stage, spent in report.seconds.items()},
        peak_memory_bytes=report.peak_memory_bytes,
        warnings=list(report.warnings),
        without_effect=report.without_effect,
        restored=[
            RefittedJson(
                node=one.node,
                before=_finite(one.before),
                after=_finite(one.after),
                ridge=one.ridge,
                why=one.why or None,
            )
            for one in report.restored
        ],
        latency=None if report.latency is None else _latency(report.latency),
        layers=[_layer(layer) for layer in report.layers],
        sparsity=None if report.sparsified is None else _sparsity(report.sparsified),
        held=None if report.held is None else [_held(one) for one in report.held],
        check=None if report.checked is None else as_check_json(report.checked),
        next=None if report.following is None else _next(report.following),
        tidied=None if report.tidied is None else _tidied(report.tidied),
        tuned=None if report.tuned is None else _tuned(report.tuned),
        rounds=[
            RoundJson(
                number=one.number,
                params=one.params,
                macs=one.macs,
                before=_finite(one.before),
                after=_finite(one.after),
                path=one.path,
                measure=one.measure,  # type: ignore[arg-type]  # pydantic checks it
            )
            for one in report.rounds
        ],
        quantized=None if report.quantized is None else _quantized(report.quantized),
    )
    return found.model_dump(mode="json", by_alias=True)


def _stats(stats: ModelStats, path: str | None) -> StatsJson:
    return StatsJson(
        path=path,
        params=stats.params,
        macs=stats.macs,
        bytes=stats.bytes,
        channels=stats.channels,
    )


def _group_json(group: GroupReport) -> GroupJson:
    return GroupJson(
        id=group.id,
        name=group.producers[0] if group.producers else f"group {group.id}",
        size=group.size,
        kept=group.kept,
        unit=group.unit,  # type: ignore[arg-type]  # pydantic checks it
        units=group.units,
        producers=list(group.producers),
        nodes=list(group.nodes),
        consumers=list(group.consumers),
        frozen=group.frozen,
        why=group.why,
    )


def _twin(twin: TwinResult) -> TwinJson:
    return TwinJson(
        passed=twin.passed,
        max_abs=_finite(twin.max_abs),
        max_rel=_finite(twin.max_rel),
        tolerance=_finite(twin.tolerance),
        output=twin.output,
    )


def _drift(drift: Drift) -> DriftJson:
    return DriftJson(
        cosine=_finite(drift.cosine),
        snr_db=_finite(drift.snr_db),
        rel_l2=_finite(drift.rel_l2),
        max_abs=_finite(drift.max_abs),
        top1=_finite(drift.top1),
    )


def _latency(found: Latency) -> LatencyJson:
    return LatencyJson(
        before_ms=1e3 * found.before,
        after_ms=1e3 * found.after,
        ratio=found.ratio,
        low=found.low,
        high=found.high,
        runs=found.runs,
        predicted_ms=_milliseconds(found.predicted),
        before_p90_ms=_milliseconds(found.before_p90),
        after_p90_ms=_milliseconds(found.after_p90),
        threads=found.threads,
        batch=found.batch,
    )


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds


def _tidied(found: Tidied) -> TidiedJson:
    nodes, norms = (ChangeJson(before=a, after=b) for a, b in (found.nodes, found.norms))
    return TidiedJson(nodes=nodes, norms=norms)


def _layer(layer: LayerReport) -> LayerJson:
    before, after = layer.before, layer.after
    return LayerJson(
        node=before.node,
        op_type=before.op_type,
        macs=CostJson(before=before.macs, after=None if after is None else after.macs),
        bytes=CostJson(
            before=before.moved_bytes, after=None if after is None else after.moved_bytes
        ),
        density=DensityJson(before=before.density, after=None if after is None else after.density),
        thin=layer.thin,
        inputs=_width(layer.inputs),
        outputs=_width(layer.outputs),
    )


def _sparsity(found: Sparsified) -> SparsityJson:
    xz = found.xz_bytes
    return SparsityJson(
        pattern=found.pattern,
        sparsity=found.sparsity,
        scope=found.scope,  # type: ignore[arg-type]  # pydantic checks it
        method=found.method,
        layers=[_thin_layer(one) for one in found.layers],
        packed_bytes=found.packed_bytes,
        dense_bytes=found.dense_bytes,
        xz=None if xz is None else XzJson(before=xz[0], after=xz[1]),
    )


def _quantized(found: Quantized) -> QuantizedJson:
    before, after = found.bytes
    return QuantizedJson(
        to=found.to,  # type: ignore[arg-type]  # pydantic checks it
        method=found.method or None,  # type: ignore[arg-type]  # and this
        done=list(found.done),
        kept=[KeptNodeJson(node=n.node, op_type=n.op_type, why=n.why) for n in found.kept],
        lost=found.lost,
        weight_bytes=CostJson(before=before, after=after),
        tried={name: _finite(error) for name, error in found.tried.items()},
    )


def _thin_layer(one: ThinLayer) -> ThinLayerJson:
    return ThinLayerJson(
        node=one.node,
        op_type=one.op_type,
        tensor=one.tensor,
        eligible=one.eligible,
        done=one.done,
        axis=one.axis,
        shape=(one.groups, one.outputs, one.channels, one.taps) if one.axis is not None else None,
        aligned=one.aligned,
        sparsity=one.sparsity,
        zeros=one.zeros,
        kept=one.kept,
        error=one.error,
        gains=one.gains,
        why=one.why,
        shared=one.shared,
        method=one.method,
    )


def _held(one: HeldWeight) -> HeldJson:
    return HeldJson(
        node=one.node,
        op_type=one.op_type,
        tensor=one.tensor,
        axis=one.axis,
        shape=(one.groups, one.outputs, one.channels, one.taps),
        zeros=one.zeros,
        runs=list(one.runs),
        blocks=dict(one.blocks),
        zero_outputs=one.zero_outputs,
        zero_channels=one.zero_channels,
    )


def _next(step: NextStep) -> NextJson:
    return NextJson(command=step.command, expect=list(step.expect))


def _tuned(found: Tuned) -> TunedJson:
    return TunedJson(
        trainer=found.trainer,
        losses=list(found.losses),  # type: ignore[arg-type]  # pydantic checks it
        optimizer=found.optimizer,  # type: ignore[arg-type]  # pydantic checks it
        rate=found.rate,
        batch_size=found.batch_size,
        samples=found.samples,
        tensors=found.weights[0],
        weights=found.weights[1],
        zeros=found.zeros,
        measure=found.measure,  # type: ignore[arg-type]  # pydantic checks it
        epochs=[
            EpochJson(
                number=one.number,
                loss=_finite(one.loss),
                held_out=_finite(one.held_out),
                metric=_finite(one.metric),
                seconds=round(one.seconds, 2),
            )
            for one in found.epochs
        ],
        best=found.best,
        checked=found.checked,
        drift_before={name: _drift(one) for name, one in found.drift_before.items()},
        drift_after={name: _drift(one) for name, one in found.drift_after.items()},
    )


def _width(side: Width | None) -> WidthJson | None:
    return None if side is None else WidthJson.model_validate(asdict(side))


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
