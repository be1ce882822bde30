"""Gemm and MatMul, plain and fused: products over one contracted axis."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
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
from onnxprune.ops.elementwise import counterparts, meet, stand_in, undecided
from onnxprune.ops.registry import macs, rule
from onnxprune.ops.view import OpView, Value, collapse
from onnxprune.types import IntArray, Shape

_Order = tuple[int, ...] | None
# Where a twin masks what a field of the left operand labels.
Masked = Callable[[IntArray], Iterator[Contracts]]


@rule("MatMul")
def matmul(op: OpView) -> Iterator[Effect]:
    """Contracts the last axis of A with the last but one of B; batch axes meet."""
    yield from _matrices(op, None, None)


@rule("FusedMatMul", domain="com.microsoft")
def fused_matmul(op: OpView) -> Iterator[Effect]:
    """MatMul whose operands may be transposed, in their last two axes or the first with them."""
    yield from _matrices(op, _order(op, 0), _order(op, 1))


@rule("Gemm")
@rule("FusedGemm", domain="com.microsoft")
def gemm(op: OpView) -> Iterator[Effect]:
    """A·B + C with optional transposes; C broadcasts to the result."""
    a = _transposed(op.x, _order(op, 0))
    b = _transposed(op.need(1), _order(op, 1))
    masked = operand_mask(op, _order(op, 0))
    result = yield from contract(op, as_left(a, 3), as_right(b, 3), masked)
    made = Value(op.node.outputs[0], op.out_shape, [without(f, [1]) for f in result], False, None)
    bias = op.get(2)
    if bias is None:
        op.out(made.fields)
        return
    shape, lifted = fields.lift_shape(bias.shape, 2), [fields.lift(f, 2) for f in bias.fields]
    found = yield from meet(op, [made, replace(bias, shape=shape, fields=lifted)])
    op.out(found)


def _matrices(op: OpView, order_a: _Order, order_b: _Order) -> Iterator[Effect]:
    """A product of two stacks of matrices, each with its axes in another order first."""
    rank = max(op.x.rank, op.need(1).rank, 2) + 1  # batch…, M, K, N
    first, effects = _batched(op, op.x, 1 if op.node.int("transA", 0) else 2)
    yield from effects
    second, effects = _batched(op, op.need(1), 2 if op.node.int("transB", 0) else 1)
    yield from effects
    a = as_left(_transposed(first, order_a), rank)
    b = as_right(_transposed(second, order_b), rank)
    result = yield from contract(op, a, b, operand_mask(op, order_a))
    drop = [rank - 2]  # K is summed over
    if op.x.rank == 1:
        drop.append(rank - 3)
    if op.need(1).rank == 1:
        drop.append(rank - 1)
    op.out([without(f, drop) for f in result])


def _order(op: OpView, position: int) -> _Order:
    """Axes of an operand in the order in which it is multiplied, None where that is its own."""
    side, rank = "AB"[position], op.need(position).rank
    order = list(range(rank))
    if rank > 1 and op.node.int(f"transBatch{side}", 0):
        order.insert(rank - 2, order.pop(0))
    if rank > 1 and op.node.int(f"trans{side}", 0):
        order[-2:] = order[:-3:-1]
    return None if order == sorted(order) else tuple(order)


def contract(
    op: OpView, a: Value, b: Value, masked: Masked
) -> Generator[Effect, None, list[IntArray]]:
    """Common part of all products: operands with axes (batch…, M, K, N), 1 where they lack one.

    ``masked`` tells where a twin masks a field of the left operand that no weight reads.

    Returns the result's fields with the axis K still there, size 1.
    """
    k = a.rank - 2
    left, effects = _contracted(a, k, k - 1)
    yield from effects
    right, effects = _contracted(b, k, k + 1)
    yield from effects
    passed: list[IntArray] = []
    rows_left: list[IntArray] = []
    rows_right: list[IntArray] = []
    if len(left) == 1 and len(right) == 1:
        passed += yield from _pair(op, a, b, (left[0], right[0]), masked)
    elif left and right:
        # Some of several cuts may turn out to be frozen; if none is, the first remains.
        for value, found in ((a, left), (b, right)):
            for f in found[1:]:
                why = op.reason("sums over channels that two cuts share", value.name)
                yield Later(Tie(found[0], f) if _within(op, f, found[0]) else Freeze(f, why))
    else:
        rows_left = yield from _alone(op, a, k, left, b)
        rows_right = yield from _alone(op, b, k, right, a)
    a = replace(a, fields=[*a.off([k]), *rows_left])
    b = replace(b, fields=[*b.off([k]), *rows_right])
    for own, other in ((a, b), (b, a)):
        met: dict[int, list[IntArray]] = {}
        for f in own.fields:
            spoken_for = yield from _meet_batch(op, f, (own, other), k, (passed, met))
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
    moved = op.node.int("transBatchA", 0) or op.node.int("transBatchB", 0)
    if not value.derived or len(batch) != 1 or moved:
        return value, []
    entries, produced = value.off([value.rank - 2, value.rank - 1]), value.rank - produced
    kept = [*entries]
    effects: list[Effect] = []
    for axis in (value.rank - 2, value.rank - 1):
        grid = op.births.grid(value.name, value.shape, (batch[0], axis))
        if grid is None:
            return value, []
        labels = op.births.classes(grid)
        if labels.any() and bool((labels == fields.first(labels, [axis])).all()):
            # Each entry goes whole or not at all, and then as an index of the batch axis.
            effects += [Tie(grid, row) for row in entries if row.shape[batch[0]] > 1]
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
    op: OpView, a: Value, b: Value, pair: tuple[IntArray, IntArray], masked: Masked
) -> Generator[Effect, None, list[IntArray]]:
    k = a.rank - 2
    left, right = pair
    if a.derived or b.derived:
        # One matrix for every row of a grid, as a table of distances: cut where columns go.
        tie = Tie(left, right)
        yield Later(tie) if undecided(op, left, right) else tie
        if a.derived != b.derived:
            yield Consumes(left if a.derived else right)
        return []
    batch = [axis for axis in range(k - 1) if left.shape[axis] > 1 or right.shape[axis] > 1]
    if not batch:
        yield Tie(left, right)
        yield from masked(left)
        return []
    if op.attention == "none":
        yield from op.freeze_fields([left], "is attention, which --attention none keeps", a.name)
        yield from op.freeze_fields([right], "is attention, which --attention none keeps", b.name)
        return []
    if op.attention == "heads":
        # Whole rows go: their label passes to the product and on through Softmax.
        row_left, effects = collapse(left, [k])
        yield from effects
        if right.size == right.shape[k] and all(b.shape[axis] == 1 for axis in batch):
            yield Freeze(right, op.reason("meets every head and goes with none", b.name))
            yield Heads(row_left)
            return [row_left]
        row_right, effects = collapse(right, [k])
        yield from effects
        yield Tie(row_left, row_right)
        yield Heads(row_left)
        return [row_left if row_left.size >= row_right.size else row_right]
    yield Tie(left, right)
    yield Rows(left, tuple(batch), hard=True)
    yield from masked(left)
    return []


def _alone(
    op: OpView, value: Value, k: int, found: list[IntArray], other: Value
) -> Generator[Effect, None, list[IntArray]]:
    """Fields on the contracted axis that meet none there: rows on batch axes may still go whole."""
    rows = []
    for f in found:
        if not value.derived and any(f.shape[axis] > 1 for axis in range(k - 1)):
            row, effects = collapse(f, [k])
            yield from effects
            rows.append(row)
        else:
            given = f", {other.stays}" if other.source else ""
            why = f"sums over channels the other side cannot cut{given}"
            yield from op.freeze_fields([f], why, value.name)
    return rows


def operand_mask(op: OpView, order: _Order) -> Masked:
    """The first input, whose axes were put in another order and lifted."""

    def masked(f: IntArray) -> Iterator[Contracts]:
        squeezed = without(f, [f.ndim - 1])
        squeezed = squeezed.reshape(squeezed.shape[squeezed.ndim - op.x.rank :])
        own = squeezed if order is None else squeezed.transpose(np.argsort(order))
        yield Contracts(own, 0, op.x.shape)

    return masked


def _meet_batch(
    op: OpView,
    f: IntArray,
    operands: tuple[Value, Value],
    k: int,
    found: tuple[list[IntArray], dict[int, list[IntArray]]],
) -> Generator[Effect, None, bool]:
    """A field on batch axes along which the other operand extends must be met there.

    ``found`` holds what passes, and what of this operand each field of the other was tied to.
    Returns whether it ends here: another field speaks for it in what passes already, or it stays.
    """
    own, other = operands
    passed, met = found
    shared = [axis for axis in range(k - 1) if f.shape[axis] > 1 and other.shape[axis] > 1]
    if not shared:
        return False
    partners = counterparts(f, other.fields, shared)
    rows = [g for g in own.fields if set(fields.varying(g)) <= set(shared)]
    if rows and len(shared) < len(fields.varying(f)):
        partners = []  # what goes within a row is no concern of the other side
    within = [g for g in (f, *partners) if len(fields.varying(g)) > len(shared)]
    if op.attention == "dims" and len(within) > len(partners) > 0:
        partners = []  # two grids, each cut within the rows that they share
    merged = False
    for g in partners:
        head, effects = collapse(g, [k - 1, k + 1])
        yield from effects
        yield Tie(f, head)
        tied = met.setdefault(id(g), [])
        merged = merged or any(stand_in(f, one, passed) for one in (g, *tied))
        tied.append(f)
    if partners:
        return merged
    if len(shared) == len(fields.varying(f)):
        # Rows of a grid that are tied whole come to this side in a later pass.
        yield Later(Freeze(f, op.reason("meets a batch axis that cannot be cut", own.name)))
        return True
    yield Rows(f, tuple(shared), hard=True)
    return False


def as_left(value: Value, rank: int) -> Value:
    """A first operand (…, M, K) as (batch…, M, K, 1)."""
    shape = value.shape if value.rank > 1 else (1, *value.shape)
    return _reshaped(value, (1,) * (rank - 1 - len(shape)) + shape + (1,))


def as_right(value: Value, rank: int) -> Value:
    """A second operand (…, K, N) as (batch…, 1, K, N)."""
    shape = value.shape if value.rank > 1 else (*value.shape, 1)
    batch = (1,) * (rank - 1 - len(shape)) + shape[:-2]
    return _reshaped(value, (*batch, 1, *shape[-2:]))


def _reshaped(value: Value, shape: Shape) -> Value:
    # Only axes of size 1 come in, so each field takes the same ones.
    moved = [fields.reshape(f, value.shape, shape) for f in value.fields]
    return replace(value, shape=shape, fields=moved)


def _transposed(value: Value, order: _Order) -> Value:
    if order is None:
        return value
    shape = tuple(value.shape[axis] for axis in order)
    return replace(value, shape=shape, fields=[f.transpose(order) for f in value.fields])


def without(f: IntArray, axes: list[int]) -> IntArray:
    """A field without some axes, which have size 1."""
    return f.reshape([size for axis, size in enumerate(f.shape) if axis not in axes])


@macs("MatMul")
@macs("FusedMatMul", domain="com.microsoft")
def matmul_macs(op: OpView) -> int:
    """Elements of the result times the contracted length."""
    order = _order(op, 0)
    return int(np.prod(op.out_shape)) * op.x.shape[order[-1] if order else -1]


@macs("Gemm")
@macs("FusedGemm", domain="com.microsoft")
def gemm_macs(op: OpView) -> int:
    """M · N · K."""
    return int(np.prod(op.out_shape)) * op.x.shape[0 if op.node.int("transA", 0) else 1]
