"""Nodes that only show a constant in another form: what they make of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod

import numpy as np
import onnx
from onnx import TensorProto

from onnxprune.chains import Computed, Scaled, Seen, Transposed, widened
from onnxprune.types import AnyArray, Shape

FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE}
MICROSOFT = "com.microsoft"

Env = dict[str, Seen | Computed]  # constants, and what is made of constants alone, by name
Attributes = Mapping[str, onnx.AttributeProto]


def presented(node: onnx.NodeProto, attributes: Attributes, env: Env) -> Seen | None:
    """What a node makes of a constant, if it does no more than show it in another form."""
    if not node.input or not node.output:
        return None
    value = env.get(node.input[0])
    domain = domain_of(node.domain)
    if node.op_type in ("Mul", "Div") and not domain:
        return _scaled(node, env)
    if not isinstance(value, Seen) or domain not in ("", MICROSOFT):
        return None
    if value.quantized and node.op_type != "DequantizeLinear":
        return None
    match node.op_type:
        case "Identity":
            return value
        case "Cast" if attributes["to"].i in FLOATS:
            return value
        case "CastLike":
            return value
        case "Transpose":
            given = attributes.get("perm")
            rank = len(value.shape)
            perm = tuple(given.ints) if given is not None else tuple(range(rank))[::-1]
            return value.then(Transposed(perm), tuple(value.shape[axis] for axis in perm))
        case "QuantizeLinear" if value.stored.weight.data_type in FLOATS:
            return Seen(value.stored, value.shape, value.steps, True)
        case "DequantizeLinear" if value.quantized:
            return Seen(value.stored, value.shape, value.steps)
        case "DequantizeLinear":
            return _dequantized(node, attributes, value, env)
    shape = _new_shape(node, attributes, value.shape, env)
    return None if shape is None else value.reshaped(shape)


def _new_shape(
    node: onnx.NodeProto, attributes: Attributes, shape: Shape, env: Env
) -> Shape | None:
    """Shape that Reshape, Flatten, Squeeze or Unsqueeze gives a constant; None for what is not."""
    match node.op_type:
        case "Reshape":
            wanted = _integers(node, attributes, env, "shape")
            if wanted is None:
                return None
            keep = not (attributes.get("allowzero") and attributes["allowzero"].i)
            sizes = [shape[at] if not n and keep else n for at, n in enumerate(wanted)]
            if -1 in sizes:
                rest = prod(n for n in sizes if n != -1)
                sizes[sizes.index(-1)] = prod(shape) // rest if rest else 0
            return tuple(sizes)
        case "Flatten":
            axis = int(attributes["axis"].i) if "axis" in attributes else 1
            axis = axis + len(shape) if axis < 0 else axis
            return (prod(shape[:axis]), prod(shape[axis:]))
        case "Squeeze":
            axes = _integers(node, attributes, env, "axes")
            if axes is None and len(node.input) > 1 and node.input[1]:
                return None
            gone = {axis % len(shape) for axis in axes or ()}
            return tuple(
                size for axis, size in enumerate(shape) if (axis not in gone if axes else size != 1)
            )
        case "Unsqueeze":
            axes = _integers(node, attributes, env, "axes")
            if axes is None:
                return None
            rank = len(shape) + len(axes)
            new, old = {axis % rank for axis in axes}, iter(shape)
            return tuple(1 if axis in new else next(old) for axis in range(rank))
    return None


def _scaled(node: onnx.NodeProto, env: Env) -> Seen | None:
    """A weight times a constant that is smaller, or divided by one: zeros stay zero."""
    first, second = (env.get(name) for name in node.input)
    if not (isinstance(first, Seen) and isinstance(second, Seen)):
        return None
    weight, factor = first, second
    if node.op_type == "Mul" and prod(first.shape) < prod(second.shape):
        weight, factor = second, first
    if prod(factor.shape) >= prod(weight.shape) or weight.quantized or factor.quantized:
        return None
    if np.broadcast_shapes(weight.shape, factor.shape) != weight.shape:
        return None
    divides = node.op_type == "Div"

    def scale() -> AnyArray:
        value = widened(factor.value())
        return np.divide(1, value) if divides else value

    return weight.then(Scaled(scale))


def _dequantized(
    node: onnx.NodeProto, attributes: Attributes, value: Seen, env: Env
) -> Seen | None:
    scale = env.get(node.input[1])
    zero = env.get(node.input[2]) if len(node.input) > 2 and node.input[2] else None
    if not isinstance(scale, Seen) or not (zero is None or isinstance(zero, Seen)):
        return None
    axis = int(attributes["axis"].i) if "axis" in attributes else 1
    block = int(attributes["block_size"].i) if "block_size" in attributes else 0
    shape = value.shape

    def fitted(given: Seen) -> Callable[[], AnyArray]:
        return lambda: _along(given.value(), shape, axis, block)

    offset = None if zero is None else fitted(zero)
    return value.then(Scaled(fitted(scale), offset))


def _along(given: AnyArray, shape: Shape, axis: int, block: int) -> AnyArray:
    """A scale or zero point in a form that broadcasts to ``shape``."""
    if given.size == 1:
        return given.reshape((1,) * len(shape))
    axis %= len(shape)
    if block:
        spread = np.repeat(given, block, axis=axis)
        return spread[(slice(None),) * axis + (slice(shape[axis]),)]
    return given.reshape(tuple(-1 if at == axis else 1 for at in range(len(shape))))


# -- parts of nodes --------------------------------------------------------------------------------


def attributes_of(node: onnx.NodeProto, bound: Attributes) -> Attributes:
    """Attributes by name, those that a function takes from its call filled in."""
    found = {}
    for attribute in node.attribute:
        if not attribute.ref_attr_name:
            found[attribute.name] = attribute
        elif attribute.ref_attr_name in bound:
            found[attribute.name] = bound[attribute.ref_attr_name]
    return found


def numbers_of(attributes: Attributes) -> AnyArray | None:
    """Value of a Constant node that holds plain numbers."""
    for name, attribute in attributes.items():
        match name:
            case "value_int":
                return np.array(attribute.i, np.int64)
            case "value_ints":
                return np.array(attribute.ints, np.int64)
            case "value_float":
                return np.array(attribute.f, np.float32)
            case "value_floats":
                return np.array(attribute.floats, np.float32)
    return None


def _integers(
    node: onnx.NodeProto, attributes: Attributes, env: Env, name: str
) -> list[int] | None:
    """A list that is an attribute or the second input; None where it is neither, or no constant."""
    if name in attributes:
        return list(attributes[name].ints)
    value = env.get(node.input[1]) if len(node.input) > 1 else None
    if not isinstance(value, Seen) or value.quantized:
        return None
    return [int(one) for one in value.value().reshape(-1)]


def domain_of(name: str) -> str:
    """A domain by the one name that is used for it here."""
    return "" if name == "ai.onnx" else name


def label_of(node: onnx.NodeProto) -> str:
    """What to call a node."""
    name = node.name or next((name for name in node.output if name), "")
    return f"{node.op_type} '{name}'"


def reader_of(node: onnx.NodeProto) -> str:
    """What to say of a node that reads a weight as something else."""
    return f"{label_of(node)} reads it too"
