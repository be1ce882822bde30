"""What a rule sees of its node: inputs with their fields, known values, a place for its outputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from onnxprune import fields
from onnxprune.effects import Effect, Freeze, Tie
from onnxprune.graph import Node
from onnxprune.shapes import Environment
from onnxprune.types import AnyArray, IntArray, Shape


class Births(Protocol):
    """Where slots of constants come from; the same request always gives the same slots."""

    def grid(self, name: str, view: Shape, axes: tuple[int, ...]) -> IntArray | None:
        """Field of a constant under ``view`` that varies on ``axes``; None if it is hidden."""
        ...

    def classes(self, f: IntArray) -> IntArray:
        """Representatives of a field's slots, as the last pass knew them."""
        ...

    def elements(self, name: str) -> IntArray | None:
        """A slot for each element of a constant or a moved constant, None where there is none."""
        ...

    def hard_rows(self, f: IntArray) -> tuple[int, ...] | None:
        """Row axes that the last pass found for this very field, or None."""
        ...


INTERFACE = "whose shape is the model's interface"  # why something must fit an input


@dataclass(frozen=True, slots=True)
class Copies:
    """An axis along which a tensor, or what it was made of, holds copies of one slice.

    Attributes:
        tensor: What an Expand or a ConstantOfShape made.
        axis: Axis of that tensor.
        places: Position on that axis of each element, of the rank of the tensor at hand.
    """

    tensor: str
    axis: int
    places: IntArray


@dataclass(slots=True)
class Value:
    """One tensor as a rule sees it.

    Attributes:
        name: Tensor name.
        shape: Concrete shape.
        fields: Its fields, each of the tensor's rank.
        derived: Computed from constants alone; its fields are then those of its axes.
        array: The value itself where shape arithmetic or a small constant gives it.
        source: The input of the graph that it is, or is a rearrangement of; "" for anything else.
        copies: Axes along which it may be as long as what it meets.
    """

    name: str
    shape: Shape
    fields: list[IntArray]
    derived: bool
    array: AnyArray | None
    source: str = ""
    copies: Sequence[Copies] = ()

    @property
    def stays(self) -> str:
        """What to call it where it cannot be cut."""
        if not self.source:
            return "data that cannot be cut"
        return f"input '{self.source}', {INTERFACE}"

    @property
    def rank(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    def on(self, axis: int) -> list[IntArray]:
        """Fields that vary on an axis."""
        return [f for f in self.fields if f.shape[axis] > 1]

    def off(self, axes: Sequence[int]) -> list[IntArray]:
        """Fields that vary on none of the axes."""
        return [f for f in self.fields if all(f.shape[a] == 1 for a in axes)]


@dataclass(slots=True)
class OpView:
    """A node under analysis. Rules read ``inputs``, call ``out`` and yield effects."""

    node: Node
    inputs: tuple[Value | None, ...]
    out_shapes: tuple[Shape | None, ...]
    env: Environment
    births: Births
    attention: str
    allow_norm: bool
    version: int
    outputs: dict[int, list[IntArray]] = field(default_factory=dict)

    @property
    def x(self) -> Value:
        """The first input."""
        return self.need(0)

    def need(self, position: int) -> Value:
        """An input that the operator always has."""
        value = self.inputs[position]
        assert value is not None, f"{self.node} lacks input {position}"
        return value

    def get(self, position: int) -> Value | None:
        """An optional input."""
        return self.inputs[position] if position < len(self.inputs) else None

    @property
    def present(self) -> list[Value]:
        """The inputs that are given."""
        return [value for value in self.inputs if value is not None]

    def out(self, field_list: Sequence[IntArray], position: int = 0) -> None:
        """Give output ``position`` its fields."""
        self.outputs[position] = list(field_list)

    @property
    def out_shape(self) -> Shape:
        """Shape of the first output."""
        shape = self.out_shapes[0]
        assert shape is not None
        return shape

    def axis(self, name: str, default: int, rank: int) -> int:
        """An axis attribute, counted from the front."""
        axis = self.node.int(name, default)
        return axis + rank if axis < 0 else axis

    def ints(self, name: str, position: int | None = None) -> tuple[int, ...] | None:
        """Integers from an attribute or, in newer opsets, from a known input; None if absent."""
        value = self.node.ints(name)
        if value is not None or position is None:
            return value
        given = self.get(position)
        if given is None or given.array is None:
            return None
        return tuple(int(v) for v in np.atleast_1d(given.array))

    def freeze(self, values: Sequence[Value | None], why: str) -> Iterator[Effect]:
        """Freeze every field of some inputs."""
        for value in values:
            if value is not None:
                yield from self.freeze_fields(value.fields, why, value.name)

    def freeze_fields(
        self, field_list: Sequence[IntArray], why: str, tensor: str = ""
    ) -> Iterator[Effect]:
        """Freeze some fields."""
        for f in field_list:
            yield Freeze(f, self.reason(why, tensor))

    def reason(self, why: str, tensor: str = "") -> str:
        """A reason that names this node."""
        where = f" (tensor '{tensor}')" if tensor else ""
        return f"{self.node.op_type} '{self.node.label}' {why}{where}"


def collapse(f: IntArray, axes: Sequence[int]) -> tuple[IntArray, list[Effect]]:
    """Tie a field along ``axes``; returns what is left of it and the tie."""
    moving = [axis for axis in axes if f.shape[axis] > 1]
    if not moving:
        return f, []
    head = fields.first(f, moving)
    return head, [Tie(f, head)]


def axis_slots(value: Value, axis: int) -> tuple[IntArray | None, list[Effect]]:
    """Slots along one axis of a weight, shape (extent,), with what had to be tied for it."""
    found = value.on(axis)
    if not found:
        return None, []
    head, effects = collapse(found[0], [a for a in range(value.rank) if a != axis])
    return head.reshape(-1), effects
