from __future__ import annotations

import numpy as np
import pytest

from onnxprune.train.batching import fixed_batch, with_open_batch, with_sizes
from onnxprune.train.copying import TrainingCopy
from onnxprune.train.ort import OrtTrainer
from onnxprune.train.protocol import Job, Term
from tests.small import parsed
from tests.training import installed


def gated(size: str = "h") -> TrainingCopy:
    """A squeeze-and-excite gate on images of open size."""
    rng = np.random.default_rng(0)
    return TrainingCopy.of(
        parsed(
            f"g (float[n,3,{size},{size}] x) => (float[n,4,a,b] y) {{"
            " a = Conv<pads=[1,1,1,1]>(x, w) p = GlobalAveragePool(a) s = Conv(p, v)"
            " t = Sigmoid(s) y = Mul(a, t) }",
            w=rng.standard_normal((4, 3, 3, 3)).astype(np.float32),
            v=rng.standard_normal((4, 4, 1, 1)).astype(np.float32),
        )
    )


def images(count: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((count, 3, 6, 5)).astype(np.float32)


def test_open_sizes_become_those_of_the_data_and_samples_stay_open() -> None:
    made = with_sizes(gated().proto, {"x": images(1)})
    dims = made.graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_value for dim in dims[1:]] == [3, 6, 5]
    assert dims[0].dim_param == "batch"


@pytest.mark.training
def test_a_model_of_open_sizes_is_trained_at_those_of_the_data() -> None:
    copy, x = gated(), images(8)
    trainer = OrtTrainer(installed())
    job = Job(tuple(copy.weights), (Term("mse", "y", "wanted"),), threads=1)
    trainer.prepare(with_sizes(copy.proto, {"x": x[:1]}), job)
    wanted = np.ones((8, 4, 6, 5), np.float32)
    try:
        losses = [trainer.step({"x": x}, {"wanted": wanted}, rate=0.01) for _ in range(10)]
    finally:
        trainer.close()
    assert losses[-1] < losses[0]


def test_a_batch_baked_into_a_reshape_stays() -> None:
    model = parsed(
        "g (float[2,4] x) => (float[2,4] y) { f = Reshape(x, flat) a = MatMul(f, w)"
        " y = Reshape(a, back) }",
        w=np.eye(8, dtype=np.float32)[::-1].copy(),
        flat=np.array([1, 8]),
        back=np.array([2, 4]),
    ).proto
    assert fixed_batch(model) == 2
    assert with_open_batch(model, {"x": np.arange(8, dtype=np.float32).reshape(2, 4)}) is None


def test_a_batch_that_is_only_declared_is_opened() -> None:
    model = parsed(
        "g (float[1,4] x) => (float[1,4] y) { y = MatMul(x, w) }", w=np.eye(4, dtype=np.float32)
    ).proto
    made = with_open_batch(model, {"x": np.ones((1, 4), np.float32)})
    assert made is not None
    assert fixed_batch(made) is None
    assert fixed_batch(model) == 1
