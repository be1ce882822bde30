"""Nodes that read channels with a constant weight, and what each of their channels can be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from onnxprune import fields
from onnxprune.bounds import Bounds
from onnxprune.bounds.layers import pads
from onnxprune.graph import Node
from onnxprune.groups import DependencyGraph
from onnxprune.types import AnyArray, Float64Array, IntArray

_FIRST_OPSET_THAT_BROADCASTS = 7
_NO_AXIS = -1  # of an output that has just one channel


@dataclass(frozen=True, slots=True)
class Site:
    """A node whose constant weight reads channels.

    Attributes:
        node: The node.
        weight: Input position of the weight.
        axis: Axis of the weight that reads.
        along: Axis of the data that is read.
        read: Label of each input channel, 0 where it stays; shape (in,).
        made: Label of each output channel; shape (out,).
        group: Groups of channels the weight reads apart from one another.
        value: What each input channel always is, NaN where it varies; shape (in,).
        even: A constant input gives a constant output, which a bias can give as well.
    """

    node: Node
    weight: int
    axis: int
    along: int
    read: IntArray
    made: IntArray
    group: int
    value: Float64Array
    even: bool


def find_sites(found: DependencyGraph, bounds: Bounds) -> Iterator[Site]:
    """Every node that reads channels with a constant weight, in graph order."""
    graph = found.graph
    for node in graph.nodes:
        if node.domain or node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            continue
        constant = [name in graph.derived for name in node.inputs[:2]]
        if sum(constant) == 1:
            site = _site(node, constant.index(True), found, bounds)
            if site is not None:
                yield site


def _site(node: Node, weight: int, found: DependencyGraph, bounds: Bounds) -> Site | None:
    data = node.inputs[1 - weight]
    shapes = [bounds.env.shape(name) for name in (data, node.inputs[weight])]
    x, w = shapes
    if x is None or w is None or bounds.env.shape(node.outputs[0]) is None:
        return None
    group, even = 1, False
    match node.op_type:
        case "Conv" if weight == 1:
            axes, group = (1, 1, 1), node.int("group", 1)
            even = not pads(node, w[2:])
        case "ConvTranspose" if weight == 1:
            axes, group = (1, 0, 1), node.int("group", 1)
        case "Gemm" if weight == 1:
            axes = (0 if node.int("transA", 0) else 1, 1 if node.int("transB", 0) else 0, 1)
            even = _takes_bias(node)
        case "Gemm":
            axes = (1 if node.int("transB", 0) else 0, 0 if node.int("transA", 0) else 1, 0)
        case "MatMul" if len(w) == 2 and len(x) >= 2 and weight == 1:
            axes = (len(x) - 1, 0, len(x) - 1)
            even = found.graph.opsets[""] >= _FIRST_OPSET_THAT_BROADCASTS
        case "MatMul" if len(w) == 1 and weight == 1:
            axes = (len(x) - 1, 0, _NO_AXIS)
        case "MatMul" if len(w) == 2 and len(x) >= 2:
            axes = (len(x) - 2, 1, len(x) - 2)
        case _:
            return None
    bias = node.inputs[2] if len(node.inputs) > 2 else ""
    value = bounds.along(data, axes[0])
    assert value is not None
    return Site(
        node,
        weight,
        axes[1],
        axes[0],
        _labels(data, axes[0], found, bounds),
        _labels(node.outputs[0], axes[2], found, bounds),
        group,
        np.where(value.constant, value.low, np.nan),
        even and (not bias or bias in found.graph.derived),
    )


def _labels(name: str, axis: int, found: DependencyGraph, bounds: Bounds) -> IntArray:
    """Label of each index of an axis, 0 where it has none of its own."""
    if axis == _NO_AXIS:
        return np.zeros(1, np.int64)
    shape = bounds.env.shape(name) or ()
    for f in found.tracer.traces[0].fields.get(name, ()):
        if fields.varying(f) == (axis,):
            return -found.tracer.table.classes(f).reshape(-1)
    return np.zeros(shape[axis], np.int64)


def taps(site: Site, bounds: Bounds) -> AnyArray:
    """The weight as (group, out / group, in / group, taps)."""
    weight = bounds.values.read(site.node.inputs[site.weight])
    assert weight is not None
    group = site.group
    match site.node.op_type:
        case "Conv":
            return weight.reshape(group, weight.shape[0] // group, weight.shape[1], -1)
        case "ConvTranspose":
            split = weight.reshape(group, weight.shape[0] // group, weight.shape[1], -1)
            return split.transpose(0, 2, 1, 3)
    flat = weight.reshape(len(weight), -1)  # MatMul with a vector has one output
    return (flat if site.axis == 1 else flat.T)[None, :, :, None]


def _takes_bias(node: Node) -> bool:
    """Whether what is added to a Gemm's third input reaches its output."""
    given = len(node.inputs) > 2 and bool(node.inputs[2])
    beta = node.attributes.get("beta")
    return not given or beta is None or beta.f != 0
