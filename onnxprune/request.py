"""What a caller asked for, and the plan that follows from it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from onnxprune.aim import TOLERANCE
from onnxprune.alignment import FOR_FLOATS, FOR_PATTERN, Coming, loses, steps
from onnxprune.analyse import analyse_graph
from onnxprune.budget import Budget, shares
from onnxprune.checks import Check
from onnxprune.curves import Allowance
from onnxprune.data import Data, digest_of
from onnxprune.errors import TargetError, UsageError
from onnxprune.expand import expanded
from onnxprune.groups import DependencyGraph
from onnxprune.iterate import SCHEDULES, Chosen, Step, in_steps
from onnxprune.latency_target import LatencyTarget
from onnxprune.lossless import lossless_plan
from onnxprune.patterns import NM, parse
from onnxprune.planning import Latency as Share
from onnxprune.planning import Planner, Trial, Wish
from onnxprune.recipe import Options, QuantizeOptions, Recipe, SparsifyOptions
from onnxprune.replay import replay
from onnxprune.report.clock import Clock
from onnxprune.restoring import restored
from onnxprune.rewrite import operate
from onnxprune.score import Scorer
from onnxprune.select import PruningPlan
from onnxprune.types import Latency, Limits, Shape
from onnxprune.unseen import Ranking, best_unseen, unseen_why

LOSSLESS = "lossless"  # instead of a method that ranks: nothing is ranked
# What widths are rounded to for a target where nothing is asked for; the first that reaches it.
_WIDE = "wide"  # sixteens, as for a 2:4 pattern: what one instruction of a CPU takes at most
_ROUNDINGS: tuple[int | str, ...] = (_WIDE, "auto", 4, 1)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Mode:
    """How to analyse: what is cut in attention (auto: heads), and whether norms may be cut."""

    attention: str = "heads"
    allow_norm: bool = False

    def __post_init__(self) -> None:
        if self.attention == "auto":  # there is nothing to choose by
            object.__setattr__(self, "attention", "heads")
        if self.attention not in ("heads", "dims", "none"):
            raise UsageError(
                f"attention is '{self.attention}'", hint="give auto, heads, dims or none"
            )


@dataclass(frozen=True)
class Request:
    """What was asked for, by ratio, by recipe, or by what a sensitivity run allows."""

    ratio: float | None
    recipe: Recipe | None
    scope: str | None
    importance: str | Scorer
    round_to: int | str | None
    min_channels: int
    max_ratio: float
    ignore: tuple[str, ...]
    only: tuple[str, ...]
    ratio_for: Mapping[str, float]
    attention: str
    allow_norm: bool
    input_shapes: Mapping[str, Shape]
    seed: int
    lossless: bool = False
    allowance: Allowance | None = None
    targets: Mapping[str, float] = field(default_factory=dict)
    aggregate: str | None = None
    restore: str = "none"
    steps: int = 1
    schedule: str = SCHEDULES[0]
    then: SparsifyOptions | None = None
    fold_bn: bool = False
    simplify: bool = False
    quantize: QuantizeOptions | None = None
    rankings: dict[tuple[float, str], Ranking | None] = field(
        default_factory=dict, compare=False, repr=False
    )

    @property
    def tidying(self) -> tuple[bool, bool]:
        """Whether norms are folded into layers, and whether the result is simplified."""
        by = self if self.recipe is None else self.recipe.options
        return by.fold_bn, by.simplify

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Input shapes to analyse at."""
        return self.input_shapes if self.recipe is None else self.recipe.options.input_shape

    @property
    def rounding(self) -> int | str:
        """``round_to``; auto where nothing is asked for, and latency or a pattern counts.

        With odd widths a smaller model is often a slower one, and takes no pattern.
        """
        if self.round_to is not None:
            return self.round_to
        return "auto" if "latency" in self.targets or self.then is not None else 1

    @property
    def _roundings(self) -> tuple[int | str, ...]:
        """What to round to, in the order it is tried; the last one stays if none does."""
        free = self.round_to is None and self.rounding == 1 and self.targets
        return _ROUNDINGS if free else (self.rounding,)

    @property
    def sparse(self) -> SparsifyOptions | None:
        """Pattern to impose on what is left, None for none."""
        return self.then if self.recipe is None else self.recipe.options.sparsify

    def sparse_after(self, restored: str) -> SparsifyOptions | None:
        """The same, with the method that restoring leaves: a refit solves for what stays."""
        if self.sparse is None:
            return None
        method = "sparsegpt" if restored == "refit" else "magnitude"
        return self.sparse.model_copy(update={"method": method})

    @property
    def coming(self) -> Coming | None:
        """What widths should suit beside the types there are: int8, or an N:M pattern."""
        if self.precision is not None and self.precision.to == "int8":
            return Coming.int8
        runs = self.sparse is not None and isinstance(parse(self.sparse.pattern), NM)
        return Coming.pattern if runs else None

    @property
    def precision(self) -> QuantizeOptions | None:
        """Types to write what is left in, None for those it has."""
        if self.quantize is not None or self.recipe is None:
            return self.quantize
        return self.recipe.options.quantize

    @property
    def exactly(self) -> bool:
        """Whether the result must equal the original itself."""
        return self.lossless if self.recipe is None else self.recipe.options.lossless

    @property
    def analysis(self) -> Mode:
        """How to analyse."""
        if self.recipe is None:
            asked = "heads" if self.attention == "auto" else self.attention
            if self.attention == "auto" and self.allowance is not None:
                asked = self.allowance.found.attention
            return Mode(asked, self.allow_norm)
        return Mode(self.recipe.options.attention, self.recipe.options.allow_norm)

    def timed_plan(
        self, graph: DependencyGraph, data: Data | None, clock: Clock
    ) -> tuple[Chosen, Latency | None, int | str]:
        """What ``plan`` gives, and its measured times where latency is a target.

        Returns:
            What was found, its times, and what widths were rounded to.

        Raises:
            TargetError: A target is out of reach.
            VerificationError: Latency is a target, and ONNX Runtime cannot run the model.
        """
        if "latency" not in self.targets:
            return self._rounded_plan(graph, data, clock)
        with clock.stage("time"):
            timer = LatencyTarget.of(graph, data, self.seed)
        found, times = timer.confirmed(
            self.targets["latency"], lambda: self.plan(graph, data, clock, timer)
        )
        return found, times, self.rounding

    def _rounded_plan(
        self, graph: DependencyGraph, data: Data | None, clock: Clock
    ) -> tuple[Chosen, None, int | str]:
        """The plan of the coarsest rounding that reaches the targets, else of what comes nearest.

        Odd widths cost as much as the next multiple of what kernels take at once, or more.
        """
        tried: list[tuple[float, Chosen, int | str]] = []
        beyond: TargetError | None = None
        for rounding in self._roundings:
            try:
                asked = self if rounding == self.rounding else replace(self, round_to=rounding)
                chosen = asked.plan(graph, data, clock)
            except TargetError as error:
                beyond = error
                continue
            left = self._left(chosen[0])
            over = max((left[name] - share for name, share in self.targets.items()), default=0.0)
            tried.append((over, chosen, rounding))
            if over <= TOLERANCE:
                return chosen, None, rounding
        if not tried and beyond is not None:
            raise beyond
        _, chosen, rounding = min(tried, key=lambda one: one[0])
        _log.warning(
            "no cut comes nearer to the target than %s",
            ", ".join(f"{name}={share:.3f}" for name, share in self._left(chosen[0]).items()),
        )
        return chosen, None, rounding

    def _left(self, plan: PruningPlan) -> Mapping[str, float]:
        """Share that a plan leaves of each cost with a target."""
        if not self.targets:
            return {}
        budget = Budget(plan.graph)
        left = shares(budget.of(plan.keep), budget.whole)
        return {name: left[name] for name in self.targets}

    def plan(
        self,
        graph: DependencyGraph,
        data: Data | None,
        clock: Clock,
        timer: LatencyTarget | None = None,
    ) -> tuple[PruningPlan, str, str]:
        """The plan, the method that ranked, and why that one."""
        latency = None if timer is None else timer.left
        if self.recipe is not None:
            options = self.recipe.options
            method = LOSSLESS if options.lossless else options.importance
            with clock.stage("select"):
                return replay(graph, self.recipe), method, "from the recipe"
        if self.lossless:
            with clock.stage("select"):
                plan = lossless_plan(graph, ignore=self.ignore, only=self.only)
            return plan, LOSSLESS, "only what has no effect goes"
        if self._may_cut_dims(graph, data) and timer is None:
            assert data is not None
            return self._best_attention(graph, data, clock)

        def choose(step: Step) -> Chosen:
            return self._step(graph, data, latency, step, clock)

        def left(plan: PruningPlan) -> DependencyGraph:
            check = Check("none", Limits(), data, self.seed)
            with clock.stage("restore"):
                made = restored(plan, operate(plan), self.restoring(data), check, clock).surgery
            return expanded(plan, made.model, made.restored)

        return in_steps(choose, left, self.steps, self.schedule)

    def _step(
        self,
        graph: DependencyGraph,
        data: Data | None,
        latency: Share | None,
        step: Step,
        clock: Clock,
    ) -> Chosen:
        """One step of a cut: by the ranking asked for, or by the best there is."""
        planner = Planner(
            graph, self._wish(graph, None).part(step.share), data, self.aggregate, latency,
            step.ranked, step.gone,
        )  # fmt: skip
        choosing = self.importance == "auto" and self.allowance is None
        calibrating = choosing and data is not None and not data.random
        if calibrating:
            refitted = self.restoring(data) == "refit"
            best = planner.best_restored if refitted else planner.best
            with clock.stage("score"):
                return best(self.seed)
        with clock.stage("score"):
            taken = self._unseen(planner, step, data) if choosing else None
            if taken is None:
                values = planner.scored(self.importance, self.seed)
                more = unseen_why(graph) if choosing else ""
                values = replace(values, why=f"{values.why}{more}")
            else:
                planner = planner.within(taken.scope)
                values = replace(planner.scored(taken.method, self.seed), why=taken.why)
        if self.allowance is not None:
            allowed = self.allowance.ratios(
                graph, values.method, self.ratio, self.restoring(data)
            )  # fmt: skip
            wish = self._wish(graph, allowed).part(step.share)
            planner = replace(planner, wish=wish)
        with clock.stage("select"):
            return planner.plan(values), values.method, values.why

    def _unseen(self, planner: Planner, step: Step, data: Data | None) -> Ranking | None:
        """The ranking that pictures prefer; found once where latency asks for a plan again."""
        key = (step.share, str(self.rounding))
        if key not in self.rankings:
            restored = self.restoring(data) != "none"
            self.rankings[key] = best_unseen(planner, self.seed, restored=restored)
        return self.rankings[key]

    def _may_cut_dims(self, graph: DependencyGraph, data: Data | None) -> bool:
        """Whether a refit can tell if heads should rather go whole or lose dimensions."""
        free = self.attention == "auto" and self.recipe is None and self.allowance is None
        heads = any(group.unit == "head" for group in graph.prunable)
        return free and heads and self.restoring(data) == "refit"

    def _best_attention(self, graph: DependencyGraph, data: Data, clock: Clock) -> Chosen:
        """Whole heads, or as many dimensions of each: what moves the outputs less when refitted."""
        with clock.stage("analyse"):
            by_dims = analyse_graph(
                graph.graph, graph.envs, attention="dims", allow_norm=self.allow_norm
            )
        trial = Trial(graph, data, self.seed)
        tried: list[tuple[float, str, Chosen]] = []
        beyond: TargetError | None = None
        for name, one in (("heads", graph), ("dims", by_dims)):
            try:
                chosen = replace(self, attention=name).plan(one, data, clock)
            except TargetError as error:
                beyond = beyond or error
                continue
            with clock.stage("score"):
                tried.append((trial.drift(chosen[0]), name, chosen))
        if not tried and beyond is not None:
            raise beyond
        _, name, (plan, method, why) = min(tried, key=lambda one: one[0])
        said = ", ".join(f"{which} {drift:.3g}" for drift, which, _ in tried)
        return plan, method, f"{why}; attention by {name} after a refit ({said})"

    def _wish(self, graph: DependencyGraph, allowed: Mapping[int, float] | None) -> Wish:
        return Wish(
            ratio=self.ratio or 0.0,
            targets=self.targets,
            scope=self.scope,
            round_to=self._multiples(graph),
            min_channels=self.min_channels,
            max_ratio=self.max_ratio,
            ignore=self.ignore,
            only=self.only,
            ratio_for=self.ratio_for,
            group_ratios=allowed,
        )

    def _multiples(self, graph: DependencyGraph) -> int | Mapping[int, int]:
        """What ``rounding`` means for each group."""
        match self.rounding:
            case int(fixed):
                return fixed
            case "wide":
                return steps(graph, Coming.pattern)
        unasked = self.ratio if self.round_to is None else None
        return steps(graph, self.coming, unasked or 0.0)

    def finer(self, graph: DependencyGraph) -> int | None:
        """The coarsest ``round_to`` by which the ratio cuts most groups; None if none does."""
        sizes = [group.size for group in graph.prunable]
        for step in (FOR_PATTERN, FOR_FLOATS, FOR_FLOATS // 2, 1):
            cut = sum(loses(size, step, self.ratio or 0.0) for size in sizes)
            if 2 * cut > len(sizes):
                return step
        return None

    def restoring(self, data: Data | None) -> str:
        """How the result is restored: ``none``, ``bias``, ``pictures`` or ``refit``."""
        given = data is not None and not data.random
        if self.exactly:
            return "none"
        asked = self.restore
        if asked == "auto" and self.recipe is not None:
            asked = self.recipe.options.restore
            return "none" if asked == "refit" and not given else asked
        if asked == "auto":
            return "refit" if given else "bias"
        return asked

    def options(
        self,
        method: str,
        restored: str,
        attention: str,
        sparse: SparsifyOptions | None,
        data: Data | None,
        rounding: int | str,
    ) -> Options:
        """Options as a recipe keeps them: with what was taken where ``auto`` was asked for."""
        seen = digest_of(data) if restored == "refit" else None
        if self.recipe is not None:
            update = {"restore": restored, "sparsify": sparse, "data_sha256": seen}
            return self.recipe.options.model_copy(update=update)
        return Options(
            restore=restored,  # type: ignore[arg-type]  # one of the three
            ratio=self.ratio,
            targets=dict(self.targets),
            scope=self.scope or ("isomorphic" if self.targets else "local"),  # type: ignore[arg-type]  # select checked it
            aggregate=self.aggregate,  # type: ignore[arg-type]  # score checked it
            lossless=self.lossless,
            importance="auto" if self.lossless else method,
            round_to="auto" if rounding == _WIDE else rounding,  # type: ignore[arg-type]  # checked
            min_channels=self.min_channels,
            max_ratio=self.max_ratio,
            ignore=self.ignore,
            only=self.only,
            ratio_for=dict(self.ratio_for),
            sensitivity_sha256=None if self.allowance is None else self.allowance.sha256,
            max_loss=None if self.allowance is None else self.allowance.max_loss,
            attention=attention,  # type: ignore[arg-type]  # one of the three
            allow_norm=self.allow_norm,
            input_shape={name: tuple(shape) for name, shape in self.input_shapes.items()},
            seed=self.seed,
            steps=self.steps,
            schedule=self.schedule,  # type: ignore[arg-type]  # shares checked it
            sparsify=sparse,
            data_sha256=seen,
            fold_bn=self.fold_bn,
            simplify=self.simplify,
        )
