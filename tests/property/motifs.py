"""The table of motifs: pieces of network that turn one tensor into another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from tests.property.builder import Builder
from tests.property.tensors import T

# Builds a piece that contains the operator ``op`` (its third argument); None where it does not fit.
Build: TypeAlias = Callable[[Builder, T, str], "T | None"]

MAPS = ("map2", "map1", "map3")
ANY = (*MAPS, "last", "flat")


@dataclass(frozen=True, slots=True)
class Motif:
    """A way to use an operator.

    Attributes:
        op: The operator it is there for; it may bring others.
        build: Appends it.
        on: Kinds of tensors it takes.
        since, until: Opsets that have it.
    """

    op: str
    build: Build
    on: tuple[str, ...]
    since: int = 7
    until: int = 23

    def fits(self, b: Builder, x: T) -> bool:
        return x.kind in self.on and self.since <= b.opset <= self.until


MOTIFS: list[Motif] = []


def motif(
    *ops: str, on: tuple[str, ...], since: int = 7, until: int = 23
) -> Callable[[Build], Build]:
    """Register a way to use one or several operators."""

    def register(build: Build) -> Build:
        MOTIFS.extend(Motif(op, build, on, since, until) for op in ops)
        return build

    return register


def motifs_of(op: str) -> list[Motif]:
    return [m for m in MOTIFS if m.op == op]
