"""Slices, Splits, Gathers and runs of movements, rewritten for what is left of their axis."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import helper

from onnxprune import moves
from onnxprune.graph import Node
from onnxprune.patches import Patcher, drop_attribute, set_ints
from onnxprune.record import Change
from onnxprune.runs import Run
from onnxprune.shapefix import Patch, Ranges


class SelectionWriter(Patcher):
    """Writes the selections of one surgery."""

    def write_ranges(self, ranges: Ranges) -> None:
        """One Slice, Split or Gather along a cut axis."""
        match ranges.node.op_type:
            case "Split":
                self._split(ranges)
            case "Slice":
                self._slice(ranges)
            case _:
                self._gather(ranges)

    def _split(self, ranges: Ranges) -> None:
        node, sizes = ranges.node, [int(indices.size) for indices in ranges.indices]
        given = node.inputs[1] if len(node.inputs) > 1 else ""
        had = node.ints("split")
        if not given and had is None and len(set(sizes)) == 1:
            return  # equal parts stay equal parts
        array = np.asarray(sizes, np.int64)
        if node.since < 13:
            set_ints(self.emitter.node(node), "split", sizes)
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

    def _slice(self, ranges: Ranges) -> None:
        node, indices = ranges.node, ranges.indices[0]
        axes = self._slice_axes(node)
        rank = len(self.first.trace.env.shape(node.inputs[0]) or ())
        at = [axis % rank for axis in axes].index(ranges.axis)
        extent = (self.first.shape(node.inputs[0]) or ())[ranges.axis]
        start, stop, step = self._slice_values(node, at)
        if np.array_equal(np.arange(extent)[moves.as_slice(start, stop, step)], indices):
            return
        contiguous = indices.size > 0 and bool((np.diff(indices) == 1).all())
        if contiguous:
            self._set_slice(node, at, int(indices[0]), int(indices[-1]) + 1, 1)
            return
        # Not a range any more: take everything here and pick behind the node.
        self._set_slice(node, at, 0, extent, 1)
        proto = self.emitter.node(node)
        inner = self.emitter.fresh(f"{node.key}_all")
        final = proto.output[0]
        proto.output[0] = inner
        picked = self.emitter.literal(f"{node.key}_picked", np.asarray(indices, np.int64))
        self.emitter.after(
            node, helper.make_node("Gather", [inner, picked], [final], axis=ranges.axis)
        )

    def _slice_axes(self, node: Node) -> Sequence[int]:
        values = self.first.trace.env.values
        if len(node.inputs) > 3 and node.inputs[3]:
            return [int(v) for v in values[node.inputs[3]]]
        attribute = node.ints("axes")
        if attribute is not None:
            return attribute
        starts = node.ints("starts")
        count = len(starts) if starts is not None else values[node.inputs[1]].size
        return range(count)

    def _slice_values(self, node: Node, at: int) -> tuple[int, int, int]:
        values = self.first.trace.env.values
        starts, ends = node.ints("starts"), node.ints("ends")
        if starts is not None and ends is not None:
            return starts[at], ends[at], 1
        steps = values[node.inputs[4]] if len(node.inputs) > 4 and node.inputs[4] else None
        step = 1 if steps is None else int(steps[at])
        return int(values[node.inputs[1]][at]), int(values[node.inputs[2]][at]), step

    def _set_slice(self, node: Node, at: int, start: int, stop: int, step: int) -> None:
        if node.ints("starts") is not None:
            for name, value in (("starts", start), ("ends", stop)):
                old = list(node.ints(name) or ())
                new = [value if n == at else v for n, v in enumerate(old)]
                set_ints(self.emitter.node(node), name, new)
                self.changes.append(Change({"node": node.key, "attribute": name}, old, new))
            return
        for position, value in ((1, start), (2, stop), (4, step)):
            if position >= len(node.inputs) or not node.inputs[position]:
                continue
            old_value = self.first.trace.env.values[node.inputs[position]]
            mask = np.zeros(old_value.shape, np.bool_)
            mask.reshape(-1)[at] = True
            literal = np.where(mask, value, 0).astype(old_value.dtype)
            if old_value.reshape(-1)[at] != value:
                self.write_patch(Patch(node, position, literal, mask))

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
            set_ints(proto, "axes", axes)
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
