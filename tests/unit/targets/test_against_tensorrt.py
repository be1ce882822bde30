"""The same cases put to TensorRT-RTX itself: a rule may say only what it says."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxprune.checking import check
from onnxprune.targets.builder import build_model
from onnxprune.targets.profiles import Wanted
from tests.small import conv_chain, parsed
from tests.unit.targets.cases import CASES, Case

pytestmark = [
    pytest.mark.trt,
    pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="needs onnxprune[tensorrt]"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_tensorrt_refuses_what_the_rules_call_an_error_and_builds_the_rest(case: Case) -> None:
    made = build_model(case.make(), {})
    assert made.built is not case.refused, made


def test_finding_of_the_parser_names_the_node() -> None:
    case = next(one for one in CASES if one.name == "uint8_weight")
    made = build_model(case.make(), {})
    assert made.status == "refused"
    assert [one.node for one in made.findings] == ["DequantizeLinear 'k'"]
    assert "UINT8" in made.findings[0].message
    assert made.version.startswith("TensorRT-RTX ")


def test_noise_about_the_missing_driver_is_left_out() -> None:
    model = parsed("g (float[1,4,2,2] x) => (float[1,9,4] y) {y = Reshape(x, t)}",
                   t=np.array([1, 9, 4]))  # fmt: skip
    made = build_model(model, {})
    assert made.findings
    assert not [one for one in made.findings if "cuda" in one.message.lower()]


def test_dynamic_model_is_built_for_the_shapes_given() -> None:
    model = conv_chain(batch="n")
    wanted = Wanted.read(model, least={"x": (1, 3, 8, 8)}, most={"x": (4, 3, 8, 8)})
    assert build_model(model, wanted.profiles(())).built


def test_external_data_is_found_beside_the_model(tmp_path: Path) -> None:
    model = conv_chain((3, 32, 64))
    onnx.save(model.proto, tmp_path / "m.onnx", save_as_external_data=True, location="m.data")
    report = check(tmp_path / "m.onnx", build=True)
    assert report.checked is not None
    assert report.checked.passed
    assert report.checked.build is not None
    assert report.checked.build.engine_bytes > 0


@pytest.mark.parametrize("opset", [7, 13, 17, 21, 26])
def test_opsets_from_7_on_are_built(opset: int) -> None:
    model = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : {opset}]>'
        "g (float[1,4,4,4] x) => (float[1,4,4,4] y) {y = Relu(x)}"
    )
    from onnxprune.model import Model

    assert build_model(Model(model), {}).built
