"""Concrete shapes of every tensor, and the small integers computed from them.

Symbolic input dimensions get stand-ins. One forward walk asks ONNX's own shape inference for each
node, handing it the values of shape arithmetic as far as they are known; what it cannot say is
observed in one ONNX Runtime run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper, shape_inference

from onnxprune.dims import size_of
from onnxprune.errors import VerificationError
from onnxprune.feeds import random_feeds
from onnxprune.graph import Graph, Node
from onnxprune.model import Model
from onnxprune.runtime import session
from onnxprune.types import AnyArray, Shape

_LARGEST_VALUE = 1 << 16  # elements of an integer tensor that is followed by value
_LARGEST_FLOAT = 64  # the same for floats: scales of Resize, factors of shape arithmetic
_INTEGERS = {
    TensorProto.INT8,
    TensorProto.INT16,
    TensorProto.INT32,
    TensorProto.INT64,
    TensorProto.UINT8,
    TensorProto.UINT16,
    TensorProto.UINT32,
    TensorProto.UINT64,
    TensorProto.BOOL,
}
_RANDOM = {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli"}
_RANDOM |= {"Multinomial", "Dropout"}
_ASSUMED_SIDE = 32
# Operators that are right about channels whatever the spatial size, besides those that keep the
# shape they are given; and those after which the size is 1.
_ANY_SPACE = {"Conv", "ConvTranspose", "MaxPool", "AveragePool", "Concat"}
_END_SPACE = {"GlobalAveragePool", "GlobalMaxPool"}


@dataclass
class Environment:
    """What is known of every tensor under one choice of input shapes.

    Attributes:
        inputs: Concrete shape of each graph input.
        types: ONNX type of each tensor, with concrete dimensions where known.
        values: Small tensors whose value follows from constants and shapes alone.
        dynamic: Names in ``values`` that depend on some tensor's shape.
        errors: Nodes that cannot take the shapes they are given, with the complaint.
        assumed: Tensors behind an operator nobody knows, of which only rank and channels are sure.
    """

    inputs: Mapping[str, Shape]
    types: dict[str, onnx.TypeProto] = field(default_factory=dict)
    values: dict[str, AnyArray] = field(default_factory=dict)
    dynamic: set[str] = field(default_factory=set)
    errors: list[tuple[Node, str]] = field(default_factory=list)
    assumed: set[str] = field(default_factory=set)
    _shapes: dict[str, Shape | None] = field(default_factory=dict)

    def shape(self, name: str) -> Shape | None:
        """Concrete shape of a tensor, or None where it is not known."""
        if name not in self._shapes:
            self._shapes[name] = _concrete(self.types.get(name))
        return self._shapes[name]

    def set_type(self, name: str, tensor_type: onnx.TypeProto) -> None:
        """Learn the type of a tensor."""
        self.types[name] = tensor_type
        self._shapes.pop(name, None)

    def data_type(self, name: str) -> int:
        """Element type of a tensor, ``TensorProto.UNDEFINED`` where it is not known."""
        found = self.types.get(name)
        return int(found.tensor_type.elem_type) if found is not None else TensorProto.UNDEFINED


def environment(graph: Graph, inputs: Mapping[str, Shape], *, observe: bool = True) -> Environment:
    """Shapes and values of every tensor when the graph is fed ``inputs``.

    Args:
        graph: The prepared graph.
        inputs: Concrete shape of each graph input.
        observe: Let ONNX Runtime run the model where inference stops.
    """
    walk = _Walk(graph, inputs)
    walk.run()
    if observe and walk.unknown and not walk.env.errors:
        observed = _observe(graph, inputs, walk.unknown)
        walk = _Walk(graph, inputs, observed)
        walk.run()
    return walk.env


class Evaluator:
    """Runs single nodes of shape arithmetic on numpy arrays, with ONNX's reference operators."""

    def __init__(self, opsets: Mapping[str, int]) -> None:
        self._opsets = dict(opsets)
        self._prepared: dict[int, object] = {}

    def run(self, node: Node, values: Sequence[AnyArray | None]) -> list[AnyArray] | None:
        """Outputs of the node, or None where the reference cannot compute it."""
        from onnx.reference import ReferenceEvaluator

        axes = node.ints("axes")
        if node.op_type == "Unsqueeze" and axes is not None and values[0] is not None:
            # The reference knows only the newer form, with axes as an input.
            return [np.expand_dims(values[0], axes)]
        evaluator = self._prepared.get(node.index)
        try:
            if evaluator is None:
                evaluator = ReferenceEvaluator(node.proto, opsets=self._opsets)
                self._prepared[node.index] = evaluator
            feeds = {
                name: value
                for name, value in zip(node.inputs, values, strict=True)
                if name and value is not None
            }
            assert isinstance(evaluator, ReferenceEvaluator)
            return [np.asarray(value) for value in evaluator.run(None, feeds)]
        except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError, KeyError):
            return None
        except ZeroDivisionError:
            return None


class _Walk:
    """The forward walk: one node after the other."""

    def __init__(
        self,
        graph: Graph,
        inputs: Mapping[str, Shape],
        observed: Mapping[str, onnx.TypeProto] | None = None,
    ) -> None:
        self.graph = graph
        self.env = Environment(inputs)
        self.observed = observed or {}
        self.unknown: list[str] = []
        self.evaluator = Evaluator(graph.opsets)
        self.opsets = list(graph.model.proto.opset_import)
        self.ir_version = graph.model.proto.ir_version
        self.value_info = {value.name: value for value in graph.model.proto.graph.value_info}
        self.symbols = {
            dim.dim_param: size
            for value in graph.model.proto.graph.input
            if value.name in inputs
            for dim, size in zip(value.type.tensor_type.shape.dim, inputs[value.name], strict=True)
            if dim.dim_param
        }

    def run(self) -> None:
        for value in self.graph.model.proto.graph.input:
            if value.name in self.env.inputs:
                element = value.type.tensor_type.elem_type
                shape = self.env.inputs[value.name]
                self.env.set_type(value.name, helper.make_tensor_type_proto(element, shape))
            elif value.name not in self.graph.constants:
                self.env.set_type(value.name, value.type)
        for name, constant in self.graph.constants.items():
            weight = constant.weight
            tensor_type = helper.make_tensor_type_proto(weight.data_type, weight.shape)
            self.env.set_type(name, tensor_type)
            limit = _LARGEST_VALUE if weight.data_type in _INTEGERS else _LARGEST_FLOAT
            if weight.size <= limit:
                self.env.values[name] = weight.read()
        for node in self.graph.nodes:
            self._infer(node)
            self._evaluate(node)

    def _infer(self, node: Node) -> None:
        self._assume_input(node)
        inferred = self._by_schema(node)
        guessed = any(name in self.env.assumed for name in node.inputs)
        if guessed and not self._about_channels(node, inferred):
            inferred = {}
        for name in node.outputs:
            if not name:
                continue
            found = inferred.get(name)
            if _concrete(found) is None:
                # What the file says would not go with a size that was made up.
                declared = None if guessed else self._declared(name)
                found = self.observed.get(name) or declared or found
            elif guessed and node.op_type not in _END_SPACE:
                self.env.assumed.add(name)
            if found is not None:
                self.env.set_type(name, found)
            if _concrete(found) is None:
                self.unknown.append(name)

    def _about_channels(self, node: Node, inferred: Mapping[str, onnx.TypeProto]) -> bool:
        """Whether what follows from an assumed spatial size is still right about channels."""
        if node.op_type in _ANY_SPACE or node.op_type in _END_SPACE:
            return True
        shapes = {self.env.shape(name) for name in node.inputs if name in self.env.assumed}
        return all(_concrete(inferred.get(name)) in shapes for name in node.outputs if name)

    def _declared(self, name: str) -> onnx.TypeProto | None:
        """What the file itself says of a tensor, if the input shapes settle all of it."""
        value = self.value_info.get(name)
        if value is None or not value.type.tensor_type.HasField("shape"):
            return None
        dims = []
        for dim in value.type.tensor_type.shape.dim:
            size = size_of(dim) or self.symbols.get(dim.dim_param)
            if not size:  # of a tensor that is computed, some exporters write 0 for "any"
                return None
            dims.append(size)
        return helper.make_tensor_type_proto(value.type.tensor_type.elem_type, dims)

    def _assume_input(self, node: Node) -> None:
        """A Conv says what channels its input has, even behind an operator nobody knows."""
        if node.op_type != "Conv" or node.domain or self.env.shape(node.inputs[0]) is not None:
            return
        weight = self.env.shape(node.inputs[1])
        if weight is None or node.inputs[0] not in self.unknown:
            return
        maker = self.graph.producer.get(node.inputs[0])
        if (
            maker is not None
            and maker.since
            and all(map(self.env.shape, filter(None, maker.inputs)))
        ):
            return  # a known operator on known shapes: what is unknown is where it moves elements
        shape = (1, weight[1] * node.int("group", 1), *(_ASSUMED_SIDE for _ in weight[2:]))
        element = self.env.data_type(node.inputs[1])
        self.env.set_type(node.inputs[0], helper.make_tensor_type_proto(element, shape))
        self.env.assumed.add(node.inputs[0])

    def _by_schema(self, node: Node) -> Mapping[str, onnx.TypeProto]:
        if node.since == 0 or node.captures:
            return {}
        types = {name: self.env.types[name] for name in node.inputs if name in self.env.types}
        data = {
            name: numpy_helper.from_array(self.env.values[name], name)
            for name in node.inputs
            if name in self.env.values
        }
        schema = onnx.defs.get_schema(node.op_type, self.graph.opsets[node.domain], node.domain)
        try:
            return dict(
                shape_inference.infer_node_outputs(
                    schema, node.proto, types, data, {}, self.opsets, self.ir_version
                )
            )
        except shape_inference.InferenceError as error:
            known = all(name in types for name in node.inputs if name)
            if known and not any(name in self.env.assumed for name in node.inputs):
                self.env.errors.append((node, _one_line(error)))
        except (onnx.checker.ValidationError, RuntimeError, ValueError, KeyError):
            return {}
        return {}

    def _evaluate(self, node: Node) -> None:
        env = self.env
        names = [name for name in node.inputs if name]
        if node.op_type in ("Shape", "Size") and not node.domain:
            shape = env.shape(node.inputs[0])
            if shape is not None and node.inputs[0] not in env.assumed:
                env.values[node.outputs[0]] = _shape_value(node, shape)
                env.dynamic.add(node.outputs[0])
            return
        if node.domain or node.captures or node.op_type in _RANDOM or not names:
            return
        if not all(name in env.values for name in names):
            return
        dynamic = any(name in env.dynamic for name in names)
        # Some exporters compute padding in floats, from constants alone.
        whole = dynamic or all(env.data_type(name) in _INTEGERS for name in names)
        limit = _LARGEST_VALUE if whole else _LARGEST_FLOAT
        sizes = [env.shape(name) for name in node.outputs if name]
        if any(shape is None or np.prod(shape) > limit for shape in sizes):
            return
        results = self.evaluator.run(node, [env.values.get(name) for name in node.inputs])
        for name, value in zip(node.outputs, results or [], strict=False):
            env.values[name] = value
            if dynamic:
                env.dynamic.add(name)


def _shape_value(node: Node, shape: Shape) -> AnyArray:
    if node.op_type == "Size":
        return np.asarray(int(np.prod(shape)), np.int64)
    end = node.int("end", len(shape))
    return np.asarray(shape[node.int("start", 0) : end], np.int64)


def _concrete(tensor_type: onnx.TypeProto | None) -> Shape | None:
    if tensor_type is None or not tensor_type.tensor_type.HasField("shape"):
        return None
    sizes = [size_of(dim) for dim in tensor_type.tensor_type.shape.dim]
    known = tuple(size for size in sizes if size is not None)
    return known if len(known) == len(sizes) else None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _observe(
    graph: Graph, inputs: Mapping[str, Shape], names: Sequence[str]
) -> Mapping[str, onnx.TypeProto]:
    """Types of tensors as ONNX Runtime makes them, {} where it cannot run the model."""
    model = graph.model
    known = {value.name for value in model.proto.graph.output}
    written = {name for node in model.proto.graph.node for name in node.output}
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    for name in names:
        if name not in known and name in written:
            proto.graph.output.append(onnx.ValueInfoProto(name=name))
    watched = Model(proto, model.directory, model.deferred)
    try:
        feeds = random_feeds(model, [inputs], seed=0, batches=1)
        results = session(watched, optimise=False).run(feeds[0])
    except VerificationError:  # it cannot be run; what is not known then freezes
        return {}
    types = {}
    for name, array in results.items():
        try:
            element = helper.np_dtype_to_tensor_dtype(array.dtype)
        except (KeyError, ValueError):
            continue
        types[name] = helper.make_tensor_type_proto(element, array.shape)
    return types
