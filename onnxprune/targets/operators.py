"""Rules about operators: is there one that TensorRT does not take, or not in that element type?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import onnx
from onnx import TensorProto

from onnxprune.model import Model
from onnxprune.presented import domain_of
from onnxprune.targets.findings import ERROR, NOTE, WARNING, Finding
from onnxprune.targets.nodes import Body, bodies, element_types, functions_of
from onnxprune.targets.support import Complaint, Operator, operators, source

# The rules of `quantized` say more of these than that a type is refused.
_QUANTIZED = ("QuantizeLinear", "DequantizeLinear")
_INTEGER = ("ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul", "DynamicQuantizeLinear")
_NO_PLUGIN = "give TensorRT a plugin for it, or export the model without it"
_UNASKED = ("Constant",)  # it holds numbers, and every network has it


def operator_findings(model: Model) -> Iterator[Finding]:
    """What the measured table says of the operators of a model.

    TensorRT's parser goes by an operator's name, whatever its domain (measured: a ``Gelu`` of
    ONNX Runtime's own domain is taken), and so does this.
    """
    functions, types = functions_of(model), element_types(model)
    for body in bodies(model):
        for node in body.nodes:
            if (domain_of(node.domain), node.op_type) in functions or node.op_type in _UNASKED:
                continue
            label, known = body.label(node), operators().get(node.op_type)
            if known is None:
                yield _unknown(label, node)
            elif known.said is not None:
                yield _not_taken(label, node.op_type, known.said)
            elif not body.scope and node.op_type not in _QUANTIZED:
                yield from _type(body, node, known, types)


def _unknown(label: str, node: onnx.NodeProto) -> Finding:
    if onnx.defs.has(node.op_type) and not domain_of(node.domain):
        return Finding(NOTE, "operator", label, f"{node.op_type} was not tried on {source()}")
    name = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
    return Finding(
        ERROR, "operator", label,
        f"{name} is no operator of ONNX: TensorRT looks for a plugin of that name", _NO_PLUGIN,
    )  # fmt: skip


def _not_taken(label: str, op_type: str, said: Complaint) -> Finding:
    if op_type in _INTEGER:
        return Finding(
            ERROR, "operator", label,
            f"{source()} does not take {op_type}: it wants QuantizeLinear and DequantizeLinear "
            "around operators on floats",
            "quantize in QDQ format, static",
        )  # fmt: skip
    if said.plugin:
        return Finding(
            ERROR, "operator", label, f"{source()} has no plugin for {op_type}",
            f"{_NO_PLUGIN}; full TensorRT may have one, which was not tried here",
        )  # fmt: skip
    if said.sure:
        return Finding(
            ERROR, "operator", label, f"{source()} does not take {op_type}: {said.text}",
            "export the model without it",
        )  # fmt: skip
    return Finding(
        WARNING, "operator", label,
        f"{source()} knows {op_type}, but built none of ONNX's own tests of it: {said.text}",
    )  # fmt: skip


def _type(
    body: Body, node: onnx.NodeProto, known: Operator, types: Mapping[str, int]
) -> Iterator[Finding]:
    """The element type of the first input, where it is known and was refused.

    Of constants nothing is said: they were tried as inputs (measured: uint8 may be looked up).
    """
    if not node.input or node.input[0] in body.constant:
        return
    label = body.label(node)
    kind = TensorProto.DataType.Name(types.get(node.input[0], TensorProto.UNDEFINED)).lower()
    said = known.refused.get(kind)
    if said is not None:
        yield Finding(
            ERROR if said.sure else WARNING, "operator-type", label,
            f"{source()} does not {'take' if said.sure else 'build'} {node.op_type} of "
            f"{kind}: {said.text}",
            f"Cast to one of {', '.join(sorted(known.types))} before it",
        )  # fmt: skip
