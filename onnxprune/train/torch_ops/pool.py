"""Pools."""

from __future__ import annotations

from typing import Any

from onnxprune.train.torch_ops.lazy import Tensor, functional, torch
from onnxprune.train.torch_ops.registry import Op, op
from onnxprune.train.torch_ops.window import Window, torch_pads, window


def _over(node: Op, x: Tensor) -> tuple[Window, list[int]]:
    """The window, and what has to be added at the ends where sizes are rounded up."""
    rank = x.ndim - 2
    if not 1 <= rank <= 3:
        raise node.fail(f"{rank} spatial axes")
    over = window(node, node.attributes["kernel_shape"], x.shape[2:])
    added = [0] * rank
    if node.integer("ceil_mode", 0):
        for axis, (size, stride, extent) in enumerate(
            zip(x.shape[2:], over.strides, over.extents, strict=True)
        ):
            begin, end = over.begins[axis], over.ends[axis]
            steps = -(-(size + begin + end - extent) // stride)
            if steps * stride >= size + begin:  # a window may not begin in the padding at the end
                steps -= 1
            added[axis] = max(steps * stride + extent - size - begin - end, 0)
    return over, added


@op("MaxPool")
def max_pool(node: Op, x: Tensor) -> Any:
    """Padding never wins; places are counted in the whole tensor."""
    over, added = _over(node, x)
    rank = x.ndim - 2
    function = (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)[rank - 1]
    ends = [end + more for end, more in zip(over.ends, added, strict=True)]
    fits = all(2 * pad <= k for pad, k in zip(over.begins, over.kernel, strict=True))
    even = over.begins == ends and fits
    if node.outputs == 1:
        if even:
            return function(x, over.kernel, over.strides, over.begins, over.dilations)
        low = float("-inf") if x.is_floating_point() else torch.iinfo(x.dtype).min
        padded = functional.pad(x, torch_pads(over.begins, ends), value=low)
        return function(padded, over.kernel, over.strides, 0, over.dilations)
    if not even or node.integer("storage_order", 0):
        raise node.fail("places of an unevenly padded or column-major pool")
    y, places = function(
        x, over.kernel, over.strides, over.begins, over.dilations, return_indices=True
    )
    plane = x[0, 0].numel()
    first = torch.arange(x.shape[0] * x.shape[1], device=x.device) * plane
    return y, places + first.reshape([*x.shape[:2], *[1] * rank])


@op("MaxUnpool", host=(2,))
def max_unpool(node: Op, x: Tensor, places: Tensor, shape: list[int] | None = None) -> Tensor:
    """Every value back to its place, zero elsewhere."""
    rank = x.ndim - 2
    over = window(node, node.attributes["kernel_shape"], x.shape[2:])
    sizes = [
        (size - 1) * stride - begin - end + k
        for size, stride, begin, end, k in zip(
            x.shape[2:], over.strides, over.begins, over.ends, over.kernel, strict=True
        )
    ]
    natural = [*x.shape[:2], *sizes]
    if shape is not None and list(shape) != natural:
        raise node.fail("an output larger than its pool's input")
    count = x.shape[0] * x.shape[1] * torch.Size(natural[-rank:]).numel()
    flat = torch.zeros(count, dtype=x.dtype, device=x.device)
    return flat.scatter(0, places.flatten(), x.flatten()).reshape(natural)


def _window_mean(x: Tensor, over: Window) -> Tensor:
    """Mean over each window of an input that is padded already."""
    rank = x.ndim - 2
    if set(over.dilations) == {1}:
        function = (functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d)[rank - 1]
        return function(x, over.kernel, over.strides)
    ones = torch.ones([1, 1, *over.kernel], dtype=x.dtype, device=x.device)
    function = (functional.conv1d, functional.conv2d, functional.conv3d)[rank - 1]
    flat = x.reshape([-1, 1, *x.shape[2:]])
    y = function(flat, ones / ones.numel(), None, over.strides, 0, over.dilations)
    return y.reshape([*x.shape[:2], *y.shape[2:]])


@op("AveragePool")
def average_pool(node: Op, x: Tensor) -> Tensor:
    """Mean of the inputs under the window, of the padding too where that is asked for."""
    over, added = _over(node, x)
    ends = [end + more for end, more in zip(over.ends, added, strict=True)]
    if not any(over.begins) and not any(ends):
        return _window_mean(x, over)
    y = _window_mean(functional.pad(x, torch_pads(over.begins, ends)), over)
    key = tuple(x.shape[2:])
    if key not in node.kept:
        ones = torch.ones([1, 1, *x.shape[2:]], dtype=x.dtype, device=x.device)
        counted = float(node.integer("count_include_pad", 0))
        ones = functional.pad(ones, torch_pads(over.begins, over.ends), value=counted)
        node.kept[key] = _window_mean(
            functional.pad(ones, torch_pads([0] * len(added), added)), over
        )
    return y / node.kept[key]


@op("LpPool")
def lp_pool(node: Op, x: Tensor) -> Tensor:
    """p-th root of the sum of p-th powers."""
    over, added = _over(node, x)
    p = node.integer("p", 2)
    ends = [end + more for end, more in zip(over.ends, added, strict=True)]
    powers = functional.pad(x.abs() ** p, torch_pads(over.begins, ends))
    count = torch.Size(over.kernel).numel()
    return (_window_mean(powers, over) * count) ** (1 / p)


@op("GlobalAveragePool")
def global_average_pool(_: Op, x: Tensor) -> Tensor:
    """Mean over all spatial axes."""
    return x.mean(list(range(2, x.ndim)), keepdim=True)


@op("GlobalMaxPool")
def global_max_pool(_: Op, x: Tensor) -> Tensor:
    """Largest over all spatial axes."""
    return x.amax(list(range(2, x.ndim)), keepdim=True)


@op("GlobalLpPool")
def global_lp_pool(node: Op, x: Tensor) -> Tensor:
    """Norm over all spatial axes."""
    return torch.linalg.vector_norm(x, node.integer("p", 2), list(range(2, x.ndim)), keepdim=True)
