"""The running mean of weights over steps, which often does better than the weights themselves.

Source: Polyak & Juditsky 1992, averaging of iterates; as an exponential mean of the weights of a
    network in Tarvainen & Valpola 2017, "Mean teachers" (arXiv:1703.01780).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from onnxprune.train.protocol import Arrays
from onnxprune.types import AnyArray

_KEPT = 0.98  # of the mean at each step
EVERY = 10  # steps from one look at the weights to the next: these may lie in another process


@dataclass
class Average:
    """A mean that forgets; the first weights it sees count as all those before.

    Attributes:
        values: float32 arrays, None before the first look.
    """

    values: dict[str, AnyArray] | None = field(default=None, repr=False)

    @staticmethod
    def due(steps: int) -> bool:
        """Whether to look at the weights after so many steps of the whole training."""
        return steps % EVERY == 0

    def add(self, weights: Arrays) -> None:
        """Take in the weights as they stand; what is zero in all of them stays exactly zero."""
        if self.values is None:
            self.values = {name: np.array(one, np.float32) for name, one in weights.items()}
            return
        kept = np.float32(_KEPT**EVERY)
        for name, one in weights.items():
            mean = np.asarray(self.values[name], np.float32)
            self.values[name] = kept * mean + (np.float32(1) - kept) * np.asarray(one, np.float32)

    def load(self, values: Mapping[str, AnyArray]) -> None:
        """Go on from values that were kept."""
        self.values = dict(values) or None
