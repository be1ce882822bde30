"""Biases fitted to inputs: what they aim at, and that they keep units as active as they were."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from onnxprune.analyse import analyse
from onnxprune.calibrate import stream
from onnxprune.data import Data
from onnxprune.groups import DependencyGraph
from onnxprune.io import load
from onnxprune.model import Model
from onnxprune.recentre import Recentring
from onnxprune.rewrite import operate
from onnxprune.score import score
from onnxprune.select import PruningPlan, select
from onnxprune.types import AnyArray
from tests.small import MODELS, parsed


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def images(count: int = 64) -> Data:
    x = 1 + normal(count, 3, 8, 8, seed=5)
    return Data([{"x": x[:40]}, {"x": x[40:]}], "images", random=False, samples=count)


def model_with(activation: str, *, tail: str = "y = Conv(r, w2)", out: str = "N,2,8,8") -> Model:
    return parsed(
        f"""g (float[N,3,8,8] x) => (float[{out}] y) {{
        a = Conv(x, w0) h = Relu(a) s = Conv(h, w1, b1) r = {activation}(s) {tail}}}""",
        w0=normal(12, 3, 1, 1), w1=normal(6, 12, 1, 1, seed=1), b1=normal(6, seed=2),
        w2=normal(2, 6, 1, 1, seed=3),
    )  # fmt: skip


def cut_first(graph: DependencyGraph) -> PruningPlan:
    """Five of the twelve channels that ``w0`` makes go."""
    group = next(g for g in graph.prunable if g.size == 12)
    rest = {g.id: np.arange(g.size) for g in graph.prunable}
    return PruningPlan(graph, rest | {group.id: np.arange(7)}, {})


def seen(model: Model, name: str, data: Data) -> np.ndarray:
    batches = [np.asarray(values[name], float) for values in stream(model, [name], data)]
    return np.concatenate(batches).swapaxes(0, 1).reshape(batches[0].shape[1], -1)


def before_and_after(model: Model, data: Data, name: str = "s") -> tuple[AnyArray, ...]:
    graph = analyse(model)
    plan = cut_first(graph)
    fitted = operate(Recentring(graph, data).recentred(plan)).model
    return tuple(seen(one, name, data) for one in (model, operate(plan).model, fitted))


@pytest.mark.parametrize("activation", ["Relu", "LeakyRelu", "HardSwish"])
def test_mean_in_front_of_an_activation_keeps_its_ratio_to_the_spread(activation: str) -> None:
    was, cut, made = before_and_after(model_with(activation), images())
    ratio = was.mean(1) / was.std(1)
    assert np.abs(cut.mean(1) / cut.std(1) - ratio).max() > 0.3  # the cut alone loses it
    keeps = made.std(1) <= was.std(1)  # where the spread has grown the mean is the original's
    assert keeps.any()
    np.testing.assert_allclose((made.mean(1) / made.std(1))[keeps], ratio[keeps], atol=1e-3)
    np.testing.assert_allclose(made.mean(1)[~keeps], was.mean(1)[~keeps], atol=1e-3)
    np.testing.assert_allclose(made.std(1), cut.std(1), rtol=1e-4)  # nothing but a shift


@pytest.mark.parametrize("activation", ["Sigmoid", "HardSigmoid", "Tanh"])
def test_mean_in_front_of_a_gate_is_the_originals(activation: str) -> None:
    was, cut, made = before_and_after(model_with(activation), images())
    assert np.abs(cut.mean(1) - was.mean(1)).max() > 0.1
    np.testing.assert_allclose(made.mean(1), was.mean(1), atol=1e-4)


def test_share_of_active_positions_comes_back() -> None:
    was, cut, made = before_and_after(model_with("Relu"), images())
    active = [(one > 0).mean(1) for one in (was, cut, made)]
    assert np.abs(active[2] - active[0]).mean() < 0.5 * np.abs(active[1] - active[0]).mean()


def test_later_layers_are_fitted_to_what_earlier_ones_make_by_then() -> None:
    model = parsed(
        """g (float[N,3,8,8] x) => (float[N,2,8,8] y) {
        a = Conv(x, w0) h = Relu(a) s = Conv(h, w1) r = Relu(s) t = Conv(r, w2) u = Relu(t)
        y = Conv(u, w3)}""",
        w0=normal(12, 3, 1, 1), w1=normal(6, 12, 1, 1, seed=1), w2=normal(5, 6, 1, 1, seed=3),
        w3=normal(2, 5, 1, 1, seed=4),
    )  # fmt: skip
    was, _, made = before_and_after(model, images(), "t")
    keeps = made.std(1) <= was.std(1)
    ratios = [one.mean(1)[keeps] / one.std(1)[keeps] for one in (was, made)]
    np.testing.assert_allclose(ratios[1], ratios[0], atol=1e-3)


@pytest.mark.parametrize(
    ("middle", "changed"),
    [
        ("s = BatchNormalization(c, k, beta, m, v)", "beta"),
        ("n = BatchNormalization(c, k, beta, m, v) o = Conv(x, w4) s = Add(n, o)", "o_bias"),
        ("o = Conv(x, w4) n = BatchNormalization(c, k, beta, m, v) s = Add(n, o)", "beta"),
    ],
    ids=["a BatchNormalization", "a sum", "a sum the other way"],
)
def test_shift_goes_into_what_was_made_last(middle: str, changed: str) -> None:
    model = parsed(
        f"""g (float[N,3,8,8] x) => (float[N,2,8,8] y) {{
        a = Conv(x, w0) h = Relu(a) c = Conv(h, w1) {middle} r = Relu(s) y = Conv(r, w2)}}""",
        w0=normal(12, 3, 1, 1), w1=normal(6, 12, 1, 1, seed=1), w2=normal(2, 6, 1, 1, seed=3),
        w4=normal(6, 3, 1, 1, seed=7), k=np.ones(6, np.float32), beta=normal(6, seed=8),
        m=normal(6, seed=9), v=np.full(6, 4, np.float32),
    )  # fmt: skip
    graph, data = analyse(model), images()
    surgery = operate(Recentring(graph, data).recentred(cut_first(graph)))
    assert set(surgery.restored) == {changed, "y_bias"}
    was, made = (seen(one, "s", data) for one in (model, surgery.model))
    keeps = made.std(1) <= was.std(1)
    assert keeps.any()
    ratios = [one.mean(1)[keeps] / one.std(1)[keeps] for one in (was, made)]
    np.testing.assert_allclose(ratios[1], ratios[0], atol=1e-3)


@pytest.mark.parametrize(("classes", "whole"), [(5, False), (1, True)], ids=["classes", "a number"])
def test_scores_of_classes_shrink_in_proportion_and_a_number_keeps_its_mean(
    classes: int, *, whole: bool
) -> None:
    model = parsed(
        f"""g (float[N,3,8,8] x) => (float[N,{classes}] y) {{
        a = Conv(x, w0) h = Relu(a) p = GlobalAveragePool(h) f = Flatten(p) y = Gemm(f, w1)}}""",
        w0=normal(12, 3, 1, 1), w1=normal(12, classes, seed=1),
    )  # fmt: skip
    was, cut, made = before_and_after(model, images(), "y")
    share = np.minimum(cut.std(1) / was.std(1), 1)
    expected = was.mean(1) if whole else share * was.mean(1)
    np.testing.assert_allclose(made.mean(1), expected, atol=1e-4)


def test_same_inputs_same_biases_and_a_cut_of_nothing_changes_none() -> None:
    graph = analyse(model_with("Relu"))
    fitter = Recentring(graph, images())
    first, again = (operate(fitter.recentred(cut_first(graph))).model for _ in range(2))
    assert first.proto.SerializeToString() == again.proto.SerializeToString()
    whole = PruningPlan(graph, {g.id: np.arange(g.size) for g in graph.prunable}, {})
    assert fitter.recentred(whole).absorbed == ()


def test_half_of_what_a_deep_cut_of_a_residual_network_loses_comes_back() -> None:
    model = load(MODELS / "fashion_resnet.onnx")
    graph = analyse(model)
    with np.load(MODELS / "fashion_test.npz") as stored:
        images, labels = stored["input"][::4], stored["labels"][::4]
    with np.load(MODELS / "fashion_calib.npz") as stored:
        given = stored["input"][:64]
    data = Data([{"input": given}], "images", random=False, samples=64)
    plan = select(graph, score(graph, "reader"), ratio=0.3)
    told = replace(plan, absorbed=()), Recentring(graph, data).recentred(plan)
    found = []
    for one in told:
        batches = [{"input": images}]
        made = seen(operate(one).model, "logits", Data(batches, "", random=False, samples=500))
        found.append(float(np.mean(made.argmax(0) == labels)))
    assert found[0] < 0.4
    assert found[1] > 0.65
