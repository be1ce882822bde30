"""The activation behind a tensor as a function of one number, whatever nodes it is written in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from onnx import TensorProto

from onnxprune.graph import Graph, Node
from onnxprune.moments import POINTWISE
from onnxprune.shapes import Evaluator
from onnxprune.shown import shown_behind
from onnxprune.types import AnyArray, Float32Array

_POINTS = 8193  # 0 among them, where many activations bend
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16)
_AT_ONCE = 1 << 15  # numbers, so that they stay in the processor's cache
_REACH = 64.0  # beyond this activations are taken to go on straight, as they all but do
_MOST_NODES = 16  # of one activation; the longest way to write GELU takes 8


@dataclass(frozen=True)
class Activation:
    """Nodes that make one tensor from another, element by element, with numbers for the rest.

    Attributes:
        graph: Where they are.
        name: Tensor they read.
        nodes: In execution order; the first output of the last is what they make.
    """

    graph: Graph
    name: str
    nodes: tuple[Node, ...]

    @property
    def made(self) -> str:
        """Tensor that the nodes make."""
        return self.nodes[-1].outputs[0]

    def __call__(self, array: Float32Array) -> Float32Array:
        """The function, element by element, by interpolation: of float32, any shape."""
        reach = min(float(np.abs(array).max(initial=1.0)), _REACH)
        grid = np.linspace(-reach, reach, _POINTS, dtype=np.float32)
        values = self.at(grid)
        assert values is not None  # `activation_behind` has seen it on a wider grid
        step, scale = np.diff(values), np.float32((_POINTS - 1) / (2 * reach))
        flat = np.ascontiguousarray(array, np.float32).reshape(-1)
        found = np.empty_like(flat)
        for first in range(0, flat.size, _AT_ONCE):
            part = slice(first, first + _AT_ONCE)
            at = (flat[part] + np.float32(reach)) * scale
            low = np.clip(at, 0, _POINTS - 2).astype(np.intp)
            at -= low
            at *= step.take(low)
            np.add(at, values.take(low), out=found[part])
        return found.reshape(array.shape)

    def at(self, points: Float32Array) -> Float32Array | None:
        """The function at some points, shape (n,), float32; None where it is not known there."""
        evaluator = Evaluator(self.graph.opsets)
        known: dict[str, AnyArray] = {self.name: points}
        for node in self.nodes:
            values = [known.get(n, _number(self.graph, n)) if n else None for n in node.inputs]
            if node.op_type in ("Cast", "Identity"):
                found: Sequence[AnyArray | None] | None = values
            else:
                with np.errstate(all="ignore"):  # what is not finite is refused below
                    found = evaluator.run(node, values)
            if found is None or found[0] is None:
                return None
            known[node.outputs[0]] = found[0]
        made = np.asarray(known[self.made], np.float32)
        return made if made.shape == points.shape and np.isfinite(made).all() else None


def activation_behind(graph: Graph, name: str) -> Activation | None:
    """What is computed from a tensor, element by element, before anything else reads it.

    Args:
        graph: The graph.
        name: The tensor.

    Returns:
        The longest run of pointwise nodes through which alone the tensor is seen; None where there
        is none, or where it is not known to be one function of all elements.
    """
    if name in graph.captured or name in graph.outputs:
        return None
    inside = {name}
    waiting = {name: len(graph.consumers.get(name, ()))}
    nodes: list[Node] = []
    best = 0
    pending = [node for node, _ in graph.consumers.get(name, ())]
    while pending and len(nodes) < _MOST_NODES:
        node = min(pending, key=lambda one: one.index)
        pending = [one for one in pending if one is not node]
        if not _plain(graph, node, inside):
            break
        nodes.append(node)
        for read in node.inputs:
            if read in waiting:
                waiting[read] -= 1
        made = node.outputs[0]
        inside.add(made)
        readers = [reader for reader, _ in graph.consumers.get(made, ())]
        waiting[made] = len(readers)
        seen = made in graph.outputs or made in graph.captured
        if all(not left or other == made for other, left in waiting.items()):
            best = len(nodes)
        if seen:
            break
        pending += readers
    found = Activation(graph, name, tuple(nodes[:best])) if best else None
    grid = np.linspace(-_REACH, _REACH, _POINTS, dtype=np.float32)
    return found if found is not None and found.at(grid) is not None else None


def _plain(graph: Graph, node: Node, inside: set[str]) -> bool:
    """Whether a node makes a number from those inside and fixed numbers alone."""
    if node.op_type not in POINTWISE or node.domain or len(node.outputs) != 1:
        return False
    if node.op_type == "Cast" and node.int("to", 0) not in _FLOATS:
        return False  # it rounds
    return all(name in inside or _number(graph, name) is not None for name in node.inputs if name)


def _number(graph: Graph, name: str) -> AnyArray | None:
    """A constant of one number, None for any other tensor."""
    shown = shown_behind(graph, name) if name in graph.derived else None
    if shown is None or graph.constants[shown.leaf].weight.size != 1:
        return None
    value = shown.forth(graph.constants[shown.leaf].weight.read()).reshape(())
    return np.asarray(value, np.float32)
