"""Operators that work element by element, with numpy broadcasting."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace

import numpy as np

from onnxprune import fields
from onnxprune.effects import Adopts, Effect, Freeze, Later, Rows, Tie
from onnxprune.ops.registry import rule
from onnxprune.ops.view import OpView, Value, axis_slots, collapse
from onnxprune.types import IntArray


@rule("CastLike")
def cast_like(op: OpView) -> Iterator[Effect]:
    """Labels of the first input pass; the second only names a type."""
    op.out(op.x.fields)
    yield from ()


@rule("Relu", "Clip", "Dropout")
def unary(op: OpView) -> Iterator[Effect]:
    """One element in, one element out: labels pass. Serves every operator whose schema says so."""
    for position, shape in enumerate(op.out_shapes):
        if shape == op.x.shape:
            op.out(op.x.fields, position)
    yield from op.freeze([v for v in op.inputs[1:] if v is not None and v.rank > 0], "is not cut")


@rule(
    "Add", "Sub", "Mul", "Div", "Pow", "Mod", "PRelu", "Sum", "Mean", "Max", "Min", "Where",
    "And", "Or", "Xor", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual",
    "BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor",
    since=7,  # before, the second operand was aligned by an attribute
)  # fmt: skip
def broadcast(op: OpView) -> Iterator[Effect]:
    """Operands meet element by element: fields tie, constants are cut with the data."""
    rank = len(op.out_shape)
    operands = [lifted(value, rank) for value in op.present]
    found = yield from meet(op, operands)
    op.out(found)


def lifted(value: Value, rank: int) -> Value:
    """A value with axes of size 1 in front, as numpy broadcasts it."""
    found = [fields.lift(f, rank) for f in value.fields]
    shape = fields.lift_shape(value.shape, rank)
    copies = [replace(c, places=fields.lift(c.places, rank)) for c in value.copies]
    return replace(value, shape=shape, fields=found, copies=copies)


def meet(op: OpView, operands: list[Value]) -> Generator[Effect, None, list[IntArray]]:
    """Tie operands of one rank where they meet; returns the fields of the result.

    For a field F of one operand and another operand that extends along some of F's axes, E: a
    field there ties; a constant is cut with F where E is all of F; otherwise the axes E must stay,
    so they are rows of F, or F is frozen where they are all it has. A constant that data only
    multiplies (angles of positions) keeps the labels of the axes that are its own.
    """
    data = [v for v in operands if not v.derived] or operands
    result: list[IntArray] = []
    for value in data:
        for f in value.fields:
            merged = stays = False
            for other in operands:
                if other is value:
                    continue
                shared = [a for a in fields.varying(f) if other.shape[a] > 1]
                if not shared:
                    continue
                if other.derived and not value.derived:
                    yield from _with_constant(op, f, shared, other, value)
                    continue
                partners = counterparts(f, other.fields, shared)
                for g in partners:
                    if undecided(op, f, g):
                        yield Later(Tie(f, g))
                        stays = stays or set(fields.varying(f)) < set(fields.varying(g))
                        continue
                    yield Tie(f, g)
                    merged = merged or stand_in(f, g, result)
                adopted = [] if partners else adopt(f, shared, other)
                yield from adopted
                if not partners and not adopted:
                    yield from _unlabelled(op, f, shared, other)
                    stays = stays or len(shared) == len(fields.varying(f))
            if not merged and not stays:
                result.append(f)
    return [*result, *_spread(operands)]


def adopt(f: IntArray, shared: Sequence[int], other: Value) -> list[Effect]:
    """Labels for the copies that another operand holds along just the axes of a field."""
    if set(shared) != set(fields.varying(f)):
        return []
    for one in other.copies:
        places = one.places
        if places.shape == f.shape:
            known, first = np.unique(places, return_index=True)
            if known.size == places.max() + 1:
                labels = f.reshape(-1)[first]
                return [Tie(f, labels[places]), Adopts(one.tensor, one.axis, labels)]
    return []


def counterparts(f: IntArray, others: list[IntArray], shared: list[int]) -> list[IntArray]:
    """The fields on some axes that say the same thing as ``f``, or all that lie there.

    A tensor may have a field for whole rows and one for what is cut within them: like goes with
    like.
    """
    found = [g for g in others if any(g.shape[a] > 1 for a in shared)]
    return [g for g in found if fields.varying(g) == fields.varying(f)] or found


def undecided(op: OpView, f: IntArray, g: IntArray) -> bool:
    """Whether one of two fields is a grid of which the other may, or may not, be the cut.

    One table of angles serves every head: where heads go whole it stays, where dimensions go it is
    cut with them. What is cut is known when a contraction has settled the rows.
    """
    small, large = sorted((f, g), key=lambda one: len(fields.varying(one)))
    rows = set(fields.varying(large)) - set(fields.varying(small))
    if not rows or not set(fields.varying(small)) < set(fields.varying(large)):
        return False
    known = op.births.hard_rows(large)
    return known is None or set(known) != rows


def _spread(operands: list[Value]) -> list[IntArray]:
    """Fields of constants along axes that only they extend on, where they meet unlabelled data."""
    data = [v for v in operands if not v.derived]
    if not data or any(v.fields for v in data):
        return []
    return [
        f
        for value in operands
        if value.derived
        for f in value.fields
        if all(v is value or v.shape[a] == 1 for v in operands for a in fields.varying(f))
    ]


def stand_in(f: IntArray, g: IntArray, result: list[IntArray]) -> bool:
    """Let one of two fields that were tied speak for both, if ``g`` is in the result already.

    The one that varies on more axes stays. Two entries for one thing would look like two
    independent cuts to whatever comes next.
    """
    at = next((n for n, r in enumerate(result) if r is g), None)
    if at is None:
        return False
    if set(fields.varying(f)) <= set(fields.varying(g)):
        return True
    if set(fields.varying(g)) <= set(fields.varying(f)):
        result[at] = f
        return True
    return False


def _unlabelled(op: OpView, f: IntArray, shared: list[int], other: Value) -> Iterator[Effect]:
    if len(shared) == len(fields.varying(f)):
        # Rows of a grid may come to the other side once it is known what is cut.
        yield Later(Freeze(f, op.reason(f"meets {other.stays}", other.name)))
    else:
        yield Rows(f, tuple(shared), hard=True)


def _with_constant(
    op: OpView, f: IntArray, shared: list[int], constant: Value, data: Value
) -> Iterator[Effect]:
    moving = fields.varying(f)
    if len(shared) < len(moving):
        rows = op.births.hard_rows(f)
        if rows is None or set(rows) != set(moving) - set(shared):
            yield Rows(f, tuple(shared), hard=False)
            return
        # The rows are known and the constant lies along the cut: one table serves every row.
        f, effects = collapse(f, rows)
        yield from effects
    if len(shared) == 1:
        slots, effects = axis_slots(constant, shared[0])
        yield from effects
        if slots is not None:
            yield Tie(f, fields.along(slots, shared[0], f.ndim))
            return
    elif sum(1 for g in data.fields if any(constant.shape[a] > 1 for a in fields.varying(g))) == 1:
        elements = op.births.elements(constant.name)
        if elements is not None:
            yield Tie(f, fields.lift(elements, f.ndim))
            return
    adopted = adopt(f, shared, constant)
    if adopted:
        yield from adopted
        return
    yield from op.freeze_fields([f], "meets a constant that cannot be cut", constant.name)


def parameter(op: OpView, position: int, f: IntArray, axis: int) -> Iterator[Effect]:
    """A vector that follows ``axis`` of the data: bias, scale, running mean, zero point."""
    value = op.get(position)
    if value is None or value.shape in ((), (1,)):
        return
    slots, effects = axis_slots(value, 0)
    yield from effects
    if slots is None:
        flat = f.reshape(-1) if f.size == value.shape[0] else f
        adopted = adopt(flat, [0], value)
        if adopted:
            yield from adopted
            return
    if slots is None or (len(value.fields) > 1 and not value.derived):
        yield from op.freeze_fields([f], "has a parameter that cannot be cut", value.name)
        return
    yield Tie(f, fields.along(slots, axis, f.ndim))
