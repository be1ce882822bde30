"""Arithmetic on fields: integer arrays that label each element of a tensor with its slot.

A field has its tensor's rank and size 1 along every axis it does not vary on; "element e dies when
its slot dies". Everything here is pure numpy on labels; nothing knows an operator by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onnxprune.types import AnyArray, BoolArray, IntArray, Scalar, Shape


def varying(field: AnyArray) -> tuple[int, ...]:
    """Axes along which the field has more than one entry."""
    return tuple(axis for axis, size in enumerate(field.shape) if size > 1)


def lift(field: NDArray[Scalar], rank: int) -> NDArray[Scalar]:
    """Prepend axes of size 1, as numpy broadcasting does."""
    return field.reshape((1,) * (rank - field.ndim) + field.shape)


def lift_shape(shape: Shape, rank: int) -> Shape:
    """Prepend dimensions of 1."""
    return (1,) * (rank - len(shape)) + tuple(shape)


def along(slots: NDArray[Scalar], axis: int, rank: int) -> NDArray[Scalar]:
    """A field that varies on one axis only."""
    shape = [1] * rank
    shape[axis] = slots.size
    return slots.reshape(shape)


def first(field: NDArray[Scalar], axes: Iterable[int]) -> NDArray[Scalar]:
    """The field with only its first entry kept along ``axes``."""
    drop = set(axes)
    return field[tuple(slice(0, 1) if a in drop else slice(None) for a in range(field.ndim))]


def compress(field: IntArray, classes: IntArray) -> IntArray | None:
    """Classes of a field, size 1 along every axis where they do not change.

    Args:
        field: Slots (positive) or classes (negative).
        classes: Class of each slot.

    Returns:
        The field of classes, or None where every element is kept for ever (class 0).
    """
    return narrow(classes[np.abs(field)])


def narrow(labels: IntArray) -> IntArray | None:
    """A field of classes without the axes along which they do not change; None if all are 0."""
    for axis in varying(labels):
        head = first(labels, (axis,))
        if bool((labels == head).all()):
            labels = head
    return labels if labels.any() else None


def reshape_blocks(source: Shape, target: Shape) -> list[tuple[range, range]]:
    """Factor a Reshape into the finest runs of axes with equal products, in order.

    Axes of extent 1 join the block they stand beside, so each block moves independently.
    """
    blocks: list[tuple[range, range]] = []
    i = j = 0
    while i < len(source) or j < len(target):
        start_i, start_j = i, j
        left = right = 1
        if i < len(source):
            left *= source[i]
            i += 1
        if j < len(target):
            right *= target[j]
            j += 1
        while left != right:
            if left < right and i < len(source):
                left *= source[i]
                i += 1
            elif j < len(target):
                right *= target[j]
                j += 1
            else:
                break
        blocks.append((range(start_i, i), range(start_j, j)))
    return blocks


def reshape(field: NDArray[Scalar], source: Shape, target: Shape) -> NDArray[Scalar]:
    """Execute a Reshape on a field, expanding only the blocks of axes it varies on."""
    if 0 in source:
        return np.zeros((1,) * len(target), field.dtype)
    full: list[int] = []
    result: list[int] = []
    for before, after in reshape_blocks(source, target):
        moves = any(field.shape[axis] > 1 for axis in before)
        full += [source[axis] if moves else 1 for axis in before]
        result += [target[axis] if moves else 1 for axis in after]
    return np.broadcast_to(field, full).reshape(result)


def take(field: NDArray[Scalar], axis: int, indices: IntArray) -> NDArray[Scalar]:
    """``np.take`` that leaves a field alone where it does not vary; indices may have any rank."""
    if field.shape[axis] == 1:
        shape = field.shape[:axis] + (1,) * indices.ndim + field.shape[axis + 1 :]
        return field.reshape(shape)
    return np.take(field, indices, axis=axis)


@dataclass(frozen=True, slots=True)
class Dead:
    """Which elements of a tensor go, by one independent cut.

    Attributes:
        mask: The tensor's rank, size 1 along axes it does not vary on.
        cut: The axis along which rows shrink, each losing its own; None where whole slices go, or
            where counts decide.
    """

    mask: BoolArray
    cut: int | None = None


def rectangular(dead: Dead) -> bool:
    """Whether the survivors form a box: whole slices dropped, then equal counts along one axis."""
    try:
        survivors_shape(dead.mask.shape, [dead])
    except ValueError:
        return False
    return True


def compact(array: NDArray[Scalar], *dead: Dead) -> NDArray[Scalar]:
    """Remove the dead elements of an array, survivors in their order.

    Args:
        array: Any array.
        dead: Which elements go, one for each independent cut.

    Returns:
        The smaller array: slices in which everything is dead are dropped along every axis, then
        each row drops as many along the one axis where counts agree.

    Raises:
        ValueError: The survivors do not form a box.
    """
    for take in _cuts(dead):
        array = take(array)
    return array


def survivors_shape(shape: Shape, dead: Sequence[Dead]) -> Shape:
    """Shape of a tensor after its dead elements went; ``compact`` without an array.

    Raises:
        ValueError: The survivors do not form a box.
    """
    result = list(shape)
    for take in _cuts(dead):
        result[take.axis] = take.count
    return tuple(result)


def alive_along(dead: Sequence[Dead], axis: int) -> BoolArray | None:
    """Which positions of an axis survive, None where the axis keeps its extent.

    Where rows keep different positions the first row speaks for all.

    Raises:
        ValueError: The survivors do not form a box.
    """
    kept: IntArray | None = None
    extent = max(d.mask.shape[axis] for d in dead) if dead else 1
    for cut in _cuts(dead):
        if cut.axis == axis:
            line = np.moveaxis(cut.indices, axis, -1) if cut.indices.ndim > 1 else cut.indices
            line = line.reshape(-1, line.shape[-1])[0]
            kept = line if kept is None else kept[line]
    if kept is None:
        return None
    alive = np.zeros(extent, np.bool_)
    alive[kept] = True
    return alive


@dataclass(frozen=True, slots=True)
class _Cut:
    """One axis made shorter: by the same ``indices`` everywhere, or by others for each row."""

    axis: int
    indices: IntArray

    @property
    def count(self) -> int:
        return int(self.indices.shape[self.axis if self.indices.ndim > 1 else 0])

    def __call__(self, array: NDArray[Scalar]) -> NDArray[Scalar]:
        if array.shape[self.axis] == 1:
            return array
        if self.indices.ndim == 1:
            return np.take(array, self.indices, axis=self.axis)
        shape = np.broadcast_shapes(
            tuple(1 if a == self.axis else n for a, n in enumerate(self.indices.shape)),
            tuple(1 if a == self.axis else n for a, n in enumerate(array.shape)),
        )
        width = array.shape[self.axis]
        wide = [width if a == self.axis else n for a, n in enumerate(shape)]
        deep = [self.count if a == self.axis else n for a, n in enumerate(shape)]
        return np.take_along_axis(
            np.broadcast_to(array, wide), np.broadcast_to(self.indices, deep), axis=self.axis
        )


def _cuts(dead: Sequence[Dead]) -> Iterator[_Cut]:
    """The cuts that remove all dead elements, in the order in which to make them."""
    masks = [d.mask for d in dead]
    for number, one in enumerate(dead):
        for axis in varying(masks[number]) if one.cut is None else ():
            others = tuple(a for a in range(masks[number].ndim) if a != axis)
            gone = masks[number].all(axis=others)
            if gone.any():
                cut = _Cut(axis, np.flatnonzero(~gone))
                yield cut
                masks = [cut(mask) for mask in masks]
        mask = masks[number]
        if mask.any():
            cut = _row_cut(mask, reversed(varying(mask)) if one.cut is None else (one.cut,))
            yield cut
            masks = [cut(other) for other in masks]


def _row_cut(mask: BoolArray, axes: Iterable[int]) -> _Cut:
    """Along the first of ``axes`` where every row keeps as many, its survivors in order."""
    for axis in axes:
        counts = (~mask).sum(axis=axis)
        if (counts == counts.flat[0]).all():
            # A stable sort puts the survivors of each row first, in their original order.
            order = np.argsort(mask, axis=axis, kind="stable")
            return _Cut(axis, np.take(order, np.arange(int(counts.flat[0])), axis=axis))
    raise ValueError("survivors do not form a box")
