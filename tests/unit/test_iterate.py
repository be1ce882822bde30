"""Cuts in several steps, and the analysis on what a step left of the weights."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from onnxprune.analyse import analyse
from onnxprune.data import Data, load_data
from onnxprune.errors import UsageError
from onnxprune.expand import expanded
from onnxprune.groups import DependencyGraph
from onnxprune.io import load
from onnxprune.iterate import Chosen, Step, in_steps, shares
from onnxprune.model import Model
from onnxprune.pipeline import shrink
from onnxprune.planning import Planner, Wish
from onnxprune.restore import refit
from onnxprune.rewrite import operate
from onnxprune.runtime import session
from onnxprune.score import Importance, score
from onnxprune.select import PruningPlan, select
from onnxprune.types import ChannelGroup
from tests.small import MODELS, conv_chain


def calibration(model: Model, limit: int = 24) -> Data:
    return load_data(MODELS / "fashion_calib.npz", model, limit=limit)


def gap(first: Model, second: Model, data: Data) -> float:
    """Largest difference of the outputs, as a share of the largest output."""
    one, two = (session(model).run(data.batches[0]) for model in (first, second))
    return max(float(np.abs(one[n] - two[n]).max() / np.abs(one[n]).max()) for n in one)


# ---------------------------------------------------------------------------------- expanded models


@pytest.mark.parametrize(
    ("name", "attention"),
    [("resnet", "heads"), ("mobile", "heads"), ("vit", "heads"), ("vit", "dims")],
)
def test_expanded_model_computes_what_the_restored_one_does(name: str, attention: str) -> None:
    """The original's shapes, refitted weights where they belong, zeros that hide the rest."""
    model = load(MODELS / f"fashion_{name}.onnx")
    graph = analyse(model, attention=attention)
    plan = select(graph, score(graph, "l2"), ratio=0.4)
    data = calibration(model)
    made, _, changed = refit(plan, operate(plan).model, data)
    grown = expanded(plan, made, changed)
    assert grown.groups == graph.groups
    assert gap(made, grown.graph.model, data) < 1e-5
    assert gap(made, model, data) > 1e-3
    shapes = {name: w.shape for name, w in grown.graph.model.weights().items()}
    for constant, weight in model.weights().items():
        if constant in shapes:
            assert shapes[constant] == weight.shape


def test_expanded_plain_cut_is_the_masked_twin() -> None:
    model = conv_chain((3, 8, 12, 6))
    graph = analyse(model)
    plan = select(graph, score(graph, "l1"), ratio=0.5)
    made = operate(plan).model
    grown = expanded(plan, made, ())
    x = np.random.default_rng(0).standard_normal((1, 3, 8, 8)).astype(np.float32)
    data = Data([{"x": x}], "one", random=False, samples=1)
    assert gap(made, grown.graph.model, data) < 1e-5


# ------------------------------------------------------------------------------------- the schedule


def test_schedules_end_with_everything_gone() -> None:
    assert shares(1, "polynomial") == [1.0]
    assert shares(4, "linear") == pytest.approx([0.25, 0.5, 0.75, 1])
    assert shares(2, "polynomial") == pytest.approx([0.875, 1])
    for schedule in ("linear", "polynomial"):
        found = shares(7, schedule)
        assert found == sorted(found)
        assert found[-1] == 1


@pytest.mark.parametrize(
    ("steps", "schedule"),
    [(0, "linear"), (101, "linear"), (2.5, "linear"), (True, "linear"), (3, "cosine")],
)
def test_no_such_schedule(steps: int, schedule: str) -> None:
    with pytest.raises(UsageError):
        shares(steps, schedule)


@pytest.mark.parametrize("scope", ["local", "global", "isomorphic"])
@pytest.mark.parametrize("targets", [{}, {"macs": 0.5}])
def test_what_went_in_a_step_stays_away(scope: str, targets: dict[str, float]) -> None:
    """Even under a ranking that changes its mind completely from step to step."""
    graph = analyse(load(MODELS / "fashion_resnet.onnx"))
    wish = Wish(ratio=0.0 if targets else 0.5, targets=targets, scope=scope)
    plans: list[PruningPlan] = []

    def choose(step: Step) -> Chosen:
        number = len(plans)
        planner = Planner(graph, wish.part(step.share), gone=step.gone)
        rng = np.random.default_rng(number)

        def moody(group: ChannelGroup, _: DependencyGraph) -> np.ndarray:
            return rng.random(group.size)

        plans.append(planner.plan(planner.scored(moody, 0)))
        return plans[-1], "moody", ""

    last, _, _ = in_steps(choose, lambda plan: plan.graph, 4, "linear")
    assert last is plans[-1]
    assert len(plans) == 4
    for earlier, later in pairwise(plans):
        assert later.removes > earlier.removes
        for group, kept in later.keep.items():
            assert np.isin(kept, earlier.keep[group]).all()
    left = Planner(graph, Wish()).left(last.keep)["macs"]
    if targets:
        assert left == pytest.approx(0.5, abs=0.01)
    elif scope == "local":
        for group in graph.prunable:
            assert last.keep[group.id].size == group.size - int(0.5 * group.size)


def test_each_step_ranks_what_the_last_one_left() -> None:
    model = conv_chain((3, 8, 12, 6), bn=False)
    graph = analyse(model)
    seen: list[Importance] = []

    def choose(step: Step) -> Chosen:
        planner = Planner(
            graph, Wish(ratio=0.5).part(step.share), ranked=step.ranked, gone=step.gone,
        )  # fmt: skip
        seen.append(planner.scored("l1", 0))
        return planner.plan(seen[-1]), "l1", ""

    in_steps(choose, lambda plan: expanded(plan, operate(plan).model, ()), 2, "linear")
    first, second = (group.id for group in graph.prunable[:2])
    weights = model.weights()
    filters = next(w.read() for w in weights.values() if w.shape == (12, 8, 3, 3))
    gone = np.argsort(seen[0][first])[:2]
    alive = np.setdiff1d(np.arange(8), gone)
    wanted = np.abs(filters[:, alive]).sum(axis=(1, 2, 3), dtype=np.float64)
    stayed = seen[1][second] >= 0
    np.testing.assert_allclose(seen[1][second][stayed], wanted[stayed], rtol=1e-6)
    assert (~stayed).sum() == 3


# ---------------------------------------------------------------------------------------- in shrink


@pytest.mark.parametrize("restore", ["none", "bias", "pictures", "refit"])
def test_shrink_in_steps_is_exact_and_repeats_from_its_recipe(restore: str, tmp_path: Path) -> None:
    source = MODELS / "fashion_vgg.onnx"
    data = calibration(load(source)) if restore == "refit" else None
    made, report = shrink(
        source, ratio=0.5, steps=3, schedule="linear", importance="l2", restore=restore, data=data,
        output=tmp_path / "one.onnx",
    )  # fmt: skip
    assert report.verdict.twin is not None
    assert report.verdict.twin.passed
    _, once = shrink(source, ratio=0.5, importance="l2", restore=restore, data=data)
    assert once.after is not None
    assert report.after is not None
    assert report.after.params == once.after.params
    assert report.recipe["options"]["steps"] == 3  # type: ignore[index]
    again, _ = shrink(source, recipe=tmp_path / "one.onnx", data=data)
    assert again.proto.SerializeToString() == made.proto.SerializeToString()


@pytest.mark.parametrize(
    ("extra", "taken"),
    [({}, "dims"), ({"attention": "heads"}, "heads"), ({"restore": "none"}, "heads")],
    ids=["auto after a refit", "asked for", "no refit to judge by"],
)
def test_attention_is_cut_in_the_way_that_a_refit_says(extra: dict[str, str], taken: str) -> None:
    source = MODELS / "fashion_vit.onnx"
    data = calibration(load(source), 256)
    _, report = shrink(source, ratio=0.5, data=data, importance="l2", **extra)  # type: ignore[arg-type]
    assert report.recipe["options"]["attention"] == taken  # type: ignore[index]
    assert ("attention by dims after a refit (heads" in report.importance_why) is (not extra)
    units = {group.unit for group in report.groups if group.frozen is None}
    assert ("head" in units) is (taken == "heads")
    assert report.verdict.twin is not None
    assert report.verdict.twin.passed


def test_without_data_heads_go_whole() -> None:
    _, report = shrink(MODELS / "fashion_vit.onnx", ratio=0.5)
    assert "head" in {group.unit for group in report.groups}
