from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

_TOOL = Path(__file__).parents[2] / "tools" / "bench" / "mutate.py"
# A rule of each family, and the most delicate thing about it.
_HANDFUL = [
    ("Conv", "repair left out"),
    ("Conv", "hard rows left out"),
    ("MatMul", "ties off by one"),
    ("Add", "ties left out"),
    ("Softmax", "freezes left out"),
    ("GroupNormalization", "repair left out"),
    ("Concat", "labels of the output off by one"),
    ("Slice", "movement off by one"),
    ("Reshape", "movement off by one"),
    ("DepthToSpace", "movement off by one"),
    ("ReduceMean", "labels of the output off by one"),
    ("Pad", "freezes left out"),
]


@pytest.fixture(scope="module")
def mutate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mutate", _TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["mutate"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize(("op_type", "fault"), _HANDFUL)
def test_random_graphs_notice_a_wrong_rule(mutate: ModuleType, op_type: str, fault: str) -> None:
    mutant = next(m for m in mutate.mutants([op_type]) if m.fault == fault)
    verdict = mutate.judge(mutant, mutate.Pool(op_type, 150), enough=1)
    assert verdict.reached
    assert verdict.killed


def test_rule_is_right_again_after_its_mutant(mutate: ModuleType) -> None:
    mutant = next(iter(mutate.mutants(["Conv"])))
    pool = mutate.Pool("Conv", 3)
    graphs = pool.upto(3)
    mutate.judge(mutant, pool, enough=0)
    assert not any(mutate.fails(model, seed) for seed, model in graphs)
