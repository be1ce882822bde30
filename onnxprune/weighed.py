"""How errors of a tensor's channels count to the layers that read it, alone and together.

A layer that reads x with weights W makes of an error e the error W e: what counts is eᵀ Wᵀ W e, and
errors of channels that cancel there are none. Errors of W e in turn count as what reads them weighs
them, partly: what is far off is a guess. Sums pass on what is added to them, so a stream is weighed
by all layers that read it further on. Between a tensor and its readers an activation lets errors
through by its slope, a depthwise convolution channel by channel, a pool by their mean.
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
_NEAR = 0.5  # the same of what a layer makes, where it is looked at from in front of that layer
_MEANS = {"GlobalAveragePool", "ReduceMean"}
_STEP = 1e-2  # of the differences that slopes are taken by
_PASSED = set(
    """
    Add Sub AveragePool Cast Dropout Flatten GlobalAveragePool GlobalMaxPool Identity MaxPool Pad
    ReduceMean Reshape Resize Squeeze Upsample
    """.split()  # noqa: SIM905  (read as lines)
)


@dataclass
class Weighing:
    """What errors of tensors with their channels along axis 1 count, found from the end.

    Attributes:
        graph: Where they are read.
        shape: Shape of a tensor by its name, None where that is not known; channels that were cut
            may be counted, if everywhere.
        value: Value of a constant by its name.
        most: Channels of a tensor that are weighed together.
    """

    graph: Graph
    shape: Callable[[str], Shape | None]
    value: Callable[[str], AnyArray]
    most: int = 1536
    _found: dict[str, list[Float64Array]] = field(default_factory=dict, init=False, repr=False)
    _others: dict[str, int] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for name in self.graph.outputs:
            self._others[name] = 1
        for node in reversed(self.graph.nodes):
            if node.key not in self.graph.derived:
                self._node(node)

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
        found = self._metric(behind or name)
        if found is None or len(found) != channels or not np.isfinite(found).all():
            return None
        found = found if slopes is None else found * slopes
        size = float(np.diagonal(found).mean())
        return self._blended(found / size, _SINGLE) if size > 0 else None

    @staticmethod
    def _blended(metric: Float64Array, share: float) -> Float64Array:
        """With a share of the weight that each channel has alone."""
        alone = float(np.diagonal(metric).mean()) * np.eye(len(metric))
        return np.asarray((1 - share) * metric + share * alone, np.float64)

    def _metric(self, name: str) -> Float64Array | None:
        """What is known of a tensor, in units of the outputs; None for each channel alone."""
        known = self._found.get(name)
        if not known:
            return None
        total = np.sum(known, axis=0)
        alone = float(np.diagonal(total).mean()) * np.eye(len(total))
        return np.asarray(total + self._others.get(name, 0) * alone, np.float64)

    def _node(self, node: Node) -> None:
        """Add to what a node reads what it makes of errors there."""
        made = node.outputs[0] if node.outputs else ""
        metric = self._metric(made)
        for name in dict.fromkeys(one for one in node.inputs if one):
            if name in self.graph.derived or self.shape(name) is None:
                continue
            found: Float64Array | None = None
            passed = False
            if node.op_type in ("Conv", "Gemm") and not node.domain:
                found = self._layer(node, metric) if name == node.inputs[0] else None
            elif not node.domain and self._alike(name, made):
                found, passed = self._through(node, metric)
            if found is not None:
                self._found.setdefault(name, []).append(found)
            elif not passed or made in self._others:
                self._others[name] = self._others.get(name, 0) + 1

    def _layer(self, node: Node, metric: Float64Array | None) -> Float64Array | None:
        """Wᵀ M W of a layer, M partly of each output alone: what is further on is a guess."""
        taps = self._taps(node)
        if taps is None or taps.shape[1] > self.most:
            return None
        outputs, channels, _ = taps.shape
        if node.op_type == "Conv" and node.int("group", 1) > 1:
            each = np.einsum("oit,pit->op", taps, taps)
            alone = np.eye(outputs) if metric is None else metric
            return np.asarray(each * alone, np.float64)
        flat = taps.swapaxes(1, 2)  # (outputs, taps, channels)
        if metric is None or len(metric) != outputs:
            seen = flat
        else:
            root = np.linalg.cholesky(self._blended(metric, _NEAR))
            seen = np.tensordot(root, flat, axes=(0, 0))
        rows = seen.reshape(-1, channels)
        return np.asarray(rows.T @ rows, np.float64)

    def _through(self, node: Node, metric: Float64Array | None) -> tuple[Float64Array | None, bool]:
        """What goes through a node channel by channel, and whether they stay apart at all."""
        if node.op_type == "BatchNormalization":
            scale = self._scale(node)
            if metric is None or scale.size != len(metric):
                return (np.diag(np.square(scale)) if scale.size else None), False
            return metric * np.outer(scale, scale), True
        if node.op_type in _PASSED:
            metric = self._gathered(node, metric)
            if metric is not None and node.op_type in _MEANS:
                metric = metric / max(1, int(np.prod((self.shape(node.inputs[0]) or ())[2:])))
            return metric, True
        if node.op_type in POINTWISE:
            if metric is not None:
                metric = metric * (1 - _APART + _APART * np.eye(len(metric)))
            return metric, True
        return None, False

    def _gathered(self, node: Node, metric: Float64Array | None) -> Float64Array | None:
        """The metric of channels, where positions of each are laid out behind one another."""
        before, after = self.shape(node.inputs[0]) or (), self.shape(node.outputs[0]) or ()
        apart = after[1] // max(1, before[1])
        if metric is None or apart == 1:
            return metric
        channels = len(metric) // apart
        whole = metric.reshape(channels, apart, channels, apart)
        return np.asarray(np.einsum("irjr->ij", whole), np.float64)

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

    def _taps(self, node: Node) -> Float64Array | None:
        """Weights by output, channel and the rest, one channel where each goes its own way."""
        weight, read = self._constant(node.inputs[1]), self.shape(node.inputs[0])
        if weight is None or read is None:
            return None
        taps = np.asarray(weight, np.float64)
        if node.op_type == "Gemm":
            taps = taps if node.int("transB", 0) else taps.T
            known = not node.int("transA", 0)
            return taps.reshape(*taps.shape, 1) if known else None
        group = node.int("group", 1)
        known = group == 1 or (taps.shape[1] == 1 and group == len(taps))
        return taps.reshape(*taps.shape[:2], -1) if known else None

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
