"""Make up for the mean of what was dropped, without data: into the biases of who read it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from onnxprune.layers import layer_of, matrix
from onnxprune.moments import Spread, seen_weight, spreads
from onnxprune.select import PruningPlan
from onnxprune.survivors import Survivors
from onnxprune.types import Absorption


def compensated(plan: PruningPlan) -> PruningPlan:
    """The same cut with the mean of every dropped channel folded into its readers' biases.

    Exact for the mean where no zero padding is; at a padded border the bias is a little too much.
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
        if node.op_type not in ("Conv", "Gemm", "MatMul") or node.domain:
            continue
        if len(node.inputs) < 2 or node.inputs[1] not in graph.derived:
            continue
        seen, data = seen_weight(graph, node.inputs[1]), known.get(node.inputs[0])
        leaf = node.inputs[1]
        while leaf not in graph.constants and leaf in graph.producer:
            leaf = graph.producer[leaf].inputs[0]
        layer = layer_of(graph, leaf)
        if seen is None or data is None or layer is None or layer.node is not node:
            continue
        rank = len(env.shape(layer.data) or ())
        alive = survivors.alive(layer.data, layer.axis % rank) if rank else None
        if alive is None or data.axis != layer.axis % rank or layer.groups > 1:
            continue
        product = matrix(layer, seen)
        each = product.shape[1] // alive.size
        lost = np.repeat(np.where(alive, 0.0, data.mean), each)
        yield Absorption(node.index, bias=np.einsum("i,io->o", lost, product[0]))
