"""Patterns on the weights of layers: the right axis, the best values, and nothing else changed."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxprune import io, stream
from onnxprune.errors import UnsupportedModelError, UsageError
from onnxprune.model import Model
from onnxprune.sparsifying import sparsify
from onnxprune.thin import Thinned, Wish, thin
from onnxprune.types import AnyArray, ThinLayer
from tests.small import HEAD, array, parsed

MS = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>\n'


def weights(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def thinned(model: Model, pattern: str = "2:4", sparsity: float | None = None, **more) -> Thinned:
    return thin(model, Wish.read(pattern, sparsity, **more))


def row(found: Thinned, node: str) -> ThinLayer:
    (one,) = [one for one in found.layers if one.node == node]
    return one


def in_runs(weight: AnyArray, axis: int, run: int = 4) -> AnyArray:
    """Neighbours along one axis, shape (..., run)."""
    moved = np.moveaxis(np.asarray(weight, np.float64), axis, -1)
    return moved.reshape(*moved.shape[:-1], -1, run)


def is_sparse(weight: AnyArray, axis: int) -> bool:
    return bool(((in_runs(weight, axis) != 0).sum(axis=-1) <= 2).all())


def best_sum(weight: AnyArray, axis: int) -> float:
    """Most that any two of each four along an axis add up to."""
    return float(np.sort(np.abs(in_runs(weight, axis)), axis=-1)[..., 2:].sum())


def assert_best(new: AnyArray, old: AnyArray, axis: int) -> None:
    """2:4 along an axis, as much kept as can be, and what stays is what it was."""
    assert is_sparse(new, axis)
    wide = np.asarray(new, np.float64), np.asarray(old, np.float64)
    assert np.array_equal(wide[0][wide[0] != 0], wide[1][wide[0] != 0])
    assert np.abs(wide[0]).sum() == pytest.approx(best_sum(old, axis), rel=1e-12)


# -- the axis of every form ------------------------------------------------------------------------

FORMS = {
    "conv": ("Conv(x, w)", "1,8,6,6", (12, 8, 3, 3), 1),
    "conv1d": ("Conv(x, w)", "1,8,6", (12, 8, 3), 1),
    "conv3d": ("Conv(x, w)", "1,8,4,4,4", (6, 8, 2, 2, 2), 1),
    "conv_groups": ("Conv<group=2>(x, w)", "1,16,6,6", (12, 8, 3, 3), 1),
    "deconv": ("ConvTranspose(x, w)", "1,8,6,6", (8, 5, 3, 3), 0),
    "deconv_groups": ("ConvTranspose<group=2>(x, w)", "1,16,6,6", (16, 5, 3, 3), 0),
    "gemm": ("Gemm(x, w)", "3,8", (8, 5), 0),
    "gemm_transposed": ("Gemm<transB=1>(x, w)", "3,8", (5, 8), 1),
    "gemm_left": ("Gemm(w, x)", "8,3", (5, 8), 1),
    "gemm_left_transposed": ("Gemm<transA=1>(w, x)", "8,3", (8, 5), 0),
    "matmul": ("MatMul(x, w)", "3,8", (8, 5), 0),
    "matmul_left": ("MatMul(w, x)", "8,3", (5, 8), 1),
    "matmul_batched": ("MatMul(x, w)", "2,3,8", (2, 8, 5), 1),
    "matmul_batched_left": ("MatMul(w, x)", "2,8,3", (2, 5, 8), 2),
    "matmul_4d": ("MatMul(x, w)", "2,3,3,8", (2, 3, 8, 5), 2),
}
FUSED = {
    "FusedMatMul": ("com.microsoft.FusedMatMul<transB=1>(x, w)", "3,8", (5, 8), 1),
    "FusedMatMul_left": ("com.microsoft.FusedMatMul<transA=1>(w, x)", "8,3", (8, 5), 0),
    "FusedGemm": (
        'com.microsoft.FusedGemm<transB=1, activation="Relu">(x, w)', "3,8", (5, 8), 1,
    ),
    "FusedConv": ('com.microsoft.FusedConv<activation="Relu">(x, w)', "1,8,6,6", (12, 8, 3, 3), 1),
}  # fmt: skip


def one_layer(call: str, size: str, weight: np.ndarray, head: str = HEAD) -> Model:
    text = f"g (float[{size}] x) => (float[] y) {{ y = {call} }}"
    proto = onnx.parser.parse_model(head + text)
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    proto.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    return Model(proto)


@pytest.mark.parametrize("form", [*FORMS, *FUSED])
def test_pattern_runs_along_what_the_layer_sums_over_and_keeps_the_most(form: str) -> None:
    call, size, shape, axis = (FORMS | FUSED)[form]
    old = weights(*shape)
    found = thinned(one_layer(call, size, old, MS if form in FUSED else HEAD))
    assert_best(array(found.model, "w"), old, axis)
    (layer,) = found.layers
    assert layer.axis == axis
    assert layer.kept == pytest.approx(best_sum(old, axis) / np.abs(old).sum(), rel=1e-6)
    assert layer.zeros == 0.5
    changed = array(found.model, "w") - old
    assert layer.error == pytest.approx(np.linalg.norm(changed) / np.linalg.norm(old), rel=1e-5)


CHAINS = {
    # Fault (b): HWIO filters shown to the Conv by a Transpose; the input channels are axis 2.
    "transpose_hwio": ("t = Transpose<perm=[3,2,0,1]>(w) y = Conv(x, t)", (3, 3, 8, 12), 2),
    "identity": ("t = Identity(w) y = Conv(x, t)", (12, 8, 3, 3), 1),
    "reshape": (
        "s = Constant<value_ints=[12,8,1,1]>() t = Reshape(w, s) y = Conv(x, t)", (12, 8), 1,
    ),
    "unsqueeze": (
        "a = Constant<value_ints=[2,3]>() t = Unsqueeze(w, a) y = Conv(x, t)", (12, 8), 1,
    ),
    "squeeze": (
        "a = Constant<value_ints=[0]>() t = Squeeze(w, a) y = Conv(x, t)", (1, 12, 8, 1, 1), 2,
    ),
    "two_steps": (
        "i = Transpose<perm=[1,0]>(w) a = Constant<value_ints=[2,3]>() t = Unsqueeze(i, a) "
        "y = Conv(x, t)", (8, 12), 0,
    ),
    "scaled": ("g = Constant<value_float=-2.0>() t = Mul(w, g) y = Conv(x, t)", (12, 8, 3, 3), 1),
}  # fmt: skip


@pytest.mark.parametrize("chain", CHAINS)
def test_axis_is_found_through_nodes_that_only_show_the_weight(chain: str) -> None:
    body, shape, axis = CHAINS[chain]
    old = weights(*shape)
    model = parsed(f"g (float[1,8,6,6] x) => (float[a,b,c,d] y) {{ {body} }}", w=old)
    found = thinned(model)
    assert_best(array(found.model, "w"), old, axis)
    assert [one.axis for one in found.layers] == [axis]


def test_cast_shows_a_half_precision_weight() -> None:
    old = weights(8, 5).astype(np.float16)
    model = parsed(
        "g (float[3,8] x) => (float[3,5] y) { t = Cast<to=1>(w) y = MatMul(x, t) }", w=old
    )
    assert_best(array(thinned(model).model, "w"), old, 0)


@pytest.mark.parametrize("kind", [np.int8, np.uint8])
@pytest.mark.parametrize("per_axis", [False, True])
def test_dequantized_weight_is_zero_at_its_zero_point(kind: type, per_axis: bool) -> None:
    rng = np.random.default_rng(0)
    low = 0 if kind is np.uint8 else -128
    stored = rng.integers(low, low + 256, (5, 8)).astype(kind)
    scale = rng.uniform(0.01, 0.1, 5 if per_axis else ()).astype(np.float32)
    zero = rng.integers(low + 100, low + 156, 5 if per_axis else ()).astype(kind)
    model = parsed(
        "g (float[3,8] x) => (float[3,5] y) "
        "{ t = DequantizeLinear<axis=0>(w, s, z) y = Gemm<transB=1>(x, t) }",
        w=stored, s=scale, z=zero,
    )  # fmt: skip
    new = array(thinned(model).model, "w")
    assert new.dtype == kind

    def real(quantized: np.ndarray) -> np.ndarray:
        shift = zero.astype(np.float64).reshape(-1, 1)
        return (quantized.astype(np.float64) - shift) * scale.astype(np.float64).reshape(-1, 1)

    assert_best(real(new), real(stored), 1)


def test_weight_that_is_quantized_and_back_is_thinned_where_it_is_stored() -> None:
    old = weights(5, 8)
    model = parsed(
        "g (float[3,8] x) => (float[3,5] y) { q = QuantizeLinear(w, s, z) "
        "t = DequantizeLinear(q, s, z) y = Gemm<transB=1>(x, t) }",
        w=old, s=np.float32(0.02), z=np.int8(3),
    )  # fmt: skip
    assert_best(array(thinned(model).model, "w"), old, 1)


# -- the ten faults of `polygraphy surgeon prune` (facts, 1.1) -------------------------------------


def test_fault_a_stack_of_matrices_is_not_thinned_across_the_stack() -> None:
    old = weights(4, 8, 4)
    found = thinned(parsed("g (float[4,3,8] x) => (float[4,3,4] y) { y = MatMul(x, w) }", w=old))
    assert_best(array(found.model, "w"), old, 1)


def test_fault_b_filters_stored_hwio_are_thinned_along_their_input_channels() -> None:
    old = weights(3, 3, 8, 8)
    body = "t = Transpose<perm=[3,2,0,1]>(w) y = Conv(x, t)"
    found = thinned(parsed(f"g (float[1,8,6,6] x) => (float[1,8,4,4] y) {{ {body} }}", w=old))
    new = array(found.model, "w")
    assert_best(new, old, 2)
    assert not is_sparse(new, 3), "outputs are not what is summed over"


WITH_FUNCTION = """
<ir_version: 10, opset_import: ["own" : 1, "com.microsoft" : 1, "" : 21],
 producer_name: "exporter", producer_version: "7", domain: "a.b", model_version: 3,
 doc_string: "kept", metadata_props: ["author": "somebody"]>
g (float[3,8] x) => (float[3,4] y)
{ h = own.half (x, v)  e = com.microsoft.Gelu (h)  y = MatMul (e, w) }
<domain: "own", opset_import: ["" : 21]>
half (a, b) => (c) {
  k = Constant <value = float[8,8] {%s}> ()
  n = MatMul (a, k)
  c = MatMul (n, b)
}
"""


def with_function() -> Model:
    inside = ",".join(f"{value:.6f}" for value in weights(64, seed=5))
    proto = onnx.parser.parse_model(WITH_FUNCTION % inside)
    proto.graph.node[0].metadata_props.add(key="place", value="first")
    proto.graph.metadata_props.add(key="graph", value="also")
    for name, shape in (("v", (8, 8)), ("w", (8, 4))):
        proto.graph.initializer.append(
            numpy_helper.from_array(weights(*shape, seed=len(name)), name)
        )
    return Model(proto)


def bare(model: Model) -> onnx.ModelProto:
    """Everything but the numbers in tensors and the recipe."""
    proto = onnx.ModelProto()
    proto.ParseFromString(stream.serialize(model))
    from onnxprune.messages import tensors

    for tensor, _ in tensors(proto):
        for name in ("raw_data", "float_data", "int32_data"):
            tensor.ClearField(name)
    kept = [entry for entry in proto.metadata_props if entry.key != "onnxprune.recipe"]
    del proto.metadata_props[:]
    proto.metadata_props.extend(kept)
    return proto


def test_faults_c_d_domains_functions_and_metadata_survive(tmp_path: Path) -> None:
    model = with_function()
    made, _ = sparsify(model, output=tmp_path / "out.onnx")
    assert bare(made) == bare(model)
    written = io.load(tmp_path / "out.onnx")
    assert bare(written) == bare(model)
    assert [entry.domain for entry in written.proto.opset_import] == ["own", "com.microsoft", ""]


def test_weights_inside_a_function_and_given_to_one_are_thinned() -> None:
    model = with_function()
    found = thinned(model)
    assert [one.tensor for one in found.layers] == ["h/k", "v", "w"]
    inside = numpy_helper.to_array(found.model.proto.functions[0].node[0].attribute[0].t)
    before = numpy_helper.to_array(model.proto.functions[0].node[0].attribute[0].t)
    assert_best(inside, before, 0)
    for name in ("v", "w"):
        assert_best(array(found.model, name), array(model, name), 0)


def test_fault_e_table_that_something_looks_up_is_never_thinned() -> None:
    body = "e = Gather(table, i) t = Transpose<perm=[1,0]>(table) y = MatMul(e, t)"
    table = weights(16, 8)
    model = parsed(f"g (int64[3] i) => (float[3,16] y) {{ {body} z = MatMul(y, w) }}", table=table,
                   w=weights(16, 4))  # fmt: skip
    found = thinned(model)
    assert np.array_equal(array(found.model, "table"), table)
    reason = row(found, "y").why
    assert "Gather 'e'" in reason
    assert "table" in reason
    assert row(found, "z").done


def test_fault_e_weight_shared_along_two_axes_stays_dense_and_says_with_whom() -> None:
    old = weights(8, 8)
    model = parsed("g (float[3,8] x) => (float[3,8] y) { h = Gemm(x, w) y = Gemm<transB=1>(h, w) }",
                   w=old)  # fmt: skip
    found = thin(model, Wish.read("2:4", None))
    assert np.array_equal(array(found.model, "w"), old)
    assert "'y', along another axis" in row(found, "h").why
    assert "'h', along another axis" in row(found, "y").why
    alone = thinned(model, "unstructured", 0.5)
    assert all(one.done for one in alone.layers), "single weights have no axis"


def test_weight_shared_along_one_axis_is_thinned_once() -> None:
    old = weights(8, 8)
    model = parsed("g (float[3,8] x) => (float[3,8] y) { h = Gemm(x, w) t = Transpose(w) "
                   "y = Gemm<transB=1>(h, t) }", w=old)  # fmt: skip
    found = thinned(model)
    assert_best(array(found.model, "w"), old, 0)
    assert [one.shared for one in found.layers] == [False, True]
    assert len(found.done) == 1


def halves(kind: str, storage: str) -> tuple[onnx.TensorProto, np.ndarray]:
    """A weight of 16 bits, as raw bytes or as numbers."""
    dtype = np.dtype(np.float16) if kind == "float16" else np.dtype(ml_dtypes.bfloat16)
    old = weights(8, 12).astype(dtype)
    tensor = numpy_helper.from_array(old, "w")
    if storage == "numbers":
        bits = np.frombuffer(tensor.raw_data, np.uint16).tolist()
        tensor.ClearField("raw_data")
        tensor.int32_data.extend(bits)
    return tensor, old


@pytest.mark.parametrize("storage", ["raw", "numbers"])
@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_fault_f_sixteen_bits_keep_the_largest_in_either_storage(kind: str, storage: str) -> None:
    tensor, old = halves(kind, storage)
    model = parsed(f"g ({kind}[3,8] x) => ({kind}[3,12] y) {{ y = MatMul(x, w) }}")
    model.proto.graph.initializer.append(tensor)
    found = thinned(model)
    (made,) = io.as_model(stream.serialize(found.model)).proto.graph.initializer
    assert made.data_type == tensor.data_type
    assert bool(made.raw_data) == (storage == "raw")
    assert made.ByteSize() <= tensor.ByteSize()
    assert_best(numpy_helper.to_array(made), old, 0)
    wide = np.abs(old.astype(np.float64))
    assert found.layers[0].kept == pytest.approx(best_sum(old, 0) / wide.sum(), rel=1e-6)


def test_float_numbers_stay_numbers() -> None:
    model = parsed("g (float[3,8] x) => (float[3,4] y) { y = MatMul(x, w) }")
    old = weights(8, 4)
    model.proto.graph.initializer.append(
        helper.make_tensor("w", TensorProto.FLOAT, old.shape, old.reshape(-1))
    )
    (made,) = thinned(model).model.proto.graph.initializer
    assert not made.raw_data
    assert len(made.float_data) == 32
    assert_best(numpy_helper.to_array(made), old, 0)


def test_fault_g_weights_in_constant_nodes_and_bodies_are_thinned() -> None:
    text = """
    g (float[3,8] x, bool c) => (float[3,4] y) {
      k = Constant<value = float[8,8] {%s}>()
      h = MatMul(x, k)
      y = If (c) <
        then_branch = t () => (float[3,4] p) { p = MatMul(h, w) },
        else_branch = e () => (float[3,4] q)
          { m = Constant<value = float[8,4] {%s}>() q = MatMul(h, m) }>
    }"""
    numbers = [",".join(f"{v:.6f}" for v in weights(n, seed=n)) for n in (64, 32)]
    model = parsed(text % tuple(numbers), w=weights(8, 4))
    found = thinned(model)
    assert {one.tensor for one in found.done} == {"k", "w", "y/m"}
    assert_best(array(found.model, "k"), array(model, "k"), 0)
    assert_best(array(found.model, "w"), array(model, "w"), 0)

    def inner(one: Model) -> AnyArray:
        return numpy_helper.to_array(one.proto.graph.node[2].attribute[1].g.node[0].attribute[0].t)

    assert_best(inner(found.model), inner(model), 0)


def test_large_constant_node_is_written_with_its_zeros(tmp_path: Path) -> None:
    old = weights(64, 32)
    node = helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(old, "other"))
    model = parsed("g (float[3,64] x) => (float[3,32] y) { y = MatMul(x, w) }")
    model.proto.graph.node.insert(0, node)
    sparsify(model, output=tmp_path / "out.onnx")
    assert_best(array(io.load(tmp_path / "out.onnx"), "w"), old, 0)


@pytest.mark.filterwarnings("error")
def test_fault_h_nothing_warns_of_overflow() -> None:
    for kind in (np.float16, np.float32, np.float64):
        old = (weights(8, 4) * 6e4 / 4).astype(kind)
        name = {np.float16: "float16", np.float32: "float", np.float64: "double"}[kind]
        model = parsed(f"g ({name}[3,8] x) => ({name}[3,4] y) {{ y = MatMul(x, w) }}", w=old)
        assert_best(array(thinned(model).model, "w"), old, 0)


# Fault (i), the slow inspection, is measured in tools/bench/sparsity.py; that it is right is here.
def test_fault_i_inspection_says_what_holds() -> None:
    from onnxprune.held import held_weights

    model = parsed("g (float[1,8,6,6] x) => (float[1,8,4,4] y) { y = Conv(x, w) }",
                   w=weights(8, 8, 3, 3))  # fmt: skip
    (dense,) = held_weights(model)
    assert (dense.zeros, dense.runs, dense.blocks["kernel"]) == (0.0, (), 0.0)
    (sparse,) = held_weights(thinned(model).model)
    assert (sparse.zeros, sparse.runs) == (0.5, ("2:4", "4:8"))
    (kernels,) = held_weights(thinned(model, "kernel", 0.25).model)
    assert kernels.blocks["kernel"] == 0.25


# -- what stays dense ------------------------------------------------------------------------------

DENSE = {
    "depthwise": (
        "y = Conv<group=8>(x, w)", "1,8,6,6", (8, 1, 3, 3), "depthwise",
    ),
    "three_channels": ("y = Conv(x, w)", "1,3,6,6", (8, 3, 3, 3), "3 channels to sum over"),
    "vector": ("y = MatMul(x, w)", "3,8", (8,), "no matrix"),
    "mixed": ("r = ReduceMax(w) h = MatMul(x, w) y = Add(h, r)", "3,8", (8, 4), "ReduceMax 'r'"),
    "sliced": (
        "b = Constant<value_ints=[0]>() e = Constant<value_ints=[4]>() "
        "t = Slice(w, b, e) y = MatMul(x, t)", "3,4", (8, 4), "Slice 't' computes its weight",
    ),
    "einsum": ('y = Einsum<equation="ij,jk->ik">(x, w)', "3,8", (8, 4), "take no Einsum"),
}  # fmt: skip


@pytest.mark.parametrize("case", DENSE)
def test_what_cannot_take_the_pattern_stays_and_says_why(case: str) -> None:
    body, size, shape, reason = DENSE[case]
    old = weights(*shape)
    model = parsed(f"g (float[{size}] x) => (float[a] y) {{ {body} }}", w=old)
    found = thinned(model)
    (layer,) = found.layers
    assert not layer.done
    assert not layer.eligible
    assert reason in layer.why
    assert np.array_equal(array(found.model, "w"), old)


def test_weight_that_a_caller_may_override_stays_dense() -> None:
    model = parsed("g (float[3,8] x, float[8,4] w) => (float[3,4] y) { y = MatMul(x, w) }",
                   w=weights(8, 4))  # fmt: skip
    assert "caller may override" in thinned(model).layers[0].why
    model.proto.ir_version = 3
    assert thinned(model).layers[0].done, "before IR 4 every initializer is an input"


def test_weight_that_is_a_graph_output_stays_dense() -> None:
    model = parsed("g (float[3,8] x) => (float[3,4] y, float[8,4] w) { y = MatMul(x, w) }",
                   w=weights(8, 4))  # fmt: skip
    assert "graph output" in thinned(model).layers[0].why


def test_weight_with_nan_stays_dense() -> None:
    old = weights(8, 4)
    old[3, 2] = np.nan
    model = parsed("g (float[3,8] x) => (float[3,4] y) { y = MatMul(x, w) }", w=old)
    assert "NaN" in thinned(model).layers[0].why
    twice = parsed("g (float[3,8] x) => (float[3,8] y) { h = MatMul(x, w) y = MatMul(h, w) }",
                   w=np.full((8, 8), np.inf, np.float32))  # fmt: skip
    assert [("NaN" in one.why, one.eligible) for one in thinned(twice).layers] == [
        (True, False)
    ] * 2


def two_layers(first: int = 8) -> Model:
    return parsed(
        "g (float[3,8] x) => (float[3,4] y) { h = MatMul(x, a) y = MatMul(h, b) }",
        a=weights(8, first), b=weights(first, 4, seed=1) * 10,
    )  # fmt: skip


def test_names_choose_what_stays_dense() -> None:
    assert [one.done for one in thinned(two_layers(), ignore=("a",)).layers] == [False, True]
    assert [one.done for one in thinned(two_layers(), only=("h",)).layers] == [True, False]
    with pytest.raises(UsageError, match="matches no layer"):
        thinned(two_layers(), ignore=("nothing*",))


def test_only_gain_leaves_small_layers_dense_and_says_what_would_pay() -> None:
    model = parsed("g (float[1,256] x) => (float[1,8] y) { h = MatMul(x, a) y = MatMul(h, b) }",
                   a=weights(256, 256), b=weights(256, 8))  # fmt: skip
    every = thinned(model)
    assert [(one.done, one.gains) for one in every.layers] == [(True, True), (True, False)]
    assert "sparse kernels pay from 256" in every.layers[1].why
    some = thinned(model, only_gain=True)
    assert [one.done for one in some.layers] == [True, False]
    assert some.layers[1].eligible
    with pytest.raises(UsageError, match="no kernels"):
        Wish.read("1x4", 0.5, only_gain=True)


def test_model_without_a_layer_that_can_take_it_is_refused_with_the_reasons() -> None:
    model = parsed("g (float[3,3] x) => (float[3,4] y) { y = MatMul(x, w) }", w=weights(3, 4))
    with pytest.raises(UnsupportedModelError, match="3 channels to sum over"):
        sparsify(model, verify="none")


# -- the other patterns ----------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["1x4", "4x1", "2x2", "kernel", "unstructured"])
def test_local_sparsity_takes_the_smallest_units_of_each_layer(pattern: str) -> None:
    old = weights(8, 8, 3, 3)
    text = "g (float[1,8,6,6] x) => (float[1,8,4,4] y) { y = Conv(x, w) }"
    new = array(thinned(parsed(text, w=old), pattern, 0.5).model, "w")
    cut = {
        "1x4": lambda w: w.reshape(8, 2, 4, 9).transpose(0, 1, 3, 2).reshape(-1, 4),
        "4x1": lambda w: w.reshape(2, 4, 72).transpose(0, 2, 1).reshape(-1, 4),
        "2x2": lambda w: w.reshape(4, 2, 4, 2, 9).transpose(0, 2, 4, 1, 3).reshape(-1, 4),
        "kernel": lambda w: w.reshape(-1, 9),
        "unstructured": lambda w: w.reshape(-1, 1),
    }[pattern]
    sums = np.abs(cut(old).astype(np.float64)).sum(axis=1)
    gone = ~(cut(new) != 0).any(axis=1)
    assert gone.sum() == sums.size // 2
    assert sums[gone].max() <= sums[~gone].min()
    assert np.array_equal(cut(new)[~gone], cut(old)[~gone])


def test_global_sparsity_takes_more_where_weights_are_smaller() -> None:
    found = thinned(two_layers(16), "unstructured", 0.5, scope="global")
    small, large = found.layers
    assert small.zeros > 0.5 > large.zeros
    assert small.zeros <= 0.9, "no layer is emptied"
    total = small.zeros * small.size + large.zeros * large.size
    assert total == pytest.approx(0.5 * (small.size + large.size))
    with pytest.raises(UsageError, match="every run"):
        Wish.read("2:4", None, scope="global")


def test_stack_that_is_transposed_in_batches_stays_dense() -> None:
    model = one_layer(
        "com.microsoft.FusedMatMul<transBatchB=1>(x, w)", "2,3,8", weights(8, 2, 4), MS
    )
    assert "transposes batches" in thinned(model).layers[0].why


def test_weight_in_the_body_of_a_loop_is_thinned() -> None:
    text = """
    g (float[3,8] x, int64 n, bool c) => (float[3,8] y) {
      y = Loop (n, c, x) <body = b (int64 i, bool go, float[3,8] s) => (bool on, float[3,8] r)
        { k = Constant<value = float[8,8] {%s}>() on = Identity(go) r = MatMul(s, k) }>
    }"""
    model = parsed(text % ",".join(f"{v:.6f}" for v in weights(64)))
    found = thinned(model)

    def inner(one: Model) -> AnyArray:
        return numpy_helper.to_array(one.proto.graph.node[0].attribute[0].g.node[0].attribute[0].t)

    assert [one.tensor for one in found.done] == ["y/k"]
    assert_best(inner(found.model), inner(model), 0)


@pytest.mark.parametrize("kind", ["int4", "uint4"])
def test_weight_of_four_bits_in_blocks_is_zero_at_its_zero_points(kind: str) -> None:
    dtype = np.dtype(getattr(ml_dtypes, kind))
    rng = np.random.default_rng(0)
    low = -8 if kind == "int4" else 0
    stored = rng.integers(low, low + 16, (16, 6)).astype(dtype)
    scale = rng.uniform(0.01, 0.1, (2, 6)).astype(np.float32)
    zero = rng.integers(low + 4, low + 12, (2, 6)).astype(dtype)
    model = parsed(
        "g (float[3,16] x) => (float[3,6] y) "
        "{ t = DequantizeLinear<axis=0, block_size=8>(w, s, z) y = MatMul(x, t) }",
        w=stored, s=scale, z=zero,
    )  # fmt: skip
    new = array(thinned(model).model, "w")
    assert new.dtype == dtype
    shift, factor = (np.repeat(one.astype(np.float64), 8, axis=0) for one in (zero, scale))
    assert_best(
        (new.astype(np.float64) - shift) * factor, (stored.astype(np.float64) - shift) * factor, 0
    )
