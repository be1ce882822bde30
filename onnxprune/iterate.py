"""A cut in several steps: what is left is ranked again, and restored, before more goes.

Source: iterative pruning as in Han et al. 2015 (arXiv:1506.02626); the polynomial schedule is that
    of Zhu & Gupta 2017 (arXiv:1710.01878), which takes much at first and little at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from onnxprune.errors import UsageError
from onnxprune.groups import DependencyGraph
from onnxprune.select import PruningPlan
from onnxprune.types import IntArray

SCHEDULES = ("polynomial", "linear")
_POWER = 3
_MOST_STEPS = 100

Chosen = tuple[PruningPlan, str, str]  # the plan, the method that ranked, and why that one


@dataclass(frozen=True, slots=True)
class Step:
    """One step on the way.

    Attributes:
        share: Of all that is to go, what has gone after it; 1 for the last.
        ranked: The analysis on what the last step left; None before the first.
        gone: Units of each group, by id, that went before.
    """

    share: float
    ranked: DependencyGraph | None
    gone: Mapping[int, IntArray]


def shares(steps: int, schedule: str) -> list[float]:
    """What has gone after each step, as a share of all that is to go.

    Raises:
        UsageError: There is no such schedule, or no step.
    """
    if schedule not in SCHEDULES:
        raise UsageError(f"schedule is '{schedule}'", hint=f"give {' or '.join(SCHEDULES)}")
    whole = isinstance(steps, int) and not isinstance(steps, bool)
    if not whole or not 1 <= steps <= _MOST_STEPS:
        raise UsageError(f"steps is {steps}", hint=f"give 1 to {_MOST_STEPS}")
    power = 1 if schedule == "linear" else _POWER
    return [1 - (1 - number / steps) ** power for number in range(1, steps + 1)]


def in_steps(
    choose: Callable[[Step], Chosen],
    left: Callable[[PruningPlan], DependencyGraph],
    steps: int,
    schedule: str,
) -> Chosen:
    """The last of several plans, each of which takes what the one before it took, and more.

    Args:
        choose: Makes the plan of a step, of the original.
        left: The analysis on what a cut and its restoring leave of the weights (``expanded``).
        steps: How many.
        schedule: ``polynomial`` or ``linear``.
    """
    step = Step(0.0, None, {})
    *before, last = shares(steps, schedule)
    for share in before:
        plan, _, _ = choose(Step(share, step.ranked, step.gone))
        if not plan.removes:
            continue
        gone = {
            group.id: np.setdiff1d(np.arange(group.size), plan.keep[group.id])
            for group in plan.graph.prunable
        }
        step = Step(share, left(plan), gone)
    return choose(Step(last, step.ranked, step.gone))
