from __future__ import annotations

import numpy as np
import pytest

from onnxprune.analyse import analyse
from onnxprune.data import random_data
from onnxprune.errors import UsageError
from onnxprune.groups import DependencyGraph
from onnxprune.rewrite import operate
from onnxprune.score import score
from onnxprune.select import PruningPlan, select
from onnxprune.types import Float64Array
from tests.oracle import assert_equals_masked_twin
from tests.small import array, conv_chain, parsed


def ramp(graph: DependencyGraph, scale: float = 1.0) -> dict[int, Float64Array]:
    """Importance that grows with the index, and with the group."""
    return {
        g.id: scale ** g.id * np.arange(1.0, g.size + 1) for g in graph.prunable
    }  # fmt: skip


def sizes(plan: PruningPlan) -> list[int]:
    return [plan.keep[group.id].size for group in plan.graph.prunable]


@pytest.mark.parametrize(
    ("ratio", "kept"),
    [(0.0, 10), (0.05, 10), (0.1, 9), (0.3, 7), (0.5, 5), (0.7, 3), (0.99, 1), (0.29999, 8)],
)
def test_ratio_removes_the_floor_of_its_share(ratio: float, kept: int) -> None:
    graph = analyse(conv_chain((3, 10)))
    assert sizes(select(graph, ramp(graph), ratio=ratio)) == [kept]


@pytest.mark.parametrize(
    ("width", "ratio", "round_to", "kept"),
    [(32, 0.5, 8, 16), (30, 0.5, 8, 16), (30, 0.4, 8, 24), (30, 0.1, 8, 30), (6, 0.5, 8, 6),
     (24, 0.9, 8, 8), (24, 0.5, 5, 15)],
)  # fmt: skip
def test_rounding_leaves_a_multiple_and_never_removes_more(
    width: int, ratio: float, round_to: int, kept: int
) -> None:
    graph = analyse(conv_chain((3, width)))
    plan = select(graph, ramp(graph), ratio=ratio, round_to=round_to)
    assert sizes(plan) == [kept]


def test_min_channels_stay_in_every_group() -> None:
    graph = analyse(conv_chain((3, 10, 40)))
    assert sizes(select(graph, ramp(graph), ratio=0.9, min_channels=6)) == [6, 6]
    assert sizes(select(graph, ramp(graph), ratio=0.9, min_channels=100)) == [10, 40]


def test_ties_break_by_index() -> None:
    graph = analyse(conv_chain((3, 10)))
    plan = select(
        graph, {0: np.ones(10)} | {g.id: np.ones(g.size) for g in graph.prunable}, ratio=0.4
    )
    np.testing.assert_array_equal(next(iter(plan.keep.values())), np.arange(4, 10))


def test_nan_goes_first_and_infinity_last() -> None:
    graph = analyse(conv_chain((3, 4)))
    values = {graph.prunable[0].id: np.array([1.0, np.inf, np.nan, 0.0])}
    plan = select(graph, values, ratio=0.5)
    np.testing.assert_array_equal(next(iter(plan.keep.values())), [0, 1])


# ------------------------------------------------------------------------------------ global


def test_global_removes_the_lowest_over_all_groups() -> None:
    graph = analyse(conv_chain((3, 8, 12)))
    first, second = graph.prunable
    values = {first.id: np.full(8, 1.0), second.id: np.full(12, 10.0)}
    plan = select(graph, values, ratio=0.2, scope="global", comparable=True)
    assert sizes(plan) == [4, 12]


def test_global_meets_its_budget_over_all_units() -> None:
    graph = analyse(conv_chain((3, 8, 12, 20)))
    rng = np.random.default_rng(0)
    values = {g.id: rng.random(g.size) for g in graph.prunable}
    for ratio in (0.1, 0.33, 0.5, 0.75):
        plan = select(graph, values, ratio=ratio, scope="global")
        assert plan.removes == int(ratio * 40 + 1e-9)


def test_global_normalises_each_group_by_its_mean() -> None:
    graph = analyse(conv_chain((3, 8, 12)))
    first, second = graph.prunable
    values = {first.id: np.arange(1.0, 9), second.id: 1e6 * np.arange(1.0, 13)}
    plan = select(graph, values, ratio=0.5, scope="global")
    assert all(0 < kept < g.size for kept, g in zip(sizes(plan), graph.prunable, strict=True))


def test_max_ratio_caps_what_global_takes_from_one_group() -> None:
    graph = analyse(conv_chain((3, 10, 10)))
    first, second = graph.prunable
    values = {first.id: np.full(10, 1.0), second.id: np.full(10, 9.0)}
    plan = select(graph, values, ratio=0.4, scope="global", max_ratio=0.6, comparable=True)
    assert sizes(plan) == [4, 8]


# ----------------------------------------------------------------------------------- filters


def test_ignore_and_only_match_weights_and_nodes() -> None:
    graph = analyse(conv_chain((3, 8, 12)))
    assert sizes(select(graph, ramp(graph), ratio=0.5, ignore=["w0"])) == [8, 6]
    assert sizes(select(graph, ramp(graph), ratio=0.5, only=["c1"])) == [8, 6]
    plan = select(graph, ramp(graph), ratio=0.5, only=["w*"], ignore=["w1"])
    assert sizes(plan) == [4, 12]
    assert plan.why[graph.prunable[1].id] == "kept: ignore 'w1'"


def test_ratio_for_overrides_the_ratio_of_what_it_matches() -> None:
    graph = analyse(conv_chain((3, 8, 12)))
    assert sizes(select(graph, ramp(graph), ratio=0.5, ratio_for={"w1": 0.25})) == [4, 9]
    plan = select(graph, ramp(graph), ratio=0.0, ratio_for={"w*": 0.75})
    assert sizes(plan) == [2, 3]


def test_pattern_that_matches_only_what_is_frozen_changes_nothing() -> None:
    graph = analyse(conv_chain((3, 8, 12)))
    assert sizes(select(graph, ramp(graph), ratio=0.5, ignore=["head"])) == [4, 6]


def test_group_with_a_ratio_of_its_own_is_no_part_of_the_global_ranking() -> None:
    graph = analyse(conv_chain((3, 8, 12)))
    plan = select(graph, ramp(graph), ratio=0.5, scope="global", ratio_for={"w0": 0.25})
    assert sizes(plan) == [6, 6]


def test_pattern_may_be_a_plain_string() -> None:
    graph = analyse(conv_chain((3, 8, 12)))
    assert sizes(select(graph, ramp(graph), ratio=0.5, ignore="w0")) == [8, 6]
    assert sizes(select(graph, ramp(graph), ratio=0.5, only="w0")) == [4, 12]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"ratio_for": {"head": 0.5}}, "ratio-for 'head' matches no channels that can go: reaches"),
        ({"only": "head"}, "only 'head' matches no channels that can go: reaches output 'y'"),
        ({"ratio_for": {"r0": 0.5}}, "no channels that can go: no weight of that name makes them"),
        ({"max_ratio": 0.5}, "max-ratio 0.5 has no effect: it is for scope global"),
    ],
    ids=["frozen", "only", "no weight", "scope"],
)
def test_option_without_effect_is_warned_of(
    options: dict[str, object], says: str, caplog: pytest.LogCaptureFixture
) -> None:
    graph = analyse(conv_chain((3, 8, 12)))
    select(graph, ramp(graph), ratio=0.5, **options)  # type: ignore[arg-type]  # test
    (record,) = caplog.records
    assert says in record.getMessage()


def test_objects_print_in_a_few_lines() -> None:
    graph = analyse(conv_chain((3, 64, 2048)))
    plan = select(graph, ramp(graph), ratio=0.5, ignore="w0")
    assert repr(plan) == "PruningPlan(1024 of 2112 units removed)"
    assert str(plan).splitlines()[1:] == [
        "    0     64     64  w0  kept: ignore 'w0'",
        "    1   2048   1024  w1  1024 of 2048 removed",
        "    2      4      4  head  frozen: reaches output 'y' through Gemm 'y'",
    ]
    assert repr(graph) == "DependencyGraph(3 groups, 2 can be pruned)"
    for shown in (graph.groups[1], score(graph, "l1"), random_data(graph.graph.source)):
        assert "array" not in repr(shown)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"ratio": 1.0}, "ratio is 1"),
        ({"ratio": -0.1}, "ratio is -0.1"),
        ({"ratio": float("nan")}, "ratio is nan"),
        ({"ratio": 0.5, "scope": "both"}, "scope is 'both'"),
        ({"ratio": 0.5, "round_to": 0}, "round-to is 0"),
        ({"ratio": 0.5, "min_channels": 0}, "min-channels is 0"),
        ({"ratio": 0.5, "max_ratio": 1.0}, "max-ratio is 1"),
        ({"ratio": 0.5, "ignore": ["nothing*"]}, r"ignore 'nothing\*' matches no node"),
        ({"ratio": 0.5, "only": ["nothing"]}, "only 'nothing' matches no node"),
        ({"ratio": 0.5, "ratio_for": {"no": 0.1}}, "ratio-for 'no' matches no node"),
        ({"ratio": 0.5, "ratio_for": {"w0": 1.5}}, "ratio-for 'w0': the ratio is 1.5"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, object], says: str) -> None:
    graph = analyse(conv_chain())
    with pytest.raises(UsageError, match=says):
        select(graph, ramp(graph), **options)  # type: ignore[arg-type]  # test


# ------------------------------------------------------------------------------ balance sets


def grouped() -> DependencyGraph:
    """Two groups of six channels each, read by a grouped Conv of two groups of four."""
    rng = np.random.default_rng(0)

    def weight(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    return analyse(
        parsed(
            "g (float[1,3,4,4] x) => (float[1,2,4,4] y)\n"
            "{a = Conv(x, w) r = Relu(a) b = Conv<group=2>(r, k) y = Conv(b, v)}",
            w=weight(12, 3, 1, 1),
            k=weight(8, 6, 1, 1),
            v=weight(2, 8, 1, 1),
        )
    )


def test_rows_of_a_grouped_conv_keep_equal_counts_of_their_own_choice() -> None:
    graph = grouped()
    first = next(g for g in graph.prunable if g.producers[0].tensor == "w")
    assert [cell.size for cell in first.cells] == [6, 6]
    values = ramp(graph)
    values[first.id] = np.array([1, 2, 3, 9, 9, 9, 9, 9, 9, 1, 2, 3], np.float64)
    plan = select(graph, values, ratio=0.5)
    np.testing.assert_array_equal(plan.keep[first.id], [3, 4, 5, 6, 7, 8])
    surgery = operate(plan)
    assert array(surgery.model, "k").shape == (4, 3, 1, 1)
    assert_equals_masked_twin(graph.graph.model, plan)


def test_uneven_ratio_takes_the_floor_in_each_row() -> None:
    graph = grouped()
    first = next(g for g in graph.prunable if g.producers[0].tensor == "w")
    plan = select(graph, ramp(graph), ratio=0.45)
    assert plan.keep[first.id].size == 8  # two of six in each row
    assert_equals_masked_twin(graph.graph.model, plan)


def test_rounding_counts_the_width_of_the_weight_in_a_grid() -> None:
    graph = grouped()
    first = next(g for g in graph.prunable if g.producers[0].tensor == "w")
    plan = select(graph, ramp(graph), ratio=0.6, round_to=4)
    assert plan.keep[first.id].size % 4 == 0
    assert plan.keep[first.id].size >= 6
    assert_equals_masked_twin(graph.graph.model, plan)
