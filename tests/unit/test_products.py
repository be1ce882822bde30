"""Queries and keys are cut in the basis that keeps the scores nearest."""

from __future__ import annotations

import numpy as np
import pytest

from onnxprune.analyse import analyse
from onnxprune.carried import Carried
from onnxprune.data import Data
from onnxprune.groups import DependencyGraph
from onnxprune.io import load
from onnxprune.model import Model
from onnxprune.problem import Problem
from onnxprune.products import Products
from onnxprune.refit import Fit
from onnxprune.restore import refit
from onnxprune.rewrite import operate
from onnxprune.runtime import session
from onnxprune.score import score
from onnxprune.select import PruningPlan, select
from onnxprune.survivors import Survivors
from onnxprune.types import AnyArray
from tests.small import MODELS, parsed

LENGTH, WIDTH, HEADS, SIZE = 6, 12, 2, 8


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


MIX = drawn(WIDTH, WIDTH, seed=5)


def given(seed: int, count: int = 1500) -> Data:
    x = drawn(count, LENGTH, WIDTH, seed=seed) @ MIX
    return Data([{"x": part} for part in np.split(x, 3)], "rows", random=False, samples=count)


SPLIT = """
    q0 = MatMul(x, wq)
    k0 = MatMul(x, wk)
"""
FUSED = """
    both = MatMul(x, w)
    q0, k0 = Split <axis = 2> (both, sizes)
"""
TURNED = """
    both = MatMul(x, w)
    k0, q0 = Split <axis = 2> (both, sizes)
"""
SCORES = "s = MatMul(q, k)"


def attention(made: str = SPLIT, seen: str = SCORES, **weights: np.ndarray) -> Model:
    """Scores of two heads, of queries and keys from one layer or two."""
    text = f"""
    agraph (float[N,{LENGTH},{WIDTH}] x) => (float[N,{HEADS},{LENGTH},{LENGTH}] s) {{
        {made}
        q1 = Reshape(q0, split)
        q2 = Transpose <perm = [0, 2, 1, 3]> (q1)
        q = Mul(q2, factor)
        k1 = Reshape(k0, split)
        k = Transpose <perm = [0, 2, 3, 1]> (k1)
        {seen}
    }}
    """
    first, second = (drawn(WIDTH, HEADS * SIZE, seed=seed) for seed in (1, 2))
    sides = (second, first) if made is TURNED else (first, second)
    constants = {
        "wq": first,
        "wk": second,
        "w": np.concatenate(sides, axis=1),
        "sizes": np.array([HEADS * SIZE] * 2),
        "split": np.array([0, 0, HEADS, SIZE]),
        "factor": np.array(SIZE**-0.5, np.float32),
    } | weights
    return parsed(text, **{name: a for name, a in constants.items() if name in text})


def cut(graph: DependencyGraph, ratio: float = 0.5) -> PruningPlan:
    return select(graph, score(graph, "l2"), ratio=ratio)


def products(graph: DependencyGraph, plan: PruningPlan) -> list[str]:
    survivors = Survivors(graph.tracer.traces[0], graph.dead(plan.keep))
    found = Products(Carried(plan, graph.graph, survivors)).candidates()
    return [one.product for one in found]


def outputs(model: Model, data: Data) -> AnyArray:
    loaded = session(model)
    (name,) = loaded.outputs
    return np.concatenate([loaded.run(batch)[name] for batch in data.batches])


def lost(model: Model, made: Model, data: Data) -> float:
    """Energy of the difference between tokens that have nothing to do with one another."""
    apart = ~np.eye(LENGTH, dtype=bool)  # on the diagonal a token meets itself
    return float(np.square(outputs(made, data) - outputs(model, data))[..., apart].sum())


# ----------------------------------------------------------------------------------- how good it is


@pytest.mark.parametrize("made", [SPLIT, FUSED, TURNED], ids=["apart", "fused", "keys first"])
def test_half_of_the_dimensions_loses_what_the_best_product_of_that_rank_loses(made: str) -> None:
    """The scores are xᵀ Wq Wkᵀ x: the best rank is known by SVD of what whitened inputs see."""
    model = attention(made)
    graph = analyse(model, attention="dims")
    plan = cut(graph)
    pruned = operate(plan).model
    restored, _, _ = refit(plan, pruned, given(6))
    unseen = given(7)
    best = 0.0
    first, second = (drawn(WIDTH, HEADS * SIZE, seed=seed) for seed in (1, 2))
    for head in range(HEADS):
        mine = slice(head * SIZE, (head + 1) * SIZE)
        whitened = MIX @ first[:, mine] @ second[:, mine].T @ MIX.T
        sizes = np.linalg.svd(whitened.astype(np.float64), compute_uv=False)
        best += float(np.square(sizes[SIZE // 2 :]).sum()) / SIZE
    pairs = unseen.samples * LENGTH * (LENGTH - 1)
    found = lost(model, restored, unseen)
    assert found == pytest.approx(best * pairs, rel=0.05)
    assert lost(model, pruned, unseen) > 2 * found


def test_survivors_look_like_what_they_were() -> None:
    graph = analyse(attention(), attention="dims")
    plan = cut(graph)
    pruned = operate(plan).model
    restored, layers, changed = refit(plan, pruned, given(6))
    assert set(changed) == {"wq", "wk"}
    assert len(layers) == 2
    for name in changed:
        before, after = (
            {t.name: np.frombuffer(t.raw_data, np.float32) for t in m.proto.graph.initializer}[name]
            for m in (pruned, restored)
        )
        assert np.corrcoef(before, after)[0, 1] > 0.5
        assert np.linalg.norm(after) == pytest.approx(np.linalg.norm(before), rel=0.5)


def test_mean_of_the_keys_counts_for_nothing_under_a_softmax() -> None:
    """Keys shifted by a bias far larger than they are: Softmax does not see the shift."""
    shift = 50 * drawn(HEADS * SIZE, seed=11)
    apart = """
    q0 = MatMul(x, wq)
    plain = MatMul(x, wk)
    k0 = Add(plain, shift)
    """
    model = attention(apart, "t = MatMul(q, k)\ns = Softmax(t)", shift=shift)
    still = attention(SPLIT, "t = MatMul(q, k)\ns = Softmax(t)")
    found = []
    for one in (model, still):
        plan = cut(analyse(one, attention="dims"))
        restored, _, _ = refit(plan, operate(plan).model, given(6))
        found.append(lost(one, restored, given(7)))
    assert found[0] == pytest.approx(found[1], rel=0.05)


# ------------------------------------------------------------------------------ what is a product


def test_queries_and_keys_of_trained_attention_are_found() -> None:
    graph = analyse(load(MODELS / "fashion_vit.onnx"), attention="dims")
    assert len(products(graph, cut(graph))) == 5
    graph = analyse(load(MODELS / "fashion_vit.onnx"), attention="heads")
    assert products(graph, cut(graph)) == []


@pytest.mark.parametrize(
    ("between", "weights"),
    [
        ("q0 = Relu(plain)", {}),
        ("q0 = Mul(plain, scales)", {"scales": drawn(HEADS * SIZE, seed=9)}),
        ("q0 = Tanh(plain)", {}),
    ],
    ids=["activation", "a scale for each dimension", "bounded"],
)
def test_what_treats_dimensions_unlike_makes_no_product(
    between: str, weights: dict[str, np.ndarray]
) -> None:
    made = f"plain = MatMul(x, wq)\n{between}\nk0 = MatMul(x, wk)\n"
    graph = analyse(attention(made, **weights), attention="dims")
    assert graph.prunable
    assert products(graph, cut(graph)) == []


def test_dimensions_that_two_products_read_are_left_as_they_are() -> None:
    seen = "t = MatMul(q, k)\nu = Add(q, q)\nw2 = MatMul(u, k)\ns = Add(t, w2)"
    graph = analyse(attention(SPLIT, seen), attention="dims")
    assert graph.prunable
    assert products(graph, cut(graph)) == []


# ------------------------------------------------------------------------------------ when it fails


def test_layer_that_keeps_its_weights_takes_the_basis_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Queries in one basis and keys in another would make nonsense of the scores."""
    model = attention()
    plan = cut(analyse(model, attention="dims"))
    written = Problem.written

    def stubborn(self: Problem, fit: Fit) -> object:
        name = self.affines[0].site.layer.weight
        return {} if name == "wk" else written(self, fit)

    monkeypatch.setattr(Problem, "written", stubborn)
    pruned = operate(plan).model
    restored, _, changed = refit(plan, pruned, given(6))
    assert changed == ()
    assert np.array_equal(outputs(restored, given(7)), outputs(pruned, given(7)))
