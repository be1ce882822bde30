"""LSTM, GRU and RNN: the input is read once, the hidden state in every step."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping

import numpy as np

from onnxprune import fields
from onnxprune.effects import Consumes, Effect, Freeze, Produces, Rows, Tie
from onnxprune.graph import Node
from onnxprune.ops.registry import Kept, macs, repair, rule, zero_if_absent
from onnxprune.ops.view import OpView, Value, axis_slots, collapse
from onnxprune.types import IntArray

_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
_BIAS, _STATES, _PEEPHOLES = 3, (5, 6), 7
for _name in _GATES:
    zero_if_absent(_name, *_STATES)


@rule(*_GATES)
def recurrent(op: OpView) -> Iterator[Effect]:
    """Every gate makes the hidden channels, which all gates read again; each direction its own."""
    weight, again = op.need(1), op.need(2)
    if not (weight.derived and again.derived):
        yield from op.freeze(op.inputs, "has a weight that is computed at run time")
        return
    gates = _GATES[op.node.op_type]
    yield from _reads(op, weight)
    hidden = yield from _of(op, again, 2)  # (directions, hidden)
    yield Consumes(hidden)
    for value in (weight, again):
        made = yield from _of(op, value, 1)
        yield Produces(made)
        yield from _every(made, hidden, gates)
    bias = op.get(_BIAS)
    if bias is not None:
        yield from _follows(op, bias, hidden, 1, 2 * gates)
    for position in _STATES:
        state = op.get(position)
        if state is not None and not state.zero:  # of zeros there may as well be none
            yield from _follows(op, state, hidden, 2, 1)
    peepholes = op.get(_PEEPHOLES)
    if peepholes is not None:
        yield from _follows(op, peepholes, hidden, 1, 3)
    if hidden.shape[0] > 1:
        yield Rows(hidden, (0,), hard=True)
    _gives(op, hidden)


def _reads(op: OpView, weight: Value) -> Iterator[Effect]:
    """The channels of the input, each with its column in every direction."""
    columns = yield from _of(op, weight, 2)
    found = op.x.on(2)
    for f in op.x.off([2]):
        yield from op.freeze_fields([f], "runs over an axis that would be cut", op.x.name)
    if len(found) != 1:
        yield from op.freeze_fields(found, "reads channels that two cuts share", op.x.name)
        yield Freeze(columns, op.reason(f"reads {op.x.stays}", op.x.name))
        return
    head, effects = collapse(found[0], [0, 1])
    yield from effects
    yield Tie(columns, head.reshape(1, -1))
    yield Consumes(columns)


def _of(op: OpView, value: Value, axis: int) -> Generator[Effect, None, IntArray]:
    """Slots of an axis of a weight, (directions, extent); one row where directions share them."""
    shape = value.shape
    axes = (0, axis) if shape[0] > 1 else (axis,)
    own = op.births.grid(value.name, shape, axes) if shape[axis] > 1 else None
    if own is not None:
        return own.reshape(-1, shape[axis])
    slots, effects = axis_slots(value, axis)
    yield from effects
    return np.zeros((1, shape[axis]), np.int64) if slots is None else slots.reshape(1, -1)


def _every(slots: IntArray, hidden: IntArray, times: int) -> Iterator[Effect]:
    """An axis on which the hidden channels stand several times, as often as there are gates."""
    split = slots.reshape(slots.shape[0], times, -1)
    yield Tie(split, hidden[:, None, :])


def _follows(op: OpView, value: Value, hidden: IntArray, axis: int, times: int) -> Iterator[Effect]:
    """What lies along the hidden channels: constants, or states that another such layer gave."""
    if value.derived:
        yield from _every((yield from _of(op, value, axis)), hidden, times)
        return
    found = [f for f in value.fields if f.shape[axis] > 1 and set(fields.varying(f)) <= {0, axis}]
    if times > 1 or len(found) != 1 or len(value.fields) != 1:
        yield from op.freeze([value], "is a state that cannot be cut")
        yield Freeze(hidden, op.reason(f"continues {value.stays}", value.name))
        return
    yield Tie(found[0].reshape(-1, value.shape[axis]), hidden)


def _gives(op: OpView, hidden: IntArray) -> None:
    """Labels of what every step gives, and of the last states."""
    directions, size = hidden.shape
    last = op.node.int("layout", 0) == 1
    states = (1, directions, size) if last else (directions, 1, size)
    steps = (1, *states) if last else (1, directions, 1, size)
    for position in range(len(op.out_shapes)):
        op.out([hidden.reshape(states if position else steps)], position)


@repair(*_GATES)
def hidden_left(node: Node, kept: Kept) -> Mapping[str, int]:
    """As many hidden channels as every step gives."""
    shape = next((kept.shape(name) for name in node.outputs if name), None)
    return {} if shape is None or not node.has("hidden_size") else {"hidden_size": shape[-1]}


@macs(*_GATES)
def recurrent_macs(op: OpView) -> int:
    """Every weight once in each step, for each sequence."""
    steps = int(np.prod(op.x.shape[:2]))
    return steps * sum(int(np.prod(value.shape)) for value in (op.need(1), op.need(2)))
