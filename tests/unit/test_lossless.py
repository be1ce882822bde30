from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from onnxprune.analyse import analyse
from onnxprune.data import random_data
from onnxprune.errors import RecipeError, UsageError
from onnxprune.io import load
from onnxprune.lossless import lossless_plan, without_effect
from onnxprune.model import Model
from onnxprune.pipeline import inspect, shrink
from onnxprune.recipe import read
from onnxprune.rewrite import operate
from onnxprune.runtime import session
from tests.masked import folded, masked
from tests.oracle import gap
from tests.small import MODELS, array, conv_chain, parsed, reloaded

FASHION = ("fashion_resnet", "fashion_vgg", "fashion_mobile")
RNG = np.random.default_rng(7)
BODY = "(float[2,3,6,6] x) => (float[2,4,h,w] y)"


def randn(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def without(weight: np.ndarray, axis: int, *indices: int) -> np.ndarray:
    """The weight with some slices set to zero."""
    result = weight.copy()
    np.moveaxis(result, axis, 0)[list(indices)] = 0
    return result


def error(model: Model, other: Model) -> float:
    """Largest difference of any output, by its scale."""
    data = random_data(model)
    runs = [
        [session(each, optimise=False).run(batch) for batch in data.probes]
        for each in (model, other)
    ]
    return max(gap(*runs, name) for name in runs[0][0])


def removed(model: Model) -> Mapping[str, Sequence[int]]:
    """What goes from the first axis of each weight that lost something, after a proof."""
    surgery = operate(lossless_plan(analyse(model)))
    assert error(model, surgery.model) < 1e-5
    return {
        entry.tensor: entry.indices
        for entry in surgery.removed
        if entry.role == "producer" and entry.at is None
    }


def batch_norm(x: str, y: str, number: int = 0) -> str:
    names = ", ".join(f"{part}{number}" for part in ("gamma", "beta", "mean", "var"))
    return f"{y} = BatchNormalization({x}, {names})"


def statistics(width: int, number: int = 0, **given: Sequence[float]) -> dict[str, np.ndarray]:
    values = {
        "gamma": RNG.uniform(0.5, 1.5, width),
        "beta": RNG.standard_normal(width),
        "mean": RNG.standard_normal(width),
        "var": RNG.uniform(0.5, 2, width),
        **given,
    }
    return {f"{name}{number}": np.asarray(v, np.float32) for name, v in values.items()}


# ------------------------------------------------------------------------- masked by another tool


@pytest.mark.parametrize("ratio", [0.3, 0.5])
@pytest.mark.parametrize("which", ["consumers", "producers"])
@pytest.mark.parametrize("bn", ["kept", "folded"])
@pytest.mark.parametrize("name", FASHION)
def test_masked_model_gets_to_its_physical_size(
    name: str, bn: str, which: str, ratio: float
) -> None:
    model = load(MODELS / f"{name}.onnx")
    plan, zeroed = masked(model if bn == "kept" else folded(model), ratio, which)
    found = lossless_plan(analyse(zeroed))
    assert found.absorbed == ()
    small, wanted = operate(found).model, operate(plan).model
    assert {n: w.shape for n, w in small.weights().items()} == {
        n: w.shape for n, w in wanted.weights().items()
    }
    assert error(zeroed, small) < 1e-5


@pytest.mark.parametrize("name", FASHION)
def test_zeroed_filters_before_batch_normalization_leave_one_channel_of_a_group_at_most(
    name: str,
) -> None:
    plan, zeroed = masked(load(MODELS / f"{name}.onnx"), 0.5, "filters")
    found = lossless_plan(analyse(zeroed))
    for group in found.graph.prunable:
        left, wanted = found.keep[group.id].size, plan.keep[group.id].size
        assert wanted <= left <= wanted + 1
    assert error(zeroed, operate(found).model) < 1e-5


def test_model_in_which_every_channel_matters_is_left_alone() -> None:
    for name in FASHION:
        assert without_effect(analyse(load(MODELS / f"{name}.onnx"))) == 0


# -------------------------------------------------------------------------------- one at a time


def test_constant_before_a_padded_conv_stays_alone() -> None:
    model = parsed(
        f"g {BODY} {{ c = Conv(x, w) {batch_norm('c', 'n')} r = Relu(n)\n"
        "y = Conv<pads=[1,1,1,1]>(r, v) }",
        w=randn(5, 3, 1, 1),
        v=randn(4, 5, 3, 3),
        **statistics(5, gamma=[1, 0, 1, 1, 1], beta=[0, 2, 0, 0, 0]),
    )
    assert removed(model) == {}


def test_constants_before_a_padded_conv_are_gathered_into_the_largest() -> None:
    model = parsed(
        f"g {BODY} {{ c = Conv(x, w) {batch_norm('c', 'n')} r = Relu(n)\n"
        "y = Conv<pads=[1,1,1,1]>(r, v) }",
        w=randn(5, 3, 1, 1),
        v=randn(4, 5, 3, 3),
        **statistics(5, gamma=[0, 0, 1, 0, 0], beta=[0.5, 2, 0, -1, 1]),
    )
    assert removed(model) == {"w": (0, 3, 4)}
    plan = lossless_plan(analyse(model))
    assert plan.why[0] == "3 of 5 without effect; constants kept beneath zero padding: 1"
    surgery = operate(plan)
    assert surgery.restored == ("v",)
    v, made = array(model, "v"), array(surgery.model, "v")
    np.testing.assert_allclose(made[:, 0], v[:, 1] + v[:, 0] / 4 + v[:, 4] / 2, rtol=1e-6)


def test_constant_moves_to_the_bias_of_a_conv_without_padding() -> None:
    model = parsed(
        f"g {BODY} {{ c = Conv(x, w) {batch_norm('c', 'n')} r = Relu(n)\n y = Conv(r, v) }}",
        w=randn(5, 3, 1, 1),
        v=randn(4, 5, 3, 3),
        **statistics(5, gamma=[1, 0, 1, 1, 1], beta=[0, 2, 0, 0, 0]),
    )
    assert removed(model) == {"w": (1,)}
    surgery = operate(lossless_plan(analyse(model)))
    (bias,) = surgery.restored
    expected = 2 * array(model, "v")[:, 1].sum(axis=(1, 2), dtype=float)
    np.testing.assert_allclose(array(surgery.model, bias), expected, rtol=1e-6)


def test_constant_is_added_to_a_bias_that_is_cut_itself() -> None:
    model = parsed(
        f"g {BODY} {{ c = Conv(x, w) {batch_norm('c', 'n')} r = Conv(n, v, b) z = Relu(r)\n"
        "y = Conv(z, u) }",
        w=randn(5, 3, 1, 1),
        v=randn(6, 5, 1, 1),
        b=randn(6),
        u=without(randn(4, 6, 1, 1), 1, 2),
        **statistics(5, gamma=[1, 0, 1, 1, 1]),
    )
    assert removed(model) == {"w": (1,), "v": (2,)}
    surgery = operate(lossless_plan(analyse(model)))
    assert surgery.restored == ("b",)
    beta, v = array(model, "beta0")[1], array(model, "v")[:, 1, 0, 0]
    expected = np.delete(array(model, "b") + beta * v, 2)
    np.testing.assert_allclose(array(surgery.model, "b"), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("gemm", "extra"),
    [
        ("Gemm<transB=1>(f, v)", {}),
        ("Gemm<transB=1, alpha=0.5, beta=2.0>(f, v, b)", {"b": randn(4)}),
        ("Gemm<transB=1, beta=0.0>(f, v)", {}),
        ("Gemm<transB=1>(f, v, b)", {"b": randn(1)}),
        ("MatMul(f, vt)", {}),
    ],
    ids=["no bias", "scaled bias", "beta of nothing", "scalar bias", "MatMul"],
)
def test_constant_moves_to_the_bias_of_a_linear_layer(
    gemm: str, extra: dict[str, np.ndarray]
) -> None:
    v = randn(4, 5)
    model = parsed(
        "g (float[2,3,6,6] x) => (float[2,4] y) { c = Conv(x, w)\n"
        f"{batch_norm('c', 'n')} p = GlobalAveragePool(n) f = Flatten(p) y = {gemm} }}",
        w=randn(5, 3, 1, 1),
        **({"vt": v.T.copy()} if "vt" in gemm else {"v": v}),
        **extra,
        **statistics(5, gamma=[1, 0, 1, 1, 0]),
    )
    assert removed(model) == {"w": (1, 4)}


def test_constant_moves_into_the_add_that_follows_a_matmul() -> None:
    model = parsed(
        "g (float[2,5] x) => (float[2,4] y) {\n"
        "a = MatMul(x, w) b = Add(a, s) r = Relu(b) c = MatMul(r, v) y = Add(c, t) }",
        w=without(randn(5, 6), 1, 3),
        s=np.full(6, 0.25, np.float32),
        v=randn(6, 4),
        t=randn(4),
    )
    surgery = operate(lossless_plan(analyse(model)))
    assert surgery.restored == ("t",)
    assert error(model, surgery.model) < 1e-5
    assert [node.op_type for node in surgery.model.proto.graph.node] == [
        node.op_type for node in model.proto.graph.node
    ]


def test_relu_is_dead_where_its_bound_says_so() -> None:
    # Sigmoid lies in [0, 1]: filters of one sign and a shift bound what follows.
    w = randn(4, 3, 1, 1)
    v = np.abs(randn(6, 4, 1, 1))
    bias = np.zeros(6, np.float32)
    bias[[1, 4]] = -v[[1, 4]].sum(axis=(1, 2, 3)) - 0.1
    bias[2] = -0.9 * v[2].sum()
    model = parsed(
        f"g {BODY} {{ c = Conv(x, w) s = Sigmoid(c) d = Conv<pads=[1,1,1,1]>(s, v, b)\n"
        "r = Relu(d) y = Conv<pads=[1,1,1,1]>(r, u) }",
        w=w,
        v=v,
        b=bias,
        u=randn(4, 6, 3, 3),
    )
    assert removed(model) == {"v": (1, 4)}


def test_what_only_a_dead_relu_reads_goes_too() -> None:
    v = np.zeros((2, 4, 1, 1), np.float32)
    v[0, 1:] = randn(3, 1, 1)
    v[1, 0] = 0.5  # of a Sigmoid: at most 0.5, so that the Relu behind -1 is dead
    model = parsed(
        f"g {BODY} {{ c = Conv(x, w) s = Sigmoid(c) d = Conv(s, v, b) r = Relu(d)\n"
        "y = Conv(r, u) }",
        w=randn(4, 3, 1, 1),
        v=v,
        b=np.array([0, -1], np.float32),
        u=randn(4, 2, 1, 1),
    )
    assert removed(model) == {"v": (1,), "w": (0,)}


def test_what_only_channels_without_effect_read_goes_too() -> None:
    v = randn(5, 6, 3, 3)
    v[:, 2] = 0
    v[4, 2] = 1  # the one reader of channel 2 is itself read by nobody
    model = parsed(
        f"g {BODY} {{ c = Conv(x, w) r = Relu(c) d = Conv(r, v) y = Conv(d, u) }}",
        w=randn(6, 3, 1, 1),
        v=v,
        u=without(randn(4, 5, 1, 1), 1, 4),
    )
    assert removed(model) == {"w": (2,), "v": (4,)}


def test_residual_sum_needs_every_branch_to_be_constant() -> None:
    model = parsed(
        f"g {BODY} {{ a = Conv(x, w) b = Conv(x, v, vb) s = Add(a, b) r = Relu(s)\n"
        "y = Conv(r, u) }",
        w=without(randn(6, 3, 1, 1), 0, 1, 2, 3),
        v=without(randn(6, 3, 1, 1), 0, 2, 3, 4),
        vb=np.array([0, 0, 1, -1, 0, 0], np.float32),
        u=randn(4, 6, 1, 1),
    )
    assert removed(model) == {"w": (2, 3), "v": (2, 3)}


def test_residual_channel_goes_only_if_nobody_reads_it() -> None:
    model = parsed(
        "g (float[2,3,6,6] x) => (float[2,4,6,6] y, float[2,4,6,6] z) {\n"
        "a = Conv(x, w) b = Conv(a, v) s = Add(a, b) y = Conv(s, u) z = Conv(a, t) }",
        w=randn(6, 3, 1, 1),
        v=without(randn(6, 6, 1, 1), 1, 1, 2),
        u=without(randn(4, 6, 1, 1), 1, 1, 2),
        t=without(randn(4, 6, 1, 1), 1, 2),
    )
    assert removed(model) == {"w": (2,), "v": (2,)}


def test_depthwise_filters_pass_a_zero_on_and_a_constant_only_without_padding() -> None:
    def model(pads: str) -> Model:
        return parsed(
            f"g {BODY} {{ c = Conv(x, w, b) r = Relu(c) d = Conv<group=6{pads}>(r, v)\n"
            "y = Conv(d, u) }",
            w=without(randn(6, 3, 1, 1), 0, 1, 2),
            b=np.array([0, -1, 1, 0, 0, 0], np.float32),
            v=randn(6, 1, 3, 3),
            u=randn(4, 6, 1, 1),
        )

    assert removed(model(", pads=[1,1,1,1]")) == {"w": (1,)}
    assert removed(model("")) == {"w": (1, 2)}


def test_depthwise_filter_of_zeros_makes_its_input_useless() -> None:
    model = parsed(
        f"g {BODY} {{ c = Conv(x, w) d = Conv<group=6, pads=[1,1,1,1]>(c, v) y = Conv(d, u) }}",
        w=randn(6, 3, 1, 1),
        v=without(randn(6, 1, 3, 3), 0, 3),
        u=randn(4, 6, 1, 1),
    )
    assert removed(model) == {"w": (3,)}


def test_concatenated_channels_go_branch_by_branch() -> None:
    model = parsed(
        f"g {BODY} {{ a = Conv(x, w, wb) b = Conv(x, v) c = Concat<axis=1>(a, b)\n"
        "y = Conv(c, u, ub) }",
        w=without(randn(3, 3, 1, 1), 0, 0),
        wb=np.array([0.5, 0, 0], np.float32),
        v=randn(4, 3, 1, 1),
        u=without(randn(4, 7, 1, 1), 1, 5),
        ub=randn(4),
    )
    assert removed(model) == {"w": (0,), "v": (2,)}


def test_gated_channel_goes_with_the_gate_that_opens_it() -> None:
    model = parsed(
        f"g {BODY} {{ c = Conv(x, w) p = GlobalAveragePool(c) a = Conv(p, v) r = Relu(a)\n"
        "e = Conv(r, u) s = Sigmoid(e) m = Mul(c, s) y = Conv<pads=[1,1,1,1]>(m, t) }",
        w=without(randn(6, 3, 1, 1), 0, 2),
        v=randn(3, 6, 1, 1),
        u=randn(6, 3, 1, 1),
        t=randn(4, 6, 3, 3),
    )
    assert removed(model) == {"w": (2,), "u": (2,)}


def test_nothing_goes_across_a_normalisation() -> None:
    model = parsed(
        "g (float[2,5] x) => (float[2,4] y) {\n"
        "a = MatMul(x, w) n = LayerNormalization(a, g, b) y = MatMul(n, v) }",
        w=without(randn(5, 6), 1, 3),
        g=np.ones(6, np.float32),
        b=np.zeros(6, np.float32),
        v=without(randn(6, 4), 0, 3),
    )
    assert removed(model) == {}


def test_groups_of_channels_lose_as_many_as_each_can_spare() -> None:
    # Two groups of three inputs: three without effect in one, one in the other.
    v = randn(4, 3, 1, 1)
    v[:2, [0, 2]] = 0
    v[2:, 1] = 0
    model = parsed(
        f"g {BODY} {{ c = Conv(x, w) y = Conv<group=2>(c, v) }}", w=randn(6, 3, 1, 1), v=v
    )
    assert removed(model) == {"w": (0, 4)}


def test_parts_that_nobody_reads_keep_one_channel() -> None:
    model = parsed(
        f"g {BODY} {{ c = Conv(x, w) a, b = Split<axis=1, num_outputs=2>(c) y = Conv(a, v) }}",
        w=randn(6, 3, 1, 1),
        v=randn(4, 3, 1, 1),
    )
    assert len(removed(model)["w"]) == 2
    assert set(removed(model)["w"]) < {3, 4, 5}
    assert without_effect(analyse(model)) == 2


def test_channels_that_a_slice_leaves_out_go_but_for_one() -> None:
    model = parsed(
        f"g {BODY} {{ c = Conv(x, w) a = Slice(c, start, end, axis) y = Conv(a, v) }}",
        w=randn(6, 3, 1, 1),
        v=randn(4, 3, 1, 1),
        start=np.array([1]),
        end=np.array([4]),
        axis=np.array([1]),
    )
    assert len(removed(model)["w"]) == 2
    assert set(removed(model)["w"]) < {0, 4, 5}


def test_each_group_of_a_padded_conv_gathers_its_own_constants() -> None:
    model = parsed(
        f"g {BODY} {{ c = Conv(x, w) {batch_norm('c', 'n')} r = Relu(n)\n"
        "y = Conv<group=2, pads=[1,1,1,1]>(r, v) }",
        w=randn(8, 3, 1, 1),
        v=randn(4, 4, 3, 3),
        **statistics(8, gamma=[0, 0, 1, 0, 1, 0, 0, 1], beta=[1, 2, 0, -1, 0, 3, 1, 0]),
    )
    # Both groups lose as many: of the first, what is 0 or 1 could go.
    assert removed(model) == {"w": (3, 6)}
    surgery = operate(lossless_plan(analyse(model)))
    v, made = array(model, "v"), array(surgery.model, "v")
    np.testing.assert_allclose(made[2:, 1], v[2:, 1] + v[2:, 2] / 3, rtol=1e-5)


def test_transposed_conv_gathers_constants_too() -> None:
    model = parsed(
        f"g {BODY} {{ c = Conv(x, w, b) r = Relu(c) y = ConvTranspose<strides=[2,2]>(r, v) }}",
        w=without(randn(5, 3, 1, 1), 0, 0, 1, 4),
        b=np.array([1, 4, 0, 0, 2], np.float32),
        v=randn(5, 4, 3, 3),
    )
    assert removed(model) == {"w": (0, 4)}


def test_group_without_any_effect_keeps_one_channel() -> None:
    model = parsed(
        f"g {BODY} {{ c = Conv(x, w) y = Conv(c, v, b) }}",
        w=randn(6, 3, 1, 1),
        v=np.zeros((4, 6, 1, 1), np.float32),
        b=randn(4),
    )
    assert len(removed(model)["w"]) == 5


def test_channels_that_are_nearly_zero_stay() -> None:
    u = randn(4, 6, 1, 1)
    u[:, 2] = 1e-30
    model = parsed(f"g {BODY} {{ c = Conv(x, w) y = Conv(c, u) }}", w=randn(6, 3, 1, 1), u=u)
    assert removed(model) == {}


def test_zero_does_not_undo_a_nan() -> None:
    model = parsed(
        f"g {BODY} {{ c = Conv(x, w) d = Div(c, z) y = Conv(d, u) }}",
        w=randn(6, 3, 1, 1),
        z=np.array([1, 0, 1, 1, 1, 1], np.float32).reshape(6, 1, 1),
        u=without(randn(4, 6, 1, 1), 1, 1),
    )
    assert lossless_plan(analyse(model)).removes == 0


# ---------------------------------------------------------------------------------- the verb


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    _, zeroed = masked(conv_chain((3, 8, 12)), 0.5, "filters")
    reloaded(zeroed, tmp_path / "chain.onnx")
    return tmp_path / "chain.onnx"


def test_shrink_lossless_is_held_against_the_original(chain: Path) -> None:
    made, report = shrink(chain, lossless=True)
    assert report.importance == "lossless"
    assert report.exact is True
    assert report.verdict.status == "passed"
    assert report.verdict.twin is not None
    assert report.verdict.twin.max_rel < 1e-5
    assert array(made, "w0").shape[0] == 5
    assert report.recipe["restored"]
    assert report.recipe["options"]["lossless"] is True  # type: ignore[index]


def test_lossless_recipe_replays_to_the_same_file(chain: Path) -> None:
    first = chain.with_name("first.onnx")
    shrink(chain, lossless=True, output=first)
    _, report = shrink(chain, recipe=read(first), output=chain.with_name("again.onnx"))
    assert first.read_bytes() == chain.with_name("again.onnx").read_bytes()
    assert report.verdict.status == "passed"


def test_lossless_recipe_is_refused_where_the_channels_matter(chain: Path) -> None:
    made, _ = shrink(chain, lossless=True)
    with pytest.raises(RecipeError, match="other channels are without effect"):
        shrink(conv_chain((3, 8, 12)), recipe=read(made))


def test_groups_that_patterns_keep_stay_whole(chain: Path) -> None:
    made, report = shrink(chain, lossless=True, ignore=["w0"])
    assert array(made, "w0").shape[0] == 8
    assert array(made, "w1").shape[0] < 12
    assert report.groups[0].why == "kept: ignore 'w0'"


def test_nothing_without_effect_is_a_warning() -> None:
    made, report = shrink(conv_chain(), lossless=True)
    assert report.warnings == ("nothing was cut: no channel is without effect",)
    assert array(made, "w0").shape[0] == 8


def test_lossless_goes_with_neither_a_ratio_nor_a_recipe(chain: Path) -> None:
    with pytest.raises(UsageError, match="one of ratio, target, lossless and recipe"):
        shrink(chain, lossless=True, ratio=0.5)


def test_inspect_counts_channels_without_effect(chain: Path) -> None:
    _, report = inspect(chain)
    assert report.without_effect == 3 + 6
