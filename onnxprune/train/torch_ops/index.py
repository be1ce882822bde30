"""Operators that look elements up by their places, or find places."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from onnxprune.train.torch_ops.lazy import Tensor, functional, torch
from onnxprune.train.torch_ops.registry import Op, op

_SCATTER = {"add": "sum", "mul": "prod", "min": "amin", "max": "amax"}


def _from_start(places: Tensor, size: int) -> Tensor:
    """Places counted from the start, int64."""
    places = places.long()
    return torch.where(places < 0, places + size, places)


@op("Gather")
def gather(node: Op, x: Tensor, places: Tensor) -> Tensor:
    """Whole slices along ``axis``."""
    axis = node.axis(x.ndim, 0)
    if places.ndim == 0:
        return x.select(axis, int(places))
    found = _from_start(places, x.shape[axis])
    if axis == 0 and x.ndim == 2:
        return functional.embedding(found, x)
    flat = x.index_select(axis, found.flatten())
    return flat.reshape([*x.shape[:axis], *places.shape, *x.shape[axis + 1 :]])


@op("GatherElements")
def gather_elements(node: Op, x: Tensor, places: Tensor) -> Tensor:
    """Element by element along ``axis``."""
    axis = node.axis(x.ndim, 0)
    return x.gather(axis, _from_start(places, x.shape[axis]))


@op("GatherND")
def gather_nd(node: Op, x: Tensor, places: Tensor) -> Tensor:
    """The last axis of ``places`` holds a place of x, behind ``batch_dims`` common axes."""
    batch, depth = node.integer("batch_dims", 0), places.shape[-1]
    common = list(x.shape[:batch])
    x = x.reshape([-1, *x.shape[batch:]])
    middle = list(places.shape[batch:-1])
    flat = places.reshape([x.shape[0], -1, depth])
    rows = torch.arange(x.shape[0], device=x.device).reshape([-1, 1])
    index = [_from_start(flat[..., axis], x.shape[axis + 1]) for axis in range(depth)]
    found = x[(rows.expand(flat.shape[:2]), *index)]
    return found.reshape([*common, *middle, *found.shape[2:]])


@op("ScatterND")
def scatter_nd(node: Op, x: Tensor, places: Tensor, updates: Tensor) -> Tensor:
    """A copy with elements or slices replaced, or added to."""
    index = tuple(_from_start(places[..., axis], x.shape[axis]) for axis in range(places.shape[-1]))
    how = node.text("reduction", "none")
    if how not in ("none", "add"):
        raise node.fail(f"reduction {how}")
    return x.index_put(index, updates, accumulate=how == "add")


@op("ScatterElements", "Scatter")
def scatter_elements(node: Op, x: Tensor, places: Tensor, updates: Tensor) -> Tensor:
    """A copy with elements replaced or reduced along ``axis``."""
    axis = node.axis(x.ndim, 0)
    places = _from_start(places, x.shape[axis])
    how = node.text("reduction", "none")
    if how == "none":
        return x.scatter(axis, places, updates)
    return x.scatter_reduce(axis, places, updates, _SCATTER[how])


@op("OneHot", host=(1,))
def one_hot(node: Op, places: Tensor, depth: Sequence[float], values: Tensor) -> Tensor:
    """Off and on value; places out of range are off everywhere."""
    size = int(depth[0])
    axis = node.integer("axis", -1)
    axis = axis + places.ndim + 1 if axis < 0 else axis
    found = _from_start(places, size).unsqueeze(axis)
    classes = torch.arange(size, device=places.device)
    on = found == classes.reshape([-1, *[1] * (places.ndim - axis)])
    return torch.where(on, values[1], values[0])


@op("NonZero")
def non_zero(_: Op, x: Tensor) -> Tensor:
    """Places by axis, shape (rank, count)."""
    return torch.nonzero(x).T


@op("Compress")
def compress(node: Op, x: Tensor, condition: Tensor) -> Tensor:
    """Slices where the condition holds."""
    places = torch.nonzero(condition).flatten()
    if "axis" not in node.attributes:
        return x.flatten().index_select(0, places)
    return x.index_select(node.axis(x.ndim), places)


@op("TopK", host=(1,))
def top_k(node: Op, x: Tensor, k: Sequence[int] | None = None) -> Any:
    """The largest or smallest, the first of equal ones first."""
    count = int(node.attributes["k"] if k is None else k[0])
    largest = bool(node.integer("largest", 1))
    axis = node.axis(x.ndim)
    places = torch.sort(x, dim=axis, descending=largest, stable=True)[1].narrow(axis, 0, count)
    return x.gather(axis, places), places


def _extreme(node: Op, x: Tensor, *, largest: bool) -> Tensor:
    axis = node.axis(x.ndim, 0)
    if node.integer("select_last_index", 0):
        flipped = x.flip(axis)
        found = flipped.argmax(axis) if largest else flipped.argmin(axis)
        places = x.shape[axis] - 1 - found
    else:
        places = x.argmax(axis) if largest else x.argmin(axis)
    return places.unsqueeze(axis) if node.integer("keepdims", 1) else places


@op("ArgMax")
def arg_max(node: Op, x: Tensor) -> Tensor:
    """Place of the largest."""
    return _extreme(node, x, largest=True)


@op("ArgMin")
def arg_min(node: Op, x: Tensor) -> Tensor:
    """Place of the smallest."""
    return _extreme(node, x, largest=False)


@op("CumSum", host=(1,))
def cum_sum(node: Op, x: Tensor, axis: Sequence[int]) -> Tensor:
    """Running sum, of what comes before with ``exclusive``, from the end with ``reverse``."""
    along = axis[0]
    reverse = bool(node.integer("reverse", 0))
    y = x.flip(along) if reverse else x
    summed = y.cumsum(along, dtype=x.dtype)
    summed = summed - y if node.integer("exclusive", 0) else summed
    return summed.flip(along) if reverse else summed


@op("ReverseSequence")
def reverse_sequence(node: Op, x: Tensor, lengths: Tensor) -> Tensor:
    """The first elements along time, backwards, as many as each sample has."""
    time = node.integer("time_axis", 0)
    batch = node.integer("batch_axis", 1)
    moved = x.movedim((batch, time), (0, 1))
    steps = torch.arange(moved.shape[1], device=x.device).expand(moved.shape[:2])
    ends = lengths.to(x.device).reshape([-1, 1])
    steps = torch.where(steps < ends, ends - 1 - steps, steps)
    rows = torch.arange(moved.shape[0], device=x.device).reshape([-1, 1])
    return moved[rows, steps].movedim((0, 1), (batch, time))
