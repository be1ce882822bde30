"""Networks of the zoo: cut by half, equal to the masked twin, parameters really gone."""

from __future__ import annotations

import numpy as np
import pytest

from onnxprune.analyse import analyse, random_keep
from onnxprune.io import as_model
from onnxprune.model import Model
from onnxprune.rewrite import operate
from onnxprune.select import PruningPlan
from tests.oracle import assert_equals_masked_twin
from tests.zoo.shared import ZOO, manifest, needs_zoo, network

# What each one is here for: the hardest thing in it.
SAMPLE = {
    "torchscript_bn/resnet18.onnx.xz": 0.27,  # residual streams
    "torchscript/shufflenet_v2_x1_0.onnx.xz": 0.38,  # channel shuffles
    "torchscript_bn/ghostnet_100.onnx.xz": 0.33,  # cheap depthwise halves, SE
    "torchscript/dla60_res2net.onnx.xz": 0.28,  # splits of splits
    "torchscript/regnetx_004.onnx.xz": 0.30,  # grouped convolutions on both sides
    "torchscript/hrnet_w18_small.onnx.xz": 0.30,  # exchanges between resolutions
    "dynamo/timm_densenet121.onnx.xz": 0.30,  # growing concatenations
    "dynamo/mobilevitv2_050.onnx.xz": 0.46,  # unfolding by reshapes, GroupNorm
    "torchscript/deit_tiny_distilled_patch16_224.onnx.xz": 0.61,  # heads, class tokens
    "torchscript/levit_conv_128s.onnx.xz": 0.35,  # convolutional attention with tables
}
ALL = [str(entry["file"]) for entry in manifest(ZOO)]


def parameters(model: Model) -> int:
    return sum(weight.size for weight in model.weights().values())


def cut_by_half(file: str, attention: str = "heads") -> float:
    """Parameters left after a random half of every group went; asserts exactness."""
    model = as_model(network(file))
    graph = analyse(model, attention=attention)
    plan = PruningPlan(graph, random_keep(graph, 0.5, np.random.default_rng(0)))
    assert_equals_masked_twin(model, plan)
    return parameters(operate(plan).model) / parameters(model)


@needs_zoo
@pytest.mark.parametrize("file", SAMPLE)
def test_network_is_cut_exactly_and_far_enough(file: str) -> None:
    assert cut_by_half(file) <= SAMPLE[file]


@needs_zoo
@pytest.mark.slow
@pytest.mark.parametrize("attention", ["heads", "dims"])
@pytest.mark.parametrize("file", ALL)
def test_every_network_is_cut_exactly(file: str, attention: str) -> None:
    assert cut_by_half(file, attention) < 0.85
