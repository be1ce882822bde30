"""Sizes and tensors as the generator sees them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.generic]
Shape = tuple[int, ...]


class Open(int):
    """A size that the model leaves open; whatever is computed from it is open too."""

    def __add__(self, other: int) -> Open:
        return Open(int(self) + int(other))

    def __sub__(self, other: int) -> Open:
        return Open(int(self) - int(other))

    def __mul__(self, other: int) -> Open:
        return Open(int(self) * int(other))

    def __floordiv__(self, other: int) -> Open:
        return Open(int(self) // int(other))

    __radd__ = __add__
    __rmul__ = __mul__


@dataclass(frozen=True, slots=True)
class T:
    """A tensor of the graph: its shape, and the axis ``c`` that channels lie on."""

    name: str
    shape: Shape
    c: int = 1
    dtype: type[np.generic] = np.float32

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def channels(self) -> int:
        return self.shape[self.c]

    @property
    def others(self) -> list[int]:
        """Axes that are neither batch nor channels."""
        return [axis for axis in range(1, self.rank) if axis != self.c]

    @property
    def kind(self) -> str:
        if self.rank == 2:
            return "flat"
        if self.c == 1:
            return f"map{self.rank - 2}"
        return "last" if self.c == self.rank - 1 else "other"


@dataclass(frozen=True, slots=True)
class At:
    """A dimension given by axes of the reshaped tensor: their product, times and over a number."""

    axes: tuple[int, ...]
    times: int = 1
    over: int = 1

    def of(self, shape: Shape) -> int:
        return math.prod(shape[a] for a in self.axes) * self.times // self.over


def at(*axes: int, times: int = 1, over: int = 1) -> At:
    return At(axes, times, over)
