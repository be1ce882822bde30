"""Every layer as one product: columns of what it reads times its matrix is its output."""

from __future__ import annotations

import numpy as np
import pytest

from onnxprune import calibrate
from onnxprune.calibrate import Gram, energies, grams, stream
from onnxprune.data import Data
from onnxprune.layers import columns, layer_of, matrix, outputs, unmatrix
from onnxprune.model import Model
from onnxprune.obs import Reader, greedy_costs
from onnxprune.prepare import prepare
from onnxprune.shapes import environment
from tests.small import parsed

RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


MAP, ROWS = "float[2,6,9,8]", "float[5,6]"
CASES = [
    pytest.param(f"g ({MAP} x) => (float[a,b,c,d] y) {{ y = Conv(x, w) }}", (4, 6, 3, 3),
                 id="conv"),
    pytest.param(
        f"g ({MAP} x) => (float[a,b,c,d] y) {{ y = Conv<strides=[2,1], pads=[1,0,2,1], "
        "dilations=[2,1], group=2>(x, w) }",
        (4, 3, 3, 2), id="strides, pads, dilations, groups",
    ),
    pytest.param(
        f'g ({MAP} x) => (float[a,b,c,d] y) {{ y = Conv<auto_pad="SAME_UPPER", strides=[2,2]>'
        "(x, w) }",
        (4, 6, 3, 3), id="padded to the same size",
    ),
    pytest.param(
        f'g ({MAP} x) => (float[a,b,c,d] y) {{ y = Conv<auto_pad="SAME_LOWER">(x, w) }}',
        (4, 6, 2, 2), id="padded in front",
    ),
    pytest.param("g (float[2,6,11] x) => (float[a,b,c] y) { y = Conv<strides=[2]>(x, w) }",
                 (4, 6, 3), id="conv over a line"),
    pytest.param(f"g ({MAP} x) => (float[a,b,c,d] y) {{ y = ConvTranspose(x, w) }}",
                 (6, 4, 3, 3), id="transposed"),
    pytest.param(
        f"g ({MAP} x) => (float[a,b,c,d] y) {{ y = ConvTranspose<strides=[2,3], pads=[1,0,1,1], "
        "output_padding=[1,0], group=2>(x, w) }",
        (6, 2, 3, 4), id="transposed with strides and groups",
    ),
    pytest.param(f"g ({ROWS} x) => (float[a,b] y) {{ y = Gemm(x, w) }}", (6, 4), id="gemm"),
    pytest.param(f"g ({ROWS} x) => (float[a,b] y) {{ y = Gemm<transB=1>(x, w) }}", (4, 6),
                 id="gemm, weight transposed"),
    pytest.param("g (float[6,5] x) => (float[a,b] y) { y = Gemm<transA=1>(x, w) }", (6, 4),
                 id="gemm, data transposed"),
    pytest.param("g (float[2,5,6] x) => (float[a,b,c] y) { y = MatMul(x, w) }", (6, 4),
                 id="matmul"),
    pytest.param("g (float[2,6,5] x) => (float[a,b,c] y) { y = MatMul(w, x) }", (4, 6),
                 id="matmul, weight first"),
    pytest.param("g (float[2,3,5,6] x) => (float[a,b,c,d] y) { y = MatMul(x, w) }", (3, 6, 4),
                 id="matmul, stack"),
    pytest.param("g (float[2,1,5,6] x) => (float[a,b,c,d] y) { y = MatMul(x, w) }", (2, 3, 6, 4),
                 id="matmul, stack that repeats the data"),
    pytest.param("g (float[5,6] x) => (float[a,b,c] y) { y = MatMul(x, w) }", (3, 6, 4),
                 id="matmul, stack over all of the data"),
    pytest.param("g (float[2,3,6,5] x) => (float[a,b,c,d] y) { y = MatMul(w, x) }", (3, 4, 6),
                 id="matmul, stack first"),
]  # fmt: skip


def one(text: str, shape: tuple[int, ...]) -> tuple[Model, np.ndarray, Data]:
    model = parsed(text, w=normal(*shape))
    value = model.proto.graph.input[0].type.tensor_type.shape.dim
    x = normal(*(dim.dim_value for dim in value))
    return model, x, Data([{"x": x}], "given", random=False, samples=x.shape[0])


@pytest.mark.parametrize(("text", "shape"), CASES)
@pytest.mark.parametrize("most", [10_000, 5], ids=["all positions", "some"])
def test_columns_times_matrix_is_what_the_layer_gives(
    text: str, shape: tuple[int, ...], most: int
) -> None:
    model, x, data = one(text, shape)
    layer = layer_of(prepare(model), "w")
    assert layer is not None
    (made,) = stream(model, ["y"], data)
    weight = np.asarray(model.weights()["w"].read())
    seen, chosen = columns(layer, x, shape, most, np.random.default_rng(0))
    expected = outputs(layer, made["y"], chosen, shape)
    np.testing.assert_allclose(seen @ matrix(layer, weight), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(unmatrix(layer, matrix(layer, weight), shape), weight)


@pytest.mark.parametrize(("text", "shape"), CASES[:1] + CASES[-4:])
def test_energies_and_grams_are_moments_of_what_is_read(text: str, shape: tuple[int, ...]) -> None:
    model, x, data = one(text, shape)
    graph = prepare(model)
    layer = layer_of(graph, "w")
    assert layer is not None
    energy = energies(graph, [layer], data)["x", layer.axis]
    rest = tuple(a for a in range(x.ndim) if a != layer.axis % x.ndim)
    np.testing.assert_allclose(energy, np.mean(np.square(x), axis=rest), rtol=1e-5)
    env = environment(graph, {"x": x.shape})
    ((_, gram),) = grams(graph, env, [layer], data)
    seen, _ = columns(layer, x, shape, 10_000, np.random.default_rng(0))
    np.testing.assert_allclose(gram.matrix[0], seen[0].T @ seen[0], rtol=1e-4, atol=1e-3)
    assert gram.rows == seen.shape[1]


def test_gram_of_a_wide_layer_is_that_of_its_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernel positions count as rows where all of the inputs together are too many."""
    monkeypatch.setattr(calibrate, "_MOST_GRAM_BYTES", 8 * 53 * 53)
    model, x, data = one(f"g ({MAP} x) => (float[a,b,c,d] y) {{ y = Conv(x, w) }}", (4, 6, 3, 3))
    graph = prepare(model)
    layer = layer_of(graph, "w")
    assert layer is not None
    ((_, gram),) = grams(graph, environment(graph, {"x": x.shape}), [layer], data)
    seen, _ = columns(layer, x, (4, 6, 3, 3), 10_000, np.random.default_rng(0))
    expected = sum(seen[0, :, tap::9].T @ seen[0, :, tap::9] for tap in range(9))
    np.testing.assert_allclose(gram.matrix[0], expected, rtol=1e-4, atol=1e-3)
    assert gram.rows == 9 * seen.shape[1]


def test_cost_of_a_channel_is_the_error_of_the_best_refit() -> None:
    rows, weight = normal(400, 6).astype(np.float64), normal(6, 3).astype(np.float64)
    rows[:, 5] = rows[:, 0] + rows[:, 1]  # the refit replaces it
    gram = Gram(rows.T @ rows / 1, 400)
    reader = Reader.of(gram.matrix, gram.rows, weight, np.arange(6)[:, None], np.arange(6))
    cost = reader.costs(np.ones(6))
    for gone in range(6):
        left = np.delete(rows, gone, axis=1)
        fitted, *_ = np.linalg.lstsq(left, rows @ weight, rcond=None)
        error = np.square(rows @ weight - left @ fitted).sum() / np.square(rows @ weight).sum()
        assert cost[gone] == pytest.approx(error, rel=0.05, abs=2e-3)


def test_greedy_removal_keeps_one_of_two_copies() -> None:
    rows, weight = normal(500, 4).astype(np.float64), np.eye(4)
    rows[:, 3] = rows[:, 2]
    rows[:, :2] *= 0.5
    reader = Reader.of(rows.T @ rows, 500, weight, np.arange(4)[:, None], np.arange(4))
    order = np.argsort(greedy_costs([reader], 4))
    assert order[0] in (2, 3)
    assert set(order[1:3]) == {0, 1}
