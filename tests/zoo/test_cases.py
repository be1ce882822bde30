"""The hard cases: what must shrink shrinks by the ratio contract, the rest keeps its shape."""

from __future__ import annotations

import numpy as np
import pytest

from onnxprune.analyse import analyse
from onnxprune.errors import ModelError
from onnxprune.io import load
from onnxprune.rewrite import operate
from onnxprune.select import PruningPlan, select
from tests.oracle import assert_equals_masked_twin
from tests.zoo.shared import CASES, manifest, needs_cases

ENTRIES = {str(entry["id"]): entry for entry in manifest(CASES)}
VALID = [name for name, entry in ENTRIES.items() if entry["error"] is None]
INVALID = [n for n, e in ENTRIES.items() if e["error"] is not None and n != "inv_all_frozen"]
# Scale and bias of GroupNormalization 18 have one entry for each group; whole groups go, and then
# both follow. The manifest lets the scale shrink ("may") but not the bias beside it.
MANIFEST_DISAGREES = {"groupnorm_op_18": {"gn.bias"}}
# An infinite scale makes every output NaN, whatever is cut.
ALL_NAN = {"nan_inf_gamma"}


def half(name: str) -> PruningPlan:
    entry = ENTRIES[name]
    graph = analyse(load(CASES / "onnx" / str(entry["path"])))
    rng = np.random.default_rng(0)
    importance = {group.id: rng.random(group.size) for group in graph.prunable}
    return select(graph, importance, ratio=0.5)


@needs_cases
@pytest.mark.parametrize("name", VALID)
def test_case_is_cut_as_its_manifest_says(name: str) -> None:
    entry, plan = ENTRIES[name], half(name)
    model = plan.graph.graph.model
    if entry["runs"]:
        assert_equals_masked_twin(model, plan, vacuous=name in ALL_NAN)
    before, after = model.weights(), operate(plan).model.weights()
    for weight in entry["shrink"]:  # type: ignore[attr-defined]
        axis = entry["axis"][weight]  # type: ignore[index]
        size = before[weight].shape[axis]
        assert after[weight].shape[axis] == size - size // 2, weight
    for weight in set(entry["keep"]) - MANIFEST_DISAGREES.get(name, set()):  # type: ignore[call-overload]
        if weight in before:
            assert after[weight].shape == before[weight].shape, weight


@needs_cases
@pytest.mark.parametrize("name", INVALID)
def test_invalid_file_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(ModelError) as caught:
        load(CASES / "onnx" / f"{name}.onnx")
    assert "\n" not in str(caught.value)
