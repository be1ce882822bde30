"""What a check for a target found, as lines for people and as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import RenderableType
from rich.text import Text

from onnxprune.report.model import BuildJson, CheckJson, FindingJson, ProfileJson
from onnxprune.targets.findings import NOTE, SEVERITIES, Build, Checked, Finding
from onnxprune.types import NextStep, Report

_MOST_GROUPS = 30  # lines of findings that nobody asked to be longer


def check_report(report: Report, *, verbose: bool = False) -> Iterable[RenderableType]:
    """Findings, the worst first, what TensorRT made of the model, and what to run next."""
    found = report.checked
    assert found is not None
    yield from check_lines(found, verbose=verbose)
    yield from next_lines(NextStep(found.command, found.expect))


def check_lines(found: Checked, *, verbose: bool = False, notes: bool = True) -> Iterable[Text]:
    """Findings that say the same in one line, with the first of the nodes they are about."""
    together: dict[tuple[str, str, str, str], list[Finding]] = {}
    for one in found.findings:
        if one.severity == NOTE and not (notes or verbose):
            continue
        key = (one.severity, one.rule, one.message, one.node if verbose else "")
        together.setdefault(key, []).append(one)
    groups = list(together.values())
    for same in groups if verbose else groups[:_MOST_GROUPS]:
        yield _line(_spelled(same))
    if len(groups) > _MOST_GROUPS and not verbose:
        yield _line(f"and {len(groups) - _MOST_GROUPS} more (-v shows them)")
    counts = (
        f"{found.count(kind)} {kind}{'s' if found.count(kind) != 1 else ''}" for kind in SEVERITIES
    )
    yield _line(f"{', '.join(counts)} · {_built(found)}")


def next_lines(step: NextStep) -> Iterable[Text]:
    """What to run next, and before it what to expect."""
    for text in step.expect:
        yield _line(text)
    yield _line(f"next: {step.command}")


def _spelled(same: Sequence[Finding]) -> str:
    one = same[0]
    where = f"{one.node}: " if one.node else ""
    if len(same) > 1:
        where = f"{one.node} (+{len(same) - 1}): "
    cure = f" → {one.cure}" if one.cure else ""
    return f"{one.severity} [{one.rule}] {where}{one.message}{cure}"


def _built(found: Checked) -> str:
    build = found.build
    if build is None:
        return found.unasked
    if not build.built:
        return f"{build.version or 'TensorRT-RTX'} did not build it ({build.status})"
    return (
        f"{build.version} parsed it in {build.seconds.get('parse', 0):.2f} s and built it in "
        f"{build.seconds.get('build', 0):.2f} s, without a GPU: nothing was run"
    )


def as_check_json(found: Checked) -> CheckJson:
    """The same for ``--json``."""
    return CheckJson(
        target=found.target,  # type: ignore[arg-type]  # pydantic checks it
        passed=found.passed,
        errors=found.count(SEVERITIES[0]),
        warnings=found.count(SEVERITIES[1]),
        notes=found.count(NOTE),
        findings=[
            FindingJson(
                severity=one.severity,  # type: ignore[arg-type]  # pydantic checks it
                rule=one.rule,
                node=one.node or None,
                message=one.message,
                cure=one.cure or None,
            )
            for one in found.findings
        ],
        build=None if found.build is None else _build_json(found.build),
        unasked=found.unasked or None,
        profiles={
            name: ProfileJson(
                min=list(one.least), opt=list(one.best), max=list(one.most), given=one.given
            )
            for name, one in found.profiles.items()
        },
    )


def _build_json(build: Build) -> BuildJson:
    return BuildJson(
        status=build.status,  # type: ignore[arg-type]  # pydantic checks it
        version=build.version or None,
        seconds={name: round(spent, 4) for name, spent in build.seconds.items()},
        engine_bytes=build.engine_bytes or None,
    )


def _line(text: str) -> Text:
    return Text(text, overflow="fold")
