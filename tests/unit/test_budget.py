"""What a plan would cost, against what the written model costs; and plans that meet a target."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from onnxprune.aim import TOLERANCE, aim, check_targets
from onnxprune.analyse import analyse, random_keep
from onnxprune.budget import Budget, shares
from onnxprune.cost import stats_after
from onnxprune.errors import TargetError, UsageError
from onnxprune.groups import half_keep
from onnxprune.io import load
from onnxprune.rewrite import operate
from onnxprune.score import score
from onnxprune.select import PruningPlan, select
from tests.small import MODELS, conv_chain

NETWORKS = ("fashion_resnet", "fashion_mobile", "fashion_vit", "paddleocr_cls")


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("seed", [0, 1])
def test_bill_of_a_plan_is_that_of_the_written_model(name: str, seed: int) -> None:
    graph = analyse(load(MODELS / f"{name}.onnx"))
    keep = random_keep(graph, None, np.random.default_rng(seed))
    bill = Budget(graph).of(keep)
    made = stats_after(graph, operate(PruningPlan(graph, keep)).model, keep)
    assert (bill.params, bill.macs) == (made.params, made.macs)
    assert bill.bytes == pytest.approx(made.bytes, rel=0.02)


def test_price_of_a_unit_is_what_it_saves() -> None:
    graph = analyse(conv_chain((3, 8, 12), bn=False))
    prices = Budget(graph).per_unit
    first, second = (group.id for group in graph.prunable)
    # One channel of the first: its filter, and 12 filters read it, at 8 x 8 positions.
    assert prices[first].params == 3 * 9 + 12 * 9
    assert prices[first].macs == 64 * (3 * 9 + 12 * 9)
    assert prices[second].params == 8 * 9 + 4


def test_groups_that_must_be_cut_together_share_one_price() -> None:
    """Dimensions of heads: of each head as many go, so one alone has no price."""
    graph = analyse(load(MODELS / "fashion_vit.onnx"), attention="dims")
    budget = Budget(graph)
    prices = budget.per_unit
    assert all(prices[group.id].macs > 0 for group in graph.prunable)
    for part in graph.together:
        assert len({prices[group] for group in part}) == 1
        keep = half_keep(graph, part)
        gone = sum(g.size - keep[g.id].size for g in graph.prunable if g.id in part)
        saved = budget.whole.macs - budget.of(keep).macs
        assert prices[min(part)].macs == saved // gone


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("measure", ["macs", "params", "bytes"])
@pytest.mark.parametrize("scope", ["local", "global"])
def test_target_is_met_within_one_per_cent(name: str, measure: str, scope: str) -> None:
    graph = analyse(load(MODELS / f"{name}.onnx"))
    budget, ranks = Budget(graph), score(graph, "l1")
    found = aim(
        graph,
        {measure: 0.6},
        lambda ratio: select(graph, ranks, ratio=ratio, scope=scope),
        lambda keep: shares(budget.of(keep), budget.whole),
    )
    assert found.reached
    assert found.left[measure] == pytest.approx(0.6, abs=TOLERANCE)


def test_of_two_targets_the_harder_one_binds() -> None:
    graph = analyse(load(MODELS / "fashion_resnet.onnx"))
    budget, ranks = Budget(graph), score(graph, "l1")
    found = aim(
        graph,
        {"macs": 0.9, "params": 0.5},
        lambda ratio: select(graph, ranks, ratio=ratio),
        lambda keep: shares(budget.of(keep), budget.whole),
    )
    assert found.left["params"] == pytest.approx(0.5, abs=TOLERANCE)
    assert found.left["macs"] <= 0.9 + TOLERANCE


def test_target_that_no_cut_reaches_is_refused_with_what_is_left() -> None:
    graph = analyse(conv_chain((3, 8, 12)))
    budget, ranks = Budget(graph), score(graph, "l1")
    with pytest.raises(TargetError, match=r"macs=0.01 cannot be reached.*leaves 0\.\d+"):
        aim(
            graph,
            {"macs": 0.01},
            lambda ratio: select(graph, ranks, ratio=ratio, min_channels=4),
            lambda keep: shares(budget.of(keep), budget.whole),
        )


def test_granularity_too_coarse_for_a_target_leaves_more_not_less() -> None:
    graph = analyse(conv_chain((3, 8, 8)))
    budget, ranks = Budget(graph), score(graph, "l1")
    found = aim(
        graph,
        {"macs": 0.55},
        lambda ratio: select(graph, ranks, ratio=ratio, round_to=4),
        lambda keep: shares(budget.of(keep), budget.whole),
    )
    assert not found.reached
    assert found.left["macs"] > 0.55


@pytest.mark.parametrize(
    ("targets", "said"),
    [({"speed": 0.5}, "unknown"), ({"macs": 0.0}, "no share"), ({"macs": 1.5}, "no share")],
    ids=["no such measure", "nothing left", "more than all"],
)
def test_target_that_cannot_be_meant_is_refused(targets: Mapping[str, float], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        check_targets(targets)
