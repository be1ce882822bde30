"""One ``sparsify`` on its way: every stage takes what the last one left."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from onnxprune import __version__
from onnxprune.analysing import analysed
from onnxprune.checking import checked_result
from onnxprune.checks import Check
from onnxprune.cost import stats
from onnxprune.data import digest_of
from onnxprune.errors import BUG, VerificationError
from onnxprune.groups import DependencyGraph
from onnxprune.held import check_held
from onnxprune.impose import (
    by_method,
    check_replay,
    impose,
    measured_against,
    sparsified,
    wish_of,
)
from onnxprune.latency_target import feeds_of
from onnxprune.model import Model
from onnxprune.patterns import NM
from onnxprune.recipe import Options, Recipe, SparsifyOptions
from onnxprune.recording import build, embed
from onnxprune.reorder import Reordered, reordered, repeated
from onnxprune.report.build import NOT_VERIFIED
from onnxprune.report.clock import Clock, peak_memory
from onnxprune.report.layers import layer_reports
from onnxprune.report.sparse import thin_csv
from onnxprune.request import Mode
from onnxprune.rewrite import Surgery
from onnxprune.targets.findings import Checked
from onnxprune.targets.trtexec import next_step
from onnxprune.thin import MAGNITUDE, candidates
from onnxprune.tidy import Tidy
from onnxprune.timed import timed_in_turn, timing_wanted
from onnxprune.types import Latency, Moved, Report, Shape, Verdict
from onnxprune.valued import valued
from onnxprune.verdicts import judged, made_tidy, made_up_data
from onnxprune.verify import verify as run_checks
from onnxprune.writing import Writing

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Thinner:
    """What was asked of a ``sparsify``.

    Attributes:
        options: The pattern and what it goes by, with the method that values are chosen by.
        recipe: The recipe that is repeated, or None.
        shapes: Concrete shapes for symbolic inputs.
        tidying: Whether to fold BatchNormalizations, and to simplify.
        xz: Measure what xz makes of the model; None does so where it is quick.
        table: File to write the layers to, as comma-separated values, or None.
    """

    options: SparsifyOptions
    recipe: Recipe | None
    shapes: Mapping[str, Shape]
    tidying: tuple[bool, bool]
    xz: bool | None
    table: Path | str | None


class Thinning:
    """The stages, in the order in which ``run`` calls them.

    Attributes:
        turned: The model with its channels in another order, or as it was.
        fitted: Its weights, biases and norms as data wants them within the pattern.
        found: The pattern imposed.
        verdict: On the result.
    """

    def __init__(self, asked: Thinner, original: Model, check: Check, clock: Clock) -> None:
        """Analyse."""
        self.asked, self.original, self.check, self.clock = asked, original, check, clock
        self.graph = analysed(original, asked.shapes, Mode(), clock)
        self.tidy: Tidy | None = None
        self.verdict: Verdict = NOT_VERIFIED
        self.times: Latency | None = None
        self.checked: Checked | None = None

    def run(self, writing: Writing) -> Model:
        """All of it; the model that was written.

        Raises:
            UnsupportedModelError: No layer can take the pattern.
            VerificationError: The result is wrong (our bug), or passes a limit, or cannot be run,
                or the target does not take it.
        """
        with self.clock.stage("sparsify"):
            self._turn()
            self._impose()
        self._fold()
        self._judge()
        self._seal()
        self._time(writing)
        if writing.target is not None:
            self.checked = checked_result(
                self.original, self.made, writing.output, self._known, self.clock
            )
        self._save(writing)
        return self.made

    # -- stages --------------------------------------------------------------------------------

    def _turn(self) -> None:
        """Channels in a better order, where that was asked for and is the same model."""
        source, options, check = self.graph.graph.source, self.asked.options, self.check
        self.turned = Reordered(source)
        wish = wish_of(options)
        if not options.permute or not isinstance(wish.pattern, NM):
            return
        if self.asked.recipe is not None:
            entries = self.asked.recipe.permuted
            found = repeated(self.graph, [Moved(e.tensor, e.axis, e.role, e.kept) for e in entries])
        else:
            able = candidates(source, wish)
            eligible = {able.layers[at].stored.name for at in able.owners}
            found = reordered(
                self.graph, wish.pattern, eligible,
                data=check.data, seed=check.seed, heard=self.clock.step,
            )  # fmt: skip
        for one in found.groups:
            _log.info("order of '%s': %s", one.group, one.why or "new")
        if found.moved and check.level != "none":
            _check_order(self.graph, found, check)
        self.turned = found

    def _impose(self) -> None:
        """Choose values, and set the others to zero."""
        options, recipe = self.asked.options, self.asked.recipe
        start = self.graph
        if self.turned.moved:
            start = analysed(self.turned.model, self.asked.shapes, Mode(), self.clock)
        self.fitted = valued(
            start, options, self.check.data, seed=self.check.seed, heard=self.clock.step
        )
        found = by_method(impose(self.fitted.model, options), self.fitted.layers, options.method)
        if self.fitted.changed:
            found = measured_against(self.turned.model, found)
        if recipe is not None:
            check_replay(recipe, found)
        if not found.done:
            _log.warning("nothing was thinned: ignore, only or only-gain leave every layer dense")
        if self.check.level != "none":
            check_held(self.fitted.model, found.model, found)
        self.found, self.made = found, found.model

    def _fold(self) -> None:
        """Fold norms and simplify."""
        if not any(self.asked.tidying):
            return
        with self.clock.stage("fold"):
            self.tidy = made_tidy(self.made, self.graph, self.found, self.asked.tidying, self.check)
        self.made = self.tidy.model

    def _judge(self) -> None:
        """Is the pattern in the model, does it run, and how far do its outputs lie off?"""
        check = self.check
        if check.level == "none":
            return
        with self.clock.stage("verify"):
            check_held(None, self.made, self.found)
            verdict = run_checks(
                self.original,
                self.made,
                twin=None,
                data=check.data if check.data is not None else made_up_data(self.graph, check.seed),
                level=check.level,
                limits=check.limits,
            )
        self.verdict = judged(verdict, check.limits)

    def _seal(self) -> None:
        """Put the recipe into the model; it stays as it is, without one, where nothing was done."""
        options, tidy = self.asked.options, self.tidy
        fold_bn, simplify = self.asked.tidying
        changed = dict.fromkeys((*self.fitted.changed, *(() if tidy is None else tidy.changed)))
        self.recipe = build(
            self.original,
            Surgery(self.made, (), {}, (), (), restored=tuple(changed)),
            Options(
                seed=self.check.seed,
                sparsify=options,
                data_sha256=None if options.method == MAGNITUDE else digest_of(self.check.data),
                input_shape=dict(self.asked.shapes),
                fold_bn=fold_bn,
                simplify=simplify,
            ),
            __version__,
            self.found.done,
            self.turned.moved,
            () if tidy is None else tidy.into,
        )
        self.did = bool(self.found.done) or (tidy is not None and tidy.anything)
        if self.did:
            self.made = embed(self.made, self.recipe)
        self.before = stats(self.graph)

    def _time(self, writing: Writing) -> None:
        if timing_wanted(writing.latency, self.verdict, self.before):
            with self.clock.stage("time"):
                feeds = feeds_of(self.graph, self.check.data, self.check.seed)
                quick = writing.latency is None
                self.times = timed_in_turn(
                    self.original, self.made, feeds, writing.threads, quick=quick
                )

    def _save(self, writing: Writing) -> None:
        with self.clock.stage("save"):
            table = self.asked.table
            self.written = writing.save(
                self.made,
                lambda: self.recipe,
                check=None if self.check.level == "none" else self._file_check(),
                texts={} if table is None else {Path(table): thin_csv(self.found.layers)},
            )
        with self.clock.stage("pack"):
            self.sparsified = sparsified(
                self.found, self.asked.options, self.original, self.made, xz=self.asked.xz
            )

    def _file_check(self) -> Callable[[Model], None]:
        whole = self.fitted.model if self.tidy is None else None
        return lambda written: check_held(whole, written, self.found)

    # -- report --------------------------------------------------------------------------------

    @property
    def _known(self) -> list[dict[str, tuple[int, ...]]]:
        """Input shapes that the analysis was made at."""
        return [dict(env.inputs) for env in self.graph.envs]

    def report(self, writing: Writing, messages: tuple[str, ...]) -> Report:
        """Everything there is to say of it."""
        output = writing.output
        return Report(
            verb="sparsify",
            input_path=str(self.original.path or ""),
            before=self.before,
            output_path=None if output is None else str(output),
            after=self.written.of(self.before),
            importance="",
            importance_why="",
            exact=None,
            groups=(),
            verdict=self.verdict,
            stand_ins=self.graph.stand_ins,
            seconds=self.clock.seconds,
            peak_memory_bytes=peak_memory(),
            warnings=messages,
            recipe=self.recipe.as_json() if self.did else {},
            written=tuple(self.written.files),
            layers=layer_reports(self.graph, self.before),
            sparsified=self.sparsified,
            checked=self.checked,
            following=None if output is None else next_step(self.made, str(output), self._known),
            latency=self.times,
            tidied=None if self.tidy is None else self.tidy.said,
        )


def _check_order(graph: DependencyGraph, found: Reordered, check: Check) -> None:
    """Raise unless the model with its channels in another order computes the same."""
    same = run_checks(
        graph.graph.source,
        found.model,
        twin=None,
        data=check.data if check.data is not None else made_up_data(graph, check.seed),
        level="twin",
        lossless=True,
    )
    if same.status == "failed":
        raise VerificationError(f"channels in another order: {same.reason}", hint=BUG)
