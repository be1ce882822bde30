"""A constant as a layer reads it, through nodes that only present it, and the way back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from onnxprune.graph import Graph, Node
from onnxprune.shapes import Evaluator
from onnxprune.types import AnyArray, Float64Array, Shape

_AS_IT_IS = ("Identity", "Cast")  # they change no value
_RESHAPING = ("Flatten", "Reshape", "Squeeze", "Unsqueeze")
_KNOWN = {*_AS_IT_IS, *_RESHAPING, "Transpose", "DequantizeLinear"}


@dataclass(frozen=True)
class Shown:
    """A constant and the nodes that present it to a layer, in their order."""

    graph: Graph
    leaf: str
    nodes: tuple[Node, ...]

    def forth(self, stored: AnyArray) -> AnyArray:
        """What the layer reads where the constant has these values."""
        return self._passed(stored)[-1]

    def back(self, seen: Float64Array) -> AnyArray:
        """Values of the constant with which the layer reads this, or the nearest there are."""
        constant = self.graph.constants[self.leaf].weight
        passed = self._passed(constant.read()) if self.nodes else []
        array: AnyArray = seen
        for node, before in reversed(list(zip(self.nodes, passed, strict=False))):
            if node.op_type == "Transpose":
                array = array.transpose(np.argsort(_order(node, array.ndim)))
            elif node.op_type == "DequantizeLinear":
                scale, zero = self._steps(node, array.ndim)
                array = np.rint(array / np.where(scale == 0, 1.0, scale)) + zero
            elif node.op_type in _RESHAPING:
                array = array.reshape(before.shape)
        return _cast(np.ascontiguousarray(array), constant.dtype)

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

    def _passed(self, stored: AnyArray) -> list[AnyArray]:
        """The constant in front of each node, and what the last of them makes."""
        found = [stored]
        for node in self.nodes:
            array = found[-1]
            if node.op_type == "Transpose":
                array = array.transpose(_order(node, array.ndim))
            elif node.op_type == "DequantizeLinear":
                scale, zero = self._steps(node, array.ndim)
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

    def _steps(self, node: Node, rank: int) -> Sequence[Float64Array]:
        """Scale and zero point of DequantizeLinear, to be spread over an array of some rank."""
        parts = [self.graph.constants[name].weight.read() for name in node.inputs[1:] if name]
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
