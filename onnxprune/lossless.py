"""Channels that provably have no effect, and the plan that removes them.

A channel may go where every weight that reads it is zero, or reads only into channels that have no
effect themselves, or where the channel is a constant. A constant of 0 vanishes; any other moves to
the bias of what reads it. Beneath zero padding it makes a border instead, which no bias can make:
there constant channels are gathered into one of them, which stays.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from onnxprune import fields
from onnxprune.bounds import Bounds, find_bounds
from onnxprune.groups import NOT_READ, DependencyGraph, constraints, units_to_drop
from onnxprune.readers import Site, find_sites, taps
from onnxprune.select import PruningPlan, kept_whole
from onnxprune.shapefix import repairs
from onnxprune.survivors import Survivors
from onnxprune.types import (
    Absorption,
    BalanceSet,
    BoolArray,
    Cell,
    ChannelGroup,
    Float64Array,
    IntArray,
)

_PRODUCTS = {"MatMul", "FusedMatMul", "Gemm", "FusedGemm"}
# What it takes to remove a channel: it is gone already … it cannot be removed.
_GONE, _FREE, _ABSORBED, _GATHERED, _NEEDED = range(5)


def lossless_plan(
    graph: DependencyGraph, *, ignore: Sequence[str] = (), only: Sequence[str] = ()
) -> PruningPlan:
    """The plan that removes every channel without effect that can be removed.

    Args:
        graph: From ``analyse``.
        ignore: Patterns; groups whose producers match are kept whole.
        only: Patterns; groups without a matching producer are kept whole.

    Returns:
        The plan, with what its constant channels contributed in ``absorbed``; its graph also has
        the groups that no weight reads among the prunable ones. Rows that must keep equal counts
        drop as many as all of them can, and no group is emptied.

    Raises:
        UsageError: A pattern matches nothing.
    """
    wide = _with_unread(graph)
    plan = _Search(wide).plan(kept_whole(wide, ignore, only))
    if wide is graph or _fits(plan):
        return plan
    return _Search(graph).plan(kept_whole(graph, ignore, only))


def without_effect(graph: DependencyGraph) -> int:
    """Channels that ``lossless_plan`` removes, counted along the producers' axis."""
    plan = lossless_plan(graph)
    return sum(
        int((~np.isin(group.producers[0].unit, plan.keep[group.id])).sum())
        for group in plan.graph.prunable
    )


def _with_unread(graph: DependencyGraph) -> DependencyGraph:
    """The same graph, groups that no weight reads free to be cut unless they share rows."""
    rows = [constraint.labels.reshape(-1) for constraint in constraints(graph.tracer)]
    bound = np.concatenate([np.zeros(0, np.int64), *rows])
    free = [
        group.id
        for group in graph.groups
        if group.frozen == NOT_READ and not np.isin(group.classes, bound).any()
    ]
    if not free:
        return graph
    groups = tuple(replace(g, frozen=None) if g.id in free else g for g in graph.groups)
    alone = [Cell(g.id, np.arange(g.size), 1) for g in groups if g.id in free]
    sets = (*graph.balance_sets, *(BalanceSet((cell,), 1) for cell in alone))
    return replace(graph, groups=groups, balance_sets=sets)


def _fits(plan: PruningPlan) -> bool:
    """Whether a cut that the analysis did not try leaves boxes in order and writable shapes."""
    tracer = plan.graph.tracer
    left = [Survivors(trace, plan.graph.dead(plan.keep)) for trace in tracer.traces]
    return not any(one.misfits(tracer) for one in left) and not repairs(tracer, left).misfits


@dataclass
class _Search:
    """The search for channels without effect.

    Attributes:
        graph: The analysis.
        bounds: Values that tensors can take.
        sites: Nodes that read channels with a constant weight.
        opaque: Labels of channels that something else reads.
        needed: For each site, which of its inputs an output that counts reads.
        unread: By label: nothing that has an effect reads it.
        settled: By label: outputs that did not count when ``needed`` was found; None before.
        part: By label: in which groups of convolutions the channel is read.
        taken: By group and part: label of the constant channel that takes in the others.
        into: By label of these others: that label.
    """

    graph: DependencyGraph
    bounds: Bounds = field(init=False)
    sites: list[Site] = field(init=False)
    opaque: IntArray = field(init=False)
    needed: list[BoolArray] = field(init=False)
    unread: BoolArray = field(init=False)
    settled: BoolArray | None = None
    part: IntArray = field(init=False)
    taken: dict[tuple[int, int], int] = field(default_factory=dict)
    into: IntArray = field(init=False)

    def __post_init__(self) -> None:
        self.table = self.graph.tracer.table
        self.trace = self.graph.tracer.traces[0]
        self.bounds = find_bounds(self.graph)
        self.sites = list(find_sites(self.graph, self.bounds))
        self.opaque = self._opaque()
        self.needed = [np.ones(site.read.size, np.bool_) for site in self.sites]
        self.unread = np.zeros(self.table.size, np.bool_)
        self.into = np.zeros(self.table.size, np.int64)
        self.part = np.zeros(self.table.size, np.int64)
        for site in self.sites:
            if site.group > 1:
                row = np.arange(site.read.size) * site.group // site.read.size
                self.part[site.read] = self.part[site.read] * site.group + row

    def _opaque(self) -> IntArray:
        """Labels of channels that are read in a way nothing here understands."""
        known = {site.node.index for site in self.sites}
        found = [np.zeros(0, np.int64)]
        for birth in self.table.births:
            slots = np.arange(birth.base, birth.base + birth.size)
            consuming = slots[self.graph.tracer.consuming[slots]]
            if consuming.size and not self._readers(birth.leaf) <= known:
                found.append(self.table.labels[consuming])
        for contraction in self.trace.contractions:
            effect = contraction.effect
            labels = -self.table.classes(effect.field).reshape(-1)
            plain = contraction.node.op_type in _PRODUCTS  # others may add to what they are given
            operands = contraction.node.inputs[:2] if plain else ()
            zero = [np.zeros(0, np.int64), *(self._zero_labels(name) for name in operands)]
            found.append(np.setdiff1d(labels, np.concatenate(zero)))
        for site in self.sites:
            if site.node.outputs[0] in self.bounds.wild:
                found.append(site.read)  # 0 times NaN is NaN
            found += [
                -self.table.classes(f).reshape(-1)
                for f in self.trace.fields.get(site.node.inputs[1 - site.weight], ())
                if f.shape[site.along] > 1 and len(fields.varying(f)) > 1
            ]
        return np.unique(np.concatenate(found))

    def _readers(self, name: str) -> set[int]:
        """Nodes that read a constant as data, past those that only present it."""
        graph = self.graph.graph
        found: set[int] = set()
        for node, _ in graph.consumers.get(name, ()):
            if any(output in graph.derived for output in node.outputs):
                for output in node.outputs:
                    found |= self._readers(output)
            elif node.op_type != "Shape":
                found.add(node.index)
        return found

    def _zero_labels(self, name: str) -> IntArray:
        """Labels of which every element of a tensor is 0."""
        found = self.bounds.of(name)
        zero = [np.zeros(0, np.int64)]
        for f in self.trace.fields.get(name, ()):
            labels = -self.table.classes(f)
            if found is not None:
                moving = fields.varying(f)
                flat = found.hull([a for a in range(found.rank) if a not in moving])
                nothing = np.broadcast_to(flat.zero, labels.shape)
                zero.append(np.setdiff1d(labels[nothing], labels[~nothing]))
        return np.concatenate(zero)

    # -- what may go ---------------------------------------------------------------------------

    def _update(self, gone: BoolArray) -> None:
        """Find again what is needed, now that some channels are gone.

        Nothing that an output reads counts once that output is gone or has no effect itself.
        """
        due = [n for n, site in enumerate(self.sites) if self._news(site, gone | self.unread)]
        while due:
            for number in due:
                self.needed[number] = self._reads(self.sites[number], gone | self.unread)
            self.settled = gone | self.unread
            needed = np.zeros(self.table.size, np.bool_)
            needed[self.opaque] = True
            for site, reads in zip(self.sites, self.needed, strict=True):
                needed[site.read[reads]] = True
            self.unread = ~needed & ~self.table.frozen[: self.table.size]
            due = [n for n, site in enumerate(self.sites) if self._news(site, gone | self.unread)]

    def _news(self, site: Site, ignored: BoolArray) -> bool:
        """Whether a site was last looked at when more of its outputs counted."""
        return self.settled is None or bool((ignored & ~self.settled)[site.made].any())

    def _reads(self, site: Site, ignored: BoolArray) -> BoolArray:
        """Which inputs of a site some output that counts reads."""
        nonzero = (taps(site, self.bounds) != 0).any(axis=-1)
        made = site.made.reshape(site.group, -1, 1)
        read = site.read.reshape(site.group, 1, -1)
        counts = ~ignored[made]
        if np.intersect1d(made, read).any():
            # What a depthwise filter makes goes together with what it reads.
            counts = counts & ((made != read) | (made == 0))
        return np.asarray((nonzero & counts).any(axis=1).reshape(-1))

    def _efforts(self) -> IntArray:
        """What it takes to remove each label: one of ``_FREE`` … ``_NEEDED``."""
        effort = np.full(self.table.size, _FREE)
        effort[self.opaque] = _NEEDED
        for site, reads in zip(self.sites, self.needed, strict=True):
            worth = np.full(site.read.size, _NEEDED)
            if site.even or self._gathers(site):
                worth[np.isfinite(site.value)] = _ABSORBED if site.even else _GATHERED
            worth[(site.value == 0) | ~reads] = _FREE
            np.maximum.at(effort, site.read, worth)
        return effort

    def _gathers(self, site: Site) -> bool:
        """Whether columns of a site's weight can be added to one of them."""
        constant = self.graph.graph.constants.get(site.node.inputs[site.weight])
        alone = constant is not None and constant.pinned is None
        labels = site.read[site.read != 0]
        distinct = np.unique(labels).size == labels.size
        return alone and distinct and self._is_float(site)

    def _is_float(self, site: Site) -> bool:
        name = site.node.inputs[site.weight]
        weight = self.graph.graph.constants[name].weight
        single = len(self.graph.graph.consumers.get(name, ())) == 1
        return single and (weight.dtype.kind == "f" or weight.dtype.name == "bfloat16")

    def plan(self, whole: Mapping[int, str]) -> PruningPlan:
        """The plan: what goes may free others, so this repeats until nothing more goes."""
        groups = self.graph.prunable
        keep = {group.id: np.ones(group.size, np.bool_) for group in groups}
        gone = np.zeros(self.table.size, np.bool_)
        while True:
            self._update(gone)
            effort = self._efforts()
            gathered = effort == _GATHERED
            for group in groups:
                for part in np.unique(self.part[group.classes]):
                    self._gather(group, int(part), effort)
            effort[gone] = _GONE
            for balance in self.graph.balance_sets:
                if not any(cell.group in whole for cell in balance.cells):
                    self._drop(balance, effort, keep)
            before = gone.copy()
            for group in groups:
                gone[group.classes[~keep[group.id]]] = True
            if (gone == before).all():
                break
        why = {
            group.id: whole.get(group.id) or _why(keep[group.id], gathered[group.classes])
            for group in groups
        }
        kept = {identifier: np.flatnonzero(kept) for identifier, kept in keep.items()}
        return PruningPlan(self.graph, kept, why, tuple(self._absorbed(gone)))

    def _gather(self, group: ChannelGroup, part: int, effort: IntArray) -> None:
        """Choose the constant channel that takes in the other ones of its part, or keep all.

        Once chosen it stays.
        """
        labels = group.classes[self.part[group.classes] == part]
        labels = labels[effort[labels] == _GATHERED]
        if not labels.size:
            return
        taken = self.taken.get((group.id, part))
        options = labels if taken is None else np.array([taken])
        least = self._least(options, labels)
        best = int(np.argmax(least))
        if least[best] > 0:
            self.taken[group.id, part] = int(options[best])
            self.into[labels] = options[best]
            effort[options[best]] = _NEEDED
        else:
            effort[labels] = _NEEDED

    def _least(self, options: IntArray, labels: IntArray) -> Float64Array:
        """Least absolute value of each option over all sites that read one of ``labels``."""
        least = np.full(options.size, np.inf)
        for site, reads in zip(self.sites, self.needed, strict=True):
            if site.even or not (np.isin(site.read, labels) & reads & (site.value != 0)).any():
                continue
            place = {int(label): k for k, label in enumerate(site.read) if label}
            at = np.array([place.get(int(label), -1) for label in options])
            value = np.where(at >= 0, np.abs(np.nan_to_num(site.value[at])), 0.0)
            least = np.minimum(least, value)
        return least

    def _drop(self, balance: BalanceSet, effort: IntArray, keep: Mapping[int, BoolArray]) -> None:
        """Drop as many units of each cell as all cells of its set can."""
        orders, most = [], []
        for cell in balance.cells:
            efforts = effort[self.graph.groups[cell.group].classes[cell.units]]
            orders.append(np.argsort(efforts, kind="stable"))
            most.append(min(int((efforts < _NEEDED).sum()), cell.units.size - 1))
        widest = max(cell.units.size * cell.slots for cell in balance.cells)
        for slots in range(widest, 0, -1):
            drops = [units_to_drop(cell, balance.step, slots / widest) for cell in balance.cells]
            if all(drop <= can for drop, can in zip(drops, most, strict=True)):
                for cell, order, drop in zip(balance.cells, orders, drops, strict=True):
                    keep[cell.group][cell.units[order[:drop]]] = False
                return

    def _absorbed(self, gone: BoolArray) -> Iterator[Absorption]:
        """What the dropped constants gave to each site."""
        for site, reads in zip(self.sites, self.needed, strict=True):
            dropped = gone[site.read] & reads & (np.nan_to_num(site.value) != 0)
            if not dropped.any():
                continue
            if site.even:
                weight = taps(site, self.bounds).astype(np.float64).sum(axis=-1)
                value = np.where(dropped, site.value, 0).reshape(site.group, -1, 1)
                yield Absorption(site.node.index, bias=(weight @ value).reshape(-1))
                continue
            place = {int(label): k for k, label in enumerate(site.read)}
            source = np.flatnonzero(dropped)
            target = np.array([place[int(label)] for label in self.into[site.read[source]]])
            factor = site.value[source] / site.value[target]
            yield Absorption(
                site.node.index,
                weight=site.node.inputs[site.weight],
                axis=site.axis,
                group=site.group,
                source=source,
                target=target,
                factor=factor,
            )


def _why(kept: BoolArray, uneven: BoolArray) -> str:
    """What was done to a group; ``uneven``: constants that zero padding makes a border of."""
    gone, stay = kept.size - int(kept.sum()), int((kept & uneven).sum())
    said = f"{gone} of {kept.size} without effect" if gone else "no channel is without effect"
    return f"{said}; constants kept beneath zero padding: {stay}" if stay else said
