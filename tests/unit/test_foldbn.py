"""BatchNormalization, scales and shifts, folded into the layers beside them."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from onnxprune.foldbn import fold_norms
from onnxprune.model import Model
from onnxprune.runtime import session
from onnxprune.stream import serialize
from tests.small import array, conv_chain, parsed

F32 = np.float32
rng = np.random.default_rng(0)


def normal(*shape: int, dtype: type = F32) -> np.ndarray:
    return rng.standard_normal(shape).astype(dtype)


def norm(count: int, of: str = "", dtype: type = F32) -> dict[str, np.ndarray]:
    """Parameters of a BatchNormalization over so many channels."""
    return {
        f"g{of}": rng.uniform(0.5, 2, count).astype(dtype),
        f"b{of}": normal(count, dtype=dtype),
        f"m{of}": normal(count, dtype=dtype),
        f"v{of}": rng.uniform(0.5, 2, count).astype(dtype),
    }


def ops(model: Model) -> list[str]:
    return [node.op_type for node in model.proto.graph.node]


def outputs(model: Model) -> dict[str, np.ndarray]:
    feeds = {
        value.name: np.random.default_rng(1)
        .standard_normal([dim.dim_value or 2 for dim in value.type.tensor_type.shape.dim])
        .astype({1: F32, 10: np.float16, 11: np.float64}[value.type.tensor_type.elem_type])
        for value in model.proto.graph.input
    }
    return session(model, optimise=False).run(feeds)


def folded(model: Model, *left: str, tolerance: float = 1e-5) -> Model:
    """What folding makes of a model: these operators, the same outputs, nothing larger."""
    found = fold_norms(model)
    assert ops(found.model) == list(left)
    assert len(serialize(found.model)) <= len(serialize(model))
    before, after = outputs(model), outputs(found.model)
    for name, wanted in before.items():
        scale = float(np.abs(wanted).max())
        assert np.abs(after[name] - wanted).max() <= tolerance * scale
    return found.model


@pytest.mark.parametrize(
    ("layer", "weight", "outs"),
    [
        pytest.param("Conv<pads=[1,1,1,1]>", (6, 4, 3, 3), 6, id="conv"),
        pytest.param("Conv<group=2, pads=[1,1,1,1]>", (6, 2, 3, 3), 6, id="grouped"),
        pytest.param("ConvTranspose<strides=[2,2]>", (4, 5, 2, 2), 5, id="transposed"),
        pytest.param("ConvTranspose<group=2>", (4, 3, 2, 2), 6, id="transposed-grouped"),
    ],
)
@pytest.mark.parametrize("bias", [False, True])
def test_norm_goes_into_the_convolution_before_it(
    layer: str, weight: tuple[int, ...], outs: int, *, bias: bool
) -> None:
    given = ", c" if bias else ""
    model = parsed(
        f"g (float[N,4,8,8] x) => (float[N,K,L,M] y) {{a = {layer}(x, w{given}) "
        "y = BatchNormalization(a, g, b, m, v)}",
        w=normal(*weight), **norm(outs), **({"c": normal(outs)} if bias else {}),
    )  # fmt: skip
    made = folded(model, layer.partition("<")[0])
    assert set(made.weights()) == {"w", "c" if bias else "w__bias"}
    assert made.proto.graph.node[0].output == ["y"]


@pytest.mark.parametrize("turned", [0, 1])
def test_norm_goes_into_the_gemm_before_it_whatever_alpha_and_beta(turned: int) -> None:
    model = parsed(
        f"g (float[N,4] x) => (float[N,6] y) {{a = Gemm<transB={turned}, alpha=0.5, beta=3.0>"
        "(x, w, c) y = BatchNormalization<epsilon=0.1>(a, g, b, m, v)}",
        w=normal(6, 4) if turned else normal(4, 6), c=normal(6), **norm(6),
    )  # fmt: skip
    folded(model, "Gemm")


def test_scales_and_shifts_in_a_row_go_into_the_layer() -> None:
    model = parsed(
        "g (float[N,4,8,8] x) => (float[N,6,6,6] y) {a = Conv(x, w) b = Mul(s, a) c = Sub(b, t) "
        "d = Div(c, u) e = Sub(t, d) y = Add(e, one)}",
        w=normal(6, 4, 3, 3), s=normal(6, 1, 1), t=normal(1, 6, 1, 1),
        u=rng.uniform(1, 2, (6, 1, 1)).astype(F32), one=np.array(1, F32),
    )  # fmt: skip
    folded(model, "Conv")


def test_matmul_keeps_one_add_for_its_bias() -> None:
    model = parsed(
        "g (float[N,5,4] x) => (float[N,5,6] y) {a = MatMul(x, w) b = Add(c, a) y = Mul(b, s)}",
        w=normal(4, 6), c=normal(6), s=normal(6),
    )  # fmt: skip
    made = folded(model, "MatMul", "Add")
    assert made.proto.graph.node[1].output == ["y"]
    plain = parsed(
        "g (float[N,5,4] x) => (float[N,5,6] y) {a = MatMul(x, w) y = Add(c, a)}",
        w=normal(4, 6), c=normal(6),
    )  # fmt: skip
    assert fold_norms(plain).model is plain


def test_norm_before_a_layer_goes_into_it_where_nothing_is_padded() -> None:
    text = (
        "g (float[N,4,8,8] x) => (float[N,6,K,L] y, float[N,4,8,8] z) {{z = Relu(x) "
        "n = BatchNormalization(z, g, b, m, v) y = Conv<{}>(n, w)}}"
    )
    weights = {"w": normal(6, 2, 3, 3), **norm(4)}
    folded(parsed(text.format("group=2"), **weights), "Relu", "Conv")
    padded = parsed(text.format("group=2, pads=[1,1,1,1]"), **weights)
    assert fold_norms(padded).model is padded, "padding is zero after the norm, not before it"
    weights["b"] = (weights["m"] * weights["g"] / np.sqrt(weights["v"] + F32(1e-5))).astype(F32)
    still = fold_norms(parsed(text.format('group=2, auto_pad="SAME_UPPER"'), **weights))
    assert ops(still.model) == ["Relu", "BatchNormalization", "Conv"]  # rounding left some shift


def test_scale_alone_goes_before_a_padded_layer() -> None:
    model = parsed(
        "g (float[N,3,8,8] x) => (float[N,6,8,8] y) {n = Div(x, s) y = Conv<pads=[1,1,1,1]>(n, w)}",
        w=normal(6, 3, 3, 3), s=rng.uniform(1, 2, (1, 3, 1, 1)).astype(F32),
    )  # fmt: skip
    folded(model, "Conv")


def test_constant_that_widens_what_it_meets_stays() -> None:
    model = parsed(
        "g (float[N,1,8,8] x) => (float[N,6,6,6] y) {n = Mul(x, s) y = Conv(n, w)}",
        w=normal(6, 3, 3, 3), s=normal(1, 3, 1, 1),
    )  # fmt: skip
    assert fold_norms(model).model is model


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("a = Conv(x, w) y = BatchNormalization(a, g, b, m, v) z = Relu(a)", "read twice"),
        ("z = Conv(x, w) y = BatchNormalization(z, g, b, m, v)", "an output of the graph"),
        ("a = Conv(x, w) c = Conv(x, w) z = Relu(c) y = BatchNormalization(a, g, b, m, v)",
         "a weight of two layers"),
        ("a = Conv(x, w) r = Relu(a) z = Relu(x) y = BatchNormalization(r, g, b, m, v)",
         "something between"),
        ("a = Conv(x, w) z = Relu(x) y = Mul(a, pixel)", "varies along another axis"),
        ("a = Conv(x, w) z = Relu(x) y = Mul(a, z)", "no constant"),
    ],
)  # fmt: skip
def test_what_is_not_the_layers_alone_stays(body: str, why: str) -> None:
    model = parsed(
        f"g (float[N,4,8,8] x) => (float[N,4,8,8] y, float[N,4,8,8] z) {{{body}}}",
        w=normal(4, 4, 1, 1), pixel=normal(8), **norm(4),
    )  # fmt: skip
    assert fold_norms(model).model is model, why


def test_tensor_read_inside_a_body_stays() -> None:
    model = parsed(
        "g (float[N,4,8,8] x, bool c) => (float[N,4,8,8] y, float[N,4,8,8] z) {a = Conv(x, w) "
        "y = BatchNormalization(a, g, b, m, v) z = If(c) <then_branch = t () => "
        "(float[N,4,8,8] p) {p = Relu(a)}, else_branch = e () => (float[N,4,8,8] q) "
        "{q = Neg(a)}>}",
        w=normal(4, 4, 1, 1), **norm(4),
    )  # fmt: skip
    assert fold_norms(model).model is model


def test_parameters_a_caller_may_override_stay() -> None:
    model = parsed(
        "g (float[N,4,8,8] x, float[4] g) => (float[N,4,8,8] y) {a = Conv(x, w) "
        "y = BatchNormalization(a, g, b, m, v)}",
        w=normal(4, 4, 1, 1), **norm(4),
    )  # fmt: skip
    assert fold_norms(model).model is model


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_weights_keep_their_type(dtype: type) -> None:
    spelled = "float16" if dtype is np.float16 else "bfloat16"
    model = parsed(
        f"g ({spelled}[N,4,8,8] x) => ({spelled}[N,6,6,6] y) {{a = Conv(x, w) "
        "y = BatchNormalization(a, g, b, m, v)}",
        w=normal(6, 4, 3, 3, dtype=dtype), **norm(6, dtype=dtype),
    )  # fmt: skip
    made = fold_norms(model).model
    assert ops(made) == ["Conv"]
    assert {weight.dtype for weight in made.weights().values()} == {np.dtype(dtype)}


def test_scale_that_is_no_number_stays() -> None:
    model = parsed(
        "g (float[N,4,8,8] x) => (float[N,6,6,6] y) {a = Conv(x, w) y = Div(a, s)}",
        w=normal(6, 4, 3, 3), s=np.zeros((6, 1, 1), F32),
    )  # fmt: skip
    assert fold_norms(model).model is model


def test_zeros_stay_zeros_and_names_stay() -> None:
    model = conv_chain((4, 8, 12))
    w = array(model, "w1").copy()
    w[:, 1::2] = 0
    for tensor in model.proto.graph.initializer:
        if tensor.name == "w1":
            tensor.raw_data = w.tobytes()
    found = fold_norms(model)
    assert "BatchNormalization" not in ops(found.model)
    assert (array(found.model, "w1")[:, 1::2] == 0).all()
    assert dict(found.into) == {"n0": "c0", "n1": "c1"}
    assert {"w0", "w1"} < set(found.changed)


def test_weight_in_a_constant_node_is_folded_too() -> None:
    model = parsed(
        "g (float[N,1,4,4] x) => (float[N,2,4,4] y) {w = Constant<value = float[2,1,1,1] {1, 2}>() "
        "a = Conv(x, w) y = BatchNormalization(a, g, b, m, v)}",
        **norm(2),
    )
    folded(model, "Constant", "Conv")


def test_file_of_ir_version_3_keeps_its_inputs() -> None:
    model = conv_chain((3, 8))
    proto = model.proto
    proto.ir_version = 3
    proto.opset_import[0].version = 11
    for tensor in proto.graph.initializer:
        value = proto.graph.input.add(name=tensor.name)
        value.type.tensor_type.elem_type = tensor.data_type
        for size in tensor.dims:
            value.type.tensor_type.shape.dim.add(dim_value=size)
    made = fold_norms(Model(proto)).model
    assert [v.name for v in made.proto.graph.input] == [v.name for v in proto.graph.input]
    assert "BatchNormalization" not in ops(made)
    x = {"x": normal(1, 3, 8, 8)}
    wanted, got = (session(m).run(x)["y"] for m in (Model(proto), made))
    assert np.allclose(wanted, got, atol=1e-4)


def test_norm_of_many_layers_that_share_its_parameters_does_not_make_the_file_larger() -> None:
    lines = "".join(f"a{n} = Conv(x{n}, w{n}) x{n + 1} = Add(a{n}, t) " for n in range(4))
    model = parsed(
        f"g (float[N,64,4,4] x0) => (float[N,64,4,4] y) {{{lines} y = Relu(x4)}}",
        t=normal(64, 1, 1), **{f"w{n}": normal(64, 64, 1, 1) for n in range(4)},
    )  # fmt: skip
    assert fold_norms(model).model is model
