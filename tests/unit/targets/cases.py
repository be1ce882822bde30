"""Small models that a rule is about: what it should say of each, and whether TensorRT takes it.

`test_rules.py` asks the rules, `test_against_tensorrt.py` asks TensorRT-RTX the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx

from onnxprune.model import Model
from tests.small import parsed

_RNG = np.random.default_rng(0)
_STORED = {
    "s": np.array(0.05, np.float32),
    "s1": np.full(8, 0.05, np.float32),
    "z": np.array(0, np.int8),
    "z1": np.zeros(8, np.int8),
    "z3": np.array(3, np.int8),
    "zu": np.array(128, np.uint8),
    "z81": np.full(8, 3, np.int8),
    "wi": _RNG.integers(-100, 100, (8, 8, 3, 3)).astype(np.int8),
    "wu": _RNG.integers(0, 200, (8, 8, 3, 3)).astype(np.uint8),
    "w": _RNG.standard_normal((8, 8, 3, 3)).astype(np.float32),
    "wd": _RNG.standard_normal((8, 8, 3, 3)),
    "b": np.ones(8, np.float32),
    "bi": np.ones(8, np.int32),
    "sb": np.full(8, 0.0025, np.float32),
    "s2": np.full((8, 2, 3, 3), 0.05, np.float32),
    "m": np.ones((8, 8), np.int8),
    "i": np.array([0, 1], np.int64),
    "t": np.ones((5, 4), np.uint8),
    "w8": np.zeros((8, 8, 3, 3), ml_dtypes.float8_e4m3fn),
    "z8": np.zeros((), ml_dtypes.float8_e4m3fn),
}


@dataclass(frozen=True)
class Case:
    """A model, the rule that speaks of it with its severity, and whether TensorRT refuses it."""

    name: str
    make: Callable[[], Model]
    rule: str | None = None
    severity: str = "error"
    refused: bool = False


def conv(nodes: str, interface: str = "(float[1,8,8,8] x) => (float[1,8,6,6] y)") -> Model:
    used = {name: value for name, value in _STORED.items() if name in re.findall(r"\w+", nodes)}
    return parsed(f"g {interface} {{{nodes}}}", **used)


def other_domain() -> Model:
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 21, "my.own" : 1]>'
        "g (float[1,8] x) => (float[1,8] y) {y = my.own.Frobnicate(x)}"
    )
    return Model(proto)


def contrib_gelu() -> Model:
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>'
        "g (float[1,8] x) => (float[1,8] y) {y = com.microsoft.Gelu(x)}"
    )
    return Model(proto)


def local_function() -> Model:
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 21, "my.own" : 1]>'
        "g (float[1,8] x) => (float[1,8] y) {y = my.own.Twice(x)}"
        '<domain: "my.own", opset_import: ["" : 21]> Twice (a) => (c) {c = Add(a, a)}'
    )
    return Model(proto)


def sparse_initializer() -> Model:
    model = conv("y = Conv(x, v)")
    sparse = model.proto.graph.sparse_initializer.add()
    sparse.dims.extend([8, 8, 3, 3])
    sparse.values.CopyFrom(onnx.numpy_helper.from_array(np.ones(3, np.float32), "v"))
    sparse.indices.CopyFrom(onnx.numpy_helper.from_array(np.array([0, 5, 9]), "at"))
    return model


_DATA = "q = QuantizeLinear(x, s, z) xd = DequantizeLinear(q, s, z) "
_WEIGHT = "k = DequantizeLinear<axis=0>(wi, s1, z1) "
_GEMM = "(float[2,8] x) => (float[2,8] y)"

CASES = (
    Case("floats", lambda: conv("y = Conv(x, w, b)")),
    Case("16_bit_data_and_32_bit_weight_cast",
         lambda: conv("h = Cast<to=10>(x) k = Cast<to=10>(w) c = Conv(h, k) y = Cast<to=1>(c)")),
    Case("qdq", lambda: conv(f"{_DATA}{_WEIGHT}y = Conv(xd, k, b)")),
    Case("qdq_with_one_scale_for_the_weight",
         lambda: conv(f"{_DATA}k = DequantizeLinear(wi, s, z) y = Conv(xd, k, b)")),
    Case("qdq_of_a_weight_in_floats",
         lambda: conv(f"{_DATA}r = QuantizeLinear<axis=0>(w, s1, z1) "
                      "k = DequantizeLinear<axis=0>(r, s1, z1) y = Conv(xd, k, b)")),
    Case("float8", lambda: conv("q = QuantizeLinear(x, s, z8) xd = DequantizeLinear(q, s, z8) "
                                "k = DequantizeLinear(w8, s, z8) y = Conv(xd, k, b)")),
    Case("function_of_the_model", local_function),
    Case("operator_of_another_domain_by_a_known_name", contrib_gelu),
    Case("uint8_that_is_looked_up",
         lambda: conv("c = Gather(t, i) y = Cast<to=1>(c)", "() => (float[2,4] y)")),
    Case("uint8_input_that_is_cast",
         lambda: conv("c = Cast<to=1>(x) y = Conv(c, w)",
                      "(uint8[1,8,8,8] x) => (float[1,8,6,6] y)")),
    Case("float64", lambda: conv("y = Conv(x, wd)", "(double[1,8,8,8] x) => (double[1,8,6,6] y)")),
    Case("operator_of_nobody", other_domain, "operator", refused=True),
    Case("operator_that_needs_a_plugin",
         lambda: conv("y = NonZero(x)", "(float[2,3] x) => (int64[2,n] y)"), "operator",
         refused=True),
    Case("operator_without_code",
         lambda: conv("y = Det(x)", "(float[3,3] x) => (float y)"), "operator", refused=True),
    Case("integer_operator",
         lambda: conv("q = QuantizeLinear(x, s, z) y = QLinearConv(q, s, z, wi, s1, z1, s, z)",
                      "(float[1,8,8,8] x) => (int8[1,8,6,6] y)"), "operator", refused=True),
    Case("operator_in_a_type",
         lambda: conv("y = Relu(x)", "(int32[4] x) => (int32[4] y)"), "operator-type",
         refused=True),
    Case("sparse_initializer", sparse_initializer, "sparse-initializer", refused=True),
    Case("zero_point_of_data",
         lambda: conv(f"q = QuantizeLinear(x, s, z3) xd = DequantizeLinear(q, s, z3) {_WEIGHT}"
                      "y = Conv(xd, k, b)"), "qdq-zero-point", refused=True),
    Case("zero_point_of_uint8_data",
         lambda: conv(f"q = QuantizeLinear(x, s, zu) xd = DequantizeLinear(q, s, zu) {_WEIGHT}"
                      "y = Conv(xd, k, b)"), "qdq-zero-point", refused=True),
    Case("zero_point_of_a_weight",
         lambda: conv(f"{_DATA}k = DequantizeLinear<axis=0>(wi, s1, z81) y = Conv(xd, k, b)"),
         "qdq-zero-point", refused=True),
    Case("uint8_weight",
         lambda: conv(f"{_DATA}k = DequantizeLinear(wu, s) y = Conv(xd, k, b)"),
         "qdq-weight-type", refused=True),
    Case("int32_bias",
         lambda: conv(f"{_DATA}{_WEIGHT}c = DequantizeLinear<axis=0>(bi, sb) y = Conv(xd, k, c)"),
         "qdq-bias", refused=True),
    Case("blocks_along_channels",
         lambda: conv(f"{_DATA}k = DequantizeLinear<axis=1, block_size=4>(wi, s2) "
                      "y = Conv(xd, k, b)"), "qdq-block", refused=True),
    Case("scale_at_run_time",
         lambda: conv(f"r = ReduceMax<keepdims=0>(x) q = QuantizeLinear(x, r, z) "
                      f"xd = DequantizeLinear(q, r, z) {_WEIGHT}y = Conv(xd, k, b)"), "qdq-scale",
         refused=True),
    Case("weight_alone", lambda: conv(f"{_WEIGHT}y = Conv(x, k, b)"), "qdq-placement", "warning"),
    Case("data_alone", lambda: conv(f"{_DATA}y = Conv(xd, w, b)"), "qdq-placement", "warning"),
    Case("scales_along_input_channels",
         lambda: conv(f"{_DATA}k = DequantizeLinear<axis=1>(wi, s1, z1) y = Conv(xd, k, b)"),
         "qdq-axis", "warning"),
    Case("gemm_by_rows",
         lambda: conv(f"{_DATA}k = DequantizeLinear<axis=0>(m, s1, z1) "
                      "y = Gemm<transB=1>(xd, k)", _GEMM)),
    Case("gemm_across_rows",
         lambda: conv(f"{_DATA}k = DequantizeLinear<axis=1>(m, s1, z1) "
                      "y = Gemm<transB=1>(xd, k)", _GEMM), "qdq-axis", "warning"),
    Case("product_by_columns",
         lambda: conv(f"{_DATA}k = DequantizeLinear<axis=1>(m, s1, z1) y = MatMul(xd, k)", _GEMM)),
)  # fmt: skip
