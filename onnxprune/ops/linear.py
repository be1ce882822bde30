"""Gemm and MatMul: products over one contracted axis."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import replace

import numpy as np

from onnxprune import fields
from onnxprune.effects import (
    Consumes,
    Contracts,
    Effect,
    Freeze,
    Heads,
    Later,
    Produces,
    Rows,
    Tie,
)
from onnxprune.ops.elementwise import counterparts, meet, stand_in
from onnxprune.ops.registry import macs, rule
from onnxprune.ops.view import OpView, Value, collapse
from onnxprune.types import IntArray, Shape


@rule("MatMul")
def matmul(op: OpView) -> Iterator[Effect]:
    """Contracts the last axis of A with the last but one of B; batch axes meet."""
    rank = max(op.x.rank, op.need(1).rank, 2) + 1  # batch…, M, K, N
    first, effects = _batched(op, op.x, 2)
    yield from effects
    second, effects = _batched(op, op.need(1), 1)
    yield from effects
    a, b = _left(first, rank), _right(second, rank)
    result = yield from contract(op, a, b)
    drop = [rank - 2]  # K is summed over
    if op.x.rank == 1:
        drop.append(rank - 3)
    if op.need(1).rank == 1:
        drop.append(rank - 1)
    op.out([_without(f, drop) for f in result])


@rule("Gemm")
def gemm(op: OpView) -> Iterator[Effect]:
    """A·B + C with optional transposes; C broadcasts to the result."""
    a = _transposed(op.x) if op.node.int("transA", 0) else op.x
    b = _transposed(op.need(1)) if op.node.int("transB", 0) else op.need(1)
    result = yield from contract(op, _left(a, 3), _right(b, 3))
    made = Value(op.node.outputs[0], op.out_shape, [_without(f, [1]) for f in result], False, None)
    bias = op.get(2)
    if bias is None:
        op.out(made.fields)
        return
    shape, lifted = fields.lift_shape(bias.shape, 2), [fields.lift(f, 2) for f in bias.fields]
    found = yield from meet(op, [made, replace(bias, shape=shape, fields=lifted)])
    op.out(found)


def contract(op: OpView, a: Value, b: Value) -> Generator[Effect, None, list[IntArray]]:
    """Common part of all products: operands with axes (batch…, M, K, N), 1 where they lack one.

    Returns the result's fields with the axis K still there, size 1.
    """
    k = a.rank - 2
    left, effects = _contracted(a, k, k - 1)
    yield from effects
    right, effects = _contracted(b, k, k + 1)
    yield from effects
    passed: list[IntArray] = []
    if len(left) == 1 and len(right) == 1:
        passed += yield from _pair(op, a, b, left[0], right[0])
    elif left and right:
        # Some of several cuts may turn out to be frozen; if none is, the first remains.
        for value, found in ((a, left), (b, right)):
            for f in found[1:]:
                why = op.reason("sums over channels that two cuts share", value.name)
                yield Later(Tie(found[0], f) if _within(op, f, found[0]) else Freeze(f, why))
    else:
        for value, found, other in ((a, left, b), (b, right, a)):
            given = f", {other.stays}" if other.source else ""
            why = f"sums over channels the other side cannot cut{given}"
            yield from op.freeze_fields(found, why, value.name)
    for own, other in ((a, b), (b, a)):
        for f in own.off([k]):
            spoken_for = yield from _meet_batch(op, f, (own, other), k, passed)
            if own.derived and f.shape[k + 1 if own is b else k - 1] > 1:
                yield Produces(f)
            if not spoken_for:
                passed.append(f)
    return passed


def _within(op: OpView, f: IntArray, rows: IntArray) -> bool:
    """Whether every channel of one field lies in a single row of another."""
    inner, outer = np.broadcast_arrays(op.births.classes(f), op.births.classes(rows))
    pairs = np.unique(np.stack([inner.reshape(-1), outer.reshape(-1)]), axis=1)
    return bool(pairs.shape[1] == np.unique(inner).size)


def _batched(op: OpView, value: Value, produced: int) -> tuple[Value, list[Effect]]:
    """A weight with batch axes: every batch entry slices its own rows and columns.

    ``produced``: the axis that makes channels, 1 for the last, 2 for the last but one.
    """
    batch = [axis for axis in range(value.rank - 2) if value.shape[axis] > 1]
    if not value.derived or len(batch) != 1:
        return value, []
    kept, produced = value.off([value.rank - 2, value.rank - 1]), value.rank - produced
    effects: list[Effect] = []
    for axis in (value.rank - 2, value.rank - 1):
        grid = op.births.grid(value.name, value.shape, (batch[0], axis))
        if grid is None:
            return value, []
        labels = op.births.classes(grid)
        if labels.any() and bool((labels == fields.first(labels, [axis])).all()):
            # Each entry goes whole or not at all, and then as an index of the batch axis.
            effects += [Tie(grid, row) for row in kept if row.shape[batch[0]] > 1]
            effects.append(Produces(grid) if axis == produced else Consumes(grid))
        else:
            effects.append(Rows(grid, (batch[0],), hard=True))
            kept.append(grid)
    return replace(value, fields=kept), effects


def _contracted(value: Value, k: int, free: int) -> tuple[list[IntArray], list[Effect]]:
    """Fields on the contracted axis, collapsed over the operand's own free axis."""
    found, effects = [], []
    for f in value.on(k):
        head, ties = collapse(f, [free])
        found.append(head)
        effects += ties
    return found, effects


def _pair(
    op: OpView, a: Value, b: Value, left: IntArray, right: IntArray
) -> Generator[Effect, None, list[IntArray]]:
    k = a.rank - 2
    if a.derived or b.derived:
        yield Tie(left, right)
        if a.derived != b.derived:
            yield Consumes(left if a.derived else right)
        return []
    batch = [axis for axis in range(k - 1) if left.shape[axis] > 1 or right.shape[axis] > 1]
    if not batch:
        yield Tie(left, right)
        yield Contracts(_operand_field(op, left), 0, op.x.shape)
        return []
    if op.attention == "none":
        yield from op.freeze_fields([left], "is attention, which --attention none keeps", a.name)
        yield from op.freeze_fields([right], "is attention, which --attention none keeps", b.name)
        return []
    if op.attention == "heads":
        # Whole rows go: their label passes to the product and on through Softmax.
        row_left, effects = collapse(left, [k])
        yield from effects
        row_right, effects = collapse(right, [k])
        yield from effects
        yield Tie(row_left, row_right)
        yield Heads(row_left)
        return [row_left if row_left.size >= row_right.size else row_right]
    yield Tie(left, right)
    yield Rows(left, tuple(batch), hard=True)
    yield Contracts(_operand_field(op, left), 0, op.x.shape)
    return []


def _operand_field(op: OpView, f: IntArray) -> IntArray:
    """A field of the lifted left operand, back in the operand's own rank."""
    squeezed = _without(f, [f.ndim - 1])
    squeezed = squeezed.reshape(squeezed.shape[squeezed.ndim - op.x.rank :])
    return squeezed.T if op.node.op_type == "Gemm" and op.node.int("transA", 0) else squeezed


def _meet_batch(
    op: OpView, f: IntArray, operands: tuple[Value, Value], k: int, passed: list[IntArray]
) -> Generator[Effect, None, bool]:
    """A field on batch axes along which the other operand extends must be met there.

    Returns whether it ends here: another field speaks for it in ``passed`` already, or it stays.
    """
    own, other = operands
    shared = [axis for axis in range(k - 1) if f.shape[axis] > 1 and other.shape[axis] > 1]
    if not shared:
        return False
    partners = counterparts(f, other.off([k]), shared)
    rows = [g for g in own.off([k]) if set(fields.varying(g)) <= set(shared)]
    if rows and len(shared) < len(fields.varying(f)):
        partners = []  # what goes within a row is no concern of the other side
    merged = False
    for g in partners:
        head, effects = collapse(g, [k - 1, k + 1])
        yield from effects
        yield Tie(f, head)
        merged = merged or stand_in(f, g, passed)
    if partners:
        return merged
    if len(shared) == len(fields.varying(f)):
        # Rows of a grid that are tied whole come to this side in a later pass.
        yield Later(Freeze(f, op.reason("meets a batch axis that cannot be cut", own.name)))
        return True
    yield Rows(f, tuple(shared), hard=True)
    return False


def _left(value: Value, rank: int) -> Value:
    """(…, M, K) as (batch…, M, K, 1)."""
    shape = value.shape if value.rank > 1 else (1, *value.shape)
    return _reshaped(value, (1,) * (rank - 1 - len(shape)) + shape + (1,))


def _right(value: Value, rank: int) -> Value:
    """(…, K, N) as (batch…, 1, K, N)."""
    shape = value.shape if value.rank > 1 else (*value.shape, 1)
    batch = (1,) * (rank - 1 - len(shape)) + shape[:-2]
    return _reshaped(value, (*batch, 1, *shape[-2:]))


def _reshaped(value: Value, shape: Shape) -> Value:
    # Only axes of size 1 come in, so each field takes the same ones.
    moved = [fields.reshape(f, value.shape, shape) for f in value.fields]
    return replace(value, shape=shape, fields=moved)


def _transposed(value: Value) -> Value:
    return replace(value, shape=value.shape[::-1], fields=[f.T for f in value.fields])


def _without(f: IntArray, axes: list[int]) -> IntArray:
    return f.reshape([size for axis, size in enumerate(f.shape) if axis not in axes])


@macs("MatMul")
def matmul_macs(op: OpView) -> int:
    """Elements of the result times the contracted length."""
    return int(np.prod(op.out_shape)) * op.x.shape[-1]


@macs("Gemm")
def gemm_macs(op: OpView) -> int:
    """M · N · K."""
    return int(np.prod(op.out_shape)) * op.x.shape[0 if op.node.int("transA", 0) else 1]
