"""Operators whose outputs carry no channels, and lookups in tables."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from onnxprune import fields
from onnxprune.effects import Effect, Produces
from onnxprune.ops.elementwise import meet, parameter
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


@rule("GatherND")
def gather_nd(op: OpView) -> Iterator[Effect]:
    """Looks places up along the first axes, which stay; the axes behind them pass."""
    indices = op.need(1)
    fixed = op.node.int("batch_dims", 0) + indices.shape[-1]
    yield from op.freeze([indices], "is used as an index")
    passed = []
    for f in op.x.fields:
        if any(axis < fixed for axis in fields.varying(f)):
            yield from op.freeze_fields([f], "is looked up by an index", op.x.name)
            continue
        if op.x.derived:
            yield Produces(f)
        passed.append(f.reshape((1,) * (indices.rank - 1) + f.shape[fixed:]))
    op.out(passed)


@rule("ScatterND")
def scatter_nd(op: OpView) -> Iterator[Effect]:
    """Writes to places along the first axes, which stay; along the others old and new tie."""
    indices, new = op.need(1), op.need(2)
    yield from op.freeze([indices], "is used as an index")
    behind = []
    for value, fixed in ((op.x, indices.shape[-1]), (new, indices.rank - 1)):
        free = value.off(range(fixed))
        if value.derived:  # a table has no slots for the elements of its last axes alone
            free = [f for f in free if len(fields.varying(f)) == 1]
        yield from op.freeze_fields(
            [f for f in value.fields if not any(f is g for g in free)],
            "is written to places that an index names",
            value.name,
        )
        cut = [f.reshape(f.shape[fixed:]) for f in free]
        behind.append(replace(value, shape=value.shape[fixed:], fields=cut))
    tables = any(v.derived for v in behind)
    for value in behind:
        grids = [f for f in value.fields if tables and len(fields.varying(f)) > 1]
        yield from op.freeze_fields(grids, "is a grid that meets a constant", value.name)
        value.fields = [f for f in value.fields if not any(f is g for g in grids)]
    found = yield from meet(op, behind)
    op.out([fields.lift(f, op.x.rank) for f in found])


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
