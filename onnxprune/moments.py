"""What channels carry in the mean, from weights alone.

The output of a BatchNormalization is taken for Gaussian with the mean and spread that its own
parameters say. Activations are followed on a grid of that Gaussian, so that what is computed from
one tensor twice (x · sigmoid(x)) stays right; where tensors of different origin meet, mean and
variance go on, channels taken for independent. Nothing is said of what a LayerNormalization makes:
its shift undoes a mean that only data would show. Graph inputs are taken for standard normal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnxprune.bounds import Values
from onnxprune.graph import Graph, Node
from onnxprune.layers import Layer, inside, layer_of, matrix
from onnxprune.shapes import Environment, Evaluator
from onnxprune.types import AnyArray, Float64Array

_GRID = np.linspace(-7, 7, 1401)
_WEIGHTS = np.exp(-0.5 * _GRID**2) / np.exp(-0.5 * _GRID**2).sum()
POINTWISE = frozenset(
    """
    Relu LeakyRelu Sigmoid HardSigmoid HardSwish Tanh Erf Elu Selu Celu Softplus Softsign Mish Gelu
    Exp Abs Neg Sqrt Pow Clip Add Mul Sub Div Min Max Cast Identity Swish ThresholdedRelu PRelu
    """.split()  # noqa: SIM905  (read as lines)
)
_SAME_MEAN = {"Dropout", "Resize", "Upsample", "AveragePool"}
_TO_A_POINT = {"GlobalAveragePool", "ReduceMean"}


@dataclass(frozen=True)
class Spread:
    """A tensor whose channels are functions of one Gaussian each.

    Attributes:
        values: On the grid, shape (channels, grid); (channels, 1) for a constant.
        axis: Channel axis of the tensor.
        source: Tensor that the Gaussians belong to; functions of one source are dependent.
    """

    values: Float64Array
    axis: int
    source: str

    @property
    def mean(self) -> Float64Array:
        """Mean of each channel."""
        if self.values.shape[1] == 1:
            return self.values[:, 0]
        return np.asarray(self.values @ _WEIGHTS, np.float64)

    @property
    def variance(self) -> Float64Array:
        """Variance of each channel."""
        if self.values.shape[1] == 1:
            return np.zeros(len(self.values))
        square = np.square(self.values - self.mean[:, None]) @ _WEIGHTS
        return np.asarray(square, np.float64)


def gaussian(mean: Float64Array, variance: Float64Array, axis: int, source: str) -> Spread:
    """A tensor of Gaussian channels."""
    deviation = np.sqrt(np.maximum(variance, 0))
    return Spread(mean[:, None] + deviation[:, None] * _GRID, axis, source)


def spreads(graph: Graph, env: Environment) -> Mapping[str, Spread]:
    """What is known of each tensor's channels; tensors that nothing is known of are left out."""
    return _Walk(graph, env).run()


class _Walk:
    def __init__(self, graph: Graph, env: Environment) -> None:
        self.graph = graph
        self.env = env
        self.found: dict[str, Spread] = {}
        self.evaluator = Evaluator(graph.opsets)
        self.values = Values(graph)

    def run(self) -> Mapping[str, Spread]:
        for name in self.graph.inputs:
            shape = self.env.shape(name) or ()
            if len(shape) > 1 and self.env.data_type(name) == 1:
                ones = np.ones(shape[1])
                self.found[name] = gaussian(0 * ones, ones, 1, name)
        for node in self.graph.nodes:
            if node.domain or node.key in self.graph.derived or not node.inputs:
                continue
            with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is not kept
                spread = self._node(node)
            shape = self.env.shape(node.outputs[0]) or ()
            if spread is not None and spread.axis < len(shape):
                fits = shape[spread.axis] == len(spread.values)
                if fits and np.isfinite(spread.values).all():
                    self.found[node.outputs[0]] = spread
        return self.found

    def _node(self, node: Node) -> Spread | None:
        if node.op_type == "BatchNormalization":
            return self._norm(node)
        if node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            return self._layer(node)
        if node.op_type in POINTWISE:
            return self._pointwise(node)
        if node.op_type == "Concat":
            return self._concat(node)
        first = self.found.get(node.inputs[0])
        if first is None:
            return None
        if node.op_type in _SAME_MEAN:
            return first
        if node.op_type == "MaxPool":
            # The larger of two: neighbours are far from independent.
            return self._larger(first, node.outputs[0])
        if node.op_type in _TO_A_POINT:
            return Spread(first.mean[:, None], first.axis, node.outputs[0])
        if node.op_type in ("Flatten", "Reshape", "Squeeze", "Unsqueeze"):
            return self._reshaped(node, first)
        if node.op_type == "Transpose":
            rank = len(self.env.shape(node.inputs[0]) or ())
            order = node.ints("perm") or tuple(reversed(range(rank)))
            return Spread(first.values, order.index(first.axis), first.source)
        return None

    def _reshaped(self, node: Node, first: Spread) -> Spread | None:
        """Channels that stay an axis, or are laid out position by position along it."""
        shape = self.env.shape(node.outputs[0]) or ()
        before = self.env.shape(node.inputs[0]) or ()
        axis = first.axis
        if shape[: axis + 1] == before[: axis + 1]:
            return first
        if shape[:axis] != before[:axis] or len(shape) != axis + 1:
            return None
        positions = int(np.prod(before[axis + 1 :]))
        return Spread(np.repeat(first.values, positions, axis=0), axis, first.source)

    def _constant(self, name: str) -> Float64Array | None:
        """What is stored, or computed from it: exporters reshape a bias, or turn a weight."""
        found = self.values.read(name)
        return None if found is None else found.astype(np.float64)

    def _norm(self, node: Node) -> Spread | None:
        gamma, beta = self._constant(node.inputs[1]), self._constant(node.inputs[2])
        if gamma is None or beta is None:
            return None
        return gaussian(beta, np.square(gamma), 1, node.outputs[0])

    def _layer(self, node: Node) -> Spread | None:
        layer = layer_of(self.graph, self._leaf(node.inputs[1]))
        data = self.found.get(node.inputs[0])
        seen = self._seen(node.inputs[1])
        if layer is None or layer.node is not node or data is None or seen is None:
            return None
        rank = len(self.env.shape(layer.data) or ())
        if data.axis != layer.axis % rank:
            return None
        if seen.ndim > 2 and layer.kind == "matmul":
            return None
        center, around = through(layer, seen, data.mean, data.variance, self.env)
        alpha, beta = (number(node, name) for name in ("alpha", "beta"))  # of a Gemm
        center, around = alpha * center, alpha**2 * around
        bias = self._constant(layer.bias) if layer.bias else None
        if bias is not None:
            center = center + beta * bias.reshape(-1)
        axis = 1 if layer.kind in ("conv", "deconv") else rank - 1
        return gaussian(center, around, axis, node.outputs[0])

    def _leaf(self, name: str) -> str:
        while name not in self.graph.constants and name in self.graph.producer:
            name = self.graph.producer[name].inputs[0]
        return name

    def _seen(self, name: str) -> AnyArray | None:
        return seen_weight(self.graph, name)

    def _pointwise(self, node: Node) -> Spread | None:
        moving = [self.found[name] for name in node.inputs if name in self.found]
        known = [name for name in node.inputs if name]
        if not moving or any(
            name not in self.found and name not in self.graph.derived for name in known
        ):
            return None
        axis = moving[0].axis
        if any(other.axis != axis for other in moving):
            return None
        sources = {other.source for other in moving if other.values.shape[1] > 1}
        if len(sources) > 1:
            return self._meeting(node, moving)
        values: list[AnyArray | None] = []
        for name in node.inputs:
            if name in self.found:
                values.append(self.found[name].values)
            elif name:
                constant = self._line(name, axis, len(moving[0].values))
                if constant is None:
                    return None
                values.append(constant)
            else:
                values.append(None)
        cast = [None if v is None else v.astype(np.float32) for v in values]
        made = self._evaluated(node, cast)
        if made is None or made.ndim != 2:
            return None
        source = next(iter(sources), node.outputs[0])
        return Spread(made.astype(np.float64), axis, source)

    def _evaluated(self, node: Node, values: Sequence[AnyArray | None]) -> AnyArray | None:
        if node.op_type in ("Cast", "Identity"):
            return values[0]
        made = self.evaluator.run(node, values)
        return made[0] if made else None

    def _line(self, name: str, axis: int, channels: int) -> AnyArray | None:
        """A constant as (channels, 1) or a scalar, None where it varies along another axis."""
        value = self._constant(name)
        shape = self.env.shape(name)
        if value is None or shape is None:
            return None
        if value.size == 1:
            return value.reshape(())
        rank = max(len(shape), axis + 1)
        full = (1,) * (rank - len(shape)) + shape
        if value.size == channels and full[-1 if axis >= len(full) else axis] == channels:
            return value.reshape(channels, 1)
        return None

    def _meeting(self, node: Node, moving: Sequence[Spread]) -> Spread | None:
        """Mean and variance where tensors of different origin meet."""
        if len(moving) != 2 or len(node.inputs) != 2:
            return None
        a, b = moving
        if node.op_type in ("Add", "Sub"):
            sign = 1 if node.op_type == "Add" else -1
            mean, variance = a.mean + sign * b.mean, a.variance + b.variance
        elif node.op_type == "Mul":
            mean = a.mean * b.mean
            variance = (a.variance + a.mean**2) * (b.variance + b.mean**2) - mean**2
        else:
            return None
        return gaussian(mean, variance, a.axis, node.outputs[0])

    def _larger(self, first: Spread, name: str) -> Spread:
        if first.values.shape[1] == 1:
            return first
        order = np.argsort(first.values, axis=1)
        ranked = np.take_along_axis(first.values, order, axis=1)
        share = np.cumsum(_WEIGHTS[order], axis=1)
        weights = np.diff(np.square(share), axis=1, prepend=0)
        mean = (ranked * weights).sum(axis=1)
        variance = (np.square(ranked - mean[:, None]) * weights).sum(axis=1)
        return gaussian(mean, variance, first.axis, name)

    def _concat(self, node: Node) -> Spread | None:
        parts = [self.found.get(name) for name in node.inputs]
        known = [part for part in parts if part is not None]
        rank = len(self.env.shape(node.outputs[0]) or ())
        if len(known) < len(parts) or node.int("axis", 1) % max(rank, 1) != known[0].axis:
            return None
        mean = np.concatenate([part.mean for part in known])
        variance = np.concatenate([part.variance for part in known])
        return gaussian(mean, variance, known[0].axis, node.outputs[0])


def number(node: Node, name: str) -> float:
    """A factor that a node has as an attribute, 1 where it has none."""
    return float(node.attributes[name].f) if node.has(name) else 1.0


def through(
    layer: Layer, seen: AnyArray, mean: Float64Array, variance: Float64Array, env: Environment
) -> tuple[Float64Array, Float64Array]:
    """Mean and variance of a layer's outputs, without its bias.

    Zero padding and the rims of a transposed convolution count as what they are: the figures are
    means over all output positions at the sizes of ``env``.

    Args:
        layer: The layer.
        seen: Its weight as the node sees it.
        mean: Of each channel it reads.
        variance: Likewise; channels are taken for independent.
        env: Shapes.

    Returns:
        Two arrays of shape (outputs,), all groups in a row.
    """
    product = matrix(layer, seen)
    group, inputs, _ = product.shape
    kernel = inputs * group // mean.size
    share = np.tile(inside(layer, seen.shape, env), inputs // kernel)

    def summed(each: Float64Array, factor: Float64Array) -> Float64Array:
        spread_out = np.repeat(each.reshape(group, -1), kernel, axis=1) * share
        return np.asarray(np.einsum("gi,gio->go", spread_out, factor).reshape(-1), np.float64)

    return summed(mean, product), summed(variance, np.square(product))


def seen_weight(graph: Graph, name: str) -> AnyArray | None:
    """A float weight as a node sees it; None where more than a transposition is in between."""
    turned: tuple[int, ...] | None = None
    while name not in graph.constants:
        node = graph.producer.get(name)
        if node is None or node.op_type not in ("Identity", "Cast", "Transpose"):
            return None
        if node.op_type == "Transpose":
            if turned is not None:
                return None
            turned = node.ints("perm") or (1, 0)
        name = node.inputs[0]
    weight = graph.constants[name].weight.read()
    return weight if turned is None else weight.transpose(turned)
