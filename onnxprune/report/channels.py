"""Channel groups, for people and as comma-separated values."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from onnxprune.groups import DependencyGraph
from onnxprune.report.layout import all_names, new_table, some_names, text_line
from onnxprune.types import ChannelGroup, GroupReport, Report

_INTERFACE = re.compile(r"input '([^']+)', whose shape is the model's interface")
_MOST_INPUTS = 4


def groups_csv(groups: Sequence[GroupReport]) -> str:
    """The group table as comma-separated values."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    columns = ("id", "unit", "size", "kept", "producers", "consumers", "frozen", "why", "nodes")
    writer.writerow(columns)
    for group in groups:
        producers, consumers = " ".join(group.producers), " ".join(group.consumers)
        writer.writerow(
            [group.id, group.unit, group.size, group.kept, producers, consumers,
             group.frozen or "", group.why, " ".join(group.nodes)]
        )  # fmt: skip
    return out.getvalue()


def group_table(groups: Sequence[GroupReport], *, cut: bool = True, every: bool = False) -> Table:
    """One row for each channel group; frozen ones with the reason.

    Args:
        groups: What to show.
        cut: Show what each keeps.
        every: Show all weights by name, and the nodes that use the producers.
    """
    kept, nodes = (">kept",) if cut else (), ("nodes",) if every else ()
    table = new_table("group", "unit", ">size", *kept, "producers → consumers", *nodes, "")
    names = all_names if every else some_names
    for group in groups:
        table.add_row(
            str(group.id),
            _units(group),
            str(group.size),
            *([str(group.kept)] if cut else []),
            Text(f"{names(group.producers)} → {names(group.consumers)}"),
            *([Text(all_names(group.nodes))] if every else []),
            Text(f"frozen: {group.frozen}" if group.frozen else group.why),
        )
    return table


def _units(group: GroupReport) -> str:
    """What one unit is, and where it is more than a channel, how many and how wide."""
    if group.unit == "channel":
        return group.unit
    many = f"{group.units} {group.unit}{'s' if group.units != 1 else ''}"
    return f"{many} of {group.size // group.units}" if group.size % group.units == 0 else many


def group_details(
    graph: DependencyGraph, groups: Iterable[ChannelGroup]
) -> Iterable[RenderableType]:
    """Every weight axis of some groups."""
    for group in groups:
        yield from group_detail(graph, group)


def group_detail(graph: DependencyGraph, group: ChannelGroup) -> Iterable[RenderableType]:
    """Every weight axis of one group."""
    units = f"{group.size} {group.unit}{'s' if group.size != 1 else ''}"
    rows = f", in {len(group.cells)} rows that keep equal counts" if len(group.cells) > 1 else ""
    yield text_line(f"group {group.id}: {units}, width {group.width}{rows}")
    if group.frozen:
        yield text_line(f"frozen: {group.frozen}")
    table = new_table("role", "tensor", ">axis", "shape", ">channels", "operator", "node")
    for axis in (*group.producers, *group.parameters, *group.consumers):
        shape = graph.graph.constants[axis.tensor].weight.shape
        table.add_row(
            axis.role,
            Text(axis.tensor),
            str(axis.axis),
            "x".join(map(str, shape)),
            str(axis.index.size),
            axis.op_type,
            Text(axis.node),
        )
    yield table


def group_count(report: Report) -> str:
    """How many channel groups there are."""
    return f"{len(report.groups)} channel group{'s' if len(report.groups) != 1 else ''}"


def interface_line(report: Report) -> Iterable[RenderableType]:
    """The inputs, a cache for one, whose shape keeps channels from going."""
    found = [_INTERFACE.findall(group.frozen) for group in report.groups if group.frozen]
    names = list(dict.fromkeys(name for inputs in found for name in inputs))
    if names:
        shown = ", ".join(f"'{name}'" for name in names[:_MOST_INPUTS])
        more = f" and {len(names) - _MOST_INPUTS} more" if len(names) > _MOST_INPUTS else ""
        yield text_line(
            f"{sum(map(bool, found))} of the frozen ones must fit the shape of "
            f"an input, as of a cache: {shown}{more}"
        )
