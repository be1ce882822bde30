"""Runs of movements whose net effect is one selection or permutation along one axis.

Channel shuffle is Reshape, Transpose, Reshape; a Focus slice is several. Taken one by one they
would force grids on the channels; taken together they constrain nothing, and are written as one
Gather when something in them is cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnxprune import moves
from onnxprune.graph import Graph, Node
from onnxprune.ops.registry import lookup
from onnxprune.ops.view import OpView, Value
from onnxprune.shapes import Environment
from onnxprune.types import IntArray

_LONGEST = 12


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive nodes that together pick ``indices`` along ``axis``."""

    nodes: tuple[Node, ...]
    axis: int
    indices: IntArray


def find_runs(graph: Graph, envs: Sequence[Environment]) -> Mapping[int, Run]:
    """The longest runs, by the index of their first node; the same under every environment."""
    runs: dict[int, Run] = {}
    used: set[int] = set()
    for node in graph.nodes:
        if node.index in used or not _moves(node) or node.inputs[0] in graph.derived:
            continue
        chain = _chain(graph, node, used)
        for length in range(len(chain), 1, -1):
            run = _as_run(chain[:length], envs)
            if run is not None and _closed(graph, run.nodes):
                runs[node.index] = run
                used.update(member.index for member in run.nodes)
                break
    return runs


def movement_view(node: Node, env: Environment) -> OpView | None:
    """A view of a movement node with shapes and known values but no fields; None without shapes."""
    values: list[Value | None] = []
    for name in node.inputs:
        shape = env.shape(name) if name else None
        if name and shape is None:
            return None
        values.append(Value(name, shape or (), [], False, env.values.get(name)) if name else None)
    shapes = tuple(env.shape(name) if name else None for name in node.outputs)
    if any(name and shape is None for name, shape in zip(node.outputs, shapes, strict=True)):
        return None
    births = None
    return OpView(node, tuple(values), shapes, env, births, "heads", False, node.since)  # type: ignore[arg-type]  # movements ask for no slots


def _moves(node: Node) -> bool:
    entry = lookup(node.op_type, node.domain, node.since)
    return entry is not None and entry.move is not None and len(node.outputs) == 1


def _chain(graph: Graph, node: Node, used: set[int]) -> list[Node]:
    chain = [node]
    while len(chain) < _LONGEST:
        inner = chain[-1].outputs[0]
        if inner in graph.outputs or inner in graph.captured:
            break
        data = [reader for reader in graph.consumers.get(inner, []) if reader[0].op_type != "Shape"]
        if len(data) != 1 or data[0][1] != 0:
            break
        following = data[0][0]
        if not _moves(following) or following.index in used:
            break
        chain.append(following)
    return chain


def _closed(graph: Graph, nodes: Sequence[Node]) -> bool:
    """Whether nothing outside the run looks at the shape of a tensor within it."""
    members = {node.index for node in nodes}
    shapes = [
        reader
        for node in nodes[:-1]
        for reader, _ in graph.consumers.get(node.outputs[0], [])
        if reader.op_type == "Shape"
    ]
    return all(_only_feeds(graph, shape, members) for shape in shapes)


def _only_feeds(graph: Graph, shape: Node, members: set[int]) -> bool:
    """Whether a Shape node's result ends in the run alone, following shape arithmetic."""
    pending, seen = [shape], set()
    while pending:
        node = pending.pop()
        if node.index in seen:
            continue
        seen.add(node.index)
        for name in node.outputs:
            if name in graph.outputs or name in graph.captured:
                return False
            for reader, _ in graph.consumers.get(name, []):
                if reader.index not in members:
                    if reader.index < shape.index or len(seen) > 64:
                        return False
                    pending.append(reader)
    return True


def _as_run(nodes: Sequence[Node], envs: Sequence[Environment]) -> Run | None:
    if all(node.op_type in ("Reshape", "Flatten", "Squeeze", "Unsqueeze") for node in nodes):
        return None
    found: tuple[int, IntArray] | None = None
    for env in envs:
        shape = env.shape(nodes[0].inputs[0])
        steps: list[moves.Step] = []
        for node in nodes:
            view = movement_view(node, env)
            entry = lookup(node.op_type, node.domain, node.since)
            if view is None or entry is None or entry.move is None:
                return None
            outputs = entry.move(view, view.x.shape, [s or () for s in view.out_shapes])
            if not outputs:
                return None
            steps += outputs[0]
        if shape is None:
            return None
        this = moves.selection(steps, shape)
        if this is None or (found is not None and not _equal(this, found)):
            return None
        found = this
    return None if found is None else Run(tuple(nodes), *found)


def _equal(a: tuple[int, IntArray], b: tuple[int, IntArray]) -> bool:
    return a[0] == b[0] and np.array_equal(a[1], b[1])
