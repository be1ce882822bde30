"""Channel groups, cells and balance sets from the components that the passes left."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from onnxprune import fields
from onnxprune.graph import Graph, Node
from onnxprune.ops.view import INTERFACE
from onnxprune.rows import Signature, cut_axis, hashes, matrix
from onnxprune.shapes import Environment
from onnxprune.slots import content
from onnxprune.survivors import DeadSlots
from onnxprune.trace import Trace, Tracer
from onnxprune.types import (
    BalanceSet,
    BoolArray,
    Cell,
    ChannelGroup,
    IntArray,
    Shape,
    WeightAxis,
)

NOT_READ = "no weight reads it"
_INPUT = re.compile(rf"input '([^']+)', {INTERFACE}")


@dataclass(frozen=True, slots=True)
class Constraint:
    """Labels (rows, columns): every row must keep the same number of its columns."""

    labels: IntArray


@dataclass(frozen=True, repr=False)
class DependencyGraph:
    """The channel groups of a model and what ties them.

    Attributes:
        groups: Every group of coupled channels, in execution order, frozen ones included.
        balance_sets: Cells of the prunable groups that must be cut by one ratio; a group that
            nothing constrains is a set of its own.
        graph: The prepared graph.
        envs: Shapes and values of every tensor, one for each choice of stand-ins.
        tracer: The analysis itself: fields, runs and slots, which rewriting needs.
        notes: What a person should know: fields that had to be tied or frozen, and where.
    """

    groups: tuple[ChannelGroup, ...]
    balance_sets: tuple[BalanceSet, ...]
    graph: Graph
    envs: tuple[Environment, ...]
    tracer: Tracer
    notes: tuple[str, ...] = ()

    @cached_property
    def prunable(self) -> tuple[ChannelGroup, ...]:
        """Groups of which something may go."""
        return tuple(group for group in self.groups if group.frozen is None)

    @property
    def stand_ins(self) -> Mapping[str, Shape]:
        """Input shapes that costs are counted at."""
        return self.envs[0].inputs

    @cached_property
    def together(self) -> Sequence[frozenset[int]]:
        """Ids of prunable groups that share balance sets, in the order of the graph."""
        parts: list[frozenset[int]] = []
        for balance in self.balance_sets:
            groups = frozenset(cell.group for cell in balance.cells)
            for part in [part for part in parts if part & groups]:
                parts.remove(part)
                groups |= part
            parts.append(groups)
        return sorted(parts, key=min)

    def dead(self, keep: Mapping[int, IntArray]) -> DeadSlots:
        """What goes when each group keeps the units ``keep[group.id]``."""
        table = self.tracer.table
        dead = np.zeros(table.size, np.bool_)
        for group in self.prunable:
            if group.id in keep:
                gone = np.ones(group.size, np.bool_)
                gone[keep[group.id]] = False
                dead[group.classes[gone]] = True
        # A slot that only an earlier pass tied says nothing about the weight it belongs to.
        return DeadSlots(dead[table.labels] & self.tracer.effective, dead)

    def exact(self, keep: Mapping[int, IntArray]) -> bool:
        """Whether a cut changes no normalisation's statistics, so that a twin can prove it."""
        dead = self.dead(keep).classes
        return not bool((dead & self.tracer.inexact).any())

    def named(self, name: str) -> tuple[ChannelGroup, ...]:
        """The groups a name speaks of.

        Args:
            name: Number of a group, or a weight, node or other tensor of the model.

        Returns:
            What it makes; if nothing, what it reads or rides along with; if nothing, the prunable
            groups whose channels pass there, or what the node that writes the tensor makes.
        """
        for group in self.groups:
            if name in (str(group.id), f"group {group.id}"):
                return (group,)
        tensors = [out for node in self.graph.nodes if node.label == name for out in node.outputs]
        maker = self.graph.producer.get(name)
        return (
            self._using(name)
            or self._carried(tensors or [name])
            or (self._using(maker.label) if maker is not None else ())
        )

    def _using(self, name: str) -> tuple[ChannelGroup, ...]:
        """Groups with a weight or node of that name: as a producer if there are such."""
        for axes in (
            lambda group: group.producers,
            lambda group: (*group.consumers, *group.parameters),
        ):
            found = [g for g in self.groups if any(name in (a.tensor, a.node) for a in axes(g))]
            if found:
                return tuple(found)
        return ()

    def _carried(self, tensors: Sequence[str]) -> tuple[ChannelGroup, ...]:
        """Prunable groups whose channels are in some tensors."""
        fields_there = self.tracer.traces[0].fields
        classes = {
            int(-label)
            for tensor in tensors
            for f in fields_there.get(tensor, ())
            for label in np.unique(self.tracer.table.classes(f))
        }
        return tuple(g for g in self.prunable if not classes.isdisjoint(g.classes.tolist()))

    def __repr__(self) -> str:
        return f"DependencyGraph({len(self.groups)} groups, {len(self.prunable)} can be pruned)"

    def __str__(self) -> str:
        lines = [f"{'group':>5}  {'size':>5}  {'unit':7}  producers -> consumers"]
        for group in self.groups:
            made = ", ".join(axis.tensor for axis in group.producers)
            read = ", ".join(axis.tensor for axis in group.consumers)
            tail = f"frozen: {group.frozen}" if group.frozen else f"-> {read}"
            lines.append(f"{group.id:>5}  {group.size:>5}  {group.unit:7}  {made} {tail}")
        return "\n".join(lines)


def random_keep(
    found: DependencyGraph, ratio: float | None, rng: np.random.Generator
) -> Mapping[int, IntArray]:
    """A random cut that respects the balance sets, for trials."""
    keep = {group.id: np.ones(group.size, np.bool_) for group in found.prunable}
    for balance in found.balance_sets:
        share = ratio if ratio is not None else float(rng.uniform(0.1, 0.9))
        for cell in balance.cells:
            drop = units_to_drop(cell, balance.step, share)
            keep[cell.group][rng.permutation(cell.units)[:drop]] = False
    return {identifier: np.flatnonzero(kept) for identifier, kept in keep.items()}


def half_keep(found: DependencyGraph, groups: frozenset[int]) -> Mapping[int, IntArray]:
    """Groups that share balance sets at half their size, as the sets allow; one unit at least."""
    keep = {group.id: np.ones(group.size, np.bool_) for group in found.prunable}
    for balance in found.balance_sets:
        for cell in balance.cells if balance.cells[0].group in groups else ():
            drop = units_to_drop(cell, balance.step, 0.5)
            keep[cell.group][cell.units[cell.units.size - drop :]] = False
    return {identifier: np.flatnonzero(keep[identifier]) for identifier in groups}


def staggered_keep(found: DependencyGraph, phase: int) -> Mapping[int, IntArray]:
    """Half of every cell, in turn its first and its last units: rows that keep unlike positions.

    First and last as the grid has them, so that a movement which puts survivors out of order when
    rows differ does so here.
    """
    place = np.arange(found.tracer.table.size)
    for constraint in reversed(constraints(found.tracer)):
        columns = np.broadcast_to(np.arange(constraint.labels.shape[1]), constraint.labels.shape)
        place[constraint.labels.reshape(-1)] = columns.reshape(-1)
    keep = {group.id: np.ones(group.size, np.bool_) for group in found.prunable}
    for balance in found.balance_sets:
        for number, cell in enumerate(balance.cells):
            drop = units_to_drop(cell, balance.step, 0.5)
            low = (number + phase) % 2 == 0
            classes = found.groups[cell.group].classes[cell.units]
            units = cell.units[np.argsort(place[classes], kind="stable")]
            keep[cell.group][units[:drop] if low else units[units.size - drop :]] = False
    return {identifier: np.flatnonzero(kept) for identifier, kept in keep.items()}


def units_to_drop(cell: Cell, step: int, ratio: float) -> int:
    """Units a cell loses at a ratio: a function of its slots alone, so that all rows agree."""
    slots = cell.units.size * cell.slots
    return int(ratio * slots + 1e-9) // step * step // cell.slots


def constraints(tracer: Tracer) -> list[Constraint]:
    """Row constraints of every grid: those that follow from use, and a choice for the others."""
    result: dict[bytes, Constraint] = {}
    for position, trace in enumerate(tracer.traces):
        signature = tracer.signature(position)
        soft: dict[bytes, set[int]] = {}
        decided: set[bytes] = set()
        cuts: dict[bytes, int] = {}
        for rule in trace.rows:
            classes = tracer.table.classes(rule.classes)
            key = content(classes)
            if rule.hard:
                decided.add(key)
                rows = _all_but_one(classes, rule.axes, signature)
                _note_cut(cuts, classes, rows)
                # Uses that ask for other rows of the same grid cross: both must be known.
                place = fields.varying(classes).index
                which = repr([place(axis) for axis in rows]).encode()
                result.setdefault(key + b"|" + which, Constraint(matrix(-classes, rows)))
            else:
                soft.setdefault(key, set()).update(rule.axes)
        for key, grid in _all_grids(trace, tracer).items():
            if key not in decided:
                cut = cut_axis(grid, signature, soft.get(key, ()))
                rows = tuple(axis for axis in fields.varying(grid) if axis != cut)
                _note_cut(cuts, grid, rows)
                result.setdefault(key, Constraint(matrix(-grid, rows)))
        trace.cuts, trace.classes = cuts, tracer.table.resolved
    return list(result.values())


def _all_but_one(classes: IntArray, rows: tuple[int, ...], signature: Signature) -> tuple[int, ...]:
    """Rows that leave just one axis to cut, since nothing else leaves a box."""
    moving = fields.varying(classes)
    if len(moving) - len(rows) < 2:
        return rows
    cut = cut_axis(classes, signature, rows)
    if cut in rows:
        cut = max((axis for axis in moving if axis not in rows), key=lambda a: classes.shape[a])
    return tuple(axis for axis in moving if axis != cut)


def _note_cut(cuts: dict[bytes, int], classes: IntArray, rows: Sequence[int]) -> None:
    """Remember along which axis a grid is cut, if its rows leave just one."""
    moving = fields.varying(classes)
    open_axes = [position for position, axis in enumerate(moving) if axis not in rows]
    if len(moving) > 1 and len(open_axes) == 1:
        cuts.setdefault(content(classes), open_axes[0])


def _all_grids(trace: Trace, tracer: Tracer) -> Mapping[bytes, IntArray]:
    found = dict(trace.grids)
    for birth in tracer.table.births:
        if len(birth.axes) > 1 and tracer.effective[birth.base]:
            labels = fields.compress(birth.field, tracer.table.resolved)
            if labels is not None and len(fields.varying(labels)) > 1:
                found.setdefault(content(labels), labels)
    return found


@dataclass
class _Members:
    """Which component sits on which birth, one entry for each slot."""

    label: IntArray
    birth: IntArray
    position: IntArray


@dataclass(frozen=True, slots=True)
class _Components:
    """What is known of each component, by its label.

    Attributes:
        signature: Hash of the weight axes it sits on.
        producing, consuming: Some weight makes it, reads it.
        frozen: It stays.
        rows: Hash of the rows it lies in.
    """

    signature: Signature
    producing: BoolArray
    consuming: BoolArray
    frozen: BoolArray
    rows: Signature


class Grouping:
    """Turns components into channel groups, cells and balance sets."""

    def __init__(self, tracer: Tracer) -> None:
        self.tracer = tracer
        self.table = tracer.table
        self.labels = tracer.table.labels

    def result(self, notes: tuple[str, ...]) -> DependencyGraph:
        """The dependency graph."""
        found = constraints(self.tracer)
        members = self._members()
        signature = self._signatures(members)
        producing = self._flag(self.tracer.producing)
        consuming = self._flag(self.tracer.consuming | self.tracer.contracted)
        frozen = self.table.frozen.copy()
        self._freeze_unequal(found, frozen, producing & consuming)
        rows, slots = self._rows(found)
        state = _Components(signature, producing, consuming, frozen, rows)
        groups = self._groups(members, state)
        sets = self._balance(groups, found, slots)
        tracer = self.tracer
        return DependencyGraph(
            tuple(groups), tuple(sets), tracer.graph, tuple(tracer.envs), tracer, notes
        )

    def _members(self) -> _Members:
        births = self.table.births
        base = np.array([b.base for b in births], np.int64)
        size = np.array([b.size for b in births], np.int64)
        birth = np.repeat(np.arange(len(births)), size)
        slot = np.arange(1, self.table.size)
        wanted = self.tracer.effective[slot]
        slot, birth = slot[wanted], birth[wanted]
        position = slot - base[birth] if len(births) else slot
        return _Members(self.labels[slot], birth, position)

    def _signatures(self, members: _Members) -> Signature:
        """Hash of the births each component sits on."""
        signature = np.zeros(self.table.size, np.uint64)
        pairs = np.unique(np.stack([members.label, members.birth]), axis=1)
        zero = np.zeros_like(pairs[1])
        np.add.at(signature, pairs[0], hashes(pairs[1], zero, zero))
        self._mark_parts(signature)
        return signature

    def _mark_parts(self, signature: Signature) -> None:
        """Each part of a Split, Slice or Gather is a group of its own, so that none ends empty."""
        tracer = self.tracer
        for node in tracer.graph.nodes:
            if node.op_type not in ("Split", "Slice", "Gather") or node.index in tracer.skipped:
                continue
            for position, name in enumerate(node.outputs):
                for f in tracer.traces[0].fields.get(name, ()):
                    part = np.unique(-f[f < 0])
                    where = np.full(part.shape, node.index + len(self.table.births))
                    signature[part] += hashes(where, np.full(part.shape, position), part * 0)

    def _flag(self, slots: BoolArray) -> BoolArray:
        """Components of which any slot is flagged."""
        flagged = np.zeros(self.table.size, np.bool_)
        flagged[self.labels[np.flatnonzero(slots)]] = True
        return flagged

    def _freeze_unequal(
        self, found: Sequence[Constraint], frozen: BoolArray, used: BoolArray
    ) -> None:
        """Rows of which unequal shares stay for ever cannot be cut evenly: keep them whole."""
        changed = True
        while changed:
            changed = False
            for constraint in found:
                stays = (frozen | ~used)[constraint.labels] | (constraint.labels == 0)
                counts = stays.sum(axis=1)
                if counts.any() and not (counts == counts[0]).all():
                    free = np.unique(constraint.labels[~stays])
                    if free.size:
                        frozen[free] = True
                        changed = True

    def _rows(self, found: Sequence[Constraint]) -> tuple[Signature, IntArray]:
        """Hash of the rows each component lies in, and how many slots it has in one row."""
        rows = np.zeros(self.table.size, np.uint64)
        slots = np.ones(self.table.size, np.int64)
        for number, constraint in enumerate(found):
            count = constraint.labels.shape[0]
            row = np.broadcast_to(np.arange(count)[:, None], constraint.labels.shape).reshape(-1)
            flat = constraint.labels.reshape(-1)
            pairs, times = np.unique(np.stack([flat, row]), axis=1, return_counts=True)
            np.add.at(rows, pairs[0], hashes(np.full_like(pairs[1], number), pairs[1], times))
            np.maximum.at(slots, pairs[0], times)
        return rows, slots

    def _groups(self, members: _Members, state: _Components) -> list[ChannelGroup]:
        present = np.unique(members.label)
        present = present[state.producing[present]]
        if not present.size:
            return []
        reason = self._reasons(present, state.consuming, state.frozen)
        why = {text: number for number, text in enumerate(dict.fromkeys(reason))}
        kind = np.array([why[text] for text in reason], np.int64)
        keys = np.stack([state.signature[present], kind.astype(np.uint64)])
        _, first_at, group_of = np.unique(keys, axis=1, return_index=True, return_inverse=True)
        group_of = group_of.reshape(-1)
        # Number groups by their smallest component, which follows execution order.
        order = np.argsort(first_at, kind="stable")
        rank = np.empty_like(order)
        rank[order] = np.arange(order.size)
        group_of = rank[group_of]
        axes = self._weight_axes(members, present, group_of)
        groups = []
        sorted_units = np.argsort(group_of, kind="stable")
        bounds = np.searchsorted(group_of[sorted_units], np.arange(order.size + 1))
        for number in range(order.size):
            chosen = sorted_units[bounds[number] : bounds[number + 1]]
            classes = present[chosen]
            found = axes[number]
            by_role = {
                role: tuple(a for a in found if a.role == role)
                for role in ("producer", "consumer", "parameter")
            }
            width = by_role["producer"][0].index.size if by_role["producer"] else classes.size
            groups.append(
                ChannelGroup(
                    id=number,
                    size=classes.size,
                    width=width,
                    unit=self._unit(classes, width),
                    classes=classes,
                    cells=_cells(state.rows[classes]),
                    producers=by_role["producer"],
                    consumers=by_role["consumer"],
                    parameters=by_role["parameter"],
                    frozen=reason[chosen[0]],
                )
            )
        return groups

    def _unit(self, classes: IntArray, width: int) -> str:
        if self._flag(self.tracer.heads)[classes].any():
            return "head"
        each = width // classes.size
        return "channel" if each <= 1 else "pair" if each == 2 else "group"

    def _reasons(
        self, present: IntArray, consuming: BoolArray, frozen: BoolArray
    ) -> list[str | None]:
        """Why each component stays: the first freeze in execution order that touched it.

        Where that is the shape of an input, the other inputs it must fit are named too.
        """
        reasons = self.tracer.reasons
        fits: dict[int, list[str]] = {}
        for slots, text in reasons:
            if INTERFACE in text:
                for label in np.unique(self.labels[np.abs(slots)]).tolist():
                    fits.setdefault(label, []).append(text)
        earliest = np.full(self.table.size, len(reasons), np.int64)
        for number in range(len(reasons) - 1, -1, -1):
            earliest[self.labels[np.abs(reasons[number][0])]] = number
        result: list[str | None] = []
        for label in present:
            if frozen[label]:
                number = earliest[label]
                known = number < len(reasons)
                why = reasons[number][1] if known else "shares rows with channels that stay"
                result.append(_with_inputs(why, fits.get(int(label), ())))
            elif not consuming[label]:
                result.append(NOT_READ)
            else:
                result.append(None)
        return result

    def _weight_axes(
        self, members: _Members, present: IntArray, group_of: IntArray
    ) -> list[list[WeightAxis]]:
        where = np.full(self.table.size, -1, np.int64)
        where[present] = np.arange(present.size)
        unit_of = _positions_within(group_of)
        known = where[members.label]
        kept = known >= 0
        group = group_of[known[kept]]
        unit = unit_of[known[kept]]
        birth, position = members.birth[kept], members.position[kept]
        order = np.lexsort((position, birth, group))
        group, unit, birth, position = group[order], unit[order], birth[order], position[order]
        count = int(group_of.max()) + 1
        result: list[list[WeightAxis]] = [[] for _ in range(count)]
        change = np.flatnonzero((np.diff(group) != 0) | (np.diff(birth) != 0)) + 1
        bounds = [0, *change.tolist(), group.size]
        for start, stop in pairwise(bounds):
            if start < stop:
                axis = self._axis(int(birth[start]), position[start:stop], unit[start:stop])
                result[int(group[start])].append(axis)
        return result

    def _axis(self, number: int, index: IntArray, unit: IntArray) -> WeightAxis:
        birth = self.table.births[number]
        tracer = self.tracer
        slots = birth.base + index
        role = "parameter"
        if tracer.producing[slots].any():
            role = "producer"
        elif tracer.consuming[slots].any():
            role = "consumer"
        node, position = self._use(birth.leaf)
        shape = tracer.graph.constants[birth.leaf].weight.shape
        axis = birth.axes[-1] - (len(birth.view) - len(shape))
        return WeightAxis(
            birth.leaf,
            axis,
            role,
            node.op_type if node else "",
            node.label if node else "",
            position,
            birth.view,
            birth.axes,
            index,
            unit,
        )

    def _use(self, name: str) -> tuple[Node | None, int]:
        """The first node that uses a constant as data, past the nodes that only present it."""
        return self.tracer.graph.uses.get(name, (None, 0))

    def _balance(
        self, groups: Sequence[ChannelGroup], found: Sequence[Constraint], slots: IntArray
    ) -> list[BalanceSet]:
        cell_of = np.full(self.table.size, -1, np.int64)
        cells: list[Cell] = []
        for group in groups:
            if group.frozen is not None:
                continue
            for units in group.cells:
                classes = group.classes[units]
                cell_of[classes] = len(cells)
                cells.append(Cell(group.id, units, int(slots[classes].max())))
        neighbours: list[set[int]] = [set() for _ in cells]
        for constraint in found:
            touched = np.unique(cell_of[constraint.labels])
            touched = touched[touched >= 0]
            for other in touched[1:]:
                neighbours[int(touched[0])].add(int(other))
                neighbours[int(other)].add(int(touched[0]))
        return [_balance_set([cells[i] for i in part]) for part in _components(neighbours)]


def _with_inputs(why: str, reasons: Sequence[str]) -> str:
    """A reason that is the shape of an input, with the other inputs of which that is true."""
    known = _INPUT.findall(why)
    if not known:
        return why
    named = dict.fromkeys(name for text in reasons for name in _INPUT.findall(text))
    others = (f"; input '{name}', {INTERFACE}, too" for name in named if name not in known)
    return why + "".join(others)


def _positions_within(group_of: IntArray) -> IntArray:
    """Number of each element within its group, in order."""
    order = np.argsort(group_of, kind="stable")
    starts = np.searchsorted(group_of[order], np.arange(int(group_of.max()) + 1))
    result = np.empty_like(group_of)
    result[order] = np.arange(group_of.size) - starts[group_of[order]]
    return result


def _cells(rows: Signature) -> tuple[IntArray, ...]:
    """Units with the same rows, in order of their first unit."""
    _, first_at, inverse = np.unique(rows, return_index=True, return_inverse=True)
    order = np.argsort(first_at, kind="stable")
    return tuple(np.flatnonzero(inverse == number) for number in order)


def _components(neighbours: Sequence[set[int]]) -> list[list[int]]:
    seen: set[int] = set()
    parts = []
    for start in range(len(neighbours)):
        if start in seen:
            continue
        seen.add(start)
        part, pending = [], deque([start])
        while pending:
            item = pending.popleft()
            part.append(item)
            for other in sorted(neighbours[item] - seen):
                seen.add(other)
                pending.append(other)
        parts.append(sorted(part))
    return parts


def _balance_set(cells: Sequence[Cell]) -> BalanceSet:
    step = int(np.lcm.reduce([cell.slots for cell in cells]))
    if len(cells) == 1:
        # Nothing to agree with: count in units.
        return BalanceSet((Cell(cells[0].group, cells[0].units, 1),), 1)
    return BalanceSet(tuple(cells), step)
