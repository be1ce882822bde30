from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import numpy as np
import pytest

from onnxprune import latency
from onnxprune.analyse import DependencyGraph, analyse
from onnxprune.data import random_data
from onnxprune.extents import Extents, Layer, alone, extents_of
from onnxprune.graph import Node
from onnxprune.groups import random_keep
from onnxprune.latency import LatencyTable, source_of
from onnxprune.prepare import prepare
from onnxprune.rewrite import operate
from onnxprune.runtime import Kernel, profile, session
from onnxprune.select import PruningPlan
from onnxprune.staircase import Grid, axes_of, fit
from onnxprune.timing import (
    Peculiarities,
    Timing,
    compare_timings,
    interleaved,
    measure,
    median_interval,
    timing,
)
from onnxprune.types import AnyArray
from tests.small import conv_chain, parsed

CONV = Layer("Conv", (1, 64, 128), (1, 28, 28), (1, 1))
GROUPED = Layer("Conv", (3, 32, 32), (1, 14, 14), (3, 3))
DEPTHWISE = Layer("Conv", (96, 1, 1), (1, 14, 14), (3, 3))
PRODUCT = Layer("MatMul", (1, 50, 64, 192))
IDLE = Peculiarities(block=16, reorder=1e-9, profiling=0.0)


class Clock:
    """A clock that calls move on by the seconds they are said to take."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def call(self, name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            self.log.append(name)
            self.now += seconds

        return run

    def __call__(self) -> float:
        return self.now


# -- measuring


def test_models_run_in_turn_and_the_second_run_of_each_turn_counts() -> None:
    clock = Clock()
    spent = interleaved([clock.call("a", 1.0), clock.call("b", 2.0)], 0.0, clock)
    warm_up, rounds = clock.log[:6], clock.log[6:]
    assert warm_up == ["a", "b"] * 3
    assert rounds == ["a", "a", "b", "b"] * 7
    assert spent == [[1.0] * 7, [2.0] * 7]


def test_rounds_go_on_until_the_time_is_spent() -> None:
    clock = Clock()
    spent = interleaved([clock.call("a", 1.0), clock.call("b", 1.0)], 100.0, clock)
    assert [len(samples) for samples in spent] == [25, 25]


def test_interval_of_the_median_comes_from_the_ranks_alone() -> None:
    samples = [float(number) for number in range(100)]
    assert median_interval(samples) == (40.0, 59.0)
    assert median_interval(samples[::-1]) == (40.0, 59.0)
    assert median_interval([3.0]) == (3.0, 3.0)
    found = timing([3.0, 1.0, 2.0])
    assert (found.seconds, found.low, found.high, found.runs) == (2.0, 1.0, 3.0, 3)


def test_ratio_is_taken_round_by_round() -> None:
    # A machine that slows down by ten on the way changes both alike.
    old = timing([1.0] * 10 + [10.0] * 10)
    new = timing([0.5] * 10 + [5.0] * 10)
    assert compare_timings(old, new) == (0.5, 0.5, 0.5)


def test_measuring_runs_every_model_and_counts_as_many_runs() -> None:
    model = conv_chain()
    feeds = random_data(model, batches=1).batches[0]
    found = measure([model, conv_chain((3, 4))], feeds, seconds=0.0)
    assert [one.runs for one in found] == [7, 7]
    assert all(0 < one.low <= one.seconds <= one.high for one in found)


def test_profile_names_what_each_kernel_reads_and_makes() -> None:
    model = conv_chain((3, 16), bn=True)
    feeds = random_data(model, batches=1).batches[0]
    kernels = profile(model, feeds, runs=3, threads=1)
    (gemm,) = (kernel for kernel in kernels if kernel.op_type == "Gemm")
    assert gemm.outputs == ("y",)
    assert gemm.inputs[1] == "head"
    assert gemm.shape == (1, 4)
    assert all(kernel.seconds >= 0 for kernel in kernels)


# -- extents and grids


@pytest.mark.parametrize(
    ("layer", "extents", "rounded"),
    [
        pytest.param(CONV, (1, 20, 36), (1, 32, 48), id="whole blocks"),
        pytest.param(CONV, (1, 32, 48), (1, 32, 48), id="whole already"),
        pytest.param(CONV, (1, 7, 36), (1, 7, 48), id="few inputs are read as they lie"),
        pytest.param(CONV, (1, 22, 36), (1, 22, 36), id="off the alignment: plain layout"),
        pytest.param(DEPTHWISE, (20, 1, 1), (32, 1, 1), id="depthwise"),
        pytest.param(GROUPED, (3, 16, 16), (3, 16, 16), id="groups of whole blocks"),
        pytest.param(GROUPED, (3, 12, 12), (3, 12, 12), id="groups of less than a block"),
        pytest.param(DEPTHWISE, (22, 1, 1), (22, 1, 1), id="depthwise off the alignment"),
        pytest.param(PRODUCT, (1, 50, 33, 40), (1, 50, 33, 48), id="lanes of a product"),
    ],
)
def test_channels_are_rounded_up_as_the_runtime_pads_them(
    layer: Layer, extents: Extents, rounded: Extents
) -> None:
    assert layer.rounded(extents, 16) == rounded


def test_without_blocks_nothing_is_rounded() -> None:
    assert CONV.rounded((1, 22, 37), 1) == (1, 22, 37)
    assert not CONV.blocked((1, 16, 16), 1)


def test_grid_is_exact_for_a_cost_that_is_linear_in_each_count() -> None:
    def cost(extents: Extents) -> float:
        _, inputs, outputs = extents
        return 1 + 2 * inputs + 3 * outputs + 0.5 * inputs * outputs

    axes = ((1,), (16, 64), (16, 32, 128))
    grid = Grid(axes, {(1, a, b): cost((1, a, b)) for a in axes[1] for b in axes[2]})
    for point in ((1, 16, 16), (1, 40, 100), (1, 64, 128), (1, 80, 144)):
        assert grid(point) == pytest.approx(cost(point))


def test_grid_never_falls_to_nothing() -> None:
    grid = Grid(((16, 32),), {(16,): 1.0, (32,): 4.0})
    assert grid((1,)) == pytest.approx(0.1)


def test_blocked_and_plain_layouts_are_measured_apart() -> None:
    blocked = axes_of(CONV, (False, True, True), 16, blocked=True)
    plain = axes_of(CONV, (False, True, True), 16, blocked=False)
    assert blocked == ((1,), (4, 12, 16, 32, 48, 64), (16, 32, 64, 96, 128))
    assert plain == ((1,), (30, 46, 62), (16, 32, 64, 96, 128))
    assert axes_of(CONV, (False, False, True), 16, blocked=False) is None
    assert axes_of(PRODUCT, (False, False, False, True), 16, blocked=True) is None
    assert axes_of(PRODUCT, (False, False, False, True), 16, blocked=False) == (
        (1,), (50,), (64,), (32, 48, 96, 144, 192),
    )  # fmt: skip


def test_groups_of_several_channels_are_blocked_where_both_counts_are_whole_blocks() -> None:
    moving = (False, True, True)
    assert axes_of(GROUPED, moving, 16, blocked=True) == ((3,), (16, 32), (16, 32))
    assert axes_of(GROUPED, moving, 16, blocked=False) == ((3,), (4, 8, 24), (4, 8, 16, 24, 32))


def test_filters_cut_group_by_group_count_as_narrower_groups() -> None:
    model = parsed(
        "g (float[1,8,6,6] x) => (float[1,4,6,6] y) {a = Conv(x, v) b = Relu(a)\n"
        "c = Conv<group=2,pads=[1,1,1,1]>(b, w) y = Conv(c, u)}",
        v=np.ones((8, 8, 1, 1), np.float32),
        w=np.ones((8, 4, 3, 3), np.float32),
        u=np.ones((4, 8, 1, 1), np.float32),
    )
    graph = analyse(model)
    keep = random_keep(graph, 0.5, np.random.default_rng(0))
    shapes = latency._Shapes(graph.tracer.traces[0], graph.dead(keep))
    made = operate(PruningPlan(graph, keep)).model
    (group,) = (a.i for n in made.proto.graph.node for a in n.attribute if a.name == "group")
    weight = made.weights()["w"].shape
    node = graph.graph.producer["c"]
    assert shapes.extents(node) == (group, weight[1], weight[0] // group)


def stepped(layer: Layer, extents: Extents) -> float:
    """A cost that charges whole blocks, and five times as much off the alignment."""
    factor = 1.0 if layer.blocked(extents, 16) else 5.0
    return factor * prod(layer.rounded(extents, 16)) * 1e-9


def test_staircase_gives_back_a_stepped_cost_at_counts_that_were_not_measured() -> None:
    asked: list[tuple[Layer, Extents]] = []

    def cost(wanted: Sequence[tuple[Layer, Extents]]) -> list[float]:
        asked.extend(wanted)
        return [stepped(*one) for one in wanted]

    wide = Layer("Conv", (1, 64, 256), (1, 28, 28), (1, 1))
    found = fit({CONV: (False, True, True), wide: (False, True, True)}, 16, cost)
    for extents in ((1, 40, 100), (1, 42, 100), (1, 63, 77), (1, 17, 16), (1, 64, 128)):
        assert found[CONV](extents) == pytest.approx(stepped(CONV, extents)), extents
    assert len({(layer.geometry, extents) for layer, extents in asked}) == len(asked)
    assert len(asked) < 2 * len(found[wide].grids[True].costs) + 2 * len(
        found[wide].grids[False].costs
    )


def node_of(text: str, **weights: np.ndarray) -> Node:
    return prepare(parsed(text, **weights)).nodes[0]


@pytest.mark.parametrize(
    ("text", "x", "w", "extents"),
    [
        pytest.param("y = Conv(x, w)", (1, 6, 4, 4), (8, 6, 3, 3), (1, 6, 8), id="dense"),
        pytest.param("y = Conv<group=6>(x, w)", (1, 6, 4, 4), (12, 1, 3, 3), (6, 1, 2), id="dw"),
        pytest.param(
            "y = ConvTranspose<group=2>(x, w)",
            (1, 6, 4, 4),
            (6, 5, 2, 2),
            (2, 3, 5),
            id="transposed",
        ),
        pytest.param("y = Gemm<transB=1>(x, w)", (2, 6), (8, 6), (1, 2, 6, 8), id="gemm"),
        pytest.param("y = MatMul(x, w)", (1, 5, 6), (6, 8), (1, 5, 6, 8), id="matmul"),
    ],
)
def test_a_layer_alone_has_the_shapes_it_has_in_the_model(
    text: str, x: tuple[int, ...], w: tuple[int, ...], extents: Extents
) -> None:
    dims = ",".join(map(str, x))
    node = node_of(f"g (float[{dims}] x) => (float y) {{{text}}}", w=np.ones(w, np.float32))
    assert extents_of(node, x, w) == extents
    layer = latency.layer_of(node, [x, w], weighted=True)
    assert layer is not None
    model, feeds = alone([(layer, extents)], 17)
    (weight,) = model.proto.graph.initializer
    assert tuple(weight.dims) == w
    assert [array.shape for array in feeds.values()] == [x]
    assert session(model, threads=1).run(feeds)["end0_"].size >= 1


def test_heads_of_an_attention_are_the_batch_of_its_product() -> None:
    layer = Layer("MatMul", (4, 10, 8, 10), weighted=False)
    model, feeds = alone([(layer, (3, 10, 8, 10))], 17)
    assert sorted(array.shape for array in feeds.values()) == [(3, 8, 10), (3, 10, 8)]
    assert session(model, threads=1).run(feeds)["end0_"].shape == (1, 1, 1)


# -- the table


Prepared = tuple[DependencyGraph, dict[str, AnyArray]]


def prepared(widths: Sequence[int]) -> Prepared:
    graph = analyse(conv_chain(widths))
    return graph, dict(random_data(graph.graph.model, batches=1).batches[0])


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which every layer costs what ``stepped`` says, and other kernels nothing."""

    def kernels(model: object, feeds: object, **_: object) -> tuple[Kernel, ...]:
        graph = analyse(model).graph  # type: ignore[arg-type]
        env = analyse(model).envs[0]  # type: ignore[arg-type]
        found = []
        for node in graph.nodes:
            layer = latency.layer_of(
                node, [env.shape(name) for name in node.inputs[:2]], weighted=True
            )
            spent = 0.0 if layer is None else stepped(layer, layer.extents)
            found.append(Kernel(node.label, node.op_type, node.inputs, node.outputs, (), spent))
        return tuple(found)

    def total(models: Sequence[object], feeds: object, **_: object) -> list[Timing]:
        spent = (sum(kernel.seconds for kernel in kernels(model, feeds)) for model in models)
        return [timing([seconds]) for seconds in spent]

    def layers(wanted: Sequence[tuple[Layer, Extents]], **_: object) -> list[float]:
        return [stepped(*one) for one in wanted]

    idle = Peculiarities(block=16, reorder=0.0, profiling=0.0)
    monkeypatch.setattr(latency, "profile", kernels)
    monkeypatch.setattr(latency, "measure", total)
    monkeypatch.setattr(latency, "_LEAST", 0.0)
    monkeypatch.setattr(latency, "time_layers", layers)
    monkeypatch.setattr(Peculiarities, "measured", staticmethod(lambda threads: idle))
    monkeypatch.setattr(latency, "_LEAST", 0.0)


@pytest.mark.usefixtures("told")
@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 0.6, 0.7])
def test_prediction_is_the_sum_of_the_layers_at_the_shapes_after_the_cut(ratio: float) -> None:
    graph, feeds = prepared((3, 64, 96, 128))
    table = LatencyTable(graph, feeds)
    keep = random_keep(graph, ratio, np.random.default_rng(0))
    made = operate(PruningPlan(graph, keep)).model
    (wanted,) = latency.measure([made], feeds)
    assert table.predict(keep) == pytest.approx(wanted.seconds, rel=1e-6)
    assert table.predict({}) == pytest.approx(table.seconds)


@pytest.mark.usefixtures("told")
def test_kernel_of_unknown_origin_goes_by_what_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, feeds = prepared((3, 64, 96))

    def kernels(model: object, feeds: object, **_: object) -> tuple[Kernel, ...]:
        return (
            Kernel("c0_nchwc", "Conv", ("x",), ("reorder_token_1",), (), 1e-3),
            Kernel("Gelu", "Gelu", ("reorder_token_1",), ("reorder_token_2",), (), 1e-3),
        )

    monkeypatch.setattr(latency, "profile", kernels)
    (_, gelu) = LatencyTable(graph, feeds).charges
    assert gelu.node is None
    assert gelu.tensors == ("c0",)


@pytest.mark.usefixtures("told")
def test_table_says_what_each_layer_costs_before_and_after() -> None:
    graph, feeds = prepared((3, 64, 96))
    keep = random_keep(graph, 0.5, np.random.default_rng(0))
    found = LatencyTable(graph, feeds).layers(keep)
    before, after = found["c1"]
    assert before == pytest.approx(64 * 96 * 1e-9)
    assert after == pytest.approx(32 * 48 * 1e-9)


def test_reordering_is_charged_where_layouts_meet() -> None:
    graph, _ = prepared((3, 64, 64, 64))
    blocks = latency.Blocks(graph, IDLE)
    trace = graph.tracer.traces[0]

    def cost(ratio: float) -> float:
        keep = random_keep(graph, ratio, np.random.default_rng(0))
        return blocks.reordering(latency._Shapes(trace, graph.dead(keep)))

    least = latency._LEAST
    # Only what leaves the last pooling.
    assert cost(0.0) == pytest.approx(64e-9 + least)
    # 58 channels: the first Conv reads 3 and is blocked, those that read 58 are not.
    assert cost(0.1) == pytest.approx(58 * 64 * 1e-9 + least)


def test_a_kernel_in_blocks_is_traced_to_the_convolution_before_it() -> None:
    graph = prepare(conv_chain((3, 8)))
    claimed: set[int] = set()
    fused = Kernel("r0_nchwc", "Conv", ("x", "w0"), ("reorder_token_0",), (), 1.0)
    found = source_of(fused, graph, claimed)
    assert found is not None
    assert found.key == "c0"
    assert claimed == {found.index}
    pool = source_of(Kernel("p_nchwc", "GlobalAveragePool", (), ("t",), (), 1.0), graph, claimed)
    assert pool is not None
    assert pool.key == "p"
    norm = source_of(Kernel("n0_bn_nchwc", "Conv", (), ("t",), (), 1.0), graph, set())
    assert norm is not None
    assert norm.key == "n0"
    assert source_of(Kernel("nowhere", "Conv", (), (), (), 1.0), graph, claimed) is None


def test_fusion_that_renames_everything_is_traced_by_what_stands_before_its_own_name() -> None:
    weights = {"w": np.ones((8, 8), np.float32), "b": np.ones(8, np.float32)}
    text = "g (float[2,5,8] x) => (float[2,5,8] y) {m = MatMul(x, w) a = Add(m, b) y = Relu(a)}"
    graph = prepare(parsed(text.replace("m ", '"/h/m" ').replace("(m,", '("/h/m",'), **weights))
    fused = Kernel("/h/m/MatMulAddFusion", "Gemm", ("arg", "w", "b"), ("arg_1",), (), 1.0)
    claimed: set[int] = set()
    found = source_of(fused, graph, claimed)
    assert found is not None
    assert found.op_type == "MatMul"
    assert claimed == {found.index}


def test_products_of_a_transformer_are_found_among_the_kernels() -> None:
    rng = np.random.default_rng(0)
    weights = {
        name: rng.standard_normal(shape).astype(np.float32)
        for name, shape in {"w1": (64, 256), "b1": (256,), "w2": (256, 64), "b2": (64,)}.items()
    }
    text = """g (float[1,48,64] x) => (float[1,48,64] y) {
        m = MatMul(x, w1) a = Add(m, b1) r = Relu(a) n = MatMul(r, w2) y = Add(n, b2)}"""
    graph = analyse(parsed(text, **weights))
    feeds = random_data(graph.graph.model, batches=1).batches[0]
    table = LatencyTable(graph, feeds, seconds=0.05, runs=3)
    layers = [charge.stairs.layer.extents for charge in table.charges if charge.stairs is not None]
    assert layers == [(1, 48, 64, 256), (1, 48, 256, 64)]


def test_table_of_a_real_model_predicts_in_milliseconds_and_meets_the_original() -> None:
    graph, feeds = prepared((3, 32, 32))
    table = LatencyTable(graph, feeds, seconds=0.05, runs=3)
    assert table.predict({}) == pytest.approx(table.seconds)
    assert table.runtime.block in {1, 8, 16}
    halved = table.predict(random_keep(graph, 0.5, np.random.default_rng(0)))
    assert 0 < halved < float("inf")
