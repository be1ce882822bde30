"""One model through the whole core, timed and judged: what the benchmark tools share."""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from onnxprune import io
from onnxprune.analyse import analyse_graph
from onnxprune.cost import count_params
from onnxprune.errors import InvariantError, OnnxPruneError
from onnxprune.groups import DependencyGraph
from onnxprune.prepare import prepare
from onnxprune.report.clock import Clock
from onnxprune.rewrite import masked_twin, operate
from onnxprune.score import score
from onnxprune.select import PruningPlan, select
from onnxprune.shapes import environment
from onnxprune.standins import find_stand_ins
from onnxprune.types import Drift, Shape, Verdict
from onnxprune.verdicts import made_up_data
from onnxprune.verify import verify

REPOSITORY = Path(__file__).resolve().parents[2]
SHARED = REPOSITORY.parent / "shared"
RESULTS = Path(__file__).resolve().parent / "results"
GOOD = ("ok", "nothing", "noise", "refused")
LEAST_MOVE = 1e-3  # a twin closer than this to the original proves nothing


@dataclass(frozen=True)
class Frozen:
    """A channel group that stayed whole: its width, the weight that names it, and why."""

    width: int
    name: str
    reason: str


@dataclass(frozen=True)
class Trial:
    """What became of one model.

    Attributes:
        status: ``ok``; ``nothing`` to prune; ``noise``, where no test was possible; ``refused``,
            a model that is invalid or that the runtime does not run; and what is a bug: ``twin
            failed``, ``broken`` (checker, interface or runtime), ``crash``.
        reason: One line, "" where all is well.
        before, after: Parameters.
        seconds: Wall clock by stage.
        gap: Largest difference from the masked twin, by the output's scale; None if not compared.
        moved: How far the cut took the outputs, relative L2 (the farthest output).
        frozen: Groups that stayed whole, the widest first.
        notes: What the analysis had to tie or freeze.
        trace: The traceback of a crash.
        exact: A twin can be compared; not where channels under a normalisation were cut.
    """

    status: str
    reason: str = ""
    before: int = 0
    after: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)
    gap: float | None = None
    moved: float | None = None
    frozen: tuple[Frozen, ...] = ()
    notes: tuple[str, ...] = ()
    trace: str = ""
    exact: bool = True

    @property
    def left(self) -> float:
        """Share of the parameters that is left."""
        return self.after / self.before if self.before else 1.0

    @property
    def analysis(self) -> float:
        """Seconds of preparation and analysis."""
        return self.seconds.get("prepare", 0.0) + self.seconds.get("analyse", 0.0)

    @property
    def total(self) -> float:
        """Seconds of all stages."""
        return sum(self.seconds.values())

    @property
    def proves(self) -> bool:
        """The twin was compared, and is not the original itself."""
        return self.gap is not None and (self.moved is None or self.moved >= LEAST_MOVE)

    def as_json(self) -> dict[str, object]:
        """Everything but the traceback, for a results file."""
        return {
            "status": self.status,
            "reason": self.reason,
            "params_before": self.before,
            "params_after": self.after,
            "analysis_s": round(self.analysis, 3),
            "total_s": round(self.total, 3),
            "twin_gap": self.gap,
            "moved": self.moved,
            "frozen": [[group.width, group.name, group.reason] for group in self.frozen],
            "notes": list(self.notes),
        }


def trial(
    path: Path,
    *,
    ratio: float = 0.5,
    importance: str = "l1",
    shapes: Mapping[str, Shape] | None = None,
    attention: str = "heads",
    allow_norm: bool = False,
    level: str = "full",
    keep: bool = False,
) -> Trial:
    """Prune the model at ``path`` in memory and hold it against its masked twin.

    Args:
        path: The file.
        ratio: Share of channels to remove from each group.
        importance: Method of ``onnxprune.score``.
        shapes: Concrete shapes for symbolic inputs.
        attention: ``heads`` or ``dims``.
        allow_norm: Cut under normalisations too; then there is no twin.
        level: ``twin``, or ``full`` to measure how far the cut moved the outputs too.
        keep: Let exceptions that are no error of onnxprune's own pass, for a debugger.
    """
    run = _Run(Clock())
    try:
        return run.go(path, ratio, importance, shapes, attention, allow_norm, level)
    except InvariantError as error:
        return run.result("broken", str(error))
    except OnnxPruneError as error:
        return run.result("refused", str(error))
    except Exception as error:
        if keep:
            raise
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        said = " ".join(f"{type(error).__name__}: {error} ({where})".split())
        return run.result("crash", said, trace=traceback.format_exc())


@dataclass
class _Run:
    """The stages of one trial, and what is known when one of them fails."""

    clock: Clock
    graph: DependencyGraph | None = None
    before: int = 0
    after: int = 0

    def go(
        self,
        path: Path,
        ratio: float,
        importance: str,
        shapes: Mapping[str, Shape] | None,
        attention: str,
        allow_norm: bool,
        level: str,
    ) -> Trial:
        stage = self.clock.stage
        with stage("load"):
            model = io.load(path)
        self.before = self.after = count_params(model)
        with stage("prepare"):
            prepared = prepare(model)
            envs = tuple(
                environment(prepared, choice) for choice in find_stand_ins(prepared, shapes)
            )
        with stage("analyse"):
            graph = self.graph = analyse_graph(
                prepared, envs, attention=attention, allow_norm=allow_norm
            )
        if not graph.prunable:
            return self.result("nothing", "every group is frozen" if graph.groups else "no groups")
        with stage("score"):
            values = score(graph, importance)
        with stage("select"):
            plan = select(graph, values, ratio=ratio)
        with stage("rewrite"):
            made = operate(plan).model
        self.after = count_params(made)
        with stage("verify"):
            exact = graph.exact(plan.keep)
            twin = masked_twin(plan) if exact else None
            for seed in range(4):  # as shrink does where one input drowns in rounding
                data = made_up_data(graph, seed)
                verdict = verify(model, made, twin=twin, data=data, level=level)
                if verdict.status != "not_run":
                    break
        status = _status(verdict)
        if status == "ok" and plan.removes == 0:
            status = "nothing"
        return self.result(status, verdict.reason, verdict=verdict, plan=plan, exact=exact)

    def result(
        self,
        status: str,
        reason: str,
        *,
        trace: str = "",
        verdict: Verdict | None = None,
        plan: PruningPlan | None = None,
        exact: bool = True,
    ) -> Trial:
        drift = verdict.drift if verdict is not None else {}
        return Trial(
            status=status,
            reason=reason,
            before=self.before,
            after=self.after,
            seconds={name: spent for name, spent in self.clock.seconds.items() if spent},
            gap=verdict.twin.max_rel if verdict is not None and verdict.twin is not None else None,
            moved=_moved(drift.values()) if drift else None,
            frozen=_frozen(self.graph, plan) if self.graph is not None else (),
            notes=self.graph.notes if self.graph is not None else (),
            trace=trace,
            exact=exact,
        )


def _moved(drift: Iterable[Drift]) -> float:
    """The largest relative L2; one without a figure (0 / 0) counts as not moved."""
    return max((one.rel_l2 for one in drift if one.rel_l2 == one.rel_l2), default=0.0)


def _status(verdict: Verdict) -> str:
    match verdict.status:
        case "passed":
            return "ok"
        case "not_run":
            return "noise"
        case _:
            return "twin failed" if verdict.twin is not None else "broken"


def _frozen(graph: DependencyGraph, plan: PruningPlan | None) -> tuple[Frozen, ...]:
    """Groups that stay whole; of those that were merely not cut, the reason is the plan's."""
    found = []
    for group in graph.groups:
        reason = group.frozen
        if reason is None and plan is not None and plan.keep[group.id].size == group.size:
            reason = plan.why.get(group.id, "not cut")
        if reason is not None:
            found.append(Frozen(group.width, group.name, reason))
    return tuple(sorted(found, key=lambda one: -one.width))


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table with its columns aligned; those whose cells are numbers to the right."""
    cells = [list(header), *map(list, rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    right = [
        len(cells) > 1 and all(_is_number(row[column]) for row in cells[1:])
        for column in range(len(header))
    ]
    lines = [
        "| "
        + " | ".join(
            text.rjust(width) if to_right else text.ljust(width)
            for text, width, to_right in zip(row, widths, right, strict=True)
        ).rstrip()
        + " |"
        for row in cells
    ]
    rule = "|".join(
        "-" * (width + 1) + (":" if to_right else "-")
        for width, to_right in zip(widths, right, strict=True)
    )
    return "\n".join([lines[0], f"|{rule}|", *lines[1:]])


def _is_number(text: str) -> bool:
    return text in ("", "-") or text.replace(".", "", 1).replace(",", "").isdigit()


def short(text: str, length: int = 90) -> str:
    """One line for a table cell, cut to a length."""
    line = " ".join(text.split()).replace("|", "/")
    return line if len(line) <= length else line[: length - 1] + "…"


def state(result: Trial) -> str:
    """The status, with what weakens it."""
    if result.status == "ok" and not result.proves:
        return "ok (weak)" if result.exact else "ok (inexact)"
    return result.status
