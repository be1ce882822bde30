"""How a report ends: drift, what the target says, the verdict, what to run next."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import RenderableType

from onnxprune.report.checks import check_lines
from onnxprune.report.layout import byte_size, counted_layers, number, text_line
from onnxprune.types import Drift, Report

_MOST_OUTPUTS = 6


def tidied_lines(report: Report) -> Iterable[RenderableType]:
    """What folding and simplifying left."""
    if report.tidied is None:
        return
    (nodes, left), (norms, stay) = report.tidied.nodes, report.tidied.norms
    yield text_line(
        f"folded and simplified: {nodes} → {left} nodes, {norms} → {stay} BatchNormalizations"
    )


def drift_lines(report: Report) -> Iterable[RenderableType]:
    """How far every output lies from the original's."""
    verdict = report.verdict
    if not verdict.drift:
        return
    says = " (random input: says little about quality)" if is_random(report) else ""
    yield text_line(f"drift on {verdict.inputs}{says}:")
    for name, one in list(verdict.drift.items())[:_MOST_OUTPUTS]:
        top = "" if one.top1 is None else f", top-1 agreement {100 * one.top1:.1f} %"
        yield text_line(
            f"  {name}: cosine {one.cosine:.4f}, relative L2 {one.rel_l2:.3g}, "
            f"SNR {one.snr_db:.1f} dB{top}"
        )
    if len(verdict.drift) > _MOST_OUTPUTS:
        yield text_line(f"  and {len(verdict.drift) - _MOST_OUTPUTS} more outputs")
    for note in verdict.notes:
        yield text_line(f"  {note}")


def target_lines(report: Report, *, verbose: bool) -> Iterable[RenderableType]:
    """What a target said of the result, where it was asked, and what to expect of it."""
    if report.checked is not None:
        yield from check_lines(report.checked, verbose=verbose, notes=False)
    if report.following is not None:
        yield from map(text_line, report.following.expect)


def worst_drift(report: Report) -> Drift | None:
    """Drift of the output that lies farthest off."""
    found = list(report.verdict.drift.values())
    return max(
        found, key=lambda one: one.rel_l2 if one.rel_l2 == one.rel_l2 else 1e300, default=None
    )


def next_line(report: Report) -> Iterable[RenderableType]:
    """What to run next."""
    if report.following is not None:
        yield text_line(f"next: {report.following.command}")


def closing(report: Report) -> str:
    """Last line of a run, in one line whatever happens."""
    before, after = report.before, report.after
    assert after is not None
    parts = [f"saved {report.output_path}" if report.output_path else "nothing saved"]
    if report.verb == "sparsify" and report.sparsified is not None:
        layers = report.sparsified.layers
        done = sum(one.done for one in layers)
        parts.append(f"{report.sparsified.pattern} in {done} of {counted_layers(len(layers))}")
    elif report.verb == "quantize":
        parts.append(f"{byte_size(before.bytes)} → {byte_size(after.bytes)}")
    else:
        parts.append(f"{number(before.params)} → {number(after.params)} params")
        parts.append(f"{number(before.macs)} → {number(after.macs)} MACs")
    parts.append(_verdict(report))
    worst = worst_drift(report)
    if worst is not None:
        where = " on random input" if is_random(report) else ""
        parts.append(f"drift{where} {worst.rel_l2:.3g} (cos {worst.cosine:.3f})")
    return " · ".join(parts)


def _verdict(report: Report) -> str:
    match report.verdict.status:
        case "none":
            return "not verified"
        case "not_run":
            return "not verified: untestable"
    if report.verb == "sparsify":
        assert report.sparsified is not None
        thinned = any(one.done for one in report.sparsified.layers)
        return "pattern holds, loads and runs" if thinned else "a copy: nothing was thinned"
    if report.verb == "quantize":
        return _ran(report)
    if report.sparsified is not None:
        return f"{_proof(report)}, then {report.sparsified.pattern}, which holds"
    return _proof(report)


def _ran(report: Report) -> str:
    """What is known of a quantized model: ONNX Runtime has no bfloat16 kernels on a CPU."""
    assert report.quantized is not None
    return "valid, emulated" if report.quantized.to == "bf16" else "loads and runs"


def _proof(report: Report) -> str:
    """What the cut itself was held against."""
    if report.exact is False:
        return "not exact: statistics of a normalisation changed"
    if report.importance == "lossless":
        return "equals the original"
    return "twin ok" if report.verdict.twin else "loads and runs"


def is_random(report: Report) -> bool:
    """Whether drift was measured on random inputs."""
    return report.verdict.inputs.startswith("random")
