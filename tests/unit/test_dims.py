"""Dimensions that a model declares: -1 for any size, 0 for none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxprune.analyse import analyse
from onnxprune.data import load_data, random_data
from onnxprune.dims import size_of
from onnxprune.feeds import inputs_of
from onnxprune.io import load, save
from onnxprune.model import Model
from onnxprune.prepare import prepare
from onnxprune.runtime import session
from onnxprune.shapes import environment
from onnxprune.standins import stand_ins
from tests.oracle import assert_rewrites, plan_at
from tests.unit.ops.models import between_convs, model

Dim = onnx.TensorShapeProto.Dimension


def sizes(value: onnx.ValueInfoProto) -> list[int | None]:
    return [size_of(dim) for dim in value.type.tensor_type.shape.dim]


def any_batch(found: Model) -> Model:
    """The same with a literal -1 for the batch of every value that says something of it."""
    graph = found.proto.graph
    for value in (*graph.input, *graph.output, *graph.value_info):
        value.type.tensor_type.shape.dim[0].dim_value = -1
    return found


@pytest.fixture
def convs() -> Model:
    found = between_convs("m = Relu(a)")
    for name in ("a", "m"):
        made = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, (2, 8, 8, 8))
        found.proto.graph.value_info.append(made)
    return any_batch(found)


@pytest.mark.parametrize(
    ("dim", "size"),
    [
        pytest.param(Dim(dim_value=4), 4, id="number"),
        pytest.param(Dim(dim_value=0), 0, id="empty"),
        pytest.param(Dim(dim_value=-1), None, id="any"),
        pytest.param(Dim(dim_param="n"), None, id="symbol"),
        pytest.param(Dim(), None, id="nothing"),
    ],
)
def test_size_of_a_dimension(dim: onnx.TensorShapeProto.Dimension, size: int | None) -> None:
    assert size_of(dim) == size


def test_samples_of_any_number_are_taken_where_the_batch_is_minus_one(
    tmp_path: Path, convs: Model
) -> None:
    np.savez(tmp_path / "few.npz", x=np.zeros((9, 3, 8, 8), np.float32))
    data = load_data(tmp_path / "few.npz", convs, batch=4)
    assert [len(batch["x"]) for batch in data.batches] == [4, 4, 1]


def test_minus_one_is_shown_as_a_question_mark(convs: Model) -> None:
    assert inputs_of(convs)[0].spelled == "float32 [?, 3, 8, 8]"


def test_batch_of_minus_one_gets_two_sizes(convs: Model) -> None:
    assert stand_ins(convs) == ({"x": (1, 3, 8, 8)}, {"x": (3, 3, 8, 8)})
    assert [len(batch["x"]) for batch in random_data(convs).batches] == [1, 3]


def test_minus_one_of_a_computed_tensor_says_nothing_of_its_shape() -> None:
    found = between_convs("m = Unknown(a)")
    found.proto.graph.node[1].domain = "somewhere"
    found.proto.opset_import.add(domain="somewhere", version=1)
    made = onnx.helper.make_tensor_value_info("m", onnx.TensorProto.FLOAT, (-1, 8, 8, 8))
    found.proto.graph.value_info.append(made)
    shapes = {"x": (2, 3, 8, 8)}
    assert environment(prepare(found), shapes).shape("m") != (-1, 8, 8, 8)
    made.type.tensor_type.shape.dim[0].dim_value = 2
    found.proto.graph.value_info[0].CopyFrom(made)
    assert environment(prepare(found), shapes).shape("m") == (2, 8, 8, 8)


def test_minus_one_stays_in_the_cut_model_and_channels_follow(tmp_path: Path, convs: Model) -> None:
    surgery = assert_rewrites(convs, plan_at(analyse(convs), 0.5))
    graph = surgery.model.proto.graph
    assert [value.type for value in graph.input] == [x.type for x in convs.proto.graph.input]
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_value == -1
    for value in graph.value_info:
        assert sizes(value)[:2] == [None, 4]
        assert value.type.tensor_type.shape.dim[0].dim_value == -1
    save(surgery.model, tmp_path / "cut.onnx")
    assert sizes(load(tmp_path / "cut.onnx").proto.graph.input[0])[0] is None


def test_open_channel_dimension_is_left_open(convs: Model) -> None:
    for value in convs.proto.graph.value_info:
        value.type.tensor_type.shape.dim[1].dim_value = -1
    graph = assert_rewrites(convs, plan_at(analyse(convs), 0.5)).model.proto.graph
    assert [sizes(value)[1] for value in graph.value_info] == [None, None]


def test_input_that_is_always_empty_is_fed_empty(tmp_path: Path) -> None:
    # As the cache of a decoder that is exported at its first step.
    found = model(
        "g (float[n,2,3] x, float[n,0,3] past) => (float[n,t,c] y) {"
        "j = Concat<axis=1>(past, x) a = MatMul(j, w1) y = MatMul(a, w2)}",
        w1=(3, 8),
        w2=(8, 4),
    )
    assert [shapes["past"] for shapes in stand_ins(found)] == [(1, 0, 3), (3, 0, 3)]
    cut = session(assert_rewrites(found, plan_at(analyse(found), 0.5)).model)
    arrays = {"x": np.ones((5, 2, 3), np.float32), "past": np.zeros((5, 0, 3), np.float32)}
    np.savez(tmp_path / "few.npz", **arrays)
    data = load_data(tmp_path / "few.npz", found, batch=4)
    assert [cut.run(batch)["y"].shape for batch in data.batches] == [(4, 2, 4), (1, 2, 4)]


def test_batch_of_none_is_analysed_at_some(convs: Model) -> None:
    convs.proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 0
    assert stand_ins(convs) == ({"x": (1, 3, 8, 8)}, {"x": (3, 3, 8, 8)})
    assert analyse(convs).groups[0].frozen is None
