"""Shapes that are written down or computed in the graph, made right for a cut.

A dynamic export computes its Reshape targets: Shape, Gather, Mul, Concat. After a cut that
arithmetic is evaluated again under every choice of stand-ins. What comes out right stays as it is;
an element that is wrong becomes a literal where the needed number does not depend on the stand-in,
-1 where a Reshape has none yet; otherwise the cut cannot be written and the channels must stay.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from onnxprune import fields, moves
from onnxprune.graph import Graph, Node
from onnxprune.runs import movement_view
from onnxprune.shapes import Environment, Evaluator
from onnxprune.survivors import Misfit, Survivors
from onnxprune.trace import Tracer
from onnxprune.types import AnyArray, IntArray, Shape

# Inputs that are read as a shape, an axis or a position; whatever else reads shape arithmetic
# uses the number as data, which must keep its old value.
_SHAPE_INPUTS: Mapping[str, tuple[int, ...]] = {
    "Reshape": (1,),
    "Expand": (1,),
    "ConstantOfShape": (0,),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "Resize": (2, 3),
    "Upsample": (1,),
    "Tile": (1,),
    "Pad": (1, 3),
    "Squeeze": (1,),
    "Unsqueeze": (1,),
}


# What these make is data of a shape that its use knows nothing of: it keeps shape and value.
_PINNED = {"ConstantOfShape", "Range", "Expand", "Tile"}
_NOT_COMPUTABLE = -(1 << 30)


@dataclass(frozen=True, slots=True)
class Patch:
    """New values for one input of one node.

    Attributes:
        literal: Value of each element, 0 where ``mask`` is False.
        mask: Which elements become literals; the others keep what the graph computes.
    """

    node: Node
    position: int
    literal: AnyArray
    mask: AnyArray


@dataclass(frozen=True, slots=True)
class Ranges:
    """A Slice, Split or Gather along a cut axis, as the indices it now takes.

    Attributes:
        axis: The axis.
        indices: For each output, positions among the survivors.
        holds: What the graph says or computes already takes them.
    """

    node: Node
    axis: int
    indices: tuple[IntArray, ...]
    holds: bool = False


@dataclass(frozen=True, slots=True)
class Repairs:
    """What has to be written so that every shape is right, and what cannot be."""

    patches: tuple[Patch, ...]
    ranges: tuple[Ranges, ...]
    misfits: tuple[Misfit, ...]


def repairs(tracer: Tracer, survivors: Sequence[Survivors]) -> Repairs:
    """Repairs for a cut; ``survivors`` holds one entry for each environment."""
    found = _Finder(tracer, survivors)
    results: list[Patch | Ranges | Misfit] = [*found.ranges(), *found.patches()]
    return Repairs(
        tuple(r for r in results if isinstance(r, Patch)),
        tuple(r for r in results if isinstance(r, Ranges)),
        tuple(r for r in results if isinstance(r, Misfit)),
    )


class _Finder:
    def __init__(self, tracer: Tracer, survivors: Sequence[Survivors]) -> None:
        self.tracer = tracer
        self.graph: Graph = tracer.graph
        self.survivors = survivors
        self.envs: list[Environment] = [s.trace.env for s in survivors]
        evaluator = Evaluator(self.graph.opsets)
        self.values = [_reevaluate(self.graph, s, evaluator) for s in survivors]
        self.inside = {node.index for run in tracer.runs.values() for node in run.nodes}

    def ranges(self) -> Iterator[Ranges | Misfit]:
        """Slices, Splits and Gathers along an axis that was cut."""
        for node in self.graph.nodes:
            if node.op_type not in ("Slice", "Split", "Gather") or node.index in self.inside:
                continue
            if not self.survivors[0].cut(node.inputs[0]):
                continue
            found = [list(self._taken(node, number)) for number in range(len(self.survivors))]
            for several in zip(*found, strict=True):
                first = several[0]
                same = all(
                    np.array_equal(a, b)
                    for other in several
                    for a, b in zip(first.indices, other.indices, strict=True)
                )
                labelled = self.survivors[0].trace.fields[node.inputs[0]]
                blame = np.concatenate([f.reshape(-1) for f in labelled])
                holds = all(other.holds for other in several)
                yield replace(first, holds=holds) if same else Misfit((blame,), node.label)

    def _taken(self, node: Node, number: int) -> Iterator[Ranges]:
        survivors = self.survivors[number]
        view = movement_view(node, survivors.trace.env)
        entry = self.tracer.entries[node.index]
        if view is None or entry is None or entry.move is None:
            return
        steps = entry.move(view, view.x.shape, [s or () for s in view.out_shapes]) or []
        takes = [step for output in steps for step in output if isinstance(step, moves.Take)]
        for axis in sorted({take.axis for take in takes}):
            alive = survivors.alive(node.inputs[0], axis)
            if alive is not None:
                table = _table_axis(node, axis, survivors)
                here = [take for take in takes if take.axis == axis]
                indices = tuple(moves.renumber(take.indices, alive, table) for take in here)
                holds = node.op_type == "Slice" and self._slices(node, axis, indices[0], number)
                yield Ranges(node, axis, indices, holds)

    def _slices(self, node: Node, axis: int, indices: IntArray, number: int) -> bool:
        """Whether a Slice takes certain positions along an axis after the cut, as it stands."""
        at = slice_axes(node, self.envs[number]).index(axis)
        bounds = []
        for position, name in ((1, "starts"), (2, "ends"), (4, "steps")):
            given = node.inputs[position] if position < len(node.inputs) else ""
            had = self._computed(given, number) if given else node.ints(name)
            bounds.append(1 if had is None else int(had[at]))
        if _NOT_COMPUTABLE in bounds:
            return False
        extent = (self.survivors[number].shape(node.inputs[0]) or ())[axis]
        return np.array_equal(np.arange(extent)[moves.as_slice(*bounds)], indices)

    def patches(self) -> Iterator[Patch | Misfit]:
        for node in self.graph.nodes:
            if node.index in self.inside:
                continue
            for position, name in enumerate(node.inputs):
                shape_input = not node.domain and position in _SHAPE_INPUTS.get(node.op_type, ())
                if name and shape_input and not all(name in env.values for env in self.envs):
                    yield from self._unknown_shape_input(node, name)
                elif not name or name not in self.envs[0].values:
                    continue
                elif shape_input:
                    yield from self._shape_input(node, position, name)
                elif not self._is_arithmetic(node):
                    yield from self._data_input(node, position, name)

    def _unknown_shape_input(self, node: Node, name: str) -> Iterator[Misfit]:
        """A shape nobody can follow keeps what it acts on whole."""
        first = self.survivors[0]
        touched = [node.inputs[0], *node.outputs]
        if any(first.cut(tensor) for tensor in touched):
            labelled = [f for tensor in touched for f in first.trace.fields.get(tensor, ())]
            blame = [f.reshape(-1) for f in labelled] + [self._blame(name)]
            yield Misfit((np.concatenate(blame),), node.label)

    def _blame_around(self, node: Node, name: str) -> IntArray:
        """Fields behind a shape, and those of the tensors that the shape acts on."""
        trace = self.survivors[0].trace
        labelled = [
            f for tensor in (node.inputs[0], *node.outputs) for f in trace.fields.get(tensor, ())
        ]
        return np.concatenate([*(f.reshape(-1) for f in labelled), self._blame(name)])

    def _is_arithmetic(self, node: Node) -> bool:
        known = all(not name or name in self.envs[0].values for name in node.outputs)
        return known and node.op_type != "Range"

    def _computed(self, name: str, number: int) -> AnyArray:
        found = self.values[number].get(name)
        return _left(self.survivors[number], name) if found is None else found

    def _shape_input(self, node: Node, position: int, name: str) -> Iterator[Patch | Misfit]:
        needed, old = [], []
        for number, survivors in enumerate(self.survivors):
            computed = np.asarray(self._computed(name, number))
            wanted = _needed(node, position, survivors, computed)
            if wanted is None:
                return
            needed.append(wanted)
            old.append(computed)
        if all(_holds(node, o, n, s) for o, n, s in zip(old, needed, self.survivors, strict=True)):
            return
        yield self._patch(node, position, name, old, needed)

    def _patch(
        self,
        node: Node,
        position: int,
        name: str,
        old: Sequence[AnyArray],
        needed: Sequence[AnyArray],
    ) -> Patch | Misfit:
        literal = np.zeros_like(old[0])
        mask = np.zeros(old[0].shape, np.bool_)
        free = node.op_type == "Reshape" and not (old[0] == -1).any()
        for at in range(old[0].size):
            right = all(
                _element_holds(node, at, o, n, s)
                for o, n, s in zip(old, needed, self.survivors, strict=True)
            )
            if right:
                continue
            numbers = {int(n.reshape(-1)[at]) for n in needed}
            if len(numbers) == 1:
                literal.reshape(-1)[at] = numbers.pop()
            elif free:
                literal.reshape(-1)[at] = -1
                free = False
            else:
                return Misfit((self._blame_around(node, name),), node.label)
            mask.reshape(-1)[at] = True
        return Patch(node, position, literal, mask)

    def _data_input(self, node: Node, position: int, name: str) -> Iterator[Patch | Misfit]:
        if name not in self.envs[0].dynamic:
            return
        # Too large to be followed under one choice of sizes, it may still be under another.
        known = [number for number, env in enumerate(self.envs) if name in env.values]
        old = [_left(self.survivors[number], name) for number in known]
        new = [self._computed(name, number) for number in known]
        if all(np.array_equal(o, n) for o, n in zip(old, new, strict=True)):
            return
        if len(known) == len(self.envs) and all(np.array_equal(o, old[0]) for o in old):
            yield Patch(node, position, np.asarray(old[0]), np.ones(old[0].shape, np.bool_))
        else:
            yield Misfit((self._blame_around(node, name),), node.label)

    def _blame(self, name: str) -> IntArray:
        """Fields of the tensors whose shape a number was computed from."""
        pending, seen, found = [name], set(), [np.zeros(1, np.int64)]
        while pending:
            node = self.graph.producer.get(pending.pop())
            if node is None or node.index in seen:
                continue
            seen.add(node.index)
            if node.op_type in ("Shape", "Size"):
                labelled = self.survivors[0].trace.fields.get(node.inputs[0], ())
                found += [f.reshape(-1) for f in labelled]
            else:
                pending += [n for n in node.inputs if n]
        return np.concatenate(found)


def _table_axis(node: Node, axis: int, survivors: Survivors) -> int | None:
    """Which axis of a Gather's table of indices shrinks, where the result is a grid."""
    if node.op_type != "Gather":
        return None
    cuts = [dead.cut for dead in survivors.masks(node.outputs[0]) if dead.cut is not None]
    return cuts[0] - axis if len(cuts) == 1 and cuts[0] >= axis else None


def _reevaluate(graph: Graph, survivors: Survivors, evaluator: Evaluator) -> Mapping[str, AnyArray]:
    """Shape arithmetic with the shapes after the cut."""
    env = survivors.trace.env
    values: dict[str, AnyArray] = {}
    for node in graph.nodes:
        outputs = [name for name in node.outputs if name]
        if not outputs or outputs[0] not in env.dynamic or node.op_type in _PINNED:
            continue
        if node.op_type in ("Shape", "Size"):
            if not survivors.cut(node.inputs[0]):
                continue
            shape = survivors.shape(node.inputs[0]) or ()
            if node.op_type == "Size":
                values[outputs[0]] = np.asarray(int(np.prod(shape)), np.int64)
            else:
                window = shape[node.int("start", 0) : node.int("end", len(shape))]
                values[outputs[0]] = np.asarray(window, np.int64)
            continue
        if not any(name in values for name in node.inputs):
            continue
        feeds = [
            values[n] if n in values else _left(survivors, n) if n in env.values else None
            for n in node.inputs
        ]
        results = evaluator.run(node, feeds)
        if results is None:
            # Not computable with the new shapes: no number can be right, so every use is patched.
            results = [np.full_like(env.values[name], _NOT_COMPUTABLE) for name in outputs]
        values.update(zip(outputs, results, strict=False))
    return values


def _left(survivors: Survivors, name: str) -> AnyArray:
    """A known value without the elements that go: angles of positions are numbers and labelled."""
    value = survivors.trace.env.values[name]
    return fields.compact(value, *survivors.masks(name)) if survivors.cut(name) else value


def slice_axes(node: Node, env: Environment) -> list[int]:
    """Axes that a Slice names, counted from the front."""
    starts, axes = node.ints("starts"), node.ints("axes")
    if len(node.inputs) > 3 and node.inputs[3]:
        axes = tuple(env.values[node.inputs[3]].tolist())
    elif axes is None:
        count = env.values[node.inputs[1]].size if starts is None else len(starts)
        axes = tuple(range(count))
    rank = len(env.shape(node.inputs[0]) or ())
    return [axis % rank for axis in axes or ()]


def _needed(node: Node, position: int, survivors: Survivors, computed: AnyArray) -> AnyArray | None:
    """Right values of a shape input after the cut, None where another repair writes it."""
    env = survivors.trace.env
    original = env.values[node.inputs[position]]
    match node.op_type:
        case "Reshape" | "Expand" | "ConstantOfShape":
            after = survivors.shape(node.outputs[0])
            if after is None or original.size != len(after):
                return _expand_needed(original, after) if node.op_type == "Expand" else None
            wanted = np.asarray(after, np.int64)
            return np.where(original == 1, 1, wanted) if node.op_type == "Expand" else wanted
        case "Resize" if position == 3:
            after = survivors.shape(node.outputs[0])
            axes = node.ints("axes")
            if after is None:
                return None
            return np.asarray(after if axes is None else [after[a] for a in axes], np.int64)
        case "Slice" if position != 3 and all(n in env.values for n in node.inputs[1:] if n):
            # Along an axis that was cut Ranges says it.
            alive = [survivors.alive(node.inputs[0], axis) for axis in slice_axes(node, env)]
            cut = [positions is not None for positions in alive]
            return np.where(cut, computed, original)
        case "Split":
            axis = node.int("axis", 0) % len(env.shape(node.inputs[0]) or (1,))
            return None if survivors.alive(node.inputs[0], axis) is not None else original
    return original


def _expand_needed(original: AnyArray, after: Shape | None) -> AnyArray | None:
    """Expand's target may have fewer dimensions than its result."""
    if after is None or original.size > len(after):
        return None
    return np.where(original == 1, 1, np.asarray(after[len(after) - original.size :], np.int64))


def _holds(node: Node, value: AnyArray, needed: AnyArray, survivors: Survivors) -> bool:
    return value.size == needed.size and all(
        _element_holds(node, at, value, needed, survivors) for at in range(value.size)
    )


def _element_holds(
    node: Node, at: int, value: AnyArray, needed: AnyArray, survivors: Survivors
) -> bool:
    number, wanted = value.reshape(-1)[at], needed.reshape(-1)[at]
    if node.op_type == "Reshape":
        if number == -1:
            return True
        if number == 0 and not node.int("allowzero", 0):
            source = survivors.shape(node.inputs[0]) or ()
            return at < len(source) and source[at] == wanted
    return bool(number == wanted)
