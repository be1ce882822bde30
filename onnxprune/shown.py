"""A constant as a layer reads it, through nodes that only present it, and the way back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from onnxprune.graph import Graph, Node
from onnxprune.shapes import Evaluator
from onnxprune.types import AnyArray, Float64Array, Shape

_AS_IT_IS = ("Identity", "Cast")  # they change no value
_RESHAPING = ("Flatten", "Reshape", "Squeeze", "Unsqueeze")
_STEPS = 127  # of an int8 magnitude
Value = Callable[[str], AnyArray]
_KNOWN = {*_AS_IT_IS, *_RESHAPING, "Transpose", "DequantizeLinear"}


@dataclass(frozen=True)
class Shown:
    """A constant and the nodes that present it to a layer, in their order."""

    graph: Graph
    leaf: str
    nodes: tuple[Node, ...]

    def forth(self, stored: AnyArray, value: Value | None = None) -> AnyArray:
        """What the layer reads where the constant has these values; ``value`` gives its scales."""
        return self._passed(stored, value)[-1]

    def back(self, seen: Float64Array, value: Value | None = None) -> AnyArray:
        """Values of the constant with which the layer reads this, or the nearest there are."""
        constant = self.graph.constants[self.leaf].weight
        passed = self._passed(constant.read(), value) if self.nodes else []
        array: AnyArray = seen
        for node, before in reversed(list(zip(self.nodes, passed, strict=False))):
            if node.op_type == "Transpose":
                array = array.transpose(np.argsort(_order(node, array.ndim)))
            elif node.op_type == "DequantizeLinear":
                scale, zero = self._steps(node, array.ndim, value)
                array = np.rint(array / np.where(scale == 0, 1.0, scale)) + zero
            elif node.op_type in _RESHAPING:
                array = array.reshape(before.shape)
        return _cast(np.ascontiguousarray(array), constant.dtype)

    def rescaled(self, seen: Float64Array) -> Mapping[str, AnyArray]:
        """Scales under which integers hold other weights best; {} where they have to stay.

        Weights that make up for others grow, and under the old scales they would be cut off.
        """
        if len(self.nodes) != 1 or not self.quantized or not self.alone():
            return {}
        (node,) = self.nodes
        scale = self.graph.constants[node.inputs[1]]
        zero = self.graph.constants[node.inputs[2]].weight.read() if len(node.inputs) > 2 else None
        kind = self.graph.constants[self.leaf].weight.dtype
        copies = [one for one in self.graph.constants.values() if one.origin == scale.origin]
        own = len(self.graph.consumers.get(node.inputs[1], ())) == 1 and scale.pinned is None
        if not own or len(copies) > 1 or kind != np.int8 or (zero is not None and zero.any()):
            return {}
        old = scale.weight.read()
        axis = node.int("axis", 1) % seen.ndim
        others = tuple(a for a in range(seen.ndim) if a != axis) if old.size > 1 else None
        found = np.abs(seen).max(axis=others).reshape(old.shape) / _STEPS
        return {node.inputs[1]: np.where(found > 0, found, old).astype(old.dtype)}

    def alone(self) -> bool:
        """Whether nobody else reads the constant, or what presents it."""
        names = [self.leaf, *(node.outputs[0] for node in self.nodes)]
        return all(len(self.graph.consumers.get(name, ())) == 1 for name in names)

    @property
    def changes(self) -> tuple[object, ...]:
        """What the nodes change; equal where two layers read the constant in one form."""
        changing = [node for node in self.nodes if node.op_type not in _AS_IT_IS]
        return tuple((node.op_type, node.ints("perm"), node.inputs[1:]) for node in changing)

    @property
    def quantized(self) -> bool:
        """Whether integers are stored."""
        return any(node.op_type == "DequantizeLinear" for node in self.nodes)

    def complaint(self) -> str:
        """Why the constant cannot be given other values, "" where it can."""
        constant = self.graph.constants[self.leaf]
        if constant.pinned is not None:
            return f"its weight {constant.pinned}"
        for node in self.nodes:
            if node.op_type == "DequantizeLinear":
                if not self._has_steps(node):
                    return "its weight is quantized in blocks, or by a computed scale"
            elif node.op_type not in (*_AS_IT_IS, *_RESHAPING, "Transpose"):
                return f"{node.op_type} computes its weight"
        kind = constant.weight.dtype
        whole = kind.name.startswith(("int", "uint"))
        if not (whole if self.quantized else is_float(kind)):
            return f"its weight is stored as {kind.name}"
        return ""

    def _passed(self, stored: AnyArray, value: Value | None = None) -> list[AnyArray]:
        """The constant in front of each node, and what the last of them makes."""
        found = [stored]
        for node in self.nodes:
            array = found[-1]
            if node.op_type == "Transpose":
                array = array.transpose(_order(node, array.ndim))
            elif node.op_type == "DequantizeLinear":
                scale, zero = self._steps(node, array.ndim, value)
                array = np.multiply(array.astype(np.float64) - zero, scale)
            elif node.op_type in _RESHAPING:
                array = array.reshape(self._reshaped(node, array.shape))
            found.append(array)
        return found

    def _reshaped(self, node: Node, shape: Shape) -> Shape:
        constants = self.graph.constants
        given = [constants[n].weight.read() if n in constants else None for n in node.inputs[1:]]
        made = Evaluator(self.graph.opsets).run(node, [np.empty(shape, np.float32), *given])
        return shape if made is None else made[0].shape

    def _has_steps(self, node: Node) -> bool:
        constants = self.graph.constants
        known = all(name in constants for name in node.inputs[1:] if name)
        return known and len(constants[node.inputs[1]].weight.shape) <= 1

    def _steps(self, node: Node, rank: int, value: Value | None) -> Sequence[Float64Array]:
        """Scale and zero point of DequantizeLinear, to be spread over an array of some rank."""
        read = value or (lambda name: self.graph.constants[name].weight.read())
        parts = [read(name) for name in node.inputs[1:] if name]
        along = [1] * rank
        along[node.int("axis", 1) % max(rank, 1)] = -1
        real = [part.astype(np.float64) for part in parts] + [np.zeros(())]
        return [part.reshape(along if part.size > 1 else ()) for part in real[:2]]


def shown_behind(graph: Graph, name: str) -> Shown | None:
    """How a constant becomes a tensor, None where that is not known."""
    nodes: list[Node] = []
    while name not in graph.constants:
        node = graph.producer.get(name)
        if node is None or node.key not in graph.derived:
            return None
        nodes.insert(0, node)
        name = node.inputs[0]
    found = Shown(graph, name, tuple(nodes))
    known = all(node.op_type in _KNOWN for node in nodes)
    return found if known else None


def is_float(kind: np.dtype[np.generic]) -> bool:
    """Whether numbers are stored as they are; those of 8 bits are not."""
    return kind.kind == "f" or kind.name == "bfloat16"


def _order(node: Node, rank: int) -> tuple[int, ...]:
    return node.ints("perm") or tuple(range(rank))[::-1]


def _cast(array: AnyArray, kind: np.dtype[np.generic]) -> AnyArray:
    if not is_float(kind):
        info = ml_dtypes.iinfo(kind)  # type: ignore[no-untyped-call]  # no stub
        return np.clip(array, info.min, info.max).astype(kind)
    with np.errstate(over="ignore"):
        return array.astype(kind)
