"""Channels in another order: the same function, more of it in runs."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnxprune.analyse import analyse
from onnxprune.data import random_data
from onnxprune.errors import RecipeError
from onnxprune.model import Model
from onnxprune.patterns import NM
from onnxprune.reorder import Reordered, reordered, repeated
from onnxprune.thin import Wish, candidates
from onnxprune.verify import verify
from tests.small import parsed

PATTERN = NM(2, 4)


def drawn(text: str, seed: int = 0, **shapes: tuple[int, ...]) -> Model:
    rng = np.random.default_rng(seed)
    return parsed(
        text, **{name: rng.standard_normal(s).astype(np.float32) for name, s in shapes.items()}
    )


def done(model: Model) -> Reordered:
    found = candidates(model, Wish.read("2:4", None))
    eligible = {found.layers[at].stored.name for at in found.owners}
    made = reordered(analyse(model), PATTERN, eligible)
    verdict = verify(
        model, made.model, twin=None, data=random_data(model), level="twin", lossless=True
    )
    assert verdict.status == "passed", verdict.reason
    return made


def test_channels_that_a_convolution_and_a_sum_share_move_together() -> None:
    model = drawn(
        """g (float[N,3,8,8] x) => (float[N,5] y) {
            a = Conv<pads=[1,1,1,1]>(x, w1, b1)  r = Relu(a)
            c = Conv<pads=[1,1,1,1]>(r, w2)  s = Add(c, r)
            d = Conv(s, w3)  p = GlobalAveragePool(d)  f = Flatten(p)
            y = Gemm<transB=1>(f, w4)}""",
        w1=(16, 3, 3, 3), b1=(16,), w2=(16, 16, 3, 3), w3=(24, 16, 1, 1), w4=(5, 24),
    )  # fmt: skip
    made = done(model)
    shared = next(one for one in made.groups if "w2" in one.readers)
    assert shared.readers == ("w2", "w3")
    assert shared.after > shared.before
    kept = {(one.tensor, one.axis): one.kept for one in made.moved}
    assert kept["w1", 0] == kept["b1", 0] == kept["w2", 0] == kept["w2", 1] == kept["w3", 1]
    old, new = model.weights(), made.model.weights()
    order = np.array(kept["w2", 1])
    np.testing.assert_array_equal(new["w2"].read(), old["w2"].read()[order][:, order])


def test_parts_of_a_concat_keep_to_themselves() -> None:
    model = drawn(
        """g (float[N,4] x) => (float[N,3] y) {
            a = MatMul(x, w1)  b = MatMul(x, w2)  t = Tanh(b)  c = Concat<axis=1>(a, t)
            y = MatMul(c, w3)}""",
        w1=(4, 16), w2=(4, 24), w3=(40, 3),
    )  # fmt: skip
    made = done(model)
    assert [one.why for one in made.groups if one.readers] == ["", ""]
    (order,) = (np.array(one.kept) for one in made.moved if one.tensor == "w3")  # one for both
    assert set(order[:16]) == set(range(16))
    assert not np.array_equal(order[:16], np.arange(16))
    assert not np.array_equal(order[16:], np.arange(16, 40))


def test_copies_of_one_value_stay_one_constant_whatever_the_order() -> None:
    """Exporters store a zero bias once for all layers of a width."""
    model = drawn(
        """g (float[N,4] x) => (float[N,3] y) {
            a = MatMul(x, w1)  p = Add(a, zero)  r = Relu(p)  b = MatMul(r, w2)  q = Add(b, zero)
            s = Relu(q)  y = MatMul(s, w3)}""",
        w1=(4, 16), w2=(16, 16), w3=(16, 3), zero=(16,),
    )  # fmt: skip
    held = next(one for one in model.proto.graph.initializer if one.name == "zero")
    held.CopyFrom(onnx.numpy_helper.from_array(np.zeros(16, np.float32), "zero"))
    made = done(Model(model.proto))
    assert len([one for one in made.groups if not one.why]) == 2
    assert set(made.model.weights()) == set(model.weights())


def test_what_leaves_the_model_or_has_one_run_stays_with_a_reason() -> None:
    model = drawn(
        "g (float[N,8] x) => (float[N,8] y) { a = MatMul(x, w1)  r = Relu(a)  y = MatMul(r, w2) }",
        w1=(8, 4), w2=(4, 8),
    )  # fmt: skip
    made = done(model)
    assert all(one.why for one in made.groups)
    assert not made.moved
    assert made.model is model


def two_parts(seed: int, w1: int = 16) -> Model:
    return drawn(
        """g (float[N,4] x) => (float[N,3] y) {
            a = MatMul(x, w1)  b = MatMul(x, w2)  t = Tanh(b)  c = Concat<axis=1>(a, t)
            y = MatMul(c, w3)}""",
        seed, w1=(4, w1), w2=(4, 40 - w1), w3=(40, 3),
    )  # fmt: skip


def test_recorded_orders_are_put_on_weights_that_were_trained_again() -> None:
    """Not searched for again, which would find others."""
    first, again = done(two_parts(0)), two_parts(1)
    made = repeated(analyse(again), first.moved)
    assert made.moved == first.moved
    old, new = again.weights(), made.model.weights()
    for name, axis in (("w1", 1), ("w2", 1)):
        (kept,) = (one.kept for one in first.moved if one.tensor == name)
        np.testing.assert_array_equal(new[name].read(), old[name].read().take(kept, axis))
    verdict = verify(
        again, made.model, twin=None, data=random_data(again), level="twin", lossless=True
    )
    assert verdict.status == "passed", verdict.reason


def test_recorded_orders_of_other_channels_are_refused() -> None:
    moved = done(two_parts(0)).moved
    with pytest.raises(RecipeError, match="coupled otherwise"):
        repeated(analyse(two_parts(0, w1=20)), moved)
