"""One ``shrink`` on its way: every stage takes what the last one left."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property

from onnxprune import __version__
from onnxprune.analysing import analysed
from onnxprune.checking import checked_result
from onnxprune.checks import Check
from onnxprune.cost import stats, stats_after, stored_bytes
from onnxprune.density import warnings
from onnxprune.errors import UnsupportedModelError
from onnxprune.held import check_held, lost
from onnxprune.impose import (
    by_method,
    check_replay,
    impose,
    measured_against,
    sparsified,
    wants_rounding,
)
from onnxprune.latency_target import feeds_of
from onnxprune.model import Model
from onnxprune.quantize.convert import Converted, check_zeros, convert
from onnxprune.recipe import Recipe, SparsifyOptions, read
from onnxprune.recording import build, embed, requantized
from onnxprune.replay import warn_of_other_data
from onnxprune.report.build import NOT_VERIFIED, group_reports
from onnxprune.report.clock import Clock, peak_memory
from onnxprune.report.layers import layer_reports
from onnxprune.report.ops import nothing_prunable, way_out
from onnxprune.request import Request
from onnxprune.restoring import Restored, restored
from onnxprune.rewrite import Surgery, operate
from onnxprune.select import PruningPlan
from onnxprune.targets.findings import Checked
from onnxprune.targets.trtexec import next_step
from onnxprune.thin import Thinned
from onnxprune.tidy import Tidy
from onnxprune.timed import timed_in_turn, timing_wanted
from onnxprune.types import Report, Sparsified, Verdict
from onnxprune.valued import imposed
from onnxprune.verdicts import made_tidy, made_up_data, measured, proved
from onnxprune.writing import Writing

_log = logging.getLogger(__name__)


class Shrinking:
    """The stages, in the order in which ``run`` calls them.

    Attributes:
        plan: What goes.
        surgery: The model as it stands, and what was done to it.
        plain: The model that the plan alone makes.
        fitted: The same restored; what a pattern was imposed on.
        verdict: The proof of the cut, later with the drift of what is written.
    """

    def __init__(self, asked: Request, original: Model, check: Check, clock: Clock) -> None:
        """Analyse, and plan the cut.

        Raises:
            UnsupportedModelError: Nothing can be pruned.
            TargetError: A target is out of reach.
            RecipeError: The recipe does not fit.
        """
        self.asked, self.original, self.check, self.clock = asked, original, check, clock
        graph = analysed(original, asked.shapes, asked.analysis, clock)
        if not graph.prunable and not (asked.exactly and any(asked.tidying)):
            raise UnsupportedModelError(nothing_prunable(graph), hint=way_out(graph))
        (self.plan, self.method, self.why), self.times, self.rounding = asked.timed_plan(
            graph, check.data, clock
        )
        self.graph = self.plan.graph  # without effect may be what no weight reads
        self.verdict: Verdict = NOT_VERIFIED
        self.recovered: Restored | None = None
        self.thinned: Thinned | None = None
        self.tidy: Tidy | None = None
        self.narrow: Converted | None = None
        self.checked: Checked | None = None

    def run(self, writing: Writing) -> Model:
        """All of it; the model that was written.

        Raises:
            VerificationError: The result is wrong (our bug), or passes a limit, or cannot be run,
                or the target does not take it.
        """
        self._cut()
        self._restore()
        self._thin()
        self._say_what_was_lost()
        self._fold()
        self._quantize()
        if self._changes_later:
            self.verdict = measured(
                self.graph, self.surgery.model, self.verdict, self.check, self.clock,
                self.recovered, self.narrow,
            )  # fmt: skip
        self._seal()
        self._time(writing)
        if writing.target is not None:
            self.checked = checked_result(
                self.original, self.made, writing.output, self._known, self.clock
            )
        self._save(writing)
        return self.made

    # -- stages --------------------------------------------------------------------------------

    def _cut(self) -> None:
        """Do what the plan says, and prove it."""
        with self.clock.stage("rewrite"):
            self.surgery = operate(self.plan)
        if not self.surgery.removed:
            _log.warning("nothing was cut: %s", _why_nothing(self.plan, self.asked))
        self.plain = self.fitted = self.surgery.model
        some = self.surgery.removed or self.asked.sparse is not None
        self.restoring = self.asked.restoring(self.check.data) if some else "none"
        level = self.check.level
        early = replace(
            self.check, level="twin" if self._changes_later and level == "full" else level
        )
        self.verdict = proved(
            self.graph, self.plan, self.plain, early, self.clock, lossless=self.asked.exactly
        )

    @property
    def _changes_later(self) -> bool:
        """Whether more than the cut is done: drift is then measured at the end."""
        asked = self.asked
        more = asked.sparse is not None or any(asked.tidying) or asked.precision is not None
        return self.restoring != "none" or more

    @cached_property
    def sparse(self) -> SparsifyOptions | None:
        """Pattern to impose, with the method that restoring leaves."""
        return self.asked.sparse_after(self.restoring)

    def _restore(self) -> None:
        """Make up for what went, within the pattern that comes."""
        given, sparse = self.asked.recipe, self.sparse
        if given is not None and given.options.restore == "refit" and self.restoring != "refit":
            _log.warning(
                "the recipe's weights were refitted to data, these are not: "
                "give data to refit them again"
            )
        elif given is not None:
            warn_of_other_data(given, self.check.data)
        elif sparse is not None and sparse.method == "magnitude" and self._could_refit:
            _log.warning("without a refit to data %s takes the smallest weights", sparse.pattern)
        if self.restoring == "none":
            return
        with self.clock.stage("restore"):
            patterned = {} if sparse is None else imposed(self.plain, sparse)
            self.recovered = restored(
                self.plan, self.surgery, self.restoring, self.check, self.clock, patterned
            )
        self.surgery, self.restoring = self.recovered.surgery, self.recovered.how
        self.fitted = self.surgery.model

    @property
    def _could_refit(self) -> bool:
        """Whether nobody said that there should be no refit."""
        left_to_us = self.asked.restore == "auto" and self.check.data is not None
        return self.restoring == "pictures" or left_to_us

    def _thin(self) -> None:
        """Impose the pattern."""
        if self.sparse is None:
            return
        with self.clock.stage("sparsify"):
            found = impose(self.fitted, self.sparse)
            if self.recovered is not None:
                found = by_method(found, self.recovered.layers, self.sparse.method)
                found = measured_against(self.plain, found)
            if self.asked.recipe is not None:
                check_replay(self.asked.recipe, found)
            elif (said := wants_rounding(found, self.rounding)) is not None:
                _log.warning("%s", said)
        self.thinned = found
        self.surgery = replace(self.surgery, model=found.model)

    def _say_what_was_lost(self) -> None:
        """A cut takes neighbours apart and a refit fills zeros: a pattern there was goes with it.

        One that the weights happen to have is not imposed again unasked.
        """
        if self.sparse is None and (count := lost(self.original, self.surgery.model)):
            one = count == 1
            _log.warning(
                "%d %s 2:4 before and no longer %s: --then 2:4 keeps the pattern",
                count, "layer held" if one else "layers held", "does" if one else "do",
            )  # fmt: skip

    def _fold(self) -> None:
        """Fold norms and simplify."""
        self.shifted = len(self.surgery.restored)
        if not any(self.asked.tidying):
            return
        with self.clock.stage("fold"):
            self.tidy = made_tidy(
                self.surgery.model, self.graph, self.thinned, self.asked.tidying, self.check
            )
        names = dict.fromkeys((*self.surgery.restored, *self.tidy.changed))
        self.surgery = replace(self.surgery, model=self.tidy.model, restored=tuple(names))

    def _quantize(self) -> None:
        """Write it in fewer bits; ``surgery`` stays as it was before."""
        wished, check = self.asked.precision, self.check
        if wished is None:
            return
        with self.clock.stage("quantize"):
            fed = check.data if check.data is not None else made_up_data(self.graph, check.seed)
            self.narrow = convert(self.surgery.model, wished, check.data, fed)
            if check.level != "none":
                check_zeros(self.narrow.plain, self.narrow.model)

    def _seal(self) -> None:
        """Put the recipe into the model; it stays as it is, without one, where nothing was done."""
        self.options = self.asked.options(
            self.method, self.restoring, self.graph.tracer.attention, self.sparse,
            self.check.data, self.rounding,
        )  # fmt: skip
        sparse = () if self.thinned is None else self.thinned.done
        tidied = self.tidy is not None and self.tidy.anything
        self.made, self.recipe = self.surgery.model, None
        if self.surgery.removed or sparse or tidied:
            merged = () if self.tidy is None else self.tidy.into
            recipe = build(
                self.original, self.surgery, self.options, __version__, sparse, merged=merged
            )
            self.made, self.recipe = embed(self.made, recipe), recipe
        self.before = stats(self.graph)
        self.after = stats_after(self.graph, self.made, self.plan.keep)
        for said in warnings(self.before, self.after):
            _log.warning("%s", said)
        if self.narrow is not None:
            base = self.made if self.recipe else embed(self.made, self._empty_recipe())
            self.made = requantized(self.narrow.model, base, self.narrow.options, __version__)
            self.recipe = read(self.made)
            self.after = replace(self.after, bytes=stored_bytes(self.made))

    def _empty_recipe(self) -> Recipe:
        """What was asked for, where that removed nothing."""
        nothing = Surgery(self.made, (), {}, (), ())
        return build(self.original, nothing, self.options, __version__)

    def _time(self, writing: Writing) -> None:
        """Time original and result, unless a latency target has timed this very result."""
        anew = self.times is None or self.tidy is not None or self.narrow is not None
        if anew and timing_wanted(writing.latency, self.verdict, self.before):
            with self.clock.stage("time"):
                feeds = feeds_of(self.graph, self.check.data, self.check.seed)
                quick = writing.latency is None
                self.times = timed_in_turn(
                    self.original, self.made, feeds, writing.threads, quick=quick
                )

    def _save(self, writing: Writing) -> None:
        with self.clock.stage("save"):
            self.written = writing.save(
                self.made,
                lambda: self.recipe or self._empty_recipe(),
                check=None if self.check.level == "none" else self._file_check(),
            )
            self.after = self.written.of(self.after)

    def _file_check(self) -> Callable[[Model], None] | None:
        """What is asked of the written file where a pattern was imposed, or weights quantized."""
        narrow, thinned = self.narrow, self.thinned
        if narrow is not None:
            return lambda written: check_zeros(narrow.plain, written)
        if thinned is None:
            return None
        whole = None if self.tidy is not None else self.fitted
        return lambda written: check_held(whole, written, thinned)

    # -- report --------------------------------------------------------------------------------

    @property
    def _known(self) -> list[dict[str, tuple[int, ...]]]:
        """Input shapes that the analysis was made at."""
        return [dict(env.inputs) for env in self.graph.envs]

    def report(self, writing: Writing, messages: tuple[str, ...]) -> Report:
        """Everything there is to say of it."""
        output, coming = writing.output, self.asked.coming
        following = None if output is None else next_step(self.made, str(output), self._known)
        return Report(
            verb="shrink",
            input_path=str(self.original.path or ""),
            before=self.before,
            output_path=None if output is None else str(output),
            after=self.after,
            importance=self.method,
            importance_why=self.why,
            exact=self.graph.exact(self.plan.keep),
            groups=group_reports(
                self.graph,
                self.plan.keep,
                self.plan.why,
                aligned=self.asked.round_to not in (None, 1),
                coming=coming,
            ),
            verdict=self.verdict,
            stand_ins=self.graph.stand_ins,
            seconds=self.clock.seconds,
            peak_memory_bytes=peak_memory(),
            warnings=messages,
            recipe={} if self.recipe is None else self.recipe.as_json(),
            restored=() if self.recovered is None else self.recovered.layers,
            shifted=self.shifted,
            written=tuple(self.written.files),
            latency=self.times,
            layers=layer_reports(self.graph, self.before, self.after, coming),
            rounded=self.asked.rounding != 1,
            round_to=self.options.round_to,
            sparsified=self._sparsified(),
            checked=self.checked,
            following=following,
            tidied=None if self.tidy is None else self.tidy.said,
            quantized=None if self.narrow is None else self.narrow.found,
        )

    def _sparsified(self) -> Sparsified | None:
        if self.thinned is None or self.sparse is None:
            return None
        return sparsified(self.thinned, self.sparse, self.fitted, self.made, xz=False)


def _why_nothing(plan: PruningPlan, asked: Request) -> str:
    round_to, ratio = asked.rounding, asked.ratio
    if asked.exactly:
        return "no channel is without effect"
    if asked.allowance is not None:
        return f"no group may lose a channel at --max-loss {asked.allowance.max_loss:g}"
    if not ratio and not asked.targets:
        return "the ratio is 0" if ratio is not None else "the recipe removes nothing"
    if all(plan.why[group.id].startswith("kept") for group in plan.graph.prunable):
        return "ignore and only keep every group"
    if asked.targets:
        return "the targets ask for nothing less than there is"
    if round_to != 1:
        finer = asked.finer(plan.graph)
        cure = "" if finer is None else f"; --round-to {finer} cuts most of them"
        return f"ratio {ratio:g} and round-to {round_to} leave every group whole{cure}"
    return f"ratio {ratio:g} is less than one channel of every group, or min-channels keeps them"
