"""Fused layers taken apart, so that what they sum can be seen in front of the activation.

ONNX Runtime saves models with the activation inside a FusedConv or FusedGemm. For refitting both
models are run with plain layers in their place; what is written stays fused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnxprune.graph import Graph
from onnxprune.model import Weight
from onnxprune.prepare import prepare
from onnxprune.trace import Trace

_ACTIVATIONS: Mapping[str, tuple[str, ...]] = {  # and what their parameters are called
    "Relu": (),
    "Sigmoid": (),
    "Tanh": (),
    "LeakyRelu": ("alpha",),
    "HardSigmoid": ("alpha", "beta"),
    "Clip": ("min", "max"),
}

_Attributes = Mapping[str, onnx.AttributeProto]


@dataclass(frozen=True)
class Unfused:
    """A graph without fused layers.

    Attributes:
        graph: The prepared graph.
        inner: Output of each fused node by the tensors that now lie inside of it.
    """

    graph: Graph
    inner: Mapping[str, str]

    def known(self, trace: Trace) -> Trace:
        """What the analysis knows of the fused graph, for the tensors inside as well."""
        if not self.inner:
            return trace
        env = trace.env
        labelled = {
            new: trace.fields[old] for new, old in self.inner.items() if old in trace.fields
        }
        types = {new: env.types[old] for new, old in self.inner.items() if old in env.types}
        grown = replace(env, types={**env.types, **types}, _shapes={})
        return replace(trace, env=grown, fields={**trace.fields, **labelled})


def unfused(graph: Graph) -> Unfused:
    """The graph with plain layers and activations in place of fused ones; itself without any."""
    model = graph.source
    weights = model.weights()
    parts = [_apart(node, weights) for node in model.proto.graph.node]
    if not any(parts):
        return Unfused(graph, {})
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    del proto.graph.node[:]
    inner: dict[str, str] = {}
    for node, part in zip(model.proto.graph.node, parts, strict=True):
        proto.graph.node.extend(part or [node])
        between = [new for new in part[:-1] if new.op_type not in ("Constant", "Transpose")]
        inner |= {new.output[0]: node.output[0] for new in between}
    return Unfused(prepare(replace(model, proto=proto)), inner)


def _apart(node: onnx.NodeProto, weights: Mapping[str, Weight]) -> list[onnx.NodeProto]:
    """The nodes that a fused one stands for, [] for any other node."""
    if node.domain != "com.microsoft":
        return []
    given = {attribute.name: attribute for attribute in node.attribute}
    parts: list[onnx.NodeProto] = []
    if node.op_type == "FusedConv":
        parts = list(_conv(node, given))
    elif node.op_type == "FusedGemm":
        parts = list(_gemm(node, given))
    elif node.op_type == "FusedMatMul":
        parts = list(_matmul(node, given, weights))
    for part in parts:
        if part.op_type in ("Conv", "Gemm", "MatMul"):
            part.name = node.name or node.output[0]
    return parts


def _conv(node: onnx.NodeProto, given: _Attributes) -> Iterator[onnx.NodeProto]:
    made = node.output[0]
    after = _activation(given, ("activation_params",), f"{made}:sum", made)
    if after is None:
        return
    added = node.input[3] if len(node.input) > 3 else ""
    summed = f"{made}:sum" if after else made
    product = f"{made}:product" if added else summed
    yield _plain("Conv", node.input[:3], product, given)
    if added:
        yield helper.make_node("Add", [product, added], [summed])
    yield from after


def _gemm(node: onnx.NodeProto, given: _Attributes) -> Iterator[onnx.NodeProto]:
    made = node.output[0]
    names = ("activation_alpha", "activation_beta")
    after = _activation(given, names, f"{made}:sum", made)
    if after is not None:
        yield _plain("Gemm", node.input, f"{made}:sum" if after else made, given)
        yield from after


def _matmul(
    node: onnx.NodeProto, given: _Attributes, weights: Mapping[str, Weight]
) -> Iterator[onnx.NodeProto]:
    made, (data, weight) = node.output[0], node.input
    odd = any(given[name].i for name in ("transA", "transBatchA", "transBatchB") if name in given)
    if odd or weight not in weights:
        return
    if "transB" in given and given["transB"].i:
        rank = len(weights[weight].shape)
        order = [*range(rank - 2), rank - 1, rank - 2]
        yield helper.make_node("Transpose", [weight], [f"{made}:turned"], perm=order)
        weight = f"{made}:turned"
    alpha = given["alpha"].f if "alpha" in given else 1.0
    if alpha == 1.0:
        yield helper.make_node("MatMul", [data, weight], [made])
        return
    factor = np.asarray(alpha, weights[node.input[1]].dtype)
    yield helper.make_node("MatMul", [data, weight], [f"{made}:product"])
    held = numpy_helper.from_array(factor, f"{made}:alpha")
    yield helper.make_node("Constant", [], [f"{made}:alpha"], value=held)
    yield helper.make_node("Mul", [f"{made}:product", f"{made}:alpha"], [made])


def _plain(op_type: str, inputs: Sequence[str], made: str, given: _Attributes) -> onnx.NodeProto:
    node = helper.make_node(op_type, inputs, [made])
    node.attribute.extend(a for name, a in given.items() if not name.startswith("activation"))
    return node


def _activation(
    given: _Attributes, names: Sequence[str], read: str, made: str
) -> list[onnx.NodeProto] | None:
    """The activation as nodes of its own, none where there is none; None for one nobody knows."""
    name = given["activation"].s.decode() if "activation" in given else ""
    if not name:
        return []
    if name not in _ACTIVATIONS:
        return None
    found: list[float] = []
    for given_as in names:
        if given_as in given:
            one = given[given_as]
            found += list(one.floats) or [one.f]
    parameters = dict(zip(_ACTIVATIONS[name], found, strict=False))
    if name != "Clip":
        node = helper.make_node(name, [read], [made])
        node.attribute.extend(helper.make_attribute(*one) for one in parameters.items())
        return [node]
    # As two operators that read their bounds in every version of the standard.
    nodes, tensor = [], read
    for op_type, key in (("Max", "min"), ("Min", "max")):
        if key in parameters:
            held = numpy_helper.from_array(np.array(parameters[key], np.float32), f"{made}:{key}")
            nodes.append(helper.make_node("Constant", [], [held.name], value=held))
            nodes.append(helper.make_node(op_type, [tensor, held.name], [f"{made}:{op_type}"]))
            tensor = f"{made}:{op_type}"
    nodes[-1].output[0] = made
    return nodes
