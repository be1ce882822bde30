"""The table of operators that the torch trainer can compute: one function each.

A function takes the ``Op`` (attributes, version, setting) and the inputs, and returns the output,
or a tuple of outputs. Inputs are torch tensors, None where one is left out, and plain lists of
numbers at the positions that ``host`` names: shapes, axes and the like, which have to be known
before anything is computed. A list of one number that ONNX holds as a scalar is a list too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import onnx

from onnxprune.errors import InvariantError, UnsupportedModelError
from onnxprune.train.torch_ops.lazy import Tensor, torch
from onnxprune.types import AnyArray

OpFunction: TypeAlias = Callable[..., Any]
# Runs a body: inputs by position, outer tensors by name; gives the outputs.
Body: TypeAlias = Callable[[Sequence[Any], Mapping[str, Any]], list[Any]]
MICROSOFT = "com.microsoft"


@dataclass(slots=True)
class Setting:
    """What holds for a run as a whole.

    Attributes:
        real: Torch type in which all real numbers are computed, float32 or float64.
        device: Where.
        statistics: Running statistics that BatchNormalization updates; empty: all of it infers.
        generator: Source of what the model draws at random, None to draw nothing.
    """

    real: Any
    device: Any
    statistics: frozenset[str] = frozenset()
    generator: Any = None


@dataclass(slots=True)
class Op:
    """One node, as its function sees it.

    Attributes:
        op_type: Operator.
        label: Name to show a person.
        version: Opset version of the operator's domain.
        inputs: Names of its inputs.
        attributes: Decoded; text as str, tensors as arrays.
        outputs: How many outputs the node declares.
        setting: Of the run.
        bodies: What runs its subgraphs, by attribute.
        scope: Tensors that bodies may capture; set before each call.
        kept: For a function to keep what it need not work out again.
    """

    op_type: str
    label: str
    version: int
    inputs: tuple[str, ...]
    attributes: Mapping[str, Any]
    outputs: int
    setting: Setting
    bodies: dict[str, Body] = field(default_factory=dict)
    scope: Mapping[str, Any] = field(default_factory=dict)
    kept: dict[Any, Any] = field(default_factory=dict)

    def integer(self, name: str, default: int) -> int:
        """A whole-number attribute."""
        return int(self.attributes.get(name, default))

    def real(self, name: str, default: float) -> float:
        """A real attribute."""
        return float(self.attributes.get(name, default))

    def text(self, name: str, default: str) -> str:
        """A text attribute."""
        return str(self.attributes.get(name, default))

    def ints(self, name: str, given: Sequence[Any] | None = None) -> list[Any] | None:
        """A list that newer versions take as an input (``given``) and older ones as attribute."""
        return list(given) if given is not None else self.attributes.get(name)

    def axis(self, rank: int, default: int = -1) -> int:
        """The attribute ``axis``, counted from 0."""
        axis = self.integer("axis", default)
        return axis + rank if axis < 0 else axis

    def fail(self, reason: str) -> UnsupportedModelError:
        """The error that this node cannot be computed."""
        return UnsupportedModelError(
            f"trainer 'torch' cannot compute {self.op_type} '{self.label}': {reason}",
            hint="try --trainer ort",
            node=self.label,
        )

    def tensor(self, array: AnyArray) -> Tensor:
        """A constant of the run: real numbers in the run's type and place, others on the host."""
        return to_tensor(array, self.setting)


@dataclass(frozen=True, slots=True)
class Entry:
    """A function and the positions of its inputs that it takes as lists."""

    function: OpFunction
    host: frozenset[int]


_TABLE: dict[tuple[str, str], Entry] = {}


def op(
    *names: str, domain: str = "", host: Sequence[int] = ()
) -> Callable[[OpFunction], OpFunction]:
    """Register the function of one or several operators."""

    def register(function: OpFunction) -> OpFunction:
        for name in names:
            if (domain, name) in _TABLE:
                raise InvariantError(f"torch function of {name} registered twice")
            _TABLE[domain, name] = Entry(function, frozenset(host))
        return function

    return register


def lookup(op_type: str, domain: str) -> Entry | None:
    """The entry of an operator, None where it is not known."""
    return _TABLE.get((domain, op_type))


def names() -> tuple[tuple[str, str], ...]:
    """Every known operator: (domain, name)."""
    return tuple(sorted(_TABLE))


def to_tensor(array: AnyArray, setting: Setting) -> Tensor:
    """An array as a tensor: real numbers in the run's type and place, others on the host."""
    if is_real(array.dtype):
        array = np.array(array, dtype=np.float64 if setting.real == torch.float64 else np.float32)
        return torch.from_numpy(array).to(setting.device)
    if array.dtype.kind in "OUS":
        raise UnsupportedModelError("trainer 'torch' cannot compute with strings")
    wider = {"uint16": np.int32, "uint32": np.int64, "uint64": np.int64}.get(array.dtype.name)
    if array.dtype.name in ("int4", "uint4", "int2", "uint2"):
        wider = np.int8 if array.dtype.name.startswith("i") else np.uint8
    return torch.from_numpy(np.array(array, dtype=wider or array.dtype))


def is_real(dtype: np.dtype[np.generic]) -> bool:
    """Whether an array's type holds real numbers, ml_dtypes' own included."""
    return dtype.kind == "f" or dtype.name.startswith(("bfloat", "float"))


def torch_type(element: int, setting: Setting) -> Any:
    """The torch type that stands for an ONNX element type."""
    dtype = onnx.helper.tensor_dtype_to_np_dtype(element)
    if is_real(dtype):
        return setting.real
    found = {"uint16": "int32", "uint32": "int64", "uint64": "int64"}.get(dtype.name, dtype.name)
    return getattr(torch, found)
