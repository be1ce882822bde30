"""Cost of a layer between the channel counts at which it was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

from onnxprune.extents import Extents, Layer

# Of a layer's own widths. Between two of them cost is linear in each count, which is what
# fixed work, work for each input, for each output and for each pair of them add up to.
FRACTIONS = (1.0, 0.75, 0.5, 0.25, 0.125)
_FEW = 4  # inputs of a convolution that are less than a block


@dataclass
class Staircase:
    """Measured costs of one layer on a grid of extents, and what lies between.

    Attributes:
        layer: The layer.
        axes: Extents that were measured along each axis, rising.
        block: Channels in a block of the runtime's layout.
        costs: Seconds at every point of the grid.
    """

    layer: Layer
    axes: tuple[tuple[int, ...], ...]
    block: int
    costs: Mapping[Extents, float]
    _known: dict[Extents, float] = field(default_factory=dict, repr=False)

    def __call__(self, extents: Extents) -> float:
        """Seconds at any extents: those of the next full block, interpolated in each axis.

        Below the smallest extent measured the line goes on, but never under a tenth of the cost
        there; above the largest it goes on.
        """
        extents = self.layer.rounded(extents, self.block)
        if extents not in self._known:
            self._known[extents] = self._interpolate(extents)
        return self._known[extents]

    def _interpolate(self, extents: Extents) -> float:
        corners = [_between(axis, extent) for axis, extent in zip(self.axes, extents, strict=True)]
        total = 0.0
        for corner in product(*corners):
            share = 1.0
            for _, weight in corner:
                share *= weight
            total += share * self.costs[tuple(at for at, _ in corner)]
        return max(total, 0.1 * min(self.costs.values()))


def _between(axis: Sequence[int], extent: int) -> list[tuple[int, float]]:
    """The neighbours of an extent on an axis, with weights that add up to 1."""
    if len(axis) == 1:
        return [(axis[0], 1.0)]
    upper = next((i for i, at in enumerate(axis) if at >= extent), len(axis) - 1)
    upper = max(upper, 1)
    low, high = axis[upper - 1], axis[upper]
    share = (extent - low) / (high - low)
    return [(low, 1.0 - share), (high, share)]


def grid(layer: Layer, moving: Sequence[bool], block: int) -> tuple[tuple[int, ...], ...]:
    """Extents to measure along each axis of a layer.

    Args:
        layer: The layer at its full widths.
        moving: Axes along which a cut can change it; one point is enough for others.
        block: Channels in a block of the runtime's layout.
    """
    full = layer.rounded(layer.extents, block)
    axes = []
    for axis, (extent, moves) in enumerate(zip(full, moving, strict=True)):
        if not moves:
            axes.append((extent,))
            continue
        points = set()
        for fraction in FRACTIONS:
            wanted = list(full)
            wanted[axis] = max(1, round(extent * fraction))
            points.add(layer.rounded(tuple(wanted), block)[axis])
        if layer.op_type == "Conv" and axis == 1 and layer.extents[0] == 1 and extent >= block > _FEW:
            # Less than a block of inputs is another kernel, with a slope of its own.
            points |= {_FEW, block - _FEW, block}
        axes.append(tuple(sorted(points)))
    return tuple(axes)


def points(axes: Sequence[Sequence[int]]) -> Iterator[Extents]:
    """Every point of a grid."""
    return product(*axes)


def fit(
    layers: Mapping[Layer, Sequence[bool]],
    block: int,
    cost: Callable[[Sequence[tuple[Layer, Extents]]], Sequence[float]],
) -> Mapping[Layer, Staircase]:
    """Measure every layer on its grid; points that layers share are measured once.

    Args:
        layers: Layers, each with the axes along which a cut can change it.
        block: Channels in a block of the runtime's layout.
        cost: Seconds of each of a list of layers at given extents.
    """
    axes = {layer: grid(layer, moving, block) for layer, moving in layers.items()}
    wanted: dict[tuple[object, ...], tuple[Layer, Extents]] = {}
    for layer in layers:
        for point in points(axes[layer]):
            wanted.setdefault((*layer.geometry, point), (layer, point))
    spent = dict(zip(wanted, cost(list(wanted.values())), strict=True))
    return {
        layer: Staircase(
            layer,
            axes[layer],
            block,
            {point: spent[*layer.geometry, point] for point in points(axes[layer])},
        )
        for layer in layers
    }
