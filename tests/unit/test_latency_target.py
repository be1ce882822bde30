"""Latency as a target, on machines whose times are made up."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest

from onnxprune.aim import TOLERANCE, Keep, aim
from onnxprune.analyse import analyse
from onnxprune.data import Data, random_data
from onnxprune.errors import TargetError, VerificationError
from onnxprune.groups import DependencyGraph
from onnxprune.latency_target import Found, LatencyTarget, feeds_of
from onnxprune.planning import Planner, Wish
from onnxprune.score import Importance, score
from onnxprune.select import PruningPlan, select
from onnxprune.types import Latency
from tests.small import conv_chain, parsed


@pytest.fixture(scope="module")
def graph() -> DependencyGraph:
    return analyse(conv_chain((3, 64, 96, 64)))


@pytest.fixture(scope="module")
def ranks(graph: DependencyGraph) -> Importance:
    return score(graph, "l1")


def units(graph: DependencyGraph, keep: Keep) -> int:
    return sum(keep[g.id].size if g.id in keep else g.size for g in graph.prunable)


class Machine:
    """Predicts 1 ms for each unit; measures ``truth`` times the share that it predicts."""

    def __init__(
        self, graph: DependencyGraph, ranks: Importance, truth: Sequence[float], target: float
    ) -> None:
        self.graph, self.truth = graph, list(truth)
        self.measured: list[PruningPlan] = []
        self.timer = LatencyTarget(lambda keep: 1e-3 * units(graph, keep), self.timed)
        wish = Wish(targets={"latency": target}, scope="local")
        self.planner = Planner(graph, wish, latency=self.timer.left)
        self.ranks = ranks

    def timed(self, plan: PruningPlan) -> Latency:
        whole = 1e-3 * units(self.graph, {})
        share = self.truth[len(self.measured)] * 1e-3 * units(self.graph, plan.keep) / whole
        self.measured.append(plan)
        return Latency(whole, share * whole, share, share, share, 9, 1)

    def search(self) -> Found:
        return self.planner.plan(self.ranks), "l1", "asked for"

    def shares(self) -> list[float]:
        return [units(self.graph, p.keep) / units(self.graph, {}) for p in self.measured]


def test_a_right_prediction_is_measured_once(graph: DependencyGraph, ranks: Importance) -> None:
    machine = Machine(graph, ranks, [1.0], 0.5)
    (plan, method, _), times = machine.timer.confirmed(0.5, machine.search)
    assert method == "l1"
    assert plan is machine.measured[0]
    assert times.ratio == pytest.approx(0.5, abs=TOLERANCE)
    assert times.predicted == pytest.approx(1e-3 * units(graph, plan.keep))


def test_a_wrong_prediction_is_corrected_once(graph: DependencyGraph, ranks: Importance) -> None:
    machine = Machine(graph, ranks, [1.25, 1.25], 0.5)
    (plan, _, _), times = machine.timer.confirmed(0.5, machine.search)
    assert machine.shares() == pytest.approx([0.5, 0.4], abs=TOLERANCE)
    assert machine.timer.left(plan.keep) == pytest.approx(times.ratio)
    assert times.ratio == pytest.approx(0.5, abs=0.015)
    assert plan is machine.measured[1]


def test_a_search_goes_on_between_a_plan_too_slow_and_one_too_fast(
    graph: DependencyGraph, ranks: Importance
) -> None:
    machine = Machine(graph, ranks, [1.3, 1.1, 1.15, 1.15], 0.5)
    (plan, _, _), times = machine.timer.confirmed(0.5, machine.search)
    slow, fast, between = machine.shares()
    assert fast < between < slow
    assert plan is machine.measured[2]
    assert times.ratio == pytest.approx(0.5, rel=0.03)


def test_prediction_that_says_out_of_reach_is_not_believed(
    graph: DependencyGraph, ranks: Importance
) -> None:
    least = 3 / units(graph, {})  # one unit of each group
    machine = Machine(graph, ranks, [0.1] * 4, least / 8)
    _, times = machine.timer.confirmed(least / 8, machine.search)
    assert times.ratio <= least / 8 * 1.03
    right = Machine(graph, ranks, [1.0], least / 8)
    with pytest.raises(TargetError, match=r"the strongest cut leaves 0\.013, measured"):
        right.timer.confirmed(least / 8, right.search)


def test_the_nearest_of_four_is_taken_and_a_miss_is_warned_of(
    graph: DependencyGraph, ranks: Importance, caplog: pytest.LogCaptureFixture
) -> None:
    machine = Machine(graph, ranks, [1.5, 1.8, 2.2, 2.5], 0.5)
    with caplog.at_level(logging.WARNING):
        (plan, _, _), times = machine.timer.confirmed(0.5, machine.search)
    assert len(machine.measured) == 4
    ratios = [a * b for a, b in zip(machine.shares(), (1.5, 1.8, 2.2, 2.5), strict=True)]
    assert times.ratio == pytest.approx(min(ratios, key=lambda ratio: abs(ratio - 0.5)))
    assert any(plan is one for one in machine.measured)
    assert "of the original's time, more than the target 0.500" in caplog.text


def test_target_out_of_reach_once_corrected_leaves_what_was_found(
    graph: DependencyGraph, ranks: Importance
) -> None:
    machine = Machine(graph, ranks, [50.0], 0.5)
    _, times = machine.timer.confirmed(0.5, machine.search)
    assert len(machine.measured) == 1
    assert times.ratio == pytest.approx(25, rel=0.03)
    with pytest.raises(TargetError, match=r"target latency=0\.001 cannot be reached"):
        Machine(graph, ranks, [1.0], 0.001).search()


def test_time_that_rises_again_is_met_at_the_gentlest_cut(
    graph: DependencyGraph, ranks: Importance
) -> None:
    def sawtooth(keep: Keep) -> Mapping[str, float]:
        share = units(graph, keep) / units(graph, {})
        return {"latency": share if share > 0.65 or share < 0.4 else share + 0.3}

    found = aim(
        graph,
        {"latency": 0.7},
        lambda ratio: select(graph, ranks, ratio=ratio, scope="local"),
        sawtooth,
    )
    assert found.reached
    assert found.ratio == pytest.approx(0.3, abs=0.02)


def test_model_is_timed_on_data_cut_to_the_stand_ins(graph: DependencyGraph) -> None:
    model = graph.graph.model
    (name, shape) = next(iter(graph.stand_ins.items()))
    many = np.arange(7 * np.prod(shape[1:]), dtype=np.float32).reshape(7, *shape[1:])
    data = Data(batches=({name: many},), label="file", random=False, samples=7)
    assert np.array_equal(feeds_of(graph, data, 0)[name], many[: shape[0]])
    small = replace(data, batches=({name: many[:, :1]},))
    wanted = random_data(model, seed=3, shapes=graph.stand_ins, batches=1).batches[0][name]
    for given in (small, None):
        assert np.array_equal(feeds_of(graph, given, 3)[name], wanted)


def test_model_the_runtime_cannot_run_is_said_to_be_so() -> None:
    source = parsed(
        "g (float[1,4] x) => (float[1,2] y) {h = MatMul(x, a) r = Relu(h) y = MatMul(r, b)}",
        a=np.ones((4, 6), np.float32),
        b=np.ones((6, 2), np.float32),
    )
    graph = analyse(source)
    graph.graph.model.proto.graph.node[1].op_type = "Unknown"
    with pytest.raises(VerificationError, match="ONNX Runtime cannot run this model"):
        LatencyTarget.of(graph, None, 0)
