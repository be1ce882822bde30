"""From a stored tensor to the form in which a layer reads it, step by step, there and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from onnxprune.model import Weight
from onnxprune.types import AnyArray, FloatArray, Scalar, Shape


@dataclass(frozen=True, slots=True)
class Transposed:
    """Axes in another order."""

    perm: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Reshaped:
    """The same elements under another shape."""

    before: Shape
    after: Shape


@dataclass(frozen=True, slots=True, eq=False)
class Scaled:
    """Values v become (v - offset) * factor; both broadcast to the shape they meet."""

    factor: Callable[[], AnyArray] = field(repr=False)
    offset: Callable[[], AnyArray] | None = field(default=None, repr=False)


Step = Transposed | Reshaped | Scaled


@dataclass(frozen=True, eq=False)
class Stored:
    """A constant tensor as the model stores it.

    Attributes:
        name: As recipes have it: the initializer or the output of the Constant node, inside bodies
            and functions behind the first output of the node around it.
        tensor: The message.
        weight: Its values.
        top: It belongs to the main graph.
        pinned: Why it may not be changed, or None.
        readers: What else reads it than layers, in words.
    """

    name: str
    tensor: TensorProto = field(repr=False)
    weight: Weight = field(repr=False)
    top: bool
    pinned: str | None = None
    readers: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """A stored tensor in the form that some node reads."""

    stored: Stored
    shape: Shape
    steps: tuple[Step, ...] = ()
    quantized: bool = False

    def then(self, step: Step, shape: Shape | None = None) -> Seen:
        """One step further."""
        return Seen(self.stored, shape or self.shape, (*self.steps, step), self.quantized)

    def reshaped(self, shape: Shape) -> Seen:
        """Under another shape."""
        return self.then(Reshaped(self.shape, shape), shape)

    def value(self) -> AnyArray:
        """What the node reads; 16-bit floats as float32."""
        return shown(self.stored.weight.read(), self.steps)


@dataclass(frozen=True, slots=True)
class Computed:
    """A tensor made from constants in a way that is not followed."""

    how: str


def shown(stored: AnyArray, steps: Sequence[Step]) -> AnyArray:
    """A stored tensor as it is after some steps, narrow floats widened, which loses nothing."""
    array = stored
    for step in steps:
        match step:
            case Transposed(perm):
                array = array.transpose(perm)
            case Reshaped(_, shape):
                array = array.reshape(shape)
            case Scaled(factor, offset):
                values = widened(array)
                if offset is not None:
                    values = np.subtract(values, widened(offset()))
                array = np.multiply(values, widened(factor()))
    return array


def stored_places(shown_: NDArray[Scalar], steps: Sequence[Step]) -> NDArray[Scalar]:
    """The way back of something that is no value, such as a mask."""
    array = shown_
    for step in reversed(steps):
        match step:
            case Transposed(perm):
                array = array.transpose(np.argsort(perm))
            case Reshaped(shape, _):
                array = array.reshape(shape)
    return array


def stored_values(values: AnyArray, steps: Sequence[Step], dtype: np.dtype[np.generic]) -> AnyArray:
    """The way back of values: the stored tensor that comes nearest to showing them."""
    array = values
    for at in range(len(steps) - 1, -1, -1):
        step = steps[at]
        if not isinstance(step, Scaled):
            array = stored_places(array, (step,))
            continue
        factor = np.broadcast_to(widened(step.factor()), array.shape)
        array = np.divide(array, factor, out=np.zeros_like(array), where=factor != 0)
        if step.offset is not None:
            array = np.add(array, widened(step.offset()))
    if _is_integer(dtype):
        limits = ml_dtypes.iinfo(dtype)  # type: ignore[no-untyped-call]  # no stub
        array = np.clip(np.rint(array), int(limits.min), int(limits.max))
    return array.astype(dtype)


def widened(array: AnyArray) -> FloatArray:
    """The values in float64 if they are that, else in float32."""
    if array.dtype == np.float64:
        return np.asarray(array, np.float64)
    return np.asarray(array, np.float32)


def _is_integer(dtype: np.dtype[np.generic]) -> bool:
    return dtype.kind in "iu" or dtype.name.startswith(("int", "uint"))


def axis_before(step: Step, axis: int) -> int:
    """The axis along which neighbours lie before a step, if they lie along ``axis`` after it."""
    match step:
        case Transposed(perm):
            return perm[axis]
        case Reshaped(before, after):
            apart = prod(after[axis + 1 :])
            for candidate in range(len(before)):
                stride = prod(before[candidate + 1 :])
                if stride <= apart < stride * before[candidate]:
                    return candidate
            return 0
    return axis
