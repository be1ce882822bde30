"""Attention and rotary embeddings that are one operator."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from onnxprune.analyse import analyse
from onnxprune.cost import stats
from onnxprune.lossless import without_effect
from onnxprune.model import Model
from onnxprune.rewrite import operate
from tests.oracle import assert_rewrites, plan_at
from tests.unit.ops.models import assert_exact, assert_frozen, attribute, halved, model

_BATCH, _LENGTH, _WIDTH = 2, 6, 12


def projected(
    node: str,
    *,
    heads: int = 4,
    own: int | None = None,
    size: int = 4,
    picked: int | None = None,
    opset: int = 21,
    **constants: Any,
) -> Model:
    """MatMuls make queries ``q``, keys ``k`` and values ``v``; the node makes ``o``, then MatMul.

    Args:
        node: Its text.
        heads: Of queries.
        own: Heads of keys and values, where there are fewer.
        size: Of heads of queries and keys.
        picked: Of heads of values, where it differs.
        opset: Of the standard's operators.
        constants: More of them.
    """
    own, picked = own or heads, picked or size
    widths = {"wq": heads * size, "wk": own * size, "wv": own * picked}
    text = f"""g (float[{_BATCH},{_LENGTH},{_WIDTH}] x) => (float[{_BATCH},{_LENGTH},5] y) {{
        q = MatMul(x, wq)  k = MatMul(x, wk)  v = MatMul(x, wv)
        {node}
        y = MatMul(o, wo)}}"""
    weights: dict[str, Any] = {name: (_WIDTH, width) for name, width in widths.items()}
    weights |= {"wo": (heads * picked, 5)}
    found = model(text, opset=opset, **{**weights, **constants})
    found.proto.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    return found


def groups(found: Model, mode: str) -> list[tuple[str, int]]:
    return [(group.unit, group.size) for group in analyse(found, attention=mode).prunable]


MHA = "o = com.microsoft.MultiHeadAttention<num_heads=4>(q, k, v{more})"


def test_multi_head_attention_goes_by_whole_heads() -> None:
    found = projected(MHA.format(more=""))
    assert groups(found, "heads") == [("head", 4)]
    node = halved(found)["o"]
    assert attribute(node, "num_heads") == 2
    assert [a.name for a in node.attribute] == ["num_heads"]
    assert_exact(found)


def test_multi_head_attention_goes_by_dimensions_of_every_head() -> None:
    found = projected(MHA.format(more=""), picked=6)
    cells = [group.cells for group in analyse(found, attention="dims").prunable]
    assert [[len(cell) for cell in group] for group in cells] == [[4] * 4, [6] * 4]
    node = halved(found, attention="dims")["o"]
    assert attribute(node, "num_heads") == 4
    assert attribute(node, "scale") == pytest.approx(1 / 2)
    assert_exact(found, attention="dims")


def test_scale_of_attention_that_is_given_stays() -> None:
    found = projected(MHA.replace("=4", "=4, scale=0.3").format(more=""))
    assert attribute(halved(found, attention="dims")["o"], "scale") == pytest.approx(0.3)
    assert_exact(found, attention="dims")


@pytest.mark.parametrize("mode", ["heads", "dims"])
@pytest.mark.parametrize("bias", [(4, 6, 6), (1, 1, 6, 6), (2, 4, 6, 6)])
def test_biases_and_masks_of_attention_follow_its_heads(mode: str, bias: tuple[int, ...]) -> None:
    found = projected(
        MHA.format(more=", b, mask, bias"),
        b=(48,),
        mask=np.array([6, 4], np.int32),
        bias=(1, *bias) if len(bias) == 3 else bias,
    )
    assert len(groups(found, mode)) == (1 if mode == "heads" else 2)
    assert_exact(found, attention=mode)


@pytest.mark.parametrize("mode", ["heads", "dims"])
def test_bias_of_attention_that_is_computed_freezes_it(mode: str) -> None:
    node = "e = ReduceMean<keepdims=0>(x, axes) b = Relu(e)" + MHA.format(more=", b")
    found = projected(node, size=1, axes=np.array([0, 1]))
    assert "has a parameter that cannot be cut (tensor 'b')" in str(analyse(found, attention=mode))


def test_keys_and_values_by_head_keep_one_size() -> None:
    node = """k0 = Reshape(k, s) k1 = Transpose<perm=[0,2,1,3]>(k0)
        v0 = Reshape(v, s) v1 = Transpose<perm=[0,2,1,3]>(v0)
        o = com.microsoft.MultiHeadAttention<num_heads=4>(q, k1, v1)"""
    found = projected(node, s=np.array([2, 6, 4, 4]))
    assert groups(found, "heads") == [("head", 4)]
    dims = analyse(found, attention="dims")
    assert len({len(cell.units) for cell in dims.balance_sets[0].cells}) == 1
    assert len(dims.balance_sets) == 1
    for mode in ("heads", "dims"):
        assert_exact(found, attention=mode)


@pytest.mark.parametrize("mode", ["heads", "dims"])
@pytest.mark.parametrize("stacked", [3, 2])
def test_queries_keys_and_values_in_one_tensor_are_cut_where_they_lie(
    stacked: int, mode: str
) -> None:
    """ONNX Runtime takes them on GPUs only, so that nothing here can run the model."""
    given = "p, , , b" if stacked == 3 else "q, p"
    text = f"""g (float[2,6,12] x) => (float[2,6,5] y) <float[2,6,16] o> {{
        q = MatMul(x, wq)  p0 = MatMul(x, w)  p = Reshape(p0, s)
        o = com.microsoft.MultiHeadAttention<num_heads=4>({given})  y = MatMul(o, wo)}}"""
    split = np.array([0, 0, 4, stacked, 4])
    weights = {"wq": (12, 16), "w": (12, 16 * stacked), "b": (48,), "wo": (16, 5)}
    found = model(text, **weights, s=split)
    found.proto.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    surgery = assert_rewrites(found, plan_at(analyse(found, attention=mode), 0.5))
    left = {name: weight.shape for name, weight in surgery.model.weights().items()}
    assert (left["w"], left["wo"]) == ((12, 8 * stacked), (8, 5))
    shape = surgery.model.weights()["s"].read().tolist()
    assert shape == ([0, 0, 2, stacked, 4] if mode == "heads" else [0, 0, 4, stacked, 2])
    masks = [mask.shape for mask in surgery.masks]
    queries = [(1, 1, 4, 3, 4), (48,)] if stacked == 3 else [(1, 1, 16)]
    assert masks == ([] if mode == "heads" else queries)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_learned_queries_keys_or_values_go_by_dimensions_as_computed_ones(name: str) -> None:
    given = ", ".join("learned" if one == name else one for one in "qkv")
    node = f"o = com.microsoft.MultiHeadAttention<num_heads=4>({given})"
    found = projected(node, learned=(2, 6, 16))
    graph = analyse(found, attention="dims")
    assert {len(cell) for group in graph.prunable for cell in group.cells} == {4}
    assert_exact(found, attention="dims")
    assert_exact(found, attention="heads", some=False)


def test_attention_none_keeps_queries_and_keys_of_a_fused_operator() -> None:
    found = projected(MHA.format(more=""))
    graph = analyse(found, attention="none")
    assert [group.producers[0].tensor for group in graph.prunable] == ["wv"]
    assert_exact(found, attention="none")


@pytest.mark.parametrize("mode", ["heads", "dims"])
def test_past_of_attention_freezes_its_heads_by_name(mode: str) -> None:
    text = """g (float[2,6,12] x, float[2,4,3,4] past_k, float[2,4,3,4] past_v) =>
        (float[2,6,5] y, float[2,4,t,4] pk, float[2,4,t,4] pv) {
        q = MatMul(x, wq)  k = MatMul(x, wk)  v = MatMul(x, wv)
        o, pk, pv = com.microsoft.MultiHeadAttention<num_heads=4>(
            q, k, v, , , , past_k, past_v)
        y = MatMul(o, wo)}"""
    weights = dict.fromkeys(("wq", "wk", "wv"), (12, 16))
    found = model(text, **weights, wo=(16, 5))
    found.proto.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    words = ("MultiHeadAttention 'o' continues what stays (tensor 'past_k')",)
    assert not analyse(found, attention=mode).prunable
    assert_frozen(found, "wk", *words)
    assert_frozen(found, "wv", *words)


def test_multiply_accumulates_of_attention_are_those_of_its_two_products() -> None:
    counted = stats(analyse(projected(MHA.format(more=""), picked=6))).layers
    assert {layer.op_type: layer.macs for layer in counted if "Attention" in layer.op_type} == {
        "MultiHeadAttention": 2 * 4 * 6 * 6 * (4 + 6)
    }


def test_queries_of_zeros_that_get_a_bias_are_not_without_effect() -> None:
    wq = np.full((12, 16), 0.5, np.float32)
    wq[:, ::4] = 0  # the first dimension of every head
    found = projected(MHA.format(more=", b"), wq=wq, b=(48,))
    assert without_effect(analyse(found, attention="dims")) == 0


# -- one weight for queries, keys and values -------------------------------------------------------


def packed(more: str = "", attributes: str = "", picked: int = 4, **constants: Any) -> Model:
    """MatMul w0 makes ``x``; Attention of 4 heads of 4 reads it by the weight ``w``."""
    text = f"""g (float[2,6,12] x0) => (float[2,6,5] y) {{
        x = MatMul(x0, w0)
        o = com.microsoft.Attention<num_heads=4{attributes}>(x, w{more})
        y = MatMul(o, wo)}}"""
    weights: dict[str, Any] = {"w0": (12, 10), "w": (10, 32 + 4 * picked), "wo": (4 * picked, 5)}
    found = model(text, **weights, **constants)
    found.proto.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    return found


def test_packed_attention_reads_channels_and_goes_by_whole_heads() -> None:
    found = packed(", b", b=(48,))
    assert groups(found, "heads") == [("channel", 10), ("head", 4)]
    node = halved(found)["o"]
    assert {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute} == {"num_heads": 2}
    assert_exact(found)


def test_packed_attention_goes_by_dimensions_of_queries_with_keys_and_of_values() -> None:
    found = packed(", b, mask, , bias", b=(48,), mask=np.array([6, 4], np.int32), bias=(1, 4, 6, 6))
    assert [size for _, size in groups(found, "dims")] == [10, 16, 16]
    node = halved(found, attention="dims")["o"]
    assert attribute(node, "scale") == pytest.approx(1 / 2)
    for mode in ("heads", "dims"):
        assert_exact(found, attention=mode)


def test_packed_attention_says_how_many_of_its_columns_are_whose() -> None:
    found = packed(", b", ", qkv_hidden_sizes=[16, 16, 24]", picked=6, b=(56,))
    assert attribute(halved(found)["o"], "qkv_hidden_sizes") == [8, 8, 12]
    for mode in ("heads", "dims"):
        assert_exact(found, attention=mode)
    found = packed()
    assert "qkv_hidden_sizes" not in [a.name for a in halved(found)["o"].attribute]
    assert attribute(halved(found, attention="none")["o"], "qkv_hidden_sizes") == [16, 16, 8]
    assert_exact(found, attention="none")


@pytest.mark.parametrize("mode", ["heads", "dims"])
@pytest.mark.parametrize("past", [True, False])
def test_packed_attention_that_hands_on_keys_and_values_keeps_them(mode: str, past: bool) -> None:
    given = ", float[2,2,4,3,4] past" if past else ""
    more = ", , past" if past else ""
    text = f"""g (float[2,6,12] x{given}) => (float[2,6,5] y, float[2,2,4,t,4] present) {{
        o, present = com.microsoft.Attention<num_heads=4>(x, w, b{more})
        y = MatMul(o, wo)}}"""
    found = model(text, w=(12, 48), b=(48,), wo=(16, 5))
    found.proto.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    assert not analyse(found, attention=mode).prunable
    why = "continues what stays (tensor 'past')" if past else "hands keys and values on"
    assert_frozen(found, "w", f"Attention 'o' {why}")


def test_multiply_accumulates_of_packed_attention_count_its_weight() -> None:
    counted = {layer.op_type: layer for layer in stats(analyse(packed())).layers}["Attention"]
    assert counted.macs == 2 * 6 * 10 * 48 + 2 * 4 * 6 * 6 * (4 + 4)
    assert counted.params == 10 * 48


# -- heads in groups -------------------------------------------------------------------------------

GQA = (
    "o, pk, pv = com.microsoft.GroupQueryAttention<num_heads=4, kv_num_heads={own}{attributes}>"
    "({given}, , , lengths, total{more})"
)
ROTATES = ", do_rotary=1"


def grouped(
    *, own: int = 2, attributes: str = "", given: str = "q, k, v", more: str = "", **constants: Any
) -> Model:
    joined = "" if given == "q, k, v" else "p = Concat<axis=2>(q, k, v) "
    node = joined + GQA.format(own=own, attributes=attributes, given=given, more=more)
    lengths = {"lengths": np.array([5, 5], np.int32), "total": np.array(6, np.int32)}
    return projected(node, own=own, **lengths, **constants)


@pytest.mark.parametrize(
    "found",
    [
        pytest.param(grouped(size=16), id="plain"),
        pytest.param(
            grouped(size=16, more=", , , , bias, sink", bias=(1, 4, 6, 6), sink=(4,)), id="sink"
        ),
        pytest.param(grouped(size=16, given="p, , "), id="packed"),
        pytest.param(
            grouped(size=32, attributes=ROTATES, more=", cos, sin", cos=(9, 16), sin=(9, 16)),
            id="rotary",
        ),
        pytest.param(
            grouped(
                size=32,
                given="p, , ",
                attributes=ROTATES + ", rotary_interleaved=1",
                more=", cos, sin",
                cos=(9, 16),
                sin=(9, 16),
            ),
            id="packed-interleaved",
        ),
        pytest.param(
            grouped(size=64, attributes=ROTATES, more=", cos, sin", cos=(9, 16), sin=(9, 16)),
            id="partly-rotary",
        ),
    ],
)
def test_query_heads_of_a_group_go_with_their_keys_and_values(found: Model) -> None:
    assert groups(found, "heads") == [("head", 2)]
    node = halved(found)["o"]
    assert [attribute(node, name) for name in ("num_heads", "kv_num_heads")] == [2, 1]
    for mode in ("heads", "dims", "none"):
        assert_exact(found, attention=mode, some=mode != "none")


def test_sizes_of_grouped_heads_stay_multiples_of_what_the_runtime_takes() -> None:
    """ONNX Runtime wants 8 dimensions at once, 16 where it rotates and 8 columns of its tables."""
    plain = analyse(grouped(size=32), attention="dims")
    assert [[len(cell) for cell in group.cells] for group in plain.prunable] == [[4] * 2] * 2
    found = grouped(size=32, attributes=ROTATES, more=", cos, sin", cos=(9, 16), sin=(9, 16))
    rotary = analyse(found, attention="dims")
    assert [[len(cell) for cell in group.cells] for group in rotary.prunable] == [[2], [2, 2]]
    found = grouped(size=8)
    kept = analyse(found, attention="dims")
    assert not kept.prunable
    assert "GroupQueryAttention 'o' wants a multiple of 8 dimensions in every head" in str(kept)


def test_heads_that_all_read_one_key_go_one_by_one() -> None:
    found = grouped(own=1, size=16)
    assert groups(found, "heads") == [("head", 4)]
    node = halved(found)["o"]
    assert [attribute(node, name) for name in ("num_heads", "kv_num_heads")] == [2, 1]
    for mode in ("heads", "dims"):
        assert_exact(found, attention=mode)
    assert "lets every head read the same" in str(analyse(found))


@pytest.mark.parametrize("mode", ["heads", "dims"])
@pytest.mark.parametrize("joined", [False, True])
def test_query_heads_of_every_group_go_alike_where_a_past_keeps_keys(
    joined: bool, mode: str
) -> None:
    given = "p, , " if joined else "q, k, v"
    text = f"""g (float[2,1,12] x, float[2,2,5,16] past_k, float[2,2,5,16] past_v) =>
        (float[2,1,5] y, float[2,2,t,16] pk, float[2,2,t,16] pv) {{
        q = MatMul(x, wq)  k = MatMul(x, wk)  v = MatMul(x, wv)  p = Concat<axis=2>(q, k, v)
        o, pk, pv = com.microsoft.GroupQueryAttention<num_heads=6, kv_num_heads=2, do_rotary=1>(
            {given}, past_k, past_v, lengths, total, cos, sin)
        y = MatMul(o, wo)}}"""
    weights = {"wq": (12, 96), "wk": (12, 32), "wv": (12, 32), "wo": (96, 5)}
    lengths = {"lengths": np.array([5, 5], np.int32), "total": np.array(6, np.int32)}
    found = model(text, **weights, **lengths, cos=(9, 8), sin=(9, 8))
    found.proto.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    graph = analyse(found, attention=mode)
    assert "GroupQueryAttention 'o' continues what stays (tensor 'past_k')" in str(graph)
    if mode == "dims":
        assert not graph.prunable
        return
    assert [[len(cell) for cell in group.cells] for group in graph.prunable] == [[3, 3]]
    plan = plan_at(graph, 0.34)
    left = {node.output[0]: node for node in operate(plan).model.proto.graph.node}["o"]
    assert [attribute(left, name) for name in ("num_heads", "kv_num_heads")] == [4, 2]
    assert_exact(found)


def test_multiply_accumulates_of_grouped_attention_are_those_of_all_query_heads() -> None:
    for found in (grouped(size=16), grouped(size=16, given="p, , ")):
        layers = {layer.op_type: layer.macs for layer in stats(analyse(found)).layers}
        assert layers["GroupQueryAttention"] == 2 * 4 * 6 * 6 * (16 + 16)


# -- the standard's own ----------------------------------------------------------------------------

BY_HEAD = """t{0} = Reshape({0}, s{0}) {0}4 = Transpose<perm=[0,2,1,3]>(t{0}) """
SPLIT = {
    "sq": np.array([0, 0, 4, -1]),
    "sk": np.array([0, 0, 2, -1]),
    "sv": np.array([0, 0, 2, -1]),
    "so": np.array([0, 0, -1]),
}
APART = "".join(BY_HEAD.format(name) for name in "qkv")
JOIN = " o1 = Transpose<perm=[0,2,1,3]>(o4) o = Reshape(o1, so)"
PLACES = np.array([[0, 1, 2, 3, 4, 5]] * 2)


@pytest.mark.parametrize("mode", ["heads", "dims"])
@pytest.mark.parametrize(
    "node",
    [
        pytest.param("o = Attention<q_num_heads=4, kv_num_heads=2>(q, k, v)", id="joined"),
        pytest.param("o, pk, pv, s = Attention<q_num_heads=4, kv_num_heads=2>(q, k, v)", id="all"),
        pytest.param(f"{APART} o4 = Attention(q4, k4, v4) {JOIN}", id="by-head"),
    ],
)
def test_standard_attention_goes_by_groups_of_heads_or_by_dimensions(node: str, mode: str) -> None:
    found = projected(node, own=2, picked=6, opset=23, **SPLIT)
    assert (
        groups(found, mode)
        == {
            "heads": [("head", 2)],
            "dims": [("pair", 8), ("channel", 12)],
        }[mode]
    )
    counted = {layer.op_type: layer.macs for layer in stats(analyse(found)).layers}
    assert counted["Attention"] == 2 * 4 * 6 * 6 * (4 + 6)
    assert_exact(found, attention=mode)


def test_standard_attention_names_what_is_left_of_its_heads() -> None:
    node = "o = Attention<q_num_heads=4, kv_num_heads=2>(q, k, v, m)"
    found = projected(node, own=2, opset=23, m=(4, 6, 6))
    left = halved(found)["o"]
    assert [attribute(left, name) for name in ("q_num_heads", "kv_num_heads")] == [2, 1]
    assert attribute(halved(found, attention="dims")["o"], "scale") == pytest.approx(1 / 2)
    assert_exact(found)


@pytest.mark.parametrize("mode", ["heads", "dims"])
@pytest.mark.parametrize(
    ("attributes", "inputs", "columns", "units"),
    [
        pytest.param("", ", c, n, p", 4, [4], id="halves"),
        pytest.param(", interleaved=1", ", c, n, p", 4, [4], id="interleaved"),
        pytest.param(", rotary_embedding_dim=4", ", c, n, p", 2, [2, 8], id="partly"),
        pytest.param("", ", cp, np", 4, [4], id="tables-looked-up"),
    ],
)
def test_rotary_embedding_ties_pairs_over_all_heads(
    attributes: str, inputs: str, columns: int, units: list[int], mode: str
) -> None:
    node = f"""cp = Gather(c, p) np = Gather(n, p)
        qr = RotaryEmbedding<num_heads=4{attributes}>(q{inputs})
        kr = RotaryEmbedding<num_heads=2{attributes}>(k{inputs})
        o = Attention<q_num_heads=4, kv_num_heads=2>(qr, kr, v)"""
    tables = {"c": (9, columns), "n": (9, columns), "p": PLACES}
    found = projected(node, own=2, size=8, opset=23, **tables)
    sizes = [size for _, size in groups(found, mode)]
    assert sizes == ([2] if mode == "heads" else [*units, 16])
    left = halved(found, attention=mode)["qr"]
    assert attribute(left, "num_heads") == (2 if mode == "heads" else 4)
    if "dim" in attributes:
        assert attribute(left, "rotary_embedding_dim") == (4 if mode == "heads" else 2)
    assert_exact(found, attention=mode)


@pytest.mark.parametrize("mode", ["heads", "dims"])
def test_rotary_embedding_of_the_runtime_finds_its_heads_by_its_tables(mode: str) -> None:
    node = """qr = com.microsoft.RotaryEmbedding<num_heads=4>(q, p, c, n)
        kr = com.microsoft.RotaryEmbedding(k, p, c, n)
        o = com.microsoft.MultiHeadAttention<num_heads=4>(qr, kr, v)"""
    found = projected(node, size=8, c=(9, 4), n=(9, 4), p=PLACES)
    assert [size for _, size in groups(found, mode)] == ([4] if mode == "heads" else [4, 32])
    assert_exact(found, attention=mode)
