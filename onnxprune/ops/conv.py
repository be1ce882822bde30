"""Convolutions: the weight's output axis makes channels, its input axis reads them."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping

import numpy as np

from onnxprune import fields
from onnxprune.effects import Consumes, Effect, Freeze, Later, Produces, Rows, Tie
from onnxprune.graph import Node
from onnxprune.ops.elementwise import parameter
from onnxprune.ops.registry import Kept, macs, repair, rule
from onnxprune.ops.view import OpView, Value, axis_slots, collapse
from onnxprune.types import IntArray

_CHANNEL = 1


@rule("Conv")
def conv(op: OpView) -> Iterator[Effect]:
    """Reads weight axis 1 of each group, makes axis 0; depthwise ties input to output."""
    weight = op.need(1)
    group = op.node.int("group", 1)
    if not weight.derived:
        yield from op.freeze(op.inputs, "has a weight that is computed at run time")
        return
    made, effects = axis_slots(weight, 0)
    yield from effects
    read = yield from _channels(op, op.x)
    width = op.x.shape[_CHANNEL]
    if made is None:
        made = np.zeros(weight.shape[0], np.int64)
    if _shared(op.x):
        yield Produces(made)
    elif group == 1:
        yield Produces(made)
        yield from _dense(op, read, weight, 1)
    elif group == width:
        yield from _depthwise(op, read, made.reshape(group, -1))
    else:
        yield from _grouped(op, read, weight, made.reshape(group, -1))
    yield from _finish(op, made)


@rule("ConvTranspose")
def conv_transpose(op: OpView) -> Iterator[Effect]:
    """As Conv with the weight's axes exchanged: reads axis 0, makes axis 1 of each group."""
    weight = op.need(1)
    group = op.node.int("group", 1)
    if not weight.derived:
        yield from op.freeze(op.inputs, "has a weight that is computed at run time")
        return
    read = yield from _channels(op, op.x)
    if group == 1:
        if not _shared(op.x):
            yield from _dense(op, read, weight, 0)
        made, effects = axis_slots(weight, 1)
        yield from effects
        if made is None:
            made = np.zeros(weight.shape[1], np.int64)
        yield Produces(made)
    elif group == op.x.shape[_CHANNEL]:
        rows, effects = axis_slots(weight, 0)
        yield from effects
        if rows is None:
            rows = np.zeros(weight.shape[0], np.int64)
        yield from _depthwise(op, read, rows.reshape(group, 1))
        made = np.repeat(rows, weight.shape[1])  # outputs of one input go together
    else:
        made = yield from _grouped_transpose(op, read, weight, group)
    yield from _finish(op, made)


def _channels(op: OpView, x: Value) -> Generator[Effect, None, IntArray | None]:
    """The one field on the channel axis, shape (C,), or None; everything else is dealt with."""
    rank = x.rank
    found = x.on(_CHANNEL)
    for f in x.fields:
        if f.shape[_CHANNEL] == 1 and any(a > 1 for a in fields.varying(f)):
            yield from op.freeze_fields([f], "slides over an axis that would be cut", x.name)
    if len(found) != 1:
        # Some of several cuts may turn out to be frozen; if none is, the first remains.
        for f in found[1:]:
            yield Later(Freeze(f, op.reason("reads channels that two cuts share", x.name)))
        return None
    head, effects = collapse(found[0], [a for a in range(rank) if a != _CHANNEL])
    yield from effects
    return head.reshape(-1)


def _shared(x: Value) -> bool:
    """Whether several cuts run through the channels: all but one will be frozen."""
    return len(x.on(_CHANNEL)) > 1


def _dense(op: OpView, read: IntArray | None, weight: Value, axis: int) -> Iterator[Effect]:
    slots, effects = axis_slots(weight, axis)
    yield from effects
    if slots is None:
        if read is not None:
            yield Freeze(read, op.reason("reads it with a weight that cannot be cut", weight.name))
    elif read is None:
        yield Freeze(slots, op.reason("reads an input that cannot be cut", op.x.name))
    else:
        yield Tie(read, slots)
        yield Consumes(slots)


def _depthwise(op: OpView, read: IntArray | None, rows: IntArray) -> Iterator[Effect]:
    """Each input channel goes with the outputs it alone makes; ``rows``: (C, multiplier)."""
    if read is None:
        yield Freeze(rows, op.reason("filters an input that cannot be cut", op.x.name))
    else:
        yield Tie(read.reshape(-1, 1), rows)


def _grouped(op: OpView, read: IntArray | None, weight: Value, made: IntArray) -> Iterator[Effect]:
    """Groups keep equal counts, each its own; whole groups go where either side is all tied.

    ``made``: (group, out / group). The weight reads (group, in / group), so every group slices
    its own columns.
    """
    group = made.shape[0]
    yield Produces(made)
    columns, effects = _columns(op, weight, (group, -1, *weight.shape[1:]), 1)
    yield from effects
    if read is None:
        yield Freeze(columns, op.reason("reads an input that cannot be cut", op.x.name))
        yield Rows(made, (0,), hard=True)
        return
    grid = read.reshape(group, -1)
    if _all_tied(op, grid) or _all_tied(op, made):
        yield Tie(grid, grid[:, :1])
        yield Tie(made, grid[:, :1])
        return
    yield Rows(grid, (0,), hard=True)
    yield Rows(made, (0,), hard=True)
    yield Tie(grid, columns)
    yield Consumes(columns)


def _grouped_transpose(
    op: OpView, read: IntArray | None, weight: Value, group: int
) -> Generator[Effect, None, IntArray]:
    made, effects = _columns(op, weight, (group, -1, *weight.shape[1:]), 1)
    yield from effects
    yield Produces(made)
    made = np.broadcast_to(made, (group, weight.shape[1]))
    rows, effects = axis_slots(weight, 0)
    yield from effects
    rows = np.zeros(weight.shape[0], np.int64) if rows is None else rows
    rows = rows.reshape(group, -1)
    if read is None:
        yield Freeze(rows, op.reason("reads an input that cannot be cut", op.x.name))
        yield Rows(made, (0,), hard=True)
        return made.reshape(-1)
    grid = read.reshape(group, -1)
    yield Tie(grid, rows)
    if _all_tied(op, grid) or _all_tied(op, made):
        yield Tie(grid, grid[:, :1])
        yield Tie(made, grid[:, :1])
    else:
        yield Rows(grid, (0,), hard=True)
        yield Rows(made, (0,), hard=True)
        yield Consumes(rows)
    return made.reshape(-1)


def _columns(
    op: OpView, weight: Value, view: tuple[int, ...], axis: int
) -> tuple[IntArray, list[Effect]]:
    """Slots (group, width) of a weight axis that every group slices for itself.

    Where the weight comes through a chain that hides its elements, one row serves all groups.
    """
    own = op.births.grid(weight.name, view, (0, axis + 1))
    if own is not None:
        return own.reshape(view[0], -1), []
    slots, effects = axis_slots(weight, axis)
    if slots is None:
        slots = np.zeros(weight.shape[axis], np.int64)
    return slots.reshape(1, -1), effects


def _all_tied(op: OpView, grid: IntArray) -> bool:
    """Whether every row is one coupled channel, so that only whole rows can go."""
    labels = op.births.classes(grid)
    alike = grid.shape[1] > 1 and bool((labels == labels[:, :1]).all())
    return alike and bool(labels.any())  # what stays for ever is alike too, but says nothing


def _finish(op: OpView, made: IntArray) -> Iterator[Effect]:
    """Label the output, let the bias follow, pass what rides on the batch axis."""
    rank = len(op.out_shape)
    f = fields.along(made, _CHANNEL, rank)
    yield from parameter(op, 2, f, _CHANNEL)
    op.out([f, *op.x.off(range(1, op.x.rank))])


@repair("Conv", "ConvTranspose")
@repair("FusedConv", domain="com.microsoft")
def groups_left(node: Node, kept: Kept) -> Mapping[str, int]:
    """Depthwise keeps one group for each channel; otherwise whole groups may have gone."""
    return surviving_groups(node, "group", kept)


def surviving_groups(node: Node, name: str, kept: Kept) -> Mapping[str, int]:
    """The number of groups of channels in which something is left."""
    group = node.int(name, 1)
    alive = kept.alive(node.inputs[0], _CHANNEL)
    if group == 1 or alive is None:
        return {}
    return {name: int(alive.reshape(group, -1).any(axis=1).sum())}


@macs("Conv")
@macs("FusedConv", domain="com.microsoft")
def conv_macs(op: OpView) -> int:
    """Output elements times weights read for each."""
    return int(np.prod(op.out_shape)) * int(np.prod(op.need(1).shape[1:]))


@macs("ConvTranspose")
def conv_transpose_macs(op: OpView) -> int:
    """Input elements times weights applied to each."""
    return int(np.prod(op.x.shape)) * int(np.prod(op.need(1).shape[1:]))
