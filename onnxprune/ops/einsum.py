"""Einsum: a sum of products over letters, seen as one product of two stacks of matrices."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from onnxprune import fields
from onnxprune.effects import Consumes, Contracts, Effect, Produces, Rows, Tie
from onnxprune.ops.linear import Masked, contract
from onnxprune.ops.norm import statistics
from onnxprune.ops.registry import macs, rule
from onnxprune.ops.view import OpView, Value
from onnxprune.types import IntArray

_ANY = "0123456789"  # letters for the axes that an ellipsis stands for


@rule("Einsum")
def einsum(op: OpView) -> Iterator[Effect]:
    """One product over the letters that both operands have and the result lacks; others pass."""
    terms = _terms(op)
    if terms is None or len(op.inputs) > 2:
        yield from op.freeze(op.inputs, "has terms that are not understood")
        return
    operands, out = terms
    summed = []
    for number, letters in enumerate(operands):
        others = "".join((*operands[:number], *operands[number + 1 :], out))
        summed.append((yield from _summed(op, op.need(number), letters, others)))
    if len(summed) == 1:
        value, letters = summed[0]
        order = [letters.index(letter) for letter in out]
        op.out([f.transpose(order) for f in value.fields])
        return
    (a, left), (b, right) = summed
    layout = _Layout.of((a, left), (b, right), out)
    for value, letters, free in ((a, left, layout.m), (b, right, layout.n)):
        if value.derived:
            value.fields = yield from _weight(op, value, letters, layout, free)
    result = yield from contract(
        op,
        layout.laid(a, left, (layout.m, layout.k, "")),
        layout.laid(b, right, ("", layout.k, layout.n)),
        _masked(op, layout, left, operands[0]),
    )
    op.out([layout.back(f, out) for f in result])


def _terms(op: OpView) -> tuple[Sequence[str], str] | None:
    """Letters of each operand and of the result; None for diagonals and what is not said."""
    equation = op.node.string("equation", "").replace(" ", "")
    given, arrow, out = equation.partition("->")
    operands = given.split(",")
    if len(operands) != len(op.inputs) or any(value is None for value in op.inputs):
        return None
    most, found = 0, []
    for value, term in zip(op.present, operands, strict=True):
        hidden = value.rank - len(term.replace("...", ""))
        most = max(most, hidden if "..." in term else 0)
        found.append(term.replace("...", _ANY[len(_ANY) - hidden :] if hidden > 0 else ""))
    if not arrow:
        once = sorted({x for x in given if x.isalpha() and given.count(x) == 1})
        out = "..." * ("..." in given) + "".join(once)
    out = out.replace("...", _ANY[len(_ANY) - most :] if most else "")
    sound = all(
        len(set(term)) == len(term) == value.rank
        for value, term in zip(op.present, found, strict=True)
    )
    known = set(out) <= set("".join(found)) and len(set(out)) == len(out)
    return (found, out) if sound and known else None


def _summed(
    op: OpView, value: Value, letters: str, others: str
) -> Generator[Effect, None, tuple[Value, str]]:
    """An operand without the letters that it alone has: it is summed over them first."""
    axes = [axis for axis, letter in enumerate(letters) if letter not in others]
    if not axes:
        return replace(value, fields=list(value.fields)), letters
    passed = yield from statistics(op, value, axes)
    keep = [axis for axis in range(value.rank) if axis not in axes]
    left = [
        f.reshape([f.shape[axis] for axis in keep])
        for f in passed
        if all(f.shape[axis] == 1 for axis in axes)
    ]
    shape = tuple(value.shape[axis] for axis in keep)
    return replace(value, shape=shape, fields=left), "".join(letters[axis] for axis in keep)


@dataclass(frozen=True, slots=True)
class _Layout:
    """Letters by what they do: stacked, of the left alone, summed, of the right alone."""

    size: Mapping[str, int]
    batch: str
    m: str
    k: str
    n: str

    @staticmethod
    def of(first: tuple[Value, str], second: tuple[Value, str], out: str) -> _Layout:
        size: dict[str, int] = {}
        for value, letters in (first, second):
            for letter, extent in zip(letters, value.shape, strict=True):
                size[letter] = max(size.get(letter, 1), extent)
        left, right = first[1], second[1]
        both = [letter for letter in left if letter in right]
        return _Layout(
            size,
            "".join(letter for letter in both if letter in out),
            "".join(letter for letter in left if letter not in right),
            "".join(letter for letter in both if letter not in out),
            "".join(letter for letter in right if letter not in left),
        )

    def laid(self, value: Value, letters: str, groups: Sequence[str]) -> Value:
        """An operand as (batch…, M, K, N), each of the last three in one axis."""
        order = [letters.index(x) for x in (*self.batch, *"".join(groups))]
        shape = tuple(value.shape[letters.index(x)] for x in self.batch)
        shape += tuple(self._extent(group) for group in groups)
        laid = [self._joined(f.transpose(order), groups) for f in value.fields]
        return replace(value, shape=shape, fields=laid)

    def _joined(self, f: IntArray, groups: Sequence[str]) -> IntArray:
        at = len(self.batch)
        full, joined = [*f.shape[:at]], [*f.shape[:at]]
        for group in groups:
            inner = f.shape[at : at + len(group)]
            wide = [self.size[x] for x in group] if max(inner, default=1) > 1 else [*inner]
            full, joined, at = [*full, *wide], [*joined, prod(wide)], at + len(group)
        return np.broadcast_to(f, full).reshape(joined)

    def _extent(self, group: str) -> int:
        return prod(self.size[x] for x in group)

    def parted(self, f: IntArray, groups: Sequence[str]) -> IntArray:
        """The last axes taken apart again into the letters of ``groups``."""
        shape = list(f.shape[: len(self.batch)])
        for group, extent in zip(groups, f.shape[len(self.batch) :], strict=True):
            shape += [self.size[x] if extent > 1 else 1 for x in group]
        return f.reshape(shape)

    def back(self, f: IntArray, out: str) -> IntArray:
        """A field of (batch…, M, 1, N) with the axes of the result."""
        letters = self.batch + self.m + self.n
        return self.parted(f, (self.m, "", self.n)).transpose([letters.index(x) for x in out])


def _weight(
    op: OpView, value: Value, letters: str, layout: _Layout, free: str
) -> Generator[Effect, None, list[IntArray]]:
    """Fields of a weight: one for all letters that are summed, one for those that it makes.

    Every index of a stacked letter slices its own, as in a stack of matrices.
    """
    wide = [axis for axis in range(value.rank) if value.shape[axis] > 1]
    batch = [axis for axis in wide if letters[axis] in layout.batch]
    inner = [axis for axis in wide if letters[axis] not in layout.batch]
    entries = value.off(inner)
    found = list(entries)
    for group in (layout.k, free):
        own = [axis for axis in inner if letters[axis] in group]
        axes = tuple(sorted((*batch, *own)))
        grid = op.births.grid(value.name, value.shape, axes) if own and len(axes) > 1 else None
        if grid is None:
            found += [f for f in value.fields if set(fields.varying(f)) & set(own)]
            continue
        labels = op.births.classes(grid)
        if batch and labels.any() and bool((labels == fields.first(labels, own)).all()):
            # Each entry goes whole or not at all, and then as an index of the stacked axis.
            for row in entries:
                yield Tie(grid, row)
            yield Produces(grid) if group is free else Consumes(grid)
            continue
        if batch:
            yield Rows(grid, tuple(batch), hard=True)
        found.append(grid)
    return found


def _masked(op: OpView, layout: _Layout, left: str, term: str) -> Masked:
    """Where a twin masks the left operand."""

    def masked(f: IntArray) -> Iterator[Contracts]:
        parted = layout.parted(f, (layout.m, layout.k, ""))
        letters = layout.batch + layout.m + layout.k
        own = parted.transpose([letters.index(x) for x in left])
        shape = [own.shape[left.index(x)] if x in left else 1 for x in term]
        yield Contracts(own.reshape(shape), 0, op.x.shape)

    return masked


@macs("Einsum")
def einsum_macs(op: OpView) -> int:
    """One for each combination of all letters."""
    terms = _terms(op)
    if terms is None:
        return 0
    size: dict[str, int] = {}
    for value, letters in zip(op.present, terms[0], strict=True):
        for letter, extent in zip(letters, value.shape, strict=True):
            size[letter] = max(size.get(letter, 1), extent)
    return prod(size.values())
