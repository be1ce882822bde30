"""From importance and constraints to a plan: which units of each group stay."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import ceil, gcd

import numpy as np

from onnxprune.analyse import DependencyGraph
from onnxprune.errors import UsageError
from onnxprune.types import Absorption, BalanceSet, Cell, ChannelGroup, Float64Array, IntArray

SCOPES = ("local", "global", "isomorphic")
MAX_RATIO = 0.9  # most that `global` takes from any one group, unless told otherwise
_log = logging.getLogger(__name__)
_SLACK = 1e-9  # so that 0.3 · 10 removes 3


@dataclass(frozen=True, repr=False)
class PruningPlan:
    """What each group keeps, and why.

    Attributes:
        graph: The analysis the plan was made on.
        keep: Positions of the units that stay, ascending, for each prunable group by id.
        why: One line for each group by id: what was done, or why nothing was.
        absorbed: What dropped constants gave to the nodes that read them, to be made up for.
    """

    graph: DependencyGraph
    keep: Mapping[int, IntArray]
    why: Mapping[int, str] = field(default_factory=dict)
    absorbed: tuple[Absorption, ...] = ()

    @property
    def removes(self) -> int:
        """Number of units that go."""
        kept = sum(units.size for units in self.keep.values())
        return sum(group.size for group in self.graph.prunable) - kept

    def __repr__(self) -> str:
        units = sum(group.size for group in self.graph.prunable)
        return f"PruningPlan({self.removes} of {units} units removed)"

    def __str__(self) -> str:
        lines = [f"{'group':>5}  {'size':>5}  {'kept':>5}  name"]
        for group in self.graph.groups:
            kept = self.keep[group.id].size if group.id in self.keep else group.size
            why = f"frozen: {group.frozen}" if group.frozen else self.why.get(group.id, "")
            lines.append(f"{group.id:>5}  {group.size:>5}  {kept:>5}  {group.name}  {why}".rstrip())
        return "\n".join(lines)


def select(
    graph: DependencyGraph,
    importance: Mapping[int, Float64Array],
    *,
    ratio: float,
    scope: str = "local",
    round_to: int | Mapping[int, int] = 1,
    min_channels: int = 1,
    max_ratio: float = MAX_RATIO,
    ignore: str | Sequence[str] = (),
    only: str | Sequence[str] = (),
    ratio_for: Mapping[str, float] | None = None,
    group_ratios: Mapping[int, float] | None = None,
    comparable: bool = False,
    price: Mapping[int, float] | None = None,
) -> PruningPlan:
    """Choose what stays.

    Args:
        graph: From ``analyse``.
        importance: For each prunable group by id, shape (units,); higher stays.
        ratio: Share of units to remove, 0 <= ratio < 1.
        scope: ``local`` removes the ratio from each group, ``global`` the lowest over all groups,
            ``isomorphic`` the lowest over all groups of one kind.
        round_to: Units left are a multiple of this, never removing more than asked; or what they
            are a multiple of for each group, by group id.
        min_channels: Units that stay in every group.
        max_ratio: Most that ``global`` takes from any one group.
        ignore: Pattern or patterns; groups whose producers match are kept whole.
        only: Pattern or patterns; groups without a matching producer are kept whole.
        ratio_for: Another ratio for groups whose producers match a pattern.
        group_ratios: Another ratio for groups by id, before any pattern; such as a sensitivity
            run allows.
        comparable: Importances compare across groups as they are; else each group's are divided
            by their mean before ``global`` ranks them.
        price: What one unit of each group saves, by group id; ``global`` then ranks importance for
            what it costs.

    Returns:
        The plan.

    Raises:
        UsageError: A value is out of range or a pattern matches nothing.

    Source: local and global thresholds as in Network Slimming (arXiv:1708.06519) and
        Torch-Pruning; ``isomorphic``: Fang et al. 2024 (arXiv:2407.04616); rounding within the
        ranking as in DESIGN §6.
    """
    _check(ratio, scope, round_to, min_channels, max_ratio)
    if scope == "local" and max_ratio != MAX_RATIO:
        _log.warning("max-ratio %g has no effect: it is for scope global", max_ratio)
    start = {group.id: (group_ratios or {}).get(group.id, ratio) for group in graph.prunable}
    ratios, why = _ratios(graph, start, patterns(ignore), patterns(only), ratio_for or {})
    chosen = _Chooser(graph, importance, round_to, min_channels, price or {})
    if scope != "local":
        chosen.cut_global(ratios, max_ratio, comparable=comparable, kinds=scope == "isomorphic")
    else:
        for balance in graph.balance_sets:
            chosen.cut(balance, min(ratios[cell.group] for cell in balance.cells))
    keep = {identifier: np.flatnonzero(kept) for identifier, kept in chosen.kept.items()}
    for group in graph.prunable:
        left = keep[group.id].size
        why.setdefault(group.id, f"{group.size - left} of {group.size} removed")
    return PruningPlan(graph, keep, why)


def patterns(given: str | Sequence[str]) -> tuple[str, ...]:
    """One pattern or several as a tuple: a string is one, not its letters."""
    return (given,) if isinstance(given, str) else tuple(given)


def kept_whole(
    graph: DependencyGraph, ignore: Sequence[str], only: Sequence[str]
) -> dict[int, str]:
    """Prunable groups that patterns keep whole, by id, and why.

    Raises:
        UsageError: A pattern matches nothing.
    """
    whole = dict.fromkeys((group.id for group in graph.prunable), 0.0)
    return _ratios(graph, whole, ignore, only, {})[1]


def _check(
    ratio: float, scope: str, round_to: int | Mapping[int, int], min_channels: int, max_ratio: float
) -> None:
    if not 0 <= ratio < 1:
        raise UsageError(f"ratio is {ratio:g}", hint="give 0 <= ratio < 1")
    if scope not in SCOPES:
        raise UsageError(f"scope is '{scope}'", hint=f"give one of {', '.join(SCOPES)}")
    if isinstance(round_to, int) and round_to < 1:
        raise UsageError(f"round-to is {round_to}", hint="give 1 or more")
    if min_channels < 1:
        raise UsageError(f"min-channels is {min_channels}", hint="give 1 or more")
    if not 0 <= max_ratio < 1:
        raise UsageError(f"max-ratio is {max_ratio:g}", hint="give 0 <= max-ratio < 1")


def _ratios(
    graph: DependencyGraph,
    start: Mapping[int, float],
    ignore: Sequence[str],
    only: Sequence[str],
    ratio_for: Mapping[str, float],
) -> tuple[dict[int, float], dict[int, str]]:
    ratios = dict(start)
    why: dict[int, str] = {}
    for pattern, special in ratio_for.items():
        if not 0 <= special < 1:
            raise UsageError(
                f"ratio-for '{pattern}': the ratio is {special:g}", hint="give 0 <= ratio < 1"
            )
        for group in _matching(graph, pattern, "ratio-for", wants_some=True):
            ratios[group.id] = special
    wanted: set[int] = set()
    for pattern in only:
        wanted |= {group.id for group in _matching(graph, pattern, "only", wants_some=True)}
    for group in graph.prunable:
        if only and group.id not in wanted:
            ratios[group.id] = 0.0
            why[group.id] = "kept: no pattern of only matches"
    for pattern in ignore:
        for group in _matching(graph, pattern, "ignore"):
            ratios[group.id] = 0.0
            why[group.id] = f"kept: ignore '{pattern}'"
    return ratios, why


def _matching(
    graph: DependencyGraph, pattern: str, option: str, *, wants_some: bool = False
) -> list[ChannelGroup]:
    """Prunable groups that a pattern speaks of, by the names of producing nodes and weights.

    Args:
        graph: From ``analyse``.
        pattern: As the shell has them.
        option: What the pattern was given for.
        wants_some: Warn if there are none.

    Raises:
        UsageError: No node or constant of the model matches.
    """
    spoken_of = [
        group
        for group in graph.groups
        if any(
            fnmatchcase(name, pattern)
            for axis in group.producers
            for name in (axis.tensor, axis.node)
        )
    ]
    found = [group for group in spoken_of if group.frozen is None]
    if not found:
        names = [node.label for node in graph.graph.nodes]
        names += [name for node in graph.graph.nodes for name in (*node.inputs, *node.outputs)]
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UsageError(
                f"{option} '{pattern}' matches no node or tensor",
                hint="`onnxprune inspect MODEL -v` lists the names",
            )
        if wants_some:
            reasons = {group.frozen for group in spoken_of} or {"no weight of that name makes them"}
            _log.warning(
                "%s '%s' matches no channels that can go: %s",
                option,
                pattern,
                "; ".join(map(str, reasons)),
            )
    return found


def _kind(group: ChannelGroup) -> str:
    """What makes groups alike: how their channels are made and read, and what one unit is."""
    made = sorted({(axis.op_type, axis.view[2:]) for axis in group.producers})
    read = sorted({(axis.op_type, axis.view[2:]) for axis in group.consumers})
    return repr((group.unit, made, read))


class _Chooser:
    """Applies ratios to balance sets, lowest importance first, ties by index."""

    def __init__(
        self,
        graph: DependencyGraph,
        importance: Mapping[int, Float64Array],
        round_to: int | Mapping[int, int],
        min_channels: int,
        price: Mapping[int, float],
    ) -> None:
        self.graph = graph
        self.price = price
        self._needs: dict[int, tuple[int, int]] = {}  # multiple and floor of each balance set
        self.importance = importance
        self.round_to = round_to
        self.min_channels = min_channels
        self.kept = {group.id: np.ones(group.size, np.bool_) for group in graph.prunable}
        self.groups = {group.id: group for group in graph.prunable}

    def cut(self, balance: BalanceSet, ratio: float) -> None:
        """Remove the ratio from every cell of a set."""
        self._remove(balance, self._drops(balance, ratio))

    def _drops(self, balance: BalanceSet, ratio: float) -> list[int]:
        """Units each cell loses: a function of its slots, so that rows agree."""
        if id(balance) not in self._needs:  # asked for at every level of every set
            floor = max(ceil(self.min_channels / self._rows(cell)) for cell in balance.cells)
            self._needs[id(balance)] = (self._multiple(balance), floor)
        multiple, floor = self._needs[id(balance)]
        drops: dict[int, int] = {}
        for cell in balance.cells:
            size = cell.units.size * cell.slots
            if size in drops:
                continue
            drop = int(ratio * size + _SLACK) // balance.step * balance.step
            left = size - drop
            step = int(np.lcm(balance.step, multiple))
            left = min(size, ceil(left / step) * step) if step > 1 else left
            least = min(size, floor * cell.slots)
            left = max(left, ceil(least / balance.step) * balance.step)
            drops[size] = (size - min(left, size)) // balance.step * balance.step
        return [drops[cell.units.size * cell.slots] // cell.slots for cell in balance.cells]

    def _rows(self, cell: Cell) -> int:
        return len(self.groups[cell.group].cells)

    def _multiple(self, balance: BalanceSet) -> int:
        """Slots left in a row are a multiple of this, so that widths are of ``round_to``."""
        needed = []
        for cell in balance.cells:
            step = self._step(cell.group)
            needed.append(step // gcd(step, self._rows(cell)) * cell.slots)
        return int(np.lcm.reduce(needed))

    def _step(self, group: int) -> int:
        return self.round_to if isinstance(self.round_to, int) else self.round_to.get(group, 1)

    def _remove(self, balance: BalanceSet, drops: Sequence[int]) -> None:
        for cell, drop in zip(balance.cells, drops, strict=True):
            order = self._order(cell)
            self.kept[cell.group][cell.units[order[:drop]]] = False

    def _order(self, cell: Cell) -> IntArray:
        """Positions in the cell, least important first."""
        values = self.importance[cell.group][cell.units]
        return np.argsort(np.nan_to_num(values, nan=-np.inf, posinf=np.inf), kind="stable")

    # -- global --------------------------------------------------------------------------------

    def cut_global(
        self, ratios: Mapping[int, float], max_ratio: float, *, comparable: bool, kinds: bool
    ) -> None:
        """Remove the lowest share of all units, whole steps of a balance set at a time.

        With ``kinds`` the share is taken from each kind of group by itself.
        """
        asked = max(ratios.values(), default=0.0)
        open_sets = [
            b for b in self.graph.balance_sets if min(ratios[c.group] for c in b.cells) > 0
        ]
        special = [b for b in open_sets if any(ratios[c.group] != asked for c in b.cells)]
        for balance in special:
            self.cut(balance, min(ratios[c.group] for c in balance.cells))
        ranked = [b for b in open_sets if not any(b is other for other in special)]
        rivals: dict[object, list[BalanceSet]] = {}
        for balance in ranked:
            kind = tuple(sorted(_kind(self.groups[cell.group]) for cell in balance.cells))
            rivals.setdefault(kind if kinds else "", []).append(balance)
        for members in rivals.values():
            self._compete(members, asked, max_ratio, comparable)

    def _compete(
        self, ranked: Sequence[BalanceSet], asked: float, max_ratio: float, comparable: bool
    ) -> None:
        budget = int(asked * sum(self._units(b) for b in ranked) + _SLACK)
        steps = [
            (value, number, drops)
            for number, balance in enumerate(ranked)
            for value, drops in self._levels(balance, max_ratio, comparable)
        ]
        done: dict[int, list[int]] = {}
        closed: set[int] = set()
        for _, number, drops in sorted(steps, key=lambda step: (step[0], step[1], sum(step[2]))):
            extra = sum(drops) - sum(done.get(number, ()))
            if number in closed or extra > budget:
                closed.add(number)
                continue
            budget -= extra
            done[number] = drops
        for number, drops in done.items():
            self._remove(ranked[number], drops)

    def _units(self, balance: BalanceSet) -> int:
        return sum(cell.units.size for cell in balance.cells)

    def _levels(
        self, balance: BalanceSet, max_ratio: float, comparable: bool
    ) -> list[tuple[float, list[int]]]:
        """Every amount a set can lose, with the mean importance of what the last step takes.

        The values never fall from one level to the next, so that a set is cut in order.
        """
        sizes = [cell.units.size * cell.slots for cell in balance.cells]
        most = self._drops(balance, max_ratio)
        levels: list[list[int]] = []
        for slots in range(1, max(sizes) + 1):
            drops = self._drops(balance, slots / max(sizes))
            if drops != (levels[-1] if levels else [0] * len(drops)):
                if any(d > m for d, m in zip(drops, most, strict=True)):
                    break
                levels.append(drops)
        cumulative = [self._cumulative(cell, comparable) for cell in balance.cells]
        result: list[tuple[float, list[int]]] = []
        before, highest = [0] * len(sizes), -np.inf
        for drops in levels:
            pairs = list(zip(cumulative, before, drops, strict=True))
            taken = sum(d - b for _, b, d in pairs)
            value = sum(float(c[d] - c[b]) for c, b, d in pairs) / max(taken, 1)
            highest = max(highest, value / self._price(balance))
            result.append((highest, drops))
            before = drops
        return result

    def _price(self, balance: BalanceSet) -> float:
        """What a unit of a set saves in the mean, 1 where nobody said."""
        if not self.price:
            return 1.0
        prices = [self.price[cell.group] for cell in balance.cells]
        return max(sum(prices) / len(prices), np.finfo(np.float64).tiny)

    def _cumulative(self, cell: Cell, comparable: bool) -> Float64Array:
        values = self.importance[cell.group]
        finite = np.nan_to_num(values, nan=0.0, posinf=np.finfo(np.float64).max / 1e9)
        if not comparable:
            mean = float(np.mean(finite)) or 1.0
            finite = finite / mean
        ordered = finite[cell.units[self._order(cell)]]
        return np.concatenate([[0.0], np.cumsum(ordered)])
