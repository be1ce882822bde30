"""From a pruning plan to a smaller model, and to the masked twin that proves it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper

from onnxprune import fields, moves
from onnxprune.analyse import DependencyGraph
from onnxprune.emit import ConstantEdit, Emitter
from onnxprune.errors import InvariantError
from onnxprune.graph import Constant, Node
from onnxprune.io import Model
from onnxprune.ops.registry import repair_of
from onnxprune.runs import Run
from onnxprune.select import PruningPlan
from onnxprune.shapefix import Patch, Ranges, repairs
from onnxprune.slots import Birth
from onnxprune.survivors import Survivors
from onnxprune.types import AnyArray, BoolArray, IntArray, Shape

# Between a weight and the node that reads it: a zero in the constant is a zero in the weight.
_ZERO_KEEPING = {"Cast", "CastLike", "Identity", "DequantizeLinear"}


@dataclass(frozen=True, slots=True)
class Removed:
    """Positions that went from one axis of one weight, in the original's numbering.

    ``at``: the part of the tensor this speaks of, as axis and range, where rows differ.
    """

    tensor: str
    axis: int
    role: str
    indices: tuple[int, ...]
    at: tuple[int, int, int] | None = None


@dataclass(frozen=True, slots=True)
class Mask:
    """A 0/1 mask the twin multiplies one input of a node by; ``zero``: flat positions."""

    node: str
    input: int
    shape: Shape
    zero: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Copy:
    """A constant that no longer equals the one it was shared with, and who reads it."""

    of: str
    uses: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Change:
    """A shape constant or attribute that was rewritten."""

    what: Mapping[str, object]
    before: object
    after: object


@dataclass(frozen=True)
class Surgery:
    """A rewritten model with all that a recipe says of it."""

    model: Model
    removed: tuple[Removed, ...]
    copies: Mapping[str, Copy]
    masks: tuple[Mask, ...]
    changes: tuple[Change, ...]


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
    if model is not plan.graph.graph.model:
        raise InvariantError("the plan was made for another model")
    return operate(plan).model


def operate(plan: PruningPlan) -> Surgery:
    """``rewrite`` with the record that a recipe needs."""
    return _Surgeon(plan.graph, plan).operate()


def masked_twin(plan: PruningPlan) -> Model:
    """The original with the slices that read dropped channels set to zero (DESIGN §4)."""
    surgeon = _Surgeon(plan.graph, plan)
    return surgeon.twin()


class _Surgeon:
    def __init__(self, dependency: DependencyGraph, plan: PruningPlan) -> None:
        self.dependency = dependency
        self.graph = dependency.graph
        self.tracer = dependency.tracer
        self.dead = dependency.dead(plan.keep)
        self.survivors = [Survivors(trace, self.dead) for trace in self.tracer.traces]
        self.first = self.survivors[0]
        self.changes: list[Change] = []

    # -- the smaller model -----------------------------------------------------------------------

    def operate(self) -> Surgery:
        if not self.dead.classes.any():
            return Surgery(self.graph.model, (), {}, (), ())
        emitter = Emitter(self.graph)
        dead_births = list(self._dead_births())
        for name, births in dead_births:
            self._cut_constant(emitter, name, births)
        self._repair_attributes(emitter)
        found = repairs(self.tracer, self.survivors)
        if found.misfits:
            raise InvariantError(f"a shape at '{found.misfits[0].where}' cannot be written")
        for patch in found.patches:
            self._patch(emitter, patch)
        for ranges in found.ranges:
            self._ranges(emitter, ranges)
        for run in self.tracer.runs.values():
            self._run(emitter, run)
        self._dims(emitter)
        merged = emitter.canonical()
        removed = tuple(
            entry
            for name, births in dead_births
            if name not in merged
            for birth, mask in births
            for entry in self._removed(name, birth, mask)
        )
        copies = self._copies(emitter, merged)
        masks = tuple(mask for _, mask, _ in self._masks())
        return Surgery(emitter.build(), removed, copies, masks, tuple(self.changes))

    def _dead_births(self) -> Iterator[tuple[str, list[tuple[Birth, BoolArray]]]]:
        """Constants of which something goes, with the births that say what."""
        by_leaf: dict[str, list[tuple[Birth, BoolArray]]] = {}
        slots = self.dead.slots
        for birth in self.tracer.table.births:
            if slots[birth.base : birth.base + birth.size].any():
                by_leaf.setdefault(birth.leaf, []).append((birth, slots[birth.field]))
        for name in self.graph.constants:
            if name in by_leaf:
                yield name, by_leaf[name]

    def _cut_constant(
        self, emitter: Emitter, name: str, births: Sequence[tuple[Birth, BoolArray]]
    ) -> None:
        shape = self.graph.constants[name].weight.shape
        view = max((birth.view for birth, _ in births), key=len)
        masks = [_in_view(mask, birth.view, view, shape) for birth, mask in births]
        left = fields.survivors_shape(view, masks)
        extra = len(view) - len(shape)
        new_shape = (int(np.prod(left[: extra + 1])), *left[extra + 1 :]) if shape else ()
        digest = hashlib.sha256()
        for birth, mask in births:
            digest.update(repr((birth.view, birth.axes)).encode() + np.packbits(mask).tobytes())
        emitter.constants[name] = ConstantEdit(
            new_shape,
            lambda array: fields.compact(array.reshape(view), *masks).reshape(new_shape),
            digest.digest(),
        )

    def _repair_attributes(self, emitter: Emitter) -> None:
        for node in self.graph.nodes:
            repair = repair_of(node.op_type)
            if repair is None or not self.first.cut(node.inputs[0]):
                continue
            before = self.first.trace.env.shape(node.inputs[0]) or ()
            for name, value in repair(node, before, self.first).items():
                if value != node.int(name, 1):
                    _set_int(emitter.node(node), name, value)
                    what = {"node": node.key, "attribute": name}
                    self.changes.append(Change(what, node.int(name, 1), value))

    def _patch(self, emitter: Emitter, patch: Patch) -> None:
        node, name = patch.node, patch.node.inputs[patch.position]
        constant = self.graph.constants.get(name)
        old = self.first.trace.env.values[name]
        if constant is not None and constant.pinned is None:
            new = np.where(patch.mask, patch.literal, old).astype(old.dtype)
            _replace_constant(emitter, name, new)
            self._changed({"tensor": name}, old, new)
            return
        if patch.mask.all():
            replaced = emitter.literal(f"{node.key}_shape", patch.literal)
        else:
            replaced = self._partly(emitter, patch, name)
        emitter.node(node).input[patch.position] = replaced
        shown = [int(v) if m else None for v, m in zip(patch.literal.flat, patch.mask.flat, strict=True)]
        what = {"node": node.key, "input": patch.position}
        self.changes.append(Change(what, old.tolist(), shown))

    def _partly(self, emitter: Emitter, patch: Patch, name: str) -> str:
        """A computed shape of which some elements become literals."""
        node = patch.node
        concat = self._pieces(emitter, patch, name)
        if concat is not None:
            emitter.before(node, concat)
            return concat.output[0]
        mask = emitter.literal(f"{node.key}_shape_mask", patch.mask)
        literal = emitter.literal(f"{node.key}_shape_literal", patch.literal)
        result = emitter.fresh(f"{node.key}_shape")
        emitter.before(node, helper.make_node("Where", [mask, literal, name], [result]))
        return result

    def _pieces(self, emitter: Emitter, patch: Patch, name: str) -> onnx.NodeProto | None:
        """A private copy of the Concat that computes the shape, with literals for some parts."""
        source = self.graph.producer.get(name)
        if source is None or source.op_type != "Concat" or source.domain:
            return None
        inputs, start = [], 0
        for piece in source.inputs:
            size = int(self.first.trace.env.values[piece].size) if piece in self.first.trace.env.values else -1
            if size < 0:
                return None
            mask = patch.mask[start : start + size]
            if mask.all() and size:
                literal = patch.literal[start : start + size]
                inputs.append(emitter.literal(f"{patch.node.key}_dim{start}", literal))
            elif mask.any():
                return None
            else:
                inputs.append(piece)
            start += size
        copy = onnx.NodeProto()
        copy.CopyFrom(source.proto)
        del copy.input[:]
        copy.input.extend(inputs)
        copy.output[0] = emitter.fresh(f"{patch.node.key}_shape")
        copy.name = copy.output[0] if copy.name else ""
        return copy

    def _changed(self, what: Mapping[str, object], old: AnyArray, new: AnyArray) -> None:
        if not np.array_equal(old, new):
            self.changes.append(Change(what, old.tolist(), new.tolist()))

    # -- slices, splits, gathers -----------------------------------------------------------------

    def _ranges(self, emitter: Emitter, ranges: Ranges) -> None:
        match ranges.node.op_type:
            case "Split":
                self._split(emitter, ranges)
            case "Slice":
                self._slice(emitter, ranges)
            case _:
                self._gather(emitter, ranges)

    def _split(self, emitter: Emitter, ranges: Ranges) -> None:
        node, sizes = ranges.node, [int(indices.size) for indices in ranges.indices]
        given = node.inputs[1] if len(node.inputs) > 1 else ""
        had = node.ints("split")
        if not given and had is None and len(set(sizes)) == 1:
            return  # equal parts stay equal parts
        array = np.asarray(sizes, np.int64)
        if node.since < 13:
            _set_ints(emitter.node(node), "split", sizes)
            self.changes.append(Change({"node": node.key, "attribute": "split"}, had, sizes))
        elif given in self.graph.constants and self.graph.constants[given].pinned is None:
            old = self.first.trace.env.values[given]
            _replace_constant(emitter, given, array)
            self._changed({"tensor": given}, old, array)
        else:
            proto = emitter.node(node)
            name = emitter.literal(f"{node.key}_sizes", array)
            del proto.input[1:]
            proto.input.append(name)
            _drop_attribute(proto, "num_outputs")
            self.changes.append(Change({"node": node.key, "input": 1}, None, sizes))

    def _slice(self, emitter: Emitter, ranges: Ranges) -> None:
        node, indices = ranges.node, ranges.indices[0]
        axes = self._slice_axes(node)
        rank = len(self.first.trace.env.shape(node.inputs[0]) or ())
        at = [axis % rank for axis in axes].index(ranges.axis)
        extent = (self.first.shape(node.inputs[0]) or ())[ranges.axis]
        start, stop, step = self._slice_values(node, at)
        if np.array_equal(np.arange(extent)[moves_range(start, stop, step)], indices):
            return
        contiguous = indices.size > 0 and bool((np.diff(indices) == 1).all())
        if contiguous:
            self._set_slice(emitter, node, at, int(indices[0]), int(indices[-1]) + 1, 1)
            return
        # Not a range any more: take everything here and pick behind the node.
        self._set_slice(emitter, node, at, 0, extent, 1)
        proto = emitter.node(node)
        inner = emitter.fresh(f"{node.key}_all")
        final = proto.output[0]
        proto.output[0] = inner
        picked = emitter.literal(f"{node.key}_picked", np.asarray(indices, np.int64))
        emitter.after(node, helper.make_node("Gather", [inner, picked], [final], axis=ranges.axis))

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

    def _set_slice(
        self, emitter: Emitter, node: Node, at: int, start: int, stop: int, step: int
    ) -> None:
        if node.ints("starts") is not None:
            for name, value in (("starts", start), ("ends", stop)):
                old = list(node.ints(name) or ())
                new = [value if n == at else v for n, v in enumerate(old)]
                _set_ints(emitter.node(node), name, new)
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
                self._patch(emitter, Patch(node, position, literal, mask))

    def _gather(self, emitter: Emitter, ranges: Ranges) -> None:
        node, indices = ranges.node, ranges.indices[0]
        name = node.inputs[1]
        old = self.first.trace.env.values[name]
        new = np.asarray(indices).astype(old.dtype)
        if np.array_equal(old, new):
            return
        constant = self.graph.constants.get(name)
        if constant is not None and constant.pinned is None:
            _replace_constant(emitter, name, new)
            self._changed({"tensor": name}, old, new)
        else:
            emitter.node(node).input[1] = emitter.literal(f"{node.key}_indices", new)
            what = {"node": node.key, "input": 1}
            self.changes.append(Change(what, old.tolist(), new.tolist()))

    def _run(self, emitter: Emitter, run: Run) -> None:
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
            picked = emitter.literal(f"{last}_indices", indices.astype(np.int64))
            proto = helper.make_node("Gather", [source, picked], [last], name=name, axis=run.axis)
        emitter.nodes[run.nodes[0].index] = [proto]
        for node in run.nodes[1:]:
            emitter.nodes[node.index] = []
        replaced = [node.key for node in run.nodes]
        self.changes.append(Change({"nodes": replaced}, None, indices.tolist()))

    def _dims(self, emitter: Emitter) -> None:
        """New extents of every tensor that was cut, for value_info."""
        for name in self.first.trace.fields:
            if self.first.cut(name):
                before = self.first.trace.env.shape(name) or ()
                after = self.first.shape(name) or ()
                emitter.dims[name] = {
                    axis: size
                    for axis, (old, size) in enumerate(zip(before, after, strict=True))
                    if old != size
                }

    # -- the record ------------------------------------------------------------------------------

    def _role(self, birth: Birth) -> str:
        span = slice(birth.base, birth.base + birth.size)
        if self.tracer.producing[span].any():
            return "producer"
        return "consumer" if self.tracer.consuming[span].any() else "parameter"

    def _removed(self, name: str, birth: Birth, mask: BoolArray) -> Iterator[Removed]:
        role = self._role(birth)
        shape = self.graph.constants[name].weight.shape
        extra = len(birth.view) - len(shape)
        if len(birth.axes) == 1 and not extra:
            axis = birth.axes[0]
            yield Removed(name, axis, role, _flat(mask))
            return
        # Whole slices by their own index, the rest row by row.
        rest = mask
        for axis in fields.varying(mask):
            others = tuple(a for a in range(mask.ndim) if a != axis)
            whole = rest.all(axis=others)
            if whole.any() and axis >= extra:
                yield Removed(name, axis - extra, role, _flat(whole))
                shown = whole.reshape([-1 if a == axis else 1 for a in range(mask.ndim)])
                rest = rest & ~shown
        if not rest.any():
            return
        cut, row_axis = birth.axes[-1], birth.axes[0]
        width = birth.view[1] if extra else 1
        lines = np.moveaxis(rest, row_axis, 0).reshape(rest.shape[row_axis], -1)
        for row, line in enumerate(lines):
            if line.any():
                at = (0 if extra else row_axis, row * width, (row + 1) * width)
                yield Removed(name, cut - extra, role, _flat(line), at)

    def _copies(self, emitter: Emitter, merged: Mapping[str, str]) -> Mapping[str, Copy]:
        uses: dict[str, list[tuple[str, int]]] = {}
        for node in self.graph.nodes:
            for position, name in enumerate(node.inputs):
                uses.setdefault(merged.get(name, name), []).append((node.key, position))
        return {
            name: Copy(constant.origin, tuple(uses.get(name, ())))
            for name, constant in self.graph.constants.items()
            if name != constant.origin and name not in merged
        }

    # -- the twin --------------------------------------------------------------------------------

    def twin(self) -> Model:
        emitter = Emitter(self.graph)
        masked = {name for _, _, leaves in self._masks() for name in leaves}
        for name, births in self._dead_births():
            zero = [
                (birth, mask)
                for birth, mask in births
                if self._role(birth) == "consumer" and name not in masked
            ]
            self._zero_constant(emitter, name, zero, births)
        for node, mask, _ in self._masks():
            self._insert_mask(emitter, node, mask)
        return emitter.build()

    def _zero_constant(
        self,
        emitter: Emitter,
        name: str,
        zero: Sequence[tuple[Birth, BoolArray]],
        births: Sequence[tuple[Birth, BoolArray]],
    ) -> None:
        constant = self.graph.constants[name]
        shape = constant.weight.shape
        nothing = self._zero_value(name, constant)

        def compute(array: AnyArray) -> AnyArray:
            result = np.array(array)
            for birth, mask in zero:
                seen, fill = result.reshape(birth.view), nothing
                dead = np.broadcast_to(mask, birth.view)
                if np.ndim(fill) and len(birth.view) == len(shape):
                    fill = np.broadcast_to(fill, birth.view)[dead]
                seen[dead] = fill
            if result.dtype.kind == "f" or result.dtype.name.startswith(("bfloat", "float")):
                # 0 · NaN is NaN: what is dropped with a NaN in it must not reach the twin.
                for birth, mask in births:
                    seen = result.reshape(birth.view)
                    bad = ~np.isfinite(seen.astype(np.float32)) & np.broadcast_to(mask, birth.view)
                    seen[bad] = 0
            return result

        key = repr([(b.view, b.axes, np.packbits(m).tobytes()) for b, m in births]).encode()
        emitter.constants[name] = ConstantEdit(shape, compute, key)

    def _zero_value(self, name: str, constant: Constant) -> AnyArray:
        """What stands for the real value 0: the zero point in a quantized tensor."""
        for node, position in self.graph.consumers.get(name, []):
            if node.op_type == "DequantizeLinear" and position == 0 and len(node.inputs) > 2:
                zero_point = self.graph.constants.get(node.inputs[2])
                if zero_point is not None:
                    points = zero_point.weight.read()
                    if points.ndim == 1 and points.size > 1:
                        axis = node.int("axis", 1) % len(constant.weight.shape)
                        return points.reshape(
                            [-1 if a == axis else 1 for a in range(len(constant.weight.shape))]
                        )
                    return points.reshape(())
        return np.zeros((), constant.weight.dtype)

    def _masks(self) -> Iterator[tuple[Node, Mask, frozenset[str]]]:
        """Where the twin multiplies by 0/1: activations contracted with one another, and weights
        whose constant a zero would not survive; with the constants that a mask replaces."""
        for contraction in self.tracer.traces[0].contractions:
            effect = contraction.effect
            dead = self.dead.of(self.tracer.table.classes(effect.field))
            if dead.any():
                mask = np.broadcast_to(dead, _narrow(dead, effect.shape))
                yield (
                    contraction.node,
                    Mask(contraction.node.key, effect.operand, mask.shape, _flat(mask)),
                    frozenset(),
                )
        for node in self.graph.nodes:
            if node.key in self.graph.derived:
                continue
            for position, name in enumerate(node.inputs):
                if name in self.graph.derived:
                    found = self._computed_weight(node, position, name)
                    if found is not None:
                        yield found

    def _computed_weight(
        self, node: Node, position: int, name: str
    ) -> tuple[Node, Mask, frozenset[str]] | None:
        leaves, plain = self._leaves(name)
        consuming = self.tracer.consuming
        if plain:
            # A table that is looked up and multiplied with must not lose what it looks up.
            consuming = consuming & self.tracer.producing
        masks = [
            self.dead.of(f)
            for f in self.first.trace.fields.get(name, ())
            if (f > 0).any() and consuming[f[f > 0]].any()
        ]
        masks = [mask for mask in masks if mask.any()]
        if not masks:
            return None
        dead = masks[0]
        for other in masks[1:]:
            dead = dead | other
        return node, Mask(node.key, position, dead.shape, _flat(dead)), frozenset(leaves)

    def _leaves(self, name: str) -> tuple[set[str], bool]:
        """Constants behind a derived tensor, and whether a zero in them stays a zero in it."""
        leaves: set[str] = set()
        plain, pending = True, [name]
        while pending:
            current = pending.pop()
            if current in self.graph.constants:
                leaves.add(current)
                continue
            node = self.graph.producer[current]
            entry = self.tracer.entries[node.index]
            moves_only = entry is not None and entry.move is not None
            if not moves_only and node.op_type not in _ZERO_KEEPING:
                plain = False
                pending += [n for n in node.inputs if n]
            else:
                if node.op_type == "DequantizeLinear" and node.inputs[0] not in self.graph.constants:
                    plain = False
                pending.append(node.inputs[0])
        return leaves, plain

    def _insert_mask(self, emitter: Emitter, node: Node, mask: Mask) -> None:
        name = node.inputs[mask.input]
        element = self.first.trace.env.data_type(name)
        dtype = helper.tensor_dtype_to_np_dtype(element)
        values = np.ones(mask.shape, np.float32)
        values.reshape(-1)[list(mask.zero)] = 0
        literal = emitter.literal(f"{node.key}_mask", values.astype(dtype))
        masked = emitter.fresh(f"{name}_masked")
        emitter.before(node, helper.make_node("Mul", [name, literal], [masked]))
        proto = emitter.node(node)
        proto.input[mask.input] = masked


def moves_range(start: int, stop: int, step: int) -> slice:
    """A Slice's range as Python's, a very negative end meaning past the first element."""
    return slice(start, stop if step > 0 or stop > -(1 << 31) else None, step)


def _in_view(mask: BoolArray, seen: Shape, view: Shape, shape: Shape) -> BoolArray:
    """A mask on a constant's own dimensions, under a view that splits its first axis."""
    del shape
    if len(seen) == len(view):
        return mask
    if mask.shape[0] == 1:
        return mask.reshape(1, *mask.shape)
    return mask.reshape(view[0], view[1], *mask.shape[1:])


def _narrow(dead: BoolArray, shape: Shape) -> Shape:
    """Shape of a mask: the tensor's extent on axes the field varies on, 1 elsewhere."""
    return tuple(size if dead.shape[axis] > 1 else 1 for axis, size in enumerate(shape))


def _flat(mask: AnyArray) -> tuple[int, ...]:
    return tuple(int(v) for v in np.flatnonzero(mask))


def _replace_constant(emitter: Emitter, name: str, new: AnyArray) -> None:
    emitter.constants[name] = ConstantEdit(new.shape, lambda _: new, b"value" + new.tobytes())


def _set_int(node: onnx.NodeProto, name: str, value: int) -> None:
    for attribute in node.attribute:
        if attribute.name == name:
            attribute.i = value
            return
    node.attribute.append(helper.make_attribute(name, value))


def _set_ints(node: onnx.NodeProto, name: str, values: Sequence[int]) -> None:
    _drop_attribute(node, name)
    node.attribute.append(helper.make_attribute(name, list(values)))


def _drop_attribute(node: onnx.NodeProto, name: str) -> None:
    kept = [attribute for attribute in node.attribute if attribute.name != name]
    del node.attribute[:]
    node.attribute.extend(kept)


__all__ = ["Surgery", "masked_twin", "operate", "rewrite"]
_Index = IntArray
