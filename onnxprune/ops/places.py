"""Elements picked or written along one axis, with an index for each of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from onnxprune.effects import Effect
from onnxprune.ops.elementwise import meet
from onnxprune.ops.registry import rule
from onnxprune.ops.view import OpView, Value


@rule("GatherElements")
def gather_elements(op: OpView) -> Iterator[Effect]:
    """The axis that is looked along stays; along the others data and indices go together."""
    yield from _along(op, [op.x, op.need(1)])


@rule("ScatterElements")
def scatter_elements(op: OpView) -> Iterator[Effect]:
    """The axis that is written along stays; along the others data, indices and updates tie."""
    yield from _along(op, [op.x, op.need(1), op.need(2)])


def _along(op: OpView, values: list[Value]) -> Iterator[Effect]:
    axis = op.axis("axis", 0, op.x.rank)
    sizes = {value.shape[:axis] + value.shape[axis + 1 :] for value in values}
    if len(sizes) > 1 or (op.x.derived and len(values) == 2):
        yield from op.freeze(values, "is indexed element by element")
        return
    beside = []
    for value in values:
        yield from op.freeze_fields(value.on(axis), "is indexed along it", value.name)
        shape = (*value.shape[:axis], 1, *value.shape[axis + 1 :])
        copies = [one for one in value.copies if one.places.shape[axis] == 1]
        beside.append(replace(value, shape=shape, fields=value.off([axis]), copies=copies))
    found = yield from meet(op, beside)
    op.out(found)
