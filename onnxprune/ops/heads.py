"""Queries, keys and values as heads, whichever way an operator is given them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod, sqrt

import numpy as np

from onnxprune import fields, moves
from onnxprune.graph import Node
from onnxprune.ops.registry import Kept, Setting
from onnxprune.ops.view import OpView, Value
from onnxprune.types import IntArray, Shape

_CHANNELS = {3: (2,), 4: (1, 3), 5: (2, 3, 4)}  # axes of heads and their sizes, by rank
BY_HEAD = (0, 2, 1, 3)  # (batch, length, heads, size) to (batch, heads, length, size), and back


@dataclass(frozen=True, slots=True)
class Part:
    """Queries, keys or values.

    Attributes:
        value: With axes (batch, heads, length, size).
        seen: Shape of the tensor that shows them.
        steps: From that tensor to ``value``.
        span: Where they lie on its last axis.
    """

    value: Value
    seen: Shape
    steps: Sequence[moves.Step]
    span: slice

    def back(self, f: IntArray) -> IntArray:
        """A field of ``value`` as one of the tensor that shows it; what is not of it stays."""
        channels = _CHANNELS[len(self.seen)]
        shape = [size if axis in channels else 1 for axis, size in enumerate(self.seen)]
        places = np.arange(prod(shape)).reshape(shape)
        slots = np.zeros(prod(shape), np.int64)
        slots[moves.run(self.steps, places, self.seen)] = f
        return slots.reshape(shape)


def part_of(op: OpView, shown: Value, heads: int, start: int = 0, stop: int | None = None) -> Part:
    """The columns of a tensor from ``start`` on, or of a stack of several the entry ``start``."""
    span, steps = slice(start, stop), list[moves.Step]()
    if shown.rank == 3:
        columns = np.arange(shown.shape[2])[span]
        split = (*shown.shape[:2], heads, columns.size // heads)
        steps = [moves.Take(2, columns), moves.Reshape(split), moves.Transpose(BY_HEAD)]
    elif shown.rank == 5:
        steps = [moves.Take(3, np.asarray(start)), moves.Transpose(BY_HEAD)]
    # A constant is no weight here: nothing but the operator sums over its heads.
    value = replace(moved(shown, steps), derived=False)
    if not shown.derived:
        # As between nodes: no field for what stays, none along an axis that it does not vary on.
        labels = [fields.narrow(op.births.classes(f)) for f in value.fields]
        value.fields = [f for f in labels if f is not None]
    return Part(value, shown.shape, steps, span)


def moved(value: Value, steps: Sequence[moves.Step]) -> Value:
    """A value after a movement."""
    shape = value.shape
    for step in steps:
        shape = moves.shape_after(step, shape)
    found = [moves.run(steps, f, value.shape) for f in value.fields]
    return replace(value, shape=shape, fields=found)


def heads_left(
    kept: Kept, name: str, heads: int, start: int = 0, stop: int | None = None
) -> tuple[int, int]:
    """What a cut leaves of the heads on a tensor's last axis: their number, and the size of one."""
    shape = kept.before(name)
    alive = kept.alive(name, len(shape) - 1)
    line = np.ones(shape[-1], np.bool_) if alive is None else alive
    each = line[start:stop].reshape(heads, -1)
    left = int(each.any(axis=1).sum())
    return left, int(each.sum()) // left


def settings(
    node: Node, heads: Mapping[str, Setting], before: int, after: int
) -> Mapping[str, Setting]:
    """Attributes after a cut: numbers of heads, and the scale that a size of heads gave so far."""
    if before == after or node.float("scale", 0.0):
        return heads
    return {**heads, "scale": 1 / sqrt(before)}
