"""What values a tensor can take, channel by channel: one pass of interval arithmetic.

Follows from the weights alone, whatever the input: a filter of zeros gives its bias, a
BatchNormalization with scale 0 its shift, a Relu behind a bound below 0 gives 0. What no function
here understands may take any value.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from onnxprune import fields, moves
from onnxprune.bounds import layers, pointwise, space
from onnxprune.bounds.view import FUNCTIONS, Bounds, Unknown, Values, View, Wild
from onnxprune.graph import Node
from onnxprune.groups import DependencyGraph
from onnxprune.intervals import Interval
from onnxprune.ops.registry import is_unary, lookup
from onnxprune.runs import movement_view

__all__ = ["Bounds", "Values", "find_bounds", "layers", "pointwise", "space"]

_MOST = 1 << 18  # elements of one interval before it is widened to what channels tell apart


def find_bounds(graph: DependencyGraph) -> Bounds:
    """Bounds of every tensor that a node computes.

    Args:
        graph: From ``analyse``.

    Source: interval bound propagation, Gowal et al. 2018 (arXiv:1810.12715), from no bound on the
        inputs.
    """
    bounds = Bounds(graph.envs[0], Values(graph.graph))
    labelled = graph.tracer.traces[0].fields
    for node in graph.graph.nodes:
        if node.captures or all(name in graph.graph.derived for name in node.outputs if name):
            continue
        if not bounds.wild.isdisjoint(node.inputs):
            bounds.wild.update(name for name in node.outputs if name)
            continue
        for name, found in _outputs(node, bounds):
            # No bounds take no place: `of` says unknown then.
            if not (np.isinf(found.low).all() and np.isinf(found.high).all()):
                told = {axis for f in labelled.get(name, ()) for axis in fields.varying(f)}
                bounds.by_name[name] = _narrow(found, told)
    return bounds


def _narrow(found: Interval, told: set[int]) -> Interval:
    if found.low.size > _MOST:
        found = found.hull([axis for axis in range(found.rank) if axis not in told])
    return found if found.low.size <= _MOST else found.hull(range(found.rank))


def _outputs(node: Node, bounds: Bounds) -> Iterator[tuple[str, Interval]]:
    entry = lookup(node.op_type, node.domain, node.since)
    view = View(node, bounds)
    try:
        if entry is not None and entry.move is not None:
            yield from _moved(view)
            return
        if node.domain or not node.since:
            return
        function = FUNCTIONS.get(node.op_type)
        if function is not None:
            found = function(view)
        elif is_unary(node.op_type, node.since):
            found = pointwise.at_points(view)
        else:
            return
    except Wild:
        bounds.wild.update(name for name in node.outputs if name)
        return
    except Unknown:
        return
    shape = bounds.env.shape(node.outputs[0])
    # Old versions broadcast in ways of their own: what does not fit says nothing.
    if shape is None or found.rank != len(shape):
        return
    if all(n in (1, m) for n, m in zip(found.low.shape, shape, strict=True)):
        yield node.outputs[0], found


def _moved(view: View) -> Iterator[tuple[str, Interval]]:
    node, env = view.node, view.bounds.env
    x, seen = view.need(0), movement_view(node, env)
    entry = lookup(node.op_type, node.domain, node.since)
    if seen is None or entry is None or entry.move is None:
        return
    steps = entry.move(seen, seen.x.shape, [shape or () for shape in seen.out_shapes])
    for name, each in zip(node.outputs, steps or (), strict=False):
        if name:
            yield name, x.moved(lambda ends, each=each: moves.run(each, ends, seen.x.shape))  # type: ignore[misc]  # mypy cannot infer a lambda with a default
