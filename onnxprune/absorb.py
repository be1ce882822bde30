"""Make up for dropped constant channels in the constants of the nodes that read them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from onnx import helper

from onnxprune import fields
from onnxprune.bounds import Values
from onnxprune.emit import ConstantEdit, Emitter
from onnxprune.graph import Graph, Node
from onnxprune.patches import drop_attribute
from onnxprune.survivors import Survivors
from onnxprune.types import Absorption, AnyArray, Float64Array


class Absorber:
    """Adds to biases and weights of a graph that is being cut; sums are in float64."""

    def __init__(self, graph: Graph, emitter: Emitter, first: Survivors) -> None:
        self.graph = graph
        self.emitter = emitter
        self.first = first
        self.changed: list[str] = []

    def absorb(self, wanted: Absorption) -> None:
        """Change the constants of one node, adding a bias where it has none."""
        node = self.graph.nodes[wanted.node]
        if wanted.bias is None:
            self._add_columns(wanted)
        elif node.op_type == "MatMul":
            self._add_behind(node, wanted.bias)
        else:
            self._add_bias(node, wanted.bias)

    def _add_columns(self, wanted: Absorption) -> None:
        def gathered(array: Float64Array) -> Float64Array:
            # As (group, in / group, out / group, taps); along axis 0 it lies that way already.
            rows = array.shape[0] // wanted.group
            split = array.reshape(wanted.group, rows, *array.shape[1:])
            view = split if wanted.axis == 0 else split.swapaxes(1, 2)
            columns = view.reshape(view.shape[0] * view.shape[1], -1).copy()
            added = columns[wanted.source] * wanted.factor[:, None]
            np.add.at(columns, wanted.target, added)
            full = columns.reshape(view.shape)
            return (full if wanted.axis == 0 else full.swapaxes(1, 2)).reshape(array.shape)

        pairs = (wanted.source.tolist(), wanted.target.tolist(), wanted.factor.tolist())
        key = repr((wanted.axis, wanted.group, *pairs)).encode()
        self._edit(wanted.weight, gathered, key)

    def _add_bias(self, node: Node, bias: Float64Array) -> None:
        bias = bias * _number(node, "alpha")  # of a Gemm
        if len(node.inputs) > 2 and node.inputs[2]:
            self._add_to(node, 2, bias / _number(node, "beta"))
            return
        made = self.emitter.node(node)
        drop_attribute(made, "beta")  # there was nothing it could scale
        while len(made.input) < 3:
            made.input.append("")
        made.input[2] = self._literal(f"{node.key}_bias", node, bias)

    def _add_behind(self, node: Node, bias: Float64Array) -> None:
        """Into the Add that follows a MatMul, or a new one."""
        following = self._following_add(node, bias)
        if following is not None:
            self._add_to(*following, bias)
            return
        made = self.emitter.node(node)
        inner = self.emitter.fresh(f"{node.key}_product")
        given = self._literal(f"{node.key}_bias", node, bias)
        made.output[0] = inner
        self.emitter.after(node, helper.make_node("Add", [inner, given], [node.outputs[0]]))

    def _following_add(self, node: Node, bias: Float64Array) -> tuple[Node, int] | None:
        """The Add that alone reads a node's output, and which of its inputs is a bias."""
        output = node.outputs[0]
        readers = self.graph.consumers.get(output, [])
        if len(readers) != 1 or output in self.graph.outputs or output in self.graph.captured:
            return None
        reader, position = readers[0]
        if reader.op_type != "Add" or reader.domain:
            return None
        other = reader.inputs[1 - position]
        fits = other in self.graph.derived and self._shape(other) == bias.shape
        return (reader, 1 - position) if fits else None

    def _add_to(self, node: Node, position: int, bias: Float64Array) -> None:
        """Add along the last axis of a constant input, in place where nobody else reads it."""
        name = node.inputs[position]
        constant = self.graph.constants.get(name)
        alone = len(self.graph.consumers.get(name, ())) == 1
        fits = self._shape(name) in (bias.shape, (1, *bias.shape))
        if constant is not None and constant.pinned is None and alone and fits:
            self._edit(name, lambda array: array + bias, bias.tobytes())
            return
        before = Values(self.graph).read(name)
        assert before is not None
        replaced = self._literal(f"{name}_absorbed", node, before.astype(np.float64) + bias)
        self.emitter.node(node).input[position] = replaced

    def _edit(self, name: str, change: Callable[[Float64Array], Float64Array], key: bytes) -> None:
        weight = self.graph.constants[name].weight
        cut = self.emitter.constants.get(name)

        def compute(array: AnyArray) -> AnyArray:
            full = change(array.astype(np.float64)).astype(array.dtype)
            return full if cut is None else cut.compute(full)

        shape, before = (weight.shape, b"") if cut is None else (cut.shape, cut.key)
        self.emitter.constants[name] = ConstantEdit(shape, compute, before + b"absorbed" + key)
        self.changed.append(name)

    def _literal(self, hint: str, node: Node, values: Float64Array) -> str:
        """A new constant along the last axis, or the channels, of a node's output, cut as that."""
        output = node.outputs[0]
        rank = len(self._shape(output))
        axis = rank - 1 if node.op_type in ("Gemm", "MatMul") else 1
        alive = self.first.alive(output, axis)
        left = (
            values if alive is None else fields.take(values, values.ndim - 1, np.flatnonzero(alive))
        )
        dtype = helper.tensor_dtype_to_np_dtype(self.first.trace.env.data_type(output))
        name = self.emitter.literal(hint, left.astype(dtype))
        self.changed.append(name)
        return name

    def _shape(self, name: str) -> tuple[int, ...]:
        return self.first.trace.env.shape(name) or ()


def _number(node: Node, name: str) -> float:
    attribute = node.attributes.get(name)
    return 1.0 if attribute is None else float(attribute.f)
