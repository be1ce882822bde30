"""How much layers multiply for each byte they move, and which ones a cut leaves too thin.

The thresholds are where the speed of a layer falls off in ONNX Runtime on an x86 CPU, as measured
in ``tools/notes/0007-latency-and-thin-layers.md``; other hardware wants at least as many channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from onnxprune.types import LayerStats, ModelStats

FEWEST = 16  # channels below which a layer runs at a small part of its speed
WIDE = 2 * FEWEST  # what it must have had before, so that it is the cut that made it thin
ALIGNMENT = 4  # channels of a depthwise Conv that the fast kernels want a multiple of
LEAST_DENSITY = 2.0  # multiply-accumulates for each byte
SHARE = 0.02  # of the model's multiply-accumulates that is worth a word


@dataclass(frozen=True, slots=True)
class Change:
    """One layer before and after a cut."""

    before: LayerStats
    after: LayerStats


def changes(before: ModelStats, after: ModelStats) -> tuple[Change, ...]:
    """Layers that multiply in both models, by name, in order."""
    old = {(layer.node, layer.op_type): layer for layer in before.layers if layer.macs}
    return tuple(
        Change(old[layer.node, layer.op_type], layer)
        for layer in after.layers
        if layer.macs and (layer.node, layer.op_type) in old
    )


def thinnest(found: tuple[Change, ...], count: int) -> tuple[Change, ...]:
    """The layers that lost most of their density, the worst first."""
    lost = [change for change in found if change.after.density < change.before.density]
    lost.sort(key=lambda change: change.after.density / change.before.density)
    return tuple(lost[:count])


def warnings(before: ModelStats, after: ModelStats) -> Iterator[str]:
    """What a cut left too thin to be fast: at most one line for each way of being so."""
    found = changes(before, after)
    odd = [c for c in found if _odd(c)]
    if odd:
        worst = max(odd, key=lambda change: change.before.macs)
        yield (
            f"depthwise Conv '{worst.after.node}'{_more(odd)} is left {worst.after.outputs} "
            f"channels, no multiple of {ALIGNMENT}: ONNX Runtime runs such a layer 5 to 8 times "
            f"slower on a CPU; try --round-to {ALIGNMENT} or --round-to {FEWEST}"
        )
    thin = [c for c in found if _thin(c) and _share(c, after)]
    if thin:
        worst = max(thin, key=lambda change: change.after.macs)
        yield (
            f"{worst.after.op_type} '{worst.after.node}'{_more(thin)} is left thin: "
            f"{worst.after.inputs} channels in and {worst.after.outputs} out, "
            f"{worst.after.density:.2g} MACs for each byte instead of {worst.before.density:.2g}; "
            f"it will not get faster by as much as its MACs say: try --min-channels {FEWEST} "
            f"or --round-to {FEWEST}"
        )


def is_thin(change: Change) -> bool:
    """Whether a cut left a layer too thin to be fast, however little of the model it is."""
    return _odd(change) or _thin(change)


def _odd(change: Change) -> bool:
    """A depthwise Conv is off the multiple that its fast kernels want, and was not before."""
    before, after = change.before, change.after
    return after.depthwise and bool(after.outputs % ALIGNMENT) and not before.outputs % ALIGNMENT


def _thin(change: Change) -> bool:
    before, after = change.before, change.after
    if after.depthwise:
        return after.outputs < FEWEST and before.outputs >= WIDE
    few = any(
        0 < new < FEWEST and old >= WIDE
        for old, new in ((before.inputs, after.inputs), (before.outputs, after.outputs))
    )
    sparse = after.density < min(before.density / 2, LEAST_DENSITY)
    return few or sparse


def _share(change: Change, after: ModelStats) -> bool:
    return change.after.macs >= SHARE * after.macs


def _more(found: list[Change]) -> str:
    return f" (and {len(found) - 1} more)" if len(found) > 1 else ""
