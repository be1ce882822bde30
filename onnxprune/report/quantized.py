"""What became of the nodes of a quantized model."""

from __future__ import annotations

from collections.abc import Iterable

from onnxprune.report.layout import byte_size
from onnxprune.types import Quantized

_MOST_NAMED = 3  # nodes that one reason names
_MOST_REASONS = 8


def quantized_lines(found: Quantized, *, verbose: bool = False) -> Iterable[str]:
    """How far quantization got, and what it left and why."""
    what = "layers compute" if found.to == "int8" else "nodes compute"
    line = f"{found.to}: {len(found.done)} {what} in it, {len(found.kept)} stay as they were"
    before, after = found.bytes
    yield f"{line} · weights {byte_size(before)} → {byte_size(after)}"
    if found.method:
        tried = ", ".join(f"{name} {error:.3g}" for name, error in found.tried.items())
        yield f"ranges of activations by {found.method}" + (
            f" (held-out error: {tried})" if tried else ""
        )
    if found.lost:
        yield f"{found.lost} weights are too small for it and became zero"
    reasons: dict[str, list[str]] = {}
    for one in found.kept:
        reasons.setdefault(one.why, []).append(one.node)
    for at, (why, nodes) in enumerate(reasons.items()):
        if at == _MOST_REASONS and not verbose:
            yield f"  and {len(reasons) - at} more reasons (-v gives them)"
            return
        shown = nodes if verbose else nodes[:_MOST_NAMED]
        more = f" (+{len(nodes) - len(shown)})" if len(nodes) > len(shown) else ""
        yield f"  not {found.to}: {why}: {', '.join(shown)}{more}"


def slower(to: str) -> str:
    """Why fewer bits are no faster here."""
    what = "Q/DQ pairs" if to == "int8" else f"{to} models"
    return (
        f"ONNX Runtime on this CPU runs {what} slower than float32; TensorRT is what they are for"
    )
