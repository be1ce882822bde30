"""A small interpreter: executes an ONNX graph node by node on torch tensors.

What it computes can be differentiated with respect to the initializers it was asked to train; they
keep their names. Whole numbers and shapes are computed exactly and on the host, so that dynamic
shapes work; what depends on constants alone is computed once; a tensor is let go after its last
use. All real numbers are float32, or float64 where the caller wants sharp finite differences.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import onnx
from onnx import helper, inliner, numpy_helper

from onnxprune.errors import UnsupportedModelError, UsageError
from onnxprune.graph import captured_names
from onnxprune.train import torch_ops as _  # noqa: F401  (fills the table)
from onnxprune.train.torch_ops.lazy import Tensor, torch
from onnxprune.train.torch_ops.registry import Body, Entry, Op, Setting, lookup, to_tensor
from onnxprune.types import AnyArray

# What torch raises where shapes, types or memory do not fit.
_TORCH_ERRORS = (RuntimeError, ValueError, TypeError, IndexError, KeyError, NotImplementedError)


@dataclass(slots=True)
class _Step:
    """One node, ready to run."""

    op: Op
    entry: Entry
    outputs: tuple[str, ...]
    reads: tuple[str, ...]  # inputs, and what its bodies capture
    captures: tuple[str, ...]


@dataclass(slots=True)
class _Block:
    """One graph, ready to run: the model's own or a body.

    Attributes:
        inputs: Names that are fed.
        outputs: Names that are given back.
        steps: In order.
        leaves: Initializers and Constant nodes by name.
        plans: For each set of wanted tensors, the steps it takes, each with what ends there.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    steps: list[_Step]
    leaves: dict[str, Any]
    plans: dict[tuple[str, ...], list[tuple[_Step, tuple[str, ...]]]] = field(default_factory=dict)

    def plan(self, wanted: tuple[str, ...]) -> list[tuple[_Step, tuple[str, ...]]]:
        """The steps that ``wanted`` needs, and after each the names that nobody reads again."""
        if wanted not in self.plans:
            needed, rows = set(wanted), []
            kept = needed | set(self.leaves)
            for step in reversed(self.steps):
                if not needed.intersection(step.outputs):
                    continue
                ends = set(step.reads) | set(step.outputs)
                rows.append((step, tuple(ends - needed - kept - {""})))
                needed.update(step.reads)
            self.plans[wanted] = rows[::-1]
        return self.plans[wanted]


class TorchGraph:
    """An ONNX model as a differentiable function.

    Attributes:
        parameters: What is trained, by name of the initializer or of the Constant node's output.
        inputs: Names of the inputs that have to be fed.
        outputs: Names of the outputs.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        *,
        trained: Collection[str] = (),
        statistics: Collection[str] = (),
        device: str = "cpu",
        double: bool = False,
        seed: int = 0,
    ) -> None:
        """Compile ``model``, whose weights are held in the message.

        Args:
            model: What to run; not changed, and not needed afterwards.
            trained: Names of the tensors that get a gradient.
            statistics: Running statistics that BatchNormalization updates when training.
            device: Where to compute, as torch spells it.
            double: Compute in float64.
            seed: For what the model draws at random while it trains.

        Raises:
            UnsupportedModelError: An operator is not known, or a constant is text.
            UsageError: A tensor to train is not there, or does not hold real numbers.
        """
        real = torch.float64 if double else torch.float32
        self._setting = Setting(real, torch.device(device))
        self._generator = torch.Generator().manual_seed(seed)
        self._statistics = frozenset(statistics)
        self._channels_last = False
        model = inlined(model)
        self._opsets = {_domain(entry.domain): entry.version for entry in model.opset_import}
        self._block = self._compile(model.graph)
        self.outputs = self._block.outputs
        self.inputs = tuple(n for n in self._block.inputs if n not in self._block.leaves)
        self.parameters: dict[str, Tensor] = {}
        for name in trained:
            leaf = self._leaf(name)
            if not leaf.is_floating_point():
                raise UsageError(f"'{name}' cannot be trained: it does not hold real numbers")
            self.parameters[name] = leaf.requires_grad_()
        self._fold()

    def _leaf(self, name: str) -> Tensor:
        if name not in self._block.leaves:
            raise UsageError(f"the model has no initializer '{name}'")
        return self._block.leaves[name]

    def constant(self, name: str) -> Tensor:
        """The tensor of an initializer as it stands, trained or not; shared, not copied."""
        return self._leaf(name)

    def run(
        self,
        feeds: Mapping[str, AnyArray],
        wanted: Sequence[str] = (),
        *,
        training: bool = False,
    ) -> dict[str, Any]:
        """Compute tensors of the model.

        Args:
            feeds: An array for each of ``inputs``.
            wanted: Names of outputs or of any other tensors; all outputs by default.
            training: Let BatchNormalization use and update statistics, and Dropout draw, where the
                model was told to.

        Raises:
            UnsupportedModelError: A node cannot be computed; the message names it.
            UsageError: There is no tensor of a wanted name, or an input is missing.
        """
        self._setting.statistics = self._statistics if training else frozenset()
        self._setting.generator = self._generator if training else None
        missing = [name for name in self.inputs if name not in feeds]
        if missing:
            raise UsageError(f"no values for input '{missing[0]}'")
        values = {name: self._fed(name, array) for name, array in feeds.items()}
        names = tuple(wanted) or self.outputs
        found = self._execute(self._block, values, names, {})
        return dict(zip(names, found, strict=True))

    def use_channels_last(self) -> None:
        """Keep the channels of images and of their filters innermost from now on."""
        self._channels_last = True
        with torch.no_grad():
            for weight in self.parameters.values():
                if weight.ndim == 4:
                    weight.data = weight.data.contiguous(memory_format=torch.channels_last)

    @property
    def device(self) -> Any:
        """Where it computes."""
        return self._setting.device

    def _fed(self, name: str, array: AnyArray) -> Tensor:
        if name not in self._block.inputs:
            raise UsageError(f"the model has no input '{name}'")
        tensor = to_tensor(np.asarray(array), self._setting).to(self._setting.device)
        if self._channels_last and tensor.ndim == 4:
            return tensor.contiguous(memory_format=torch.channels_last)
        return tensor

    # compile

    def _compile(self, graph: onnx.GraphProto, *, top: bool = True) -> _Block:
        leaves = {t.name: self._constant(numpy_helper.to_array(t)) for t in graph.initializer}
        for sparse in graph.sparse_initializer:
            leaves[sparse.values.name] = self._constant(_dense(sparse))
        steps = []
        for node in graph.node:
            if node.op_type == "Constant" and _domain(node.domain) == "":
                leaves[node.output[0]] = self._constant(_constant(node))
            else:
                steps.append(self._step(node))
        inputs = tuple(value.name for value in graph.input if not top or value.name not in leaves)
        return _Block(inputs, tuple(value.name for value in graph.output), steps, leaves)

    def _constant(self, array: AnyArray) -> Tensor:
        return to_tensor(array, self._setting)

    def _step(self, node: onnx.NodeProto) -> _Step:
        domain, label = _domain(node.domain), _label(node)
        entry = lookup(node.op_type, domain)
        if entry is None:
            raise UnsupportedModelError(
                f"trainer 'torch' does not know {_spelled(node)}, the operator of '{label}'",
                hint="try --trainer ort",
                node=label,
            )
        bodies: dict[str, Body] = {}
        attributes = {}
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                block = self._compile(attribute.g, top=False)
                bodies[attribute.name] = partial(self._body, block)
            else:
                attributes[attribute.name] = _decoded(attribute)
        op = Op(
            node.op_type,
            label,
            self._opsets.get(domain, 1),
            tuple(node.input),
            attributes,
            len(node.output),
            self._setting,
            bodies,
        )
        captures = tuple(captured_names(node))
        reads = (*(name for name in node.input if name), *captures)
        return _Step(op, entry, tuple(node.output), reads, captures)

    def _fold(self) -> None:
        """Compute once what depends on nothing but constants that stay as they are."""
        block = self._block
        known = set(block.leaves) - set(self.parameters) - self._statistics
        rest = []
        with torch.no_grad():
            for step in block.steps:
                if step.op.bodies or not set(step.reads) <= known:
                    rest.append(step)
                    continue
                block.leaves.update(self._apply(step, block.leaves))
                known.update(step.outputs)
        block.steps = rest

    # run

    def _execute(
        self,
        block: _Block,
        values: dict[str, Any],
        wanted: tuple[str, ...],
        scope: Mapping[str, Any],
    ) -> list[Any]:
        values = {**scope, **block.leaves, **values}
        for step, ends in block.plan(wanted):
            values.update(self._apply(step, values))
            for name in ends:
                values.pop(name, None)
        lost = [name for name in wanted if name not in values]
        if lost:
            raise UsageError(f"the model has no tensor '{lost[0]}'")
        return [values[name] for name in wanted]

    def _body(self, block: _Block, inputs: Sequence[Any], scope: Mapping[str, Any]) -> list[Any]:
        values = dict(zip(block.inputs, inputs, strict=True))
        return self._execute(block, values, block.outputs, scope)

    def _apply(self, step: _Step, values: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
        op, entry = step.op, step.entry
        inputs: list[Any] = [values[name] if name else None for name in op.inputs]
        if op.bodies:
            op.scope = {name: values[name] for name in step.captures}
        if entry.host:
            for place in entry.host:
                if place < len(inputs) and inputs[place] is not None:
                    inputs[place] = inputs[place].flatten().tolist()
        if self._setting.device.type != "cpu":
            inputs = self._together(inputs)
        try:
            made = entry.function(op, *inputs)
        except _TORCH_ERRORS as error:
            raise op.fail(" ".join(str(error).split())[:300]) from error
        made = made if isinstance(made, tuple) else (made,)
        return zip(step.outputs, made, strict=False)

    def _together(self, inputs: list[Any]) -> list[Any]:
        """Operands on the device, where one of them is."""
        device = self._setting.device
        tensors = [x for x in inputs if isinstance(x, torch.Tensor)]
        if any(x.device == device for x in tensors) and any(x.device != device for x in tensors):
            return [x.to(device) if isinstance(x, torch.Tensor) else x for x in inputs]
        return inputs


def unknown(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Nodes, those of bodies too, whose operator the interpreter does not know."""
    for node in _walk(inlined(model).graph):
        if node.op_type == "Constant" and _domain(node.domain) == "":
            continue
        if lookup(node.op_type, _domain(node.domain)) is None:
            yield node


def inlined(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model without local functions."""
    return inliner.inline_local_functions(model) if model.functions else model


def _walk(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _walk(attribute.g)


def _domain(name: str) -> str:
    return "" if name == "ai.onnx" else name


def _label(node: onnx.NodeProto) -> str:
    return node.name or next((name for name in node.output if name), node.op_type)


def _spelled(node: onnx.NodeProto) -> str:
    return f"{node.domain}:{node.op_type}" if _domain(node.domain) else node.op_type


def _decoded(attribute: onnx.AttributeProto) -> Any:
    value = helper.get_attribute_value(attribute)
    if isinstance(value, onnx.TensorProto):
        return numpy_helper.to_array(value)
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, list) and value and isinstance(value[0], bytes):
        return [part.decode("utf-8", "replace") for part in value]
    return value


def _dense(sparse: onnx.SparseTensorProto) -> AnyArray:
    values, places = numpy_helper.to_array(sparse.values), numpy_helper.to_array(sparse.indices)
    dense = np.zeros(tuple(sparse.dims), values.dtype)
    dense[tuple(places.T) if places.ndim == 2 else np.unravel_index(places, dense.shape)] = values
    return dense


def _constant(node: onnx.NodeProto) -> AnyArray:
    """Value of a Constant node, however it is spelled."""
    attribute = node.attribute[0]
    value = helper.get_attribute_value(attribute)
    match attribute.name:
        case "value":
            return numpy_helper.to_array(value)
        case "sparse_value":
            return _dense(value)
        case "value_float" | "value_floats":
            return np.asarray(value, np.float32)
        case "value_int" | "value_ints":
            return np.asarray(value, np.int64)
        case _:
            return np.asarray(value, object)
