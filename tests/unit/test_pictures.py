"""Pictures made up where there is no data, and what a refit to them is worth."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from onnxprune.analyse import analyse
from onnxprune.data import Data
from onnxprune.io import load
from onnxprune.model import Model
from onnxprune.pictures import drawable, pictures
from onnxprune.pipeline import shrink
from onnxprune.recipe import read
from onnxprune.runtime import session
from tests.small import MODELS, conv_chain, parsed


def pictures_of(model: Model, macs: int = 0, seed: int = 0) -> Data:
    graph = analyse(model)
    data = pictures(graph.graph, graph.stand_ins, macs, seed)
    assert data is not None
    assert data.random
    return data


def made(model: Model, *, macs: int = 0, seed: int = 0) -> np.ndarray:
    """All the pictures for a model."""
    data = pictures_of(model, macs, seed)
    return np.concatenate([next(iter(batch.values())) for batch in data.batches])


def takes(shape: str, kind: str = "float") -> Model:
    return parsed(f"g ({kind}[{shape}] x) => ({kind}[{shape}] y) {{ y = Identity(x) }}")


def test_neighbouring_pixels_and_colours_are_alike_and_no_two_pictures() -> None:
    found = made(takes("N,3,32,48"))
    assert found.shape == (128, 3, 32, 48)
    assert found.dtype == np.float32
    assert found.mean() == pytest.approx(0, abs=0.05)
    assert found.std() == pytest.approx(1, abs=0.05)
    assert np.corrcoef(found[..., 1:].ravel(), found[..., :-1].ravel())[0, 1] > 0.85
    assert 0.7 < np.corrcoef(found[:, 0].ravel(), found[:, 1].ravel())[0, 1] < 0.9
    assert abs(np.corrcoef(found[0].ravel(), found[1].ravel())[0, 1]) < 0.6


def test_same_seed_same_pictures() -> None:
    model = takes("N,1,16,16")
    np.testing.assert_array_equal(made(model), made(model))
    assert not np.array_equal(made(model), made(model, seed=1))


def test_colours_come_last_where_the_model_wants_them_there() -> None:
    assert made(takes("N,32,48,3")).shape == (128, 32, 48, 3)


def test_bytes_get_the_range_of_bytes() -> None:
    found = made(takes("N,3,16,16", "uint8"))
    assert found.dtype == np.uint8
    assert 90 < found.mean() < 140
    assert found.std() > 40


@pytest.mark.parametrize(
    ("shape", "kind"),
    [("N,64", "float"), ("N,16,32,32", "float"), ("N,3,32,32", "int64"), ("N,3,4,4", "float")],
    ids=["a row", "sixteen channels", "whole numbers", "a stamp"],
)
def test_what_is_no_picture_is_not_drawn(shape: str, kind: str) -> None:
    graph = analyse(takes(shape, kind))
    assert pictures(graph.graph, graph.stand_ins) is None


def test_two_inputs_are_not_drawn() -> None:
    model = parsed("g (float[1,3,8,8] x, float[1,3,8,8] z) => (float[1,3,8,8] y) { y = Add(x, z) }")
    assert not drawable(analyse(model).graph)


def test_a_dear_model_gets_fewer_pictures_and_a_very_dear_one_none() -> None:
    model = takes("N,3,16,16")
    assert len(made(model, macs=1 << 34)) == 32
    graph = analyse(model)
    assert pictures(graph.graph, graph.stand_ins, 1 << 40) is None


@pytest.mark.parametrize("scale", [1, 0.5, 64], ids=["normalised", "[-1, 1]", "bytes"])
def test_range_is_the_one_that_batch_normalizations_saw(scale: float) -> None:
    """A BatchNormalization of 1x1 filters tells mean and variance of the pixels themselves."""
    center = 115 if scale > 1 else 0
    model = parsed(
        """g (float[N,1,16,16] x) => (float[N,2,16,16] y) {
        a = Conv(x, w) y = BatchNormalization(a, one, zero, mean, var)}""",
        w=np.float32([1, -1]).reshape(2, 1, 1, 1), one=np.ones(2, np.float32),
        zero=np.zeros(2, np.float32), mean=np.float32([center, -center]),
        var=np.full(2, scale**2, np.float32),
    )  # fmt: skip
    found = made(model)
    assert found.mean() == pytest.approx(center, abs=0.1 * scale)
    assert found.std() == pytest.approx(scale, rel=0.1)


def accuracy(model: Model) -> float:
    with np.load(MODELS / "fashion_test.npz") as stored:
        images, labels = stored["input"][::4], stored["labels"][::4]
    return float(np.mean(session(model).run({"input": images})["logits"].argmax(1) == labels))


@pytest.mark.parametrize(
    ("network", "plain", "fitted"), [("resnet", 0.35, 0.78), ("mobile", 0.45, 0.75)]
)
def test_a_refit_to_pictures_gives_most_of_a_cut_back(
    network: str, plain: float, fitted: float
) -> None:
    model = load(MODELS / f"fashion_{network}.onnx")
    bare, _ = shrink(model, ratio=0.3, importance="reader", restore="none", verify="none")
    found, report = shrink(model, ratio=0.3, importance="reader", restore="pictures")
    assert report.recipe["options"]["restore"] == "pictures"  # type: ignore[index]  # JSON
    assert report.verdict.inputs == "random pictures, seed 1"
    assert accuracy(bare) < plain
    assert accuracy(found) > fitted
    again, _ = shrink(model, recipe=read(found))
    assert again.proto.SerializeToString() == found.proto.SerializeToString()


def test_pictures_are_made_only_where_they_are_asked_for() -> None:
    _, report = shrink(conv_chain((1, 8, 8), batch="N"), ratio=0.5)
    assert report.recipe["options"]["restore"] == "bias"  # type: ignore[index]  # JSON


def test_data_are_taken_before_pictures() -> None:
    model = conv_chain((1, 8, 8), batch="N")
    data = replace(pictures_of(model), random=False, label="mine")
    _, report = shrink(model, ratio=0.5, data=data)
    assert report.recipe["options"]["restore"] == "refit"  # type: ignore[index]  # JSON
