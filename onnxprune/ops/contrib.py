"""Operators of ONNX Runtime's own domain, found in models it has optimised and saved."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from onnxprune.effects import Effect, Produces
from onnxprune.ops.conv import conv
from onnxprune.ops.elementwise import broadcast, lifted, meet, unary
from onnxprune.ops.norm import normalized
from onnxprune.ops.registry import rule
from onnxprune.ops.view import OpView, Value

_DOMAIN = "com.microsoft"


@rule("Gelu", "QuickGelu", domain=_DOMAIN)
def activation(op: OpView) -> Iterator[Effect]:
    """One element in, one element out."""
    return unary(op)


@rule("BiasGelu", "FastGelu", domain=_DOMAIN)
def biased_activation(op: OpView) -> Iterator[Effect]:
    """Adds a bias along the last axis, then works element by element."""
    return broadcast(op)


@rule("FusedConv", domain=_DOMAIN)
def fused_conv(op: OpView) -> Iterator[Effect]:
    """Conv, then the sum with a fourth input of the same shape, then an activation."""
    yield from conv(op)
    added = op.get(3)
    if added is not None:
        made = replace(added, fields=op.outputs.get(0, []), derived=False)
        found = yield from meet(op, [made, added])
        op.out(found)


@rule("SkipLayerNormalization", "SkipSimplifiedLayerNormalization", domain=_DOMAIN)
def skip_layer_normalization(op: OpView) -> Iterator[Effect]:
    """A sum, perhaps with a bias, and its LayerNormalization or RMSNormalization."""
    simplified = op.node.op_type.startswith("SkipSimplified")
    scale, bias = op.get(2), op.get(3 if simplified else 4)
    added = [op.x, op.need(1), *([bias] if bias is not None else [])]
    summed = yield from meet(op, [lifted(value, op.x.rank) for value in added])
    made = Value(op.node.label, op.x.shape, summed, False, None)
    shift = None if simplified else op.get(3)
    op.out((yield from normalized(op, made, [scale, shift], op.x.rank - 1)))
    op.out(summed, 3)


@rule("EmbedLayerNormalization", domain=_DOMAIN)
def embed_layer_normalization(op: OpView) -> Iterator[Effect]:
    """Rows of up to three tables, looked up and summed, and their LayerNormalization."""
    tables = [table for table in (op.need(2), op.need(3), op.get(4)) if table is not None]
    yield from op.freeze([op.x, op.get(1), op.get(7), op.get(8)], "is used as an index")
    looked_up = []
    for table in tables:
        yield from op.freeze_fields(table.on(0), "is looked up by an index", table.name)
        width = [f.reshape(1, 1, -1) for f in table.off([0])]
        for f in width:
            yield Produces(f)
        looked_up.append(Value(table.name, op.out_shape, width, False, None))
    summed = yield from meet(op, looked_up)
    made = Value(op.node.label, op.out_shape, summed, False, None)
    op.out((yield from normalized(op, made, [op.get(5), op.get(6)], 2)))
    op.out(summed, 2)
