"""Operators whose outputs carry no channels, and lookups in tables."""

from __future__ import annotations

from collections.abc import Iterator

from onnxprune import fields
from onnxprune.effects import Effect, Produces
from onnxprune.ops.elementwise import parameter
from onnxprune.ops.registry import rule
from onnxprune.ops.view import OpView


@rule("Shape", "Size", "ConstantOfShape", "Range", "RandomNormal", "RandomUniform")
def unlabelled(op: OpView) -> Iterator[Effect]:
    """Reads at most a shape; what it makes carries no channels."""
    yield from ()


@rule("EyeLike", "RandomNormalLike", "RandomUniformLike")
def like(op: OpView) -> Iterator[Effect]:
    """Makes data of its input's shape, which therefore stays."""
    yield from op.freeze([op.x], "makes data of this shape")


def lookup_rows(op: OpView) -> Iterator[Effect]:
    """Gather with indices computed at run time: the looked-up axis stays, the others pass."""
    axis = op.axis("axis", 0, op.x.rank)
    indices = op.need(1)
    yield from op.freeze([indices], "is used as an index")
    yield from op.freeze_fields(op.x.on(axis), "is looked up by an index", op.x.name)
    inserted = (1,) * indices.rank
    passed = []
    for f in op.x.off([axis]):
        if op.x.derived:
            yield Produces(f)
        passed.append(f.reshape(f.shape[:axis] + inserted + f.shape[axis + 1 :]))
    op.out(passed)


@rule("DequantizeLinear", "QuantizeLinear")
def quantize(op: OpView) -> Iterator[Effect]:
    """Scale and zero point are one for all, or follow one axis of the data."""
    scale = op.need(1)
    if scale.rank > 1:
        yield from op.freeze([op.x], "is quantized in blocks")
        return
    if scale.shape not in ((), (1,)):
        axis = op.axis("axis", 1, op.x.rank)
        for f in op.x.on(axis):
            head = fields.first(f, [a for a in range(op.x.rank) if a != axis])
            if head.size != f.size:
                yield from op.freeze_fields([f], "is quantized along one axis of a grid")
                continue
            yield from parameter(op, 1, head, axis)
            yield from parameter(op, 2, head, axis)
    op.out(op.x.fields)
