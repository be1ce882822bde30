"""Data movement as short lists of steps that run on labels as they would on data.

Reshape, Transpose, Slice, DepthToSpace … each become a few of the four steps below. The same steps
label a tensor, find out whether a run of movements is a mere selection, and prove after a cut that
the movement still gives the survivors in their order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onnxprune import fields
from onnxprune.types import AnyArray, BoolArray, IntArray, Scalar, Shape


@dataclass(frozen=True, slots=True)
class Reshape:
    """New dimensions, elements in the same order."""

    target: Shape


@dataclass(frozen=True, slots=True)
class Transpose:
    """Axes in another order."""

    perm: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Take:
    """Entries ``indices`` (any rank, non-negative) along ``axis``: Slice, Split, Gather."""

    axis: int
    indices: IntArray


@dataclass(frozen=True, slots=True)
class Tile:
    """Whole axes repeated."""

    repeats: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Broadcast:
    """Expand: new entries adopt the label of the one they repeat."""

    target: Shape


Step = Reshape | Transpose | Take | Tile | Broadcast


def shape_after(step: Step, shape: Shape) -> Shape:
    """Shape of a tensor after one step."""
    match step:
        case Reshape(target) | Broadcast(target):
            return target
        case Transpose(perm):
            return tuple(shape[axis] for axis in perm)
        case Take(axis, indices):
            return shape[:axis] + indices.shape + shape[axis + 1 :]
        case Tile(repeats):
            return tuple(size * times for size, times in zip(shape, repeats, strict=True))


def apply(step: Step, field: NDArray[Scalar], shape: Shape) -> NDArray[Scalar]:
    """Field of a tensor of ``shape`` after one step."""
    match step:
        case Reshape(target):
            return fields.reshape(field, shape, target)
        case Broadcast(target):
            return fields.lift(field, len(target))
        case Transpose(perm):
            return field.transpose(perm)
        case Take(axis, indices):
            return fields.take(field, axis, indices)
        case Tile(repeats):
            moving = [r if size > 1 else 1 for r, size in zip(repeats, field.shape, strict=True)]
            return np.tile(field, moving)


def run(steps: Sequence[Step], field: NDArray[Scalar], shape: Shape) -> NDArray[Scalar]:
    """Field after all steps."""
    for step in steps:
        field = apply(step, field, shape)
        shape = shape_after(step, shape)
    return field


def selection(steps: Sequence[Step], shape: Shape) -> tuple[int, IntArray] | None:
    """The one axis and its indices if the steps only select or permute along it, else None.

    An identity gives axis 1 (0 where there is no other) with all its indices.
    """
    end = shape
    for step in steps:
        if isinstance(step, Tile | Broadcast):
            return None
        end = shape_after(step, end)
    if len(end) != len(shape):
        return None
    found: tuple[int, IntArray] | None = None
    for axis, size in enumerate(shape):
        if size == 1 and end[axis] == 1:
            continue
        source = fields.along(np.arange(size), axis, len(shape))
        moved = run(steps, source, shape)
        if any(a != axis for a in _changing(moved)):
            return None
        line = fields.first(moved, [a for a in range(len(end)) if a != axis]).reshape(-1)
        indices = np.broadcast_to(line, (end[axis],)) if line.size == 1 else line
        if indices.size != size or not (indices == np.arange(size)).all():
            if found is not None:
                return None
            found = (axis, indices)
    axis = min(1, len(shape) - 1)
    return found or (axis, np.arange(shape[axis] if shape else 1))


def _changing(field: AnyArray) -> list[int]:
    return [a for a in fields.varying(field) if not (field == fields.first(field, (a,))).all()]


def as_slice(start: int, stop: int, step: int) -> slice:
    """A Slice's range as Python's: a very negative end of a negative step means past the front."""
    return slice(start, stop if step > 0 or stop > -(1 << 31) else None, step)


def renumber(indices: IntArray, alive: BoolArray, cut: int | None = None) -> IntArray:
    """Indices into the survivors of an axis, for those of ``indices`` that survive.

    Args:
        indices: Positions along the original axis, any rank.
        alive: Which positions survive, shape (extent,).
        cut: Axis of a table of indices that shrinks.
    """
    position = np.cumsum(alive) - 1
    if indices.ndim == 0:
        return np.asarray(position[indices])
    if indices.ndim == 1:
        return position[indices[alive[indices]]]
    # A table of indices must stay a box: drop its dead slices as any tensor does.
    return fields.compact(position[indices], fields.Dead(~alive[indices], cut))


def survives(
    steps: Sequence[Step],
    new_steps: Sequence[Step],
    dead: fields.Dead,
    shapes: tuple[Shape, Shape],
    cut: int | None = None,
) -> bool:
    """Whether the movement, executed on the survivors, gives just the survivors of its output.

    Args:
        steps: The movement at the original shapes.
        new_steps: The same at the shapes after the cut; its Take steps are renumbered here.
        dead: Which elements of the source go, by one field.
        shapes: Shape of the source before and after the cut.
        cut: Axis of the output along which rows shrink, where that is settled.
    """
    mask = dead.mask
    ids = np.arange(mask.size, dtype=np.int64).reshape(mask.shape)
    shape, new_shape = shapes
    last = len(steps) - 1
    try:
        small = fields.compact(ids, dead)
        for number, (step, after) in enumerate(zip(steps, new_steps, strict=True)):
            new_step = after
            if isinstance(step, Take):
                alive = fields.alive_along([dead if number == 0 else fields.Dead(mask)], step.axis)
                table = None if cut is None or number < last else cut - step.axis
                new_step = _renumbered(step, alive, table)
            ids, mask = apply(step, ids, shape), apply(step, mask, shape)
            small = apply(new_step, small, new_shape)
            shape, new_shape = shape_after(step, shape), shape_after(new_step, new_shape)
        expected = fields.compact(ids, fields.Dead(mask, cut))
        # An axis of which one entry survives has size 1 now: it no longer varies.
        return bool((expected == np.broadcast_to(small, expected.shape)).all())
    except (ValueError, IndexError):
        return False


def _renumbered(step: Take, alive: BoolArray | None, table: int | None) -> Take:
    if alive is None:
        return step
    inside = table if table is not None and 0 <= table < step.indices.ndim else None
    return Take(step.axis, renumber(step.indices, alive, inside))
