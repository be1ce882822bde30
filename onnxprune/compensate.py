"""Make up for the mean of what was dropped, without data: into the biases of who read it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from onnxprune.graph import Graph, Node
from onnxprune.layers import Layer, layer_of
from onnxprune.moments import Spread, seen_weight, spreads, through
from onnxprune.select import PruningPlan
from onnxprune.survivors import Survivors
from onnxprune.types import Absorption

_TAKES_A_BIAS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def compensated(plan: PruningPlan) -> PruningPlan:
    """The same cut with the mean of every dropped channel folded into its readers' biases.

    Beneath zero padding the bias is the mean over all output positions: the best one number can do.
    In the middle of an image it is then a little too small, at the border too large.
    """
    known = spreads(plan.graph.graph, plan.graph.envs[0])
    return replace(plan, absorbed=(*plan.absorbed, *absorptions(plan, known)))


def absorptions(plan: PruningPlan, known: Mapping[str, Spread]) -> Iterator[Absorption]:
    """What the means of dropped channels gave to each node that reads them.

    Args:
        plan: The cut.
        known: From ``spreads`` of its graph.
    """
    graph = plan.graph.graph
    survivors = Survivors(plan.graph.tracer.traces[0], plan.graph.dead(plan.keep))
    env = plan.graph.envs[0]
    for node in graph.nodes:
        layer = layer_with_bias(graph, node)
        data = None if layer is None else known.get(layer.data)
        if layer is None or data is None:
            continue
        seen = seen_weight(graph, layer.seen)
        rank = len(env.shape(layer.data) or ())
        if seen is None or not rank or data.axis != layer.axis % rank:
            continue
        if layer.kind == "matmul" and seen.ndim > 2:  # a stack of matrices
            continue
        alive = survivors.alive(layer.data, layer.axis % rank)
        if alive is None:
            continue
        lost = np.where(alive, 0.0, data.mean)
        bias, _ = through(layer, seen, lost, np.zeros_like(lost), env)
        if bias.any():  # a depthwise filter goes with its channel
            yield Absorption(node.index, bias=bias)


def layer_with_bias(graph: Graph, node: Node) -> Layer | None:
    """The layer that a node is, where its bias can take up a mean."""
    if node.op_type not in _TAKES_A_BIAS or node.domain or len(node.inputs) < 2:
        return None
    leaf = node.inputs[1]
    if leaf not in graph.derived:
        return None
    while leaf not in graph.constants and leaf in graph.producer:
        leaf = graph.producer[leaf].inputs[0]
    layer = layer_of(graph, leaf)
    return layer if layer is not None and layer.node is node and layer.kind != "left" else None
