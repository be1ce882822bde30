"""Whole graphs in the torch interpreter: bodies, constants, versions, what is refused."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

torch = pytest.importorskip("torch", reason="the trainer 'torch' needs PyTorch")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from onnxprune import runtime  # noqa: E402
from onnxprune.errors import UnsupportedModelError, UsageError  # noqa: E402
from onnxprune.io import load  # noqa: E402
from onnxprune.model import Model  # noqa: E402
from onnxprune.train.torch_graph import TorchGraph  # noqa: E402
from onnxprune.train.torch_trainer import TorchTrainer  # noqa: E402
from tests.small import MODELS, conv_chain, parsed  # noqa: E402
from tests.torch_oracle import assert_model_gradients  # noqa: E402

pytestmark = pytest.mark.training


def assert_same(model: Model, feeds: dict[str, np.ndarray], *, tolerance: float = 1e-5) -> None:
    expected = runtime.session(model, threads=1).run(feeds)
    found = TorchGraph(model.proto).run(feeds)
    for name, wanted in expected.items():
        scale = max(float(np.abs(wanted).max(initial=0)), 1e-6)
        np.testing.assert_allclose(found[name].detach(), wanted, rtol=0, atol=tolerance * scale)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("positive", [True, False])
def test_if_runs_the_branch_of_its_condition_and_its_captured_weight_learns(positive: bool) -> None:
    model = parsed(
        """g (float[2,3] x) => (float[2,3] y) {
          total = ReduceSum<keepdims=0>(x)
          zero = Constant<value_float=0.0>()
          more = Greater(total, zero)
          y = If(more) <
            then_branch = t () => (float[2,3] a) { a = Mul(x, w) },
            else_branch = e () => (float[2,3] b) { b = Sub(x, w) }
          >
        }""",
        w=normal(3),
    )
    x = np.abs(normal(2, 3)) * (1 if positive else -1)
    assert_same(model, {"x": x})
    assert_model_gradients(model.proto, ["w"], {"x": x})


def test_loop_carries_state_and_collects_and_its_weight_learns() -> None:
    model = parsed(
        """g (float[2] x) => (float[2] y, float[n,2] all) {
          trips = Constant<value_int=3>()
          going = Constant<value=bool {1}>()
          y, all = Loop(trips, going, x) <
            body = b (int64 i, bool before, float[2] s) => (bool after, float[2] t, float[2] kept) {
              after = Identity(before)
              m = Mul(s, w)
              t = Tanh(m)
              kept = Add(t, s)
            }
          >
        }""",
        w=normal(2),
    )
    assert_same(model, {"x": normal(2)})
    assert_model_gradients(model.proto, ["w"], {"x": normal(2)})


def test_scan_runs_over_slices_and_backwards() -> None:
    model = parsed(
        """g (float[2] s, float[4,2] x) => (float[2] last, float[4,2] all) {
          last, all = Scan(s, x) <
            num_scan_inputs = 1, scan_input_directions = [1],
            body = b (float[2] a, float[2] p) => (float[2] next, float[2] out) {
              m = Mul(a, w)
              next = Add(m, p)
              out = Identity(next)
            }
          >
        }""",
        w=normal(2),
    )
    assert_same(model, {"s": normal(2), "x": normal(4, 2)})
    assert_model_gradients(model.proto, ["w"], {"s": normal(2), "x": normal(4, 2)})


def test_sequences_are_taken_apart_and_put_together() -> None:
    model = parsed(
        """g (float[4,2] x) => (float[6,2] y, float[2,4,2] z, int64 n) {
          one = Constant<value_int=1>()
          two = Constant<value_int=2>()
          parts = SplitToSequence<axis=0>(x, two)
          first = SequenceAt(parts, one)
          more = SequenceInsert(parts, first, one)
          y = ConcatFromSequence<axis=0>(more)
          pair = SequenceConstruct(x, x)
          z = ConcatFromSequence<axis=0, new_axis=1>(pair)
          n = SequenceLength(more)
        }"""
    )
    assert_same(model, {"x": normal(4, 2)})


def test_every_spelling_of_a_constant_is_read_and_the_one_with_values_can_learn() -> None:
    model = parsed(
        """g (float[2,3] x) => (float[2,3] y) {
          w = Constant<value=float[3] {0.5, -1.0, 2.0}>()
          a = Constant<value_float=1.5>()
          b = Constant<value_floats=[1.0, 2.0, 3.0]>()
          k = Constant<value_ints=[2, 3]>()
          m = Mul(x, w)
          n = Add(m, a)
          o = Mul(n, b)
          y = Reshape(o, k)
        }"""
    )
    x = normal(2, 3)
    assert_same(model, {"x": x})
    graph = TorchGraph(model.proto, trained=["w"])
    graph.run({"x": x})["y"].sum().backward()
    np.testing.assert_allclose(
        graph.parameters["w"].grad, (x * np.float32([1, 2, 3])).sum(0), rtol=1e-5
    )


def test_local_functions_are_inlined() -> None:
    text = """<ir_version: 10, opset_import: ["" : 21, "own" : 1]>
        g (float[2,3] x) => (float[2,3] y) { y = own.twice(x) }
        <domain: "own", opset_import: ["" : 21]>
        twice (a) => (b) { b = Add(a, a) }"""
    model = Model(onnx.parser.parse_model(text))
    assert_same(model, {"x": normal(2, 3)})
    assert TorchTrainer().supports(model.proto) == []


def test_sparse_initializers_are_read() -> None:
    model = parsed("g (float[2,6] x) => (float[2,6] y) { y = Add(x, w) }").proto
    values = numpy_helper.from_array(np.float32([3, 4]), "w")
    places = numpy_helper.from_array(np.array([1, 5], np.int64), "places")
    sparse = helper.make_sparse_tensor(values, places, [6])
    model.graph.sparse_initializer.append(sparse)
    found = TorchGraph(model).run({"x": np.zeros((2, 6), np.float32)})["y"]
    np.testing.assert_array_equal(found[0], np.float32([0, 3, 0, 0, 0, 4]))


def test_float16_models_are_computed_in_float32() -> None:
    node = helper.make_node("Mul", ["x", "w"], ["y"])
    shape = TensorProto.FLOAT16, [2, 3]
    graph = helper.make_graph(
        [node],
        "half",
        [helper.make_tensor_value_info("x", *shape)],
        [helper.make_tensor_value_info("y", *shape)],
        [numpy_helper.from_array(normal(3).astype(np.float16), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    found = TorchGraph(model, trained=["w"]).run({"x": normal(2, 3).astype(np.float16)})["y"]
    assert found.dtype == torch.float32


def test_shapes_computed_from_inputs_follow_every_new_size() -> None:
    model = parsed(
        """g (float[n,2,h,w] x) => (float[n,m] y) {
          s = Shape(x)
          zero = Constant<value_ints=[0]>()
          minus = Constant<value_ints=[-1]>()
          n_ = Gather(s, zero)
          target = Concat<axis=0>(n_, minus)
          y = Reshape(x, target)
        }"""
    )
    for shape in ((1, 2, 3, 4), (3, 2, 5, 1)):
        assert_same(model, {"x": normal(*shape)})


def test_constants_are_computed_once_but_not_behind_what_is_trained() -> None:
    model = parsed(
        """g (float[2,3] x) => (float[2,2] y) {
          t = Transpose(w)
          u = Transpose(v)
          m = MatMul(x, t)
          n = MatMul(x, u)
          y = Add(m, n)
        }""",
        w=normal(2, 3),
        v=normal(2, 3, seed=1),
    )
    assert_model_gradients(model.proto, ["w"], {"x": normal(2, 3)})
    graph = TorchGraph(model.proto, trained=["w"])
    assert [step.op.op_type for step in graph._block.steps].count("Transpose") == 1


def test_tensors_are_let_go_after_their_last_use() -> None:
    graph = TorchGraph(conv_chain((3, 8, 8)).proto)
    plan = graph._block.plan(graph.outputs)
    freed = [name for _, ends in plan for name in ends]
    made = {name for step, _ in plan for name in step.outputs}
    assert set(freed) == (made | {"x"}) - set(graph.outputs)
    assert len(freed) == len(set(freed))


def test_only_what_a_wanted_tensor_needs_is_computed() -> None:
    graph = TorchGraph(conv_chain((3, 8, 8)).proto)
    (found,) = graph.run({"x": normal(1, 3, 8, 8)}, ["r0"]).values()
    assert found.shape == (1, 8, 8, 8)
    assert len(graph._block.plans[("r0",)]) == 3


@pytest.mark.parametrize("statistics", [False, True], ids=["running", "of the batch"])
def test_gradients_of_a_convolutional_chain_agree_with_differences(statistics: bool) -> None:
    model = conv_chain((3, 4, 5), batch="4").proto
    names = [tensor.name for tensor in model.graph.initializer]
    moving = [name for name in names if name.startswith(("mean", "var"))]
    trained = [name for name in names if name not in moving]
    feeds = {"x": normal(4, 3, 8, 8)}
    assert_model_gradients(model, trained, feeds, statistics=moving if statistics else ())


def test_batch_statistics_move_as_onnx_says() -> None:
    text = """g (float[4,3,5] x) => (float[4,3,5] y) {
        y = BatchNormalization<momentum=0.8>(x, s, b, m, v) }"""
    values = {"s": normal(3), "b": normal(3), "m": normal(3), "v": np.abs(normal(3)) + 1}
    model = parsed(text, **values).proto
    x = normal(4, 3, 5, seed=1)
    graph = TorchGraph(model, statistics=["m", "v"])
    graph.run({"x": x})
    np.testing.assert_array_equal(graph.constant("m"), values["m"])  # inference leaves them
    graph.run({"x": x}, training=True)
    mean, variance = x.mean((0, 2)), x.var((0, 2))  # over N, not N - 1
    np.testing.assert_allclose(graph.constant("m"), 0.8 * values["m"] + 0.2 * mean, rtol=1e-5)
    np.testing.assert_allclose(graph.constant("v"), 0.8 * values["v"] + 0.2 * variance, rtol=1e-5)


def test_a_broadcast_of_the_oldest_versions_stands_at_its_axis() -> None:
    node = helper.make_node("Add", ["x", "w"], ["y"], broadcast=1, axis=1)
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node],
        "old",
        [value("x", TensorProto.FLOAT, [2, 3, 4])],
        [value("y", TensorProto.FLOAT, [2, 3, 4])],
        [numpy_helper.from_array(normal(3), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 6)], ir_version=3)
    x = normal(2, 3, 4)
    np.testing.assert_allclose(TorchGraph(model).run({"x": x})["y"], x + normal(3)[:, None])


def test_dropout_draws_only_in_training_where_the_model_says_so_and_repeats_by_seed() -> None:
    model = parsed(
        """g (float[64] x) => (float[64] y) {
          rate = Constant<value_float=0.5>()
          on = Constant<value=bool {1}>()
          y = Dropout(x, rate, on)
        }"""
    ).proto
    x = {"x": np.ones(64, np.float32)}
    first, again = (TorchGraph(model, seed=3).run(x, training=True)["y"] for _ in range(2))
    assert torch.equal(first, again)
    assert set(first.tolist()) == {0.0, 2.0}
    assert torch.equal(TorchGraph(model).run(x)["y"], torch.ones(64))


@pytest.mark.parametrize("name", ["fashion_resnet", "fashion_mobile", "fashion_vit"])
def test_real_models_give_what_onnx_runtime_gives(name: str) -> None:
    model = load(MODELS / f"{name}.onnx")
    shape = [dim.dim_value or 2 for dim in model.proto.graph.input[0].type.tensor_type.shape.dim]
    assert_same(model, {model.proto.graph.input[0].name: normal(*shape)}, tolerance=1e-4)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(st.integers(5, 9), st.integers(5, 9)),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    pads=st.tuples(*[st.integers(0, 1)] * 4),
    ceil=st.integers(0, 1),
    count=st.integers(0, 1),
    op=st.sampled_from(["MaxPool", "AveragePool"]),
)
def test_pools_of_any_window_are_those_of_onnx_runtime(
    sizes: tuple[int, int],
    kernel: tuple[int, int],
    strides: tuple[int, int],
    pads: tuple[int, ...],
    ceil: int,
    count: int,
    op: str,
) -> None:
    pads = tuple(min(pad, kernel[place % 2] - 1) for place, pad in enumerate(pads))
    more = {"count_include_pad": count} if op == "AveragePool" else {}
    node = helper.make_node(
        op, ["x"], ["y"], kernel_shape=kernel, strides=strides, pads=pads, ceil_mode=ceil, **more
    )
    graph = helper.make_graph(
        [node],
        "pool",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2, *sizes])],
        [onnx.ValueInfoProto(name="y")],
    )
    opset = [helper.make_opsetid("", 19)]
    assert_same(
        Model(helper.make_model(graph, opset_imports=opset, ir_version=9)),
        {"x": normal(1, 2, *sizes)},
    )


def test_an_unknown_operator_is_named_with_its_node() -> None:
    text = """<ir_version: 10, opset_import: ["" : 21, "ai.acme" : 1]>
        g (float[2] x) => (float[2] y) {
          [magic] z = ai.acme.DeformMagic(x)
          y = Relu(z) }"""
    model = onnx.parser.parse_model(text)
    (blocking,) = TorchTrainer().supports(model)
    assert blocking == ("magic", "DeformMagic", "torch: ai.acme:DeformMagic is not known")
    with pytest.raises(UnsupportedModelError, match=r"ai.acme:DeformMagic.*'magic'"):
        TorchGraph(model)


def test_a_node_that_fails_is_named_in_one_line() -> None:
    model = parsed(
        "g (float[n,3] x) => (float[n,m] y) { [product] y = MatMul(x, w) }", w=normal(3, 2)
    ).proto
    with pytest.raises(UnsupportedModelError, match=r"MatMul 'product': .+") as caught:
        TorchGraph(model).run({"x": normal(2, 4)})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("feeds", "wanted", "message"),
    [
        ({}, (), "no values for input 'x'"),
        ({"x": normal(1, 3, 8, 8), "z": normal(1)}, (), "no input 'z'"),
        ({"x": normal(1, 3, 8, 8)}, ("nowhere",), "no tensor 'nowhere'"),
    ],
)
def test_wrong_names_are_refused(
    feeds: dict[str, np.ndarray], wanted: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        TorchGraph(conv_chain().proto).run(feeds, wanted)


def test_what_cannot_be_trained_is_refused() -> None:
    model = parsed("g (float[4] x) => (float[2,2] y) { y = Reshape(x, k) }", k=np.array([2, 2]))
    with pytest.raises(UsageError, match="'k' cannot be trained"):
        TorchGraph(model.proto, trained=["k"])
    with pytest.raises(UsageError, match="no initializer 'w'"):
        TorchGraph(model.proto, trained=["w"])
