"""Every form of a layer is refitted, or says why not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
import pytest

from onnxprune import refit as least_squares
from onnxprune.analyse import analyse
from onnxprune.calibrate import stream
from onnxprune.model import Model
from onnxprune.planning import Judge
from onnxprune.restore import refit
from onnxprune.rewrite import operate
from onnxprune.score import score
from onnxprune.select import select
from onnxprune.types import Refitted
from tests.oracle import plan_without
from tests.small import array, parsed
from tests.unit.test_restore import GONE, assert_same_interface, done, given, mixed, smooth

RNG = np.random.default_rng(8)
_ROWS = "g (float[N,7,6] x) => (float[N,{y}] y) {{h = MatMul(x, a) {rest}}}"
_IMAGE = "g (float[N,3,6,6] x) => (float[N,5,6,6] y) {{h = Conv(x, a) {rest}}}"


@pytest.fixture(autouse=True)
def _same_numbers_in_any_order() -> None:
    RNG.bit_generator.state = np.random.default_rng(8).bit_generator.state


@dataclass
class Form:
    """A layer that reads what was cut, and everything that it needs."""

    text: str
    weights: Mapping[str, tuple[int, ...]]
    rows: tuple[int, ...] = (7, 6)
    first: tuple[int, ...] = (6, 8)
    axis: int = 1  # along which the maker's outputs lie
    tolerance: float = 1e-8
    quantized: Mapping[str, float] = field(default_factory=dict)  # scale by weight


def rows(rest: str, out: str = "7,5", **weights: tuple[int, ...]) -> Form:
    return Form(_ROWS.format(y=out, rest=rest), weights)


def image(rest: str, **weights: tuple[int, ...]) -> Form:
    text = _IMAGE.format(rest=rest)
    return Form(text, weights, (3, 6, 6), (8, 3, 1, 1), 0)


FORMS = {
    "weight_first": rows(
        "t = Transpose<perm=[0,2,1]>(h) y = MatMul(w, t)", "5,7", w=(5, 8)),
    "weight_first_and_bias": rows(
        "t = Transpose<perm=[0,2,1]>(h) p = MatMul(w, t) y = Add(p, b)", "5,7",
        w=(5, 8), b=(5, 1)),
    "stack": Form(
        "g (float[N,3,7,6] x) => (float[N,3,7,5] y) {h = MatMul(x, a) y = MatMul(h, w)}",
        {"w": (3, 8, 5)}, (3, 7, 6)),
    "stack_and_bias": Form(
        "g (float[N,3,7,6] x) => (float[N,3,7,5] y) {"
        "h = MatMul(x, a) p = MatMul(h, w) y = Add(p, b)}",
        {"w": (3, 8, 5), "b": (3, 1, 5)}, (3, 7, 6)),
    "stack_that_repeats_the_data": Form(
        "g (float[N,1,7,6] x) => (float[N,3,7,5] y) {h = MatMul(x, a) y = MatMul(h, w)}",
        {"w": (3, 8, 5)}, (1, 7, 6)),
    "bias_of_more_axes": rows("p = MatMul(h, w) y = Add(p, b)", w=(8, 5), b=(1, 1, 5)),
    "reshaped_weight": rows("r = Reshape(w, shape) y = MatMul(h, r)", w=(8, 5, 1)),
    "pointwise_weight_without_kernel": image(
        "u = Unsqueeze(w, axes) y = Conv(h, u, b)", w=(5, 8), b=(5,)),
    "relu_inside": image(
        'y = com.microsoft.FusedConv<activation="Relu">(h, w, b)', w=(5, 8, 1, 1), b=(5,)),
    "clip_inside": image(
        'y = com.microsoft.FusedConv<activation="Clip", activation_params=[0.0, 6.0]>(h, w, b)',
        w=(5, 8, 1, 1), b=(5,)),
    "leaky_relu_inside_without_bias": image(
        'y = com.microsoft.FusedConv<activation="LeakyRelu", activation_params=[0.3]>(h, w)',
        w=(5, 8, 1, 1)),
    "sum_and_relu_inside": image(
        "k = Conv(x, c) "
        'y = com.microsoft.FusedConv<activation="Relu">(h, w, b, k)',
        w=(5, 8, 1, 1), b=(5,), c=(5, 3, 1, 1)),
    "quantized": Form(
        "g (float[N,7,6] x) => (float[N,7,5] y) {h = MatMul(x, a) "
        "d = DequantizeLinear(w, s) p = MatMul(h, d) y = Add(p, b)}",
        {"w": (8, 5), "b": (5,)}, tolerance=2e-3, quantized={"w": 0.05}),
    "quantized_by_channel": Form(
        "g (float[N,3,6,6] x) => (float[N,5,6,6] y) {h = Conv(x, a) "
        "d = DequantizeLinear<axis=0>(w, s) y = Conv(h, d, b)}",
        {"w": (5, 8, 1, 1), "b": (5,)}, (3, 6, 6), (8, 3, 1, 1), 0, 2e-3, {"w": 0.05}),
}  # fmt: skip


def teacher(form: Form) -> Model:
    rng = np.random.default_rng(1)
    weights = {"a": mixed(rng.standard_normal(form.first), form.axis, GONE)}
    for name, shape in form.weights.items():
        weights[name] = rng.standard_normal(shape).astype(np.float32)
        if name in form.quantized:
            channels = (shape[0],) if len(shape) == 4 else ()
            weights["s"] = np.full(channels, form.quantized[name], np.float32)
            weights[name] = np.clip(weights[name] / form.quantized[name], -127, 127).astype("i1")
    if "Reshape" in form.text:
        weights["shape"] = np.array([-1, 5], np.int64)
    if "Unsqueeze" in form.text:
        weights["axes"] = np.array([2, 3], np.int64)
    made = parsed(form.text, **weights)
    if "com.microsoft" in form.text:
        made.proto.opset_import.add(domain="com.microsoft", version=1)
    return made


@pytest.mark.parametrize("name", FORMS)
def test_what_others_can_stand_in_for_comes_back(name: str) -> None:
    form = FORMS[name]
    ran = done(teacher(form), GONE, given(smooth(200, *form.rows) + 0.3))
    before, after = ran.gains
    assert before > 0.02
    assert after < form.tolerance
    layer = ran.layers[-1]
    assert layer.ridge is not None, layer.why
    assert layer.after < form.tolerance
    assert [n.op_type for n in ran.made.proto.graph.node] == [
        n.op_type for n in ran.plain.proto.graph.node
    ]


def behind_what_was_cut(text: str, **weights: np.ndarray) -> list[Refitted]:
    """A network whose first group loses half of its channels, refitted."""
    model = parsed(text, **weights)
    model.proto.opset_import.add(domain="com.microsoft", version=1)
    graph = analyse(model)
    plan = select(graph, score(graph, "l1"), ratio=0.5)
    plain = operate(plan).model
    shape = [dim.dim_value for dim in model.proto.graph.input[0].type.tensor_type.shape.dim[1:]]
    data = given(smooth(300, *shape))
    made, layers, _ = refit(plan, plain, data)
    assert_same_interface(plain, made)
    judge = Judge(graph, given(smooth(300, *shape, seed=55)))
    assert judge.drift(made) < 0.9 * judge.drift(plain)
    return list(layers)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ('FusedGemm<activation="Relu", alpha=0.5, transB=1>(s, w, b)', (5, 9)),
        ('FusedGemm<activation="LeakyRelu", activation_alpha=0.2>(s, w)', (9, 5)),
        ("FusedMatMul<transB=1, alpha=0.25>(s, w)", (5, 9)),
        ("FusedMatMul(s, w)", (9, 5)),
    ],
    ids=["gemm", "leaky", "turned", "plain"],
)  # fmt: skip
def test_fused_products_are_taken_apart_to_be_fitted(text: str, shape: tuple[int, ...]) -> None:
    layers = behind_what_was_cut(
        f"""g (float[N,6] x) => (float[N,5] y) {{
            h = Gemm(x, a) r = Relu(h) m = Gemm(r, k) s = Softmax(m) y = com.microsoft.{text}
        }}""",
        a=normal(6, 16), k=normal(16, 9, seed=1), w=normal(*shape, seed=2), b=normal(5, seed=3),
    )  # fmt: skip
    assert layers[-1].node == "y"
    assert layers[-1].ridge is not None
    assert layers[-1].after < layers[-1].before


def test_products_of_turned_data_are_fitted() -> None:
    """Gemm with transA: what it reads has its channels along the first axis."""
    model = parsed(
        """g (float[40,6] x) => (float[40,5] y) {
            t = Transpose<perm=[1,0]>(x) h = MatMul(a, t) y = Gemm<transA=1>(h, w, b)
        }""",
        a=mixed(RNG.standard_normal((8, 6)), 0, GONE),
        w=normal(8, 5), b=normal(5, seed=1),
    )  # fmt: skip
    ran = done(model, GONE, given(smooth(400, 6) + 0.5, size=40))
    before, after = ran.gains
    assert before > 0.02
    assert after < 1e-8
    assert ran.layers[0].ridge is not None


# ------------------------------------------------------------------------------------ tied weights


@pytest.mark.parametrize("own", [True, False], ids=["biases of their own", "no biases"])
def test_layers_that_share_a_weight_are_fitted_as_one(own: bool) -> None:
    """Two branches with one matrix: the sum of their normal equations, a bias for each."""
    adds = "y = Add(p, b) z = Add(q, c)" if own else "y = Identity(p) z = Identity(q)"
    model = parsed(
        f"""g (float[N,7,6] x, float[N,7,6] u) => (float[N,7,5] y, float[N,7,5] z) {{
            h = MatMul(x, a) k = MatMul(u, a) p = MatMul(h, w) q = MatMul(k, w) {adds}
        }}""",
        a=mixed(RNG.standard_normal((6, 8)), 1, GONE),
        w=normal(8, 5), b=normal(5, seed=1), c=normal(5, seed=2),
    )  # fmt: skip
    data = given(smooth(120, 7, 6) + 0.5)
    for number, batch in enumerate(data.batches):
        batch["u"] = smooth(len(batch["x"]), 7, 6, seed=50 + number) - 0.5
    ran = done(model, GONE, data)
    before, after = ran.gains
    assert before > 0.02
    assert after < 1e-8
    assert [layer.node for layer in ran.layers] == ["p", "q"]
    assert ran.changed == (("b", "c", "w") if own else ("w",))


def test_weight_that_one_layer_reads_through_identity_is_shared_all_the_same() -> None:
    """Exporters merge equal tensors: the second layer reads an Identity of the first one's."""
    model = parsed(
        """g (float[N,6] x) => (float[N,5] y, float[N,5] z) {
            h = MatMul(x, a) i = Identity(w) y = MatMul(h, w) k = Neg(h) z = MatMul(k, i)
        }""",
        a=mixed(RNG.standard_normal((6, 8)), 1, GONE), w=normal(8, 5),
    )  # fmt: skip
    ran = done(model, GONE, given(smooth(120, 6) + 0.5))
    assert ran.gains[0] > 0.02
    assert ran.gains[1] < 1e-8
    assert ran.changed == ("w",)


def test_shared_weight_of_convolutions_of_different_strides_is_fitted_once() -> None:
    model = parsed(
        """g (float[N,3,8,8] x) => (float[N,5,6,6] y, float[N,5,3,3] z) {
            h = Conv(x, a) y = Conv(h, w, b) z = Conv<strides=[2,2]>(h, w)
        }""",
        a=mixed(RNG.standard_normal((8, 3, 1, 1)), 0, GONE),
        w=normal(5, 8, 3, 3), b=normal(5, seed=1),
    )  # fmt: skip
    ran = done(model, GONE, given(smooth(120, 3, 8, 8) + 0.5))
    assert ran.gains[0] > 0.02
    assert ran.gains[1] < 1e-8
    assert [layer.ridge is None for layer in ran.layers] == [False, False]


# -------------------------------------------------------------------------------- what is left, why


@pytest.mark.parametrize(
    ("tail", "why"),
    [
        ("e = Gather(v, i) p = MatMul(m, v) y = Add(p, e)", "'e' reads its weight in another way"),
        ("f = Exp(v) y = MatMul(m, f)", "Exp computes its weight"),
        ('y = Einsum<equation="ni,io->no">(m, v)', "Einsum is no plain product"),
        ("c = Cast<to=1>(q) y = MatMul(m, c)", "its weight is stored as int8"),
        ("d = DequantizeLinear<axis=0, block_size=4>(q, s) y = MatMul(m, d)",
         "its weight is quantized in blocks, or by a computed scale"),
        ('t = Transpose(m) y = com.microsoft.FusedGemm<transA=1, activation="Softsign">(t, v)',
         "FusedGemm is no plain product"),
    ],
    ids=["lookup", "computed", "einsum", "stored", "blocks", "activation"],
)  # fmt: skip
def test_a_layer_that_is_not_refitted_says_why(tail: str, why: str) -> None:
    model = parsed(
        f"""g (float[N,6] x, int64[N] i) => (float[N,8] y) {{
            h = MatMul(x, a) r = Relu(h) m = MatMul(r, w) {tail}
        }}""",
        a=normal(6, 8), w=normal(8, 8, seed=1), v=normal(8, 8, seed=2),
        q=RNG.integers(-90, 90, (8, 8)).astype(np.int8), s=np.full((2, 8), 0.02, np.float32),
    )  # fmt: skip
    model.proto.opset_import.add(domain="com.microsoft", version=1)
    data = given(smooth(200, 6))
    for batch in data.batches:
        batch["i"] = np.arange(len(batch["x"])) % 8
    ran = done(model, GONE, data)
    layer = ran.layers[-1]
    assert layer.ridge is None
    assert layer.why == why
    assert ran.changed == ("w",)


def attention(node: str, **weights: np.ndarray) -> Model:
    model = parsed(
        f"""g (float[N,6,12] x) => (float[N,6,5] y) {{
            q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv)
            {node} y = MatMul(o, wo)
        }}""",
        **{name: normal(12, 16, seed=seed) for seed, name in enumerate(("wq", "wk", "wv"))},
        wo=normal(16, 5, seed=3), **weights,
    )  # fmt: skip
    model.proto.opset_import.add(domain="com.microsoft", version=1)
    return model


def refitted(model: Model, group: int, gone: list[int]) -> dict[str, Refitted]:
    """What a refit says of each layer after units of one group went, by dimensions."""
    graph = analyse(model, attention="dims")
    plan = plan_without(graph, {group: gone})
    layers = refit(plan, operate(plan).model, given(smooth(60, 6, 12)))[1]
    return {layer.node: layer for layer in layers}


def test_layer_behind_fused_attention_makes_up_for_queries_and_keys_that_went() -> None:
    model = attention("o = com.microsoft.MultiHeadAttention<num_heads=4>(q, k, v)")
    found = refitted(model, 0, [0, 5, 10, 15])
    assert list(found) == ["y"]
    assert found["y"].after < found["y"].before


def test_fused_product_of_queries_and_keys_is_no_layer_to_refit() -> None:
    model = attention(
        """q0 = Reshape(q, s) q1 = Transpose<perm=[0,2,1,3]>(q0)
        k0 = Reshape(k, s) k1 = Transpose<perm=[0,2,1,3]>(k0)
        v0 = Reshape(v, s) v1 = Transpose<perm=[0,2,1,3]>(v0)
        z = com.microsoft.FusedMatMul<transB=1, alpha=0.5>(q1, k1) p = Softmax(z)
        o0 = MatMul(p, v1) o1 = Transpose<perm=[0,2,1,3]>(o0) o = Reshape(o1, j)""",
        s=np.array([0, 0, 4, 4]), j=np.array([0, 0, 16]),
    )  # fmt: skip
    assert list(refitted(model, 0, [0, 5, 10, 15])) == ["y"]


def test_packed_weight_of_fused_attention_that_reads_what_was_cut_says_why_it_stays() -> None:
    model = parsed(
        """g (float[N,6,12] x) => (float[N,6,5] y) {
            h = MatMul(x, a) r = Relu(h) o = com.microsoft.Attention<num_heads=4>(r, w)
            y = MatMul(o, wo)
        }""",
        a=normal(12, 8), w=normal(8, 48, seed=1), wo=normal(16, 5, seed=2),
    )  # fmt: skip
    model.proto.opset_import.add(domain="com.microsoft", version=1)
    found = refitted(model, 0, [1, 3])
    assert found["o"].why == "Attention is no plain product"
    assert found["y"].after < found["y"].before


# ----------------------------------------------------------------------- norms, depthwise kernels


def test_norm_behind_a_sum_takes_up_what_no_layer_in_front_could() -> None:
    """Pre-activation: the layer before the sum has a computed weight, the norm is all there is."""
    model = parsed(
        """g (float[N,6,6,6] x) => (float[N,5,6,6] y) {
            h = Conv(x, a) r = Relu(h) m = Conv(r, w)
            f = Exp(v) n = Conv(m, f) s = Add(n, x)
            z = BatchNormalization<epsilon=0.01>(s, gamma, beta, mean, var)
            y = Conv(z, k)
        }""",
        a=normal(12, 6, 1, 1), w=normal(6, 12, 1, 1, seed=1), v=normal(6, 6, 1, 1, seed=2),
        k=normal(5, 6, 1, 1, seed=3), gamma=np.float32([1, -2, 0.5, 1, 1, 3]),
        beta=normal(6, seed=4), mean=normal(6, seed=5), var=np.float32([1, 2, 3, 0.5, 1, 1]),
    )  # fmt: skip
    graph = analyse(model)
    plan = select(graph, score(graph, "l1"), ratio=0.5)
    plain = operate(plan).model
    made, layers, changed = refit(plan, plain, given(smooth(200, 6, 6, 6) + 1))
    found = {layer.node: layer for layer in layers}
    assert found["n"].why == "Exp computes its weight"
    assert found["z"].after < 0.9 * found["z"].before
    assert {"gamma", "beta"} <= set(changed)
    assert "mean" not in changed
    unseen = smooth(200, 6, 6, 6, seed=8) + 1
    wanted, got = (_tensor(one, "z", unseen) for one in (Model(model.proto), made))
    # What is left is not along the norm's own output: no scale or shift could better it.
    for channel in range(6):
        slope, shift = np.polyfit(got[:, channel].ravel(), wanted[:, channel].ravel(), 1)
        assert slope == pytest.approx(1, abs=0.05)
        assert abs(shift) < 0.05 * wanted[:, channel].std()


def _tensor(model: Model, name: str, x: np.ndarray) -> np.ndarray:
    (values,) = stream(model, [name], given(x, size=len(x)))
    return values[name]


def test_depthwise_kernels_are_fitted_better_than_a_scale_and_shift_could() -> None:
    model = parsed(
        """g (float[N,3,9,9] x) => (float[N,8,9,9] y) {
            h = Conv(x, a) r = Relu(h) m = Conv<pads=[1,1,1,1]>(r, w, b) s = Relu(m)
            y = Conv<group=8, pads=[1,1,1,1]>(s, d, c)
        }""",
        a=normal(16, 3, 1, 1), w=normal(8, 16, 3, 3, seed=1), b=normal(8, seed=2),
        d=normal(8, 1, 3, 3, seed=3), c=normal(8, seed=4),
    )  # fmt: skip
    graph = analyse(model)
    first = min(group.id for group in graph.prunable)
    plan = plan_without(graph, {first: range(14)})
    made, layers, changed = refit(plan, operate(plan).model, given(smooth(200, 3, 9, 9)))
    assert {"d", "c"} <= set(changed)
    assert layers[-1].after < 0.98 * layers[-1].before
    unseen = smooth(200, 3, 9, 9, seed=8)
    wanted, got = (_tensor(one, "y", unseen) for one in (Model(model.proto), made))
    before = onnx.ModelProto()
    before.CopyFrom(made.proto)
    for tensor in before.graph.initializer:
        if tensor.name in "dc":
            tensor.CopyFrom(onnx.numpy_helper.from_array(array(model, tensor.name), tensor.name))
    affine = _tensor(Model(before), "y", unseen)
    for channel in range(8):
        old, aim = affine[:, channel].ravel(), wanted[:, channel].ravel()
        best = np.polyval(np.polyfit(old, aim, 1), old)
        assert np.square(got[:, channel].ravel() - aim).mean() < np.square(best - aim).mean()


def test_weight_shared_by_a_plain_and_a_fused_layer_stays_one() -> None:
    model = parsed(
        """g (float[N,3,6,6] x) => (float[N,5,6,6] y, float[N,5,6,6] z) {
            h = Conv(x, a) y = Conv(h, w, b)
            z = com.microsoft.FusedConv<activation="Relu">(h, w, c)
        }""",
        a=mixed(RNG.standard_normal((8, 3, 1, 1)), 0, GONE),
        w=normal(5, 8, 1, 1), b=normal(5, seed=1), c=normal(5, seed=2),
    )  # fmt: skip
    model.proto.opset_import.add(domain="com.microsoft", version=1)
    graph = analyse(model)
    groups = {group.id: GONE for group in graph.prunable}
    plan = plan_without(graph, groups)
    plain, data = operate(plan).model, given(smooth(120, 3, 6, 6) + 0.5)
    made, layers, _ = refit(plan, plain, data)
    assert_same_interface(plain, made)
    assert [layer.ridge is None for layer in layers] == [False, False]
    judge = Judge(graph, data)
    assert judge.drift(plain) > 0.02
    assert judge.drift(made) < 1e-8


def test_quantized_bias_is_fitted_and_none_is_added_beside_quantized_weights() -> None:
    def quantized(bias: str) -> Model:
        return parsed(
            f"""g (float[N,3,6,6] x) => (float[N,5,6,6] y) {{
                h = Conv(x, a) r = Relu(h) d = DequantizeLinear<axis=0>(w, s)
                e = DequantizeLinear<axis=0>(b, s) y = Conv(r, d{bias})
            }}""",
            a=normal(8, 3, 1, 1), s=np.full(5, 0.02, np.float32),
            w=np.random.default_rng(3).integers(-80, 80, (5, 8, 1, 1)).astype(np.int8),
            b=np.arange(-20, 30, 10, dtype=np.int32),
        )  # fmt: skip

    data = given(smooth(200, 3, 6, 6) + 0.5)
    ran = done(quantized(", e"), GONE, data)
    assert ran.changed == ("b", "w")
    assert ran.gains[1] < 0.5 * ran.gains[0]
    assert ran.made.weights()["w"].dtype == np.int8
    bare = done(quantized(""), GONE, data)
    assert bare.changed == ("w",)
    assert bare.gains[1] < bare.gains[0]
    assert len(bare.made.proto.graph.node[-1].input) == 2


def test_layers_in_a_body_are_named_as_not_refitted() -> None:
    body = onnx.parser.parse_graph("then () => (float[N,5] u) {u = MatMul(m, v)}")
    other = onnx.parser.parse_graph("other () => (float[N,5] o) {o = MatMul(m, v)}")
    model = parsed(
        """g (float[N,6] x, bool c) => (float[N,5] y) {
            h = MatMul(x, a) r = Relu(h) m = MatMul(r, w) y = Identity(m)
        }""",
        a=normal(6, 8), w=normal(8, 8, seed=1), v=normal(8, 5, seed=2),
    )  # fmt: skip
    del model.proto.graph.node[-1]
    model.proto.graph.node.append(
        onnx.helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=other)
    )
    data = given(smooth(200, 6))
    for batch in data.batches:
        batch["c"] = np.array(True)
    ran = done(model, GONE, data)
    assert [layer.node for layer in ran.layers] == ["m", "y"]
    assert ran.layers[-1].why == "the layers inside of it are not refitted"


@pytest.mark.parametrize("name", ["weight_first", "stack_and_bias", "relu_inside"])
def test_layer_too_wide_for_its_gram_matrix_is_fitted_to_a_sample(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(least_squares, "_MOST_GRAM_BYTES", 8 * 6 * 6 - 1)
    monkeypatch.setattr(least_squares, "_MOST_ROWS", 90)
    form = FORMS[name]
    ran = done(teacher(form), GONE, given(smooth(200, *form.rows) + 0.3))
    before, after = ran.gains
    assert before > 0.02
    assert after < 1e-6
    assert ran.layers[0].why == "fitted to a sample of 90 rows for 6 inputs"


def test_weight_used_twice_in_a_row_is_fitted_for_both_uses() -> None:
    """What the second use reads depends on the first: a second run looks ahead."""
    layers = behind_what_was_cut(
        """g (float[N,6] x) => (float[N,5] y) {
            h = MatMul(x, a) r = Relu(h) m = MatMul(r, w)
            k = MatMul(m, v) t = Tanh(k) l = MatMul(t, v) u = Relu(l) y = MatMul(u, z)
        }""",
        a=normal(6, 24), w=normal(24, 7, seed=1) / 5, v=normal(7, 7, seed=2),
        z=normal(7, 5, seed=3),
    )  # fmt: skip
    assert [layer.node for layer in layers] == ["m", "k", "l", "y"]
    assert layers[1].before == layers[2].before
