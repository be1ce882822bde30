"""Attention in one operator: what MatMul, Softmax and MatMul over heads would say."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, product
from math import prod

import numpy as np

from onnxprune import fields, moves
from onnxprune.effects import Contracts, Effect, Heads, Rows, Tie
from onnxprune.graph import Node
from onnxprune.ops.elementwise import lifted, meet, parameter
from onnxprune.ops.heads import BY_HEAD, Part, heads_left, moved, part_of, settings
from onnxprune.ops.linear import Masked, as_left, as_right, contract, operand_mask, without
from onnxprune.ops.norm import statistics
from onnxprune.ops.registry import Kept, Setting, macs, repair, rule
from onnxprune.ops.rotary import rotate
from onnxprune.ops.view import OpView, Value, axis_slots, collapse
from onnxprune.types import IntArray, Shape

_MS = "com.microsoft"


@rule("Attention", domain=_MS)
def packed_attention(op: OpView) -> Iterator[Effect]:
    """One weight makes queries, keys and values; then as MultiHeadAttention."""
    heads, sizes = op.node.int("num_heads", 1), _hidden_sizes(op.node, op.need(1).shape)
    left, right = as_left(op.x, 4), as_right(op.need(1), 4)
    made = yield from contract(op, left, right, operand_mask(op, None))
    shape = (*op.x.shape[:2], op.need(1).shape[1])
    shown = Value(op.x.name, shape, [without(f, [2]) for f in made], False, None)
    q, k, v = (part_of(op, shown, heads, start, stop) for start, stop in _spans(sizes))
    for part in (q, k, v):
        yield from _biased(op, part.value, 2, part.span)
    yield from _continued(op, q.value, k.value, v.value, op.get(4))
    if any(op.node.outputs[1:]):
        yield from op.freeze([k.value, v.value], "hands keys and values on in one tensor")
    if op.node.int("do_rotary", 0):
        yield from op.freeze([q.value, k.value], "rotates by tables of its own")
    yield from op.freeze([op.get(3)], "is used as a mask")
    _finish(
        op,
        (yield from _attend(op, q, k.value, v.value, op.get(5), _masks(op, q, 1, 2))),
        v.value,
    )


@rule("MultiHeadAttention", domain=_MS)
def multi_head_attention(op: OpView) -> Iterator[Effect]:
    """Heads go whole, or every head keeps as many dimensions: of queries with keys, of values."""
    q, k, v = _parts(op, op.node.int("num_heads", 1))
    parts = (q.value, k.value, v.value)
    spans = _spans([value.shape[1] * value.shape[3] for value in parts])
    for value, span in zip(parts, spans, strict=True):
        yield from _biased(op, value, 3, slice(*span))
    if op.get(2) is None or op.need(2).rank == 4:
        yield from _alike(op, k.value, v.value)
    yield from _continued(op, q.value, k.value, v.value, op.get(6))
    yield from op.freeze([op.get(4)], "is used as a mask")
    made = yield from _attend(op, q, k.value, v.value, op.get(5), _masks(op, q, 0, 3))
    _finish(op, made, v.value, k.value)


@rule("GroupQueryAttention", domain=_MS)
def group_query_attention(op: OpView) -> Iterator[Effect]:
    """Heads of a group go together; keys and values have one size, a multiple of 8 or 16."""
    q, k, v = _parts(op, op.node.int("num_heads", 1))
    yield from _continued(op, q.value, k.value, v.value, op.get(3))
    step, width, order = 8, 0, np.arange(q.value.shape[3])
    if op.node.int("do_rotary", 0):
        tables, interleaved = [op.need(7), op.need(8)], bool(op.node.int("rotary_interleaved", 0))
        step, width = 16, 2 * tables[0].shape[-1]
        if not interleaved:  # the partner of each dimension beside it
            order[:width] = order[:width].reshape(2, -1).T.reshape(-1)
        for part in (q, k):
            yield from rotate(op, part.value, tables, width, interleaved=interleaved)
    for part in (q, k, v):
        yield from _in_steps(op, part.value, order, step)
    yield from _alike(op, k.value, v.value, width)
    made = yield from _attend(op, q, k.value, v.value, op.get(10), _masks(op, q, 0))
    for f in made.scores:
        yield from parameter(op, 11, f, 1)
    _finish(op, made, v.value, k.value)


@rule("Attention")
def attention(op: OpView) -> Iterator[Effect]:
    """As MultiHeadAttention, with queries in groups that share keys and values."""
    q, k, v = _parts(op, op.node.int("q_num_heads", 1))
    yield from _continued(op, q.value, k.value, v.value, op.get(4))
    made = yield from _attend(op, q, k.value, v.value, op.get(3), _masks(op, q, 0))
    _finish(op, made, v.value, k.value)


# -- parts of the rules ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Made:
    """Fields of the scores, (batch, heads, queries, keys), and of values picked, of ``shape``."""

    scores: list[IntArray]
    picked: list[IntArray]
    shape: Shape


def _parts(op: OpView, heads: int) -> tuple[Part, Part, Part]:
    """Queries, keys and values from one, two or three inputs."""
    own = op.node.int("kv_num_heads", heads)
    key, value = op.get(1), op.get(2)
    if key is None and op.x.rank == 5:
        return part_of(op, op.x, heads, 0), part_of(op, op.x, heads, 1), part_of(op, op.x, heads, 2)
    if key is None:
        size = op.x.shape[2] // (heads + 2 * own)
        first, second = heads * size, (heads + own) * size
        return (
            part_of(op, op.x, heads, 0, first),
            part_of(op, op.x, own, first, second),
            part_of(op, op.x, own, second),
        )
    if value is None:
        return part_of(op, op.x, heads), part_of(op, key, own, 0), part_of(op, key, own, 1)
    return part_of(op, op.x, heads), part_of(op, key, own), part_of(op, value, own)


def _masks(op: OpView, queries: Part, *positions: int) -> Masked:
    """What shows queries, or starts with what makes them: masked there, they add no score."""

    def masked(f: IntArray) -> Iterator[Contracts]:
        own = f[..., 0]
        for position in positions:
            operand = op.get(position)
            if operand is not None and operand.shape == queries.seen:
                yield Contracts(queries.back(own), position, operand.shape)
            elif operand is not None:
                slots = np.zeros(operand.shape[-1], np.int64)
                _, heads, _, size = queries.value.shape
                slots[: heads * size] = np.broadcast_to(own, (1, heads, 1, size)).reshape(-1)
                yield Contracts(
                    fields.along(slots, operand.rank - 1, operand.rank), position, operand.shape
                )

    return masked


def _biased(op: OpView, value: Value, position: int, span: slice) -> Iterator[Effect]:
    """Queries, keys or values to which a part of a vector is added."""
    bias = op.get(position)
    if bias is None or not value.fields:
        return
    slots, effects = axis_slots(bias, 0)
    yield from effects
    if slots is None or not bias.derived:
        yield from op.freeze_fields(value.fields, "has a parameter that cannot be cut", bias.name)
        return
    own = slots[span].reshape(1, value.shape[1], 1, value.shape[3])
    for f in value.fields:
        yield Tie(f, own)


def _continued(
    op: OpView, queries: Value, keys: Value, values: Value, past: Value | None
) -> Iterator[Effect]:
    """Keys and values that stand behind those of earlier calls have their sizes."""
    if past is None:
        return
    alone = op.attention == "heads" and queries.shape[1] > keys.shape[1]
    for value in (keys, values, past, *([] if alone else [queries])):
        yield from op.freeze_fields(value.fields, "continues what stays", past.name)
        value.fields = []


def _alike(op: OpView, keys: Value, values: Value, width: int = 0) -> Iterator[Effect]:
    """Heads of keys and of values keep as many of the first ``width`` dimensions, and behind."""
    if not keys.fields or not values.fields:
        yield from op.freeze([keys, values], "needs keys and values of one size")
    elif op.attention == "heads" and keys.shape[1] > 1:
        return  # whole heads go, keys with values
    for f, g in product(keys.on(3), values.on(3)):
        both = np.stack(np.broadcast_arrays(f, g))
        for part in (both[..., :width], both[..., width:]):
            yield Rows(part, (0, 2), hard=True)


def _in_steps(op: OpView, value: Value, order: IntArray, step: int) -> Iterator[Effect]:
    """A size of heads that must be a multiple; dimensions go together as they stand in order."""
    if value.shape[3] == step and op.attention == "dims":
        yield from op.freeze([value], f"wants a multiple of {step} dimensions in every head")
        return
    for f in value.on(3):
        blocks = f[..., order].reshape(*f.shape[:3], -1, step)
        yield Tie(blocks, blocks[..., :1])


def _attend(
    op: OpView, queries: Part, keys: Value, values: Value, bias: Value | None, masked: Masked
) -> Generator[Effect, None, _Made]:
    """Softmax(Q·Kᵀ + bias)·V, product by product."""
    q, times = queries.value, queries.value.shape[1] // keys.shape[1]
    found: list[IntArray] = []
    if op.attention == "heads" and times > 1 and (keys.shape[1] == 1 or not keys.fields):
        yield from op.freeze([keys, values], "lets every head read the same")
        values = replace(values, shape=(1, 1, *values.shape[2:]), fields=[])
        for f in q.on(1):
            head, effects = collapse(f, [3])
            yield from effects
            yield Heads(head)
            yield Rows(head.reshape(-1, times), (0,), hard=True)
            found.append(head)
    else:
        keys, values = _repeated(keys, times), _repeated(values, times)
        turned = moved(keys, [moves.Transpose((0, 1, 3, 2))])
        made = yield from contract(op, as_left(q, 5), as_right(turned, 5), masked)
        found = [without(f, [3]) for f in made]
    scores = Value(op.node.label, (*q.shape[:3], keys.shape[2]), found, False, None)
    if bias is not None:
        scores.fields = yield from meet(op, [scores, lifted(bias, 4)])
    weights = yield from statistics(op, scores, [3])
    left = as_left(replace(scores, fields=weights), 5)
    picked = yield from contract(op, left, as_right(values, 5), masked)
    shape = (*q.shape[:3], values.shape[3])
    return _Made(scores.fields, [without(f, [3]) for f in picked], shape)


def _repeated(value: Value, times: int) -> Value:
    """Every head for each of the queries that share it; one for all is broadcast as it is."""
    batch, heads, *rest = value.shape
    if times == 1 or heads == 1:
        return value
    apart, together = (batch, heads, 1, *rest), (batch, heads, times, *rest)
    ends = (batch, heads * times, *rest)
    return moved(value, [moves.Reshape(apart), moves.Broadcast(together), moves.Reshape(ends)])


def _finish(op: OpView, made: _Made, values: Value, keys: Value | None = None) -> None:
    """Fields of the outputs: what was picked, keys and values for the next call, scores."""
    steps: list[moves.Step] = []
    if len(op.out_shape) == 3:
        steps = [moves.Transpose(BY_HEAD), moves.Reshape(op.out_shape)]
    op.out([moves.run(steps, f, made.shape) for f in made.picked])
    if keys is not None:
        op.out(keys.fields, 1)
        op.out(values.fields, 2)
        op.out(made.scores, 3)


# -- attributes and costs --------------------------------------------------------------------------


def _hidden_sizes(node: Node, weight: Shape) -> tuple[int, ...]:
    """Columns of a packed weight that make queries, keys and values."""
    return node.ints("qkv_hidden_sizes") or (weight[-1] // 3,) * 3


def _spans(sizes: Sequence[int]) -> Sequence[tuple[int, int]]:
    """Where parts that lie side by side begin and end."""
    ends = list(accumulate(sizes))
    return list(zip([0, *ends], ends, strict=False))


@repair("Attention", domain=_MS)
def packed_left(node: Node, kept: Kept) -> Mapping[str, Setting]:
    """Heads that are left, sizes of queries, keys and values, and the scale there was."""
    heads, name = node.int("num_heads", 1), node.inputs[1]
    sizes = _hidden_sizes(node, kept.before(name))
    left = [heads_left(kept, name, heads, start, stop) for start, stop in _spans(sizes)]
    found: dict[str, Setting] = {"num_heads": left[0][0]}
    after = tuple(number * size for number, size in left)
    if node.has("qkv_hidden_sizes") or len(set(after)) > 1:
        found["qkv_hidden_sizes"] = after
    return settings(node, found, sizes[0] // heads, left[0][1])


@repair("MultiHeadAttention", "GroupQueryAttention", domain=_MS)
@repair("Attention")
def heads_of_queries_left(node: Node, kept: Kept) -> Mapping[str, Setting]:
    """Heads that are left of queries, and of keys and values, and the scale there was."""
    name, shape = node.inputs[0], kept.before(node.inputs[0])
    queries = "num_heads" if node.domain else "q_num_heads"
    heads = node.int(queries, 1)
    if len(shape) > 3:
        left = kept.shape(name) or shape
        return settings(node, {queries: left[2]} if len(shape) == 5 else {}, shape[-1], left[-1])
    own, key = node.int("kv_num_heads", heads), node.inputs[1] if node.inputs[1:] else ""
    size = shape[-1] // (heads if key else heads + 2 * own)
    width = heads * size
    number, after = heads_left(kept, name, heads, 0, width)
    found: dict[str, Setting] = {queries: number}
    if node.has("kv_num_heads"):
        span = (0, None) if key else (width, width + own * size)
        found["kv_num_heads"] = heads_left(kept, key or name, own, *span)[0]
    return settings(node, found, size, after)


@macs("Attention", domain=_MS)
def packed_macs(op: OpView) -> int:
    """What makes queries, keys and values, then as MultiHeadAttention."""
    batch, length, width = op.x.shape
    made = op.need(1).shape[-1]
    picked = op.out_shape[-1]
    past = op.get(4)
    keys = length + (past.shape[3] if past is not None else 0)
    return batch * length * (width * made + keys * ((made - picked) // 2 + picked))


@macs("MultiHeadAttention", "GroupQueryAttention", domain=_MS)
@macs("Attention")
def attention_macs(op: OpView) -> int:
    """Every query with every key, and every weight with a value."""
    key, picked = op.get(1), prod(op.out_shape)
    asked = picked if key is None else prod(op.x.shape)
    shapes = [shape for shape in op.out_shapes[1:2] if shape]
    if shapes:
        keys = shapes[0][2]
    elif key is None:
        keys = op.x.shape[1]
    else:
        keys = key.shape[2 if key.rank == 4 else 1]
    return keys * (asked + picked)
