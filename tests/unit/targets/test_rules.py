"""What our own rules for TensorRT say, without TensorRT."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxprune.checking import check
from onnxprune.io import load, save
from onnxprune.model import Model
from onnxprune.targets.files import file_findings
from onnxprune.targets.findings import ERROR, Build, Checked, Finding
from onnxprune.targets.operators import operator_findings
from onnxprune.targets.quantized import quantized_findings
from onnxprune.targets.support import operators, source
from onnxprune.targets.tensorrt import checked
from tests.small import conv_chain, parsed, reloaded
from tests.unit.targets.cases import CASES, Case


def found(model: Model) -> list[Finding]:
    return [*file_findings(model), *operator_findings(model), *quantized_findings(model)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rule_speaks_of_the_case_and_no_other_does(case: Case) -> None:
    said = [(one.rule, one.severity) for one in found(case.make()) if one.severity != "note"]
    assert set(said) == ({(case.rule, case.severity)} if case.rule else set())


@pytest.mark.parametrize("case", [one for one in CASES if one.rule], ids=lambda case: case.name)
def test_finding_names_a_node_or_tensor_and_a_cure(case: Case) -> None:
    for one in found(case.make()):
        assert one.node or "'" in one.message
        assert one.cure


def test_table_of_operators_is_the_measured_one() -> None:
    table = operators()
    assert source() == "TensorRT-RTX 1.7.1.116"
    assert len(table) > 180
    assert {"float", "float16", "bfloat16"} <= table["Conv"].types
    assert table["LayerNormalization"].types
    assert table["Relu"].refused["int32"].who == "parser"
    assert table["NonZero"].said is not None
    assert table["NonZero"].said.plugin


def test_operator_in_a_body_is_found_with_the_node_it_is_in() -> None:
    body = "then_branch = a () => (float[2] p) {d = Det(x) p = Add(v, d)}, "
    body += "else_branch = c () => (float[2] n) {n = Neg(v)}"
    model = parsed(f"g (float[3,3] x, float[2] v, bool c) => (float[2] y) {{y = If<{body}>(c)}}")
    errors = [one for one in operator_findings(model) if one.severity == ERROR]
    assert [one.node for one in errors] == ["Det 'd' in 'y'"]


def test_operator_that_was_not_tried_is_a_note() -> None:
    model = parsed("g (float[2] x) => (seq(float[2]) y) {y = SequenceEmpty()}")
    assert [one.severity for one in operator_findings(model)] == ["note"]


def test_version_that_was_not_tried_is_said() -> None:
    proto = conv_chain().proto
    proto.opset_import[0].version = 99
    assert [one.rule for one in file_findings(Model(proto))] == ["version"]


def test_external_data_is_named(tmp_path: Path) -> None:
    model = conv_chain((3, 32, 64))
    onnx.save(model.proto, tmp_path / "m.onnx", save_as_external_data=True, location="m.weights")
    said = list(file_findings(load(tmp_path / "m.onnx")))
    assert [one.rule for one in said] == ["external-data"]
    assert "m.weights" in said[0].message


# -- channels and 2:4 ------------------------------------------------------------------------------


def rules_of(model: Model) -> dict[str, list[Finding]]:
    report = check(model, build=False)
    assert report.checked is not None
    grouped: dict[str, list[Finding]] = {}
    for one in report.checked.findings:
        grouped.setdefault(one.rule, []).append(one)
    return grouped


def test_channels_that_a_cut_could_align_are_a_warning_others_a_note() -> None:
    said = rules_of(conv_chain((3, 20, 24)))["channels"]
    assert [(one.severity, one.message.split(" channels")[0]) for one in said] == [
        ("warning", "makes 20"),
        ("warning", "reads 20"),
        ("note", "reads 3"),
        ("note", "makes 4"),
    ]
    assert said[0].cure == "shrink --round-to 8 aligns them"
    assert "input 'x'" in said[2].message


def sparse(width: int, outputs: int) -> Model:
    weight = np.ones((outputs, width, 1, 1), np.float32)
    weight[:, 0::4] = weight[:, 1::4] = 0
    return parsed(
        f"g (float[1,{width},4,4] x) => (float[1,{outputs},4,4] y) {{y = Conv(x, w)}}", w=weight
    )


def test_wide_layer_in_the_pattern_is_eligible_but_not_in_float32() -> None:
    said = rules_of(sparse(256, 256))
    assert [one.severity for one in said["sparse-type"]] == ["warning"]
    assert "sparse-gain" not in said
    assert "sparse-channels" not in said


def test_narrow_layer_in_the_pattern_is_a_note() -> None:
    assert "sparse kernels pay from 256" in rules_of(sparse(64, 64))["sparse-gain"][0].message


def test_layer_in_the_pattern_with_wrong_channels_is_a_warning() -> None:
    said = rules_of(sparse(24, 64))
    assert "not a multiple of 16" in said["sparse-channels"][0].message
    assert "sparse-type" not in said


# -- TensorRT has the last word --------------------------------------------------------------------


def judged(model: Model, build: Build) -> Checked:
    return checked(model, "m.onnx", (), {}, lambda *_: build)


def test_error_of_ours_is_a_warning_where_tensorrt_built_the_model() -> None:
    case = next(one for one in CASES if one.name == "uint8_weight")
    said = judged(case.make(), Build("built", "TensorRT-RTX 9"))
    assert said.passed
    assert said.findings[0].severity == "warning"
    assert said.findings[0].message.endswith("TensorRT-RTX 9 built it all the same")


def test_error_of_tensorrt_gets_the_cure_of_our_rule() -> None:
    case = next(one for one in CASES if one.name == "uint8_weight")
    theirs = Finding("error", "parser", "DequantizeLinear 'k'", "no")
    said = judged(case.make(), Build("refused", "TensorRT-RTX 9", (theirs,)))
    assert not said.passed
    assert said.findings[0].rule == "parser"
    assert said.findings[0].cure == "quantize symmetrically: int8, zero point 0"


def test_build_that_failed_does_not_pass_without_any_finding() -> None:
    assert not judged(conv_chain(), Build("failed", "TensorRT-RTX 9")).passed


def test_values_are_read_from_external_data(tmp_path: Path) -> None:
    case = next(one for one in CASES if one.name == "zero_point_of_a_weight")
    onnx.save(case.make().proto, tmp_path / "m.onnx", save_as_external_data=True,
              location="m.data", size_threshold=0)  # fmt: skip
    said = [one.rule for one in quantized_findings(load(tmp_path / "m.onnx"))]
    assert said == ["qdq-zero-point"]


def test_check_leaves_the_file_alone(tmp_path: Path) -> None:
    model = reloaded(conv_chain(), tmp_path / "m.onnx")
    before = (tmp_path / "m.onnx").read_bytes()
    check(model, build=False)
    assert (tmp_path / "m.onnx").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]
    save(model, tmp_path / "again.onnx")
