from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnxprune.errors import UnsupportedModelError
from onnxprune.runtime import session
from onnxprune.train.copying import TrainingCopy
from tests.small import array, conv_chain, parsed


def rng_like(model: object, copy: TrainingCopy) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    return {
        name: rng.standard_normal(copy.graph.constants[name].weight.shape).astype(np.float32)
        for name in copy.weights
    }


def test_weights_statistics_and_scales_are_told_apart() -> None:
    copy = TrainingCopy.of(conv_chain((3, 4, 5)))
    assert set(copy.weights) == {"w0", "gamma0", "beta0", "w1", "gamma1", "beta1", "head"}
    assert copy.statistics == ("mean0", "var0", "mean1", "var1")
    assert copy.scales == ("gamma0", "gamma1")
    assert copy.matrices == ("w0", "w1", "head")


def test_the_copy_computes_what_the_model_does() -> None:
    model = conv_chain((3, 4, 5), batch="n")
    x = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
    from onnxprune.model import Model

    copied = session(Model(TrainingCopy.of(model).proto)).run({"x": x})["y"]
    np.testing.assert_allclose(copied, session(model).run({"x": x})["y"], rtol=1e-4, atol=1e-5)


def test_constants_shared_by_chance_are_trained_apart_and_both_go_back() -> None:
    model = parsed(
        "g (float[n,4] x) => (float[n,4] y)"
        "{ a = MatMul(x, w1) b = Add(a, zero) c = Relu(b) d = MatMul(c, w2) y = Add(d, zero) }",
        w1=np.eye(4, dtype=np.float32),
        w2=2 * np.eye(4, dtype=np.float32),
        zero=np.zeros(4, np.float32),
    )
    copy = TrainingCopy.of(model)
    assert set(copy.weights) == {"w1", "w2", "zero", "zero__2"}
    made = copy.written({"zero": np.ones(4), "zero__2": np.full(4, 2.0)})
    assert array(made, "zero").tolist() == [1] * 4
    assert array(made, "zero__2").tolist() == [2] * 4
    same = copy.written({"zero": np.ones(4), "zero__2": np.ones(4)})
    assert [t.name for t in same.proto.graph.initializer] == ["w1", "w2", "zero"], "merged again"


def test_a_weight_behind_an_identity_is_read_directly_and_the_identity_stays() -> None:
    model = parsed(
        "g (float[n,4] x) => (float[n,4] y)"
        "{ i = Identity(w) a = MatMul(x, w) b = Relu(a) y = MatMul(b, i) }",
        w=np.eye(4, dtype=np.float32),
    )
    copy = TrainingCopy.of(model)
    assert "Identity" not in [node.op_type for node in copy.proto.graph.node]
    made = copy.written({name: np.full((4, 4), 3.0) for name in copy.weights})
    assert [n.op_type for n in made.proto.graph.node] == ["Identity", "MatMul", "Relu", "MatMul"]
    x = np.ones((1, 4), np.float32)
    assert session(made).run({"x": x})["y"].tolist() == [[144.0] * 4]


def test_training_mode_is_gone_from_the_copy_only() -> None:
    model = conv_chain((3, 4))
    node = next(n for n in model.proto.graph.node if n.op_type == "BatchNormalization")
    node.attribute.append(onnx.helper.make_attribute("training_mode", 1))
    node.output.extend(["m", "v"])
    copy = TrainingCopy.of(model)
    made = next(n for n in copy.proto.graph.node if n.op_type == "BatchNormalization")
    assert list(made.output) == ["n0"]
    assert not any(a.name == "training_mode" for a in made.attribute)
    assert len(node.output) == 3


@pytest.mark.parametrize(
    ("text", "constant", "learned"),
    [
        ("y = Add(a, c)", np.ones(4), True),
        ("y = Mul(a, c)", np.ones(4), True),
        ("y = Mul(a, c)", np.ones(1), False),
        ("y = Add(a, c)", np.arange(12).reshape(3, 4), True),
        ("y = Mul(a, c)", np.arange(12).reshape(3, 4), False),
        ("y = Add(a, c)", np.where(np.eye(3, 4), 0, -100), False),
        ("y = Div(a, c)", np.ones(4), False),
        ("y = Pow(a, c)", np.ones(4), False),
    ],
    ids=["bias", "scale", "scalar", "positions", "rotary", "mask", "divisor", "exponent"],
)
def test_a_constant_beside_a_value_is_trained_where_it_looks_like_a_weight(
    text: str, constant: np.ndarray, learned: bool
) -> None:
    model = parsed(
        f"g (float[n,3,4] x) => (float[n,3,4] y) {{ a = MatMul(x, w) {text} }}",
        w=np.eye(4, dtype=np.float32),
        c=constant.astype(np.float32),
    )
    assert ("c" in TrainingCopy.of(model).weights) == learned


def test_everything_but_the_weights_is_the_files_own() -> None:
    model = conv_chain((3, 4, 5))
    model.proto.metadata_props.add(key="author", value="me")
    model.proto.graph.doc_string = "chain"
    copy = TrainingCopy.of(model)
    made = copy.written(rng_like(model, copy))
    stripped = [onnx.ModelProto.FromString(m.proto.SerializeToString()) for m in (model, made)]
    for proto in stripped:
        del proto.graph.initializer[:]
    assert stripped[0] == stripped[1]


def test_quantized_weights_are_not_trained() -> None:
    model = parsed(
        "g (float[n,4] x) => (float[n,4] y) { d = DequantizeLinear(q, s) y = MatMul(x, d) }",
        q=np.eye(4, dtype=np.int8),
        s=np.array(0.1, np.float32),
    )
    with pytest.raises(UnsupportedModelError, match="no float weight"):
        TrainingCopy.of(model)
