"""From a pruning plan to a smaller model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby

from onnxprune.absorb import Absorber
from onnxprune.emit import ConstantEdit, Emitter
from onnxprune.errors import InvariantError
from onnxprune.model import Model
from onnxprune.ops.registry import repair_of
from onnxprune.patches import set_attribute
from onnxprune.record import Change, Copy, Mask, Removed, dead_births, removed_entries
from onnxprune.select import PruningPlan
from onnxprune.selections import SelectionWriter
from onnxprune.shapefix import repairs
from onnxprune.slices import Slice, shown_shapes, slices
from onnxprune.survivors import Survivors
from onnxprune.twin import masked_twin, twin_masks

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
        self.slices = slices(self.dependency, self.first)
        for name, part in self.slices.items():
            self._cut_constant(name, part)
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
            self.writer.add_patch(patch)
        for _, ranges in groupby(found.ranges, key=lambda each: each.node.index):
            self.writer.write_ranges(list(ranges))
        self.writer.write_patches()
        for run in self.tracer.runs.values():
            self.writer.write_run(run)
        for node in self.graph.nodes:
            if node.op_type == "Squeeze" and self.first.cut(node.inputs[0]):
                self.writer.write_squeeze(node)

    def _cut_constant(self, name: str, part: Slice) -> None:
        self.emitter.constants[name] = ConstantEdit(part.shape, part.take, part.key)

    def _repair_attributes(self) -> None:
        for node in self.graph.nodes:
            repair = repair_of(node)
            if repair is None or not any(self.first.cut(name) for name in node.inputs if name):
                continue
            for name, value in repair(node, self.first).items():
                before = node.setting(name)
                if value != before:
                    set_attribute(self.emitter.node(node), name, value)
                    what = {"node": node.key, "attribute": name}
                    self.writer.changes.append(Change(what, before, value))

    def _dims(self) -> None:
        """New extents of every tensor that was cut, for value_info."""
        shown = shown_shapes(self.graph, self.slices)
        for name, shape in shown.items():
            if name not in self.graph.constants:
                # A weight seen through nodes that keep its shape, whichever rows were cut.
                self.emitter.dims[name] = dict(enumerate(shape))
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
