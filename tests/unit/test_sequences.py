"""Splits into a sequence: the channels of its elements are cut like those of any slice."""

from __future__ import annotations

import numpy as np
import pytest

from onnxprune.analyse import analyse
from onnxprune.model import Model
from onnxprune.rewrite import operate
from onnxprune.sequences import slice_sequences
from tests.oracle import assert_equals_masked_twin, plan_at
from tests.small import array, parsed


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def halves(sizes: np.ndarray, first: int, second: int, after: str = "") -> Model:
    return parsed(
        f"""g (float[1,3,6,6] x) => (float[1,4,6,6] y) {{
        a = Conv(x, w1)  q = SplitToSequence<axis=1>(a, sizes)
        l = SequenceAt(q, i)  r = SequenceAt(q, j)  {after}
        m = Relu(l)  b = Conv(m, w2)  c = Conv(r, w3)  y = Add(b, c)}}""",
        w1=normal(12, 3, 1, 1), w2=normal(4, 8, 1, 1), w3=normal(4, 4, 1, 1),
        sizes=sizes, i=np.asarray(first), j=np.asarray(second),
    )  # fmt: skip


@pytest.mark.parametrize(("first", "second"), [(0, 1), (0, -1), (-2, 1)])
def test_elements_of_a_split_by_sizes_are_cut(first: int, second: int) -> None:
    model = halves(np.asarray([8, 4]), first, second)
    graph = analyse(model)
    surgery = operate(plan_at(graph, 0.5))
    assert array(surgery.model, "w2").shape == (4, 4, 1, 1)
    assert array(surgery.model, "w3").shape == (4, 2, 1, 1)
    assert "SplitToSequence" not in {node.op_type for node in surgery.model.proto.graph.node}
    assert_equals_masked_twin(model, plan_at(graph, 0.5))


def test_shorter_last_piece_of_a_split_by_one_size_is_cut() -> None:
    model = halves(np.asarray(8), 0, 1)
    graph = analyse(model)
    assert array(operate(plan_at(graph, 0.5)).model, "w3").shape == (4, 2, 1, 1)
    assert_equals_masked_twin(model, plan_at(graph, 0.5))


@pytest.mark.parametrize(
    ("sizes", "second", "after"),
    [
        pytest.param(np.asarray(8), -1, "", id="counted from an end nobody knows"),
        pytest.param(np.asarray([8, 4]), 1, "n = SequenceLength(q)", id="its length is asked for"),
    ],
)
def test_sequence_that_something_else_reads_stays(
    sizes: np.ndarray, second: int, after: str
) -> None:
    model = halves(sizes, 0, second, after)
    assert slice_sequences(model) is model
    assert not analyse(model).prunable


def test_names_of_the_bounds_are_new() -> None:
    model = halves(np.asarray([8, 4]), 0, 1)
    model.proto.graph.node[3].output[0] = "l_starts"
    model.proto.graph.node[6].input[0] = "l_starts"
    names = [name for node in slice_sequences(model).proto.graph.node for name in node.output]
    assert len(names) == len(set(names))
