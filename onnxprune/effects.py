"""What a rule may say about the slots it sees; nothing else leaves a rule."""

from __future__ import annotations

from dataclasses import dataclass

from onnxprune.types import IntArray, Shape


@dataclass(frozen=True, slots=True)
class Tie:
    """Slots that must go together; the arrays broadcast against one another."""

    a: IntArray
    b: IntArray


@dataclass(frozen=True, slots=True)
class Freeze:
    """Slots that must stay, and why."""

    slots: IntArray
    reason: str


@dataclass(frozen=True, slots=True)
class Rows:
    """Every row of a field (one index on each of ``axes``) must keep the same number.

    ``hard``: the rows follow from use and may not be exchanged for another axis.
    """

    field: IntArray
    axes: tuple[int, ...]
    hard: bool


@dataclass(frozen=True, slots=True)
class Produces:
    """Slots of a weight axis that makes channels."""

    slots: IntArray


@dataclass(frozen=True, slots=True)
class Consumes:
    """Slots of a weight axis that reads channels."""

    slots: IntArray


@dataclass(frozen=True, slots=True)
class Contracts:
    """A product of two activations sums over this field: no weight reads it.

    Attributes:
        field: Rank of the operand.
        operand: Input position of the operand that a masked twin multiplies.
        shape: Shape of the operand.
    """

    field: IntArray
    operand: int
    shape: Shape


@dataclass(frozen=True, slots=True)
class Heads:
    """Slots of which one is a whole attention head."""

    slots: IntArray


@dataclass(frozen=True, slots=True)
class Inexact:
    """Slots whose removal changes the statistics of a normalisation: no twin can prove it."""

    slots: IntArray


@dataclass(frozen=True, slots=True)
class Later:
    """Where a rule cannot decide yet: what it falls back to once nothing else changes."""

    effect: Tie | Freeze


@dataclass(frozen=True, slots=True)
class Adopts:
    """Labels for an axis along which a tensor holds copies: it will be as long as they need it.

    Attributes:
        tensor: What an Expand or a ConstantOfShape made.
        axis: Axis of that tensor.
        slots: Labels along it, shape (extent,).
    """

    tensor: str
    axis: int
    slots: IntArray


Effect = Adopts | Inexact | Tie | Freeze | Rows | Produces | Consumes | Contracts | Heads | Later
