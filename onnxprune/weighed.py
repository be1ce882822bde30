"""How errors of a tensor's channels count to the layers that read it, alone and together.

A layer that reads x with weights W makes of an error e the error W e: what counts is eᵀ Wᵀ W e, and
errors of channels that cancel there are none. Sums pass on what is added to them, so a stream
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
from onnxprune.types import AnyArray, Float32Array, Float64Array, Shape

_APART = 0.3  # how little slopes and gates of two channels that nobody looked at have in common
_SINGLE = 0.1  # share of the weight that each channel's own error has in any case
_STEP = 1e-2  # of the differences that slopes are taken by
_PASSED = set(
    """
    Add Sub AveragePool Cast Dropout Flatten GlobalAveragePool GlobalMaxPool Identity MaxPool Pad
    ReduceMean Reshape Resize Squeeze Upsample
    """.split()  # noqa: SIM905  (read as lines)
)


@dataclass
class Weighing:
    """A walk from a tensor to all that reads its channels, which lie along axis 1.

    Attributes:
        graph: Where it is read.
        shape: Shape of a tensor by its name, None where that is not known; channels that were cut
            may be counted, if everywhere.
        value: Value of a constant by its name.
    """

    graph: Graph
    shape: Callable[[str], Shape | None]
    value: Callable[[str], AnyArray]
    _total: Float64Array = field(init=False, repr=False)
    _others: int = field(default=0, init=False)

    def of(
        self, name: str, channels: int, slopes: Float64Array | None = None, behind: str = ""
    ) -> Float64Array | None:
        """How errors count: M of eᵀ M e, positive definite, 1 on the mean of its diagonal.

        Args:
            name: The tensor.
            channels: How many it has.
            slopes: Mean product of the slopes of two channels in an activation, if that alone
                reads the tensor.
            behind: What that activation makes.

        Returns:
            Shape (channels, channels); None where no layer is known to read it.
        """
        self._total, self._others = np.zeros((channels, channels)), 0
        first = np.ones((channels, channels)) if slopes is None else slopes
        carried: dict[str, Float64Array] = {behind or name: first}
        for node in self.graph.nodes:
            read = [one for one in dict.fromkeys(node.inputs) if one in carried]
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
        kernel = np.sum([carried[name] for name in read], axis=0)
        if node.op_type in ("Conv", "Gemm") and read == [node.inputs[0]] and not node.domain:
            taps = self._taps(node, len(kernel))
            if taps is not None and taps.shape[1] == len(kernel):
                flat = taps.swapaxes(1, 2).reshape(-1, len(kernel))
                self._total += kernel * (flat.T @ flat)
                return
            on = None if taps is None else kernel * np.einsum("oit,pit->op", taps, taps)
        else:
            on = self._passed(node, read[0], kernel)
        if on is None:
            self._others += 1
        else:
            made = node.outputs[0]
            carried[made] = carried[made] + on if made in carried else on

    def _passed(self, node: Node, read: str, kernel: Float64Array) -> Float64Array | None:
        """What goes through a node channel by channel; None where they do not stay apart."""
        if node.domain or not self._alike(read, node.outputs[0]):
            return None
        if node.op_type == "BatchNormalization":
            scale = self._scale(node)
            return kernel * np.outer(scale, scale) if scale.size == len(kernel) else None
        if node.op_type in _PASSED:
            return kernel
        if node.op_type in POINTWISE:
            return kernel * (1 - _APART + _APART * np.eye(len(kernel)))
        return None

    def _alike(self, read: str, made: str) -> bool:
        """Whether channels stay where they are, or are laid out position by position."""
        before, after = self.shape(read), self.shape(made)
        if before is None or after is None or len(before) < 2 or len(after) < 2:
            return False
        flat = len(after) == 2 and after[1] == int(np.prod(before[1:]))
        return before[1] == after[1] or flat

    def _constant(self, name: str) -> AnyArray | None:
        shown = shown_behind(self.graph, name) if name in self.graph.derived else None
        return None if shown is None else shown.forth(self.value(shown.leaf), self.value)

    def _taps(self, node: Node, channels: int) -> Float64Array | None:
        """Weights by output, channel and the rest, one channel where each goes its own way."""
        weight = self._constant(node.inputs[1])
        if weight is None:
            return None
        taps = np.asarray(weight, np.float64)
        if node.op_type == "Gemm":
            taps = taps if node.int("transB", 0) else taps.T
            known = not node.int("transA", 0) and taps.shape[1] % channels == 0
            return taps.reshape(len(taps), channels, -1) if known else None
        group = node.int("group", 1)
        if group == 1:
            taps = taps * self._behind(node, len(taps))
        known = taps.shape[1] == channels if group == 1 else group == channels == len(taps)
        return taps.reshape(*taps.shape[:2], -1) if known else None

    def _behind(self, node: Node, outputs: int) -> Float64Array:
        """Scale of each output by a norm that alone reads a convolution, shape (outputs, 1 …)."""
        scale = np.ones(outputs)
        readers = self.graph.consumers.get(node.outputs[0], [])
        if len(readers) == 1 and readers[0][0].op_type == "BatchNormalization":
            found = self._scale(readers[0][0])
            scale = found if found.size == outputs else scale
        rank = len(self.shape(node.outputs[0]) or ()) or 4
        return scale.reshape(-1, *[1] * (rank - 1))

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
