"""How many channels a layer multiplies, and the same layer alone with another number of them.

A layer's *extents* are its channel counts in the terms that its speed depends on: groups, inputs
and outputs of one group for a convolution; batch, rows, inner and outer width for a product.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxprune.graph import Node
from onnxprune.model import Model
from onnxprune.types import AnyArray, Shape

Extents = tuple[int, ...]

CONVOLUTIONS = ("Conv", "ConvTranspose")
PRODUCTS = ("MatMul", "Gemm")
ALIGNMENT = 4  # channels that the runtime's blocked layout wants a multiple of
_LANES = 16  # columns that the runtime's matrix product takes at once


@dataclass(frozen=True)
class Layer:
    """A layer apart from its channel counts.

    Attributes:
        op_type: Conv, ConvTranspose, MatMul or Gemm.
        extents: Channel counts it has: (groups, inputs, outputs of a group), or (batch, rows,
            inner, outer).
        space: Spatial size of the input, with the batch size before it; () for a product.
        kernel: Spatial size of the filters.
        weighted: The second factor of a product is a constant.
        attributes: All attributes but the number of groups, serialised.
    """

    op_type: str
    extents: Extents
    space: Shape = ()
    kernel: Shape = ()
    weighted: bool = True
    attributes: tuple[bytes, ...] = field(default=(), repr=False)

    @property
    def geometry(self) -> tuple[object, ...]:
        """What two layers must share to be measured as one."""
        return (self.op_type, self.space, self.kernel, self.weighted, self.attributes)

    @property
    def depthwise(self) -> bool:
        """Each channel has filters of its own."""
        return self.op_type in CONVOLUTIONS and self.extents[0] > 1 and self.extents[1] == 1

    def blocked(self, extents: Extents, block: int) -> bool:
        """Whether the runtime computes it in its blocked layout, channels in blocks of 8 or 16.

        Args:
            extents: Channel counts.
            block: Channels in a block, 1 where there is no such layout.

        Source: ONNX Runtime, core/optimizer/nchwc_transformer.cc, TransformConv.
        """
        if block == 1 or self.op_type != "Conv" or len(self.kernel) != 2:
            return False
        groups, inputs, outputs = extents
        if groups == 1:
            return inputs < block or inputs % ALIGNMENT == 0
        if inputs == outputs == 1:
            return groups % ALIGNMENT == 0
        return inputs % block == 0 and outputs % block == 0

    def rounded(self, extents: Extents, block: int) -> Extents:
        """Extents that take as long: in the blocked layout channels are padded to whole blocks."""
        if self.op_type in PRODUCTS:
            *rest, outer = extents
            return (*rest, _up(outer, _LANES))
        if not self.blocked(extents, block):
            return extents
        groups, inputs, outputs = extents
        if groups > 1:
            return (_up(groups, block), 1, 1) if inputs == outputs == 1 else extents
        # Fewer inputs than a block are read as they lie.
        return (groups, inputs if inputs < block else _up(inputs, block), _up(outputs, block))


def layer_of(node: Node, shapes: Sequence[Shape | None], *, weighted: bool) -> Layer | None:
    """The layer that a node is at given shapes of its first two inputs.

    Args:
        node: A node of the prepared graph.
        shapes: Shapes of its first two inputs.
        weighted: The second one is a constant.

    Returns:
        None for other operators, and for shapes that are not known.
    """
    x, w = (shapes[0], shapes[1]) if len(shapes) > 1 else (None, None)
    if not x or not w or min(*x, *w) < 1:
        return None
    extents = extents_of(node, x, w)
    if extents is None:
        return None
    attributes = tuple(
        attribute.SerializeToString(deterministic=True)
        for attribute in sorted(node.proto.attribute, key=lambda one: one.name)
        if attribute.name != "group"
    )
    if node.op_type in CONVOLUTIONS:
        return Layer(node.op_type, extents, (x[0], *x[2:]), w[2:], True, attributes)
    return Layer(node.op_type, extents, (), (), weighted, attributes)


def extents_of(node: Node, x: Shape, w: Shape) -> Extents | None:
    """Channel counts of a node at given shapes, None where it is no layer of a known kind."""
    match node.op_type:
        case "Conv" if len(x) == len(w) > 2:
            groups = max(1, x[1] // w[1])
            return groups, w[1], max(1, w[0] // groups)
        case "ConvTranspose" if len(x) == len(w) > 2:
            groups = max(1, min(node.int("group", 1), x[1]))
            return groups, x[1] // groups, w[1]
        case "Gemm" if len(x) == len(w) == 2:
            rows, inner = x[::-1] if node.int("transA", 0) else x
            return 1, rows, inner, w[0] if node.int("transB", 0) else w[1]
        case "MatMul" if len(x) >= 2 and len(w) >= 2:
            if len(w) == 2:
                return 1, prod(x[:-1]), x[-1], w[-1]
            return max(prod(x[:-2]), prod(w[:-2])), x[-2], x[-1], w[-1]
    return None


def _shapes(layer: Layer, extents: Extents) -> tuple[Shape, Shape]:
    """Shapes of the two factors at other extents."""
    if layer.op_type in CONVOLUTIONS:
        groups, inputs, outputs = extents
        x = (layer.space[0], groups * inputs, *layer.space[1:])
        transposed = layer.op_type == "ConvTranspose"
        w = (groups * inputs, outputs) if transposed else (groups * outputs, inputs)
        return x, (*w, *layer.kernel)
    batch, rows, inner, outer = extents
    if layer.op_type == "Gemm":
        flags = {one.name: one.i for one in _decoded(layer)}
        x, w = (rows, inner), (inner, outer)
        return (
            x[::-1] if flags.get("transA") else x,
            w[::-1] if flags.get("transB") else w,
        )
    if layer.weighted or batch == 1:
        return (batch, rows, inner), (inner, outer)
    return (batch, rows, inner), (batch, inner, outer)


def _elements(layer: Layer, extents: Extents) -> int:
    return prod(_shapes(layer, extents)[1])


def _decoded(layer: Layer) -> list[onnx.AttributeProto]:
    return [onnx.AttributeProto.FromString(raw) for raw in layer.attributes]


def alone(
    layers: Sequence[tuple[Layer, Extents]], opset: int, *, seed: int = 0
) -> tuple[Model, Mapping[str, AnyArray]]:
    """A model of independent layers, and inputs for it.

    Each input is written by a small node of its own right before its layer reads it, as in a
    network, and each output is reduced to a few numbers, so that nothing large is handed out. The
    node of layer ``i`` and what it makes are called ``layer<i>_``.

    Args:
        layers: Layers with the extents to time them at.
        opset: Version of the default operator set, at least 11.
        seed: For weights and inputs.
    """
    rng = np.random.default_rng(seed)
    nodes: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []
    feeds: dict[str, AnyArray] = {}
    ends: list[onnx.ValueInfoProto] = []

    def fed(shape: Shape) -> str:
        name = "x" + "_".join(map(str, shape))
        if name not in feeds:
            feeds[name] = rng.random(shape, np.float32) - np.float32(0.5)
        return name

    for number, (layer, extents) in enumerate(layers):
        x, w = _shapes(layer, extents)
        made, read, end = f"layer{number}_", f"read{number}_", f"end{number}_"
        convolution = layer.op_type in CONVOLUTIONS
        nodes.append(
            helper.make_node(
                "MaxPool", [fed(x)], [read], kernel_shape=[1] * (len(x) - 2), name=read
            )
            if convolution
            else helper.make_node("Abs", [fed(x)], [read], name=read)
        )
        weight = f"weight{number}_"
        if layer.weighted or len(w) == 2:
            values = rng.random(w, np.float32) - np.float32(0.5)
            constants.append(numpy_helper.from_array(values, weight))
        else:
            weight = fed(w)
        node = helper.make_node(layer.op_type, [read, weight], [made], name=made)
        node.attribute.extend(_decoded(layer))
        if convolution:
            node.attribute.append(helper.make_attribute("group", extents[0]))
        nodes.append(node)
        reduced = "GlobalAveragePool" if convolution else "ReduceMax"
        nodes.append(helper.make_node(reduced, [made], [end], name=end))
        ends.append(helper.make_tensor_value_info(end, TensorProto.FLOAT, None))
    graph = helper.make_graph(
        nodes,
        "layers",
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, array.shape)
            for name, array in feeds.items()
        ],
        ends,
        constants,
    )
    opsets = [helper.make_opsetid("", opset)]
    return Model(helper.make_model(graph, opset_imports=opsets, ir_version=8)), feeds


def _up(count: int, step: int) -> int:
    return -(-count // step) * step
