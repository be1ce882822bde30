"""Slices, Splits, Gathers and runs of movements, rewritten for what is left of their axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from onnx import helper

from onnxprune import moves
from onnxprune.graph import Node
from onnxprune.patches import Patcher, drop_attribute, set_attribute
from onnxprune.record import Change
from onnxprune.runs import Run
from onnxprune.shapefix import Patch, Ranges, slice_axes
from onnxprune.types import IntArray


class SelectionWriter(Patcher):
    """Writes the selections of one surgery."""

    def write_ranges(self, found: Sequence[Ranges]) -> None:
        """One Slice, Split or Gather: only a Slice can have several axes that are cut."""
        node = found[0].node
        match node.op_type:
            case "Split":
                self._split(found[0])
            case "Slice":
                self._slice(node, found)
            case _:
                self._gather(found[0])

    def _split(self, ranges: Ranges) -> None:
        node, sizes = ranges.node, [int(indices.size) for indices in ranges.indices]
        given = node.inputs[1] if len(node.inputs) > 1 else ""
        had = node.ints("split")
        if not given and had is None and len(set(sizes)) == 1:
            return  # equal parts stay equal parts
        array = np.asarray(sizes, np.int64)
        if node.since < 13:
            set_attribute(self.emitter.node(node), "split", sizes)
            self.changes.append(Change({"node": node.key, "attribute": "split"}, had, sizes))
        elif given in self.graph.constants and self.graph.constants[given].pinned is None:
            old = self.first.trace.env.values[given]
            self.replace_constant(given, array)
            self.changed({"tensor": given}, old, array)
        else:
            proto = self.emitter.node(node)
            name = self.emitter.literal(f"{node.key}_sizes", array)
            del proto.input[1:]
            proto.input.append(name)
            drop_attribute(proto, "num_outputs")
            self.changes.append(Change({"node": node.key, "input": 1}, None, sizes))

    def _slice(self, node: Node, cut: Sequence[Ranges]) -> None:
        axes = slice_axes(node, self.first.trace.env)
        written: dict[int, tuple[int, int, int]] = {}
        picked: list[tuple[int, IntArray]] = []
        for ranges in cut:
            if ranges.holds:
                continue
            indices, at = ranges.indices[0], axes.index(ranges.axis)
            if indices.size > 0 and bool((np.diff(indices) == 1).all()):
                written[at] = (int(indices[0]), int(indices[-1]) + 1, 1)
            else:  # not a range any more: take everything here and pick behind the node
                extent = (self.first.shape(node.inputs[0]) or ())[ranges.axis]
                written[at] = (0, extent, 1)
                picked.append((ranges.axis, indices))
        self._set_slice(node, written)
        self._pick_behind(node, picked)

    def _pick_behind(self, node: Node, picked: Sequence[tuple[int, IntArray]]) -> None:
        """Gathers between a Slice and whoever reads it, one for each axis."""
        if not picked:
            return
        proto = self.emitter.node(node)
        final = proto.output[0]
        made = proto.output[0] = self.emitter.fresh(f"{node.key}_all")
        for number, (axis, indices) in enumerate(picked, 1):
            last = number == len(picked)
            result = final if last else self.emitter.fresh(f"{node.key}_axis{axis}")
            literal = self.emitter.literal(f"{node.key}_picked", np.asarray(indices, np.int64))
            gather = helper.make_node("Gather", [made, literal], [result], axis=axis)
            self.emitter.after(node, gather)
            made = result

    def _set_slice(self, node: Node, written: Mapping[int, tuple[int, int, int]]) -> None:
        """New start, stop and step by position in the node's list of axes; the rest stays."""
        for position, name in ((1, "starts"), (2, "ends"), (4, "steps")):
            which = min(position - 1, 2)
            had = node.ints(name)
            given = node.inputs[position] if position < len(node.inputs) else ""
            if not given and had is None:
                continue
            old = np.asarray(self.first.trace.env.values[given] if given else had)
            literal, mask = np.zeros_like(old), np.zeros(old.shape, np.bool_)
            for at, values in written.items():
                if old[at] != values[which] or given in self.first.trace.env.dynamic:
                    literal[at], mask[at] = values[which], True
            if not mask.any():
                continue
            if given:
                self.add_patch(Patch(node, position, literal, mask))
                continue
            new = np.where(mask, literal, old)
            set_attribute(self.emitter.node(node), name, new.tolist())
            self.changed({"node": node.key, "attribute": name}, old, new)

    def _gather(self, ranges: Ranges) -> None:
        node, indices = ranges.node, ranges.indices[0]
        name = node.inputs[1]
        old = self.first.trace.env.values[name]
        new = np.asarray(indices).astype(old.dtype)
        if np.array_equal(old, new):
            return
        constant = self.graph.constants.get(name)
        if constant is not None and constant.pinned is None:
            self.replace_constant(name, new)
            self.changed({"tensor": name}, old, new)
        else:
            self.patches.pop((node.index, 1), None)
            self.emitter.node(node).input[1] = self.emitter.literal(f"{node.key}_indices", new)
            what = {"node": node.key, "input": 1}
            self.changes.append(Change(what, old.tolist(), new.tolist()))

    def write_squeeze(self, node: Node) -> None:
        """Squeeze without axes drops every axis of extent 1: say which, if a cut makes another."""
        given = node.ints("axes") is not None or (len(node.inputs) > 1 and node.inputs[1])
        before = self.first.trace.env.shape(node.inputs[0]) or ()
        after = self.first.shape(node.inputs[0]) or ()
        if given or before.count(1) == after.count(1):
            return
        axes = [axis for axis, size in enumerate(before) if size == 1]
        proto = self.emitter.node(node)
        if node.since < 13:
            set_attribute(proto, "axes", axes)
        else:
            del proto.input[1:]
            proto.input.append(self.emitter.literal(f"{node.key}_axes", np.asarray(axes, np.int64)))
        self.changes.append(Change({"node": node.key, "attribute": "axes"}, None, axes))

    def write_run(self, run: Run) -> None:
        """Write a run of movements as the one selection it is, if something in it went."""
        source = run.nodes[0].inputs[0]
        alive = self.first.alive(source, run.axis)
        if not self.first.cut(source):
            return
        if alive is None:
            size = (self.first.trace.env.shape(source) or ())[run.axis]
            alive = np.ones(size, np.bool_)
        indices = moves.renumber(run.indices, alive)
        last = run.nodes[-1].outputs[0]
        name = run.nodes[0].proto.name
        if np.array_equal(indices, np.arange(int(alive.sum()))):
            proto = helper.make_node("Identity", [source], [last], name=name)
        else:
            picked = self.emitter.literal(f"{last}_indices", indices.astype(np.int64))
            proto = helper.make_node("Gather", [source, picked], [last], name=name, axis=run.axis)
        self.emitter.nodes[run.nodes[0].index] = [proto]
        for node in run.nodes[1:]:
            self.emitter.nodes[node.index] = []
        replaced = [node.key for node in run.nodes]
        self.changes.append(Change({"nodes": replaced}, None, indices.tolist()))
