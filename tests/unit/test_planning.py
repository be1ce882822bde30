"""From a wish to a plan: targets, the best of several rankings, and what they are judged on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from onnxprune import planning
from onnxprune.analyse import analyse
from onnxprune.cost import stats, stats_after
from onnxprune.data import Data
from onnxprune.errors import TargetError
from onnxprune.groups import DependencyGraph
from onnxprune.io import load
from onnxprune.model import Model
from onnxprune.planning import Judge, Planner, Wish
from onnxprune.rewrite import operate
from onnxprune.score import score
from tests.small import MODELS, conv_chain, parsed


def images(n: int, *, size: int = 16, seed: int = 1, width: int = 3) -> Data:
    x = np.random.default_rng(seed).standard_normal((n, width, 8, 8)).astype(np.float32)
    batches = [{"x": x[start : start + size]} for start in range(0, n, size)]
    return Data(batches, "images", random=False, samples=n)


def chain() -> DependencyGraph:
    return analyse(conv_chain((3, 16, 24, 16), batch="N"))


# ------------------------------------------------------------------------------------- one ranking


@pytest.mark.parametrize("measure", ["macs", "params", "bytes"])
@pytest.mark.parametrize("scope", [None, "local", "global", "isomorphic"])
def test_target_is_met_from_either_side(measure: str, scope: str | None) -> None:
    graph = chain()
    for share in (0.8, 0.5, 0.3):
        wish = Wish(targets={measure: share}, scope=scope)
        planner = Planner(graph, wish)
        plan = planner.plan(score(graph, "l1"))
        left = planner.left(plan.keep)[measure]
        assert left == pytest.approx(share, abs=0.04)  # one channel of 16 is worth as much


@pytest.mark.parametrize("scope", ["local", "global", "isomorphic"])
def test_target_is_met_where_rows_must_stay_equal(scope: str) -> None:
    graph = analyse(load(MODELS / "fashion_vit.onnx"), attention="dims")
    planner = Planner(graph, Wish(targets={"macs": 0.6}, scope=scope))
    plan = planner.plan(score(graph, "lamp"))
    left = Planner(graph, Wish()).left(plan.keep)["macs"]
    assert left == pytest.approx(0.6, abs=0.01)
    assert stats_after(graph, operate(plan).model, plan.keep).macs == pytest.approx(
        left * stats(graph).macs
    )


def test_of_several_targets_the_hardest_binds() -> None:
    graph = chain()
    planner = Planner(graph, Wish(targets={"macs": 0.9, "params": 0.4}))
    left = planner.left(planner.plan(score(graph, "l1")).keep)
    assert left["params"] == pytest.approx(0.4, abs=0.04)
    assert left["macs"] < 0.9


def test_latency_is_a_target_where_it_is_given() -> None:
    graph = chain()
    costs = Planner(graph, Wish())
    wish = Wish(targets={"latency": 0.5})
    planner = Planner(graph, wish, latency=lambda keep: costs.left(keep)["macs"])
    left = planner.left(planner.plan(score(graph, "l1")).keep)
    assert left["latency"] == left["macs"] == pytest.approx(0.5, abs=0.04)


def test_ratio_takes_it_of_every_group_and_targets_of_those_of_a_kind() -> None:
    graph = chain()
    plan = Planner(graph, Wish(ratio=0.25)).plan(score(graph, "l1"))
    assert [plan.keep[group.id].size for group in graph.prunable] == [12, 18, 12]
    assert Wish(ratio=0.25).where == "local"
    assert Wish(targets={"macs": 0.5}).where == "isomorphic"
    assert Wish(targets={"macs": 0.5}, scope="global").where == "global"


def test_constraints_hold_under_targets() -> None:
    graph = chain()
    wish = Wish(targets={"macs": 0.5}, round_to=4, min_channels=8, ignore=("c1",))
    plan = Planner(graph, wish).plan(score(graph, "l1"))
    sizes = [plan.keep[group.id].size for group in graph.prunable]
    assert sizes[1] == 24
    assert all(size % 4 == 0 and size >= 8 for size in sizes)
    with pytest.raises(TargetError, match=r"macs=0\.1 cannot be reached"):
        Planner(graph, replace(wish, targets={"macs": 0.1})).plan(score(graph, "l1"))


# ------------------------------------------------------------------------------ the best of several


def test_best_moves_the_outputs_no_more_than_any_ranking_it_tried() -> None:
    graph, data = chain(), images(48)
    for wish in (Wish(ratio=0.3), Wish(targets={"macs": 0.6})):
        planner = Planner(graph, wish, data)
        plan, method, why = planner.best(0)
        judge = Judge(graph, data)
        drift = judge.drift(operate(plan).model)
        assert why.startswith(f"moves the outputs least on your data: {drift:.3g} (")
        for other in ("obs", "wanda", "activation", "lamp"):
            if wish.ratio:
                plain = planner.plan(score(graph, other, data=data))
                assert drift <= judge.drift(operate(plain).model) + 1e-12
        assert method.split(",")[0] in ("obs", "wanda", "activation", "lamp")
        again = planner.best(0)
        assert again[1:] == (method, why)
        assert all(np.array_equal(plan.keep[g], again[0].keep[g]) for g in plan.keep)


def test_aggregate_reaches_the_rankings_that_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def spied(*arguments: object, **options: object) -> object:
        asked.append(options["aggregate"])
        return score(*arguments, **options)  # type: ignore[arg-type]  # handed through

    monkeypatch.setattr(planning, "score", spied)
    Planner(chain(), Wish(ratio=0.5), images(20), aggregate="max").best(0)
    assert asked == ["max"] * 4


def test_plan_for_a_refit_is_by_obs_and_says_why() -> None:
    graph, data = chain(), images(96)
    plan, method, why = Planner(graph, Wish(ratio=0.5), data).best_restored(0)
    assert (method, why) == ("obs", "least error after refitting to your data")
    assert [plan.keep[group.id].size for group in graph.prunable] == [8, 12, 8]
    planner = Planner(graph, Wish(targets={"macs": 0.5}), data)
    plan, method, why = planner.best_restored(0)
    assert method == "obs"
    assert why.split(" ")[0] in ("local", "global")
    assert "moves the outputs least after a refit (local " in why
    assert planner.left(plan.keep)["macs"] == pytest.approx(0.5, abs=0.04)


def test_target_that_one_scope_cannot_reach_is_met_by_the_other() -> None:
    """``global`` leaves a tenth of every group; each group alone may lose more."""
    graph, data = analyse(conv_chain((3, 64), batch="N")), images(40)
    planner = Planner(graph, Wish(targets={"macs": 0.05}, scope="global"), data)
    with pytest.raises(TargetError):
        planner.plan(score(graph, "l1"))
    free = replace(planner, wish=Wish(targets={"macs": 0.05}))
    plan, _, why = free.best_restored(0)
    assert why.startswith("local ")
    assert free.left(plan.keep)["macs"] == pytest.approx(0.05, abs=0.01)
    beyond = replace(free, wish=Wish(targets={"macs": 0.05}, min_channels=32))
    for best in (beyond.best_restored, beyond.best):
        with pytest.raises(TargetError, match=r"macs=0\.05 cannot be reached"):
            best(0)


def test_a_refit_is_judged_on_samples_it_has_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, data = chain(), images(160)
    seen: list[int] = []
    known = planning.refit

    def spied(plan: object, pruned: object, fed: Data, **options: object) -> object:
        seen.append(fed.samples)
        for batch in fed.batches:
            assert not any(batch["x"] is judged["x"] for judged in judges[-1].batches)
        return known(plan, pruned, fed, **options)  # type: ignore[arg-type]  # handed through

    judges: list[Judge] = []

    class Watched(Judge):
        def __init__(self, graph: DependencyGraph, data: Data) -> None:
            super().__init__(graph, data)
            judges.append(self)

    monkeypatch.setattr(planning, "refit", spied)
    monkeypatch.setattr(planning, "Judge", Watched)
    Planner(graph, Wish(targets={"macs": 0.5}), data).best_restored(0)
    assert seen == [128, 128]  # three quarters, in whole batches
    assert sum(batch["x"].shape[0] for batch in judges[0].batches) == 32


# ---------------------------------------------------------------------------------------- the judge


def test_drift_is_the_squared_difference_by_the_variance_meaned_over_outputs() -> None:
    def outputs(scale: float) -> Model:
        return parsed(
            "g (float[N,3,8,8] x) => (float[N,3,8,8] y, float[N,3,8,8] z) {"
            "y = Mul(x, a) z = Neg(x)}",
            a=np.array(scale, np.float32),
        )

    graph, data = analyse(outputs(1.0)), images(100, size=30)
    judge = Judge(graph, data)
    assert [batch["x"].shape[0] for batch in judge.batches] == [30, 30, 30]
    assert judge.drift(outputs(1.0)) == 0
    x = np.concatenate([batch["x"] for batch in judge.batches]).astype(float)
    assert x.mean() == pytest.approx(0, abs=0.02)
    # The mean is taken batch by batch.
    spread = sum(np.square(b["x"] - b["x"].mean()).sum(dtype=float) for b in judge.batches)
    wanted = 0.25 * np.square(x).sum() / spread / 2
    assert judge.drift(outputs(0.5)) == pytest.approx(wanted, rel=1e-5)


def test_rounding_of_an_output_that_never_varies_does_not_decide() -> None:
    def outputs(more: float) -> Model:
        return parsed(
            """g (float[N,3,8,8] x) => (float[N,3,8,8] y, float[N,3,8,8] z) {
                y = Relu(x) o = Mul(x, zero) z = Add(o, one)
            }""",
            zero=np.array(0, np.float32),
            one=np.array(1 + more, np.float32),
        )

    judge = Judge(analyse(outputs(0)), images(20))
    assert judge.drift(outputs(2e-7)) < 1e-3
    assert judge.drift(outputs(0.1)) > 1


def test_groups_are_weighed_by_what_cutting_them_does() -> None:
    """Of two groups the one that the outputs hardly hear of ranks far lower."""
    rng = np.random.default_rng(3)
    weights = {
        "a": rng.standard_normal((16, 3, 1, 1)),
        "b": rng.standard_normal((4, 16, 1, 1)),
        "c": rng.standard_normal((16, 3, 1, 1)),
        "d": rng.standard_normal((4, 16, 1, 1)) * 1e-3,
    }
    model = parsed(
        """g (float[N,3,8,8] x) => (float[N,4,8,8] y) {
            p = Conv(x, a) q = Relu(p) r = Conv(q, b)
            s = Conv(x, c) t = Relu(s) u = Conv(t, d)
            y = Add(r, u)
        }""",
        **{name: array.astype(np.float32) for name, array in weights.items()},
    )
    graph, data = analyse(model), images(32)
    judge = Judge(graph, data)
    loud, faint = graph.prunable
    values = judge.weighed(score(graph, "l1"))
    assert values.method == "l1, groups measured"
    assert values[faint.id].mean() < 1e-4 * values[loud.id].mean()
    for group in graph.prunable:  # the order within a group stays
        plain = score(graph, "l1")[group.id]
        assert np.array_equal(np.argsort(plain), np.argsort(values[group.id]))
    plan = Planner(graph, Wish(ratio=0.4, scope="global"), data).plan(values)
    assert plan.keep[faint.id].size < plan.keep[loud.id].size
