"""What a bounding function sees of its node, and where it is registered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from onnxprune.graph import Graph, Node
from onnxprune.intervals import Interval, exactly, unknown
from onnxprune.shapes import Environment, Evaluator
from onnxprune.types import AnyArray, FloatArray, Shape

_MOST_VALUES = 1 << 22  # elements of a constant that is followed element by element


class Values:
    """Exact values of constants, and of what is computed from constants alone."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._evaluator = Evaluator(graph.opsets)

    def read(self, name: str) -> AnyArray | None:
        """The values, read or computed anew by each call; None where they cannot be computed."""
        constant = self.graph.constants.get(name)
        if constant is not None:
            return constant.weight.read()
        if name not in self.graph.derived:
            return None
        node = self.graph.producer[name]
        inputs = [self.read(given) if given else None for given in node.inputs]
        if any(given and value is None for given, value in zip(node.inputs, inputs, strict=True)):
            return None
        found = self._evaluator.run(node, inputs)
        return None if found is None else found[node.outputs.index(name)]


@dataclass
class Bounds:
    """Bounds of every tensor.

    Attributes:
        env: The shapes they were found at.
        values: Exact values of constants.
        by_name: The interval of each tensor of which something is known.
        wild: Tensors with a NaN or an infinity behind them, which a 0 does not undo.
    """

    env: Environment
    values: Values
    by_name: dict[str, Interval] = field(default_factory=dict)
    wild: set[str] = field(default_factory=set)

    def of(self, name: str) -> Interval | None:
        """Bounds of a tensor; None where not even its rank is known."""
        found = self.by_name.get(name)
        shape = self.env.shape(name)
        if found is not None or shape is None:
            return found
        if name in self.values.graph.derived and int(np.prod(shape)) <= _MOST_VALUES:
            array = self.values.read(name)
            if array is not None and array.dtype.kind not in "OSUc":
                return exactly(array)
        return unknown(len(shape))

    def along(self, name: str, axis: int) -> Interval | None:
        """Ends for each index of one axis, shape (extent,), whatever lies on the others."""
        found, shape = self.of(name), self.env.shape(name)
        if found is None or shape is None:
            return None
        flat = found.hull([a for a in range(found.rank) if a != axis])
        return flat.moved(lambda ends: np.broadcast_to(ends.reshape(-1), (shape[axis],)))


@dataclass(frozen=True, slots=True)
class View:
    """One node, with the bounds of its inputs."""

    node: Node
    bounds: Bounds

    def get(self, position: int) -> Interval | None:
        """Bounds of an input; None where it is not given or has no known rank."""
        names = self.node.inputs
        if position >= len(names) or not names[position]:
            return None
        return self.bounds.of(names[position])

    def given(self, position: int) -> bool:
        """Whether an optional input is there."""
        return position < len(self.node.inputs) and bool(self.node.inputs[position])

    def need(self, position: int) -> Interval:
        """Bounds of an input that is there."""
        found = self.get(position)
        if found is None:
            raise Unknown
        if np.isnan(found.low).any():
            raise Wild
        return found

    def shape(self, position: int) -> Shape:
        """Shape of an input."""
        found = self.bounds.env.shape(self.node.inputs[position])
        if found is None:
            raise Unknown
        return found

    def weight(self, position: int) -> FloatArray:
        """Values of an input that is constant."""
        found = self.bounds.values.read(self.node.inputs[position])
        if found is None:
            raise Unknown
        kind = found.dtype if found.dtype.kind == "f" else np.float64
        values: FloatArray = found.astype(kind, copy=False)
        if not np.isfinite(values).all():
            raise Wild
        return values

    def number(self, name: str, default: float) -> float:
        """A float attribute."""
        attribute = self.node.attributes.get(name)
        return default if attribute is None else float(attribute.f)


class Unknown(Exception):  # noqa: N818  (control flow, no error)
    """Nothing can be said of a node's outputs."""


class Wild(Unknown):
    """Not even that they are finite."""


Bounding = Callable[[View], Interval]
FUNCTIONS: dict[str, Bounding] = {}


def bounds_of(*names: str) -> Callable[[Bounding], Bounding]:
    """Register how to bound the first output of one or several operators."""

    def register(function: Bounding) -> Bounding:
        for name in names:
            FUNCTIONS[name] = function
        return function

    return register
