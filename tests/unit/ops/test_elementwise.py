from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from onnxprune.analyse import analyse
from onnxprune.ops.registry import is_unary
from tests.property.pointwise import UNARY
from tests.unit.ops.models import (
    assert_coupled,
    assert_exact,
    assert_frozen,
    between_convs,
    between_matmuls,
    overridable,
    units,
)

SAFE = "p0 = Abs(a)  p = Add(p0, half)"
HALF = np.asarray(0.5, np.float32)
POSITIVE = np.linspace(0.5, 1.5, 8, dtype=np.float32).reshape(8, 1, 1)
WHOLE = "s = Sigmoid(a)  f = Mul(s, fifty)"


@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Div", "Pow", "Sum", "Mean", "Max", "Min"])
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_constant_is_cut_with_the_data_on_either_side(op: str, left: bool) -> None:
    operands = "c, p" if left else "p, c"
    found = between_convs(f"{SAFE}  m = {op}({operands})", half=HALF, c=POSITIVE)
    assert_coupled(analyse(found), ("w1", 0), ("c", 0), ("w2", 1))
    assert_exact(found)


@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Sum", "Mean", "Max", "Min"])
def test_two_branches_that_meet_lose_the_same_channels(op: str) -> None:
    found = between_convs(f"b = Conv(x, v)  m = {op}(a, b)", v=(8, 3, 1, 1))
    assert_coupled(analyse(found), ("w1", 0), ("v", 0), ("w2", 1))
    assert_exact(found)


def test_remainder_ties_its_divisor() -> None:
    found = between_convs(f"{SAFE}  m = Mod<fmod=1>(p, c)", half=HALF, c=POSITIVE)
    assert_coupled(analyse(found), ("w1", 0), ("c", 0), ("w2", 1))
    assert_exact(found)


@pytest.mark.parametrize("shape", [(8, 1, 1), (1,), (1, 8, 1, 1), ()])
def test_slope_of_prelu_follows_the_channels_if_it_has_them(shape: tuple[int, ...]) -> None:
    found = between_convs("m = PRelu(a, s)", s=np.full(shape, 0.3, np.float32))
    assert_coupled(analyse(found), ("w1", 0), ("w2", 1))
    assert_exact(found)


def test_data_that_cannot_be_cut_freezes_what_it_meets() -> None:
    found = between_convs("t = Transpose<perm=[0,2,1,3]>(x8)  m = Add(a, t)",
                          x8=np.ones((2, 8, 8, 8), np.float32))  # fmt: skip
    assert_coupled(analyse(found), ("w1", 0), ("w2", 1))  # constants are cut through movements
    found = between_convs("e = Expand(x, to)  s = Slice(e, f, l, o)  t = Concat<axis=1>(s, s, s, s)"
                          "  m = Add(a, t)", to=np.array([2, 3, 8, 8]), f=np.array([0]),
                          l=np.array([2]), o=np.array([1]))  # fmt: skip
    assert_frozen(found, "w1", "Add 'm'", "meets data that cannot be cut")


@pytest.mark.parametrize("shape", [(8, 8), (1, 8), (1, 1, 8, 8), (1,)])
def test_constant_along_other_axes_leaves_the_channels_alone(shape: tuple[int, ...]) -> None:
    found = between_convs("m = Mul(a, c)", c=shape)
    assert_coupled(analyse(found), ("w1", 0), ("w2", 1))
    assert_exact(found)


@pytest.mark.parametrize("op", ["Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"])
def test_comparison_ties_what_it_compares(op: str) -> None:
    found = between_convs(f"q = {op}(a, c)  n = Cast<to=1>(q)  m = Add(n, a)", c=(8, 1, 1))
    assert_coupled(analyse(found), ("w1", 0), ("c", 0), ("w2", 1))
    assert_exact(found)


@pytest.mark.parametrize("op", ["And", "Or", "Xor"])
def test_logic_ties_its_conditions(op: str) -> None:
    middle = f"""p = Greater(a, half)  b = Conv(x, v)  q = Less(b, half)
        r = {op}(p, q)  n = Cast<to=1>(r)  m = Add(n, a)"""
    found = between_convs(middle, half=HALF, v=(8, 3, 1, 1))
    assert_coupled(analyse(found), ("w1", 0), ("v", 0), ("w2", 1))
    assert_exact(found)


@pytest.mark.parametrize(
    "op", ["BitwiseAnd", "BitwiseOr", "BitwiseXor", 'BitShift<direction="LEFT">']
)
def test_bit_operation_is_cut_with_its_constant(op: str) -> None:
    kind, dtype = (12, np.uint32) if "Shift" in op else (6, np.int32)
    middle = f"{WHOLE}  i = Cast<to={kind}>(f)  j = {op}(i, c)  n = Cast<to=1>(j)  m = Add(n, a)"
    bits = np.arange(1, 9, dtype=dtype).reshape(8, 1, 1) % 4
    found = between_convs(middle, fifty=np.asarray(50, np.float32), c=bits)
    assert_coupled(analyse(found), ("w1", 0), ("c", 0), ("w2", 1))
    assert_exact(found)


def test_where_ties_a_constant_mask_and_both_branches() -> None:
    mask = (np.arange(8) % 3 > 0).reshape(8, 1, 1)
    found = between_convs("b = Conv(x, v)  m = Where(q, a, b)", q=mask, v=(8, 3, 1, 1))
    assert_coupled(analyse(found), ("w1", 0), ("q", 0), ("v", 0), ("w2", 1))
    assert_exact(found)


def test_cast_like_passes_labels_of_its_first_input_only() -> None:
    found = between_convs("d = CastLike(a, k)  m = CastLike(d, x)", k=np.zeros(1, np.float64))
    assert_coupled(analyse(found), ("w1", 0), ("w2", 1))
    assert_exact(found)


def test_clip_with_bounds_as_inputs_passes_labels() -> None:
    found = between_convs("m = Clip(a, lo, hi)", lo=np.asarray(-1, np.float32),
                          hi=np.asarray(1.5, np.float32))  # fmt: skip
    assert_coupled(analyse(found), ("w1", 0), ("w2", 1))
    assert_exact(found)


def test_dropout_passes_labels_to_its_output_and_its_mask() -> None:
    middle = "d, k = Dropout(a)  n = Cast<to=1>(k)  m = Add(d, n)"
    found = between_convs(middle)
    assert_coupled(analyse(found), ("w1", 0), ("w2", 1))
    assert_exact(found)


_SCHEMAS = [s for s in onnx.defs.get_all_schemas_with_history() if s.domain == ""]
_UNARY = sorted({s.name for s in _SCHEMAS if is_unary(s.name, s.since_version)})
_NOT_FLOAT = {"BitCast", "OptionalGetElement", "Not", "BitwiseNot", "IsNaN", "IsInf", "Cast",
              "Acosh", "Log", "Sqrt", "DepthToSpace", "SpaceToDepth", "Swish"}  # fmt: skip


@pytest.mark.parametrize("op", [name for name in _UNARY if name in UNARY or name == "Clip"])
def test_unary_operator_found_by_schema_passes_labels(op: str) -> None:
    found = between_convs(f"t = Tanh(a)  u = Mul(t, h)  p = Add(u, k)  m = {op}(p)",
                          h=np.asarray(0.2, np.float32),
                          k=np.asarray(1.3 if op == "Acosh" else 0.6, np.float32))  # fmt: skip
    assert_coupled(analyse(found), ("w1", 0), ("w2", 1))
    graph = analyse(found)
    if op not in ("Ceil", "Floor", "Round", "Sign", "Abs", "Relu", "ThresholdedRelu"):
        assert_exact(found)
    assert graph.prunable


@pytest.mark.parametrize("schema", [s for s in _SCHEMAS if is_unary(s.name, s.since_version)],
                         ids=lambda s: f"{s.name}-{s.since_version}")  # fmt: skip
def test_operator_that_the_schema_rule_accepts_commutes_with_permutation(
    schema: onnx.defs.OpSchema,
) -> None:
    """op(x)[perm] == op(x[perm]), by ONNX's own reference."""
    from onnx.reference import ReferenceEvaluator

    name = schema.name
    if name in ("OptionalGetElement", "BitCast"):
        pytest.skip("takes an optional, or reads bits: nothing to permute that a network has")
    kind = {"Not": np.bool_, "BitwiseNot": np.int32}.get(name, np.float32)
    x = np.random.default_rng(0).uniform(0.05, 0.9, (2, 6, 4, 4))
    x = (x + 1 if name == "Acosh" else x).astype(kind)
    required: dict[str, Any] = {"to": 1} if name == "Cast" else {}
    if name in ("DepthToSpace", "SpaceToDepth"):
        required = {"blocksize": 1}
    node = onnx.helper.make_node(name, ["x"], ["y"], **required)
    element = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    graph = onnx.helper.make_graph(
        [node],
        "g",
        [onnx.helper.make_tensor_value_info("x", element, x.shape)],
        [onnx.helper.make_empty_tensor_value_info("y")],
    )
    opsets = [onnx.helper.make_opsetid("", schema.since_version)]
    run = ReferenceEvaluator(onnx.helper.make_model(graph, opset_imports=opsets))
    (whole,) = run.run(None, {"x": x})
    for axis in range(x.ndim):
        perm = np.random.default_rng(axis).permutation(x.shape[axis])
        (moved,) = run.run(None, {"x": np.take(x, perm, axis)})
        np.testing.assert_array_equal(moved, np.take(whole, perm, axis))


def test_dropout_that_gives_no_mask_lets_channels_pass() -> None:
    found = between_convs("m = Dropout(a)")
    found.proto.graph.node[1].output.append("")
    assert_coupled(analyse(found), ("w1", 0), ("w2", 1))
    assert_exact(found)


def test_grids_that_share_one_of_two_axes_tie_along_the_others() -> None:
    middle = """b = MatMul(x, v) r = Reshape(a, s) t = Reshape(b, u) e = Add(r, t)
        m = Reshape(e, back)"""
    shapes = {"s": [2, 6, 2, 4, 1], "u": [2, 6, 1, 4, 2], "back": [2, 6, 16]}
    arrays = {name: np.array(shape) for name, shape in shapes.items()}
    found = between_matmuls(middle, reads=16, v=(3, 8), **arrays)
    group = analyse(found).groups[0]
    assert [axis.tensor for axis in group.producers] == ["w1", "v"]
    assert group.producers[0].unit.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert group.producers[1].unit.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert_exact(found, some=False)


def test_table_along_the_dimensions_serves_every_head() -> None:
    middle = """q = Reshape(a, s) r = Mul(q, k) t = Transpose<perm=[0,2,1,3]>(r)
        b = MatMul(x, v) p = Reshape(b, s) o = Transpose<perm=[0,2,3,1]>(p) m = MatMul(t, o)"""
    found = between_matmuls(middle, reads=6, v=(3, 8), k=(4,), s=np.array([2, 6, 2, 4]))
    graph = analyse(found, attention="dims")
    assert units(graph, "k", 0) == [(0, 0), (0, 1), (0, 2), (0, 3)]
    assert units(graph, "w1", 1) == units(graph, "k", 0) * 2
    assert_exact(found, attention="dims")


@pytest.mark.parametrize(
    ("middle", "shape"),
    [
        ("k = Trilu(c) z = ReduceSum<keepdims=0>(k, first) m = Add(a, z)", (4, 8)),
        ("k = Trilu(c) r = Reshape(a, s) e = Add(r, k) m = Reshape(e, back)", (2, 4)),
    ],
    ids=["channels", "grid"],
)
def test_constant_that_no_rule_follows_freezes_what_it_meets(
    middle: str, shape: tuple[int, ...]
) -> None:
    shapes = {"first": [0], "s": [2, 6, 2, 4], "back": [2, 6, 8]}
    arrays = {name: np.array(array) for name, array in shapes.items()}
    found = overridable(between_matmuls(middle, c=shape, **arrays), "c")
    assert_frozen(found, "w1", "meets a constant that cannot be cut")


def test_constant_over_two_independent_cuts_freezes_the_grid_it_meets() -> None:
    middle = """b = MatMul(x, v) r = Reshape(a, s) t = Reshape(b, u) p = Mul(r, t) e = Add(p, k)
        q = ReduceSum<keepdims=0>(e, last) m = Reshape(q, back)"""
    shapes = {"s": [2, 6, 2, 4, 1], "u": [2, 6, 1, 1, 5], "last": [4], "back": [2, 6, 8]}
    arrays = {name: np.array(array) for name, array in shapes.items()}
    found = between_matmuls(middle, v=(3, 5), k=(2, 4, 5), **arrays)
    assert_frozen(found, "w1", "Add 'e' meets a constant that cannot be cut (tensor 'k')")


def test_table_with_a_scale_for_each_column_freezes_the_grid_it_meets() -> None:
    middle = """k = DequantizeLinear<axis=1>(q, f) r = Reshape(a, s) e = Add(r, k)
        m = Reshape(e, back)"""
    stored = {"q": np.arange(8, dtype=np.int8).reshape(2, 4), "f": np.full(4, 0.1, np.float32)}
    shapes = {"s": np.array([2, 6, 2, 4]), "back": np.array([2, 6, 8])}
    found = between_matmuls(middle, **stored, **shapes)
    assert_frozen(found, "w1", "Add 'e' meets a constant that cannot be cut (tensor 'k')")


def test_table_shown_in_another_type_is_cut_with_the_grid_it_meets() -> None:
    middle = "k = Cast<to=1>(q) r = Reshape(a, s) e = Add(r, k) m = Reshape(e, back)"
    stored = {"q": np.arange(8, dtype=np.int8).reshape(2, 4)}
    shapes = {"s": np.array([2, 6, 2, 4]), "back": np.array([2, 6, 8])}
    found = between_matmuls(middle, **stored, **shapes)
    assert [cell.size for cell in analyse(found).prunable[0].cells] == [4, 4]
    assert_exact(found)
