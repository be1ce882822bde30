"""What is left of every tensor once some classes are dead, and whether it fits together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from onnxprune import fields, moves
from onnxprune.graph import Node
from onnxprune.runs import movement_view
from onnxprune.trace import Trace, Tracer
from onnxprune.types import BoolArray, IntArray, Shape


@dataclass(frozen=True, slots=True)
class DeadSlots:
    """What goes.

    Attributes:
        slots: By slot of a constant.
        classes: By the smallest slot of a component.
    """

    slots: BoolArray
    classes: BoolArray

    def of(self, f: IntArray) -> BoolArray:
        """Dead elements of a field of slots (positive) or classes (negative)."""
        return np.where(f > 0, self.slots[np.maximum(f, 0)], self.classes[np.maximum(-f, 0)])


@dataclass(frozen=True, slots=True)
class Misfit:
    """Fields whose survivors do not form a box, or that a movement would put out of order."""

    fields: tuple[IntArray, ...]
    where: str


@dataclass
class Survivors:
    """Shapes after a cut, under one environment.

    Attributes:
        trace: Fields of every tensor.
        dead: Which slots of constants go, and which classes, by the slot that names them.
    """

    trace: Trace
    dead: DeadSlots
    _masks: dict[int, BoolArray] = field(default_factory=dict)
    _cut_axes: dict[int, int | None] = field(default_factory=dict)

    def masks(self, name: str) -> list[fields.Dead]:
        """Dead elements of a tensor, one entry for each field in which something dies."""
        found = []
        for f in self._labelled(name):
            mask = self._mask(f)
            if mask.any():
                found.append(fields.Dead(mask, self.cut_axis(f)))
        return found

    def cut_axis(self, f: IntArray) -> int | None:
        """The axis along which rows of a grid shrink, None where no rows are asked for."""
        key = id(f)
        if key not in self._cut_axes:
            self._cut_axes[key] = self.trace.cut_axis(f)
        return self._cut_axes[key]

    def _labelled(self, name: str) -> list[IntArray]:
        """Every field of a tensor; a moved constant may have one for its elements too."""
        labelled = self.trace.fields.get(name, [])
        elements = self.trace.elements.get(name)
        return labelled if elements is None else [*labelled, elements]

    def _mask(self, f: IntArray) -> BoolArray:
        # Fields of one content are one array, so its identity is its key.
        key = id(f)
        if key not in self._masks:
            self._masks[key] = self.dead.of(f)
        return self._masks[key]

    def cut(self, name: str) -> bool:
        """Whether anything of the tensor goes."""
        return any(self._mask(f).any() for f in self._labelled(name))

    def alive(self, name: str, axis: int) -> BoolArray | None:
        """Which positions of an axis survive, None where nothing along it goes.

        Where rows keep different positions the first row that survives speaks for all.
        """
        return fields.alive_along(self.masks(name), axis)

    def before(self, name: str) -> Shape:
        """Shape of a tensor before the cut, () where it is not known."""
        return self.trace.env.shape(name) or ()

    def shape(self, name: str) -> Shape | None:
        """Shape of a tensor after the cut, None where it is not known."""
        shape = self.trace.env.shape(name)
        if shape is None or not self.cut(name):
            return shape
        return fields.survivors_shape(shape, self.masks(name))

    def misfits(self, tracer: Tracer) -> list[Misfit]:
        """Everything that would not be exact, in graph order."""
        found: list[Misfit] = []
        boxes: set[int] = set()
        for name, labelled in self.trace.fields.items():
            for f in labelled:
                if id(f) not in boxes and len(fields.varying(f)) > 1 and self._mask(f).any():
                    boxes.add(id(f))
                    if not fields.rectangular(fields.Dead(self._mask(f), self.cut_axis(f))):
                        found.append(Misfit((f,), name))
            found += self._crossing(name, labelled)
        if found:
            return found
        for node in tracer.graph.nodes:
            entry = tracer.entries[node.index]
            if node.index in tracer.skipped or node.index in tracer.runs:
                continue
            if entry is not None and entry.move is not None and self.cut(node.inputs[0]):
                found += self._moved(node, tracer)
        return found

    def _crossing(self, name: str, labelled: Sequence[IntArray]) -> list[Misfit]:
        """Two fields that share an axis must also leave a box together."""
        axes = [axis for f in labelled for axis in fields.varying(f)]
        if len(axes) == len(set(axes)):
            return []
        masks = self.masks(name)
        shape = self.trace.env.shape(name)
        try:
            fields.survivors_shape(shape or (), masks)
        except ValueError:
            return [Misfit(tuple(f for f in labelled if self._mask(f).any()), name)]
        return []

    def _moved(self, node: Node, tracer: Tracer) -> list[Misfit]:
        view = movement_view(node, self.trace.env)
        entry = tracer.entries[node.index]
        name = node.inputs[0]
        source, new_source = self.trace.env.shape(name), self.shape(name)
        if view is None or entry is None or entry.move is None or not source or not new_source:
            return []
        targets = [shape or () for shape in view.out_shapes]
        after = [self.shape(output) or () if output else () for output in node.outputs]
        old, new = entry.move(view, source, targets), entry.move(view, new_source, after)
        if old is None:
            return []
        found = []
        for position, output in enumerate(node.outputs):
            if not output:
                continue
            for f in self._labelled(name):
                dead = fields.Dead(self._mask(f), self.cut_axis(f))
                if not dead.mask.any():
                    continue
                after_axis = self.trace.cut_axis(moves.run(old[position], f, source))
                if new is None or not moves.survives(
                    old[position], new[position], dead, (source, new_source), after_axis
                ):
                    found.append(Misfit((f, *self._labelled(output)), node.label))
        return found
