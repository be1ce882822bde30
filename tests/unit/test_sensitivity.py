"""Cutting one group at a time: only what lies behind is run, and the result is the twin's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from onnxprune.analyse import analyse
from onnxprune.data import random_data
from onnxprune.feeds import Batch
from onnxprune.gauges import Drifted, Gauge
from onnxprune.groups import DependencyGraph
from onnxprune.io import as_model, load
from onnxprune.model import Model
from onnxprune.runtime import session
from onnxprune.score import score
from onnxprune.sensitivity import BUDGET, Bench, Study, one_family
from onnxprune.suffix import Borders, Suffix, border_bytes, families
from onnxprune.twin import masked_twin
from tests.small import MODELS, array, conv_chain, parsed
from tests.zoo.shared import needs_zoo, network

RATIOS = (0.1, 0.5, 0.9)
TOLERANCE = 1e-4


def batches_of(model: Model, size: int = 2) -> tuple[Batch, ...]:
    return tuple(random_data(model, batches=size).batches)


def study_of(
    model: Model, batches: tuple[Batch, ...], *, budget: int = BUDGET, attention: str = "heads"
) -> tuple[Study, DependencyGraph]:
    graph = analyse(model, attention=attention)
    todo = tuple(range(len(families(graph))))
    study = Study(
        b"", attention, {}, "l1", 0, RATIOS, batches, Gauge(), 0.0, todo, budget
    )  # the model is given to the bench as an analysis
    return study, graph


def drift_of_twins(graph: DependencyGraph, batches: tuple[Batch, ...]) -> dict[int, list[float]]:
    """The oracle: every twin run in full."""
    importance = score(graph, "l1")
    original = session(graph.graph.source)
    reference = [original.run(batch) for batch in batches]
    found: dict[int, list[float]] = {}
    for number, family in enumerate(families(graph)):
        for ratio in RATIOS:
            plan = one_family(graph, importance, family, ratio)
            twin, drifted = session(masked_twin(plan)), Drifted()
            for batch, wanted in zip(batches, reference, strict=True):
                drifted.add(wanted, twin.run(batch))
            found.setdefault(number, []).append(drifted.result())
    return found


def assert_equals_twins(model: Model, **options: object) -> None:
    batches = batches_of(model)
    study, graph = study_of(model, batches, **options)  # type: ignore[arg-type]
    bench = Bench(study, graph, score(graph, "l1"))
    wanted = drift_of_twins(graph, batches)
    assert wanted
    assert any(any(losses) for losses in wanted.values())
    for number, losses in wanted.items():
        points = bench.measure(number)
        assert [point.ratio for point in points] == list(RATIOS)
        for point, loss in zip(points, losses, strict=True):
            assert point.loss == pytest.approx(loss, rel=TOLERANCE, abs=TOLERANCE)


@pytest.mark.parametrize(
    "name", ["fashion_mobile", "fashion_resnet", "fashion_vgg", "fashion_vit", "paddleocr_cls"]
)
def test_each_point_is_what_the_twin_gives_in_full(name: str) -> None:
    assert_equals_twins(load(MODELS / f"{name}.onnx"))


def test_heads_cut_by_dimensions_are_masked_at_the_activations() -> None:
    assert_equals_twins(load(MODELS / "fashion_vit.onnx"), attention="dims")


@needs_zoo
@pytest.mark.parametrize(
    "file",
    [
        "torchscript/shufflenet_v2_x1_0.onnx.xz",
        "torchscript/regnetx_004.onnx.xz",
        "torchscript/levit_conv_128s.onnx.xz",
    ],
)
@pytest.mark.slow
def test_zoo_network_gives_what_its_twins_give(file: str) -> None:
    assert_equals_twins(as_model(network(file)))


def test_one_batch_at_a_time_gives_the_same() -> None:
    assert_equals_twins(conv_chain((3, 8, 12, 6), batch="N"), budget=0)


def test_small_budget_runs_the_original_once_for_each_chunk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = conv_chain((3, 8, 12, 6), batch="N")
    graph = analyse(model)
    wanted = {0: ("r0", "y"), 1: ("r1", "y"), 2: ("r2", "y")}
    batches = batches_of(model, 4)
    sizes = border_bytes(graph, {"r0", "r1", "r2", "y"}, batches)
    exact = sum(session(model).run(batch)["y"].nbytes for batch in batches)
    assert sizes["y"] == exact
    ran: list[tuple[str, ...]] = []
    plain = Borders._run
    monkeypatch.setattr(
        Borders, "_run", lambda self, names: (ran.append(tuple(names)), plain(self, names))[1]
    )
    borders = Borders(
        graph.graph, batches, wanted, sizes, sizes["r0"] + sizes["r1"] + sizes["y"], None
    )
    for number in (0, 1, 2):
        assert [sorted(kept) for kept in borders.of(number)] == [sorted(wanted[number])] * 4
    assert ran == [("r0", "y", "r1"), ("r2", "y")]


def test_suffix_holds_the_nodes_behind_the_readers_only() -> None:
    model = conv_chain((3, 8, 12, 6))
    graph = analyse(model)
    plan = one_family(graph, score(graph, "l1"), families(graph)[1], 0.5)
    suffix = Suffix.of([plan])
    assert suffix.changed == ("w2",)
    assert suffix.border == ("r1",)
    assert suffix.outputs == ("y",)
    zeroed = suffix.feeds(0)["w2"]
    gone = np.setdiff1d(np.arange(12), plan.keep[1])
    assert not zeroed[:, gone].any()
    assert np.array_equal(zeroed[:, plan.keep[1]], array(model, "w2")[:, plan.keep[1]])


def test_weight_that_is_not_finite_is_zeroed_where_it_is_made() -> None:
    rng = np.random.default_rng(0)
    first = rng.standard_normal((4, 3)).astype(np.float32)
    first[0, 0] = np.nan
    model = parsed(
        "g (float[2,3] x) => (float[2,5] y) "
        "{h = Gemm<transB=1>(x, a) r = Relu(h) y = Gemm<transB=1>(r, b)}",
        a=first,
        b=rng.standard_normal((5, 4)).astype(np.float32),
    )
    graph = analyse(model)
    importance = {0: np.array([0.0, 1.0, 2.0, 3.0])}
    plan = one_family(graph, importance, (0,), 0.5)  # type: ignore[arg-type]
    suffix = Suffix.of([plan])
    assert suffix.changed == ("a", "b")
    assert suffix.border == ("x",)
    batch = batches_of(model)[0]
    feeds = suffix.feeds(0)
    got = suffix.load(batch, feeds).run({**batch, **feeds})["y"]
    assert np.isfinite(got).all()
    assert np.allclose(got, session(masked_twin(plan)).run(batch)["y"], atol=1e-5)


def test_sequences_are_computed_again_and_not_compared() -> None:
    rng = np.random.default_rng(0)
    model = parsed(
        """g (float[N,6] x) => (float[N,5] y, seq(float[N,3]) parts) {
            parts = SplitToSequence<axis=1>(x, three)
            joined = ConcatFromSequence<axis=1>(parts)
            h = Gemm<transB=1>(joined, a)
            r = Relu(h)
            z = Gemm<transB=1>(r, b)
            first = SequenceAt(parts, zero)
            mean = ReduceMean<keepdims=1>(first)
            y = Add(z, mean)
        }""",
        three=np.array(3),
        zero=np.array(0),
        a=rng.standard_normal((8, 6)).astype(np.float32),
        b=rng.standard_normal((5, 8)).astype(np.float32),
    )
    assert_equals_twins(model)


def test_ratio_below_one_unit_costs_nothing_and_is_not_run() -> None:
    model = conv_chain((3, 8, 12))
    batches = batches_of(model)
    study, graph = study_of(model, batches)
    points = Bench(study, graph, score(graph, "l1")).measure(0)
    assert [point.removed for point in points] == [0, 4, 7]
    assert (points[0].figure, points[0].loss) == (0.0, 0.0)
    assert 0 < points[1].loss < points[2].loss


def test_study_opens_from_a_path_as_a_worker_does(tmp_path: Path) -> None:
    path = MODELS / "fashion_vgg.onnx"
    model = load(path)
    batches = batches_of(model)
    study, graph = study_of(model, batches)
    here = Bench(study, graph, score(graph, "l1")).measure(2)
    there = Study(path, "heads", {}, "l1", 0, RATIOS, batches, Gauge(), 0.0, study.todo).open(1)(2)
    assert [point.removed for point in there] == [point.removed for point in here]
    assert [p.loss for p in there] == pytest.approx([p.loss for p in here], rel=1e-3)
