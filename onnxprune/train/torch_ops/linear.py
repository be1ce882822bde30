"""Products of matrices, and tables of quantized weights."""

from __future__ import annotations

from onnxprune.train.torch_ops.lazy import Tensor, torch
from onnxprune.train.torch_ops.registry import MICROSOFT, Op, op


@op("MatMul")
def mat_mul(_: Op, a: Tensor, b: Tensor) -> Tensor:
    """As numpy's."""
    return torch.matmul(a, b)


@op("Gemm")
def gemm(node: Op, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    """Gives alpha · a · b + beta · c."""
    a = a.T if node.integer("transA", 0) else a
    b = b.T if node.integer("transB", 0) else b
    alpha, beta = node.real("alpha", 1.0), node.real("beta", 1.0)
    if c is not None and alpha == beta == 1.0:
        return torch.addmm(c, a, b)
    y = torch.matmul(a, b) * alpha
    return y if c is None else y + c * beta


@op("FusedGemm", domain=MICROSOFT)
def fused_gemm(node: Op, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    """Gemm, then Relu, Sigmoid or Tanh."""
    y, kind = gemm(node, a, b, c), node.text("activation", "")
    if kind not in ("", "Relu", "Sigmoid", "Tanh"):
        raise node.fail(f"activation {kind}")
    return getattr(torch, kind.lower())(y) if kind else y


@op("FusedMatMul", "TransposeMatMul", domain=MICROSOFT)
def fused_mat_mul(node: Op, a: Tensor, b: Tensor) -> Tensor:
    """Gives alpha · a · b, last axes swapped, or the first one moved before the last."""
    if node.integer("transBatchA", 0):
        a = a.movedim(0, -2)
    if node.integer("transBatchB", 0):
        b = b.movedim(0, -2)
    if node.integer("transA", 0) and a.ndim > 1:
        a = a.transpose(-1, -2)
    if node.integer("transB", 0) and b.ndim > 1:
        b = b.transpose(-1, -2)
    return torch.matmul(a, b) * node.real("alpha", 1.0)


@op("Einsum")
def einsum(node: Op, *xs: Tensor) -> Tensor:
    """Any contraction."""
    return torch.einsum(node.text("equation", "").replace(" ", ""), *xs)


@op("DequantizeLinear")
def dequantize_linear(node: Op, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """(x - zero) · scale, by tensor, by slice of ``axis`` or by block of it."""
    x = x.to(scale.dtype)
    zero = torch.zeros_like(scale) if zero is None else zero.to(scale)
    axis, block = node.axis(x.ndim, 1), node.integer("block_size", 0)
    if scale.numel() > 1 or scale.ndim == 1:
        if block:
            scale, zero = (
                part.repeat_interleave(block, axis).narrow(axis, 0, x.shape[axis])
                for part in (scale, zero)
            )
        elif scale.ndim == 1 and x.ndim > 1:
            shape = [-1 if place == axis else 1 for place in range(x.ndim)]
            shape = shape if scale.numel() > 1 else [1] * x.ndim
            scale, zero = scale.reshape(shape), zero.reshape(shape)
    return (x - zero) * scale
