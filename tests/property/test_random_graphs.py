from __future__ import annotations

from collections import Counter

import onnx
import pytest
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st

from onnxprune.analyse import analyse
from onnxprune.data import random_data
from onnxprune.model import Model
from onnxprune.ops import registry
from onnxprune.runtime import accepts
from tests.oracle import (
    assert_equals_masked_twin,
    assert_rewrites,
    plan_at,
    plan_at_random,
    touched,
)
from tests.property.graphs import known_ops, models, random_model
from tests.property.pointwise import UNARY
from tests.property.transformers import random_transformer, transformers

# No motif can have these: a type or a version that ONNX Runtime does not run.
_NOT_RUN = {"BitCast", "OptionalGetElement", "Swish"}
# The graphs have opsets up to 23, and only operators of the standard; unit tests have these.
_NOT_WRITTEN = {"CumProd", "SimplifiedLayerNormalization", "TensorScatter"}
_SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
_MODES = st.sampled_from(["heads", "dims"])


def _check(proto: onnx.ModelProto, mode: str, seed: int) -> None:
    model = Model(proto)
    known = not any(node.domain for node in proto.graph.node)
    if known:
        assume(accepts(model, random_data(model).batches[0]) is None)
    graph = analyse(model, attention=mode)
    for plan in (plan_at(graph, 0.5, seed), plan_at_random(graph, seed)):
        if known:
            outcome = assert_equals_masked_twin(model, plan, vacuous=True)
            event("cut" if outcome.cut else "nothing to cut")
        else:
            assert_rewrites(model, plan)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=_SLOW)
@given(models(), _MODES, st.integers(0, 99))
def test_random_graph_equals_its_masked_twin(proto: onnx.ModelProto, mode: str, seed: int) -> None:
    _check(proto, mode, seed)


@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=_SLOW)
@given(transformers(), _MODES, st.integers(0, 99))
def test_random_transformer_equals_its_masked_twin(
    proto: onnx.ModelProto, mode: str, seed: int
) -> None:
    _check(proto, mode, seed)


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=_SLOW)
@given(transformers(), _MODES, st.integers(0, 9999))
def test_many_random_transformers_equal_their_masked_twins(
    proto: onnx.ModelProto, mode: str, seed: int
) -> None:
    _check(proto, mode, seed)


@pytest.mark.slow
@settings(max_examples=500, deadline=None, suppress_health_check=_SLOW)
@given(models(), _MODES, st.integers(0, 9999))
def test_many_random_graphs_equal_their_masked_twins(
    proto: onnx.ModelProto, mode: str, seed: int
) -> None:
    _check(proto, mode, seed)


def test_most_random_graphs_lose_channels_and_show_it() -> None:
    lost: Counter[str] = Counter()
    for seed in range(120):
        proto = random_model(seed)
        model = Model(proto)
        if any(node.domain for node in proto.graph.node):
            continue
        if accepts(model, random_data(model).batches[0]) is not None:
            continue
        outcome = assert_equals_masked_twin(model, plan_at(analyse(model), 0.5), vacuous=True)
        lost["all"] += 1
        lost["cut"] += outcome.cut > 0
        lost["seen"] += outcome.effect > 1e-3
    assert lost["all"] >= 100
    assert lost["cut"] >= 0.8 * lost["all"]
    assert lost["seen"] >= 0.95 * lost["cut"]


def test_most_random_transformers_lose_channels_and_every_frozen_group_has_a_reason() -> None:
    lost: Counter[str] = Counter()
    for seed in range(12):
        model = Model(random_transformer(seed))
        if accepts(model, random_data(model).batches[0]) is not None:
            continue
        graph = analyse(model, attention=("heads", "dims")[seed % 2])
        outcome = assert_equals_masked_twin(model, plan_at(graph, 0.5), vacuous=True)
        lost["all"] += 1
        lost["cut"] += outcome.cut > 0
        lost["seen"] += outcome.effect > 1e-3
        assert all(group.frozen for group in graph.groups if group not in graph.prunable)
    assert lost["all"] >= 10
    assert lost["cut"] >= 0.9 * lost["all"]
    assert lost["seen"] >= 0.9 * lost["cut"]


@pytest.mark.parametrize("op_type", known_ops())
def test_operator_occurs_where_channels_are_cut(op_type: str) -> None:
    for seed in range(40):
        model = Model(random_model(seed, op_type))
        if op_type in touched(plan_at(analyse(model), 0.5)):
            return
    pytest.fail(f"{op_type} never meets a cut channel")


def test_every_operator_of_the_table_has_a_motif() -> None:
    table = {name for domain, name in registry.entries() if domain == ""}
    schemas = onnx.defs.get_all_schemas_with_history()
    unary = {s.name for s in schemas if not s.domain and registry.is_unary(s.name, s.since_version)}
    assert set(UNARY) <= unary
    assert table | unary <= {*known_ops(), *_NOT_RUN, *_NOT_WRITTEN}
