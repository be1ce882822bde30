"""Rows of grids: which axis of a field is cut, and which rows must keep equal counts."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onnxprune import fields
from onnxprune.types import IntArray

Signature = NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class RowRule:
    """Rows of one field, as a rule asked for them.

    Attributes:
        classes: The field, compressed.
        axes: Its row axes.
        hard: They follow from use; soft ones only say which axes must not be cut.
    """

    classes: IntArray
    axes: tuple[int, ...]
    hard: bool


def matrix(labels: IntArray, rows: Sequence[int]) -> IntArray:
    """A field as (rows, columns)."""
    columns = [axis for axis in range(labels.ndim) if axis not in rows]
    count = int(np.prod([labels.shape[axis] for axis in rows]))
    return labels.transpose([*rows, *columns]).reshape(count, -1)


def hashes(*parts: IntArray) -> Signature:
    """Mix integer arrays element by element into 64 bits, the same in every run."""
    with np.errstate(over="ignore"):
        value = np.full(parts[0].shape, 0x9E3779B97F4A7C15, np.uint64)
        for part in parts:
            value ^= part.astype(np.uint64) + np.uint64(0x632BE59BD9B4E019)
            value *= np.uint64(0xBF58476D1CE4E5B9)
            value ^= value >> np.uint64(29)
    return value


def row_signature(rules: Sequence[RowRule], size: int) -> Signature:
    """Hash of the rows that each component lies in, by its label; 0 where use demands no rows."""
    signature = np.zeros(size, np.uint64)
    for number, rule in enumerate(rules):
        if not rule.hard:
            continue
        lines = matrix(-rule.classes, rule.axes)
        row = np.broadcast_to(np.arange(lines.shape[0])[:, None], lines.shape).reshape(-1)
        pairs = np.unique(np.stack([lines.reshape(-1), row]), axis=1)
        np.add.at(signature, pairs[0], hashes(np.full_like(pairs[1], number), pairs[1]))
    return signature


def cut_axis(classes: IntArray, signature: Signature, soft: Collection[int]) -> int:
    """The axis of a grid to cut: one whose lines stay within demanded rows, the longest."""
    marks = signature[np.abs(classes)]

    def fits(axis: int) -> bool:
        return bool((marks == fields.first(marks, [axis])).all())

    return max(fields.varying(classes), key=lambda a: (fits(a), a not in soft, classes.shape[a], a))


def known_rows(classes: IntArray, signature: Signature) -> tuple[int, ...] | None:
    """Row axes of a grid if use settles them, None while that is open.

    Settled: every channel lies in demanded rows, and just one axis runs along them.
    """
    marks = signature[np.abs(classes)]
    if not marks.all():
        return None
    moving = fields.varying(classes)
    along = [axis for axis in moving if bool((marks == fields.first(marks, [axis])).all())]
    return tuple(axis for axis in moving if axis != along[0]) if len(along) == 1 else None
