"""Rules about QuantizeLinear and DequantizeLinear: which forms TensorRT takes.

Each rule names where it comes from: *measured* on TensorRT-RTX's parser (tools/notes/0014), or
*documented* by NVIDIA ("Working with Quantized Types" in TensorRT's developer guide).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import onnx
from onnx import TensorProto

from onnxprune.model import Model, Weight
from onnxprune.presented import attributes_of
from onnxprune.targets.findings import ERROR, WARNING, Finding
from onnxprune.targets.nodes import Body, bodies
from onnxprune.types import AnyArray

_INTEGERS: Mapping[int, str] = {
    TensorProto.UINT8: "uint8",
    TensorProto.INT32: "int32",
    TensorProto.INT16: "int16",
    TensorProto.UINT16: "uint16",
}
_WEIGHTED = {"Conv": 1, "ConvTranspose": 1, "Gemm": 1, "MatMul": 1}
_SYMMETRIC = "quantize symmetrically: int8, zero point 0"


def quantized_findings(model: Model) -> Iterator[Finding]:
    """What TensorRT would mind in a quantized model; nothing of one in floats."""
    for body in bodies(model):
        for node in body.nodes:
            if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
                yield from _node(body, node)
            elif node.op_type in _WEIGHTED and len(node.input) > 1:
                yield from _weighted(body, node)


def _node(body: Body, node: onnx.NodeProto) -> Iterator[Finding]:
    label = body.label(node)
    if node.input[1] not in body.constant:
        # Measured: the parser of TensorRT-RTX 1.7 ends in a segmentation fault.
        yield Finding(
            ERROR, "qdq-scale", label, f"its scale '{node.input[1]}' is computed at run time",
            "quantize with fixed scales (static, from calibration data)",
        )  # fmt: skip
    if len(node.input) > 2 and node.input[2]:
        zero = _values(body, node.input[2])
        if zero is not None and np.any(zero):
            # Measured: "Non-zero zero point is not supported".
            yield Finding(
                ERROR, "qdq-zero-point", label, "its zero point is not 0, which TensorRT refuses",
                _SYMMETRIC,
            )  # fmt: skip
    if node.op_type == "DequantizeLinear":
        yield from _constants(body, node, label)


def _constants(body: Body, node: onnx.NodeProto, label: str) -> Iterator[Finding]:
    """DequantizeLinear of a constant: its element type, and its blocks."""
    stored = body.tensor(node.input[0])
    if stored is None:
        return
    kind = _INTEGERS.get(stored.data_type)
    if kind == "int32":
        # Measured: "input has type Int32 but must have type FP8, FP4, Int4, Int8, or UInt8".
        yield Finding(
            ERROR, "qdq-bias", label,
            f"it reads '{node.input[0]}', a bias in int32, which TensorRT refuses",
            "leave biases in float (ONNX Runtime: extra_options={'QuantizeBias': False})",
        )  # fmt: skip
    elif kind is not None:
        # Measured: "Found unsupported input type of UINT8".
        yield Finding(
            ERROR, "qdq-weight-type", label,
            f"it reads '{node.input[0]}', a constant in {kind}: TensorRT takes int8",
            _SYMMETRIC,
        )  # fmt: skip
    attributes = attributes_of(node, {})
    rank = len(stored.dims)
    if "block_size" in attributes and attributes["block_size"].i and rank > 2:
        axis = (int(attributes["axis"].i) if "axis" in attributes else 1) % rank
        if axis < rank - 2:
            # Measured: "The blocking dimension must be the last or second to last dimension".
            yield Finding(
                ERROR, "qdq-block", label,
                f"its blocks run along axis {axis} of {rank}: TensorRT takes one of the last two",
                "give each output channel a scale, without blocks",
            )  # fmt: skip


def _weighted(body: Body, node: onnx.NodeProto) -> Iterator[Finding]:
    """An operator with a weight: both of its inputs in integers, or none."""
    label, at = body.label(node), _WEIGHTED[node.op_type]
    weight, data = _dequantized(body, node.input[at]), _dequantized(body, node.input[0])
    if node.input[at] not in body.constant:
        return
    if weight is None and data is not None and data.input[0] not in body.constant:
        yield Finding(
            WARNING, "qdq-placement", label,
            "what it reads is quantized and its weight is not: it runs in floats (documented)",
            "quantize the weight too, or take away the pair of Q and DQ before it",
        )  # fmt: skip
    if weight is not None and data is None and node.input[0] not in body.constant:
        yield Finding(
            WARNING, "qdq-placement", label,
            "its weight is quantized and what it reads is not: it runs in floats (documented)",
            "quantize what it reads too; with the weight alone only the file is smaller",
        )  # fmt: skip
    if weight is None or body.producer.get(node.input[at]) is not weight:
        return
    scale = _values(body, weight.input[1])
    stored = body.tensor(weight.input[0])
    if scale is None or scale.size == 1 or stored is None:
        return
    attributes = attributes_of(weight, {})
    if "block_size" in attributes and attributes["block_size"].i:
        return
    axis = (int(attributes["axis"].i) if "axis" in attributes else 1) % len(stored.dims)
    outputs = _output_axis(node, len(stored.dims))
    if axis != outputs:
        yield Finding(
            WARNING, "qdq-axis", label,
            f"the scales of its weight lie along axis {axis}, its output channels along {outputs}: "
            "there is no int8 kernel for that (documented)",
            "quantize per output channel",
        )  # fmt: skip


def _dequantized(body: Body, name: str) -> onnx.NodeProto | None:
    node = body.maker(name)
    return node if node is not None and node.op_type == "DequantizeLinear" else None


def _output_axis(node: onnx.NodeProto, rank: int) -> int:
    """Axis of a weight along which output channels lie."""
    if node.op_type == "Conv":
        return 0
    if node.op_type == "ConvTranspose":
        return 1
    turned = attributes_of(node, {}).get("transB")
    return rank - 2 if turned is not None and turned.i else rank - 1


def _values(body: Body, name: str) -> AnyArray | None:
    stored = body.tensor(name)
    if stored is None:
        return None
    return Weight.from_tensor(stored, body.model.directory, name=name).read()
