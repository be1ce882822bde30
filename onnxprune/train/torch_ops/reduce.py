"""Reductions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from onnxprune.train.torch_ops.lazy import Tensor, torch
from onnxprune.train.torch_ops.registry import Op, op


def _prod(x: Tensor, axes: Sequence[int], keep: bool) -> Tensor:
    for axis in sorted(axes, reverse=True):
        x = x.prod(axis, keepdim=keep)
    return x


_REDUCTIONS: dict[str, Callable[[Any, list[int], bool], Any]] = {
    "ReduceSum": lambda x, axes, keep: x.sum(axes, keepdim=keep, dtype=x.dtype),
    "ReduceMean": lambda x, axes, keep: x.mean(axes, keepdim=keep),
    "ReduceMax": lambda x, axes, keep: x.amax(axes, keepdim=keep),
    "ReduceMin": lambda x, axes, keep: x.amin(axes, keepdim=keep),
    "ReduceProd": _prod,
    "ReduceL1": lambda x, axes, keep: x.abs().sum(axes, keepdim=keep, dtype=x.dtype),
    "ReduceL2": lambda x, axes, keep: torch.linalg.vector_norm(x, 2, axes, keepdim=keep),
    "ReduceSumSquare": lambda x, axes, keep: x.square().sum(axes, keepdim=keep, dtype=x.dtype),
    "ReduceLogSum": lambda x, axes, keep: x.sum(axes, keepdim=keep).log(),
    "ReduceLogSumExp": lambda x, axes, keep: torch.logsumexp(x, axes, keepdim=keep),
}


def _register(name: str, function: Callable[[Any, list[int], bool], Any]) -> None:
    @op(name, host=(1,))
    def reduction(node: Op, x: Tensor, axes: Sequence[int] | None = None) -> Tensor:
        over = node.ints("axes", axes)
        if not over:
            if node.integer("noop_with_empty_axes", 0):
                return x
            over = list(range(x.ndim))
        keep = bool(node.integer("keepdims", 1))
        over = [axis % x.ndim for axis in over]
        # Whole numbers have no mean in torch, and booleans no extremes.
        if name == "ReduceMean" and not x.is_floating_point():
            count = torch.Size([x.shape[axis] for axis in over]).numel()
            return torch.div(x.sum(over, keepdim=keep), count, rounding_mode="trunc").to(x.dtype)
        return function(x, over, keep) if over else x


for _name, _function in _REDUCTIONS.items():
    _register(_name, _function)
