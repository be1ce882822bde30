"""From a model to its dependency graph: channel groups, and what must keep equal counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from onnxprune import fields
from onnxprune.effects import Effect, Freeze, Tie
from onnxprune.graph import Graph
from onnxprune.groups import (
    DependencyGraph,
    Grouping,
    constraints,
    random_keep,
    staggered_keep,
)
from onnxprune.io import as_model
from onnxprune.model import Model
from onnxprune.prepare import prepare
from onnxprune.rows import cut_axis
from onnxprune.runs import find_runs
from onnxprune.shapefix import repairs as shape_repairs
from onnxprune.shapes import Environment, environment
from onnxprune.slots import content
from onnxprune.standins import find_stand_ins
from onnxprune.survivors import Misfit, Survivors
from onnxprune.trace import Tracer
from onnxprune.types import Shape

__all__ = ["DependencyGraph", "analyse", "analyse_graph", "random_keep"]

_MOST_REPAIRS = 8


def analyse(
    model: Model | str,
    *,
    input_shapes: Mapping[str, Shape] | None = None,
    attention: str = "heads",
    allow_norm: bool = False,
) -> DependencyGraph:
    """Find which channels of a model go together, compete, and must stay.

    Args:
        model: A loaded model, or its path.
        input_shapes: Concrete shapes for symbolic inputs, by name; the rest gets stand-ins.
        attention: ``heads`` cuts whole attention heads, ``dims`` the same number of dimensions
            from every head, ``none`` keeps queries and keys whole.
        allow_norm: Also cut channels that a normalisation takes its statistics over; such a cut
            is not exact, and no twin can prove it.

    Returns:
        The dependency graph. Its memory grows with the number of channels, not of weights.

    Raises:
        ModelError: No input size was found that the model accepts.

    Source: labels on axes as in DESIGN §3; the notion of coupled channels is Torch-Pruning's
        (Fang et al. 2023, arXiv:2301.12900).
    """
    graph = prepare(as_model(model))
    shapes = find_stand_ins(graph, input_shapes)
    envs = tuple(environment(graph, choice) for choice in shapes)
    return analyse_graph(graph, envs, attention=attention, allow_norm=allow_norm)


def analyse_graph(
    graph: Graph,
    envs: tuple[Environment, ...],
    *,
    attention: str = "heads",
    allow_norm: bool = False,
    extra: Sequence[Effect] = (),
) -> DependencyGraph:
    """``analyse`` for a prepared graph with known shapes, with further ties on top."""
    runs = find_runs(graph, envs)
    tracer = Tracer(graph, envs, runs, attention, allow_norm)
    added, seen = list(extra), set[bytes]()
    notes: list[str] = []
    for _ in range(_MOST_REPAIRS):
        tracer.settle(added)
        found = Grouping(tracer).result(_once(notes))
        repairs = _repairs(found, tracer, seen, notes)
        if not repairs:
            return found
        added += repairs
    # Nothing that keeps misfitting may be cut.
    tracer.settle([*added, *(_freeze_all(found, tracer))])
    return Grouping(tracer).result(_once(notes))


def _once(notes: Sequence[str]) -> tuple[str, ...]:
    """Every note once, in order: several trials and rounds may find the same."""
    return tuple(dict.fromkeys(notes))


def _repairs(
    found: DependencyGraph, tracer: Tracer, seen: set[bytes], notes: list[str]
) -> list[Effect]:
    """Ties (where that did not help, freezes) for whatever does not fit in some trial cut."""
    repairs: list[Effect] = list(_crossing_rows(found, tracer, notes))
    trials = [staggered_keep(found, phase) for phase in (0, 1)]
    trials.append(random_keep(found, None, np.random.default_rng(0)))
    tied: set[bytes] = set()
    for keep in trials:
        dead = found.dead(keep)
        survivors = [Survivors(trace, dead) for trace in tracer.traces]
        misfits = [misfit for left in survivors for misfit in left.misfits(tracer)]
        if not misfits:
            misfits = list(shape_repairs(tracer, survivors).misfits)
        for misfit in misfits:
            repairs += _repair(misfit, tracer, seen, tied, notes)
    seen |= tied
    return repairs


def _repair(
    misfit: Misfit, tracer: Tracer, seen: set[bytes], tied: set[bytes], notes: list[str]
) -> list[Effect]:
    """Tie the rows of the grids that a misfit names; freeze them if that was done before."""
    grids = []
    for f in misfit.fields:
        labels = tracer.table.classes(f)
        if len(fields.varying(labels)) > 1 and content(labels) not in seen:
            grids.append(labels)
    if not grids:
        notes.append(f"'{misfit.where}': channels that do not stay in order are frozen")
        why = f"'{misfit.where}' would put its channels out of order"
        return [Freeze(f, why) for f in misfit.fields]
    ties: list[Effect] = []
    for labels in grids:
        if content(labels) not in tied:
            tied.add(content(labels))
            notes.append(f"'{misfit.where}': every row keeps the same channels")
            cut = cut_axis(labels, tracer.signature(0), ())
            rows = [axis for axis in fields.varying(labels) if axis != cut]
            ties.append(Tie(labels, fields.first(labels, rows)))
    return ties


def _freeze_all(found: DependencyGraph, tracer: Tracer) -> list[Effect]:
    dead = found.dead(random_keep(found, 0.5, np.random.default_rng(0)))
    survivors = [Survivors(trace, dead) for trace in tracer.traces]
    misfits = [misfit for left in survivors for misfit in left.misfits(tracer)]
    if not misfits:
        misfits = list(shape_repairs(tracer, survivors).misfits)
    return [
        Freeze(f, f"'{misfit.where}' does not keep its order")
        for misfit in misfits
        for f in misfit.fields
    ]


def _crossing_rows(found: DependencyGraph, tracer: Tracer, notes: list[str]) -> list[Effect]:
    """Rows that cross so that no cut leaves them equal counts: tie one set of rows.

    Cells of one unit could lose nothing; and where rows consist of cells of other sizes, one of 2
    slots and one of 1 + 1, what a cell loses by its size is not the same in all.
    """
    stuck = np.zeros(tracer.table.size, np.bool_)
    for group in found.prunable:
        if group.size > 1 and len(group.cells) == group.size:
            stuck[group.classes] = True
    sizes = np.zeros(tracer.table.size, np.int64)
    for balance in found.balance_sets:
        for cell in balance.cells:
            classes = found.groups[cell.group].classes[cell.units]
            sizes[classes] = cell.units.size * cell.slots
    ties: list[Effect] = []
    for constraint in constraints(tracer):
        labels = constraint.labels
        made_of = np.sort(sizes[labels], axis=1)
        uneven = bool((made_of != made_of[:1]).any())
        if (uneven or stuck[labels].all()) and labels.shape[0] > 1 and labels.shape[1] > 1:
            ties.append(Tie(labels, labels[:1]))
            notes.append("crossing rows: every row keeps the same channels")
            break
    return ties
