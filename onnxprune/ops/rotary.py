"""Rotary embeddings: pairs of dimensions turned by tables that all heads share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from onnxprune import fields
from onnxprune.effects import Effect, Tie
from onnxprune.graph import Node
from onnxprune.ops.elementwise import meet
from onnxprune.ops.heads import heads_left, part_of
from onnxprune.ops.registry import Kept, Setting, repair, rule
from onnxprune.ops.view import OpView, Value

_MS = "com.microsoft"


@rule("RotaryEmbedding")
def rotary(op: OpView) -> Iterator[Effect]:
    """Pairs of dimensions go together, the same of every head, with their columns of the tables."""
    yield from _rotary(op, [op.need(1), op.need(2)], op.get(3))


@rule("RotaryEmbedding", domain=_MS)
def rotary_with_positions(op: OpView) -> Iterator[Effect]:
    """Pairs of dimensions go together, the same of every head, with their columns of the tables."""
    yield from _rotary(op, [op.need(2), op.need(3)], op.need(1))


def _rotary(op: OpView, tables: Sequence[Value], positions: Value | None) -> Iterator[Effect]:
    yield from op.freeze([positions], "is used as an index")
    width = op.node.int("rotary_embedding_dim", 0)
    heads = op.node.int("num_heads", 0) or op.x.shape[-1] // (2 * tables[0].shape[-1])
    value = part_of(op, op.x, heads).value
    interleaved = bool(op.node.int("interleaved", 0))
    yield from rotate(op, value, tables, width or value.shape[3], interleaved=interleaved)
    op.out(op.x.fields)


def rotate(
    op: OpView, value: Value, tables: Sequence[Value], width: int, *, interleaved: bool
) -> Iterator[Effect]:
    """The first ``width`` dimensions of every head turn in pairs; (batch, heads, length, size)."""
    half = width // 2
    seen = replace(value, shape=(*value.shape[:3], half), fields=[])
    for f in value.on(3):
        turned = f[..., :width]
        first, second = turned[..., :half], turned[..., half:]
        if interleaved:
            first, second = turned[..., ::2], turned[..., 1::2]
        yield Tie(first, second)
        labels = fields.narrow(op.births.classes(first))
        seen.fields += [] if labels is None else [labels]
    for table in tables:
        yield from meet(op, [seen, _by_dimension(table)])


def _by_dimension(table: Value) -> Value:
    """A table (positions, pairs) or (batch, length, pairs) as it meets the heads."""
    if table.rank == 3:
        batch, length, pairs = table.shape
        found = [f.reshape(f.shape[0], 1, *f.shape[1:]) for f in table.fields]
        return replace(table, shape=(batch, 1, length, pairs), fields=found)
    found = [fields.lift(f, 4) for f in table.off([0])]  # positions are looked up
    return replace(table, shape=(1, 1, 1, table.shape[1]), fields=found)


@repair("RotaryEmbedding")
@repair("RotaryEmbedding", domain=_MS)
def rotated_left(node: Node, kept: Kept) -> Mapping[str, Setting]:
    """Heads and turned dimensions that are left, where the node names them."""
    name, heads = node.inputs[0], node.int("num_heads", 0)
    width = node.int("rotary_embedding_dim", 0)
    table = node.inputs[2 if node.domain else 1]
    found: dict[str, Setting] = {}
    if heads and len(kept.before(name)) == 3:
        found["num_heads"] = heads_left(kept, name, heads)[0]
    if width:
        found["rotary_embedding_dim"] = 2 * (kept.shape(table) or (width // 2,))[-1]
    return found
