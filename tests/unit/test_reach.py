"""A layer as a linear map: forth as ONNX Runtime makes it, and back as the adjoint."""

from __future__ import annotations

import numpy as np
import pytest

from onnxprune.graph import Graph
from onnxprune.layers import layer_at
from onnxprune.model import Model
from onnxprune.prepare import prepare
from onnxprune.reach import Reach, reachable
from onnxprune.runtime import session
from onnxprune.shown import Shown
from onnxprune.sites import Site
from onnxprune.types import Float32Array
from tests.small import parsed


def drawn(*shape: int, seed: int = 0) -> Float32Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def site_in(graph: Graph, op_type: str) -> Site:
    node = next(node for node in graph.nodes if node.op_type == op_type)
    layer = layer_at(graph, node, 1, node.inputs[1])
    assert layer is not None
    reader = next((n for n in graph.nodes if n.op_type == "BatchNormalization"), None)
    made = node.outputs[0] if reader is None else reader.outputs[0]
    return Site(layer, Shown(graph, node.inputs[1], ()), reader, None, made)


def reach_of(graph: Graph, op_type: str) -> Reach:
    found = Reach.of(site_in(graph, op_type), graph, lambda n: graph.constants[n].weight.read())
    assert found is not None
    return found


CONVOLUTIONS = {
    "plain": ("", (6, 4, 3, 3)),
    "padded": ("pads = [1, 1, 1, 1]", (6, 4, 3, 3)),
    "a stride that leaves positions over": ("strides = [2, 3], pads = [1, 0, 0, 1]", (6, 4, 3, 2)),
    "dilated": ("dilations = [2, 1], strides = [2, 2]", (6, 4, 3, 3)),
    "grouped": ("group = 2, pads = [1, 1, 1, 1]", (6, 2, 3, 3)),
    "depthwise": ("group = 4, strides = [2, 2]", (8, 1, 3, 3)),
}


def convolution(attributes: str, weight: tuple[int, ...]) -> Model:
    text = f"""
    agraph (float[N,4,9,8] x) => (float[N,C,H,W] y) {{
        y = Conv<{attributes}>(x, w)
    }}
    """
    return parsed(text.replace("<>", ""), w=drawn(*weight, seed=1))


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution_goes_forth_and_back(name: str) -> None:
    model = convolution(*CONVOLUTIONS[name])
    reach, x = reach_of(prepare(model), "Conv"), drawn(3, 4, 9, 8, seed=2)
    made = session(model).run({"x": x})["y"]
    np.testing.assert_allclose(reach.forth(x), made, rtol=1e-4, atol=1e-5)
    error = drawn(*made.shape, seed=3)
    back = reach.back(error, x.shape)
    assert back.shape == x.shape
    # <A x, e> = <x, Aᵀ e> for any x and e is what makes an adjoint.
    assert np.sum(made * error) == pytest.approx(np.sum(x * back), rel=1e-3)


@pytest.mark.parametrize(
    ("body", "op_type"),
    [("y = MatMul(x, w)", "MatMul"), ("y = Gemm(x, w)", "Gemm"),
     ("y = Gemm<transB = 1, alpha = 2.0>(x, w)", "Gemm")],
)  # fmt: skip
def test_product_goes_forth_and_back(body: str, op_type: str) -> None:
    shape = (5, 7) if "transB" in body else (7, 5)
    text = f"agraph (float[N,7] x) => (float[N,5] y) {{ {body} }}"
    model = parsed(text, w=drawn(*shape, seed=1))
    reach, x, error = reach_of(prepare(model), op_type), drawn(4, 7), drawn(4, 5, seed=3)
    made = session(model).run({"x": x})["y"]
    np.testing.assert_allclose(reach.forth(x), made, rtol=1e-4, atol=1e-5)
    assert np.sum(made * error) == pytest.approx(np.sum(x * reach.back(error, x.shape)), rel=1e-4)
    np.testing.assert_allclose(
        reach.square(7), [[reach.forth(a) @ reach.forth(b) for b in np.eye(7, dtype=np.float32)]
                          for a in np.eye(7, dtype=np.float32)], rtol=1e-3, atol=1e-4,
    )  # fmt: skip


def test_norm_behind_is_a_part_of_the_map() -> None:
    text = """
    agraph (float[N,4,6,6] x) => (float[N,6,4,4] y) {
        t = Conv(x, w)
        y = BatchNormalization(t, gamma, beta, mean, var)
    }
    """
    norm = {name: np.abs(drawn(6, seed=n)) + 0.5
            for n, name in enumerate(("gamma", "beta", "mean", "var"))}  # fmt: skip
    model = parsed(text, w=drawn(6, 4, 3, 3), **norm)
    x = drawn(2, 4, 6, 6, seed=4)
    loaded = session(model)
    still = loaded.run({"x": np.zeros_like(x)})["y"]
    moved = loaded.run({"x": x})["y"] - still
    np.testing.assert_allclose(
        reach_of(prepare(model), "Conv").forth(x), moved, rtol=1e-3, atol=1e-4
    )


def test_groups_see_only_their_own_channels() -> None:
    reach = reach_of(prepare(convolution(*CONVOLUTIONS["grouped"])), "Conv")
    square = reach.square(4)
    assert not square[:2, 2:].any()
    taps = drawn(6, 2, 3, 3, seed=1)
    assert square[0, 1] == pytest.approx(float((taps[:3, 0] * taps[:3, 1]).sum()), rel=1e-4)
    assert square[2, 3] == pytest.approx(float((taps[3:, 0] * taps[3:, 1]).sum()), rel=1e-4)


def test_other_forms_are_left_out() -> None:
    same = prepare(convolution('auto_pad = "SAME_UPPER"', (6, 4, 3, 3)))
    assert not reachable(site_in(same, "Conv"))
    text = "agraph (float[2,3,7] x) => (float[2,3,5] y) { y = MatMul(x, w) }"
    stacked = prepare(parsed(text, w=drawn(2, 7, 5)))
    site = site_in(stacked, "MatMul")
    assert Reach.of(site, stacked, lambda n: stacked.constants[n].weight.read()) is None
