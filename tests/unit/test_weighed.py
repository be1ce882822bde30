"""What errors of channels count to the layers that read them."""

from __future__ import annotations

import numpy as np
import pytest

from onnxprune.graph import Graph
from onnxprune.prepare import prepare
from onnxprune.runtime import session
from onnxprune.shapes import environment
from onnxprune.sparsifying import sparsify
from onnxprune.types import Float64Array
from onnxprune.weighed import Weighing, slopes
from tests.small import parsed


def weighed(text: str, weights: dict[str, np.ndarray], channels: int = 4) -> Float64Array | None:
    """What counts of tensor ``h``."""
    graph: Graph = prepare(parsed(text, **weights))
    env = environment(graph, {"x": (1, 4, 6, 6)})
    return Weighing(graph, env.shape, lambda name: graph.constants[name].weight.read()).of(
        "h", channels
    )


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def expected(matrix: np.ndarray, others: float = 0) -> Float64Array:
    """A tenth of each channel's own error, the rest as given."""
    found = matrix / np.diagonal(matrix).mean() + others * np.eye(len(matrix))
    return 0.9 * found / np.diagonal(found).mean() + 0.1 * np.eye(len(matrix))


HEAD = "agraph (float[N,4,6,6] x) => (float[N,M,K,L] y)"


def test_channels_count_as_the_layer_behind_weighs_them() -> None:
    w = normal(5, 4, 3, 3)
    found = weighed(HEAD + "{ h = Relu(x) y = Conv<pads=[1,1,1,1]>(h, w) }", {"w": w})
    flat = w.transpose(0, 2, 3, 1).reshape(-1, 4).astype(np.float64)
    np.testing.assert_allclose(found, expected(flat.T @ flat), rtol=1e-6)


def test_a_sum_is_weighed_by_all_that_read_it_further_on() -> None:
    w, v = normal(4, 4, 1, 1), normal(6, 4, 1, 1, seed=1)
    text = "{ h = Relu(x) a = Conv(h, w) s = Add(h, a) y = Conv(s, v) }"
    found = weighed(HEAD + text, {"w": w, "v": v})
    grams = [one[:, :, 0, 0].T.astype(np.float64) @ one[:, :, 0, 0] for one in (w, v)]
    np.testing.assert_allclose(found, expected(grams[0] + grams[1]), rtol=1e-6)


def test_a_depthwise_convolution_and_a_norm_scale_what_passes() -> None:
    w, d, ones = normal(3, 4, 1, 1), normal(4, 1, 1, 1, seed=2), np.ones(4, np.float32)
    text = """{ h = Relu(x) a = Conv<group=4>(h, d) b = BatchNormalization(a, g, z, z, o)
        y = Conv(b, w) }"""
    gamma = normal(4, seed=3)
    found = weighed(HEAD + text, {"w": w, "d": d, "g": gamma, "z": 0 * ones, "o": ones})
    flat = w[:, :, 0, 0].astype(np.float64)
    scale = d.reshape(-1) * gamma / np.sqrt(1 + 1e-5)
    np.testing.assert_allclose(found, expected(flat.T @ flat * np.outer(scale, scale)), rtol=1e-5)


def test_behind_a_flattened_tensor_every_position_counts() -> None:
    w = normal(3, 4 * 36)
    text = """agraph (float[N,4,6,6] x) => (float[N,3] y)
        { h = Relu(x) f = Flatten(h) y = Gemm<transB=1>(f, w) }"""
    flat = w.reshape(3, 4, 36).transpose(0, 2, 1).reshape(-1, 4).astype(np.float64)
    np.testing.assert_allclose(weighed(text, {"w": w}), expected(flat.T @ flat), rtol=1e-6)


def test_what_reads_in_an_unknown_way_counts_each_channel_alone() -> None:
    w = normal(5, 4, 1, 1)
    text = "{ h = Relu(x) a = Conv(h, w) s = Softmax<axis=1>(h) y = Concat<axis=1>(a, s) }"
    flat = w[:, :, 0, 0].astype(np.float64)
    found = weighed(HEAD + text, {"w": w})
    np.testing.assert_allclose(found, expected(flat.T @ flat, others=1), rtol=1e-6)


def test_where_channels_are_shuffled_nothing_is_known() -> None:
    text = """{ h = Relu(x) a = Reshape(h, s) y = Conv(a, w) }"""
    shape = np.array([-1, 2, 12, 6])
    assert weighed(HEAD + text, {"w": normal(5, 2, 1, 1), "s": shape}) is None


def test_an_activation_between_makes_channels_count_more_alone() -> None:
    w = normal(5, 4, 1, 1)
    flat = w[:, :, 0, 0].astype(np.float64)
    found = weighed(HEAD + "{ h = Relu(x) a = HardSwish(h) y = Conv(a, w) }", {"w": w})
    kernel = 0.7 + 0.3 * np.eye(4)
    np.testing.assert_allclose(found, expected(flat.T @ flat * kernel), rtol=1e-6)


def test_slopes_of_two_channels_that_are_never_open_together_cancel() -> None:
    rows = np.array([[1, -1, 1], [-1, 1, 1], [1, -1, -1], [-1, 1, -1]], np.float32)
    found = slopes(lambda x: np.maximum(x, 0), rows)
    np.testing.assert_allclose(
        found, [[0.5, 0, 0.25], [0, 0.5, 0.25], [0.25, 0.25, 0.5]], rtol=1e-3
    )


def test_weights_in_a_pattern_leave_less_error_behind_what_reads_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = """agraph (float[N,16,6,6] x) => (float[N,3,6,6] y)
        { h = Conv(x, w) y = Conv(h, v) }"""
    weights = {"w": normal(12, 16, 1, 1), "v": normal(3, 12, 1, 1, seed=1)}
    model = parsed(text, **weights)
    mix = normal(16, 16, seed=2)
    images = {
        name: np.einsum("oc,nchw->nohw", mix, normal(40, 16, 6, 6, seed=seed))
        for name, seed in (("known", 3), ("new", 4))
    }
    errors = []
    for weighs in (True, False):
        if not weighs:
            monkeypatch.setattr(Weighing, "of", lambda *_: None)
        made, _ = sparsify(model, only="h", data={"x": images["known"]}, verify="none")
        said = [session(one).run({"x": images["new"]})["y"] for one in (model, made)]
        errors.append(float(np.square(said[0] - said[1]).mean()))
    assert errors[0] < 0.5 * errors[1]
