"""The learning rate of each step: a linear warm-up, then a cosine to zero.

Source: Loshchilov & Hutter 2017, "SGDR" (arXiv:1608.03983), without restarts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

WARM_UP = 0.05  # share of all steps


@dataclass(frozen=True, slots=True)
class Schedule:
    """Rates by step.

    Attributes:
        peak: Largest rate.
        total: Number of steps.
    """

    peak: float
    total: int

    def rate(self, step: int) -> float:
        """Rate of step ``step``, from 0."""
        warm = max(1, round(WARM_UP * self.total))
        if step < warm:
            return self.peak * (step + 1) / (warm + 1)
        along = (step - warm) / max(1, self.total - warm)
        return self.peak * 0.5 * (1 + math.cos(math.pi * along))
