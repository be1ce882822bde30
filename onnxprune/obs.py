"""Optimal brain surgeon for whole channels: what removing one costs after its readers are refitted.

The outputs of a layer are X W. Without some columns of X the best the layer can do is regress on
those that stay; the error that this leaves follows from the inverse of XᵀX alone. Channels go
greedily, a few at a time, and what is left is judged anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnxprune.types import Float64Array, IntArray

_DAMPING = 1e-3  # of the mean diagonal of XᵀX, so that its inverse exists
_ROUNDS = 48  # at most so many times is what is left judged anew


@dataclass
class Reader:
    """One layer that reads the channels of a group, in least-squares form.

    Attributes:
        inverse: (XᵀX + damping)⁻¹ of one group of the layer, shape (inputs, inputs).
        weight: W, shape (inputs, outputs).
        columns: For each unit of the channel group the inputs it owns, shape (units, inputs of a
            unit); units without any are absent from ``units``.
        units: Unit of each row of ``columns``.
        scale: What an error is divided by: the energy of the layer's output.
    """

    inverse: Float64Array
    weight: Float64Array
    columns: IntArray
    units: IntArray
    scale: float

    @classmethod
    def of(
        cls, gram: Float64Array, rows: int, weight: Float64Array, columns: IntArray, units: IntArray
    ) -> Reader:
        """From the sum of XᵀX over some rows and the weight."""
        moment = gram / max(rows, 1)
        energy = float(np.einsum("io,ij,jo->", weight, moment, weight, optimize=True))
        damped = moment + np.eye(len(moment)) * (_DAMPING * max(np.trace(moment) / len(moment),
                                                                1e-12))  # fmt: skip
        return cls(np.linalg.inv(damped), weight.copy(), columns, units, max(energy, 1e-12))

    def costs(self, alive: Float64Array) -> Float64Array:
        """Error that each row of ``columns`` would leave if its inputs went now."""
        cost = np.full(len(self.columns), np.inf)
        left = np.flatnonzero(alive[self.units] > 0)
        at = self.columns[left]
        blocks = self.inverse[at[:, :, None], at[:, None, :]]  # (units, k, k)
        w = self.weight[at]  # (units, k, outputs)
        solved = np.linalg.solve(blocks, w)
        cost[left] = np.einsum("uko,uko->u", w, solved) / self.scale
        return cost

    def remove(self, gone: IntArray) -> None:
        """Take rows of ``columns`` out and refit what stays."""
        at = self.columns[gone].reshape(-1)
        block = self.inverse[np.ix_(at, at)]
        across = self.inverse[:, at]
        self.weight -= across @ np.linalg.solve(block, self.weight[at])
        self.inverse -= across @ np.linalg.solve(block, across.T)
        self.weight[at] = 0.0
        # What went is never looked at again; a unit diagonal keeps it out of the way.
        self.inverse[at] = 0.0
        self.inverse[:, at] = 0.0
        self.inverse[at, at] = 1.0


def greedy_costs(readers: Sequence[Reader], units: int) -> Float64Array:
    """Importance of each unit: the cost at which greedy removal takes it, never falling.

    Args:
        readers: Every layer that reads the units.
        units: Number of units of the group.

    Returns:
        Shape (units,); removing the lowest first is what the greedy removal does.

    Source: Hassibi & Stork 1992, Optimal brain surgeon; for whole channels as in arXiv:2403.18955.
    """
    alive = np.ones(units)
    found = np.zeros(units)
    highest = 0.0
    each = max(1, -(-units // _ROUNDS))
    while True:
        left = np.flatnonzero(alive)
        if not left.size:
            return found
        cost = _costs(readers, alive)
        order = left[np.argsort(cost[left], kind="stable")]
        gone = order[:each]
        for unit in gone:
            highest = max(highest, float(cost[unit]))
            found[unit] = highest + 1e-12 * (units - left.size)
        alive[gone] = 0.0
        if left.size <= each:
            return found
        for reader in readers:
            rows = np.flatnonzero(np.isin(reader.units, gone))
            if rows.size:
                reader.remove(rows)


def _costs(readers: Sequence[Reader], alive: Float64Array) -> Float64Array:
    total = np.zeros(alive.size)
    for reader in readers:
        cost = reader.costs(alive)
        known = np.isfinite(cost)
        total += np.bincount(reader.units[known], cost[known], alive.size)
    return total
