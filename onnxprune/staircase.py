"""Cost of a layer between the channel counts at which it was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

from onnxprune.extents import ALIGNMENT, Extents, Layer

# Of a layer's own widths. Between two of them cost is linear in each count, which is what
# fixed work, work for each input, for each output and for each pair of them add up to.
FRACTIONS = (1.0, 0.75, 0.5, 0.25, 0.125)
_ODD = 2  # what a channel count leaves over that the blocked layout does not take


@dataclass
class Grid:
    """Measured costs of one layer at every combination of some extents.

    Attributes:
        axes: Extents along each axis, rising.
        costs: Seconds at every point.
    """

    axes: tuple[tuple[int, ...], ...]
    costs: Mapping[Extents, float]

    def __call__(self, extents: Extents) -> float:
        """Seconds, linear in each extent between the points, and on beyond the last.

        Never less than a tenth of the least that was measured.
        """
        corners = [_between(axis, extent) for axis, extent in zip(self.axes, extents, strict=True)]
        total = 0.0
        for corner in product(*corners):
            share = 1.0
            for _, weight in corner:
                share *= weight
            total += share * self.costs[tuple(at for at, _ in corner)]
        return max(total, 0.1 * min(self.costs.values()))


@dataclass
class Staircase:
    """Cost of one layer at any channel counts.

    Attributes:
        layer: The layer.
        block: Channels in a block of the runtime's layout.
        grids: Costs in the blocked layout (True) and outside it (False), as far as measured.
    """

    layer: Layer
    block: int
    grids: Mapping[bool, Grid]
    _known: dict[Extents, float] = field(default_factory=dict, repr=False)

    def __call__(self, extents: Extents) -> float:
        """Seconds at any extents: those of whole blocks, in the layout the runtime will take."""
        if extents not in self._known:
            grid = self.grids.get(self.layer.blocked(extents, self.block))
            chosen = grid if grid is not None else next(iter(self.grids.values()))
            self._known[extents] = chosen(self.layer.rounded(extents, self.block))
        return self._known[extents]


def _between(axis: Sequence[int], extent: int) -> list[tuple[int, float]]:
    """The neighbours of an extent on an axis, with weights that add up to 1."""
    if len(axis) == 1:
        return [(axis[0], 1.0)]
    upper = next((i for i, at in enumerate(axis) if at >= extent), len(axis) - 1)
    upper = max(upper, 1)
    low, high = axis[upper - 1], axis[upper]
    share = (extent - low) / (high - low)
    return [(low, 1.0 - share), (high, share)]


def axes_of(
    layer: Layer, moving: Sequence[bool], block: int, *, blocked: bool
) -> tuple[tuple[int, ...], ...] | None:
    """Extents to measure a layer at, along each axis.

    Args:
        layer: The layer at its full widths.
        moving: Axes along which a cut can change it; one point is enough for others.
        block: Channels in a block of the runtime's layout.
        blocked: For that layout, or for the other.

    Returns:
        None where no cut can bring the layer into that layout.
    """
    full = layer.extents
    # The axis whose count decides the layout: inputs, or groups where each channel is one.
    decides = 0 if layer.depthwise else 1
    aligned = layer.op_type == "Conv" and (layer.depthwise or full[0] == 1)
    axes = []
    for axis, (extent, moves) in enumerate(zip(full, moving, strict=True)):
        found = {max(1, round(extent * fraction)) for fraction in FRACTIONS} if moves else {extent}
        if aligned and moves:
            if blocked:
                found = {-(-point // block) * block for point in found}
            elif axis == decides:
                found = {max(1, -(-point // ALIGNMENT) * ALIGNMENT - _ODD) for point in found}
        if aligned and axis == decides:
            if blocked and moves and not layer.depthwise:
                # Less than a block of inputs is another kernel, with a slope of its own.
                found |= {point for point in (block // 4, block * 3 // 4) if point < extent}
            found = {
                point
                for point in found
                if layer.blocked((*full[:axis], point, *full[axis + 1 :]), block) == blocked
            }
        if layer.op_type == "Conv" and not aligned and axis > 0 and (blocked or axis == decides):
            # Several channels a group: the blocked layout wants whole blocks of both.
            found = {point for point in found if (point % block == 0) == blocked}
        axes.append(sorted(found))
    if not all(axes) or layer.blocked(tuple(axis[-1] for axis in axes), block) != blocked:
        return None
    corners = [layer.rounded(point, block) for point in product(*axes)]
    return tuple(tuple(sorted({point[axis] for point in corners})) for axis in range(len(full)))


def points(axes: Sequence[Sequence[int]]) -> Iterator[Extents]:
    """Every point of a grid."""
    return product(*axes)


def fit(
    layers: Mapping[Layer, Sequence[bool]],
    block: int,
    cost: Callable[[Sequence[tuple[Layer, Extents]]], Sequence[float]],
) -> Mapping[Layer, Staircase]:
    """Measure every layer on its grids; points that layers share are measured once.

    Args:
        layers: Layers, each with the axes along which a cut can change it.
        block: Channels in a block of the runtime's layout.
        cost: Seconds of each of a list of layers at given extents.
    """
    axes = {
        (layer, blocked): found
        for layer, moving in layers.items()
        for blocked in (True, False)
        if (found := axes_of(layer, moving, block, blocked=blocked)) is not None
    }
    wanted: dict[tuple[object, ...], tuple[Layer, Extents]] = {}
    for (layer, _), found in axes.items():
        for point in points(found):
            wanted.setdefault((*layer.geometry, point), (layer, point))
    spent = dict(zip(wanted, cost(list(wanted.values())), strict=True))
    grids: dict[Layer, dict[bool, Grid]] = {layer: {} for layer in layers}
    for (layer, blocked), found in axes.items():
        costs = {point: spent[*layer.geometry, point] for point in points(found)}
        grids[layer][blocked] = Grid(found, costs)
    return {layer: Staircase(layer, block, found) for layer, found in grids.items()}
