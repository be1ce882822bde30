"""Normalisations: statistics over some axes, parameters along the channel axis."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence

from onnxprune import fields
from onnxprune.effects import Effect, Freeze, Inexact, Rows, Tie
from onnxprune.graph import Node
from onnxprune.ops.conv import surviving_groups
from onnxprune.ops.elementwise import lifted, meet, parameter
from onnxprune.ops.registry import Kept, repair, rule
from onnxprune.ops.view import OpView, Value, collapse
from onnxprune.types import IntArray

_CHANNEL = 1


@rule("BatchNormalization")
def batch_normalization(op: OpView) -> Iterator[Effect]:
    """Scale and shift along axis 1; running statistics follow, also as outputs in training."""
    training = op.version >= 14 and op.node.int("training_mode", 0) == 1
    if training:
        yield from statistics(op, op.x, [a for a in range(op.x.rank) if a != _CHANNEL])
    for f in op.x.on(_CHANNEL):
        head, effects = collapse(f, [a for a in range(op.x.rank) if a != _CHANNEL])
        yield from effects
        for position in range(1, 5):
            yield from parameter(op, position, head, _CHANNEL)
        for position in range(1, len(op.out_shapes)):
            op.out([head.reshape(-1)], position)
    op.out(op.x.fields)


@rule("InstanceNormalization")
def instance_normalization(op: OpView) -> Iterator[Effect]:
    """Statistics over the axes behind the channels: a row of a grid goes whole."""
    passed = yield from statistics(op, op.x, range(2, op.x.rank), mean=True)
    for f in passed:
        if f.shape[_CHANNEL] > 1 and op.x.shape[_CHANNEL] > 1 and not _within(op, f):
            head, effects = collapse(f, [a for a in range(op.x.rank) if a != _CHANNEL])
            yield from effects
            yield from parameter(op, 1, head, _CHANNEL)
            yield from parameter(op, 2, head, _CHANNEL)
    op.out(passed)


def _within(op: OpView, f: IntArray) -> bool:
    """Whether a cut stays within the rows that are normalised, so that parameters stay."""
    return any(f.shape[a] > 1 for a in range(2, op.x.rank))


@rule("GroupNormalization", since=18)
def group_normalization(op: OpView) -> Iterator[Effect]:
    """Statistics over groups of channels: whole groups go. Parameters for each group or channel."""
    yield from statistics(op, op.x, range(2, op.x.rank))
    groups = op.node.int("num_groups", 1)
    passed = op.x.off(range(1, op.x.rank))
    for f in op.x.on(_CHANNEL):
        head, effects = collapse(f, [a for a in range(op.x.rank) if a != _CHANNEL])
        yield from effects
        grid = head.reshape(groups, -1)
        if op.allow_norm:
            yield Inexact(grid)
            yield Rows(grid, (0,), hard=True)
        else:
            yield Tie(grid, grid[:, :1])
        for position in (1, 2):
            value = op.need(position)
            per_group = value.shape[0] != op.x.shape[_CHANNEL]
            slots = fields.along(grid[:, 0], _CHANNEL, op.x.rank) if per_group else head
            if (groups > 1 and not op.allow_norm) or not per_group:
                yield from parameter(op, position, slots, _CHANNEL)
        passed.append(f)
    op.out(passed)


@repair("GroupNormalization")
def groups_left(node: Node, kept: Kept) -> Mapping[str, int]:
    """Groups go whole."""
    return surviving_groups(node, "num_groups", kept)


@rule("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
def layer_normalization(op: OpView) -> Iterator[Effect]:
    """Statistics over the last axes, which cannot be cut; parameters broadcast there."""
    found = yield from normalized(op, op.x, op.inputs[1:], op.axis("axis", -1, op.x.rank))
    for position in range(len(op.out_shapes)):
        op.out(found, position)


def normalized(
    op: OpView, x: Value, parameters: Sequence[Value | None], first_axis: int
) -> Generator[Effect, None, list[IntArray]]:
    """Statistics over the axes from ``first_axis`` on, then scale and shift; the fields after."""
    passed = yield from statistics(op, x, range(first_axis, x.rank), mean=True)
    operands = [Value(x.name, x.shape, passed, False, None)]
    operands += [lifted(value, x.rank) for value in parameters if value is not None]
    return (yield from meet(op, operands))


@rule("Softmax", "LogSoftmax", "Hardmax")
def softmax(op: OpView) -> Iterator[Effect]:
    """Normalises along one axis (all from it on, before opset 13); other axes pass."""
    rank = op.x.rank
    axis = op.axis("axis", -1 if op.version >= 13 else 1, rank)
    passed = yield from statistics(op, op.x, [axis] if op.version >= 13 else range(axis, rank))
    op.out(passed)


@rule("CumSum", "CumProd")
def cumulative(op: OpView) -> Iterator[Effect]:
    """Runs along one axis, which cannot be cut; other axes pass."""
    axes = op.ints("axis", 1)
    rank = op.x.rank
    if axes is None:
        yield from op.freeze([op.x], "runs along an axis that is not known")
        return
    op.out((yield from statistics(op, op.x, [a % rank for a in axes])))


@rule("LRN")
def local_response(op: OpView) -> Iterator[Effect]:
    """A window over neighbouring channels, which therefore stay."""
    op.out((yield from statistics(op, op.x, [_CHANNEL])))


@rule("LpNormalization")
def lp_normalization(op: OpView) -> Iterator[Effect]:
    """Divides by the norm along one axis, which cannot be cut; other axes pass."""
    axis = op.axis("axis", -1, op.x.rank)
    op.out((yield from statistics(op, op.x, [axis], mean=True)))


@rule("MeanVarianceNormalization")
def mean_variance(op: OpView) -> Iterator[Effect]:
    """Statistics over ``axes`` (batch and space by default); other axes pass."""
    axes = op.ints("axes") or (0, 2, 3)
    op.out((yield from statistics(op, op.x, [a % op.x.rank for a in axes], mean=True)))


def statistics(
    op: OpView, value: Value, axes: Sequence[int], *, mean: bool = False
) -> Generator[Effect, None, list[IntArray]]:
    """Axes that are summed over: a field that lies there alone stays, a grid goes by whole rows.

    A ``mean`` over fewer elements is still a mean: where the user allows it (``--allow-norm``) such
    a field is cut all the same, the same number in every row. Returns the fields that pass.
    """
    passed: list[IntArray] = []
    inside = set(axes)
    for f in value.fields:
        moving = fields.varying(f)
        if inside.isdisjoint(moving):
            passed.append(f)
        elif mean and op.allow_norm:
            yield Inexact(f)
            rows = tuple(a for a in moving if a not in inside)
            if rows:
                yield Rows(f, rows, hard=True)
            passed.append(f)
        elif inside.issuperset(moving):
            yield Freeze(f, op.reason("works over channels that a cut would change", value.name))
        else:
            head, effects = collapse(f, [a for a in moving if a in inside])
            yield from effects
            passed.append(head)
    return passed
