"""Layers that multiply data with a constant weight, and their least-squares form.

Conv, ConvTranspose, Gemm and MatMul are all one product Y = X W: a row of X for each output
position, a column of W for each output channel. Calibration, ranking and refitting share it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from onnxprune.graph import Graph, Node
from onnxprune.shapes import Environment
from onnxprune.types import AnyArray, Float32Array, Float64Array, IntArray, Shape

_CONVOLUTIONS = ("Conv", "FusedConv")


@dataclass(frozen=True, slots=True)
class Layer:
    """A node that reads a constant weight as its second factor.

    Attributes:
        node: The node.
        weight: Name of the constant behind the weight.
        seen: Name of the tensor that the node itself reads as weight.
        data: Tensor it multiplies.
        kind: ``conv``, ``deconv``, ``gemm``, ``matmul``, or ``left`` for a MatMul whose first
            factor is the weight, or ``scale`` for one factor for each channel.
        axis: Axis of ``data`` that the weight sums over; counted from the end for a MatMul.
    """

    node: Node
    weight: str
    seen: str
    data: str
    kind: str
    axis: int

    @property
    def groups(self) -> int:
        """Groups of a convolution, 1 elsewhere; ``groups_of`` knows of stacks of matrices."""
        return self.node.int("group", 1) if self.kind in ("conv", "deconv") else 1

    @property
    def bias(self) -> str:
        """Tensor that is added to each output channel, "" where the node adds none."""
        inputs = self.node.inputs
        adds = self.kind in ("conv", "deconv", "gemm")
        return inputs[2] if adds and len(inputs) > 2 else ""


def layer_of(graph: Graph, tensor: str) -> Layer | None:
    """The layer whose weight a constant is, None where the constant is used in another way."""
    used = graph.uses.get(tensor)
    if used is None:
        return None
    return layer_at(graph, *used, tensor)


def layer_at(graph: Graph, node: Node, position: int, tensor: str) -> Layer | None:
    """The layer that a node is, whose input at ``position`` shows the constant ``tensor``."""
    seen = node.inputs[position]
    if node.op_type in _CONVOLUTIONS and position == 1:
        return Layer(node, tensor, seen, node.inputs[0], "conv", 1)
    if node.op_type == "ConvTranspose" and position == 1:
        if node.string("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
            return None
        return Layer(node, tensor, seen, node.inputs[0], "deconv", 1)
    if node.op_type == "Gemm" and position == 1:
        axis = 0 if node.int("transA", 0) else 1
        return Layer(node, tensor, seen, node.inputs[0], "gemm", axis)
    if node.op_type == "MatMul" and node.inputs[1 - position] not in graph.derived:
        kind, axis = ("matmul", -1) if position == 1 else ("left", -2)
        return Layer(node, tensor, seen, node.inputs[1 - position], kind, axis)
    return None


def groups_of(layer: Layer, weight: Shape) -> int:
    """Matrices in a weight: one for each group of a convolution or entry of a stack."""
    if layer.kind == "scale":
        return weight[0]
    return int(np.prod(weight[:-2])) if layer.kind in ("matmul", "left") else layer.groups


def columns(
    layer: Layer, read: AnyArray, weight: Shape, most: int, rng: np.random.Generator
) -> tuple[Float32Array, IntArray | None]:
    """X of the product Y = X W.

    Args:
        layer: The layer.
        read: What it reads, e.g. (N, C, H, W).
        weight: Shape of its weight as the node sees it.
        most: Output positions of a convolution to look at, the same for each sample.
        rng: Draws them.

    Returns:
        X, shape (groups, rows, inputs), float32, inputs ordered as in ``matrix``; and the flat
        output positions that were drawn, None for all.
    """
    x: Float32Array = np.asarray(read, np.float32)
    if layer.kind == "gemm":
        return (x.T if layer.axis == 0 else x)[None], None
    if layer.kind in ("matmul", "left"):
        return _by_matrix(layer, x, weight), None
    if layer.kind == "scale":
        flat = x.reshape(*x.shape[:2], -1)
        some = _drawn(flat.shape[2], most, rng)
        return _by_channel(flat, some), some
    kernel = weight[2:]
    strides = _list(layer.node, "strides", len(kernel))
    dilations = _list(layer.node, "dilations", len(kernel))
    before, after = padding(layer.node, x.shape[2:], kernel, strides, dilations)
    if layer.kind == "deconv":
        x = _spread(x, strides, kernel, dilations, before, after, layer.node)
        strides = (1,) * len(kernel)
    elif any((*before, *after)):
        x = np.pad(x, [(0, 0), (0, 0), *zip(before, after, strict=True)])
    reach = tuple((k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True))
    space = tuple(range(2, 2 + len(kernel)))
    windows = sliding_window_view(x, reach, axis=space)
    steps = [slice(None), slice(None), *(slice(None, None, s) for s in strides)]
    windows = windows[tuple(steps)]
    kernels = [slice(None)] * (2 + len(kernel)) + [slice(None, None, d) for d in dilations]
    windows = windows[tuple(kernels)]
    size = windows.shape[2 : 2 + len(kernel)]
    count = int(np.prod(size))
    chosen = _drawn(count, most, rng)
    at = np.unravel_index(np.arange(count) if chosen is None else chosen, size)
    whole: list[slice | IntArray] = [slice(None), slice(None)]
    taken = windows[(*whole, *at)]  # (N, C, P, *kernel)
    n, c, p = taken.shape[:3]
    group = layer.groups
    taken = taken.reshape(n, group, c // group, p, -1).transpose(1, 0, 3, 2, 4)
    return np.ascontiguousarray(taken).reshape(group, n * p, -1), chosen


def _drawn(count: int, most: int, rng: np.random.Generator) -> IntArray | None:
    """Some of the positions in their order, None for all."""
    return None if count <= most else np.sort(rng.choice(count, most, replace=False))


def _by_channel(flat: Float32Array, chosen: IntArray | None) -> Float32Array:
    """Each channel a group of one column: (channels, rows, 1), from (N, channels, positions)."""
    taken = flat if chosen is None else flat[:, :, chosen]
    return np.ascontiguousarray(taken.swapaxes(0, 1)).reshape(flat.shape[1], -1, 1)


def _by_matrix(layer: Layer, array: Float32Array, weight: Shape) -> Float32Array:
    """What a MatMul reads or makes, by matrix of its stack: (matrices, rows, last axis).

    The stack lies along the last axes but two of the data, or these are repeated for it.
    """
    x = array[:, None] if layer.kind == "left" and array.ndim == 1 else array
    x = x.swapaxes(-1, -2) if layer.kind == "left" else x
    stack = weight[:-2]
    if int(np.prod(stack)) == 1:
        return np.ascontiguousarray(x).reshape(1, -1, x.shape[-1])
    x = x[None] if x.ndim == 1 else x
    full = np.broadcast_shapes(x.shape[:-2], stack)
    x = np.broadcast_to(x, (*full, *x.shape[-2:]))
    first = len(full) - len(stack)
    own = [first + axis for axis, size in enumerate(stack) if size > 1]
    rest = [axis for axis in range(x.ndim) if axis not in own]
    sorted_out = np.ascontiguousarray(x.transpose(*own, *rest))
    return sorted_out.reshape(int(np.prod(stack)), -1, x.shape[-1])


def outputs(layer: Layer, made: AnyArray, chosen: IntArray | None, weight: Shape) -> Float32Array:
    """Y of the product: (groups, rows, outputs of a group), rows as in ``columns``."""
    y: Float32Array = np.asarray(made, np.float32)
    if layer.kind in ("matmul", "left"):
        return _by_matrix(layer, y, weight)
    if layer.kind == "gemm":
        return y[None]
    n, c = y.shape[:2]
    flat = y.reshape(n, c, -1)
    if layer.kind == "scale":
        return _by_channel(flat, chosen)
    if chosen is not None:
        flat = flat[:, :, chosen]
    group = layer.groups
    parts = flat.reshape(n, group, c // group, -1).transpose(1, 0, 3, 2)
    return np.ascontiguousarray(parts).reshape(group, -1, c // group)


def matrix(layer: Layer, stored: AnyArray) -> Float64Array:
    """W of the product: (groups, inputs, outputs of a group), from the weight as the node sees it.

    Inputs of a convolution are ordered (channel, kernel position).
    """
    weight: Float64Array = np.asarray(stored, np.float64)
    group = layer.groups
    if layer.kind == "conv":
        o = weight.shape[0]
        return weight.reshape(group, o // group, -1).transpose(0, 2, 1)
    if layer.kind == "deconv":
        i, o = weight.shape[:2]
        flipped = np.flip(weight, tuple(range(2, weight.ndim)))
        return flipped.reshape(group, i // group, o, -1).transpose(0, 1, 3, 2).reshape(
            group, -1, o
        )  # fmt: skip
    if layer.kind == "scale":
        return weight.reshape(-1, 1, 1)
    if layer.kind == "left" or (layer.kind == "gemm" and layer.node.int("transB", 0)):
        weight = weight.swapaxes(-1, -2)
    return weight.reshape(-1, *weight.shape[-2:])


def unmatrix(layer: Layer, found: Float64Array, shape: Shape) -> Float64Array:
    """The inverse of ``matrix``: a weight of ``shape`` from its product form."""
    group = layer.groups
    if layer.kind == "conv":
        return np.ascontiguousarray(found.transpose(0, 2, 1)).reshape(shape)
    if layer.kind == "deconv":
        i, o = shape[:2]
        kernel = found.reshape(group, i // group, -1, o).transpose(0, 1, 3, 2).reshape(shape)
        return np.ascontiguousarray(np.flip(kernel, tuple(range(2, len(shape)))))
    if layer.kind == "left" or (layer.kind == "gemm" and layer.node.int("transB", 0)):
        found = found.swapaxes(-1, -2)
    return np.ascontiguousarray(found).reshape(shape)


def kernel_size(layer: Layer, weight: Shape) -> int:
    """Inputs of the product for each input channel."""
    return int(np.prod(weight[2:])) if layer.kind in ("conv", "deconv") else 1


def inside(layer: Layer, weight: Shape, env: Environment) -> Float64Array:
    """Share of the output positions at which each kernel position meets data, not zero padding.

    Args:
        layer: The layer.
        weight: Shape of its weight as the node sees it.
        env: Shapes of what it reads and makes; where they are not known nothing is padding.

    Returns:
        Shape (kernel positions,), in the order of ``matrix``; (1,) where there is no kernel.
    """
    if layer.kind not in ("conv", "deconv"):
        return np.ones(1)
    kernel = weight[2:]
    size = (env.shape(layer.data) or ())[2:]
    made = (env.shape(layer.node.outputs[0]) or ())[2:]
    if len(size) != len(kernel) or len(made) != len(kernel):
        return np.ones(int(np.prod(kernel)))
    strides = _list(layer.node, "strides", len(kernel))
    dilations = _list(layer.node, "dilations", len(kernel))
    before = padding(layer.node, size, kernel, strides, dilations)[0]
    share = np.ones(())
    for axis, taps in enumerate(kernel):
        tap = np.arange(taps)[:, None] * dilations[axis] - before[axis]
        if layer.kind == "conv":
            at = tap + np.arange(made[axis]) * strides[axis]
            meets = (at >= 0) & (at < size[axis])
        else:  # each input is written to several outputs, some of them cut off
            at = tap + np.arange(size[axis]) * strides[axis]
            meets = ((at >= 0) & (at < made[axis]))[::-1]  # `matrix` turns the kernel round
        share = np.multiply.outer(share, meets.sum(axis=1) / made[axis])
    return np.asarray(share.reshape(-1), np.float64)


def padding(
    node: Node, size: Shape, kernel: Shape, strides: Sequence[int], dilations: Sequence[int]
) -> tuple[Sequence[int], Sequence[int]]:
    """Zeros before and after each spatial axis."""
    pads = node.ints("pads")
    mode = node.string("auto_pad", "NOTSET")
    if mode in ("SAME_UPPER", "SAME_LOWER") and node.op_type != "ConvTranspose":
        total = [
            max(0, (-(-n // s) - 1) * s + (k - 1) * d + 1 - n)
            for n, k, s, d in zip(size, kernel, strides, dilations, strict=True)
        ]
        small, large = [t // 2 for t in total], [t - t // 2 for t in total]
        return (small, large) if mode == "SAME_UPPER" else (large, small)
    if mode == "VALID" or pads is None:
        return (0,) * len(kernel), (0,) * len(kernel)
    return pads[: len(kernel)], pads[len(kernel) :]


def _list(node: Node, name: str, rank: int) -> tuple[int, ...]:
    return node.ints(name) or (1,) * rank


def _spread(
    x: Float32Array,
    strides: Sequence[int],
    kernel: Shape,
    dilations: Sequence[int],
    before: Sequence[int],
    after: Sequence[int],
    node: Node,
) -> Float32Array:
    """What a transposed convolution slides its flipped kernel over."""
    extra = _list(node, "output_padding", len(kernel)) if node.has("output_padding") else ()
    sizes, places = [], []
    for axis, stride in enumerate(strides):
        reach = (kernel[axis] - 1) * dilations[axis]
        low = reach - before[axis]
        high = reach - after[axis] + (extra[axis] if extra else 0)
        length = (x.shape[2 + axis] - 1) * stride + 1
        sizes.append((low, high, length))
    spread = np.zeros((*x.shape[:2], *(length for _, _, length in sizes)), np.float32)
    spread[(slice(None), slice(None), *(slice(None, None, s) for s in strides))] = x
    pads = [(max(0, low), max(0, high)) for low, high, _ in sizes]
    spread = np.pad(spread, [(0, 0), (0, 0), *pads])
    for axis, (low, high, _) in enumerate(sizes):
        start, stop = max(0, -low), spread.shape[2 + axis] - max(0, -high)
        places.append(slice(start, stop))
    return spread[(slice(None), slice(None), *places)]
