"""Operators of ONNX Runtime's own domain: no schema of ONNX's knows them."""

from __future__ import annotations

import onnx
import pytest

from onnxprune.analyse import analyse
from onnxprune.io import Model
from tests.unit.ops.models import (
    assert_coupled,
    assert_exact,
    attribute,
    between_convs,
    between_matmuls,
    halved,
)


def in_microsoft_domain(found: Model, *operators: str) -> Model:
    """The same model with some of its nodes in ONNX Runtime's domain."""
    for node in found.proto.graph.node:
        if node.op_type in operators:
            node.domain = "com.microsoft"
    found.proto.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    return found


@pytest.mark.parametrize("operator", ["Gelu", "QuickGelu"])
def test_activation_passes_channels(operator: str) -> None:
    found = in_microsoft_domain(between_convs(f"m = {operator}(a)"), operator)
    assert_coupled(analyse(found), ("w1", 0), ("w2", 1))
    assert_exact(found)


@pytest.mark.parametrize("operator", ["BiasGelu", "FastGelu"])
def test_bias_of_activation_follows_the_channels(operator: str) -> None:
    found = in_microsoft_domain(between_matmuls(f"m = {operator}(a, b)", b=(8,)), operator)
    assert_coupled(analyse(found), ("w1", 1), ("b", 0), ("w2", 0))
    assert_exact(found)


def test_fused_conv_reads_makes_and_adds_as_its_parts_would() -> None:
    middle = 'm = FusedConv<activation="Relu">(a, w, b, a)'
    found = in_microsoft_domain(between_convs(middle, w=(8, 8, 1, 1), b=(8,)), "FusedConv")
    assert_coupled(analyse(found), ("w1", 0), ("w", 1), ("w", 0), ("b", 0), ("w2", 1))
    assert_exact(found)


def test_depthwise_fused_conv_follows_with_its_group() -> None:
    middle = 'm = FusedConv<activation="Relu", group=8>(a, w)'
    found = in_microsoft_domain(between_convs(middle, w=(8, 1, 1, 1)), "FusedConv")
    assert attribute(halved(found)["m"], "group") == 4
    assert_exact(found)
