"""Streams that sums alone see are cut in the basis that loses least."""

from __future__ import annotations

import numpy as np
import pytest

from onnxprune.analyse import analyse
from onnxprune.bases import Streams
from onnxprune.carried import Carried
from onnxprune.data import Data
from onnxprune.groups import DependencyGraph
from onnxprune.io import load
from onnxprune.model import Model
from onnxprune.problem import Problem
from onnxprune.refit import Fit
from onnxprune.restore import refit
from onnxprune.rewrite import operate
from onnxprune.runtime import session
from onnxprune.score import score
from onnxprune.select import PruningPlan, select
from onnxprune.survivors import Survivors
from onnxprune.types import AnyArray
from tests.small import MODELS, parsed


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def given(array: np.ndarray, size: int = 500) -> Data:
    batches = [{"x": array[start : start + size]} for start in range(0, len(array), size)]
    return Data(batches, "rows", random=False, samples=len(array))


def bottleneck(between: str = "n = Identity(h)", **weights: np.ndarray) -> Model:
    text = f"""
    agraph (float[N,16] x) => (float[N,12] y) {{
        h = Gemm(x, a, c)
        {between}
        y = Gemm(n, b)
    }}
    """
    layers = {"a": drawn(16, 8, seed=1), "b": drawn(8, 12, seed=2), "c": drawn(8, seed=3)}
    return parsed(text, **layers, **weights)


def cut(graph: DependencyGraph, ratio: float = 0.5) -> PruningPlan:
    return select(graph, score(graph, "l2"), ratio=ratio)


def streams(graph: DependencyGraph, plan: PruningPlan) -> list[str]:
    survivors = Survivors(graph.tracer.traces[0], graph.dead(plan.keep))
    carried = Carried(plan, graph.graph, survivors)
    return [one.group.name for one in Streams(carried).candidates()]


def outputs(model: Model, data: Data) -> AnyArray:
    loaded = session(model)
    (name,) = loaded.outputs
    return np.concatenate([loaded.run(batch)[name] for batch in data.batches])


# ----------------------------------------------------------------------------------- how good it is


def test_cut_of_a_linear_stream_reaches_the_best_there_is() -> None:
    """Four of eight hidden channels: a product of rank four, whose best error is known by SVD."""
    model = bottleneck()
    graph = analyse(model)
    plan = cut(graph)
    mixed = drawn(16, 16, seed=5)
    x = drawn(4000, 16, seed=6) @ mixed
    data, unseen = given(x), given(drawn(4000, 16, seed=7) @ mixed)
    made, layers, _ = refit(plan, operate(plan).model, data)
    y = outputs(model, unseen)
    found = float(np.square(outputs(made, unseen) - y).sum())
    _, sizes, _ = np.linalg.svd(y - y.mean(axis=0))
    best = float(np.square(sizes[4:]).sum())
    assert found == pytest.approx(best, rel=0.03)
    # The survivors as they were, and the reader's best regression on them, lose more.
    hidden = unseen_hidden(plan, unseen)
    rows = np.concatenate([hidden, np.ones((len(hidden), 1))], axis=1)
    plain = y - rows @ np.linalg.lstsq(rows, y, rcond=None)[0]
    assert float(np.square(plain).sum()) > 1.3 * best
    assert len(layers) == 2
    assert layers[1].after < 0.2


def unseen_hidden(plan: PruningPlan, data: Data) -> AnyArray:
    x = np.concatenate([batch["x"] for batch in data.batches])
    (kept,) = plan.keep.values()
    whole = x @ drawn(16, 8, seed=1) + drawn(8, seed=3)
    return whole[:, kept]


def test_survivors_look_like_what_they_were() -> None:
    """Of all bases of one space the nearest is taken: weights stay in their range."""
    graph = analyse(bottleneck())
    plan = cut(graph)
    surgery = operate(plan)
    made, _, changed = refit(plan, surgery.model, given(drawn(2000, 16, seed=6)))
    assert set(changed) >= {"a", "b"}
    before, after = (
        {t.name: np.frombuffer(t.raw_data, np.float32) for t in m.proto.graph.initializer}["a"]
        for m in (surgery.model, made)
    )
    assert np.corrcoef(before, after)[0, 1] > 0.7


# ------------------------------------------------------------------------------- what is a stream


@pytest.mark.parametrize(
    ("between", "weights"),
    [
        ("n = Relu(h)", {}),
        ("n = Mul(h, scales)", {"scales": drawn(8, seed=9)}),
        ("n = Softmax(h)", {}),
        ("r = Relu(h)\nn = Add(h, r)", {}),
    ],
    ids=["activation", "a scale for each channel", "softmax", "seen through two ways"],
)
def test_what_treats_channels_unlike_makes_no_stream(
    between: str, weights: dict[str, np.ndarray]
) -> None:
    graph = analyse(bottleneck(between, **weights))
    if graph.prunable:
        assert streams(graph, cut(graph)) == []


def test_inverted_residuals_have_streams_where_they_are_narrow() -> None:
    graph = analyse(load(MODELS / "fashion_mobile.onnx"))
    found = streams(graph, cut(graph))
    assert found == ["block1.body.narrow.conv.weight", "block4.body.narrow.conv.weight"]


@pytest.mark.parametrize(("attention", "count"), [("dims", 5), ("heads", 0)])
def test_values_of_attention_are_a_stream_head_by_head(attention: str, count: int) -> None:
    graph = analyse(load(MODELS / "fashion_vit.onnx"), attention=attention)
    plan = cut(graph)
    found = streams(graph, plan)
    assert len(found) == count
    if not count:
        return
    survivors = Survivors(graph.tracer.traces[0], graph.dead(plan.keep))
    carried = Carried(plan, graph.graph, survivors)
    one = Streams(carried).candidates()[0]
    assert len(one.group.cells) == 4
    (key,) = one.makers
    axis, places = carried.places(key, one.group.id) or (0, np.zeros(0))
    assert axis == 2
    assert places.tolist() == list(range(128, 192))  # behind the queries and keys


def test_residual_networks_have_none() -> None:
    graph = analyse(load(MODELS / "fashion_resnet.onnx"))
    assert streams(graph, cut(graph)) == []


# ------------------------------------------------------------------------------------ when it fails


@pytest.mark.parametrize("which", [0, 1], ids=["the maker", "the reader"])
def test_layer_that_keeps_its_weights_takes_the_basis_back(
    which: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a change of basis would be no change but damage."""
    graph = analyse(bottleneck())
    plan = cut(graph)
    written = Problem.written
    inputs = (16, 4)[which]

    def stubborn(self: Problem, fit: Fit) -> object:
        return {} if self.start.shape[1] == inputs else written(self, fit)

    monkeypatch.setattr(Problem, "written", stubborn)
    pruned = operate(plan).model
    data = given(drawn(2000, 16, seed=6))
    made, _, changed = refit(plan, pruned, data)
    assert "a" not in changed
    y = outputs(bottleneck(), data)
    kept = float(np.square(outputs(pruned, data) - y).sum())
    assert float(np.square(outputs(made, data) - y).sum()) <= kept
