"""What a surgery did, in the original's names: the parts of a recipe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from onnxprune import fields
from onnxprune.groups import DependencyGraph
from onnxprune.slots import Birth
from onnxprune.survivors import DeadSlots
from onnxprune.types import AnyArray, BoolArray, Shape


@dataclass(frozen=True, slots=True)
class Removed:
    """Positions that went from one axis of one weight, in the original's numbering.

    ``at``: the part of the tensor this speaks of, as axis and range, where rows differ.
    """

    tensor: str
    axis: int
    role: str
    indices: tuple[int, ...]
    at: tuple[int, int, int] | None = None


@dataclass(frozen=True, slots=True)
class Mask:
    """A 0/1 mask the twin multiplies one input of a node by; ``zero``: flat positions."""

    node: str
    input: int
    shape: Shape
    zero: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Copy:
    """A constant that no longer equals the one it was shared with, and who reads it."""

    of: str
    uses: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Change:
    """A shape constant or attribute that was rewritten."""

    what: Mapping[str, object]
    before: object
    after: object


def dead_births(
    dependency: DependencyGraph, dead: DeadSlots
) -> Iterator[tuple[str, list[tuple[Birth, BoolArray]]]]:
    """Constants of which something goes, with the births that say what."""
    by_leaf: dict[str, list[tuple[Birth, BoolArray]]] = {}
    for birth in dependency.tracer.table.births:
        if dead.slots[birth.base : birth.base + birth.size].any():
            by_leaf.setdefault(birth.leaf, []).append((birth, dead.slots[birth.field]))
    for name in dependency.graph.constants:
        if name in by_leaf:
            yield name, by_leaf[name]


def role(dependency: DependencyGraph, birth: Birth) -> str:
    """``producer``, ``consumer`` or ``parameter``."""
    span = slice(birth.base, birth.base + birth.size)
    if dependency.tracer.producing[span].any():
        return "producer"
    return "consumer" if dependency.tracer.consuming[span].any() else "parameter"


def removed_entries(
    dependency: DependencyGraph, name: str, birth: Birth, mask: BoolArray
) -> Iterator[Removed]:
    """What goes from one constant by one birth: whole slices, and the rest row by row."""
    kind = role(dependency, birth)
    shape = dependency.graph.constants[name].weight.shape
    extra = len(birth.view) - len(shape)
    if len(birth.axes) == 1 and not extra:
        yield Removed(name, birth.axes[0], kind, flat(mask))
        return
    rest: BoolArray = mask
    for axis in fields.varying(mask):
        others = tuple(a for a in range(mask.ndim) if a != axis)
        whole = np.asarray(rest.all(axis=others))
        if whole.any() and axis >= extra:
            yield Removed(name, axis - extra, kind, flat(whole))
            rest = rest & ~whole.reshape([-1 if a == axis else 1 for a in range(mask.ndim)])
    cut, row_axis = birth.axes[-1], birth.axes[0]
    width = birth.view[1] if extra else 1
    lines = np.moveaxis(rest, row_axis, 0).reshape(rest.shape[row_axis], -1)
    for row, line in enumerate(lines):
        if line.any():
            at = (0 if extra else row_axis, row * width, (row + 1) * width)
            yield Removed(name, cut - extra, kind, flat(line), at)


def flat(mask: AnyArray) -> tuple[int, ...]:
    """Flat positions of the true elements."""
    return tuple(int(v) for v in np.flatnonzero(mask))
