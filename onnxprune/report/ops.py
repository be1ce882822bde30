"""The operators that have a rule: the README's table, and what a model's own operators are."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass

import onnxprune.ops  # noqa: F401  (registers the rules)
from onnxprune.cost import stats
from onnxprune.groups import DependencyGraph
from onnxprune.ops.registry import Entry, entries, lookup
from onnxprune.types import ModelStats

_MOST_REASONS = 3
NO_RULE = "no rule: what it touches is frozen"
_BY_SCHEMA = "every element-wise operator with one input"


@dataclass(frozen=True, slots=True)
class OperatorUse:
    """One operator of a model: how often it is there, what it costs, how it is treated."""

    op_type: str
    domain: str
    count: int
    params: int
    macs: int
    rule: str | None


def operators_of(graph: DependencyGraph, stats: ModelStats) -> tuple[OperatorUse, ...]:
    """The operators of a model, the commonest first."""
    nodes = graph.graph.nodes
    count = Counter((node.op_type, node.domain) for node in nodes)
    since = {(node.op_type, node.domain): node.since for node in nodes}
    params: Counter[str] = Counter()
    macs: Counter[str] = Counter()
    for layer in stats.layers:
        params[layer.op_type] += layer.params
        macs[layer.op_type] += layer.macs
    return tuple(
        OperatorUse(
            op_type, domain, number, params[op_type], macs[op_type],
            _rule(op_type, domain, since[op_type, domain]),
        )
        for (op_type, domain), number in sorted(count.items(), key=lambda item: (-item[1], item[0]))
    )  # fmt: skip


def _rule(op_type: str, domain: str, since: int) -> str | None:
    entry = lookup(op_type, domain, since)
    return None if entry is None else entry.summary


_CHANGED = "works over channels that a cut would change"
_NORMS = {
    *("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization", "ReduceMean"),
    *("SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "InstanceNormalization"),
}


def nothing_prunable(graph: DependencyGraph) -> str:
    """Why no group of a model may be cut, the commonest reasons first."""
    if graph.groups:
        reasons = Counter(group.frozen or "" for group in graph.groups)
        shown = "; ".join(reason for reason, _ in reasons.most_common(_MOST_REASONS))
        every = (
            "every channel is frozen" if len(graph.groups) > 1 else "its only channels are frozen"
        )
        return f"nothing can be pruned: {every}: {shown}"
    said = "nothing can be pruned: no Conv, Gemm or MatMul has a constant weight"
    holders = Counter(layer.op_type for layer in stats(graph).layers if layer.params)
    domains = {(node.op_type, node.domain, node.since) for node in graph.graph.nodes}
    without = {op for op, domain, since in domains if _rule(op, domain, since) is None}
    found = [f"{op} ({n})" for op, n in holders.most_common() if op in without]
    if found:
        said += f"; operators that hold weights but have no rule: {', '.join(found)}"
    if any(node.captures for node in graph.graph.nodes):
        said += "; the bodies of If, Loop and Scan are not pruned"
    return said


def way_out(graph: DependencyGraph) -> str:
    """An option that cuts a model of which nothing may go, "" where none is known to."""
    frozen = [group.frozen or "" for group in graph.groups]
    normed = any(why.split(" ")[0] in _NORMS and _CHANGED in why for why in frozen)
    if not normed or graph.tracer.allow_norm:
        return ""
    return "--allow-norm cuts what normalisations take their statistics over too, not exactly"


def operator_table() -> str:
    """All operators with a rule, as a table in Markdown, one row for each rule."""
    rows: dict[str, list[str]] = {}
    for versions in entries().values():
        for entry in versions:
            rows.setdefault(entry.summary, []).append(_name(entry))
    lines = ["| operators | what the rule does |", "|---|---|"]
    for summary, names in sorted(rows.items(), key=lambda item: min(item[1])):
        shown = ", ".join(f"`{name}`" for name in sorted(set(names)))
        if "`Relu`" in shown:
            shown += f", {_BY_SCHEMA}"
        lines.append(f"| {shown} | {summary} |")
    return "\n".join(lines) + "\n"


def _name(entry: Entry) -> str:
    return f"{entry.domain}.{entry.op_type}" if entry.domain else entry.op_type


if __name__ == "__main__":
    sys.stdout.write(operator_table())
