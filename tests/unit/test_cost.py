from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxprune.analyse import analyse
from onnxprune.cost import count_params, stats, stats_after
from onnxprune.io import load, save
from onnxprune.model import Model
from onnxprune.rewrite import operate
from onnxprune.score import score
from onnxprune.select import select
from onnxprune.survivors import Survivors
from onnxprune.types import ModelStats
from tests.small import HEAD, MODELS, conv_chain, parsed, reloaded

ZOO = sorted(MODELS.glob("*.onnx"))


def float32(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


def cut(model: Model, ratio: float = 0.5) -> tuple[ModelStats, ModelStats, Model]:
    graph = analyse(model)
    plan = select(graph, score(graph), ratio=ratio)
    made = operate(plan).model
    return stats(graph), stats_after(graph, made, plan.keep), made


def test_params_leave_out_running_statistics() -> None:
    model = conv_chain((3, 8))
    # filters, scale and shift, head
    assert count_params(model) == 8 * 3 * 9 + 8 + 8 + 4 * 8


def test_params_leave_out_shapes_and_constants_that_nothing_uses() -> None:
    model = parsed(
        "g (float[1,6] x) => (float[2,5] y) {r = Reshape(x, s) y = Gemm(r, w)}",
        s=np.array([2, 3]), w=float32(3, 5), unused=float32(100),
    )  # fmt: skip
    assert count_params(model) == 15


def test_params_count_a_shared_constant_once_and_quantized_ones() -> None:
    model = parsed(
        "g (float[1,4] x) => (float[1,4] y)\n"
        "{w = DequantizeLinear(q, s) a = MatMul(x, w) b = Add(a, c) y = Add(b, c)}",
        q=np.ones((4, 4), np.int8), s=float32(), c=float32(4),
    )  # fmt: skip
    assert count_params(model) == 16 + 1 + 4


def test_params_count_what_bodies_hold() -> None:
    proto = onnx.parser.parse_model(
        HEAD + "g (bool c, float[3] x) => (float[3] y) {y = If(c)<\n"
        "then_branch = t () => (float[3] o) {o = Mul(x, inner)},\n"
        "else_branch = e () => (float[3] p) {k = Constant<value_floats=[1.0,2.0,3.0]>()\n"
        "p = Add(x, outer)}>}"
    )
    then, _ = (attribute.g for attribute in proto.graph.node[0].attribute)
    then.initializer.append(onnx.numpy_helper.from_array(float32(3), "inner"))
    proto.graph.initializer.append(onnx.numpy_helper.from_array(float32(3), "outer"))
    assert count_params(Model(proto)) == 6


def test_macs_count_one_for_each_use_of_a_weight() -> None:
    found = stats(analyse(conv_chain((3, 8))))
    assert found.macs == 8 * 8 * 8 * 27 + 4 * 8
    by_node = {layer.node: layer for layer in found.layers}
    assert by_node["c0"].macs == 8 * 8 * 8 * 27
    assert by_node["c0"].params == 216
    assert by_node["n0"].params == 16
    assert found.channels == 8 + 4


def test_depthwise_conv_counts_its_own_channel_only() -> None:
    model = parsed(
        "g (float[1,6,4,4] x) => (float[1,6,4,4] y) {y = Conv<group=6,pads=[1,1,1,1]>(x, k)}",
        k=float32(6, 1, 3, 3),
    )
    assert stats(analyse(model)).macs == 6 * 16 * 9


def test_halving_channels_quarters_the_inner_layers() -> None:
    before, after, _ = cut(conv_chain((3, 16, 16, 16), bn=False))
    assert before.channels == 48 + 4
    assert after.channels == 24 + 4
    wanted = 8 * 3 * 9 + 2 * 8 * 8 * 9
    assert after.params == wanted + 4 * 8
    assert after.macs == wanted * 64 + 4 * 8


@pytest.mark.parametrize("path", ZOO, ids=lambda path: path.stem)
def test_shapes_by_inference_and_by_survivors_agree_after_a_cut(path: Path) -> None:
    graph = analyse(load(path))
    plan = select(graph, score(graph), ratio=0.5)
    made = operate(plan).model
    after = stats_after(graph, made, plan.keep)
    survivors = Survivors(graph.tracer.traces[0], graph.dead(plan.keep))
    weights = made.weights()
    total = 0
    for node in graph.graph.nodes:
        shape = survivors.shape(node.outputs[0])
        if node.op_type == "Conv":
            assert shape is not None
            total += int(np.prod(shape)) * int(np.prod(weights[node.inputs[1]].shape[1:]))
        elif node.op_type == "MatMul":
            read = survivors.shape(node.inputs[0])
            assert shape is not None
            assert read is not None
            total += int(np.prod(shape)) * read[-1]
        elif node.op_type == "Gemm":
            total += int(np.prod(weights[node.inputs[1]].shape))
    assert after.macs == total
    again = stats(analyse(made, input_shapes=dict(graph.stand_ins)))
    assert (again.params, again.macs) == (after.params, after.macs)


def test_bytes_are_those_of_the_file(tmp_path: Path) -> None:
    model = reloaded(conv_chain(), tmp_path / "a.onnx")
    before, after, made = cut(model)
    assert before.bytes == (tmp_path / "a.onnx").stat().st_size
    written = save(made, tmp_path / "b.onnx")
    assert after.bytes == pytest.approx(written, rel=0.02)


def test_transposed_convolution_costs_its_weights_once_for_each_element_it_reads() -> None:
    model = parsed(
        """g (float[1,3,8,8] x) => (float[1,6,15,15] y) {
        a = Conv(x, w1) y = ConvTranspose<group=2, strides=[2,2]>(a, w2)}""",
        w1=float32(4, 3, 1, 1),
        w2=float32(4, 3, 1, 1),
    )
    before, after, _ = cut(model)
    assert before.macs == 64 * 4 * 3 + 64 * 4 * 3
    assert after.macs == before.macs // 2
