"""Convolutions."""

from __future__ import annotations

from onnxprune.train.torch_ops.lazy import Tensor, functional, torch
from onnxprune.train.torch_ops.registry import MICROSOFT, Op, op
from onnxprune.train.torch_ops.window import torch_pads, window

_ACTIVATIONS = {"Relu": "relu", "Sigmoid": "sigmoid", "Tanh": "tanh"}


@op("Conv")
def conv(node: Op, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Any number of spatial axes, up to three."""
    rank = x.ndim - 2
    if not 1 <= rank <= 3:
        raise node.fail(f"{rank} spatial axes")
    over = window(node, weight.shape[2:], x.shape[2:])
    function = (functional.conv1d, functional.conv2d, functional.conv3d)[rank - 1]
    padding = over.begins
    if not over.even:
        x, padding = functional.pad(x, torch_pads(over.begins, over.ends)), [0] * rank
    group = node.integer("group", 1)
    return function(x, weight, bias, over.strides, padding, over.dilations, group)


@op("FusedConv", domain=MICROSOFT)
def fused_conv(
    node: Op, x: Tensor, weight: Tensor, bias: Tensor | None = None, added: Tensor | None = None
) -> Tensor:
    """Conv, then a sum, then an activation."""
    y = conv(node, x, weight, bias)
    y = y if added is None else y + added
    kind, numbers = node.text("activation", ""), node.attributes.get("activation_params", [])
    if kind in _ACTIVATIONS:
        return getattr(torch, _ACTIVATIONS[kind])(y)
    if kind == "LeakyRelu":
        return functional.leaky_relu(y, numbers[0])
    if kind == "Clip":
        return torch.clamp(y, numbers[0], numbers[1])
    if kind == "HardSigmoid":
        return torch.clamp(y * numbers[0] + numbers[1], 0.0, 1.0)
    if kind:
        raise node.fail(f"activation {kind}")
    return y


@op("ConvTranspose")
def conv_transpose(node: Op, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """All of the output first, then what the padding cuts off."""
    rank = x.ndim - 2
    if not 1 <= rank <= 3:
        raise node.fail(f"{rank} spatial axes")
    over = window(node, weight.shape[2:], x.shape[2:])
    extra = list(node.attributes.get("output_padding", [0] * rank))
    sizes = zip(x.shape[2:], over.strides, over.extents, strict=True)
    full = [(size - 1) * stride + extent for size, stride, extent in sizes]
    begins, ends = _cuts(node, list(x.shape[2:]), over.strides, full, extra)
    function = (
        functional.conv_transpose1d,
        functional.conv_transpose2d,
        functional.conv_transpose3d,
    )[rank - 1]
    group = node.integer("group", 1)
    if begins == ends and min(begins) >= 0:
        return function(x, weight, bias, over.strides, begins, 0, group, over.dilations)
    y = function(x, weight, None, over.strides, 0, 0, group, over.dilations)
    y = functional.pad(y, torch_pads([-b for b in begins], [-e for e in ends]))
    return y if bias is None else y + bias.reshape([-1, *[1] * rank])


def _cuts(
    node: Op, sizes: list[int], strides: list[int], full: list[int], extra: list[int]
) -> tuple[list[int], list[int]]:
    """How much of the whole output is cut off at begin and end; negative where it is extended."""
    rank = len(sizes)
    auto = node.text("auto_pad", "NOTSET")
    wanted = node.attributes.get("output_shape")
    if wanted is None and auto.startswith("SAME"):
        wanted = [size * stride for size, stride in zip(sizes, strides, strict=True)]
    if wanted is None:
        pads = list(node.attributes.get("pads", [0] * 2 * rank))
        if auto == "VALID":
            pads = [0] * 2 * rank
        return pads[:rank], [end - more for end, more in zip(pads[rank:], extra, strict=True)]
    wanted = list(wanted)[-rank:]
    totals = [max(f + e - w, 0) for f, e, w in zip(full, extra, wanted, strict=True)]
    half = [total // 2 for total in totals]
    rest = [total - part for total, part in zip(totals, half, strict=True)]
    begins = half if auto == "SAME_UPPER" else rest
    return begins, [f - b - w for f, b, w in zip(full, begins, wanted, strict=True)]
