from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxprune import calibrate
from onnxprune.analyse import analyse
from onnxprune.calibrate import stream
from onnxprune.data import Data, random_data
from onnxprune.errors import UsageError
from onnxprune.groups import DependencyGraph
from onnxprune.io import load
from onnxprune.model import Model
from onnxprune.norms import fpgm, lamp
from onnxprune.score import FROM_DATA, METHODS, choose, score
from onnxprune.select import select
from onnxprune.types import ChannelGroup
from tests.small import MODELS, array, conv_chain, parsed

RNG = np.random.default_rng(0)


def group_of(graph: DependencyGraph, tensor: str) -> ChannelGroup:
    return next(group for group in graph.prunable if group.producers[0].tensor == tensor)


def gone(graph: DependencyGraph, method: str, tensor: str, ratio: float = 0.5) -> set[int]:
    group = group_of(graph, tensor)
    plan = select(graph, score(graph, method), ratio=ratio)
    return set(range(group.size)) - set(plan.keep[group.id].tolist())


def lowest(values: np.ndarray, count: int) -> set[int]:
    return set(np.argsort(values, kind="stable")[:count].tolist())


def float32(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


# ------------------------------------------------------------------------------- each method


def test_bn_scale_cuts_the_smallest_scales() -> None:
    model = conv_chain()
    graph = analyse(model)
    for number, width in enumerate((8, 12)):
        gamma = np.abs(array(model, f"gamma{number}"))
        assert gone(graph, "bn_scale", f"w{number}") == lowest(gamma, width // 2)


@pytest.mark.parametrize(("method", "order"), [("l1", 1), ("l2", 2)])
def test_filter_norms_cut_the_smallest_filters(method: str, order: int) -> None:
    model = conv_chain(bn=False)
    graph = analyse(model)
    for number, width in enumerate((8, 12)):
        filters = array(model, f"w{number}").reshape(width, -1).astype(np.float64)
        norms = np.linalg.norm(filters, order, axis=1)
        assert gone(graph, method, f"w{number}") == lowest(norms, width // 2)
        values = score(graph, method)[group_of(graph, f"w{number}").id]
        np.testing.assert_allclose(values, norms, rtol=1e-6)


def test_bn_l1_is_the_norm_of_the_folded_filter() -> None:
    model = conv_chain()
    graph = analyse(model)
    scale = np.abs(array(model, "gamma0")) / np.sqrt(array(model, "var0") + 1e-5)
    folded = array(model, "w0") * scale[:, None, None, None]
    values = score(graph, "bn_l1")[group_of(graph, "w0").id]
    np.testing.assert_allclose(values, np.abs(folded).sum(axis=(1, 2, 3)), rtol=1e-5)


def test_bn_l1_is_plain_l1_where_two_normalisations_follow() -> None:
    v = np.abs(float32(8)) + 0.5
    model = parsed(
        "g (float[1,3,4,4] x) => (float[1,2,4,4] y) {c = Conv(x, w)\n"
        "a = BatchNormalization(c, s, b, m, v) d = BatchNormalization(c, t, b2, m2, v2)\n"
        "e = Add(a, d) y = Conv(e, u)}",
        w=float32(8, 3, 1, 1), u=float32(2, 8, 1, 1), s=float32(8), t=float32(8), b=float32(8),
        m=float32(8), v=v, b2=float32(8), m2=float32(8), v2=v,
    )  # fmt: skip
    graph = analyse(model)
    number = group_of(graph, "w").id
    np.testing.assert_array_equal(score(graph, "bn_l1")[number], score(graph, "l1")[number])
    both = (np.abs(array(model, "s").astype(np.float64)) + np.abs(array(model, "t"))) / 2
    np.testing.assert_allclose(score(graph, "bn_scale")[number], both)


def test_constants_behind_identity_nodes_are_seen() -> None:
    v = np.abs(float32(8)) + 1
    model = parsed(
        "g (float[1,3,4,4] x) => (float[1,2,4,4] y) {w = Identity(w0) s = Identity(s0)\n"
        "c = Conv(x, w) n = BatchNormalization(c, s, b, m, v) y = Conv(n, u)}",
        w0=float32(8, 3, 1, 1), u=float32(2, 8, 1, 1), s0=float32(8), b=float32(8),
        m=float32(8), v=v,
    )  # fmt: skip
    graph = analyse(model)
    scale = np.abs(array(model, "s0")) / np.sqrt(v + 1e-5)
    wanted = np.abs(array(model, "w0")).sum(axis=(1, 2, 3)) * scale
    number = group_of(graph, "w0").id
    np.testing.assert_allclose(score(graph, "bn_l1")[number], wanted, rtol=1e-5)
    np.testing.assert_allclose(score(graph, "bn_scale")[number], np.abs(array(model, "s0")))


def test_random_depends_on_the_seed_and_differs_between_groups() -> None:
    graph = analyse(conv_chain((3, 8, 8, 8)))
    first, again, other = (score(graph, "random", seed=seed) for seed in (1, 1, 2))
    ids = list(first)
    for number in ids:
        np.testing.assert_array_equal(first[number], again[number])
        assert not np.array_equal(first[number], other[number])
    assert not np.array_equal(first[ids[0]], first[ids[1]])


@pytest.mark.parametrize("method", METHODS)
def test_importance_is_float64_for_every_group(method: str) -> None:
    graph = analyse(conv_chain())
    data = random_data(graph.graph.model, seed=0) if method in FROM_DATA else None
    found = score(graph, method, data=data)
    assert found.method == method
    assert set(found) == {group.id for group in graph.prunable}
    for group in graph.prunable:
        assert found[group.id].dtype == np.float64
        assert found[group.id].shape == (group.size,)


def test_reader_is_the_share_of_the_squared_weights_that_read_a_channel() -> None:
    """Two readers of one stream count alike, however large their weights are."""
    model = parsed(
        """g (float[1,3,4,4] x) => (float[1,2,4,4] y, float[1,2,2,2] z) {
        a = Conv(x, w) r = Relu(a) y = Conv(r, u) z = Conv(r, v)}""",
        w=float32(5, 3, 1, 1), u=float32(2, 5, 1, 1), v=100 * float32(2, 5, 3, 3),
    )  # fmt: skip
    graph = analyse(model)
    (number,) = score(graph, "reader")
    squares = [np.square(array(model, name)).sum(axis=(0, 2, 3)) for name in ("u", "v")]
    wanted = sum(square / square.sum() for square in squares)
    np.testing.assert_allclose(score(graph, "reader")[number], wanted, rtol=1e-5)
    made = np.square(array(model, "w")).sum(axis=(1, 2, 3))
    path = np.sqrt(wanted * made / made.sum())
    np.testing.assert_allclose(score(graph, "path")[number], path, rtol=1e-5)


def test_reader_does_not_mind_scales_that_a_normalisation_undoes() -> None:
    model, scaled = conv_chain(), conv_chain()
    for entry in scaled.proto.graph.initializer:
        if entry.name in ("w0", "mean0", "var0"):
            factor = 49 if entry.name == "var0" else 7
            values = factor * onnx.numpy_helper.to_array(entry)
            entry.CopyFrom(onnx.numpy_helper.from_array(values, entry.name))
    first, second = score(analyse(model), "reader"), score(analyse(scaled), "reader")
    for group in first:
        np.testing.assert_allclose(first[group], second[group], rtol=1e-6)


# ------------------------------------------------------------------------------ odd weights


def test_producers_of_a_residual_stream_add_up() -> None:
    model = parsed(
        "g (float[1,3,4,4] x) => (float[1,2,4,4] y) {a = Conv(x, w) r = Relu(a)\n"
        "b = Conv(r, u) s = Add(a, b) y = Conv(s, v)}",
        w=float32(6, 3, 1, 1), u=float32(6, 6, 1, 1), v=float32(2, 6, 1, 1),
    )  # fmt: skip
    graph = analyse(model)
    wanted = sum(np.abs(array(model, n)).sum(axis=(1, 2, 3)) for n in "wu")
    np.testing.assert_allclose(score(graph, "l1")[group_of(graph, "w").id], wanted, rtol=1e-6)


def test_depthwise_filter_counts_where_batch_normalization_is_folded_in_only() -> None:
    model = parsed(
        "g (float[1,3,4,4] x) => (float[1,2,4,4] y)\n"
        "{a = Conv(x, w) d = Conv<group=6,pads=[1,1,1,1]>(a, k) y = Conv(d, v)}",
        w=float32(6, 3, 1, 1), k=float32(6, 1, 3, 3), v=float32(2, 6, 1, 1),
    )  # fmt: skip
    graph = analyse(model)
    group = group_of(graph, "w").id
    made, ridden = (np.abs(array(model, n)).sum(axis=(1, 2, 3)) for n in "wk")
    np.testing.assert_allclose(score(graph, "l1")[group], made, rtol=1e-6)
    np.testing.assert_allclose(score(graph, "bn_l1")[group], made + ridden, rtol=1e-6)


def test_quantized_weight_is_ranked_by_its_real_values() -> None:
    stored = RNG.integers(-100, 100, (6, 3, 1, 1)).astype(np.int8)
    scale, zero = np.linspace(0.1, 1, 6, dtype=np.float32), np.arange(6, dtype=np.int8)
    model = parsed(
        "g (float[1,3,4,4] x) => (float[1,2,4,4] y)\n"
        "{w = DequantizeLinear<axis=0>(q, s, z) a = Conv(x, w) y = Conv(a, v)}",
        q=stored, s=scale, z=zero, v=float32(2, 6, 1, 1),
    )  # fmt: skip
    graph = analyse(model)
    real = (stored.astype(np.float64) - zero[:, None, None, None]) * scale[:, None, None, None]
    values = score(graph, "l1")[group_of(graph, "q").id]
    np.testing.assert_allclose(values, np.abs(real).sum(axis=(1, 2, 3)))


def test_half_precision_norms_do_not_underflow() -> None:
    tiny = np.full((4, 3, 1, 1), 1e-5, np.float16)
    model = parsed(
        "g (float16[1,3,4,4] x) => (float16[1,2,4,4] y) {a = Conv(x, w) y = Conv(a, v)}",
        w=tiny, v=float32(2, 4, 1, 1).astype(np.float16),
    )  # fmt: skip
    graph = analyse(model)
    assert (score(graph, "l2")[group_of(graph, "w").id] > 1e-5).all()


def test_nan_is_named_once_and_ranks_lowest(caplog: pytest.LogCaptureFixture) -> None:
    model = conv_chain(bn=False)
    broken = array(model, "w0").copy()
    broken[3, 0, 0, 0] = np.nan
    model.proto.graph.initializer[0].raw_data = broken.tobytes()
    graph = analyse(model)
    with caplog.at_level(logging.WARNING, "onnxprune"):
        assert 3 in gone(graph, "l1", "w0", 1 / 8)
    assert [r.message for r in caplog.records] == ["weight 'w0' holds NaN/Inf"]


# --------------------------------------------------------------------------- auto, functions


def test_auto_takes_scales_that_were_trained_to_be_sparse() -> None:
    graph = analyse(load(MODELS / "fashion_vgg.onnx"))
    method, why = choose(graph)
    assert (method, why[:4]) == ("bn_scale", "56 %")
    assert score(graph).method == "bn_scale"


def test_auto_takes_what_reads_where_scales_are_as_plain_training_leaves_them() -> None:
    method, why = choose(analyse(load(MODELS / "fashion_resnet.onnx")))
    assert method == "path"
    assert "not trained to be sparse" in why


def test_auto_says_that_normalisation_was_folded() -> None:
    method, why = choose(analyse(conv_chain(bn=False)))
    assert method == "path"
    assert "folded by the exporter" in why


def test_auto_takes_what_reads_where_only_some_groups_have_scales() -> None:
    model = parsed(
        "g (float[1,3,4,4] x) => (float[1,2,4,4] y) {a = Conv(x, w)\n"
        "n = BatchNormalization(a, s, b, m, v) c = Conv(n, u) y = Conv(c, t)}",
        w=float32(6, 3, 1, 1), u=float32(5, 6, 1, 1), t=float32(2, 5, 1, 1), s=float32(6),
        b=float32(6), m=float32(6), v=np.abs(float32(6)) + 1,
    )  # fmt: skip
    graph = analyse(model)
    method, why = choose(graph)
    assert method == "path"
    assert why.startswith("1 of 2 groups")


def test_groups_without_a_scale_are_ranked_by_l1_and_said_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    graph = analyse(conv_chain(bn=False))
    with caplog.at_level(logging.WARNING, "onnxprune"):
        found = score(graph, "bn_scale")
    for number, values in score(graph, "l1").items():
        np.testing.assert_array_equal(found[number], values)
    assert "2 of 2 groups have no BatchNormalization scale" in caplog.text


def test_function_gives_the_importance() -> None:
    graph = analyse(conv_chain())

    def backwards(group: ChannelGroup, _: DependencyGraph) -> np.ndarray:
        return np.arange(group.size, 0, -1)

    found = score(graph, backwards)
    assert found.method == "backwards"
    plan = select(graph, found, ratio=0.5)
    group = group_of(graph, "w0")
    np.testing.assert_array_equal(plan.keep[group.id], np.arange(4))


def test_function_with_the_wrong_shape_is_refused() -> None:
    with pytest.raises(UsageError, match=r"gave shape \(1,\) for group 'w0'"):
        score(analyse(conv_chain()), lambda *_: np.zeros(1))


def test_unknown_method_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match="give one of auto, bn_scale"):
        score(analyse(conv_chain()), "magic")


# ------------------------------------------------------------------------- more importances


def residual() -> Model:
    rng = np.random.default_rng(0)
    return parsed(
        """g (float[1,3,8,8] x) => (float[1,4,8,8] y) {
        a = Conv(x, w0) b = Conv(a, w1) s = Add(a, b) y = Conv(s, w2)}""",
        w0=rng.standard_normal((6, 3, 1, 1)).astype(np.float32),
        w1=rng.standard_normal((6, 6, 1, 1)).astype(np.float32),
        w2=rng.standard_normal((4, 6, 1, 1)).astype(np.float32),
    )


@pytest.mark.parametrize(
    ("how", "combine"), [("sum", np.sum), ("mean", np.mean), ("max", np.max), (None, np.sum)]
)
def test_coupled_producers_combine_as_asked(how: str | None, combine: object) -> None:
    model = residual()
    graph = analyse(model)
    (group,) = graph.prunable
    parts = [np.abs(array(model, name)).sum(axis=(1, 2, 3)) for name in ("w0", "w1")]
    expected = combine(np.stack(parts), axis=0)  # type: ignore[operator]
    np.testing.assert_allclose(score(graph, "l1", aggregate=how)[group.id], expected, rtol=1e-6)


def test_unknown_aggregate_is_refused() -> None:
    with pytest.raises(UsageError, match="aggregate is 'median'"):
        score(analyse(residual()), "l1", aggregate="median")


def test_fpgm_takes_the_most_central_filter_first() -> None:
    filters = np.asarray([[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 3.0]])
    distances = [[np.linalg.norm(a - b) for b in filters] for a in filters]
    np.testing.assert_allclose(fpgm(filters), np.sum(distances, axis=1))
    assert np.argmin(fpgm(filters)) == 0


def test_lamp_is_the_share_among_the_filters_not_smaller() -> None:
    np.testing.assert_allclose(lamp(np.asarray([1.0, 3.0, 2.0])), [1 / 14, 1.0, 4 / 13])


def test_wanda_weighs_what_is_read_by_what_flows() -> None:
    model = residual()
    graph = analyse(model)
    (group,) = graph.prunable
    data = random_data(model, seed=1)
    (first, _) = [batch["x"] for batch in data.batches]
    found = score(graph, "wanda", data=data)[group.id]
    energy = {}
    for name in ("a", "s"):
        parts = [np.square(values[name]) for values in stream(model, [name], data)]
        energy[name] = np.mean(np.concatenate(parts), axis=(0, 2, 3))
    expected = np.zeros(6)
    for weight, name in (("w1", "a"), ("w2", "s")):
        value = np.square(array(model, weight)).sum(axis=(0, 2, 3)) * energy[name]
        expected += value / value.sum()
    assert first.shape == (1, 3, 8, 8)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("method", FROM_DATA)
def test_importance_from_data_without_data_is_refused(method: str) -> None:
    with pytest.raises(UsageError, match=f"importance {method} needs calibration data"):
        score(analyse(conv_chain()), method)


def test_function_in_a_file_ranks(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "import numpy as np\ndef last(group, graph):\n    return -np.arange(group.size)\n"
    )
    graph = analyse(conv_chain())
    found = score(graph, f"{path}:last")
    assert found.method == "last"
    for group in graph.prunable:
        np.testing.assert_array_equal(found[group.id], -np.arange(group.size))


@pytest.mark.parametrize(
    ("text", "name", "said"),
    [
        pytest.param("x = 1", "f", "has no function 'f'", id="no function"),
        pytest.param("1 / 0", "f", "cannot be run: ZeroDivisionError", id="file fails"),
        pytest.param(None, "f", "cannot read", id="no file"),
    ],
)
def test_function_that_cannot_be_had_is_refused(
    tmp_path: Path, text: str | None, name: str, said: str
) -> None:
    path = tmp_path / "mine.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UsageError, match=said):
        score(analyse(conv_chain()), f"{path}:{name}")


# ---------------------------------------------------------------------- what a refit would leave


def test_a_channel_that_one_matrix_of_a_stack_reads_is_worth_something() -> None:
    weight = np.zeros((3, 8, 5), np.float32)
    weight[2] = RNG.standard_normal((8, 5))
    weight[2, 6] = 0
    model = parsed(
        "g (float[N,3,7,6] x) => (float[N,3,7,5] y) {h = MatMul(x, a) y = MatMul(h, w)}",
        a=np.linalg.qr(RNG.standard_normal((8, 6)))[0].T.astype(np.float32), w=weight,
    )  # fmt: skip
    x = RNG.standard_normal((60, 3, 7, 6)).astype(np.float32)
    graph = analyse(model)
    data = Data([{"x": x}], "given", random=False, samples=60)
    values = score(graph, "obs", data=data)[graph.prunable[0].id]
    assert np.argmin(values) == 6
    assert np.sum(values > 1e-6) >= 5


def test_wide_layers_are_ranked_by_channels_as_narrow_ones_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = parsed(
        "g (float[N,3,9,9] x) => (float[N,5,7,7] y) {h = Conv(x, a, b) r = Relu(h) y = Conv(r, w)}",
        a=RNG.standard_normal((24, 3, 1, 1)).astype(np.float32),
        b=RNG.standard_normal(24).astype(np.float32),
        w=(RNG.standard_normal((5, 24, 3, 3)) * RNG.uniform(0, 2, (24, 1, 1))).astype(np.float32),
    )
    x = RNG.standard_normal((60, 3, 9, 9)).astype(np.float32)
    graph = analyse(model)
    data = Data([{"x": x}], "given", random=False, samples=60)
    group = graph.prunable[0].id
    narrow = score(graph, "obs", data=data)[group]
    monkeypatch.setattr(calibrate, "_MOST_GRAM_BYTES", 8 * 215 * 215)
    wide = score(graph, "obs", data=data)[group]
    assert not np.array_equal(wide, narrow)
    half = set(np.argsort(narrow)[:12])
    assert len(half & set(np.argsort(wide)[:12])) >= 9
