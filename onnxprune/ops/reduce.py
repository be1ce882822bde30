"""Reductions and searches along axes."""

from __future__ import annotations

from collections.abc import Iterator

from onnxprune.effects import Effect
from onnxprune.ops.norm import statistics
from onnxprune.ops.registry import rule
from onnxprune.ops.view import OpView


@rule(
    "ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2",
    "ReduceLogSum", "ReduceLogSumExp", "ReduceSumSquare",
)  # fmt: skip
def reduce(op: OpView) -> Iterator[Effect]:
    """Reduced axes stay, or tie where they are rows of a grid; the others pass."""
    rank = op.x.rank
    axes = op.ints("axes", 1)
    if axes is None and op.get(1) is not None:
        yield from op.freeze([op.x], "reduces axes that are not known")
        return
    if not axes:
        if op.node.int("noop_with_empty_axes", 0):
            op.out(op.x.fields)
            return
        axes = tuple(range(rank))
    # The length of a vector is what it is normalised by; dividing by it suits any number of them.
    mean = op.node.op_type in ("ReduceMean", "ReduceL2")
    yield from _reduce(op, [axis % rank for axis in axes], mean=mean)


@rule("ArgMax", "ArgMin")
def arg(op: OpView) -> Iterator[Effect]:
    """Gives positions along one axis, which therefore stays; the others pass."""
    yield from _reduce(op, [op.axis("axis", 0, op.x.rank)])


def _reduce(op: OpView, axes: list[int], *, mean: bool = False) -> Iterator[Effect]:
    passed = yield from statistics(op, op.x, axes, mean=mean)
    passed = [f for f in passed if all(f.shape[axis] == 1 for axis in axes)]
    if not op.node.int("keepdims", 1):
        kept = [axis for axis in range(op.x.rank) if axis not in axes]
        passed = [f.reshape([f.shape[axis] for axis in kept]) for f in passed]
    op.out(passed)


@rule("TopK")
def top_k(op: OpView) -> Iterator[Effect]:
    """Sorts along one axis, which stays; the others pass to values and indices."""
    passed = yield from statistics(op, op.x, [op.axis("axis", -1, op.x.rank)])
    op.out(passed, 0)
    op.out(passed, 1)
