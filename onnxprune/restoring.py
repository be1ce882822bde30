"""Ways to make up for a cut without training, and which of them was taken."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace

from onnxprune.checks import Check
from onnxprune.compensate import compensated
from onnxprune.cost import stats
from onnxprune.data import Data
from onnxprune.errors import VerificationError
from onnxprune.groups import DependencyGraph
from onnxprune.patterned import Imposed
from onnxprune.pictures import MOST_MACS, QUICK, pictures
from onnxprune.planning import Judge
from onnxprune.recentre import Recentring
from onnxprune.report.clock import Clock
from onnxprune.restore import refit
from onnxprune.rewrite import Surgery, operate
from onnxprune.select import PruningPlan
from onnxprune.types import Refitted

_log = logging.getLogger(__name__)
_AGAIN = 1  # refits that follow the first: a second one gains little for as much time again
_GUESSED = (
    "no BatchNormalization tells what the dropped channels carried: their means are those of "
    "random inputs, of mean 0 and variance 1"
)

_FITTED = "biases were fitted to made-up pictures: each unit stays active as often as it was there"
_GAIN = 0.98  # of the plain cut's at most: less gained is none
_RUNS = 3  # of each picture: original and cut for the fit, or original and both cuts to compare


@dataclass(frozen=True)
class Restored:
    """The surgery with what was lost made up for.

    Attributes:
        how: As the recipe says it.
        layers: What refitting did to each layer.
        unseen: Pictures that nothing was fitted to, to measure on; None where there are none.
        note: What a person should know of it.
    """

    surgery: Surgery
    how: str
    layers: tuple[Refitted, ...] = ()
    unseen: Data | None = None
    note: str = ""


def restored(
    plan: PruningPlan,
    surgery: Surgery,
    how: str,
    check: Check,
    clock: Clock,
    impose: Mapping[str, Imposed] | None = None,
) -> Restored:
    """Make up for a cut without training.

    Args:
        plan: The cut.
        surgery: What it made.
        how: ``none``, ``bias``, ``pictures`` or ``refit``; pictures that cannot be had, or do no
            better, are biases.
        check: The data, and the seed.
        clock: Hears of every layer.
        impose: Patterns that layers are refitted in, by the first output of their node.
    """
    if how == "none":
        return Restored(surgery, how)
    drawn = _pictures(plan.graph, check.seed) if how == "pictures" else None
    if how == "pictures" and drawn is None:
        _log.warning("no pictures can be made up for this model: biases make up for the cut")
    if how == "bias" or (how == "pictures" and drawn is None):
        return _by_biases(plan, surgery, check.seed)
    fitted = check.data if drawn is None else drawn
    assert fitted is not None
    made, layers, changed = refit(
        plan, surgery.model, fitted, seed=check.seed, heard=clock.step,
        impose=impose if drawn is None else None, again=0 if drawn or impose else _AGAIN,
    )  # fmt: skip
    names = tuple(dict.fromkeys((*surgery.restored, *changed)))
    found = Restored(replace(surgery, model=made, restored=names), how, layers)
    if drawn is None:
        return found
    unseen = _pictures(plan.graph, check.seed + 1)
    assert unseen is not None
    judge = Judge(plan.graph, unseen)
    shifted = operate(compensated(plan))
    if judge.drift(shifted.model) < judge.drift(made):
        _log.warning("on other made-up pictures biases alone do better than the refit: they stay")
        return Restored(shifted, "bias", unseen=unseen)
    return replace(found, unseen=unseen)


def _by_biases(plan: PruningPlan, surgery: Surgery, seed: int) -> Restored:
    """Biases fitted to pictures where the model takes some, else by what BatchNormalizations tell.

    Fitted ones have to show on other pictures that they do more good than harm: with them the
    outputs must tell the pictures apart more as the original's do.
    """
    drawn = _pictures(plan.graph, seed, _RUNS, QUICK) if surgery.removed else None
    if drawn is None:
        told = any(node.op_type == "BatchNormalization" for node in plan.graph.graph.nodes)
        made = operate(compensated(plan))
        return Restored(made, "bias", note=_GUESSED if made.restored and not told else "")
    fitted, other = drawn.halves()
    judge = Judge(plan.graph, other)
    made = operate(Recentring(plan.graph, fitted).recentred(plan))
    unlike, plain = judge.unlike(made.model), judge.unlike(surgery.model)
    if unlike <= _GAIN * plain:
        return Restored(made, "bias", note=_FITTED if made.restored else "")
    note = (
        "no bias was changed: fitted ones bring the outputs on made-up pictures no nearer to the "
        f"original's (1 - correlation {unlike:.3g}, {plain:.3g} without)"
    )
    return Restored(surgery, "bias", note=note)


def _pictures(
    graph: DependencyGraph, seed: int, runs: int = 1, most: int = MOST_MACS
) -> Data | None:
    """Pictures to fit to; None where the model takes none, or cannot be run on them."""
    try:
        cost = stats(graph).macs * runs
        return pictures(graph.graph, graph.stand_ins, cost, seed, most)
    except VerificationError as error:
        _log.info("no made-up pictures: %s", error)
        return None
