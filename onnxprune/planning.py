"""From a wish to a plan: a ratio or targets, one ranking or the best of several."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice

import numpy as np

from onnxprune.aim import Keep, aim
from onnxprune.budget import Budget, shares
from onnxprune.data import Data
from onnxprune.errors import TargetError
from onnxprune.groups import DependencyGraph
from onnxprune.model import Model
from onnxprune.restore import refit
from onnxprune.rewrite import operate
from onnxprune.runtime import session
from onnxprune.score import COMPARABLE, Importance, Scorer, score
from onnxprune.select import MAX_RATIO, PruningPlan, select
from onnxprune.types import AnyArray, Float64Array, IntArray

_JUDGED_ON = 64  # samples that plans are compared on
_FITTED = 0.75  # share of the data that plans are refitted to, to be compared on the rest
_ROUNDING = 1e-9  # of an output's square: less of variation is noise
_MEASURED = ", groups measured"  # after the method of a ranking that compares across groups
_TINY = 1e-30  # below 0 by this: less than any importance, and nothing in a mean
_ALONE = 0.25  # share of a group that goes to see what the group is worth
# Rankings that `auto` tries on calibration data: method, whether groups are weighed by what cutting
# each of them alone does to the outputs, and the scope where none is asked for.
_TRIED = (
    ("wanda", True, "global"),
    ("obs", True, "global"),
    ("wanda", False, "isomorphic"),
    ("wanda", False, "global"),
    ("lamp", False, "global"),
    ("activation", False, "isomorphic"),
)

Latency = Callable[[Keep], float]


@dataclass(frozen=True)
class Wish:
    """How much is to go, and within what limits; fields as in ``select``.

    Attributes:
        targets: Share to be left of each cost; {} where a ratio is asked for.
        scope: None takes ``local`` for a ratio and ``isomorphic`` for targets.
    """

    ratio: float = 0.0
    targets: Mapping[str, float] = field(default_factory=dict)
    scope: str | None = None
    round_to: int | Mapping[int, int] = 1
    min_channels: int = 1
    max_ratio: float = MAX_RATIO
    ignore: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    ratio_for: Mapping[str, float] = field(default_factory=dict)
    group_ratios: Mapping[int, float] | None = None

    @property
    def where(self) -> str:
        """The scope that is taken."""
        return self.scope or ("isomorphic" if self.targets else "local")

    def part(self, share: float) -> Wish:
        """A share of what is to go: for a step on the way."""
        if share == 1:
            return self
        ratios = self.group_ratios
        return replace(
            self,
            ratio=share * self.ratio,
            targets={name: 1 - share * (1 - left) for name, left in self.targets.items()},
            ratio_for={pattern: share * ratio for pattern, ratio in self.ratio_for.items()},
            group_ratios=None if ratios is None else {g: share * r for g, r in ratios.items()},
        )


@dataclass
class Planner:
    """Makes plans for one analysed model.

    Attributes:
        graph: The analysis.
        wish: What is wanted.
        data: Calibration data, or None.
        aggregate: As in ``score``, where several rankings are tried.
        latency: Share of the latency that a plan leaves, where that is a target.
        ranked: The analysis on other weights, to rank by; None ranks by ``graph``'s.
        gone: Units of each group, by id, that went in an earlier step and stay away.
    """

    graph: DependencyGraph
    wish: Wish
    data: Data | None = None
    aggregate: str | None = None
    latency: Latency | None = None
    ranked: DependencyGraph | None = None
    gone: Mapping[int, IntArray] = field(default_factory=dict)

    def scored(self, method: str | Scorer, seed: int) -> Importance:
        """Importance as ``score`` gives it; what is gone comes below all else."""
        graph = self.ranked or self.graph
        found = score(graph, method, aggregate=self.aggregate, data=self.data, seed=seed)
        if not any(units.size for units in self.gone.values()):
            return found
        values = {group: np.array(found[group], np.float64) for group in found}
        for group, units in self.gone.items():
            low = min(0.0, float(values[group].min(initial=0.0)))
            values[group][units] = low - max(_TINY, abs(low) * _ROUNDING)
        return Importance(values, found.method, found.why)

    def plan(self, values: Importance) -> PruningPlan:
        """The plan by one ranking.

        Raises:
            TargetError: A target is out of reach.
        """
        if not self.wish.targets:
            return self._cut(values, self.wish.ratio)
        return aim(
            self.graph, self.wish.targets, lambda ratio: self._cut(values, ratio), self.left
        ).plan

    def within(self, scope: str) -> Planner:
        """The same planner, in another scope."""
        wish = self.wish
        return self if scope == wish.where else replace(self, wish=replace(wish, scope=scope))

    def left(self, keep: Keep) -> Mapping[str, float]:
        """Share that a plan leaves of each cost."""
        found = dict(shares(self.budget.of(keep), self.budget.whole))
        if self.latency is not None:
            found["latency"] = self.latency(keep)
        return found

    @cached_property
    def budget(self) -> Budget:
        """Costs of the model's cuts."""
        return Budget(self.graph)

    def _cut(self, values: Importance, ratio: float) -> PruningPlan:
        wish = self.wish
        comparable = values.method in COMPARABLE or values.method.endswith(_MEASURED)
        price = None
        if wish.targets and wish.where != "local" and comparable:
            measure = next(iter(wish.targets)).replace("latency", "macs")
            price = {
                group: float(getattr(bill, measure))
                for group, bill in self.budget.per_unit.items()
            }  # fmt: skip
        return select(
            self.graph,
            values,
            ratio=ratio,
            group_ratios=wish.group_ratios,
            scope=wish.where,
            round_to=wish.round_to,
            min_channels=wish.min_channels,
            max_ratio=wish.max_ratio,
            ignore=wish.ignore,
            only=wish.only,
            ratio_for=wish.ratio_for,
            comparable=comparable,
            price=price,
        )

    # -- the best of several -------------------------------------------------------------------

    def best(self, seed: int) -> tuple[PruningPlan, str, str]:
        """The plan of the ranking whose cut moves the outputs least on the calibration data.

        Returns:
            The plan, its method, and why that one, in words.
        """
        assert self.data is not None
        judge = Judge(self.graph, self.data)
        tried: list[tuple[float, str, PruningPlan]] = []
        known: dict[str, Importance] = {}
        beyond: TargetError | None = None
        for method, weighed, scope in _TRIED:
            planner = self
            if self.wish.scope is None and self.wish.targets:
                planner = replace(self, wish=replace(self.wish, scope=scope))
            if method in known and planner.wish.where == "local":
                continue  # what groups are worth does not matter there
            if method not in known:
                known[method] = self.scored(method, seed)
            across = weighed and planner.wish.where != "local"
            values = judge.weighed(known[method]) if across else known[method]
            try:
                plan = planner.plan(values)
            except TargetError as error:  # another scope may take more of a group
                beyond = beyond or error
                continue
            tried.append((judge.drift(operate(plan).model), values.method, plan))
        if not tried and beyond is not None:
            raise beyond
        least = min(range(len(tried)), key=lambda number: tried[number][0])
        drift, method, plan = tried[least]
        others = ", ".join(f"{name} {value:.3g}" for value, name, _ in tried if name != method)
        return plan, method, f"moves the outputs least on your data: {drift:.3g} ({others})"

    def best_restored(self, seed: int) -> tuple[PruningPlan, str, str]:
        """The plan to be refitted afterwards: by the cost after the refit.

        For targets the groups may give unequally; whether they should is tried.
        """
        assert self.data is not None
        values = self.scored("obs", seed)
        if not self.wish.targets or self.wish.scope is not None:
            return self.plan(values), "obs", "least error after refitting to your data"
        trial = Trial(self.graph, self.data, seed)
        tried = []
        beyond: TargetError | None = None
        for scope, ranked in (("local", values), ("global", trial.judge.weighed(values))):
            try:
                plan = replace(self, wish=replace(self.wish, scope=scope)).plan(ranked)
            except TargetError as error:
                beyond = beyond or error
                continue
            tried.append((trial.drift(plan), scope, plan))
        if not tried and beyond is not None:
            raise beyond
        least = min(tried, key=lambda one: one[0])
        said = ", ".join(f"{scope} {drift:.3g}" for drift, scope, _ in tried)
        return least[2], "obs", f"{least[1]} moves the outputs least after a refit ({said})"


class Trial:
    """Judges cuts by what is left of them after a refit, on samples that the refit has not seen.

    What a refit has seen it can learn by heart: that says nothing about other samples.
    """

    def __init__(self, graph: DependencyGraph, data: Data, seed: int) -> None:
        self.seed = seed
        self.fitted = _some(data, most=round(_FITTED * data.samples)) or data
        unseen = _some(data, past=len(self.fitted.batches), most=data.samples)
        self.judge = Judge(graph, unseen or self.fitted)

    def drift(self, plan: PruningPlan) -> float:
        """How far the outputs move once the cut has been refitted."""
        made, _, _ = refit(plan, operate(plan).model, self.fitted, seed=self.seed)
        return self.judge.drift(made)


class Judge:
    """How far cuts move the outputs on a few samples of calibration data."""

    def __init__(self, graph: DependencyGraph, data: Data) -> None:
        self.graph = graph
        self.batches = (_some(data) or data).batches
        self.expected = self._outputs(graph.graph.source)

    def _outputs(self, model: Model) -> list[Mapping[str, AnyArray]]:
        loaded = session(model)
        return [loaded.run(batch) for batch in self.batches]

    def drift(self, model: Model) -> float:
        """Mean over the outputs of the squared relative difference, >= 0."""
        found = self._outputs(model)
        errors = []
        for name in self.expected[0]:
            if self.expected[0][name].dtype.kind not in "fV":
                continue
            pairs = [
                (_real(a[name]), _real(b[name])) for a, b in zip(self.expected, found, strict=True)
            ]
            scale = sum(float(np.square(a - a.mean()).sum()) for a, _ in pairs)
            # An output that never varies has no scale but its own size.
            scale = max(scale, _ROUNDING * sum(float(np.square(a).sum()) for a, _ in pairs))
            error = sum(float(np.square(a - b).sum()) for a, b in pairs)
            errors.append(error / max(scale, 1e-30))
        return float(np.mean(errors)) if errors else 0.0

    def unlike(self, model: Model) -> float:
        """How little the outputs still tell the samples apart as they did, 0 to 2.

        1 less the correlation over the samples, in the mean over the elements of each output and
        over the outputs: what is shifted or scaled as a whole counts as the same.
        """
        return self._apart(model, lambda rows: (rows - rows.mean(axis=0)).T)

    def turned(self, model: Model) -> float:
        """How far the outputs of each sample point elsewhere, 0 to 2.

        1 less the cosine, in the mean over the samples and the outputs.
        """
        return self._apart(model, lambda rows: rows)

    def _apart(self, model: Model, seen: Callable[[Float64Array], Float64Array]) -> float:
        """1 less the cosine between rows of what is seen of both, of those that are not zero."""
        found = self._outputs(model)
        errors = []
        for name in self.expected[0]:
            if self.expected[0][name].dtype.kind not in "fV":
                continue
            first, second = (_rows([one[name] for one in each]) for each in (self.expected, found))
            if first.shape != second.shape:
                continue
            a, b = seen(first), seen(second)
            square = np.square(a).sum(axis=1)
            both = (a * b).sum(axis=1) / np.sqrt(square * np.square(b).sum(axis=1) + _TINY)
            known = square > _ROUNDING * max(float(square.max(initial=0.0)), _TINY)
            errors.append(1 - float(both[known].mean()) if known.any() else 0.0)
        return float(np.mean(errors)) if errors else 0.0

    def weighed(self, values: Importance) -> Importance:
        """The same ranking in each group, groups scaled by what cutting a part of each does."""
        whole = {group.id: np.arange(group.size) for group in self.graph.prunable}
        found: dict[int, Float64Array] = {}
        for balance in self.graph.balance_sets:
            keep = dict(whole)
            lost = 0.0
            for cell in balance.cells:
                here = cell.units[values[cell.group][cell.units] >= 0]  # what is not gone
                order = here[np.argsort(values[cell.group][here], kind="stable")]
                slots = cell.units.size * cell.slots
                most = min(_ALONE * slots, 0.5 * here.size * cell.slots)
                drop = int(most) // balance.step * balance.step // cell.slots
                keep[cell.group] = np.setdiff1d(keep[cell.group], order[:drop])
                lost += float(values[cell.group][order[:drop]].sum())
            plan = PruningPlan(self.graph, keep)
            if plan.removes:
                moved = self.drift(operate(plan).model)
                for group in {cell.group for cell in balance.cells}:
                    scale = (moved + 1e-9) / (lost + 1e-12)
                    found[group] = values[group] * scale
        by_group = {group: found.get(group, values[group]) for group in values}
        return Importance(by_group, values.method + _MEASURED, values.why)


def _some(data: Data, past: int = 0, most: int = _JUDGED_ON) -> Data | None:
    """The first samples of the data behind some batches; None where there are no more."""
    batches = []
    samples = 0
    for batch in islice(data.batches, past, None):
        batches.append(batch)
        samples += next((array.shape[0] for array in batch.values() if array.ndim), 1)
        if samples >= most:
            break
    return replace(data, batches=tuple(batches), samples=samples) if batches else None


def _rows(batches: Sequence[AnyArray]) -> Float64Array:
    """Samples in rows; one row for each batch where the first axis does not hold samples."""
    whole = any(not one.ndim or one.shape[1:] != batches[0].shape[1:] for one in batches)
    if whole and len({one.size for one in batches}) > 1:
        return np.zeros((0, 0))
    return np.concatenate([_real(one).reshape(1 if whole else len(one), -1) for one in batches])


def _real(array: AnyArray) -> Float64Array:
    return np.nan_to_num(np.asarray(array, np.float64))
