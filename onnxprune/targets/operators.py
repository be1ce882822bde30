"""Rules about operators: is there one that TensorRT does not take, or not in that element type?"""

from __future__ import annotations

from collections.abc import Iterator

from onnx import TensorProto

from onnxprune.io import Model
from onnxprune.presented import domain_of
from onnxprune.targets.findings import ERROR, WARNING, Finding
from onnxprune.targets.nodes import Body, bodies, element_types, functions_of
from onnxprune.targets.support import operators, source

# The rules of `quantized` say more of these than that a type is refused.
_QUANTIZED = ("QuantizeLinear", "DequantizeLinear")
_INTEGER = ("ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul", "DynamicQuantizeLinear")
_NO_PLUGIN = "give TensorRT a plugin for it, or export the model without it"
_NOT_PARSED = ("false", "")  # what the parser says of an operator that it has no code for


def operator_findings(model: Model) -> Iterator[Finding]:
    """What the measured table says of the operators of a model."""
    functions, types = functions_of(model), element_types(model)
    for body in bodies(model):
        for node in body.nodes:
            if (domain_of(node.domain), node.op_type) in functions or node.op_type == "Constant":
                continue
            label = body.label(node)
            found = operators().get(node.op_type)
            if found is None:
                name = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
                yield Finding(
                    ERROR, "operator", label,
                    f"{source()} looks for a plugin of the name {name}, which is no operator of "
                    "ONNX that was tried", _NO_PLUGIN,
                )  # fmt: skip
            elif not found.types:
                yield _not_taken(label, node.op_type, found.said, plugin=found.plugin)
            elif node.op_type not in _QUANTIZED and not body.scope and node.input:
                kind = TensorProto.DataType.Name(types.get(node.input[0], 0)).lower()
                if kind in found.refused and kind not in found.types:
                    yield Finding(
                        ERROR, "operator-type", label,
                        f"{source()} does not take {node.op_type} of {kind}: "
                        f"{_plain(found.refused[kind])}",
                        f"Cast to one of {', '.join(sorted(found.types))} before it",
                    )  # fmt: skip
                elif found.constants_only and not _constant(body, node.input[1:]):
                    yield Finding(
                        WARNING, "operator-constant", label,
                        f"{source()} took {node.op_type} with constants for all inputs but the "
                        "first only",
                        "compute those inputs ahead: fold constants when exporting",
                    )  # fmt: skip


def _not_taken(label: str, op_type: str, said: str, *, plugin: bool) -> Finding:
    if op_type in _INTEGER:
        return Finding(
            ERROR, "operator", label,
            f"{source()} does not take {op_type}: it wants QuantizeLinear and DequantizeLinear "
            "around operators on floats",
            "quantize in QDQ format, static",
        )  # fmt: skip
    if plugin:
        return Finding(
            ERROR, "operator", label, f"{source()} has no plugin for {op_type}",
            f"{_NO_PLUGIN}; full TensorRT may have one, which was not tried here",
        )  # fmt: skip
    why = f": {_plain(said)}" if _plain(said) else ""
    return Finding(
        ERROR, "operator", label, f"{source()} does not take {op_type}{why}",
        "export the model without it",
    )  # fmt: skip


def _plain(said: str) -> str:
    """What was said, where it says something."""
    return "" if said in _NOT_PARSED else said


def _constant(body: Body, names: object) -> bool:
    assert not isinstance(names, str)
    return all(not name or name in body.constant for name in names)  # type: ignore[attr-defined]
