"""Operators that move, repeat or make data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from onnxprune.train.torch_ops.lazy import Tensor, functional, torch
from onnxprune.train.torch_ops.registry import Op, op, torch_type
from onnxprune.train.torch_ops.window import torch_pads


@op("Identity")
def identity(_: Op, x: Any) -> Any:
    """The input itself."""
    return x


@op("Dropout")
def dropout(
    node: Op, x: Tensor, ratio: Tensor | None = None, training: Tensor | None = None
) -> Any:
    """Idle, as in inference, unless the model itself sets ``training_mode``."""
    rate = 0.5 if ratio is None else float(ratio)
    generator = node.setting.generator
    if training is None or not bool(training) or not rate or generator is None:
        return x, torch.ones_like(x, dtype=torch.bool)
    drawn = torch.rand(x.shape, generator=generator, device=generator.device, dtype=x.dtype)
    kept = (drawn >= rate).to(x.device)
    return x * kept / (1.0 - rate), kept


@op("Shape")
def shape(node: Op, x: Tensor) -> Tensor:
    """Sizes, from ``start`` to ``end``."""
    return torch.tensor(list(x.shape)[node.integer("start", 0) : node.attributes.get("end")])


@op("Size")
def size(_: Op, x: Tensor) -> Tensor:
    """Number of elements."""
    return torch.tensor(x.numel())


@op("Reshape", host=(1,))
def reshape(node: Op, x: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """Zero copies a size, unless ``allowzero``; -1 takes what is left."""
    wanted = node.ints("shape", shape) or []
    if not node.integer("allowzero", 0):
        wanted = [x.shape[axis] if n == 0 else n for axis, n in enumerate(wanted)]
    return x.reshape(wanted)


@op("Flatten")
def flatten(node: Op, x: Tensor) -> Tensor:
    """To two axes, cut before ``axis``."""
    axis = node.axis(x.ndim, 1)
    return x.reshape([torch.Size(x.shape[:axis]).numel(), -1]) if x.numel() else x.flatten(axis)


@op("Transpose")
def transpose(node: Op, x: Tensor) -> Tensor:
    """Without ``perm``, the axes the other way round."""
    return x.permute(node.attributes.get("perm", list(range(x.ndim))[::-1]))


@op("Squeeze", host=(1,))
def squeeze(node: Op, x: Tensor, axes: Sequence[int] | None = None) -> Tensor:
    """All axes of size 1 unless some are named."""
    wanted = node.ints("axes", axes)
    return x.squeeze() if wanted is None else x.squeeze(tuple(wanted))


@op("Unsqueeze", host=(1,))
def unsqueeze(node: Op, x: Tensor, axes: Sequence[int] | None = None) -> Tensor:
    """Axes are counted in the result."""
    wanted = node.ints("axes", axes) or []
    for axis in sorted(axis % (x.ndim + len(wanted)) for axis in wanted):
        x = x.unsqueeze(axis)
    return x


@op("Concat")
def concat(node: Op, *xs: Tensor) -> Tensor:
    """Along ``axis``."""
    return torch.cat(xs, node.axis(xs[0].ndim, 1))


@op("Split", host=(1,))
def split(node: Op, x: Tensor, sizes: Sequence[int] | None = None) -> Any:
    """Into the sizes given, or evenly with a smaller last part."""
    axis = node.axis(x.ndim, 0)
    wanted = node.ints("split", sizes)
    if wanted is None:
        each = -(-x.shape[axis] // node.outputs)
        parts = [min(each, x.shape[axis] - each * n) for n in range(node.outputs)]
        wanted = [max(part, 0) for part in parts]
    return tuple(torch.split(x, wanted, axis))


@op("Slice", host=(1, 2, 3, 4))
def slice_(
    node: Op,
    x: Tensor,
    starts: Sequence[int] | None = None,
    ends: Sequence[int] | None = None,
    axes: Sequence[int] | None = None,
    steps: Sequence[int] | None = None,
) -> Tensor:
    """Like Python's slices, also backwards."""
    first, last = node.ints("starts", starts) or [], node.ints("ends", ends) or []
    over = node.ints("axes", axes) or range(len(first))
    by = node.ints("steps", steps) or [1] * len(first)
    for start, end, axis, step in zip(first, last, over, by, strict=True):
        places = range(x.shape[axis])[_clamped(start) : _clamped(end, step) : step]
        if step > 0:
            index = [slice(None)] * x.ndim
            index[axis] = slice(places.start, max(places.stop, places.start), step)
            x = x[tuple(index)]
        else:
            x = x.index_select(axis, torch.tensor(list(places), device=x.device).long())
    return x


def _clamped(number: int, step: int = 1) -> int | None:
    """An end of INT_MIN means everything when going backwards."""
    return None if step < 0 and number < -(2**31) + 2 else number


@op("Expand", host=(1,))
def expand(_: Op, x: Tensor, shape: Sequence[int]) -> Tensor:
    """Broadcast both ways."""
    return x.expand(torch.broadcast_shapes(x.shape, tuple(shape)))


@op("Tile", host=(1,))
def tile(_: Op, x: Tensor, repeats: Sequence[int]) -> Tensor:
    """Repeat along each axis."""
    return x.repeat(list(repeats))


@op("Pad", host=(1, 3))
def pad(
    node: Op,
    x: Tensor,
    pads: Sequence[int] | None = None,
    value: Tensor | None = None,
    axes: Sequence[int] | None = None,
) -> Tensor:
    """With a constant, or with the tensor's own elements; negative padding cuts."""
    numbers = node.ints("pads", pads) or []
    over = [axis % x.ndim for axis in axes] if axes is not None else list(range(x.ndim))
    begins, ends = [0] * x.ndim, [0] * x.ndim
    for place, axis in enumerate(over):
        begins[axis], ends[axis] = int(numbers[place]), int(numbers[place + len(over)])
    mode = node.text("mode", "constant")
    if mode == "constant":
        fill = node.real("value", 0.0) if value is None else value.item()
        return functional.pad(x, torch_pads(begins, ends), value=fill)
    for axis, (begin, end) in enumerate(zip(begins, ends, strict=True)):
        if begin or end:
            places = np.arange(x.shape[axis])[max(-begin, 0) : x.shape[axis] - max(-end, 0)]
            places = np.pad(places, (max(begin, 0), max(end, 0)), mode=mode)  # type: ignore[call-overload]  # reflect, edge, wrap as in numpy
            x = x.index_select(axis, torch.from_numpy(places).to(x.device))
    return x


@op("DepthToSpace")
def depth_to_space(node: Op, x: Tensor) -> Tensor:
    """Depth first (DCR) or column first (CRD)."""
    n, c, h, w = x.shape
    b = node.attributes["blocksize"]
    if node.text("mode", "DCR") == "DCR":
        y = x.reshape([n, b, b, c // (b * b), h, w]).permute(0, 3, 4, 1, 5, 2)
    else:
        y = x.reshape([n, c // (b * b), b, b, h, w]).permute(0, 1, 4, 2, 5, 3)
    return y.reshape([n, c // (b * b), h * b, w * b])


@op("SpaceToDepth")
def space_to_depth(node: Op, x: Tensor) -> Tensor:
    """The inverse of depth first."""
    n, c, h, w = x.shape
    b = node.attributes["blocksize"]
    y = x.reshape([n, c, h // b, b, w // b, b]).permute(0, 3, 5, 1, 2, 4)
    return y.reshape([n, c * b * b, h // b, w // b])


@op("ConstantOfShape", host=(0,))
def constant_of_shape(node: Op, shape: Sequence[int]) -> Tensor:
    """One value everywhere."""
    value = node.attributes.get("value")
    one = node.tensor(np.zeros(1, np.float32) if value is None else value).reshape([])
    return one.expand(list(shape)).clone()


@op("Range")
def range_(_: Op, start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    """From ``start`` to before ``limit``."""
    numbers = torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)
    return numbers.to(start.device)


@op("EyeLike")
def eye_like(node: Op, x: Tensor) -> Tensor:
    """Ones on diagonal ``k``."""
    element = node.attributes.get("dtype")
    dtype = x.dtype if element is None else torch_type(element, node.setting)
    ones = torch.ones(x.shape, dtype=dtype, device=x.device)
    k = node.integer("k", 0)
    return ones.tril(k).triu(k)


@op("Trilu")
def trilu(node: Op, x: Tensor, k: Tensor | None = None) -> Tensor:
    """The upper or lower triangle."""
    diagonal = 0 if k is None else int(k)
    return x.triu(diagonal) if node.integer("upper", 1) else x.tril(diagonal)


@op("Col2Im", host=(1, 2))
def col2im(node: Op, x: Tensor, image: Sequence[int], block: Sequence[int]) -> Tensor:
    """Columns back to an image, summed where they overlap."""
    rank = len(image)
    pads = list(node.attributes.get("pads", [0] * 2 * rank))
    if rank != 2:
        raise node.fail(f"{rank} spatial axes")
    whole = [n + b + e for n, b, e in zip(image, pads[:rank], pads[rank:], strict=True)]
    y = functional.fold(
        x,
        whole,
        tuple(block),
        dilation=tuple(node.attributes.get("dilations", [1] * rank)),
        stride=tuple(node.attributes.get("strides", [1] * rank)),
    )
    return functional.pad(y, torch_pads([-b for b in pads[:rank]], [-e for e in pads[rank:]]))
