"""How errors of a tensor's channels count to the layers that read it, alone and together.

A layer that reads x with weights W makes of an error e the error W e: what counts of e is eᵀ Wᵀ W e,
and errors of channels that cancel there are none. Sums pass on what is added to them, so a stream
is weighed by all layers that read it further on. Between a tensor and its readers an activation
lets errors through by its slope, a depthwise convolution channel by channel, a pool by their mean.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from onnxprune.graph import Graph, Node
from onnxprune.moments import POINTWISE
from onnxprune.shown import shown_behind
from onnxprune.types import AnyArray, Float32Array, Float64Array

_APART = 0.3  # how little slopes and gates of two channels that nobody looked at have in common
_SINGLE = 0.1  # share of the weight that each channel's own error has in any case
_POOLS = {"GlobalAveragePool", "AveragePool", "MaxPool", "GlobalMaxPool"}
_SAME = {"Identity", "Dropout", "Flatten", "Squeeze", "Reshape", "Cast", "Pad"}
_STEP = 1e-2  # of the differences that slopes are taken by


@dataclass
class Weighing:
    """A walk from a tensor to all that reads its channels.

    Attributes:
        graph: Where it is read.
        value: Value of a constant by its name.
    """

    graph: Graph
    value: Callable[[str], AnyArray]
    _total: Float64Array = field(init=False, repr=False)
    _others: int = field(default=0, init=False)

    def of(
        self, name: str, channels: int, slopes: Float64Array | None = None, start: str = ""
    ) -> Float64Array | None:
        """How errors count: M of eᵀ M e, shape (channels, channels), positive definite, mean 1.

        Args:
            name: Tensor with its channels along axis 1.
            channels: How many.
            slopes: Mean product of the slopes of two channels in an activation behind the tensor.
            start: What that activation makes.

        Returns:
            None where no layer is known to read it.
        """
        self._total, self._others = np.zeros((channels, channels)), 0
        first = np.ones((channels, channels)) if slopes is None else slopes
        carried: dict[str, Float64Array] = {start or name: first}
        for node in self.graph.nodes:
            read = [one for one in node.inputs if one in carried]
            if read and node.key not in self.graph.derived:
                self._node(node, read, carried)
        self._others += sum(one in carried for one in self.graph.outputs)
        size = float(np.diagonal(self._total).mean())
        if not size > 0 or not np.isfinite(self._total).all():
            return None
        alone = np.eye(channels)
        found = self._total / size + self._others * alone
        found *= (1 - _SINGLE) / float(np.diagonal(found).mean())
        return np.asarray(found + _SINGLE * alone, np.float64)

    def _node(self, node: Node, read: list[str], carried: dict[str, Float64Array]) -> None:
        """Weigh what a node reads, or carry it on to what it makes."""
        kernel = np.asarray(sum(carried[name] for name in dict.fromkeys(read)), np.float64)
        on: Float64Array | None = None
        match node.op_type:
            case _ if node.domain:
                pass
            case "Conv" | "Gemm":
                met = self._layer(node, len(kernel)) if node.inputs[0] in carried else None
                if met is not None and met[1]:
                    self._total += kernel * met[0]
                    return
                on = None if met is None else kernel * met[0]
            case "BatchNormalization":
                scale = self._scale(node)
                on = kernel * np.outer(scale, scale) if scale.size == len(kernel) else None
            case "Add" | "Sub" | "Concat" if node.op_type != "Concat":
                on = kernel
            case "Mul":
                on = self._loosened(kernel)
            case kind if kind in _POOLS:
                on = kernel
            case kind if kind in _SAME:
                on = kernel
            case kind if kind in POINTWISE:
                on = self._loosened(kernel)
        if on is None:
            self._others += 1
            return
        carried[node.outputs[0]] = carried.get(node.outputs[0], 0) + on

    @staticmethod
    def _loosened(kernel: Float64Array) -> Float64Array:
        return np.asarray(kernel * (1 - _APART + _APART * np.eye(len(kernel))), np.float64)

    def _constant(self, name: str) -> AnyArray | None:
        shown = shown_behind(self.graph, name) if name in self.graph.derived else None
        return None if shown is None else shown.forth(self.value(shown.leaf), self.value)

    def _layer(self, node: Node, channels: int) -> tuple[Float64Array, bool] | None:
        """How a layer sees channels, and whether it mixes them; None where that is not known."""
        weight = self._constant(node.inputs[1])
        if weight is None:
            return None
        weight = np.asarray(weight, np.float64)
        if node.op_type == "Gemm":
            if node.int("transA", 0):
                return None
            matrix = weight if node.int("transB", 0) else weight.T
            if matrix.shape[1] % channels:
                return None
            taps = matrix.reshape(len(matrix), channels, -1)
        else:
            taps = weight.reshape(*weight.shape[:2], -1) * self._behind(node)[:, None, None]
            if node.int("group", 1) == channels == len(weight):
                return np.einsum("oit,pit->op", taps, taps), False
            if weight.shape[1] != channels:
                return None
        flat = taps.transpose(0, 2, 1).reshape(-1, channels)
        return flat.T @ flat, True

    def _behind(self, node: Node) -> Float64Array:
        """Scale of each output by a norm that alone reads a convolution."""
        readers = self.graph.consumers.get(node.outputs[0], [])
        weight = self._constant(node.inputs[1])
        assert weight is not None
        if len(readers) == 1 and readers[0][0].op_type == "BatchNormalization":
            scale = self._scale(readers[0][0])
            if node.int("group", 1) == 1 and scale.size == len(weight):
                return scale
        return np.ones(len(weight))

    def _scale(self, norm: Node) -> Float64Array:
        gamma, variance = (self._constant(norm.inputs[at]) for at in (1, 4))
        if gamma is None or variance is None:
            return np.zeros(0)
        epsilon = norm.attributes["epsilon"].f if norm.has("epsilon") else 1e-5
        return np.asarray(
            gamma.astype(np.float64) / np.sqrt(variance.astype(np.float64) + epsilon), np.float64
        )


def slopes(function: Callable[[Float32Array], Float32Array], rows: Float32Array) -> Float64Array:
    """Mean product of the slopes of two channels in an activation.

    Args:
        function: Element by element.
        rows: What it reads, shape (rows, channels).
    """
    ahead, behind = (function(rows + np.float32(step)) for step in (_STEP, -_STEP))
    slope = (ahead - behind).astype(np.float64) / (2 * _STEP)
    return np.asarray(slope.T @ slope / max(1, len(slope)), np.float64)
