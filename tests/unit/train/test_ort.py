"""The trainer ``ort`` itself; needs the wheel, which is installed into the user's cache."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest

from onnxprune.errors import TrainingError, UnsupportedModelError
from onnxprune.train.copying import TrainingCopy
from onnxprune.train.gradcheck import check_gradients
from onnxprune.train.objective import Objective, aims
from onnxprune.train.ort import OrtTrainer
from onnxprune.train.place import Place
from onnxprune.train.protocol import Job, Term, Trainer
from tests.rewriting import CASES, HEADS, inputs, model_of
from tests.small import conv_chain, parsed
from tests.training import installed

pytestmark = pytest.mark.training


@pytest.fixture(scope="session")
def where() -> Place:
    return installed()


def images(count: int = 8, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"x": rng.standard_normal((count, 3, 8, 8)).astype(np.float32)}


def classes(count: int = 8) -> dict[str, np.ndarray]:
    return {"labels": np.arange(count) % 4}


CE = (Term("ce", "y", "labels"),)


@pytest.fixture
def chain() -> TrainingCopy:
    return TrainingCopy.of(conv_chain((3, 6, 5), batch="n"))


def test_it_is_a_trainer(where: Place) -> None:
    assert isinstance(OrtTrainer(where), Trainer)


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_every_rewrite_agree_with_finite_differences(name: str, where: Place) -> None:
    model = model_of(name, HEADS[1]) or model_of(name, HEADS[2])
    assert model is not None
    copy = TrainingCopy.of(model)
    statistics = () if "frozen" in name else copy.statistics
    rng = np.random.default_rng(1)
    dims = [d.dim_value for d in model.proto.graph.output[0].type.tensor_type.shape.dim]
    wanted = {"wanted": rng.standard_normal(dims).astype(np.float32)}
    job = Job(tuple(copy.weights), (Term("mse", "y", "wanted"),), statistics, threads=1)
    trainer = OrtTrainer(where)
    assert not trainer.supports(copy.proto)
    trainer.prepare(copy.proto, job)
    try:
        assert check_gradients(trainer, job, inputs(name), wanted) >= 1
    finally:
        trainer.close()


@pytest.mark.parametrize("kind", ["ce", "kd", "mse"])
def test_its_loss_is_the_one_that_validation_computes(
    kind: str, where: Place, chain: TrainingCopy
) -> None:
    objective = Objective(((aims(chain.proto)[0], kind),), 2.5)  # type: ignore[arg-type]
    rng = np.random.default_rng(2)
    said = {"y": rng.standard_normal((8, 4)).astype(np.float32)}
    targets = objective.targets(said, np.arange(8) % 4)
    job = Job(tuple(chain.weights), objective.terms, threads=1)  # statistics stay: as in inference
    trainer = OrtTrainer(where)
    trainer.prepare(chain.proto, job)
    try:
        loss, _ = trainer.gradients(images(), targets)
    finally:
        trainer.close()
    from onnxprune.runtime import session

    outputs = session(chain.graph.source).run(images())
    assert loss == pytest.approx(objective.loss(outputs, targets), rel=1e-4)


def test_masked_weights_are_exactly_zero_after_steps_and_others_move(
    where: Place, chain: TrainingCopy
) -> None:
    mask = np.random.default_rng(0).random((6, 3, 3, 3)) > 0.5
    job = Job(tuple(chain.weights), CE, chain.statistics, masks={"w0": mask}, threads=1)
    trainer = OrtTrainer(where)
    trainer.prepare(chain.proto, job)
    try:
        assert not trainer.weights()["w0"][~mask].any()
        for _ in range(20):
            trainer.step(images(), classes(), rate=0.01)
        after = trainer.weights()
    finally:
        trainer.close()
    assert not after["w0"][~mask].any()
    before = chain.values(("w0", "mean0", "head"))
    assert (after["w0"][mask] != before["w0"][mask]).mean() > 0.3, "but for channels ReLU shuts off"
    assert (after["head"] != before["head"]).any()
    assert (after["mean0"] != before["mean0"]).all(), "running statistics follow the batches"


def test_statistics_that_are_not_listed_stay_and_are_used(
    where: Place, chain: TrainingCopy
) -> None:
    trainer = OrtTrainer(where)
    trainer.prepare(chain.proto, Job(tuple(chain.weights), CE, threads=1))
    try:
        whole, _ = trainer.gradients(images(), classes())
        alone = [
            trainer.gradients(
                {"x": images()["x"][at : at + 1]}, {"labels": classes()["labels"][at : at + 1]}
            )[0]
            for at in range(8)
        ]
    finally:
        trainer.close()
    assert whole == pytest.approx(np.mean(alone), rel=1e-4), "no sample depends on its batch"


def test_a_state_put_back_goes_on_to_the_same_weights(where: Place, chain: TrainingCopy) -> None:
    trainer = OrtTrainer(where)
    job = Job(tuple(chain.weights), CE, chain.statistics, threads=1)
    trainer.prepare(chain.proto, job)
    try:
        for _ in range(3):
            trainer.step(images(), classes(), rate=0.01)
        state = trainer.state()
        for number in range(3):
            trainer.step(images(seed=number), classes(), rate=0.01)
        first = trainer.weights()
        trainer.load(state)
        for number in range(3):
            trainer.step(images(seed=number), classes(), rate=0.01)
        again = trainer.weights()
    finally:
        trainer.close()
    assert all(np.array_equal(first[name], again[name]) for name in first)


def test_a_worker_that_is_killed_is_an_error_that_says_so(
    where: Place, chain: TrainingCopy
) -> None:
    trainer = OrtTrainer(where)
    trainer.prepare(chain.proto, Job(tuple(chain.weights), CE, threads=1))
    assert trainer._process is not None
    os.kill(trainer._process.pid, signal.SIGKILL)
    with pytest.raises(TrainingError, match="killed by signal 9"):
        trainer.step(images(), classes(), rate=0.01)
    trainer.close()


def test_operators_without_a_gradient_are_named() -> None:
    model = parsed(
        "g (float[2,3,4,4] x) => (float[2,4,1,1] y)"
        "{ a = Conv(x, w)  y = ReduceMax<keepdims=1>(a, axes) }",
        w=np.ones((4, 3, 1, 1), np.float32),
        axes=np.array([2, 3]),
    )
    (found,) = OrtTrainer(Place("python", None)).supports(model.proto)  # type: ignore[arg-type]
    assert (found.node, found.op) == ("y", "ReduceMax")
    assert "no gradient for ReduceMax" in found.reason


@pytest.mark.parametrize("opset", [9, 11, 23])
def test_other_opsets_are_converted_for_training_only(opset: int, where: Place) -> None:
    model = conv_chain((3, 4), batch="n")
    made = model.proto  # of operators that opset 9 has in the same form
    made.opset_import[0].version = opset
    before = made.SerializeToString()
    trainer = OrtTrainer(where)
    names = tuple(t.name for t in made.graph.initializer if t.name in ("w0", "head"))
    trainer.prepare(made, Job(names, CE, threads=1))
    try:
        assert np.isfinite(trainer.step(images(), classes(), rate=0.01))
    finally:
        trainer.close()
    assert made.SerializeToString() == before


def test_a_model_that_the_runtime_refuses_is_said_in_one_line(
    where: Place, chain: TrainingCopy
) -> None:
    trainer = OrtTrainer(where)
    with pytest.raises(UnsupportedModelError, match="cannot train this model"):
        trainer.prepare(chain.proto, Job(("no such weight",), CE, threads=1))
    trainer.close()
