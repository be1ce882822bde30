"""Writes random graphs node by node, in whatever form the chosen opset wants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from tests.property.choices import Choices, Chooser
from tests.property.tensors import Array, At, Open, Shape, T, at


class Builder(Chooser):
    """A growing model.

    Attributes:
        opset, ir_version: What the model declares.
        real: Its float type.
        dynamic: Which sizes are open: nothing, ``batch``, or ``space`` too.
    """

    def __init__(self, choices: Choices, *, since: int = 7, until: int = 23) -> None:
        super().__init__(choices)
        self.opset = self.pick([v for v in (13, 17, 21, 11, 18, 9, 7, 12, 10, 8, 14, 15, 16, 19, 20,
                                            22, 23) if since <= v <= until])  # fmt: skip
        self.ir_version = self.pick((3, 4, 7) if self.opset <= 9 else (8, 7, 10, 4))
        self.real: type[np.generic] = np.float32
        if self.one_in(20):
            self.real = self.pick((np.float16, np.float64))
        self.dynamic = self.pick(("", "", "batch", "batch", "space"))
        self.rng = np.random.default_rng(self.integer(0, 9999))
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, Array] = {}
        self.inputs: list[T] = []
        self.outputs: list[T] = []
        self.custom = False
        self.named = not self.one_in(6)
        self._count = 0

    # -- names, nodes, constants ---------------------------------------------------------------

    def fresh(self, stem: str) -> str:
        self._count += 1
        return f"{stem}_{self._count}"

    def input(self, shape: Shape, c: int = 1, dtype: type[np.generic] | None = None) -> T:
        found = T(f"x{len(self.inputs)}", shape, c, dtype or self.real)
        self.inputs.append(found)
        return found

    def op(
        self,
        op_type: str,
        *inputs: T | str | None,
        shape: Sequence[int] | None = None,
        c: int | None = None,
        dtype: type[np.generic] | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> T:
        """Append a node of one output; shape, channel axis and type as the first input's."""
        first = next((x for x in inputs if isinstance(x, T)), None)
        shape = first.shape if shape is None and first else tuple(shape or ())
        c = (first.c if first else 0) if c is None else c
        dtype = dtype or (first.dtype if first else self.real)
        return self.node(op_type, inputs, [T("", shape, c, dtype)], domain, **attributes)[0]

    def node(
        self,
        op_type: str,
        inputs: Sequence[T | str | None],
        outputs: Sequence[T | None],
        domain: str = "",
        **attributes: Any,
    ) -> list[T]:
        """Append a node; ``outputs`` give shapes, None an output that is left out."""
        made = [replace(t, name=self.fresh(op_type.lower())) if t else None for t in outputs]
        self.nodes.append(
            helper.make_node(
                op_type,
                [x.name if isinstance(x, T) else x or "" for x in inputs],
                [t.name if t else "" for t in made],
                name=self.fresh(op_type) if self.named else None,
                domain=domain,
                **attributes,
            )
        )
        return [t for t in made if t]

    def initializer(self, array: Array | Sequence[int] | int, stem: str = "w") -> str:
        name = self.fresh(stem)
        self.initializers[name] = np.asarray(array)
        return name

    def ints(self, *values: int) -> str:
        """An int64 vector, as an initializer or in a Constant node."""
        array = np.asarray(values, np.int64)
        return self.constant(array) if self.one_in(3) else self.initializer(array, "ints")

    def constant(self, array: Array) -> str:
        """A Constant node; before opset 9 it holds floats only."""
        if self.opset < 9 and array.dtype.kind != "f":
            return self.initializer(array)
        name = self.fresh("const")
        tensor = numpy_helper.from_array(np.asarray(array), name)
        self.nodes.append(helper.make_node("Constant", [], [name], value=tensor))
        return name

    def scalar(self, value: float, dtype: type[np.generic] | None = None) -> str:
        return self.initializer(np.asarray(value, dtype or self.real), "s")

    def normal(self, *shape: int, scale: float = 1.0) -> Array:
        return (self.rng.standard_normal(shape) * scale).astype(self.real)

    def factors(self, *shape: int) -> Array:
        """Numbers from .5 to 1.5, some of them negative."""
        sign = np.where(self.rng.random(shape) < 0.3, -1, 1)
        return (self.rng.uniform(0.5, 1.5, shape) * sign).astype(self.real)

    def cast(self, x: T, dtype: type[np.generic]) -> T:
        return self.op("Cast", x, dtype=dtype, to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    # -- version differences ---------------------------------------------------------------------

    def with_ints(
        self, op_type: str, x: T, name: str, values: Sequence[int], since: int, **rest: Any
    ) -> T:
        """A node whose list of integers is an attribute before ``since`` and an input from then."""
        if self.opset < since:
            rest[name] = list(values)
            return self.op(op_type, x, **rest)
        return self.op(op_type, x, self.ints(*values), **rest)

    def squeeze(self, x: T, axes: Sequence[int], c: int | None = None) -> T:
        shape = [s for a, s in enumerate(x.shape) if a not in axes]
        before = sum(a < x.c for a in axes)
        c = x.c - before if c is None else c
        return self.with_ints("Squeeze", x, "axes", axes, 13, shape=shape, c=c)

    def unsqueeze(self, x: T, axis: int) -> T:
        shape = [*x.shape[:axis], 1, *x.shape[axis:]]
        c = x.c + (axis <= x.c)
        return self.with_ints("Unsqueeze", x, "axes", [axis], 13, shape=shape, c=c)

    def transpose(self, x: T, perm: Sequence[int]) -> T:
        shape = [x.shape[a] for a in perm]
        return self.op("Transpose", x, shape=shape, c=list(perm).index(x.c), perm=list(perm))

    def slice(self, x: T, axis: int, start: int, end: int, step: int = 1) -> T:
        """``end`` counts as in numpy; a step needs opset 10."""
        size = len(range(*slice(start, end, step).indices(x.shape[axis])))
        shape = [size if a == axis else s for a, s in enumerate(x.shape)]
        if isinstance(x.shape[axis], Open):
            shape[axis] = Open(size)
        if self.opset < 10:
            return self.op("Slice", x, shape=shape, starts=[start], ends=[end], axes=[axis])
        spelled = axis - x.rank if self.one_in(3) else axis
        parts = [self.ints(start), self.ints(end), self.ints(spelled)]
        if step != 1 or self.one_in(3):
            parts.append(self.ints(step))
        return self.op("Slice", x, *parts, shape=shape)

    def split(self, x: T, axis: int, sizes: Sequence[int], equal: bool = False) -> list[T]:
        parts = [
            replace(x, shape=tuple(n if a == axis else s for a, s in enumerate(x.shape)))
            for n in sizes
        ]
        attributes: dict[str, Any] = {}
        if self.opset < 13:
            attributes = {} if equal else {"split": list(sizes)}
            return self.node("Split", [x], parts, axis=axis, **attributes)
        if not equal:
            return self.node("Split", [x, self.ints(*sizes)], parts, axis=axis)
        attributes = {"num_outputs": len(sizes)} if self.opset >= 18 else {}
        return self.node("Split", [x], parts, axis=axis, **attributes)

    def gather(self, x: T, axis: int, indices: Array | int) -> T:
        indices = np.asarray(indices, np.int64)
        shape = [*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]]
        c = x.c + (indices.ndim - 1 if axis < x.c else 0)
        if indices.ndim == 0 and axis == x.c:
            c = 0
        name = self.constant(indices) if self.one_in(3) else self.initializer(indices, "at")
        return self.op("Gather", x, name, shape=shape, c=c, axis=axis)

    def concat(self, values: Sequence[T | str], axis: int, total: int) -> T:
        first = next(v for v in values if isinstance(v, T))
        shape = [total if a == axis else s for a, s in enumerate(first.shape)]
        spelled = axis - first.rank if self.one_in(3) else axis
        return self.op("Concat", *values, shape=shape, c=first.c, dtype=first.dtype, axis=spelled)

    # -- reshapes ----------------------------------------------------------------------------------

    def reshape(self, x: T, dims: Sequence[int | At], c: int) -> T:
        """Reshape with a literal target, one of 0 and -1, or one computed from the shape."""
        sizes = [d.of(x.shape) if isinstance(d, At) else d for d in dims]
        style = self.pick(("literal", "marks", "computed"))
        parts: list[int | At] = []
        for position, (dim, size) in enumerate(zip(dims, sizes, strict=True)):
            parts.append(self._dimension(dim, size, position, style, -1 in parts))
        if style == "marks" and -1 not in parts and not any(isinstance(p, At) for p in parts):
            parts[self.integer(0, len(parts) - 1)] = -1
        return self.op("Reshape", x, self._target(x, parts), shape=sizes, c=c)

    def _dimension(
        self, dim: int | At, size: int, position: int, style: str, taken: bool
    ) -> int | At:
        opened = isinstance(size, Open)
        if not isinstance(dim, At) or (not opened and style == "literal"):
            return int(size)
        if style == "marks" and dim == at(position):
            return 0
        if opened and style != "computed" and not taken:
            return -1
        return dim if opened or style == "computed" else int(size)

    def _target(self, x: T, parts: Sequence[int | At]) -> str:
        if not any(isinstance(part, At) for part in parts):
            return self.ints(*[p for p in parts if not isinstance(p, At)])
        shape = self.op("Shape", x, shape=[x.rank], c=0, dtype=np.int64)
        pieces = [
            self._computed(shape, part) if isinstance(part, At) else self.ints(part)
            for part in parts
        ]
        return self.op("Concat", *pieces, shape=[len(parts)], dtype=np.int64, axis=0).name

    def _computed(self, shape: T, part: At) -> T:
        """One dimension as shape arithmetic, ending as a vector of one."""
        value = self._size(shape, part.axes[0])
        for axis in part.axes[1:]:
            value = self.op("Mul", value, self._size(shape, axis))
        for op_type, number in (("Mul", part.times), ("Div", part.over)):
            if number != 1:
                value = self.op(op_type, value, self.scalar(number, np.int64))
        return self.unsqueeze(value, 0)

    def _size(self, shape: T, axis: int) -> T:
        return self.op("Gather", shape, self.scalar(axis, np.int64), shape=(), axis=0)

    # -- the end -----------------------------------------------------------------------------------

    def output(self, x: T) -> None:
        if all(x.name != other.name for other in self.outputs):
            self.outputs.append(x)

    def model(self) -> onnx.ModelProto:
        """The finished model."""
        inputs = [_info(t) for t in self.inputs]
        tensors = [numpy_helper.from_array(a, n) for n, a in self.initializers.items()]
        overridable = tensors if self.ir_version < 4 else []
        if self.ir_version >= 4 and self.one_in(25):
            overridable = tensors[:1]
        inputs += [helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in overridable]
        graph = helper.make_graph(
            self.nodes, "random", inputs, [_info(t, name=False) for t in self.outputs], tensors
        )
        opsets = [helper.make_opsetid("", self.opset)]
        if self.custom:
            opsets.append(helper.make_opsetid("custom.ops", 1))
        model = helper.make_model(graph, opset_imports=opsets, ir_version=self.ir_version)
        return onnx.shape_inference.infer_shapes(model) if self.one_in(2) else model


def _info(t: T, name: bool = True) -> onnx.ValueInfoProto:
    """Name and type; an open batch is called N, other open sizes of inputs after their axis."""
    dims: list[int | str | None] = [
        (("N" if axis == 0 else f"D{axis}") if name else None) if isinstance(size, Open) else size
        for axis, size in enumerate(t.shape)
    ]
    return helper.make_tensor_value_info(
        t.name, helper.np_dtype_to_tensor_dtype(np.dtype(t.dtype)), dims
    )
