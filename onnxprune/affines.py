"""BatchNormalization and per-channel scales and shifts, folded into the layer beside them.

A layer that is followed by ``a * x + b``, with one a and one b for each of its output channels, is
the layer with other filters and another bias: exactly so in real numbers, to rounding in floats.
Before a layer the same holds where nothing is padded with zeros, which the shift would have moved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto

from onnxprune.types import AnyArray, Float64Array

FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE}
LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_EPSILON = 1e-5  # of BatchNormalization, by the specification
_POINTWISE = ("Mul", "Div", "Add", "Sub")

Constants = Mapping[str, AnyArray]


@dataclass(frozen=True)
class Affine:
    """``scale * x + shift`` for each channel.

    Attributes:
        scale, shift: One number each, or one for every channel, shape () or (channels,).
        rank: Rank that x has, None where any will do.
        axis: Axis of the channels, counted from the end.
    """

    scale: Float64Array
    shift: Float64Array
    rank: int | None
    axis: int

    def of(self, channels: int) -> tuple[Float64Array, Float64Array] | None:
        """Scale and shift of so many channels; None where they are of another number."""
        if any(part.size not in (1, channels) for part in (self.scale, self.shift)):
            return None
        if not (np.isfinite(self.scale).all() and np.isfinite(self.shift).all()):
            return None
        scale, shift = (np.broadcast_to(p.reshape(-1), (channels,)) for p in self.parts)
        return scale, shift

    @property
    def parts(self) -> tuple[Float64Array, Float64Array]:
        """Scale, shift."""
        return self.scale, self.shift


def affine_of(node: onnx.NodeProto, rank: int | None, constants: Constants) -> Affine | None:
    """What a node computes for each channel; None where it is nothing of the kind.

    Args:
        node: A node whose first input that is no constant is x.
        rank: Rank of x, None where it is not known.
        constants: Values of its inputs that are constants.
    """
    if node.domain not in ("", "ai.onnx"):
        return None
    if node.op_type == "BatchNormalization":
        return _norm(node, rank, constants)
    if node.op_type not in _POINTWISE or len(node.input) != 2:
        return None
    first = node.input[0] in constants
    if first == (node.input[1] in constants):
        return None
    value = constants[node.input[0 if first else 1]]
    place = _place(value, rank)
    if place is None or (first and node.op_type == "Div"):
        return None
    flat = value.astype(np.float64).reshape(-1)
    one, zero = np.ones(1), np.zeros(1)
    with np.errstate(divide="ignore", over="ignore"):
        match node.op_type:
            case "Mul":
                return Affine(flat, zero, rank, place)
            case "Div":
                return Affine(1 / flat, zero, rank, place)
            case "Add":
                return Affine(one, flat, rank, place)
    return Affine(-one, flat, rank, place) if first else Affine(one, -flat, rank, place)


def _norm(node: onnx.NodeProto, rank: int | None, constants: Constants) -> Affine | None:
    settings = {attribute.name: attribute for attribute in node.attribute}
    training = "training_mode" in settings and settings["training_mode"].i
    spread = "spatial" in settings and not settings["spatial"].i  # opset 7 and before
    if training or spread or any(node.output[1:]) or rank is None or rank < 2:
        return None
    if not all(name in constants for name in node.input[1:5]) or len(node.input) != 5:
        return None
    gamma, beta, mean, var = (constants[name].astype(np.float64) for name in node.input[1:5])
    epsilon = settings["epsilon"].f if "epsilon" in settings else _EPSILON
    with np.errstate(all="ignore"):
        scale = gamma / np.sqrt(var + epsilon)
        return Affine(scale, beta - mean * scale, rank, 1 - rank)


def _place(value: AnyArray, rank: int | None) -> int | None:
    """The one axis, from the end, along which a constant varies; None where it is not one."""
    known = value.ndim if rank is None else rank
    if value.dtype.kind in "iubcOUS" or value.ndim > known or (rank is None and value.ndim > 1):
        return None
    varies = [axis - value.ndim for axis, size in enumerate(value.shape) if size != 1]
    if len(varies) > 1 or value.size == 0:
        return None
    return varies[0] if varies else -1


@dataclass(frozen=True)
class Layer:
    """A node that multiplies by a constant weight.

    Attributes:
        node: The node.
        weight: Its weight.
        bias: Its bias, None where it has none.
    """

    node: onnx.NodeProto
    weight: AnyArray
    bias: AnyArray | None

    @property
    def groups(self) -> int:
        """Groups of a convolution, 1 elsewhere."""
        return next((a.i for a in self.node.attribute if a.name == "group"), 1)

    @property
    def rank(self) -> int | None:
        """Rank of what it makes; None where its weight does not tell."""
        return {"MatMul": None, "Gemm": 2}.get(self.node.op_type, self.weight.ndim)

    @property
    def axis(self) -> int:
        """Axis of the channels it makes and reads, from the end; needs a rank of 2 or more."""
        return -1 if self.node.op_type in ("Gemm", "MatMul") else 1 - self.weight.ndim

    @property
    def outputs(self) -> int:
        """Channels it makes."""
        match self.node.op_type:
            case "Conv":
                return int(self.weight.shape[0])
            case "ConvTranspose":
                return int(self.weight.shape[1]) * self.groups
        return int(self.weight.shape[0 if self._turned else -1])

    @property
    def inputs(self) -> int:
        """Channels it reads."""
        match self.node.op_type:
            case "Conv":
                return int(self.weight.shape[1]) * self.groups
            case "ConvTranspose":
                return int(self.weight.shape[0])
        return int(self.weight.shape[-1 if self._turned else -2])

    @property
    def _turned(self) -> bool:
        return any(a.name == "transB" and a.i for a in self.node.attribute)

    def setting(self, name: str, default: float) -> float:
        """A number attribute."""
        return next((a.f for a in self.node.attribute if a.name == name), default)

    @property
    def pads_zeros(self) -> bool:
        """Whether zeros go in beside what it reads, or it does not read all alike."""
        if self.node.op_type == "ConvTranspose":
            return True
        settings = {attribute.name: attribute for attribute in self.node.attribute}
        auto = settings["auto_pad"].s.decode() if "auto_pad" in settings else "NOTSET"
        pads = settings["pads"].ints if "pads" in settings else ()
        return any(pads) or auto not in ("NOTSET", "VALID")

    def after(self, scale: Float64Array, shift: Float64Array) -> tuple[Float64Array, Float64Array]:
        """Weight and bias of the layer with ``scale * y + shift`` behind it."""
        weight = self.weight.astype(np.float64)
        bias = np.zeros(1) if self.bias is None else self.bias.astype(np.float64)
        match self.node.op_type:
            case "Conv":
                weight = weight * _along(scale, 0, weight.ndim)
            case "ConvTranspose":
                each = weight.shape[1]
                parts = np.split(weight, self.groups, axis=0)
                scales = scale.reshape(self.groups, each)
                parts = [p * _along(s, 1, weight.ndim) for p, s in zip(parts, scales, strict=True)]
                weight = np.concatenate(parts)
            case _:
                weight = weight * _along(scale, 0 if self._turned else -1, weight.ndim)
        return weight, bias * self.setting("beta", 1.0) * scale + shift

    def before(self, scale: Float64Array, shift: Float64Array) -> tuple[Float64Array, Float64Array]:
        """Weight and bias of the layer with ``scale * x + shift`` in front of it."""
        weight = self.weight.astype(np.float64)
        bias = np.zeros(self.outputs) if self.bias is None else self.bias.astype(np.float64)
        bias = bias * self.setting("beta", 1.0)
        match self.node.op_type:
            case "Conv":
                each = weight.shape[1]
                blocks = weight.reshape(self.groups, -1, *weight.shape[1:])  # (groups, out, in, …)
                taps = tuple(range(2, weight.ndim))
                moved = [
                    (part.sum(axis=taps) @ one)
                    for part, one in zip(blocks, shift.reshape(self.groups, each), strict=True)
                ]
                bias = bias + np.concatenate(moved)
                scales = scale.reshape(self.groups, 1, each, *(1,) * (weight.ndim - 2))
                return (blocks * scales).reshape(weight.shape), bias
            case "ConvTranspose":
                return weight * _along(scale, 0, weight.ndim), bias
        axis = -1 if self._turned else -2
        moved_by = np.tensordot(weight, shift, axes=(axis, 0)) * self.setting("alpha", 1.0)
        return weight * _along(scale, axis, weight.ndim), bias + moved_by


def _along(values: Float64Array, axis: int, rank: int) -> Float64Array:
    shape = [1] * rank
    shape[axis] = values.size
    return values.reshape(shape)


def joined(affines: Sequence[tuple[Float64Array, Float64Array]]) -> tuple[Float64Array, ...]:
    """Scale and shift of several that follow one another."""
    scale, shift = affines[0]
    for more, moved in affines[1:]:
        scale, shift = scale * more, shift * more + moved
    return scale, shift
