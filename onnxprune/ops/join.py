"""Concat and TensorScatter: several tensors become one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from onnxprune import fields
from onnxprune.effects import Effect, Tie
from onnxprune.ops.elementwise import meet
from onnxprune.ops.registry import rule
from onnxprune.ops.view import OpView, Value, axis_slots
from onnxprune.types import IntArray


@rule("Concat")
def concat(op: OpView) -> Iterator[Effect]:
    """Along its axis labels stand side by side; on other axes all inputs tie."""
    axis = op.axis("axis", 0, op.x.rank)
    values = op.present
    mixed = any(not v.derived for v in values)
    result = _side_by_side(values, axis, mixed)
    seen: list[IntArray] = []
    for value in values:
        if mixed and value.derived:
            continue
        for f in value.off([axis]):
            if not any(f is g for g in seen):
                result.append(f)
            for other in values:
                if other is value:
                    continue
                if other.derived and mixed:
                    yield from _tie_constant(op, f, other)
                    continue
                moving = fields.varying(f)
                partners = [g for g in other.fields if any(g.shape[a] > 1 for a in moving)]
                for g in partners:
                    yield Tie(f, fields.first(g, [axis]))
                    if g.shape[axis] > 1:
                        yield Tie(g, fields.first(g, [axis]))
                    elif fields.varying(g) == moving:
                        seen.append(g)
                if not partners:
                    yield from op.freeze_fields([f], f"is joined to {other.stays}", other.name)
    op.out(result)


def _side_by_side(values: list[Value], axis: int, mixed: bool) -> list[IntArray]:
    """Fields along the joined axis; inputs without one contribute elements that stay."""
    columns = [[] if mixed and v.derived else v.on(axis) for v in values]
    result = []
    for depth in range(max(len(column) for column in columns)):
        parts = []
        for value, column in zip(values, columns, strict=True):
            if depth < len(column):
                parts.append(column[depth])
            else:
                # Size 1 on every other axis, so that it broadcasts to its neighbours.
                zero = fields.along(np.zeros(value.shape[axis], np.int64), axis, value.rank)
                parts.append(zero)
        others = np.broadcast_shapes(*(fields.first(p, [axis]).shape for p in parts))
        widened = [
            np.broadcast_to(p, (*others[:axis], p.shape[axis], *others[axis + 1 :])) for p in parts
        ]
        result.append(np.concatenate(widened, axis=axis))
    return result


def _tie_constant(op: OpView, f: IntArray, constant: Value) -> Iterator[Effect]:
    moving = fields.varying(f)
    if len(moving) == 1:
        slots, effects = axis_slots(constant, moving[0])
        yield from effects
        if slots is not None:
            yield Tie(f, fields.along(slots, moving[0], f.ndim))
            return
    else:
        elements = op.births.elements(constant.name)
        if elements is not None:
            yield Tie(f, elements)
            return
    yield from op.freeze_fields([f], "is joined to a constant that stays", constant.name)


@rule("TensorScatter")
def tensor_scatter(op: OpView) -> Iterator[Effect]:
    """Overwrites a part of a cache along one axis; on other axes both tie."""
    axis = op.axis("axis", -2, op.x.rank)
    yield from op.freeze([op.get(2)], "is used as an index")
    operands = []
    for value in (op.x, op.need(1)):
        yield from op.freeze_fields(value.on(axis), "is written into in part", value.name)
        operands.append(replace(value, fields=value.off([axis])))
    op.out((yield from meet(op, operands)))
