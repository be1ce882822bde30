"""The table of operators: one rule for each, found by domain, name and version."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, TypeAlias

import onnx
from onnx import TensorProto, helper, shape_inference

from onnxprune.effects import Effect
from onnxprune.errors import InvariantError
from onnxprune.graph import Node
from onnxprune.moves import Step
from onnxprune.ops.view import OpView
from onnxprune.types import BoolArray, Shape

RuleFunction: TypeAlias = Callable[[OpView], Iterator[Effect]]
# The steps of a movement for each output, at given shapes; None where the case is not understood.
MoveFunction: TypeAlias = Callable[
    [OpView, Shape, Sequence[Shape]], "Sequence[Sequence[Step]] | None"
]
MacsFunction: TypeAlias = Callable[[OpView], int]


class Kept(Protocol):
    """What is left of the tensors around a node after a cut."""

    def before(self, name: str) -> Shape:
        """Shape of a tensor before the cut, () where it is not known."""
        ...

    def shape(self, name: str) -> Shape | None:
        """Shape of a tensor after the cut."""
        ...

    def alive(self, name: str, axis: int) -> BoolArray | None:
        """Which positions of an axis survive, None where all do."""
        ...


Setting: TypeAlias = int | float | tuple[int, ...]
# New values of attributes that name a channel count, or would follow from one.
RepairFunction: TypeAlias = Callable[[Node, Kept], Mapping[str, Setting]]


@dataclass(frozen=True, slots=True)
class Entry:
    """What is known of an operator from version ``since`` on."""

    op_type: str
    domain: str
    since: int
    rule: RuleFunction | None
    move: MoveFunction | None
    summary: str


_ENTRIES: dict[tuple[str, str], list[Entry]] = {}
_MACS: dict[tuple[str, str], MacsFunction] = {}
_REPAIRS: dict[tuple[str, str], RepairFunction] = {}

# Attributes that make a one-input operator look along an axis, or ignore its input's values.
_AXIS_ATTRIBUTES = {"axis", "axes", "perm", "size", "k", "seed", "to_shape", "output_datatype"}


def rule(*names: str, domain: str = "", since: int = 1) -> Callable[[RuleFunction], RuleFunction]:
    """Register the rule of one or several operators."""

    def register(function: RuleFunction) -> RuleFunction:
        for name in names:
            _add(Entry(name, domain, since, function, None, _summary(function)))
        return function

    return register


def movement(
    *names: str, domain: str = "", since: int = 1
) -> Callable[[MoveFunction], MoveFunction]:
    """Register the steps of one or several data-movement operators."""

    def register(function: MoveFunction) -> MoveFunction:
        for name in names:
            _add(Entry(name, domain, since, None, function, _summary(function)))
        return function

    return register


def macs(*names: str, domain: str = "") -> Callable[[MacsFunction], MacsFunction]:
    """Register how many multiply-accumulates an operator takes; one for each use of a weight."""

    def register(function: MacsFunction) -> MacsFunction:
        for name in names:
            _MACS[domain, name] = function
        return function

    return register


def repair(*names: str, domain: str = "") -> Callable[[RepairFunction], RepairFunction]:
    """Register how attributes follow a cut, for operators whose attributes name a channel count."""

    def register(function: RepairFunction) -> RepairFunction:
        for name in names:
            _REPAIRS[domain, name] = function
        return function

    return register


def repair_of(node: Node) -> RepairFunction | None:
    """How the attributes of a node follow a cut, None where they stay."""
    return _REPAIRS.get((node.domain, node.op_type))


def _add(entry: Entry) -> None:
    versions = _ENTRIES.setdefault((entry.domain, entry.op_type), [])
    if any(other.since == entry.since for other in versions):
        raise InvariantError(f"rule for {entry.op_type} since {entry.since} registered twice")
    versions.append(entry)
    versions.sort(key=lambda e: e.since)


def _summary(function: Callable[..., object]) -> str:
    return (function.__doc__ or "").strip().splitlines()[0] if function.__doc__ else ""


def lookup(op_type: str, domain: str, version: int) -> Entry | None:
    """The newest rule not newer than the operator's version; None for an unknown operator."""
    found = [e for e in _ENTRIES.get((domain, op_type), []) if e.since <= version or not version]
    if found:
        return found[-1]
    if domain == "" and version and is_unary(op_type, version):
        return next(e for e in _ENTRIES[("", "Relu")])
    return None


def macs_of(node: Node) -> MacsFunction | None:
    """How to count a node's multiply-accumulates, None where it has none."""
    return _MACS.get((node.domain, node.op_type))


def entries() -> Mapping[tuple[str, str], Sequence[Entry]]:
    """Every registered operator."""
    return _ENTRIES


@lru_cache(maxsize=512)
def is_unary(op_type: str, version: int) -> bool:
    """Whether the schema says: one tensor in, one of the same shape out, no axis, no randomness."""
    try:
        schema = onnx.defs.get_schema(op_type, version, "")
    except onnx.defs.SchemaError:
        return False
    if schema.deprecated or schema.min_input != 1 or schema.max_input != 1:
        return False
    if schema.min_output != 1 or schema.max_output != 1:
        return False
    if _AXIS_ATTRIBUTES & set(schema.attributes) or _refers_to_axes(schema):
        return False
    return _keeps_shape(schema)


def _refers_to_axes(schema: onnx.defs.OpSchema) -> bool:
    return any(
        attribute.required and attribute.type == onnx.defs.OpSchema.AttrType.GRAPH
        for attribute in schema.attributes.values()
    )


def _keeps_shape(schema: onnx.defs.OpSchema) -> bool:
    required = {
        name: {"INT": 1, "FLOAT": 1.0, "INTS": [1], "STRING": ""}.get(
            str(attribute.type).rpartition(".")[2]
        )
        for name, attribute in schema.attributes.items()
        if attribute.required
    }
    node = helper.make_node(schema.name, ["x"], ["y"], **required)  # type: ignore[arg-type]  # attributes by their own names
    opsets = [helper.make_opsetid("", schema.since_version)]
    for element in (TensorProto.FLOAT, TensorProto.BOOL, TensorProto.INT32):
        feed = {"x": helper.make_tensor_type_proto(element, (2, 3, 5, 5))}
        try:
            found = shape_inference.infer_node_outputs(schema, node, feed, opset_imports=opsets)
        except (shape_inference.InferenceError, RuntimeError, onnx.checker.ValidationError):
            continue
        dims = found["y"].tensor_type.shape.dim if "y" in found else []
        return [dim.dim_value for dim in dims] == [2, 3, 5, 5]
    return False
