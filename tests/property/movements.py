"""Pieces that move data about: transposes, reshapes, slices, joins."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from tests.property.builder import Builder
from tests.property.layers import bent, layer, width
from tests.property.motifs import ANY, MAPS, motif
from tests.property.tensors import Open, T, at
from tests.property.weights import operand, weight


@motif("Transpose", on=(*MAPS, "last"))
def channels_first_or_last(b: Builder, x: T, op: str) -> T | None:
    if x.rank < 3:
        return None
    if x.c == 1 and x.rank > 2 and x.kind != "last":
        return b.transpose(x, (0, *range(2, x.rank), 1))
    return b.transpose(x, (0, x.rank - 1, *range(1, x.rank - 1)))


@motif("Reshape", on=MAPS)
def channel_shuffle(b: Builder, x: T, op: str) -> T | None:
    group = b.pick((2, 4))
    if x.channels % group:
        return None
    space = [at(a) for a in range(2, x.rank)]
    y = b.reshape(x, [at(0), group, at(1, over=group), *space], c=2)
    y = b.transpose(y, (0, 2, 1, *range(3, y.rank)))
    space = [at(a) for a in range(3, y.rank)]
    return b.reshape(y, [at(0), b.pick((x.channels, at(1, 2))), *space], c=1)


@motif("Reshape", on=("map2",))
def pixels_in_a_row(b: Builder, x: T, op: str) -> T:
    """(N, C, H, W) to (N, C, H·W), perhaps with channels last."""
    y = b.reshape(x, [at(0), at(1), at(2, 3)], c=1)
    return b.transpose(y, (0, 2, 1)) if b.one_in(2) else y


@motif("Reshape", on=ANY)
def split_and_merged(b: Builder, x: T, op: str) -> T | None:
    """Channels as a grid and back, with something done in between."""
    group = b.pick((2, 4))
    if x.channels % group or x.rank > 4:
        return None
    dims = [at(a) for a in range(x.rank)]
    y = b.reshape(x, [*dims[: x.c], group, at(x.c, over=group), *dims[x.c + 1 :]], c=x.c + 1)
    if b.one_in(2):
        y = b.op("Mul", y, operand(b, y), shape=y.shape)
    dims = [at(a) for a in range(y.rank)]
    return b.reshape(y, [*dims[: x.c], at(x.c, x.c + 1), *dims[x.c + 2 :]], c=x.c)


@motif("Flatten", on=MAPS)
def flattened(b: Builder, x: T, op: str) -> T | None:
    if any(isinstance(s, Open) for s in x.shape[1:]):
        return None
    shape = [x.shape[0], int(np.prod(x.shape[1:]))]
    attributes: dict[str, Any] = {} if b.one_in(2) else {"axis": 1}
    return b.op("Flatten", x, shape=shape, c=1, **attributes)


@motif("Squeeze", on=("map2",))
def pooled_to_vector(b: Builder, x: T, op: str) -> T:
    y = b.op("GlobalAveragePool", x, shape=[*x.shape[:2], 1, 1])
    if b.one_in(3) and not isinstance(x.shape[0], Open) and x.shape[0] > 1:
        return b.op("Squeeze", y, shape=x.shape[:2])
    return b.squeeze(y, [2, 3])


@motif("Unsqueeze", on=ANY)
@motif("Squeeze", on=ANY)
def one_more_axis(b: Builder, x: T, op: str) -> T | None:
    if x.rank > 4:
        return None
    axis = b.integer(1, x.rank)
    y = b.op("Sigmoid", b.unsqueeze(x, axis))
    return b.squeeze(y, [axis])


@motif("Expand", on=ANY, since=8)
def expanded(b: Builder, x: T, op: str) -> T | None:
    """A new axis of copies, which are then added up."""
    if x.rank > 4:
        return None
    y = b.unsqueeze(x, b.integer(1, x.rank))
    axis = next(a for a in range(1, y.rank) if y.shape[a] == 1)
    target = [3 if a == axis else 1 for a in range(y.rank)]
    full = [3 if a == axis else s for a, s in enumerate(y.shape)]
    if b.one_in(2) and not any(isinstance(s, Open) for s in full):
        target = full
    y = b.op("Expand", y, b.ints(*target), shape=full)
    return b.with_ints("ReduceSum", y, "axes", [axis], 13, shape=x.shape, c=x.c, keepdims=0)


@motif("Tile", on=ANY)
def tiled(b: Builder, x: T, op: str) -> T | None:
    """Repeated along channels or along space."""
    axis = b.integer(1, x.rank - 1)
    if x.channels > 16 or x.shape[axis] > 16:
        return None
    repeats = [2 if a == axis else 1 for a in range(x.rank)]
    shape = [s * r for s, r in zip(x.shape, repeats, strict=True)]
    return b.op("Tile", x, b.ints(*repeats), shape=shape)


@motif("DepthToSpace", on=("map2",))
def pixel_shuffle(b: Builder, x: T, op: str) -> T | None:
    if max(x.shape[2:]) > 8:
        return None
    if x.channels % 4 or x.channels < 8:
        x = layer(b, x, b.pick((16, 8)))
    mode: dict[str, Any] = {"mode": b.pick(("DCR", "CRD"))} if b.opset >= 11 else {}
    shape = [x.shape[0], x.channels // 4, x.shape[2] * 2, x.shape[3] * 2]
    return b.op("DepthToSpace", x, shape=shape, blocksize=2, **mode)


@motif("SpaceToDepth", on=("map2",))
def pixel_unshuffle(b: Builder, x: T, op: str) -> T | None:
    if x.shape[2] % 2 or x.shape[3] % 2 or x.channels > 16:
        return None
    shape = [x.shape[0], x.channels * 4, x.shape[2] // 2, x.shape[3] // 2]
    return b.op("SpaceToDepth", x, shape=shape, blocksize=2)


# -- slices ----------------------------------------------------------------------------------------


@motif("Slice", on=ANY)
def sliced_channels(b: Builder, x: T, op: str) -> T | None:
    """A range of channels, from the front, the back, with steps or backwards."""
    n = x.channels
    if n < 4:
        return None
    choices = [(1, n, 1), (0, n - 1, 1), (-3, 1 << 60, 1), (0, -1, 1), (0, n // 2, 1)]
    if b.opset >= 10:
        choices += [(0, n, 2), (1, n, 2), (n - 1, -(1 << 60), -1), (-1, -n - 1, -2), (-2, 0, -1)]
    start, end, step = b.pick(choices)
    return b.slice(x, x.c, start, end, step)


@motif("Slice", on=(*MAPS, "last"))
def sliced_space(b: Builder, x: T, op: str) -> T | None:
    axis = b.pick(x.others)
    if x.shape[axis] < 4:
        return None
    if b.opset >= 10 and b.one_in(2):
        return b.slice(x, axis, 0, 1 << 60, 2)
    return b.slice(x, axis, 1, -1)


@motif("Slice", on=("map2",), since=10)
def focus(b: Builder, x: T, op: str) -> T | None:
    """Four strided slices side by side."""
    if x.shape[2] % 2 or x.shape[3] % 2 or x.channels > 12:
        return None
    parts = [
        b.slice(b.slice(x, 2, i, 1 << 40, 2), 3, j, 1 << 40, 2) for j in (0, 1) for i in (0, 1)
    ]
    return b.concat(parts, 1, 4 * x.channels)


@motif("Split", on=ANY)
def split_parts(b: Builder, x: T, op: str) -> T | None:
    """Parts of the channels go different ways; one may not be used at all."""
    n = x.channels
    if n < 4:
        return None
    if n % 2 == 0 and b.one_in(2):
        parts = b.split(x, x.c, [n // 2] * 2, equal=b.one_in(2))
    else:
        parts = b.split(x, x.c, [2, n - 3, 1] if n > 4 else [1, n - 1])
    if b.one_in(4):
        return parts[1]
    done = [b.op("Neg", parts[0]), layer(b, parts[1], 5), *parts[2:]]
    return b.concat(b.shuffled(done), x.c, sum(p.channels for p in done))


@motif("Split", on=(*MAPS, "last"))
def split_space(b: Builder, x: T, op: str) -> T | None:
    axis = b.pick(x.others)
    size = x.shape[axis]
    if isinstance(size, Open) or size < 3:
        return None
    first, second = b.split(x, axis, [1, size - 1])
    return b.op("Add", second, first, shape=second.shape)


# -- gathers ---------------------------------------------------------------------------------------


@motif("Gather", on=ANY)
def gathered_list(b: Builder, x: T, op: str) -> T:
    """Some channels in any order, some of them twice, some counted from the end."""
    count = b.pick((x.channels, x.channels - 1, x.channels + 2))
    indices = b.rng.permutation(x.channels)
    if b.one_in(2):
        indices = b.rng.integers(0, x.channels, max(count, 2))
    if b.one_in(2):
        indices = np.where(b.rng.random(indices.shape) < 0.5, indices - x.channels, indices)
    return b.gather(x, x.c, indices)


@motif("Gather", on=ANY)
def gathered_one(b: Builder, x: T, op: str) -> T:
    """One channel is picked by a number and gates the others."""
    one = b.gather(x, x.c, b.pick((0, -1, 1)))
    return b.op("Mul", x, b.op("Sigmoid", b.unsqueeze(replace(one, c=0), x.c)), shape=x.shape)


@motif("GatherND", on=("last",), since=11)
def looked_up_positions(b: Builder, x: T, op: str) -> T:
    """A few positions, each by its index along every axis but that of the channels."""
    places = np.stack([b.rng.integers(0, int(size), 3) for size in x.shape[:-1]], axis=1)
    found = b.op("GatherND", x, b.initializer(places, "at"), shape=(3, x.channels), c=1)
    return bent(b, found)


@motif("ScatterND", on=("last",), since=11)
def written_position(b: Builder, x: T, op: str) -> T:
    """One position is overwritten by what a layer makes of another."""
    new = layer(b, x, x.channels)
    for _ in range(x.rank - 1):
        new = b.gather(new, 0, 0)
    places = b.initializer(np.zeros((1, x.rank - 1), np.int64), "at")
    return b.op("ScatterND", x, places, b.unsqueeze(new, 0), shape=x.shape)


@motif("GatherElements", "ScatterElements", on=("last",), since=11)
def elements_by_their_places(b: Builder, x: T, op: str) -> T | None:
    """Each element of a position comes from a place of its own, or is written to one."""
    axis = b.pick(range(x.rank - 1))
    if any(isinstance(size, Open) for size in x.shape):
        return None
    order = b.rng.random([int(size) for size in x.shape]).argsort(axis)
    places = b.initializer(order.astype(np.int64), "at")
    if op == "GatherElements":
        return b.op(op, x, places, axis=axis)
    return b.op(op, x, places, layer(b, x, x.channels), axis=axis)


@motif("Gather", on=("map2", "last"))
def gathered_position(b: Builder, x: T, op: str) -> T | None:
    """One position in space, which leaves a tensor of one axis less."""
    axis = x.others[0]
    return b.gather(x, axis, b.pick((0, -1)))


@motif("Gather", on=("flat", "map1"))
def gathered_table(b: Builder, x: T, op: str) -> T | None:
    """A table of indices makes two axes out of the channels."""
    size = x.channels // 2
    if size < 2:
        return None
    table = b.rng.permutation(x.channels)[: 2 * size].reshape(2, size)
    if b.one_in(2):
        table = np.arange(2 * size).reshape(2, size)
    y = replace(b.gather(x, x.c, table), c=x.c + 1)
    y = b.op("Mul", y, operand(b, y), shape=y.shape)
    dims = [at(a) for a in range(y.rank)]
    return b.reshape(y, [*dims[: x.c], at(x.c, x.c + 1), *dims[x.c + 2 :]], c=x.c)


# -- joins -----------------------------------------------------------------------------------------


@motif("Concat", on=ANY)
def dense_join(b: Builder, x: T, op: str) -> T | None:
    """New channels beside the old ones."""
    if x.channels > 32:
        return None
    values = b.shuffled([x, bent(b, layer(b, x, width(b)))])
    if b.one_in(3):
        values.append(layer(b, x, 3))
    return b.concat(values, x.c, sum(v.channels for v in values))


@motif("Concat", on=(*MAPS, "last"))
def joined_in_space(b: Builder, x: T, op: str) -> T | None:
    """Two branches behind one another."""
    axis = b.pick(x.others)
    other = layer(b, x, x.channels)
    return b.concat(b.shuffled([x, other]), axis, x.shape[axis] + other.shape[axis])


@motif("Concat", on=ANY)
def joined_to_constant(b: Builder, x: T, op: str) -> T | None:
    """A class token, or constant channels."""
    if any(isinstance(s, Open) for s in x.shape):
        return None
    axis = b.integer(1, x.rank - 1)
    shape = [2 if a == axis else s for a, s in enumerate(x.shape)]
    constant = weight(b, b.normal(*shape))
    return b.concat(b.shuffled([x, constant]), axis, x.shape[axis] + 2)


@motif("Concat", on=ANY)
def joined_to_input(b: Builder, x: T, op: str) -> T | None:
    opened = {size for size in x.shape[1:] if isinstance(size, Open)}
    if opened - set(b.inputs[0].shape[1:]):
        return None  # half of an open size has no name
    other = b.input(tuple(3 if a == x.c else s for a, s in enumerate(x.shape)), c=x.c)
    return b.concat(b.shuffled([x, other]), x.c, x.channels + 3)


@motif("Transpose", on=("last",))
def windows(b: Builder, x: T, op: str) -> T | None:
    """Windows are cut out of (N, H, W, C), attended to by position, and put back."""
    if x.rank != 4 or x.shape[1] % 2 or x.shape[2] % 2:
        return None
    y = b.reshape(x, [at(0), at(1, over=2), 2, at(2, over=2), 2, at(3)], c=5)
    y = b.transpose(y, (0, 1, 3, 2, 4, 5))
    y = b.reshape(y, [at(0, 1, 2), 4, at(5)], c=2)
    y = bent(b, layer(b, y, x.channels))
    if any(isinstance(s, Open) for s in x.shape[1:3]):
        return None
    count = [int(s) // 2 for s in x.shape[1:3]]
    y = b.reshape(y, [at(0, over=count[0] * count[1]), *count, 2, 2, at(2)], c=5)
    y = b.transpose(y, (0, 1, 3, 2, 4, 5))
    return b.reshape(y, [at(0), at(1, 2), at(3, 4), at(5)], c=3)
