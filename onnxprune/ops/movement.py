"""Data movement: each operator as steps that are executed on labels."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np

from onnxprune.moves import Broadcast, Reshape, Step, Take, Tile, Transpose, as_slice
from onnxprune.ops.registry import movement
from onnxprune.ops.view import OpView
from onnxprune.types import Shape

_Steps = Sequence[Sequence[Step]] | None


@movement("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def reshape(op: OpView, source: Shape, targets: Sequence[Shape]) -> _Steps:
    """Same elements in the same order under other dimensions."""
    if prod(source) != prod(targets[0]):
        return None  # one of the two was only assumed, or is wrong in the file
    return [[Reshape(targets[0])]]


@movement("Transpose")
def transpose(op: OpView, source: Shape, targets: Sequence[Shape]) -> _Steps:
    """Axes change places."""
    return [[Transpose(op.node.ints("perm") or tuple(reversed(range(len(source)))))]]


@movement("Expand")
def expand(op: OpView, source: Shape, targets: Sequence[Shape]) -> _Steps:
    """Repeats along axes of extent 1; the copies adopt the label."""
    return [[Broadcast(targets[0])]]


@movement("Tile")
def tile(op: OpView, source: Shape, targets: Sequence[Shape]) -> _Steps:
    """Repeats whole axes."""
    return [[Tile(tuple(b // a if a else 1 for a, b in zip(source, targets[0], strict=True)))]]


@movement("Slice")
def slice_(op: OpView, source: Shape, targets: Sequence[Shape]) -> _Steps:
    """A range along some axes, with any step."""
    starts, ends = op.ints("starts", 1), op.ints("ends", 2)
    known = all(given is None or given.array is not None for given in op.inputs[1:])
    if starts is None or ends is None or not known:
        return _unchanged(source, targets)
    axes = op.ints("axes", 3) or tuple(range(len(starts)))
    steps = op.ints("steps", 4) or (1,) * len(starts)
    rank = len(op.x.shape)
    return [
        [
            Take(axis % rank, np.arange(op.x.shape[axis % rank])[as_slice(start, end, step)])
            for start, end, axis, step in zip(starts, ends, axes, steps, strict=True)
        ]
    ]


def _unchanged(source: Shape, targets: Sequence[Shape]) -> _Steps:
    """A range that is not known but keeps every element is no movement at all."""
    return [[]] if tuple(source) == tuple(targets[0]) else None


@movement("Split")
def split(op: OpView, source: Shape, targets: Sequence[Shape]) -> _Steps:
    """Consecutive parts of one axis."""
    axis = op.axis("axis", 0, len(source))
    parts, start = [], 0
    for shape in op.out_shapes:
        size = shape[axis] if shape is not None else 0
        parts.append([Take(axis, np.arange(start, start + size))])
        start += size
    return parts if start == op.x.shape[axis] else None


@movement("Gather")
def gather(op: OpView, source: Shape, targets: Sequence[Shape]) -> _Steps:
    """Chosen entries of one axis, by constant indices."""
    given = op.need(1).array
    if given is None:
        return None
    indices = given.astype(np.int64)
    axis = op.axis("axis", 0, len(source))
    extent = op.x.shape[axis]
    wrapped = np.where(indices < 0, indices + extent, indices)
    return [[Take(axis, wrapped)]]


@movement("DepthToSpace")
def depth_to_space(op: OpView, source: Shape, targets: Sequence[Shape]) -> _Steps:
    """Pixel shuffle: channels become blocks of space (DCR or CRD order)."""
    block = op.node.int("blocksize", 1)
    n, c, h, w = source
    inner = c // (block * block)
    if op.node.string("mode", "DCR") == "DCR":
        wide, perm = (n, block, block, inner, h, w), (0, 3, 4, 1, 5, 2)
    else:
        wide, perm = (n, inner, block, block, h, w), (0, 1, 4, 2, 5, 3)
    return [[Reshape(wide), Transpose(perm), Reshape((n, inner, h * block, w * block))]]


@movement("SpaceToDepth")
def space_to_depth(op: OpView, source: Shape, targets: Sequence[Shape]) -> _Steps:
    """Blocks of space become channels."""
    block = op.node.int("blocksize", 1)
    n, c, h, w = source
    wide = (n, c, h // block, block, w // block, block)
    end = (n, c * block * block, h // block, w // block)
    return [[Reshape(wide), Transpose((0, 3, 5, 1, 2, 4)), Reshape(end)]]
