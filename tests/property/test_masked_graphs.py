from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from onnxprune.analyse import analyse
from onnxprune.data import random_data
from onnxprune.lossless import lossless_plan
from onnxprune.model import Model
from onnxprune.rewrite import operate
from onnxprune.runtime import accepts, session
from tests.masked import masked
from tests.oracle import gap
from tests.property.graphs import random_model

_HALF = (5e-2, 10, 16)  # tolerance where weights have 16 bits, and their element types
_TOLERANCE = 2e-4  # a mean over thousands of equal numbers is off by as much


@pytest.mark.parametrize("which", ["consumers", "producers", "filters"])
def test_masked_random_graph_loses_channels_and_gives_the_same(which: str) -> None:
    count: Counter[str] = Counter()
    for seed in range(40):
        model = Model(random_model(seed))
        if any(node.domain for node in model.proto.graph.node):
            continue
        plan, model = masked(model, 0.5, which, seed)
        data = random_data(model)
        if accepts(model, data.batches[0]) is not None:
            continue
        found = lossless_plan(analyse(model))
        made = operate(found).model
        runs = [
            [session(each, optimise=False).run(batch) for batch in data.probes]
            for each in (model, made)
        ]
        if not all(np.isfinite(array).all() for run in runs[0] for array in run.values()):
            continue
        tolerance, *types = _HALF
        half = any(tensor.data_type in types for tensor in model.proto.graph.initializer)
        for name in runs[0][0]:
            assert gap(*runs, name) <= (tolerance if half else _TOLERANCE), (seed, name)
        count["asked"] += plan.removes
        count["got"] += found.removes
    assert count["asked"] > 50
    assert count["got"] >= (1.0 if which == "consumers" else 0.5) * count["asked"]
