"""Axes along which tensors hold copies: they are as long as what they meet needs them to be.

A mask that is expanded over the heads has nothing to say about which heads go. It carries no labels
of its own; where it meets channels it adopts theirs, and the shape it is expanded to follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from onnxprune import fields, moves
from onnxprune.graph import Node
from onnxprune.ops.registry import Entry, is_unary
from onnxprune.ops.view import Copies, OpView

REPEATING = {"ConstantOfShape", "Expand"}
_PAIRED = {
    *("Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "And", "Or", "Xor", "Equal", "Where"),
    *("Greater", "GreaterOrEqual", "Less", "LessOrEqual"),
}
_SHOWING = {"Cast", "CastLike", "Identity"}


def made(view: OpView) -> Sequence[Copies]:
    """The copies that a repeating operator makes."""
    shape, name = view.out_shapes[0], view.node.outputs[0]
    if shape is None:
        return ()
    before = view.x.shape if view.node.op_type == "Expand" else ()
    before = fields.lift_shape(before, len(shape))
    return [
        Copies(name, axis, fields.along(np.arange(size), axis, len(shape)))
        for axis, size in enumerate(shape)
        if size > 1 and before[axis] == 1
    ]


def carried(view: OpView, entry: Entry | None, node: Node) -> Sequence[Copies]:
    """The copies of its first output, of those that its inputs hold."""
    shape = view.out_shapes[0]
    holders = [value for value in view.present if value.copies]
    if shape is None or entry is None or not holders:
        return ()
    if entry.move is not None:
        return _moved(view, entry) if view.x.copies else ()
    if node.op_type in _SHOWING or is_unary(node.op_type, node.since):
        return view.x.copies
    if node.op_type not in _PAIRED:
        return ()
    found = []
    for value in holders:
        others = [v.shape for v in view.present if v is not value]
        lifted = [fields.lift_shape(other, len(shape)) for other in others]
        for one in value.copies:
            places = fields.lift(one.places, len(shape))
            if all(other[a] == 1 for other in lifted for a in fields.varying(places)):
                found.append(replace(one, places=places))
    return found


def _moved(view: OpView, entry: Entry) -> Sequence[Copies]:
    assert entry.move is not None
    steps = entry.move(view, view.x.shape, [s or () for s in view.out_shapes])
    if not steps:
        return ()
    shape = view.x.shape
    moved = [replace(one, places=moves.run(steps[0], one.places, shape)) for one in view.x.copies]
    return [one for one in moved if one.places.size > 1]
