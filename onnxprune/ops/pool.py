"""Pooling, resizing, padding and sampling: they act on space and let channels pass."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from onnxprune import fields
from onnxprune.effects import Effect
from onnxprune.ops.norm import statistics
from onnxprune.ops.registry import rule
from onnxprune.ops.view import OpView
from onnxprune.types import IntArray

_SPACE = 2  # first spatial axis of (N, C, spatial…)


@rule("MaxPool", "AveragePool", "LpPool", "GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")
def pool(op: OpView) -> Iterator[Effect]:
    """Windows over space; batch and channels pass."""
    op.out((yield from statistics(op, op.x, range(_SPACE, op.x.rank))))
    if len(op.node.outputs) > 1 and op.node.outputs[1]:
        # Indices of MaxPool count through the channels: a cut would change what they say.
        yield from op.freeze([op.x], "gives indices that count through its channels")


@rule("Resize", "Upsample")
def resize(op: OpView) -> Iterator[Effect]:
    """Axes that change size, or are named, stay; the others pass."""
    changed = [
        axis
        for axis, (before, after) in enumerate(zip(op.x.shape, op.out_shape, strict=True))
        if before != after
    ]
    op.out((yield from statistics(op, op.x, changed)))


@rule("Pad")
def pad(op: OpView) -> Iterator[Effect]:
    """New elements along a cut axis stay for ever; along other axes they adopt the label."""
    pads = _pads(op)
    constant = op.node.string("mode", "constant") == "constant"
    passed: list[IntArray] = []
    for f in op.x.fields:
        touched = [a for a in fields.varying(f) if pads[a] != (0, 0)]
        if not touched:
            passed.append(f)
        elif constant and min(min(pads[a]) for a in touched) >= 0:
            width = [pads[a] if a in touched else (0, 0) for a in range(op.x.rank)]
            passed.append(np.pad(f, width))
        else:
            yield from op.freeze_fields([f], "pads along channels", op.x.name)
    op.out(passed)


def _pads(op: OpView) -> list[tuple[int, int]]:
    """Elements added before and after, for each axis; (-1, -1) where that is not known."""
    rank = op.x.rank
    given = op.ints("pads", 1)
    if given is None:
        same = [a == b for a, b in zip(op.x.shape, op.out_shape, strict=True)]
        return [(0, 0) if equal else (-1, -1) for equal in same]
    axes = op.ints("axes", 3) or tuple(range(rank))
    result = [(0, 0)] * rank
    for position, axis in enumerate(axes):
        result[axis % rank] = (given[position], given[position + len(axes)])
    return result


@rule("GridSample", "RoiAlign", "MaxRoiPool")
def sample(op: OpView) -> Iterator[Effect]:
    """Samples the map at given places; channels pass, space and places stay."""
    yield from op.freeze(op.inputs[1:], "says where to sample")
    for f in op.x.fields:
        if fields.varying(f) == (1,):
            op.outputs.setdefault(0, []).append(f)
        else:
            yield from op.freeze_fields([f], "samples across it", op.x.name)
