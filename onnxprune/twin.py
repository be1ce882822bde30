"""The masked twin: the original with the slices that read dropped channels set to zero.

Dropping a channel equals zeroing what reads it, so the pruned model must equal its twin to float
tolerance, whatever the activations and however good or bad the cut (DESIGN §4).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import helper

from onnxprune.emit import ConstantEdit, Emitter
from onnxprune.graph import Constant, Node
from onnxprune.model import Model
from onnxprune.record import Mask, dead_births, flat, role
from onnxprune.select import PruningPlan
from onnxprune.slots import Birth
from onnxprune.types import AnyArray, BoolArray, Shape

# Between a weight and the node that reads it: a zero in the constant is a zero in the weight.
_ZERO_KEEPING = {"Cast", "CastLike", "Identity", "DequantizeLinear"}


def masked_twin(plan: PruningPlan) -> Model:
    """The prepared original, dropped channels zeroed at their consumers.

    Channels that only a product of two activations reads have no consumer weight: there one
    operand is multiplied by a 0/1 mask.

    Args:
        plan: From ``select``.
    """
    return _Twin(plan).emitter().build()


def softened(plan: PruningPlan) -> Model:
    """The same with nothing but other values: weights that read dropped channels are zero.

    For training that may bring them back. Where only a product reads a channel it stays as it is.

    Args:
        plan: From ``select``.
    """
    emitter = Emitter(plan.graph.graph)
    emitter.constants.update(twin_edits(plan).constants)
    return emitter.build()


def twin_emitter(plan: PruningPlan) -> Emitter:
    """The edits of ``masked_twin``, ready for more of them."""
    return _Twin(plan).emitter()


def twin_masks(plan: PruningPlan) -> tuple[Mask, ...]:
    """The 0/1 masks of the twin, for a recipe."""
    return tuple(mask for _, mask, _ in _Twin(plan).masks())


@dataclass(frozen=True, slots=True)
class TwinEdits:
    """What makes a twin of the prepared original.

    Attributes:
        constants: New values of constants of which something goes.
        readers: Those in ``constants`` that read what goes; the others change only where what goes
            is not finite.
        masks: Nodes one input of which is multiplied by a 0/1 mask.
    """

    constants: Mapping[str, ConstantEdit]
    readers: frozenset[str]
    masks: tuple[tuple[Node, Mask], ...]


def twin_edits(plan: PruningPlan) -> TwinEdits:
    """The edits of ``masked_twin``, for who applies them to a part of the model."""
    return _Twin(plan).edits()


class _Twin:
    def __init__(self, plan: PruningPlan) -> None:
        self.dependency = plan.graph
        self.graph = plan.graph.graph
        self.tracer = plan.graph.tracer
        self.dead = plan.graph.dead(plan.keep)
        self.trace = self.tracer.traces[0]

    def emitter(self) -> Emitter:
        """The edits that make the twin."""
        emitter, edits = Emitter(self.graph), self.edits()
        emitter.constants.update(edits.constants)
        for node, mask in edits.masks:
            self._insert_mask(emitter, node, mask)
        return emitter

    def edits(self) -> TwinEdits:
        """What changes, and where."""
        found = list(self.masks())
        masked = {name for _, _, leaves in found for name in leaves}
        constants: dict[str, ConstantEdit] = {}
        readers: set[str] = set()
        for name, births in dead_births(self.dependency, self.dead):
            zero = [
                (birth, mask)
                for birth, mask in births
                if role(self.dependency, birth) == "consumer" and name not in masked
            ]
            constants[name] = self._edit(name, zero, births)
            if zero:
                readers.add(name)
        masks = tuple((node, mask) for node, mask, _ in found)
        return TwinEdits(constants, frozenset(readers), masks)

    def _edit(
        self,
        name: str,
        zero: Sequence[tuple[Birth, BoolArray]],
        births: Sequence[tuple[Birth, BoolArray]],
    ) -> ConstantEdit:
        constant = self.graph.constants[name]
        shape = constant.weight.shape
        nothing = self._zero_value(name, constant)

        def compute(array: AnyArray) -> AnyArray:
            result = np.array(array)
            for birth, mask in zero:
                seen, fill = result.reshape(birth.view), nothing
                dead = np.broadcast_to(mask, birth.view)
                if np.ndim(fill):
                    fill = np.broadcast_to(fill, shape).reshape(birth.view)[dead]
                seen[dead] = fill
            if result.dtype.kind == "f" or result.dtype.name.startswith(("bfloat", "float")):
                # 0 · NaN is NaN: what is dropped with a NaN in it must not reach the twin.
                for birth, mask in births:
                    seen = result.reshape(birth.view)
                    bad = ~np.isfinite(seen.astype(np.float32)) & np.broadcast_to(mask, birth.view)
                    seen[bad] = 0
            return result

        marks = [(b.view, b.axes, np.packbits(m).tobytes()) for b, m in births]
        key = repr((marks, [b.axes for b, _ in zero])).encode()
        return ConstantEdit(shape, compute, key)

    def _zero_value(self, name: str, constant: Constant) -> AnyArray:
        """What stands for the real value 0: the zero point in a quantized tensor."""
        for node, position in self.graph.consumers.get(name, []):
            if node.op_type == "DequantizeLinear" and position == 0:
                points = self._zero_points(node)
                if points is not None:
                    if points.ndim == 1 and points.size > 1:
                        axis = node.int("axis", 1) % len(constant.weight.shape)
                        return points.reshape(
                            [-1 if a == axis else 1 for a in range(len(constant.weight.shape))]
                        )
                    return points.reshape(())
        return np.zeros((), constant.weight.dtype)

    def _zero_points(self, node: Node) -> AnyArray | None:
        """Zero points of a DequantizeLinear, None where it has none or nobody knows them."""
        name = node.inputs[2] if len(node.inputs) > 2 else ""
        constant = self.graph.constants.get(name)
        return constant.weight.read() if constant else self.trace.env.values.get(name)

    def masks(self) -> Iterator[tuple[Node, Mask, frozenset[str]]]:
        """Where the twin multiplies by 0/1, with the constants that a mask replaces.

        That is activations contracted with one another, and weights whose constant a zero would
        not survive.
        """
        for contraction in self.tracer.traces[0].contractions:
            effect = contraction.effect
            dead = self.dead.of(self.tracer.table.classes(effect.field))
            if dead.any():
                mask = np.broadcast_to(dead, _narrow(dead, effect.shape))
                yield (
                    contraction.node,
                    Mask(contraction.node.key, effect.operand, mask.shape, flat(mask)),
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
            for f in self.trace.fields.get(name, ())
            if (f > 0).any() and consuming[f[f > 0]].any()
        ]
        masks = [mask for mask in masks if mask.any()]
        if not masks:
            return None
        dead = masks[0]
        for other in masks[1:]:
            dead = dead | other
        return node, Mask(node.key, position, dead.shape, flat(dead)), frozenset(leaves)

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
                if node.op_type == "DequantizeLinear":
                    hidden = len(node.inputs) > 2 and self._zero_points(node) is None
                    plain &= node.inputs[0] in self.graph.constants and not hidden
                pending.append(node.inputs[0])
        return leaves, plain

    def _insert_mask(self, emitter: Emitter, node: Node, mask: Mask) -> None:
        name = node.inputs[mask.input]
        element = self.trace.env.data_type(name)
        dtype = helper.tensor_dtype_to_np_dtype(element)
        values = np.ones(mask.shape, np.float32)
        values.reshape(-1)[list(mask.zero)] = 0
        literal = emitter.literal(f"{node.key}_mask", values.astype(dtype))
        masked = emitter.fresh(f"{name}_masked")
        emitter.before(node, helper.make_node("Mul", [name, literal], [masked]))
        proto = emitter.node(node)
        proto.input[mask.input] = masked


def _narrow(dead: BoolArray, shape: Shape) -> Shape:
    """Shape of a mask: the tensor's extent on axes the field varies on, 1 elsewhere."""
    return tuple(size if dead.shape[axis] > 1 else 1 for axis, size in enumerate(shape))
