"""Targets: the gentlest plan of a family that leaves a given share of the cost.

Costs are those of the whole graph after coupling, rounding and alignment. They fall as the ratio
rises, so the ratio is bisected; where one step of the ratio moves several groups at once, the
groups take it one after the other. Latency may rise again, as kernels want certain widths: for it
the ratio is first raised step by step until the targets are met.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from onnxprune.errors import TargetError, UsageError
from onnxprune.groups import DependencyGraph
from onnxprune.select import PruningPlan
from onnxprune.types import IntArray

MEASURES = ("macs", "params", "bytes", "latency")
TOLERANCE = 0.01  # of the original's cost
_HIGHEST_RATIO = 0.999
_HALVINGS = 14
_STEPS = 32  # in which the ratio is raised for latency

Keep = Mapping[int, IntArray]
Shares = Callable[[Keep], Mapping[str, float]]


@dataclass(frozen=True)
class Aimed:
    """A plan found for targets.

    Attributes:
        plan: The plan.
        ratio: Ratio it came from.
        left: Share that is left of each cost with a target.
        reached: Every target is met to within ``TOLERANCE``.
    """

    plan: PruningPlan
    ratio: float
    left: Mapping[str, float]
    reached: bool


def check_targets(targets: Mapping[str, float]) -> None:
    """Refuse targets that cannot be meant.

    Raises:
        UsageError: An unknown measure, or a share outside (0, 1].
    """
    for name, share in targets.items():
        if name not in MEASURES:
            raise UsageError(f"target '{name}' is unknown", hint=f"give {', '.join(MEASURES)}")
        if not 0 < share <= 1:
            raise UsageError(
                f"target {name}={share:g} is no share to be left", hint=f"{name}=0.5 leaves half"
            )


def aim(
    graph: DependencyGraph,
    targets: Mapping[str, float],
    family: Callable[[float], PruningPlan],
    shares: Shares,
) -> Aimed:
    """The plan that meets the targets while cutting least.

    Args:
        graph: The analysis.
        targets: Share of each cost that may be left, in (0, 1].
        family: The plan for a ratio; costs other than latency must not rise with it.
        shares: Share of each cost that a plan's ``keep`` leaves.

    Returns:
        The plan whose binding cost is nearest to its target, from either side within
        ``TOLERANCE``; if there is none so near, the nearest that leaves more, for latency the
        nearest of all.

    Raises:
        TargetError: Even the strongest cut leaves more.
    """
    check_targets(targets)

    def excess(keep: Keep) -> float:
        left = shares(keep)
        return max(left[name] - share for name, share in targets.items())

    timed = "latency" in targets
    low, high = 0.0, _HIGHEST_RATIO
    gentle, strong = family(low), family(high)
    for number in range(1, _STEPS) if timed and excess(gentle.keep) > 0 else ():
        tried = number / _STEPS
        plan = family(tried)
        if excess(plan.keep) <= 0:
            high, strong = tried, plan
            break
        low, gentle = tried, plan
    if excess(strong.keep) > TOLERANCE:
        left = shares(strong.keep)
        worst = max(targets, key=lambda name: left[name] - targets[name])
        raise TargetError(
            f"target {worst}={targets[worst]:g} cannot be reached: "
            f"the strongest cut leaves {left[worst]:.3f}",
            hint="lower --min-channels or --round-to, raise --max-ratio, or cut more groups",
        )
    if excess(gentle.keep) <= 0:
        return Aimed(gentle, low, _of(targets, shares(gentle.keep)), reached=True)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        plan = family(middle)
        if excess(plan.keep) > 0:
            low, gentle = middle, plan
        else:
            high, strong = middle, plan
    gentle, strong = _between(graph, gentle, strong, excess)
    over, under = excess(gentle.keep), -excess(strong.keep)
    chosen = strong if under <= (over if timed else min(over, TOLERANCE)) else gentle
    reached = min(over, under) <= TOLERANCE
    left = _of(targets, shares(chosen.keep))
    return Aimed(chosen, high if chosen is strong else low, left, reached)


def _of(targets: Mapping[str, float], left: Mapping[str, float]) -> Mapping[str, float]:
    return {name: left[name] for name in targets}


def _between(
    graph: DependencyGraph,
    gentle: PruningPlan,
    strong: PruningPlan,
    excess: Callable[[Keep], float],
) -> tuple[PruningPlan, PruningPlan]:
    """Neighbours between two plans: groups that must agree take the stronger cut together."""
    parts = [
        part
        for part in graph.together
        if any(gentle.keep[group].size != strong.keep[group].size for group in part)
    ]
    first, last = 0, len(parts)
    while last - first > 1:
        middle = (first + last) // 2
        plan = _mixed(gentle, strong, parts[:middle])
        if excess(plan.keep) > 0:
            first = middle
        else:
            last = middle
    return _mixed(gentle, strong, parts[:first]), _mixed(gentle, strong, parts[:last])


def _mixed(
    gentle: PruningPlan, strong: PruningPlan, parts: Sequence[frozenset[int]]
) -> PruningPlan:
    taken = frozenset[int]().union(*parts)
    keep = {group: (strong if group in taken else gentle).keep[group] for group in gentle.keep}
    why = {group: (strong if group in taken else gentle).why[group] for group in gentle.why}
    return PruningPlan(gentle.graph, keep, why)
