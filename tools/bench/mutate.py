"""Mutation check: is every rule needed, and would the random graphs notice if it were wrong?

    python tools/bench/mutate.py [OPERATOR ...]

Each rule is made wrong in a small way while the program runs; then random graphs with that operator
are cut and held against their masked twins. A mutant that no graph kills is printed as a survivor.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from onnxprune import fields
from onnxprune.analyse import analyse
from onnxprune.data import random_data
from onnxprune.effects import Effect, Freeze, Rows, Tie
from onnxprune.model import Model
from onnxprune.moves import Step, Take, shape_after
from onnxprune.ops import registry
from onnxprune.ops.registry import Entry
from onnxprune.ops.view import OpView
from onnxprune.runtime import accepts
from onnxprune.types import IntArray, Shape
from tests.oracle import assert_equals_masked_twin, plan_at
from tests.property.graphs import known_ops, random_model

# Rewrites one effect of a rule; None drops it.
_Change = Callable[[Effect], "Effect | None"]


@dataclass(frozen=True)
class Mutant:
    """One operator made wrong in one way.

    Attributes:
        op_type: The operator.
        fault: What is wrong with it.
        change: Its entry as it is to be instead, told where to count that the fault took effect.
    """

    op_type: str
    fault: str
    change: Callable[[Entry, list[int]], Entry]


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant: graphs in which the fault took effect, and graphs that failed."""

    mutant: Mutant
    reached: int
    killed: int


# -- faults ----------------------------------------------------------------------------------------


def _rolled(array: IntArray) -> IntArray:
    """Labels moved by one along the longest axis."""
    return np.roll(array, 1, axis=int(np.argmax(array.shape))) if array.size > 1 else array


def _effects_changed(change: _Change) -> Callable[[Entry, list[int]], Entry]:
    def mutate(entry: Entry, count: list[int]) -> Entry:
        rule = entry.rule
        assert rule is not None

        def wrong(op: OpView) -> Iterator[Effect]:
            for effect in rule(op):
                changed = change(effect)
                count[0] += changed is not effect
                if changed is not None:
                    yield changed

        return replace(entry, rule=wrong)

    return mutate


def _outputs_rolled(entry: Entry, count: list[int]) -> Entry:
    rule = entry.rule
    assert rule is not None

    def wrong(op: OpView) -> Iterator[Effect]:
        yield from rule(op)
        for position, found in op.outputs.items():
            op.outputs[position] = [_rolled(f) for f in found]
            count[0] += any(f.size > 1 for f in found)

    return replace(entry, rule=wrong)


def _movement_rolled(entry: Entry, count: list[int]) -> Entry:
    move = entry.move
    assert move is not None

    def wrong(
        op: OpView, source: Shape, targets: Sequence[Shape]
    ) -> Sequence[Sequence[Step]] | None:
        found = move(op, source, targets)
        if found is None:
            return None
        count[0] += 1
        return [[*steps, *_roll_after(steps, source)] for steps in found]

    return replace(entry, move=wrong)


def _roll_after(steps: Sequence[Step], shape: Shape) -> list[Step]:
    """More steps: every axis behind the batch moved by one."""
    for step in steps:
        shape = shape_after(step, shape)
    return [
        Take(axis, np.roll(np.arange(size), 1))
        for axis, size in enumerate(shape)
        if axis and size > 1
    ]


def _tie_rolled(effect: Effect) -> Effect | None:
    if not isinstance(effect, Tie):
        return effect
    a, b = np.broadcast_arrays(effect.a, effect.b)
    return Tie(a, _rolled(b)) if len(fields.varying(b)) else effect


def _without(kind: type[Effect]) -> _Change:
    return lambda effect: None if isinstance(effect, kind) else effect


def _hard_rows_softened(effect: Effect) -> Effect | None:
    return None if isinstance(effect, Rows) and effect.hard else effect


_NO_REPAIR = "repair left out"
_STRIDE = 10  # graphs that are tried before a mutant is asked to go on
_RULE_FAULTS: dict[str, Callable[[Entry, list[int]], Entry]] = {
    "labels of the output off by one": _outputs_rolled,
    "ties off by one": _effects_changed(_tie_rolled),
    "ties left out": _effects_changed(_without(Tie)),
    "freezes left out": _effects_changed(_without(Freeze)),
    "hard rows left out": _effects_changed(_hard_rows_softened),
}
# Faults that change nothing a model could show.
_OVER_ROWS = ("Softmax", "LogSoftmax", "LRN", "LpNormalization", "MeanVarianceNormalization")
_HARMLESS = {
    ("RoiAlign", "freezes left out"): "the regions are constants that nothing produces",
    ("MaxRoiPool", "freezes left out"): "the regions are constants that nothing produces",
    **dict.fromkeys(
        ((op_type, "ties off by one") for op_type in _OVER_ROWS),
        "they join labels of one tensor: off by one they join more, which is never wrong",
    ),
}


def mutants(op_types: Sequence[str] = ()) -> Iterator[Mutant]:
    """Every mutant of every operator of the table."""
    for (domain, op_type), entries in registry.entries().items():
        if domain or op_type not in known_ops() or (op_types and op_type not in op_types):
            continue
        if entries[-1].move is not None:
            yield Mutant(op_type, "movement off by one", _movement_rolled)
        else:
            for fault, change in _RULE_FAULTS.items():
                if (op_type, fault) not in _HARMLESS:
                    yield Mutant(op_type, fault, change)
        if registry.repair_of(op_type) is not None:
            yield Mutant(op_type, _NO_REPAIR, lambda entry, count: entry)


# -- running ---------------------------------------------------------------------------------------


@contextmanager
def applied(mutant: Mutant) -> Iterator[list[int]]:
    """Put a mutant in place of its rule; gives a counter of how often the fault took effect."""
    count = [0]
    table = registry.entries()
    entries = list(table[("", mutant.op_type)])
    repairs = registry._REPAIRS  # there is no other way to leave one out
    repair = repairs.get(mutant.op_type)
    mutable = table[("", mutant.op_type)]
    assert isinstance(mutable, list)
    try:
        mutable[:] = [mutant.change(entry, count) for entry in entries]
        if mutant.fault == _NO_REPAIR:
            count[0] = 1
            del repairs[mutant.op_type]
        yield count
    finally:
        mutable[:] = entries
        if repair is not None:
            repairs[mutant.op_type] = repair


class Pool:
    """Random graphs that have an operator and pass as long as nothing is wrong, found as needed."""

    def __init__(self, op_type: str, most: int) -> None:
        self._op_type = op_type
        self._most = most
        self._seed = 0
        self._found: list[tuple[int, Model]] = []

    def upto(self, count: int) -> Sequence[tuple[int, Model]]:
        """The first ``count`` graphs with their seeds, or all there are."""
        while len(self._found) < min(count, self._most) and self._seed < 4 * self._most:
            self._try(self._seed)
            self._seed += 1
        return self._found[:count]

    def _try(self, seed: int) -> None:
        proto = random_model(seed, self._op_type)
        has = any(node.op_type == self._op_type for node in proto.graph.node)
        if not has or any(node.domain for node in proto.graph.node):
            return
        model = Model(proto)
        if accepts(model, random_data(model).batches[0]) is None and not fails(model, seed):
            self._found.append((seed, model))


def fails(model: Model, seed: int) -> bool:
    """Whether the oracle finds something wrong, or anything else breaks."""
    try:
        graph = analyse(model, attention=("heads", "dims")[seed % 2])
        assert_equals_masked_twin(model, plan_at(graph, 0.5, seed), vacuous=True)
    except Exception:  # a crash is noticed too
        return True
    return False


def judge(mutant: Mutant, pool: Pool, *, enough: int) -> Verdict:
    """Try a mutant on one graph after the other, until ``enough`` of them fail (0: on all)."""
    reached = killed = tried = 0
    while True:
        graphs = pool.upto(tried + _STRIDE)[tried:]
        with applied(mutant) as count:
            for seed, model in graphs:
                before = count[0]
                killed += fails(model, seed)
                reached += count[0] > before or mutant.fault == _NO_REPAIR
        tried += len(graphs)
        if not graphs or (enough and killed >= enough):
            return Verdict(mutant, reached, killed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("op_types", nargs="*", help="operators; all by default")
    parser.add_argument("--graphs", type=int, default=150, help="graphs for each operator")
    parser.add_argument("--enough", type=int, default=3, help="stop at so many kills (0: never)")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    started = time.perf_counter()
    survivors: list[Mutant] = []
    current, pool = "", Pool("", 0)
    print(f"{'operator':28} {'fault':34} reached  killed")
    for mutant in mutants(given.op_types):
        if mutant.op_type != current:
            current = mutant.op_type
            pool = Pool(current, given.graphs)
        verdict = judge(mutant, pool, enough=given.enough)
        if not verdict.reached:
            continue
        mark = "" if verdict.killed else "  SURVIVES"
        print(
            f"{current:28} {mutant.fault:34} {verdict.reached:>7} {verdict.killed:>7}{mark}",
            flush=True,
        )
        if not verdict.killed:
            survivors.append(mutant)
    print(f"{len(survivors)} mutants survive, {time.perf_counter() - started:.0f} s")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
