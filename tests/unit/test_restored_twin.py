"""Groups cut alone and made up for: what is measured is what the restored model gives."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from onnxprune.analyse import analyse
from onnxprune.compensate import compensated
from onnxprune.data import Data, load_data
from onnxprune.feeds import Batch
from onnxprune.gauges import Drifted, Gauge
from onnxprune.groups import DependencyGraph
from onnxprune.io import load
from onnxprune.model import Model
from onnxprune.restore import refit
from onnxprune.restored_twin import Restorer
from onnxprune.rewrite import operate
from onnxprune.runtime import session
from onnxprune.score import score
from onnxprune.sensitivity import BUDGET, Bench, Study, one_family
from onnxprune.suffix import families
from tests.small import MODELS, conv_chain, parsed

RATIOS = (0.25, 0.5)


def smooth(count: int, *shape: int, seed: int = 0) -> Data:
    """Samples that are mixtures of a few, so that channels tell of one another."""
    rng = np.random.default_rng(seed)
    few = rng.standard_normal((6, *shape))
    mixed = np.einsum("ns,s...->n...", rng.standard_normal((count, 6)), few).astype(np.float32)
    return Data(({"x": mixed},), "given", random=False, samples=count)


def bench_of(
    graph: DependencyGraph, batches: Sequence[Batch], restore: str, budget: int = BUDGET
) -> Bench:
    todo = tuple(range(len(families(graph))))
    study = Study(
        b"", "heads", {}, "l1", 0, RATIOS, tuple(batches), Gauge(), 0.0, todo, budget, restore
    )
    return Bench(study, graph, score(graph, "l1"))


def losses(
    graph: DependencyGraph, batches: Sequence[Batch], restore: str, budget: int = BUDGET
) -> list[list[float]]:
    bench = bench_of(graph, batches, restore, budget)
    return [[p.loss for p in bench.measure(n)] for n in range(len(families(graph)))]


def drift(original: Model, made: Model, batches: Sequence[Batch]) -> float:
    first, second, found = session(original), session(made), Drifted()
    for batch in batches:
        found.add(first.run(batch), second.run(batch))
    return found.result()


@pytest.mark.parametrize("name", ["chain", "fashion_vgg", "fashion_resnet"])
def test_bias_gives_what_the_compensated_model_gives(name: str) -> None:
    if name == "chain":
        model, batches = conv_chain((3, 8, 12), batch="N"), smooth(8, 3, 8, 8).batches
    else:
        model = load(MODELS / f"{name}.onnx")
        batches = [{"input": load_data(MODELS / "fashion_calib.npz", model).batches[0]["input"]}]
    graph = analyse(model)
    importance = score(graph, "l1")
    found = losses(graph, batches, "bias")
    for number, family in enumerate(families(graph)):
        for ratio, loss in zip(RATIOS, found[number], strict=True):
            plan = one_family(graph, importance, family, ratio)
            wanted = drift(model, operate(compensated(plan)).model, batches)
            assert loss == pytest.approx(wanted, rel=1e-3, abs=1e-4)
    plain = losses(graph, batches, "none")
    assert not np.allclose(found, plain)


def test_refit_gives_what_refitting_the_whole_model_gives_where_one_layer_is_behind() -> None:
    model = conv_chain((3, 8, 12), batch="N")
    graph, data = analyse(model), smooth(100, 3, 8, 8)
    last = families(graph)[-1]
    found = losses(graph, data.batches, "refit")[-1]
    plain = losses(graph, data.batches, "none")[-1]
    for ratio, loss, before in zip(RATIOS, found, plain, strict=True):
        plan = one_family(graph, score(graph, "l1"), last, ratio)
        made, layers, _ = refit(plan, operate(plan).model, data)
        assert [layer.node for layer in layers] == ["y"]
        assert loss == pytest.approx(drift(model, made, data.batches), rel=0.02)
        assert loss < 0.5 * before


@pytest.mark.parametrize(
    ("text", "shapes"),
    [
        pytest.param("y = Gemm<transB=1>(r, v, b)", (5, 8), id="gemm"),
        pytest.param("y = Gemm<transB=1, alpha=0.5, beta=2.0>(r, v, b)", (5, 8), id="alpha"),
        pytest.param("m = MatMul(r, v) y = Add(m, b)", (8, 5), id="matmul"),
        pytest.param("t = Transpose<perm=[1,0]>(v) m = MatMul(r, t) y = Add(m, b)", (5, 8),
                     id="transposed"),
    ],
)  # fmt: skip
def test_channels_that_are_there_twice_cost_nothing_after_a_refit(
    text: str, shapes: tuple[int, int]
) -> None:
    rng = np.random.default_rng(0)
    half = rng.standard_normal((4, 6)).astype(np.float32)
    model = parsed(
        f"g (float[N,6] x) => (float[N,5] y) {{ h = Gemm<transB=1>(x, w) r = Relu(h) {text} }}",
        w=np.concatenate([half, 0.5 * half]),
        v=rng.standard_normal(shapes).astype(np.float32),
        b=rng.standard_normal(5).astype(np.float32),
    )
    data = smooth(200, 6)
    graph = analyse(model)
    importance = {0: np.array([4.0, 4, 4, 4, 1, 1, 1, 1])}
    study = Study(b"", "heads", {}, "l1", 0, (0.5,), data.batches, Gauge(), 0.0, (0,), BUDGET)
    (before,) = Bench(study, graph, importance).measure(0)  # type: ignore[arg-type]
    (after,) = bench_of_given(graph, data, importance)
    assert before.loss > 0.2
    assert after.loss < 1e-3


def bench_of_given(graph: DependencyGraph, data: Data, importance: object) -> list:  # type: ignore[type-arg]
    study = Study(
        b"", "heads", {}, "l1", 0, (0.5,), data.batches, Gauge(), 0.0, (0,), BUDGET, "refit"
    )
    return Bench(study, graph, importance).measure(0)  # type: ignore[arg-type]


def test_refit_loses_less_in_nearly_every_group_of_a_transformer() -> None:
    model = load(MODELS / "fashion_vit.onnx")
    data = load_data(MODELS / "fashion_calib.npz", model)
    graph = analyse(model)
    plain, fitted = (np.array(losses(graph, data.batches, how)) for how in ("none", "refit"))
    cut = plain > 0
    assert (fitted[cut] < plain[cut]).mean() > 0.9
    assert fitted[cut].mean() < 0.7 * plain[cut].mean()


def test_grouped_and_transposed_convolutions_are_refitted() -> None:
    rng = np.random.default_rng(0)

    def weight(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    model = parsed(
        """g (float[N,3,6,6] x) => (float[N,4,12,12] y) {
            h = Conv<pads=[1,1,1,1]>(x, a) r = Relu(h)
            k = Conv<group=2, pads=[1,1,1,1]>(r, c) s = Relu(k)
            y = ConvTranspose<strides=[2,2]>(s, d)
        }""",
        a=weight(16, 3, 3, 3), c=weight(12, 8, 3, 3), d=weight(12, 4, 2, 2),
    )  # fmt: skip
    graph, data = analyse(model), smooth(64, 3, 6, 6)
    bench = bench_of(graph, data.batches, "refit")
    readers = {r.node.op_type for s in bench.suffixes.values() for r in s.readers}
    assert readers == {"Conv", "ConvTranspose"}
    plain, fitted = (np.array(losses(graph, data.batches, how)) for how in ("none", "refit"))
    assert (fitted < 0.9 * plain).all()
    again = losses(graph, data.batches, "refit", budget=0)  # one batch at a time
    assert np.allclose(fitted, again, rtol=1e-4)


def test_half_precision_is_restored_in_its_own_type() -> None:
    rng = np.random.default_rng(0)
    model = parsed(
        """g (float16[N,6] x) => (float16[N,5] y) {
            h = MatMul(x, w) r = Relu(h) y = MatMul(r, v)
        }""",
        w=rng.standard_normal((6, 12)).astype(np.float16),
        v=rng.standard_normal((12, 5)).astype(np.float16),
    )
    data = smooth(200, 6)
    batches = [{"x": batch["x"].astype(np.float16)} for batch in data.batches]
    graph = analyse(model)
    (plain,), (fitted,) = (losses(graph, batches, how) for how in ("none", "refit"))
    assert all(after < 0.7 * before for before, after in zip(plain, fitted, strict=True))


def test_readers_whose_weights_others_share_or_that_are_quantized_stay_as_they_are() -> None:
    rng = np.random.default_rng(0)
    model = parsed(
        """g (float[N,6] x) => (float[N,5] y) {
            h = MatMul(x, w) r = Relu(h) q = DequantizeLinear(v, s) y = MatMul(r, q)
        }""",
        w=rng.standard_normal((6, 12)).astype(np.float32),
        v=rng.integers(-9, 9, (12, 5)).astype(np.int8),
        s=np.array(0.1, np.float32),
    )
    graph = analyse(model)
    plan = one_family(graph, score(graph, "l1"), families(graph)[0], 0.5)
    assert Restorer(graph, "refit", samples=8).readers([plan]) == ()
    batches = smooth(8, 6).batches
    assert losses(graph, batches, "refit") == losses(graph, batches, "none")
