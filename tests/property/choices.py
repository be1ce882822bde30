"""Where the choices of a random graph come from: a seed, or hypothesis, which can shrink them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
from hypothesis import strategies as st

_T = TypeVar("_T")


class Choices(Protocol):
    def integer(self, low: int, high: int) -> int:
        """A number from ``low`` to ``high``, both included; the lowest is the simplest."""
        ...


class Dice:
    """Choices from a seed."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def integer(self, low: int, high: int) -> int:
        return int(self._rng.integers(low, high + 1))


class Drawn:
    """Choices that hypothesis makes."""

    def __init__(self, draw: Callable[[st.SearchStrategy[int]], int]) -> None:
        self._draw = draw

    def integer(self, low: int, high: int) -> int:
        return low if low == high else self._draw(st.integers(low, high))


class Chooser:
    """Choices with a vocabulary."""

    def __init__(self, source: Choices) -> None:
        self._source = source

    def integer(self, low: int, high: int) -> int:
        return self._source.integer(low, high)

    def pick(self, options: Sequence[Any]) -> Any:
        """One of the options; the first is the simplest."""
        return options[self.integer(0, len(options) - 1)]

    def one_in(self, count: int) -> bool:
        """True once in ``count`` times; False is simpler."""
        return self.integer(0, count - 1) == count - 1

    def shuffled(self, items: Sequence[_T]) -> list[_T]:
        left, result = list(items), []
        while left:
            result.append(left.pop(self.integer(0, len(left) - 1)))
        return result
