"""Shape constants and shape arithmetic, rewritten where a cut makes them wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx
from onnx import helper

from onnxprune.emit import ConstantEdit, Emitter
from onnxprune.graph import Graph
from onnxprune.ops.registry import Setting
from onnxprune.record import Change
from onnxprune.shapefix import Patch
from onnxprune.survivors import Survivors
from onnxprune.types import AnyArray


class Patcher:
    """Writes new values for shape inputs and keeps a record of them.

    Attributes:
        patches: What ``write_patches`` will write, by node and input: several edits of one input
            become one.
        changes: What was written.
    """

    def __init__(self, graph: Graph, emitter: Emitter, first: Survivors) -> None:
        self.graph = graph
        self.emitter = emitter
        self.first = first
        self.patches: dict[tuple[int, int], Patch] = {}
        self.changes: list[Change] = []

    def add_patch(self, patch: Patch) -> None:
        """Note new values for a shape input, on top of those noted before."""
        key = (patch.node.index, patch.position)
        before = self.patches.get(key)
        if before is not None:
            literal = np.where(patch.mask, patch.literal, before.literal)
            patch = replace(patch, literal=literal, mask=np.logical_or(patch.mask, before.mask))
        self.patches[key] = patch

    def write_patches(self) -> None:
        """Write what was noted."""
        for patch in self.patches.values():
            self._write_patch(patch)

    def _write_patch(self, patch: Patch) -> None:
        """In place, or as a constant in its stead."""
        node, name = patch.node, patch.node.inputs[patch.position]
        constant = self.graph.constants.get(name)
        old = self.first.trace.env.values[name]
        if constant is not None and constant.pinned is None:
            new = np.where(patch.mask, patch.literal, old).astype(old.dtype)
            self.replace_constant(name, new)
            self.changed({"tensor": name}, old, new)
            return
        if patch.mask.all():
            replaced = self.emitter.literal(f"{node.key}_shape", patch.literal)
        else:
            replaced = self._partly(patch, name)
        self.emitter.node(node).input[patch.position] = replaced
        pairs = zip(patch.literal.flat, patch.mask.flat, strict=True)
        shown = [int(value) if literal else None for value, literal in pairs]
        what = {"node": node.key, "input": patch.position}
        self.changes.append(Change(what, old.tolist(), shown))

    def _partly(self, patch: Patch, name: str) -> str:
        """A computed shape of which some elements become literals."""
        node = patch.node
        concat = self._pieces(patch, name)
        if concat is not None:
            self.emitter.before(node, concat)
            return str(concat.output[0])
        mask = self.emitter.literal(f"{node.key}_shape_mask", patch.mask)
        literal = self.emitter.literal(f"{node.key}_shape_literal", patch.literal)
        result = self.emitter.fresh(f"{node.key}_shape")
        self.emitter.before(node, helper.make_node("Where", [mask, literal, name], [result]))
        return result

    def _pieces(self, patch: Patch, name: str) -> onnx.NodeProto | None:
        """A private copy of the Concat that computes the shape, with literals for some parts."""
        source = self.graph.producer.get(name)
        if source is None or source.op_type != "Concat" or source.domain:
            return None
        inputs, start = [], 0
        for piece in source.inputs:
            value = self.first.trace.env.values.get(piece)
            if value is None:
                return None
            size = int(value.size)
            mask = patch.mask[start : start + size]
            if mask.all() and size:
                literal = patch.literal[start : start + size]
                inputs.append(self.emitter.literal(f"{patch.node.key}_dim{start}", literal))
            elif mask.any():
                return None
            else:
                inputs.append(piece)
            start += size
        copy = onnx.NodeProto()
        copy.CopyFrom(source.proto)
        del copy.input[:]
        copy.input.extend(inputs)
        copy.output[0] = self.emitter.fresh(f"{patch.node.key}_shape")
        copy.name = copy.output[0] if copy.name else ""
        return copy

    def changed(self, what: Mapping[str, object], old: AnyArray, new: AnyArray) -> None:
        """Record a rewritten constant, unless it came out the same."""
        if not np.array_equal(old, new):
            self.changes.append(Change(what, old.tolist(), new.tolist()))

    def replace_constant(self, name: str, new: AnyArray) -> None:
        """Give a constant that nobody shares other values."""
        key = b"value" + new.tobytes()
        self.emitter.constants[name] = ConstantEdit(new.shape, lambda _: new, key)


def set_attribute(node: onnx.NodeProto, name: str, value: Setting | Sequence[int]) -> None:
    """Set an attribute, adding it where it is missing."""
    made = helper.make_attribute(name, value)
    for attribute in node.attribute:
        if attribute.name == name:
            attribute.CopyFrom(made)
            return
    node.attribute.append(made)


def drop_attribute(node: onnx.NodeProto, name: str) -> None:
    """Remove an attribute if it is there."""
    kept = [attribute for attribute in node.attribute if attribute.name != name]
    del node.attribute[:]
    node.attribute.extend(kept)
