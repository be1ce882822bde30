"""Gemm and MatMul, plain and fused: products over one contracted axis."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import replace

import numpy as np

from onnxprune import fields
from onnxprune.effects import Consumes, Contracts, Effect, Heads, Produces, Rows, Tie
from onnxprune.ops.elementwise import meet, stand_in
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
    first, effects = _batched(op, op.x)
    yield from effects
    second, effects = _batched(op, op.need(1))
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
    else:
        rows_left = yield from _alone(op, a, k, left)
        rows_right = yield from _alone(op, b, k, right)
    a = replace(a, fields=[*a.off([k]), *rows_left])
    b = replace(b, fields=[*b.off([k]), *rows_right])
    for own, other in ((a, b), (b, a)):
        met: dict[int, list[IntArray]] = {}
        for f in own.fields:
            merged = yield from _meet_batch(op, f, (own, other), k, (passed, met))
            if own.derived and f.shape[k + 1 if own is b else k - 1] > 1:
                yield Produces(f)
            if not merged:
                passed.append(f)
    return passed


def _batched(op: OpView, value: Value) -> tuple[Value, list[Effect]]:
    """A weight with batch axes: every batch entry slices its own rows and columns."""
    batch = [axis for axis in range(value.rank - 2) if value.shape[axis] > 1]
    moved = op.node.int("transBatchA", 0) or op.node.int("transBatchB", 0)
    if not value.derived or len(batch) != 1 or moved:
        return value, []
    kept = value.off([value.rank - 2, value.rank - 1])
    effects: list[Effect] = []
    for axis in (value.rank - 2, value.rank - 1):
        grid = op.births.grid(value.name, value.shape, (batch[0], axis))
        if grid is None:
            return value, []
        labels = op.births.classes(grid)
        if labels.any() and bool((labels == fields.first(labels, [axis])).all()):
            # Each entry goes whole or not at all, and then as an index of the batch axis.
            effects += [Tie(grid, row) for row in kept if row.shape[batch[0]] > 1]
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
        yield Tie(left, right)
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
    op: OpView, value: Value, k: int, found: list[IntArray]
) -> Generator[Effect, None, list[IntArray]]:
    """Fields on the contracted axis that meet none there: rows on batch axes may still go whole."""
    rows = []
    for f in found:
        if any(f.shape[axis] > 1 for axis in range(k - 1)):
            row, effects = collapse(f, [k])
            yield from effects
            rows.append(row)
        else:
            why = "sums over channels the other side cannot cut"
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
    Returns whether another field speaks for it in what passes already.
    """
    own, other = operands
    passed, met = found
    shared = [axis for axis in range(k - 1) if f.shape[axis] > 1 and other.shape[axis] > 1]
    if not shared:
        return False
    partners = [g for g in other.fields if any(g.shape[axis] > 1 for axis in shared)]
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
        yield from op.freeze_fields([f], "meets a batch axis that cannot be cut", own.name)
    else:
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
