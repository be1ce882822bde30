"""What a layer's input does to its output, and an error of the output carried back to the input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from onnxprune.affine import Affine
from onnxprune.graph import Graph
from onnxprune.layers import unmatrix
from onnxprune.model import Model
from onnxprune.runtime import Session, session
from onnxprune.sites import Site
from onnxprune.types import AnyArray, Float32Array, Float64Array

_OPSET, _IR = 13, 8  # of the models that run a convolution and its adjoint


def reachable(site: Site) -> bool:
    """Whether ``Reach`` can do with the form of a layer."""
    node = site.layer.node
    if site.layer.kind == "conv":
        return node.string("auto_pad", "NOTSET") == "NOTSET"
    return site.layer.kind == "matmul" or (site.layer.kind == "gemm" and not node.int("transA", 0))


class Reach:
    """A layer as a linear map, with the norm that is folded into it, and the adjoint of that.

    Attributes:
        axis: The channels of what it reads.
    """

    def __init__(self, site: Site, weight: Float32Array) -> None:
        """Take the weight as the node sees it."""
        self.node, self.weight = site.layer.node, weight
        self.conv = site.layer.kind == "conv"
        self.groups = site.layer.groups
        self.axis = 1 if self.conv else -1
        turned = site.layer.kind == "gemm" and bool(self.node.int("transB", 0))
        self._matrix = weight.T if turned else weight
        self._sessions: dict[tuple[int, ...], Session] = {}

    @classmethod
    def of(cls, site: Site, work: Graph, value: Callable[[str], AnyArray]) -> Reach | None:
        """A reachable layer under some values of its constants; None for a stack of matrices."""
        affine = Affine(site, work, value)
        product, shape = affine.product(), affine.seen.shape
        if product is None or (site.layer.kind != "conv" and len(shape) != 2):
            return None
        return cls(site, unmatrix(site.layer, product[0], shape).astype(np.float32))

    def forth(self, x: Float32Array) -> Float32Array:
        """What is made of ``x``, without the bias."""
        return self._run(x) if self.conv else x @ self._matrix

    def back(self, error: Float32Array, shape: tuple[int, ...]) -> Float32Array:
        """The adjoint of ``forth``: an error carried back to what is read, which has a shape."""
        return self._run(error, self._left_over(error, shape)) if self.conv else (
            error @ self._matrix.T
        )  # fmt: skip

    def square(self, channels: int) -> Float64Array:
        """How strongly each two channels are seen together, shape (channels, channels)."""
        if not self.conv:
            return (self._matrix @ self._matrix.T).astype(np.float64)
        each = channels // self.groups
        taps = self.weight.reshape(self.groups, -1, each, int(np.prod(self.weight.shape[2:])))
        found = np.zeros((channels, channels))
        for number, part in enumerate(np.einsum("goit,gojt->gij", taps, taps, optimize=True)):
            own = slice(number * each, (number + 1) * each)
            found[own, own] = part
        return found

    def _attribute(self, name: str, count: int, default: int) -> list[int]:
        return list(self.node.ints(name) or [default] * count)

    def _left_over(self, error: Float32Array, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Positions at the end of each axis that no kernel comes to."""
        kernel = self.weight.shape[2:]
        rank = len(kernel)
        strides = self._attribute("strides", rank, 1)
        dilations = self._attribute("dilations", rank, 1)
        pads = self._attribute("pads", 2 * rank, 0)
        return tuple(
            shape[2 + a] + pads[a] + pads[rank + a]
            - (error.shape[2 + a] - 1) * strides[a] - (kernel[a] - 1) * dilations[a] - 1
            for a in range(rank)
        )  # fmt: skip

    def _run(self, x: Float32Array, left_over: tuple[int, ...] | None = None) -> Float32Array:
        key = () if left_over is None else left_over
        if key not in self._sessions:
            self._sessions[key] = session(self._model(x.ndim, left_over))
        return np.asarray(self._sessions[key].run({"x": x})["y"], np.float32)

    def _model(self, rank: int, left_over: tuple[int, ...] | None) -> Model:
        names = ("strides", "dilations", "pads")
        more: dict[str, Any] = {
            name: list(self.node.ints(name) or ()) for name in names if self.node.has(name)
        }
        if left_over is not None:
            more["output_padding"] = list(left_over)
        kind = "Conv" if left_over is None else "ConvTranspose"
        made = helper.make_node(kind, ["x", "w"], ["y"], group=self.groups, **more)
        given, result = (
            helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * rank) for name in "xy"
        )
        weight = numpy_helper.from_array(np.ascontiguousarray(self.weight), "w")
        graph = helper.make_graph([made], "reach", [given], [result], [weight])
        opset = helper.make_opsetid("", _OPSET)
        return Model(helper.make_model(graph, ir_version=_IR, opset_imports=[opset]))
