"""From a pruning plan to a smaller model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnxprune import fields
from onnxprune.absorb import Absorber
from onnxprune.emit import ConstantEdit, Emitter
from onnxprune.errors import InvariantError
from onnxprune.io import Model
from onnxprune.ops.registry import repair_of
from onnxprune.patches import set_int
from onnxprune.record import Change, Copy, Mask, Removed, dead_births, removed_entries
from onnxprune.select import PruningPlan
from onnxprune.selections import SelectionWriter
from onnxprune.shapefix import repairs
from onnxprune.slots import Birth
from onnxprune.survivors import Survivors
from onnxprune.trace import PRESERVING
from onnxprune.twin import masked_twin, twin_masks
from onnxprune.types import BoolArray, Shape

__all__ = ["Change", "Copy", "Mask", "Removed", "Surgery", "masked_twin", "operate", "rewrite"]


@dataclass(frozen=True)
class Surgery:
    """A rewritten model with all that a recipe says of it."""

    model: Model
    removed: tuple[Removed, ...]
    copies: Mapping[str, Copy]
    masks: tuple[Mask, ...]
    changes: tuple[Change, ...]
    folded: tuple[str, ...] = ()
    restored: tuple[str, ...] = ()


def rewrite(model: Model, plan: PruningPlan) -> Model:
    """Cut a model as a plan says.

    Args:
        model: The model the plan was made for; it is not changed.
        plan: From ``select``.

    Returns:
        A new model, weights still lazy: slices are taken when it is saved or run.

    Raises:
        InvariantError: The plan does not leave a consistent graph (a bug of ours).
    """
    if model is not plan.graph.graph.source:
        raise InvariantError("the plan was made for another model")
    return operate(plan).model


def operate(plan: PruningPlan) -> Surgery:
    """``rewrite`` with the record that a recipe needs."""
    return _Surgeon(plan).operate()


class _Surgeon:
    def __init__(self, plan: PruningPlan) -> None:
        self.plan = plan
        self.dependency = plan.graph
        self.graph = plan.graph.graph
        self.tracer = plan.graph.tracer
        self.dead = plan.graph.dead(plan.keep)
        self.survivors = [Survivors(trace, self.dead) for trace in self.tracer.traces]
        self.first = self.survivors[0]
        self.emitter = Emitter(self.graph)
        self.writer = SelectionWriter(self.graph, self.emitter, self.first)

    def operate(self) -> Surgery:
        if not self.dead.classes.any():
            return Surgery(self.graph.source, (), {}, (), ())
        births = list(dead_births(self.dependency, self.dead))
        for name, found in births:
            self._cut_constant(name, found)
        self._repair_attributes()
        self._repair_shapes()
        self._dims()
        absorber = Absorber(self.graph, self.emitter, self.first)
        for wanted in self.plan.absorbed:
            absorber.absorb(wanted)
        merged = self.emitter.canonical()
        removed = tuple(
            entry
            for name, found in births
            if name not in merged
            for birth, mask in found
            for entry in removed_entries(self.dependency, name, birth, mask)
        )
        copies, masks = self._copies(merged), twin_masks(self.plan)
        return Surgery(
            self.emitter.build(),
            removed,
            copies,
            masks,
            tuple(self.writer.changes),
            self.graph.folded,
            tuple(dict.fromkeys(absorber.changed)),
        )

    def _repair_shapes(self) -> None:
        found = repairs(self.tracer, self.survivors)
        if found.misfits:
            raise InvariantError(f"a shape at '{found.misfits[0].where}' cannot be written")
        for patch in found.patches:
            self.writer.write_patch(patch)
        for ranges in found.ranges:
            self.writer.write_ranges(ranges)
        for run in self.tracer.runs.values():
            self.writer.write_run(run)
        for node in self.graph.nodes:
            if node.op_type == "Squeeze" and self.first.cut(node.inputs[0]):
                self.writer.write_squeeze(node)

    def _cut_constant(self, name: str, births: Sequence[tuple[Birth, BoolArray]]) -> None:
        shape = self.graph.constants[name].weight.shape
        view = max((birth.view for birth, _ in births), key=len)
        masks = [self._in_view(birth, mask, view) for birth, mask in births]
        left = fields.survivors_shape(view, masks)
        extra = len(view) - len(shape)
        new_shape = (int(np.prod(left[: extra + 1])), *left[extra + 1 :]) if shape else ()
        digest = hashlib.sha256()
        for birth, mask in births:
            digest.update(repr((birth.view, birth.axes)).encode() + np.packbits(mask).tobytes())
        self.emitter.constants[name] = ConstantEdit(
            new_shape,
            lambda array: fields.compact(array.reshape(view), *masks).reshape(new_shape),
            digest.digest(),
        )

    def _in_view(self, birth: Birth, mask: BoolArray, view: Shape) -> fields.Dead:
        """What dies by one birth, under a view that may split the constant's first axis."""
        cut = self.first.trace.cut_axis(birth.field)
        if len(birth.view) == len(view):
            return fields.Dead(mask, cut)
        shape = (1, 1) if mask.shape[0] == 1 else view[:2]
        split = mask.reshape(*shape, *mask.shape[1:])
        # Rows of the split axis shrink on their own, by equal counts, unless whole groups go.
        whole = bool(split.all(axis=1).any())
        return fields.Dead(split, 1 if mask.shape[0] > 1 and cut is None and not whole else None)

    def _repair_attributes(self) -> None:
        for node in self.graph.nodes:
            repair = repair_of(node.op_type)
            if repair is None or not self.first.cut(node.inputs[0]):
                continue
            before = self.first.trace.env.shape(node.inputs[0]) or ()
            for name, value in repair(node, before, self.first).items():
                if value != node.int(name, 1):
                    set_int(self.emitter.node(node), name, value)
                    what = {"node": node.key, "attribute": name}
                    self.writer.changes.append(Change(what, node.int(name, 1), value))

    def _dims(self) -> None:
        """New extents of every tensor that was cut, for value_info."""
        shown: dict[str, Shape] = {n: edit.shape for n, edit in self.emitter.constants.items()}
        for node in self.graph.nodes:
            # A weight seen through nodes that keep its shape, whichever rows were cut.
            if node.op_type in PRESERVING and node.inputs[0] in shown:
                shown[node.outputs[0]] = shown[node.inputs[0]]
                self.emitter.dims[node.outputs[0]] = dict(enumerate(shown[node.inputs[0]]))
        for name in self.first.trace.fields:
            if name not in shown and self.first.cut(name):
                before = self.first.trace.env.shape(name) or ()
                after = self.first.shape(name) or ()
                self.emitter.dims[name] = {
                    axis: size
                    for axis, (old, size) in enumerate(zip(before, after, strict=True))
                    if old != size
                }

    def _copies(self, merged: Mapping[str, str]) -> Mapping[str, Copy]:
        uses: dict[str, list[tuple[str, int]]] = {}
        for node in self.graph.nodes:
            for position, name in enumerate(node.inputs):
                uses.setdefault(merged.get(name, name), []).append((node.key, position))
        return {
            name: Copy(constant.origin, tuple(uses.get(name, ())))
            for name, constant in self.graph.constants.items()
            if name != constant.origin and name not in merged
        }
