"""Targets that lean towards what the readers of a layer miss."""

from __future__ import annotations

import numpy as np
import pytest

import onnxprune.lean
from onnxprune.analyse import analyse
from onnxprune.graph import Graph
from onnxprune.lean import Leaning
from onnxprune.model import Model
from onnxprune.pipeline import shrink
from onnxprune.planning import Judge
from onnxprune.restore import _Refit, refit
from onnxprune.rewrite import operate
from onnxprune.score import score
from onnxprune.select import PruningPlan, select
from onnxprune.types import Float32Array
from tests.small import parsed
from tests.unit.test_restore import given


def drawn(*shape: int, seed: int = 0) -> Float32Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def perceptron(activation: str = "Relu", seed: int = 0) -> Model:
    """Eight inputs, two layers of sixteen units behind an activation, three outputs."""
    text = f"""
    agraph (float[N,8] x) => (float[N,3] y) {{
        s = MatMul(x, zeroth)
        r = {activation}(s)
        t = MatMul(r, first)
        u = Add(t, shift)
        a = {activation}(u)
        y = MatMul(a, second)
    }}
    """
    weights = {"zeroth": drawn(8, 16, seed=seed + 3), "first": drawn(16, 16, seed=seed)}
    weights |= {"second": drawn(16, 3, seed=seed + 1), "shift": 0.3 * drawn(16, seed=seed + 2)}
    return parsed(text, **weights)


def cut(model: Model, ratio: float = 0.5) -> PruningPlan:
    graph = analyse(model)
    return select(graph, score(graph, "l2"), ratio=ratio)


def begun(plan: PruningPlan, x: Float32Array) -> _Refit:
    """A refit that has run once."""
    run = _Refit(plan, operate(plan).model, given(x), 0, frozenset(), {})
    run.run(None)
    return run


@pytest.mark.parametrize("activation", ["Relu", "Identity", "HardSwish"])
@pytest.mark.parametrize("seed", [0, 10, 20])
def test_units_that_are_refitted_for_their_reader_serve_it_better(
    activation: str, seed: int
) -> None:
    plan = cut(perceptron(activation, seed))
    plain = operate(plan).model
    data, unseen = given(drawn(600, 8, seed=3)), given(drawn(600, 8, seed=4))
    once, again = (refit(plan, plain, data, again=count)[0] for count in (0, 3))
    judge = Judge(plan.graph, unseen)
    if activation == "Identity":  # a basis of its own is as good as it gets
        assert judge.drift(again) <= judge.drift(once) * 1.01
    else:
        assert judge.drift(again) < judge.drift(once) * 0.95


def test_targets_move_as_the_gradient_of_what_the_reader_misses() -> None:
    run = begun(cut(perceptron()), drawn(200, 8, seed=3))
    leaning, goal = run.leaning, run.leaning.links[0].site.goal
    missed = leaning.missed(run.wanted, run.made)
    leaning.follow(run.value, run.wanted, run.made)
    work: Graph = run.work
    reader = leaning.links[0].readers[0]
    weight = run.value(reader.shown.leaf)
    # Were the unit's outputs moved by the whole step, the reader would miss less.
    far = {name: list(values) for name, values in run.made.items()}
    for batch, step in enumerate(leaning.moved[goal]):
        change = np.maximum(run.made[goal][batch] + step, 0) - np.maximum(run.made[goal][batch], 0)
        far[reader.goal][batch] = far[reader.goal][batch] + change @ weight
    assert leaning.missed(run.wanted, far) < 0.7 * missed
    assert reader.goal not in leaning.moved  # nothing reads it
    assert work.producer[goal].op_type == "Add"


def test_where_nothing_is_missed_nothing_moves() -> None:
    run = begun(cut(perceptron()), drawn(200, 8, seed=3))
    run.leaning.missed(run.wanted, run.wanted)
    run.leaning.follow(run.value, run.wanted, run.wanted)
    for steps in run.leaning.moved.values():
        assert not any(step.any() for step in steps)


@pytest.mark.parametrize("wrong", [np.inf, np.nan])
def test_nothing_leans_where_numbers_overflow(wrong: float) -> None:
    plan, x = cut(perceptron()), drawn(64, 8, seed=3)
    run = _Refit(plan, operate(plan).model, given(x), 0, frozenset(), {})
    found = run.run(None)
    run.made = {name: [np.full_like(a, wrong) for a in made] for name, made in run.made.items()}
    assert run.leaning.missed(run.wanted, run.made) == np.inf
    assert run.leaning_further(found, 3, None) is found
    assert not run.leaning.moved


def test_tensors_that_are_too_large_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, x = cut(perceptron()), drawn(200, 8, seed=3)
    data = given(x)
    once = refit(plan, operate(plan).model, data)[0]
    monkeypatch.setattr(onnxprune.lean, "_MOST_BYTES", 4 * 200 * (8 + 3) - 1)
    run = begun(plan, x)
    assert (run.leaning.links, run.leaning.goals, run.made) == ([], set(), {})
    again = refit(plan, operate(plan).model, data, again=2)[0]
    assert again.proto.SerializeToString() == once.proto.SerializeToString()


def test_refits_end_where_readers_miss_no_less(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, data = cut(perceptron()), given(drawn(200, 8, seed=3))
    once = refit(plan, operate(plan).model, data)[0]
    told = iter((1.0, 2.0))
    monkeypatch.setattr(Leaning, "missed", lambda *_: next(told))
    monkeypatch.setattr(
        Leaning, "follow",
        lambda self, *_: self.moved.update(
            {self.links[0].site.goal: [np.ones_like(a) for a in data_of(self, data)]}
        ),
    )  # fmt: skip
    kept = refit(plan, operate(plan).model, data, again=5)[0]
    assert _weights(kept) == _weights(once)


def data_of(leaning: Leaning, data: object) -> list[Float32Array]:
    return [np.ones((len(batch["x"]), 8), np.float32) for batch in data.batches]  # type: ignore[attr-defined]


def _weights(model: Model) -> dict[str, bytes]:
    return {name: one.read().tobytes() for name, one in model.weights().items()}


@pytest.mark.parametrize(
    ("options", "times"), [({}, 1), ({"then": "2:4"}, 0)], ids=["plain", "pattern"]
)
def test_weights_in_a_pattern_are_refitted_once(
    options: dict[str, str], times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []

    def spy(*given_: object, again: int = 0, **more: object) -> object:
        told.append(again)
        return refit(*given_, again=again, **more)  # type: ignore[arg-type]  # as given

    monkeypatch.setattr("onnxprune.restoring.refit", spy)
    x = {"x": drawn(100, 8, seed=3)}
    shrink(perceptron(), ratio=0.5, data=x, verify="none", **options)  # type: ignore[arg-type]
    assert told == [times]
