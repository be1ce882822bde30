"""What a check of a model for a target finds: findings, the target's own build, the verdict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from onnxprune.types import Shape

ERROR, WARNING, NOTE = "error", "warning", "note"
SEVERITIES = (ERROR, WARNING, NOTE)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing a target will mind, or a user should know.

    Attributes:
        severity: ``error``: the target does not take the model; ``warning``: it does, at a cost or
            under a condition; ``note``: worth knowing.
        rule: Which rule found it, such as ``qdq-zero-point``; ``parser`` and ``builder`` are the
            target itself.
        node: Node it is about, "" for the model as a whole.
        message: What is the matter.
        cure: What to do, "" where nothing needs doing.
    """

    severity: str
    rule: str
    node: str
    message: str
    cure: str = ""


@dataclass(frozen=True, slots=True)
class Profile:
    """Shapes of one dynamic input for which an engine is built.

    Attributes:
        least, best, most: The smallest, the one it is tuned for, the largest.
        given: A user gave at least one of them; the rest, or all, is ours.
    """

    least: Shape
    best: Shape
    most: Shape
    given: bool = False


@dataclass(frozen=True, slots=True)
class Build:
    """What the target said when it was asked to build the model.

    Attributes:
        status: ``built``, ``refused`` by its parser, ``failed`` in its builder, ``crashed``, or
            ``timeout``.
        version: Which library, such as ``TensorRT-RTX 1.7.1.116``; "" where it died before that.
        findings: Its errors.
        seconds: Wall-clock time of ``parse`` and ``build``, of those that ended.
        engine_bytes: Size of the engine, 0 where there is none.
    """

    status: str
    version: str
    findings: tuple[Finding, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    engine_bytes: int = 0

    @property
    def built(self) -> bool:
        """An engine came out."""
        return self.status == "built"


@dataclass(frozen=True, slots=True)
class Checked:
    """What a check found in all.

    Attributes:
        target: Such as ``tensorrt``.
        findings: Ours first, then the target's.
        build: What the target itself said; None where it was not asked.
        unasked: Why it was not asked, "" where it was.
        profiles: Shapes of dynamic inputs that the engine is for, by input.
        command: What to run next.
        expect: What to expect of it, a line each.
    """

    target: str
    findings: tuple[Finding, ...]
    build: Build | None
    unasked: str
    profiles: Mapping[str, Profile]
    command: str
    expect: tuple[str, ...] = ()

    def count(self, severity: str) -> int:
        """How many findings of a severity there are."""
        return sum(one.severity == severity for one in self.findings)

    @property
    def passed(self) -> bool:
        """The target takes the model, as far as anybody knows."""
        return not self.count(ERROR) and (self.build is None or self.build.built)
