"""Normalisations."""

from __future__ import annotations

from typing import Any

from onnxprune.train.torch_ops.lazy import Tensor, functional, torch
from onnxprune.train.torch_ops.registry import MICROSOFT, Op, op


@op("BatchNormalization")
def batch_normalization(
    node: Op, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor
) -> Any:
    """By the batch's statistics where the running ones are listed as updated, else by those.

    running = momentum · running + (1 - momentum) · batch, with the variance over N as ONNX says
    (torch divides by N - 1). A channel with one value only has no variance: it infers.
    """
    epsilon = node.real("epsilon", 1e-5)
    count = x.numel() // x.shape[1]
    if node.integer("training_mode", 0):
        return _by_batch(node, x, scale, bias, mean, variance)
    if node.inputs[3] not in node.setting.statistics or count < 2:
        return torch.batch_norm(x, scale, bias, mean, variance, False, 0.0, epsilon, False)
    fresh = 1.0 - node.real("momentum", 0.9)
    moved = mean.clone(), variance.clone()  # the gradient keeps what torch is given
    y = torch.batch_norm(x, scale, bias, *moved, True, fresh, epsilon, False)
    with torch.no_grad():
        # torch made (1 - fresh) · before + fresh · v · N / (N - 1) of the variance
        share = (count - 1) / count
        mean.copy_(moved[0])
        variance.mul_((1.0 - share) * (1.0 - fresh)).add_(moved[1], alpha=share)
    return y


def _by_batch(
    node: Op, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor
) -> Any:
    """What ``training_mode`` computes: the new running statistics are outputs."""
    axes, momentum = [0, *range(2, x.ndim)], node.real("momentum", 0.9)
    fresh, middle = torch.var_mean(x, axes, correction=0)
    y = torch.batch_norm(x, scale, bias, None, None, True, 0.0, node.real("epsilon", 1e-5), False)
    new_mean = mean * momentum + middle * (1 - momentum)
    return y, new_mean, variance * momentum + fresh * (1 - momentum)


@op("InstanceNormalization")
def instance_normalization(node: Op, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Over the spatial axes of each sample."""
    return _grouped(x, x.shape[1], node.real("epsilon", 1e-5), scale, bias)


@op("GroupNormalization")
def group_normalization(node: Op, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Scale and bias by group before version 21, by channel from there on."""
    groups = node.integer("num_groups", 1)
    if node.version < 21:
        each = x.shape[1] // groups
        scale, bias = scale.repeat_interleave(each), bias.repeat_interleave(each)
    return _grouped(x, groups, node.real("epsilon", 1e-5), scale, bias)


def _grouped(x: Tensor, groups: int, epsilon: float, scale: Tensor, bias: Tensor) -> Tensor:
    flat = x.reshape([x.shape[0], groups, -1])  # (N, groups, values)
    variance, mean = torch.var_mean(flat, -1, correction=0, keepdim=True)
    y = ((flat - mean) * torch.rsqrt(variance + epsilon)).reshape(x.shape)
    shape = [-1, *[1] * (x.ndim - 2)]
    return y * scale.reshape(shape) + bias.reshape(shape)


@op("LayerNormalization")
def layer_normalization(node: Op, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Any:
    """Over all axes from ``axis`` on."""
    epsilon, axis = node.real("epsilon", 1e-5), node.axis(x.ndim)
    sizes = x.shape[axis:]
    if node.outputs == 1 and scale.shape == sizes and (bias is None or bias.shape == sizes):
        return functional.layer_norm(x, sizes, scale, bias, epsilon)
    variance, mean = torch.var_mean(x, list(range(axis, x.ndim)), correction=0, keepdim=True)
    inverse = torch.rsqrt(variance + epsilon)
    y = (x - mean) * inverse * scale
    return (y if bias is None else y + bias), mean, inverse


@op("RMSNormalization", "SimplifiedLayerNormalization")
def rms_normalization(node: Op, x: Tensor, scale: Tensor) -> Any:
    """By the root of the mean square, over all axes from ``axis`` on."""
    axes = list(range(node.axis(x.ndim), x.ndim))
    inverse = torch.rsqrt(x.square().mean(axes, keepdim=True) + node.real("epsilon", 1e-5))
    return x * inverse * scale, inverse


@op("SkipLayerNormalization", domain=MICROSOFT)
def skip_layer_normalization(
    node: Op,
    x: Tensor,
    skip: Tensor,
    scale: Tensor,
    beta: Tensor | None = None,
    bias: Tensor | None = None,
) -> Any:
    """LayerNormalization of a sum; the fourth output is the sum."""
    summed = x + skip if bias is None else x + skip + bias
    variance, mean = torch.var_mean(summed, -1, correction=0, keepdim=True)
    inverse = torch.rsqrt(variance + node.real("epsilon", 1e-12))
    y = (summed - mean) * inverse * scale
    return (y if beta is None else y + beta), mean, inverse, summed


@op("SkipSimplifiedLayerNormalization", domain=MICROSOFT)
def skip_rms_normalization(
    node: Op, x: Tensor, skip: Tensor, scale: Tensor, bias: Tensor | None = None
) -> Any:
    """RMSNormalization of a sum; the fourth output is the sum."""
    summed = x + skip if bias is None else x + skip + bias
    inverse = torch.rsqrt(summed.square().mean(-1, keepdim=True) + node.real("epsilon", 1e-12))
    return summed * inverse * scale, None, inverse, summed


@op("LRN")
def lrn(node: Op, x: Tensor) -> Tensor:
    """Over neighbouring channels."""
    size = node.attributes["size"]
    before = (size - 1) // 2
    shape = [x.shape[0], 1, x.shape[1], -1]
    squares = x.square().reshape(shape)
    squares = functional.pad(squares, [0, 0, before, size - 1 - before])
    mean = functional.avg_pool2d(squares, (size, 1), 1).reshape(x.shape)
    base = node.real("bias", 1.0) + node.real("alpha", 1e-4) * mean
    return x / base ** node.real("beta", 0.75)


@op("LpNormalization")
def lp_normalization(node: Op, x: Tensor) -> Tensor:
    """Along one axis; where all is zero it stays so."""
    norm = torch.linalg.vector_norm(x, node.integer("p", 2), node.axis(x.ndim), keepdim=True)
    return x / torch.where(norm == 0, torch.ones_like(norm), norm)


@op("MeanVarianceNormalization")
def mean_variance_normalization(node: Op, x: Tensor) -> Tensor:
    """Over the axes given."""
    axes = list(node.attributes.get("axes", [0, 2, 3]))
    variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    return (x - mean) / (variance.sqrt() + 1e-9)
