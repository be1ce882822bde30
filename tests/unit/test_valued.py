"""Sparse weights with values from data: nearer to the original than the largest ones are."""

from __future__ import annotations

import numpy as np
import pytest

from onnxprune import patterned, refit
from onnxprune.data import Data, load_data
from onnxprune.errors import UsageError
from onnxprune.io import load
from onnxprune.model import Model
from onnxprune.patterns import NM, holds
from onnxprune.report.tables import sparsify_report
from onnxprune.runtime import session
from onnxprune.sparsifying import sparsify
from onnxprune.weights import sparse_layers
from tests.small import MODELS, parsed


def made_by(model: Model, data: Data) -> np.ndarray:
    loaded = session(model)
    return np.concatenate([loaded.run(batch)[loaded.outputs[0]] for batch in data.batches])


def drift(model: Model, other: Model, data: Data) -> float:
    wanted = made_by(model, data)
    return float(np.linalg.norm(made_by(other, data) - wanted) / np.linalg.norm(wanted))


def small_network(seed: int = 0) -> tuple[Model, Data]:
    """A strided convolution, a grouped and dilated one, and a product; channels are correlated."""
    rng = np.random.default_rng(seed)
    text = """g (float[N,8,9,9] x) => (float[N,6] y) {
        a = Conv<pads=[1,1,1,1], strides=[2,2]>(x, w1, b1)  r = Relu(a)
        c = Conv<group=2, pads=[2,2,2,2], dilations=[2,2]>(r, w2)  s = Relu(c)
        p = GlobalAveragePool(s)  f = Flatten(p)  y = Gemm<transB=1>(f, w3, b3)}"""
    shapes = {"w1": (16, 8, 3, 3), "b1": 16, "w2": (12, 8, 3, 3), "w3": (6, 12), "b3": 6}
    model = parsed(
        text, **{name: rng.standard_normal(s).astype(np.float32) for name, s in shapes.items()}
    )
    mix = rng.standard_normal((8, 8))
    images = np.einsum("nchw,cd->ndhw", rng.standard_normal((96, 8, 9, 9)), mix)
    batches = [{"x": images[at : at + 32].astype(np.float32)} for at in (0, 32, 64)]
    return model, Data(batches, "given", random=False, samples=96)


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "1x4", "2x2", "kernel", "unstructured"])
def test_values_from_data_come_nearer_and_hold_the_pattern(pattern: str) -> None:
    model, data = small_network()
    share = None if ":" in pattern else 0.5
    made = {
        method: sparsify(model, pattern=pattern, sparsity=share, method=method, data=data)[0]
        for method in ("magnitude", "sparsegpt")
    }
    assert drift(model, made["sparsegpt"], data) < 0.8 * drift(model, made["magnitude"], data)


@pytest.mark.parametrize("pattern", ["2:4", "kernel", "unstructured"])
def test_layers_too_wide_for_a_gram_matrix_are_solved_part_by_part(
    pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = small_network()
    share = None if ":" in pattern else 0.5
    plain, by_size = sparsify(model, pattern=pattern, sparsity=share, method="magnitude")
    monkeypatch.setattr(refit, "_MOST_GRAM_BYTES", 0)
    monkeypatch.setattr(patterned, "_WIDE", 8)
    made, report = sparsify(model, pattern=pattern, sparsity=share, data=data)
    assert report.sparsified is not None
    assert by_size.sparsified is not None
    zeros = [
        [layer.sparsity for layer in one.layers] for one in (report.sparsified, by_size.sparsified)
    ]
    assert zeros[0] == zeros[1]
    assert drift(model, made, data) < 0.9 * drift(model, plain, data)


def test_auto_is_sparsegpt_with_data_and_magnitude_without() -> None:
    model, data = small_network()
    made, report = sparsify(model, data=data)
    assert report.sparsified is not None
    assert report.sparsified.method == "sparsegpt"
    assert all(
        holds(NM(2, 4), layer.matrix(), 0.5, taps=layer.taps) for layer in sparse_layers(made)
    )
    assert report.recipe["restored"]
    without = sparsify(model)[1].sparsified
    assert without is not None
    assert without.method == "magnitude"


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_a_method_that_needs_data_says_so(method: str) -> None:
    with pytest.raises(UsageError, match="needs data"):
        sparsify(small_network()[0], method=method)


def test_shares_of_all_layers_together_go_by_magnitude_only() -> None:
    model, data = small_network()
    given = {"pattern": "unstructured", "sparsity": 0.5, "scope": "global", "data": data}
    with pytest.raises(UsageError, match="only magnitudes"):
        sparsify(model, method="sparsegpt", **given)
    report = sparsify(model, **given)[1].sparsified
    assert report is not None
    assert report.method == "magnitude"


def test_a_recipe_with_data_is_repeated() -> None:
    model, data = small_network()
    made, _ = sparsify(model, data=data)
    again, _ = sparsify(model, recipe=None, data=data)
    for name, weight in made.weights().items():
        np.testing.assert_array_equal(weight.read(), again.weights()[name].read())


@pytest.mark.slow
def test_a_trained_network_keeps_its_answers() -> None:
    model = load(MODELS / "fashion_vgg.onnx")
    data = load_data(MODELS / "fashion_calib.npz", model, limit=128)
    made = sparsify(model, data=data, verify="none")[0]
    same = made_by(model, data).argmax(1) == made_by(made, data).argmax(1)
    assert same.mean() > 0.97


@pytest.mark.parametrize("method", ["magnitude", "sparsegpt"])
def test_an_order_is_found_first_and_recorded(method: str) -> None:
    rng = np.random.default_rng(5)
    text = """g (float[N,16] x) => (float[N,6] y) {
        a = MatMul(x, w1)  r = Relu(a)  b = MatMul(r, w2)  s = Relu(b)  y = MatMul(s, w3)}"""
    shapes = {"w1": (16, 32), "w2": (32, 24), "w3": (24, 6)}
    model = parsed(
        text, **{name: rng.standard_normal(s).astype(np.float32) for name, s in shapes.items()}
    )
    batches = [{"x": rng.standard_normal((256, 16)).astype(np.float32)}]
    data = Data(batches, "given", random=False, samples=256)
    made, report = sparsify(model, method=method, permute=True, data=data)
    plain, _ = sparsify(model, method=method, data=data)
    entries = report.recipe["permuted"]
    assert isinstance(entries, list)
    assert {entry["tensor"] for entry in entries} >= {"w2", "w3"}
    assert report.verdict.status == "passed"
    assert drift(model, made, data) < 1.2 * drift(model, plain, data)


def test_only_runs_have_an_order() -> None:
    with pytest.raises(UsageError, match="no order of channels"):
        sparsify(small_network()[0], pattern="1x4", sparsity=0.5, permute=True)


@pytest.mark.parametrize("value", [0.0, -3.0])
def test_inputs_that_never_change_leave_the_largest_weights(value: float) -> None:
    model, data = small_network()
    same = [{"x": np.full_like(batch["x"], value)} for batch in data.batches]
    made, _ = sparsify(model, data=Data(same, "flat", random=False, samples=96), verify="none")
    assert all(
        holds(NM(2, 4), layer.matrix(), 0.5, taps=layer.taps) for layer in sparse_layers(made)
    )


def test_layers_that_no_data_speak_of_are_said_to_go_by_magnitude() -> None:
    """Those in the body of an If: both have the same weights and inputs."""
    rng = np.random.default_rng(2)
    text = """g (float[N,8] x, bool c) => (float[N,6] y) {
        a = MatMul(x, w1)  r = Relu(a)
        y = If(c) <then_branch = t () => (z) {z = MatMul(r, w2)},
                   else_branch = e () => (u) {u = Identity(r0)}>}"""
    text = text.replace("Identity(r0)", "MatMul(r, w2)")
    shapes = {"w1": (8, 16), "w2": (16, 6)}
    model = parsed(
        text, **{name: rng.standard_normal(s).astype(np.float32) for name, s in shapes.items()}
    )
    x = rng.standard_normal((64, 8)).astype(np.float32)
    data = Data([{"x": x, "c": np.array(True)}], "given", random=False, samples=64)
    _, report = sparsify(model, data=data)
    assert report.sparsified is not None
    methods = {one.tensor: one.method for one in report.sparsified.layers if one.done}
    assert methods == {"w1": "sparsegpt", "w2": "magnitude"}
    (said,) = (line for line in map(str, sparsify_report(report)) if line.startswith("2:4 in"))
    assert "by sparsegpt, " in said
    assert "by magnitude" in said


def test_what_is_kept_is_counted_on_the_weights_there_were() -> None:
    model, data = small_network()
    made, report = sparsify(model, data=data)
    assert report.sparsified is not None
    for layer in report.sparsified.layers:
        old, new = (one.weights()[layer.tensor or ""].read() for one in (model, made))
        kept = np.abs(old[new != 0]).sum() / np.abs(old).sum()
        assert layer.kept == pytest.approx(kept, rel=1e-6)
        assert layer.kept < 0.95
        assert layer.error == pytest.approx(
            np.linalg.norm(new - old) / np.linalg.norm(old), rel=1e-5
        )
