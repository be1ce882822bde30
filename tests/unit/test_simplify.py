"""What a model can do without, left out; what GraphSurgeon's round trip would lose, kept."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnxprune.model import Model
from onnxprune.runtime import session
from onnxprune.simplify import simplified
from onnxprune.stream import serialize
from tests.small import conv_chain, parsed

F32 = np.float32
rng = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(F32)


def ops(model: Model) -> list[str]:
    return [node.op_type for node in model.proto.graph.node]


def same(model: Model, made: Model, **feeds: np.ndarray) -> None:
    wanted, got = (
        session(model, optimise=False).run(feeds),
        session(made, optimise=False).run(feeds),
    )
    assert all(np.allclose(got[name], wanted[name], atol=1e-5) for name in wanted)
    assert len(serialize(made)) <= len(serialize(model))


def test_constants_are_computed() -> None:
    model = parsed(
        "g (float[N,4] x) => (float[N,6] y) {t = Transpose(w) s = Mul(t, two) y = MatMul(x, s)}",
        w=normal(6, 4), two=np.array(2, F32),
    )  # fmt: skip
    made = simplified(model)
    assert ops(made) == ["MatMul"]
    assert set(made.weights()) == {"s"}
    same(model, made, x=normal(3, 4))


def test_dynamic_model_stays_dynamic() -> None:
    model = parsed(
        "g (float[N,4,K] x) => (float[N,M] y) {s = Shape(x) n = Gather(s, zero) "
        "c = Gather(s, one) u = Unsqueeze(n, axis) k = Mul(c, minus) "
        "r = Unsqueeze(k, axis) d = Div(r, four) t = Concat<axis=0>(u, d) y = Reshape(x, t)}",
        zero=np.array(0), one=np.array(1), axis=np.array([0]), minus=np.array(-1),
        four=np.array([4]),
    )  # fmt: skip
    made = simplified(model)
    assert len(ops(made)) < len(ops(model)), "the second dimension is always 4"
    for batch, width in ((1, 3), (5, 7)):
        same(model, made, x=normal(batch, 4, width))


def test_shape_that_only_an_example_has_is_not_believed() -> None:
    model = parsed(
        "g (float[N,4] x) => (float[K] y) {a = Relu(x) s = Shape(a) "
        "y = ConstantOfShape<value = float[1] {1}>(s)}"
    )
    model.proto.graph.output[0].type.tensor_type.shape.dim.add(dim_param="L")
    declared = onnx.helper.make_tensor_value_info("a", onnx.TensorProto.FLOAT, (1, 4))
    model.proto.graph.value_info.append(declared)
    made = simplified(model)
    assert made is model


@pytest.mark.parametrize(
    ("body", "value"),
    [
        pytest.param("b = ConstantOfShape<value = float[1] {2}>(size)", None, id="constant-of"),
        pytest.param("b = Expand(v, size)", np.array(1, F32), id="expand"),
        pytest.param("b = Tile(v, size)", normal(1, 1), id="tile"),
    ],
)
def test_constants_that_would_blow_up_stay_nodes(body: str, value: np.ndarray | None) -> None:
    model = parsed(
        f"g (float[N,64,64] x) => (float[N,64,64] y) {{{body} y = Add(x, b)}}",
        size=np.array([64, 64]), **({} if value is None else {"v": value}),
    )  # fmt: skip
    assert simplified(model) is model


def test_result_that_others_need_in_parts_does_not_make_the_file_larger() -> None:
    model = parsed(
        "g (float[N,64] x) => (float[N,64] y, float[N,64] z) {t = Transpose(w) "
        "y = MatMul(x, t) z = MatMul(x, w)}",
        w=normal(64, 64),
    )
    assert simplified(model) is model


def test_what_hands_on_is_left_out() -> None:
    model = parsed(
        "g (float[N,4] x) => (float[N,4] y, float[N,4] z) {a = Identity(x) b = Relu(a) "
        "c, mask = Dropout(b) d = Identity(c) y = Identity(d) z = Identity(d)}"
    )
    made = simplified(model)
    assert ops(made) == ["Relu", "Identity"]
    same(model, made, x=normal(3, 4))


def test_dropout_that_is_on_stays() -> None:
    model = parsed(
        "g (float[N,4] x, bool on) => (float[N,4] y) {a = Dropout(x, half, on) y = Relu(a)}",
        half=np.array(0.5, F32),
    )
    assert simplified(model) is model


def test_drawn_numbers_are_not_constants() -> None:
    model = parsed(
        "g (float[2,4] x) => (float[2,4] y) {a = RandomNormal<shape=[2,4]>() b = Mul(a, two) "
        "y = Add(x, b)}",
        two=np.array(2, F32),
    )
    assert simplified(model) is model


def test_input_that_is_an_output_stays() -> None:
    model = parsed("g (float[N,4] x) => (float[N,4] y) {y = Identity(x)}")
    assert simplified(model) is model


def test_what_nothing_reads_goes() -> None:
    model = parsed(
        "g (float[N,4] x) => (float[N,4] y) {y = Relu(x) dead = MatMul(x, w) deader = Relu(dead)}",
        w=normal(4, 4), spare=normal(3),
    )  # fmt: skip
    made = simplified(model)
    assert (ops(made), dict(made.weights())) == (["Relu"], {})


def test_constants_there_twice_are_one_but_not_the_weights_of_two_layers() -> None:
    w, c = normal(4, 4, 1, 1), normal(4)
    model = parsed(
        "g (float[N,4,8,8] x) => (float[N,4,8,8] y) {a = Conv(x, w1, c1) r = Relu(a) "
        "y = Conv(r, w2, c2)}",
        w1=w, w2=w, c1=c, c2=c,
    )  # fmt: skip
    made = simplified(model)
    assert set(made.weights()) == {"w1", "w2", "c1"}
    same(model, made, x=normal(2, 4, 8, 8))
    assert set(simplified(model, keep=("c2",)).weights()) == {"w1", "w2", "c1", "c2"}


def test_body_that_reads_a_tensor_still_finds_it() -> None:
    model = parsed(
        "g (float[N,4] x, bool c) => (float[N,4] y) {a = Identity(x) k = Mul(two, two) "
        "y = If(c) <then_branch = t () => (float[N,4] p) {p = Mul(a, k)}, "
        "else_branch = e () => (float[N,4] q) {q = Neg(a)}>}",
        two=np.array(2, F32),
    )  # fmt: skip
    made = simplified(model)
    same(model, made, x=normal(3, 4), c=np.array(True))


def test_everything_that_is_no_node_is_kept() -> None:
    model = conv_chain((3, 8))
    proto = model.proto
    proto.producer_name, proto.domain, proto.model_version = "me", "org.me", 7
    proto.doc_string, proto.graph.doc_string = "about it", "about the graph"
    proto.metadata_props.add(key="colour", value="green")
    proto.graph.node[0].doc_string = "about the node"
    proto.graph.node[0].metadata_props.add(key="layer", value="first")
    proto.graph.node.insert(0, onnx.helper.make_node("Identity", ["x"], ["copy"]))
    proto.graph.node[1].input[0] = "copy"
    half = onnx.helper.make_node("Cast", ["r0"], ["h"], to=onnx.TensorProto.BFLOAT16)
    back = onnx.helper.make_node("Cast", ["h"], ["r"], to=onnx.TensorProto.FLOAT)
    proto.graph.node.insert(4, half)
    proto.graph.node.insert(5, back)
    proto.graph.node[6].input[0] = "r"
    body = onnx.helper.make_node("Relu", ["p"], ["q"])
    own = onnx.helper.make_function(
        "org.me", "Mine", ["p"], ["q"], [body], [onnx.helper.make_opsetid("", 21)]
    )
    proto.functions.append(own)
    proto.opset_import.append(onnx.helper.make_opsetid("org.me", 1))
    made = simplified(model).proto
    assert len(made.graph.node) == len(proto.graph.node) - 1
    wanted = onnx.ModelProto()
    wanted.CopyFrom(proto)
    del wanted.graph.node[0]
    wanted.graph.node[0].input[0] = "x"
    assert made == wanted
