"""The long run: thousands of random graphs, cut at random, each equal to its masked twin.

    python tools/bench/fuzz.py --count 5000
    python tools/bench/fuzz.py --count 5000 --transformers --out build/fuzz_transformers

A run goes on where the last one in the same folder stopped. Every finding is saved with its seed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import onnx

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from onnxprune.analyse import analyse
from onnxprune.data import random_data
from onnxprune.model import Model
from onnxprune.runtime import accepts
from tests.oracle import assert_equals_masked_twin, assert_rewrites, plan_at, plan_at_random
from tests.property.graphs import known_ops, random_model
from tests.property.transformers import random_transformer

WANTED = 50  # graphs in which an operator meets cut channels
_SAVE_EVERY = 100


@dataclass
class State:
    """Where a run stands; kept in a file between runs."""

    next_seed: int = 0
    tally: Counter[str] = field(default_factory=Counter)
    operators: Counter[str] = field(default_factory=Counter)
    findings: list[int] = field(default_factory=list)

    @classmethod
    def load(cls, path: Path, first: int) -> State:
        if not path.exists():
            return cls(next_seed=first)
        kept = json.loads(path.read_text())
        return cls(
            kept["next_seed"],
            Counter(kept["tally"]),
            Counter(kept["operators"]),
            list(kept["findings"]),
        )

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(vars(self), indent=1))


def focus_of(seed: int, operators: Counter[str]) -> str:
    """The operator a graph is to have: each in turn, and every other time the rarest so far."""
    names = known_ops()
    if seed % 2:
        return min(names, key=lambda name: (operators[name], (names.index(name) + seed) % 7))
    return names[seed // 2 % len(names)]


def check(proto: onnx.ModelProto, seed: int, state: State) -> None:
    """Try two plans on one graph; whatever is wrong raises."""
    model = Model(proto)
    known = not any(node.domain for node in proto.graph.node)
    if known and accepts(model, random_data(model).batches[0]) is not None:
        state.tally["not run by ONNX Runtime"] += 1
        return
    graph = analyse(model, attention=("heads", "dims")[seed % 2])
    seen: set[str] = set()
    effect = 0.0
    for plan in (plan_at(graph, 0.5, seed), plan_at_random(graph, seed)):
        if known:
            outcome = assert_equals_masked_twin(model, plan, vacuous=True)
            seen |= set(outcome.touched)
            effect = max(effect, outcome.effect)
        else:
            assert_rewrites(model, plan)
    state.operators.update(seen)
    state.tally["unknown operator" if not known else "cut" if seen else "nothing to cut"] += 1
    if seen and effect < 1e-3:
        state.tally["cut, but it does not show"] += 1


def run(state: State, count: int, folder: Path, *, transformers: bool = False) -> None:
    """Check ``count`` more graphs."""
    for number in range(count):
        seed = state.next_seed
        focus = focus_of(seed, state.operators)
        made = f"random_transformer({seed})" if transformers else f"random_model({seed}, {focus!r})"
        proto = random_transformer(seed) if transformers else random_model(seed, focus)
        try:
            check(proto, seed, state)
        except Exception as error:  # anything at all is a finding
            state.tally["FOUND"] += 1
            state.findings.append(seed)
            onnx.save(proto, folder / f"{seed}.onnx")
            said = f"{type(error).__name__}: {error}"
            (folder / f"{seed}.txt").write_text(f"{made}\n{said}\n")
            print(f"{made}: {said[:300]}", flush=True)
        state.next_seed += 1
        if number % _SAVE_EVERY == 0:
            state.save(folder / "state.json")
    state.save(folder / "state.json")


def table(state: State) -> str:
    """Counts of graphs and of operators, the rarest first."""
    lines = [f"{count:>7}  {what}" for what, count in state.tally.most_common()]
    counts = {name: state.operators[name] for name in known_ops()}
    rare = {name: count for name, count in counts.items() if count < WANTED}
    lines.append(f"operators with fewer than {WANTED} graphs: {len(rare)} of {len(counts)}")
    ordered = sorted(counts.items(), key=lambda item: (item[1], item[0]))
    row: list[str] = []
    for name, count in ordered:
        row.append(f"{name} {count}")
        if len(row) == 8:
            lines.append("  " + ", ".join(row))
            row = []
    return "\n".join([*lines, "  " + ", ".join(row)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000, help="graphs to check")
    parser.add_argument("--seed", type=int, default=0, help="first seed of a new run")
    parser.add_argument("--out", type=Path, default=Path("build/fuzz"), help="state and findings")
    parser.add_argument("--transformers", action="store_true", help="random transformer blocks")
    given = parser.parse_args()
    warnings.simplefilter("ignore")  # random numbers overflow now and then
    given.out.mkdir(parents=True, exist_ok=True)
    state = State.load(given.out / "state.json", given.seed)
    started = time.perf_counter()
    run(state, given.count, given.out, transformers=given.transformers)
    print(table(state))
    print(f"{given.count} graphs in {time.perf_counter() - started:.0f} s, findings in {given.out}")
    return 1 if state.findings else 0


if __name__ == "__main__":
    sys.exit(main())
