"""Least squares seen through an activation: an error that the activation hides costs nothing.

Of |f(y) - f(p)| little may be left where |y - p| is large: in front of a Relu every negative number
is as good as any other. Each error counts by the square of the slope that f has between p and y,
and as the weights change, so do the slopes: a weighted problem for each output. Slopes count as 1
at most; with targets p + slope² · (y - p) it is an unweighted problem again, one Gram matrix serves
all outputs, and for fixed slopes no step makes it worse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from onnxprune.types import Float32Array, Float64Array

Function = Callable[[Float32Array], Float32Array]
# X, Z and what is added to Z in front of the activation: (groups, rows, inputs or outputs).
Batches = Callable[[], Iterator[tuple[Float32Array, Float32Array, Float32Array | None]]]
_NEAR = 1e-6  # closer than this there is no error, and no slope


@dataclass(frozen=True)
class Through:
    """How the output of a layer is seen.

    Attributes:
        activation: Element by element.
        batches: The rows of a fit once more, in the same order, each time it is called.
    """

    activation: Function
    batches: Batches

    def made(self, x: Float32Array, weight: Float64Array, bias: Float64Array) -> Float32Array:
        """X W + b in single precision."""
        product: Float32Array = np.matmul(x, weight.astype(np.float32))
        return product + bias[:, None].astype(np.float32)

    def wanted(self, z: Float32Array, added: Float32Array | None) -> Float32Array:
        """What is seen of an output."""
        return self.activation(z if added is None else z + added)

    def target(self, z: Float32Array, made: Float32Array, seen: Float32Array) -> Float32Array:
        """Targets for the next weights; the present ones make ``made`` and miss by ``seen``."""
        miss = z - made
        moved: Float32Array = np.square(slope(seen, miss)) * miss
        return made + moved


def slope(seen: Float32Array, miss: Float32Array) -> Float32Array:
    """How much of each error an activation shows, in [0, 1]."""
    found = np.divide(seen, miss, out=np.zeros_like(miss), where=np.abs(miss) > _NEAR)
    return np.clip(found, 0, 1)
