"""Activation functions."""

from __future__ import annotations

from onnxprune.train.torch_ops.lazy import Tensor, functional, torch
from onnxprune.train.torch_ops.registry import MICROSOFT, Op, op

_SELU_ALPHA = 1.67326319217681884765625
_SELU_GAMMA = 1.05070102214813232421875


@op("LeakyRelu")
def leaky_relu(node: Op, x: Tensor) -> Tensor:
    """Slope ``alpha`` below zero."""
    return functional.leaky_relu(x, node.real("alpha", 0.01))


@op("PRelu")
def prelu(_: Op, x: Tensor, slope: Tensor) -> Tensor:
    """Slope by element, broadcast to the input."""
    return torch.where(x < 0, x * slope, x)


@op("ThresholdedRelu")
def thresholded_relu(node: Op, x: Tensor) -> Tensor:
    """Zero up to ``alpha``."""
    return torch.where(x > node.real("alpha", 1.0), x, torch.zeros_like(x))


@op("Elu")
def elu(node: Op, x: Tensor) -> Tensor:
    """Gives alpha · (e^x - 1) below zero."""
    return functional.elu(x, node.real("alpha", 1.0))


@op("Celu")
def celu(node: Op, x: Tensor) -> Tensor:
    """Gives alpha · (e^(x/alpha) - 1) below zero."""
    return functional.celu(x, node.real("alpha", 1.0))


@op("Selu")
def selu(node: Op, x: Tensor) -> Tensor:
    """Scaled Elu, whose constants are attributes."""
    return functional.elu(x, node.real("alpha", _SELU_ALPHA)) * node.real("gamma", _SELU_GAMMA)


@op("Softplus")
def softplus(_: Op, x: Tensor) -> Tensor:
    """log(1 + e^x)."""
    return functional.softplus(x, threshold=40.0)  # exact in float64 too


@op("Softsign")
def softsign(_: Op, x: Tensor) -> Tensor:
    """Gives x / (1 + |x|)."""
    return functional.softsign(x)


@op("Mish")
def mish(_: Op, x: Tensor) -> Tensor:
    """Gives x · tanh(softplus(x))."""
    return functional.mish(x)


@op("Swish")
def swish(node: Op, x: Tensor) -> Tensor:
    """Gives x · sigmoid(alpha · x)."""
    return x * torch.sigmoid(x * node.real("alpha", 1.0))


@op("QuickGelu", domain=MICROSOFT)
def quick_gelu(node: Op, x: Tensor) -> Tensor:
    """Gives x · sigmoid(alpha · x)."""
    return x * torch.sigmoid(x * node.real("alpha", 1.702))


@op("HardSigmoid")
def hard_sigmoid(node: Op, x: Tensor) -> Tensor:
    """A line, cut at 0 and 1."""
    return torch.clamp(x * node.real("alpha", 0.2) + node.real("beta", 0.5), 0.0, 1.0)


@op("HardSwish")
def hard_swish(_: Op, x: Tensor) -> Tensor:
    """Gives x · clip(x / 6 + 0.5, 0, 1)."""
    return functional.hardswish(x)


@op("Shrink")
def shrink(node: Op, x: Tensor) -> Tensor:
    """Towards zero by ``bias``, and zero within ``lambd``."""
    bias, width = node.real("bias", 0.0), node.real("lambd", 0.5)
    zero = torch.zeros_like(x)
    return torch.where(x < -width, x + bias, torch.where(x > width, x - bias, zero))


@op("Gelu")
def gelu(node: Op, x: Tensor) -> Tensor:
    """Exact, or with tanh."""
    return functional.gelu(x, approximate=node.text("approximate", "none"))


@op("Gelu", domain=MICROSOFT)
def microsoft_gelu(_: Op, x: Tensor) -> Tensor:
    """Exact."""
    return functional.gelu(x)


@op("BiasGelu", domain=MICROSOFT)
def bias_gelu(_: Op, x: Tensor, bias: Tensor) -> Tensor:
    """Gelu of a sum."""
    return functional.gelu(x + bias)


@op("FastGelu", domain=MICROSOFT)
def fast_gelu(_: Op, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """With tanh, of a sum where there is a bias."""
    return functional.gelu(x if bias is None else x + bias, approximate="tanh")


@op("Softmax")
def softmax(node: Op, x: Tensor) -> Tensor:
    """Along an axis; before version 13 over all axes from there on."""
    if node.version >= 13:
        return torch.softmax(x, node.axis(x.ndim))
    return torch.softmax(x.flatten(node.axis(x.ndim, 1)), -1).reshape(x.shape)


@op("LogSoftmax")
def log_softmax(node: Op, x: Tensor) -> Tensor:
    """As Softmax."""
    if node.version >= 13:
        return torch.log_softmax(x, node.axis(x.ndim))
    return torch.log_softmax(x.flatten(node.axis(x.ndim, 1)), -1).reshape(x.shape)


@op("Hardmax")
def hardmax(node: Op, x: Tensor) -> Tensor:
    """One at the first largest element, zero elsewhere."""
    flat = x if node.version >= 13 else x.flatten(node.axis(x.ndim, 1))
    axis = node.axis(x.ndim) if node.version >= 13 else -1
    place = flat.argmax(axis, keepdim=True)
    return torch.zeros_like(flat).scatter(axis, place, 1.0).reshape(x.shape)
