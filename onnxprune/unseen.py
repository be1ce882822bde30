"""The best of several rankings where there is no data: by what made-up pictures say.

No ranking by weights is the best one everywhere. Which of them moves the outputs of made-up
pictures least is also, or nearly, the one that costs the least accuracy on real ones. Rankings that
are measured on such pictures are not among them: they suit the pictures, not what the model is for.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from onnxprune.aim import TOLERANCE
from onnxprune.cost import stats
from onnxprune.data import Data
from onnxprune.errors import TargetError, VerificationError
from onnxprune.groups import DependencyGraph
from onnxprune.norms import is_bn_scale
from onnxprune.pictures import QUICK, drawable, pictures
from onnxprune.planning import Judge, Planner
from onnxprune.recentre import Recentring
from onnxprune.rewrite import operate
from onnxprune.score import Importance
from onnxprune.select import PruningPlan

_log = logging.getLogger(__name__)
# Ranking and, for targets, scope, the most useful ones first.
_ACROSS = (
    ("path", "global"),
    ("reader", "isomorphic"),
    ("path", "isomorphic"),
    ("lamp", "global"),
    ("reader", "global"),
    ("bn_l1", "isomorphic"),
)
_WITHIN = ("path", "reader", "l2", "bn_scale")  # one ratio for every group
_MOST_FITTED = 1 << 36  # multiply-accumulates of one run of each cut on all pictures, with biases
_FEW = 3  # of them, where all would cost too much
_BY_SCALES = ("bn_l1", "bn_scale")  # which need BatchNormalization in every group


def unseen_why(graph: DependencyGraph) -> str:
    """Why pictures do not tell which ranking is best, to go on with; "" where they could."""
    if not drawable(graph.graph):
        return "; it takes no picture to compare rankings on"
    dear = _pictures(graph, _FEW, 0) is None
    return "; made-up pictures cannot be had, or take too long, to compare rankings" if dear else ""


@dataclass(frozen=True)
class Ranking:
    """A ranking that was taken, in what scope, and why in words."""

    method: str
    scope: str
    why: str


def best_unseen(planner: Planner, seed: int, *, restored: bool = False) -> Ranking | None:
    """The ranking by weights whose cut stays nearest to the original on made-up pictures.

    Args:
        planner: Knows what is wanted.
        seed: Of the pictures.
        restored: The cut will be made up for: cuts are compared with biases fitted to half of the
            pictures, on the others, where the model is not too dear for that.

    Returns:
        What was taken; None where there are no pictures.

    Raises:
        TargetError: A target is out of reach.
    """
    plans = _plans(planner, seed)
    if len({_kept(plan) for _, plan in plans}) < 2:
        return None
    near = [one for one in plans if _over(planner, one[1]) <= TOLERANCE]
    if not near:
        (method, scope), _ = min(plans, key=lambda one: _over(planner, one[1]))
        return Ranking(method, scope, f"comes nearest to the target; scope {scope}")
    plans = near
    drawn = _pictures(planner.graph, len(plans), seed)
    if drawn is None:
        plans = plans[:_FEW]
        drawn = _pictures(planner.graph, len(plans), seed)
    if drawn is None:
        return None
    cheap = stats(planner.graph).macs * len(plans) * drawn.samples <= _MOST_FITTED
    fitted, shown = drawn.halves() if restored and cheap else (None, drawn)
    judge = Judge(planner.graph, shown)
    biases = None if fitted is None else Recentring(planner.graph, fitted)
    known: dict[tuple[bytes, ...], float] = {}
    for _, plan in plans:
        kept = _kept(plan)
        if kept in known:
            continue
        if biases is None:
            known[kept] = judge.drift(operate(plan).model)
        else:
            known[kept] = judge.turned(operate(biases.recentred(plan)).model)
    (method, scope), plan = min(plans, key=lambda one: known[_kept(one[1])])
    said = "moves the outputs of made-up pictures least"
    if fitted is not None:
        said = "with fitted biases turns the outputs of made-up pictures least"
    why = f"{said} of {len(plans)} rankings: {known[_kept(plan)]:.3g}; scope {scope}"
    return Ranking(method, scope, why)


def _plans(planner: Planner, seed: int) -> list[tuple[tuple[str, str], PruningPlan]]:
    """What each ranking would cut.

    Raises:
        TargetError: A target is out of reach for all of them.
    """
    known: dict[str, Importance] = {}
    found: list[tuple[tuple[str, str], PruningPlan]] = []
    beyond: TargetError | None = None
    for method, scope in _candidates(planner):
        if method not in known:
            known[method] = planner.scored(method, seed)
        try:
            found.append(((method, scope), planner.within(scope).plan(known[method])))
        except TargetError as error:  # another scope may take more of a group
            beyond = beyond or error
    if not found and beyond is not None:
        raise beyond
    return found


def _over(planner: Planner, plan: PruningPlan) -> float:
    """By what share of a cost a plan misses the targets, 0 where it meets them."""
    targets = planner.wish.targets
    left = planner.left(plan.keep) if targets else {}
    return max((left[name] - share for name, share in targets.items()), default=0.0)


def _kept(plan: PruningPlan) -> tuple[bytes, ...]:
    return tuple(plan.keep[group].tobytes() for group in sorted(plan.keep))


def _candidates(planner: Planner) -> list[tuple[str, str]]:
    """Rankings to try, and the scope of each."""
    wish, graph = planner.wish, planner.graph
    if wish.targets and wish.scope is None:
        asked = list(_ACROSS)
    else:
        asked = [(method, wish.where) for method in _WITHIN]
    scaled = all(any(map(is_bn_scale, group.parameters)) for group in graph.prunable)
    return [one for one in asked if scaled or one[0] not in _BY_SCALES]


def _pictures(graph: DependencyGraph, cuts: int, seed: int) -> Data | None:
    """Pictures to run the original and some cuts on; None where there are none."""
    try:
        cost = stats(graph).macs * (cuts + 1)
        return pictures(graph.graph, graph.stand_ins, cost, seed, QUICK)
    except VerificationError as error:
        _log.info("no made-up pictures: %s", error)
        return None
