"""The trainer ``torch``: its updates, losses, state, and a training from beginning to end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

torch = pytest.importorskip("torch", reason="the trainer 'torch' needs PyTorch")

from onnxprune.errors import InvariantError, MissingExtraError, TrainingError, UsageError  # noqa: E402
from onnxprune.train.backends import trainer_of  # noqa: E402
from onnxprune.train.gradcheck import check_gradients  # noqa: E402
from onnxprune.train.protocol import Arrays, Job, Term, Trainer  # noqa: E402
from onnxprune.train.torch_trainer import TorchTrainer  # noqa: E402
from onnxprune.train.updates import Updates  # noqa: E402
from onnxprune.tuning import finetune  # noqa: E402
from tests.small import conv_chain, parsed  # noqa: E402

pytestmark = pytest.mark.training

CE = (Term("ce", "y", "labels"),)
RNG = np.random.default_rng(0)


def chain(seed: int = 0) -> onnx.ModelProto:
    return conv_chain((3, 6, 8), batch="N", seed=seed).proto


def job_of(model: onnx.ModelProto, terms: tuple[Term, ...] = CE, **more: object) -> Job:
    names = [tensor.name for tensor in model.graph.initializer]
    moving = tuple(name for name in names if name.startswith(("mean", "var")))
    weights = tuple(name for name in names if name not in moving)
    return replace(Job(weights, terms, statistics=moving, threads=1), **more)  # type: ignore[arg-type]


def batches(count: int, size: int = 8, seed: int = 0) -> Iterator[tuple[Arrays, Arrays]]:
    rng = np.random.default_rng(seed)
    for _ in range(count):
        x = rng.standard_normal((size, 3, 8, 8)).astype(np.float32)
        yield {"x": x}, {"labels": rng.integers(0, 4, size)}


def prepared(model: onnx.ModelProto, job: Job, **more: object) -> TorchTrainer:
    trainer = TorchTrainer("cpu", **more)  # type: ignore[arg-type]
    trainer.prepare(model, job)
    return trainer


def assert_states(one: Arrays, other: Arrays, *, exact: bool = True) -> None:
    assert one.keys() == other.keys()
    for name, array in one.items():
        if exact:
            np.testing.assert_array_equal(array, other[name], err_msg=name)
        else:
            np.testing.assert_allclose(array, other[name], rtol=2e-4, atol=2e-6, err_msg=name)


def half(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {
        tensor.name: np.random.default_rng(1).random(tuple(tensor.dims)) < 0.5
        for tensor in model.graph.initializer
        if len(tensor.dims) == 4
    }


def test_it_is_a_trainer() -> None:
    assert isinstance(TorchTrainer(), Trainer)
    assert TorchTrainer().name == "torch"


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"optimizer": "adamw"}, id="adamw"),
        pytest.param({"optimizer": "sgd"}, id="sgd"),
        pytest.param(
            {"optimizer": "adamw", "weight_decay": 0.1, "decayed": frozenset({"w0", "head"})},
            id="adamw-decay",
        ),
        pytest.param(
            {"optimizer": "sgd", "weight_decay": 0.1, "decayed": frozenset({"w0", "head"})},
            id="sgd-decay",
        ),
        pytest.param({"optimizer": "sgd", "clip": 0.5}, id="clip"),
        pytest.param({"l1": {"gamma0": 1.0, "gamma1": 2.0}}, id="l1"),
        pytest.param({"masks": half(chain())}, id="masks"),
    ],
)
def test_updates_are_those_of_the_other_trainers(options: dict[str, object]) -> None:
    model = chain()
    job = job_of(model, **options)
    trainer, reference = prepared(model, job), prepared(model, job)
    weights = {name: np.array(reference.weights()[name]) for name in job.weights}
    updates = Updates(
        weights,
        optimizer=job.optimizer,
        masks=job.masks,
        l1=job.l1,
        decayed=job.decayed,
        weight_decay=job.weight_decay,
        clip=job.clip,
    )
    for step, batch in enumerate(batches(12)):
        rate, l1 = 0.01 / (1 + step), 0.05 * step
        loss, gradients = reference.gradients(*batch)
        updates.apply(gradients, rate, l1)
        reference.load(weights)
        assert trainer.step(*batch, rate=rate, l1=l1) == pytest.approx(loss, rel=1e-4)
    expected = {**reference.weights(), **updates.state()}
    assert_states(trainer.state(), expected, exact=False)


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("kind", ["ce", "kd", "mse"])
def test_losses_are_their_definitions(kind: str, axis: int) -> None:
    model = parsed("g (float[4,3,5] x) => (float[4,3,5] y) { y = Mul(x, w) }", w=np.ones(1, "f"))
    said = RNG.standard_normal((4, 3, 5)).astype(np.float32)
    teacher = RNG.standard_normal((4, 3, 5)).astype(np.float32)

    def log_softmax(scores: np.ndarray) -> np.ndarray:
        return scores - np.log(np.exp(scores).sum(axis, keepdims=True))

    if kind == "ce":
        target = RNG.integers(0, 3, (4, 5) if axis == 1 else (4, 3))
        picked = np.take_along_axis(log_softmax(said), np.expand_dims(target, axis), axis)
        expected = -picked.mean()
    elif kind == "kd":
        target = teacher
        ours, theirs = log_softmax(said / 3), log_softmax(teacher / 3)
        expected = 9 * (np.exp(theirs) * (theirs - ours)).sum(axis).mean()
    else:
        target = teacher
        expected = np.square(said - teacher).mean()
    term = Term(kind, "y", "t", weight=0.5, temperature=3.0, axis=axis)  # type: ignore[arg-type]
    trainer = prepared(model.proto, Job(("w",), (term, term), threads=1))
    loss, _ = trainer.gradients({"x": said}, {"t": target})
    assert loss == pytest.approx(float(expected), rel=1e-5)


def test_a_term_may_read_a_tensor_inside_and_several_outputs_add_up() -> None:
    model = parsed(
        """g (float[4,3] x) => (float[4,3] y, float[4,3] z) {
          s = Mul(x, w)
          y = Softmax(s)
          z = Neg(s)
        }""",
        w=np.float32([1, 2, 3]),
    ).proto
    x = RNG.standard_normal((4, 3)).astype(np.float32)
    terms = (Term("ce", "s", "labels"), Term("mse", "z", "wanted", weight=2.0))
    targets = {"labels": np.array([0, 1, 2, 1]), "wanted": np.zeros((4, 3), np.float32)}
    values = [
        prepared(model, Job(("w",), chosen)).gradients({"x": x}, targets)
        for chosen in (terms, terms[:1], terms[1:])
    ]
    assert values[0][0] == pytest.approx(values[1][0] + values[2][0], rel=1e-5)
    summed = values[1][1]["w"] + values[2][1]["w"]
    np.testing.assert_allclose(values[0][1]["w"], summed, rtol=1e-4)


def test_the_cores_check_of_gradients_passes_and_changes_nothing() -> None:
    model = chain(seed=1)
    job = job_of(model)
    trainer = prepared(model, job)
    before = trainer.state()
    (batch,) = batches(1, size=64)
    assert check_gradients(trainer, job, *batch) >= 4
    assert_states(trainer.state(), before)


def test_masked_weights_are_exactly_zero_from_the_start_and_after_a_thousand_steps() -> None:
    model = parsed(
        """g (float[N,6] x) => (float[N,4] y) {
          h = MatMul(x, a)
          r = Relu(h)
          y = MatMul(r, b)
        }""",
        a=RNG.standard_normal((6, 16)).astype(np.float32),
        b=RNG.standard_normal((16, 4)).astype(np.float32),
    ).proto
    masks = {"a": RNG.random((6, 16)) < 0.5, "b": RNG.random((16, 4)) < 0.5}
    job = Job(("a", "b"), CE, masks=masks, decayed=frozenset("ab"), weight_decay=0.1, threads=1)
    trainer = prepared(model, job)
    for name, mask in masks.items():
        assert not trainer.weights()[name][~mask].any()
    start = trainer.weights()
    for _ in range(1000):
        x = RNG.standard_normal((4, 6)).astype(np.float32)
        trainer.step({"x": x}, {"labels": RNG.integers(0, 4, 4)}, rate=0.01)
    for name, mask in masks.items():
        weight = trainer.weights()[name]
        assert not weight[~mask].any()
        assert (weight != start[name])[mask].all()


def test_running_statistics_move_only_where_they_are_listed() -> None:
    model = chain()
    start = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    listed = prepared(model, job_of(model))
    frozen = prepared(model, job_of(model, statistics=()))
    one = prepared(model, job_of(model, statistics=("mean0", "var0")))
    for batch in batches(3):
        for trainer in (listed, frozen, one):
            trainer.step(*batch, rate=0.01)
    for name in ("mean0", "var0", "mean1", "var1"):
        assert not np.array_equal(listed.weights()[name], start[name])
    assert set(frozen.weights()) == set(frozen._job.weights)
    assert not np.array_equal(one.weights()["mean0"], start["mean0"])
    np.testing.assert_array_equal(one._ready().constant("mean1").numpy(), start["mean1"])


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_state_goes_on_to_the_same_result(optimizer: str) -> None:
    model = chain()
    job = job_of(model, optimizer=optimizer, masks=half(model))
    whole = prepared(model, job)
    for batch in batches(4):
        whole.step(*batch, rate=0.01)
    kept = whole.state()
    resumed = prepared(model, job)
    resumed.load(kept)
    assert_states(resumed.state(), kept)
    for batch in batches(3, seed=5):
        whole.step(*batch, rate=0.01)
        resumed.step(*batch, rate=0.01)
    assert_states(resumed.state(), whole.state())


def test_two_runs_are_equal_bit_for_bit() -> None:
    model = chain()
    states = []
    for _ in range(2):
        trainer = prepared(model, job_of(model))
        for batch in batches(5):
            trainer.step(*batch, rate=0.01)
        states.append(trainer.state())
    assert_states(*states)


def test_channels_innermost_give_the_same_training() -> None:
    model = chain()
    states = []
    for innermost in (False, True):
        trainer = prepared(model, job_of(model, optimizer="sgd"), channels_last=innermost)
        for batch in batches(5):
            trainer.step(*batch, rate=0.01)
        assert trainer.weights()["w1"].flags.c_contiguous
        states.append(trainer.state())
    assert_states(*states, exact=False)


def test_weights_are_copies() -> None:
    model = chain()
    trainer = prepared(model, job_of(model))
    first = trainer.weights()
    kept = {name: array.copy() for name, array in first.items()}
    (batch,) = batches(1)
    trainer.step(*batch, rate=0.1)
    assert_states(first, kept)


def test_close_frees_everything_and_may_be_called_twice() -> None:
    threads = torch.get_num_threads()
    trainer = prepared(chain(), job_of(chain(), threads=threads + 1))
    trainer.close()
    trainer.close()
    assert torch.get_num_threads() == threads
    with pytest.raises(InvariantError):
        trainer.weights()


def test_a_device_that_is_not_there_is_named() -> None:
    trainer = TorchTrainer("cuda:63")
    with pytest.raises(UsageError, match="device 'cuda:63' cannot be used"):
        trainer.prepare(chain(), job_of(chain()))


def test_a_target_of_the_wrong_shape_is_one_line() -> None:
    trainer = prepared(chain(), job_of(chain()))
    (batch,) = batches(1)
    with pytest.raises(TrainingError) as caught:
        trainer.step(batch[0], {"labels": np.zeros(3, np.int64)}, rate=0.1)
    assert "\n" not in str(caught.value)


def test_finetune_trains_with_it_and_writes_the_weights_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    model = conv_chain((3, 8, 12), batch="N")
    onnx.save(model.proto, tmp_path / "in.onnx")
    x = rng.standard_normal((192, 3, 8, 8)).astype(np.float32)
    labels = (x.mean((2, 3)).argmax(1)).astype(np.int64)
    np.savez(tmp_path / "data.npz", x=x)
    made, report = finetune(
        tmp_path / "in.onnx",
        data=tmp_path / "data.npz",
        labels=labels,
        epochs=6,
        rate=1e-2,
        batch_size=32,
        trainer="torch",
        threads=1,
        output=tmp_path / "out.onnx",
    )
    assert report.tuned is not None
    assert report.tuned.trainer == "torch"
    assert report.tuned.checked > 0
    before, after = report.tuned.epochs[0], report.tuned.epochs[report.tuned.best]
    assert after.held_out < before.held_out  # a loss
    saved = {
        t.name: numpy_helper.to_array(t) for t in onnx.load(tmp_path / "out.onnx").graph.initializer
    }
    old = {t.name: numpy_helper.to_array(t) for t in model.proto.graph.initializer}
    assert saved.keys() == old.keys()
    assert all(not np.array_equal(saved[name], old[name]) for name in old)
    np.testing.assert_array_equal(saved["w0"], made.weights()["w0"].read())


def test_without_pytorch_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from onnxprune.train.torch_ops import lazy

    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    monkeypatch.setattr(lazy.torch, "__dict__", {}, raising=False)
    with pytest.raises(MissingExtraError, match=r"pip install 'onnxprune\[torch\]'"):
        _ = lazy._Torch().float32


@pytest.mark.parametrize(("optimizer", "rate"), [("adamw", 5e-3), ("sgd", 0.05)])
def test_a_network_learns_to_read_digits(optimizer: str, rate: float) -> None:
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    x = (digits.images[:, None] / 16).astype(np.float32)
    y = digits.target.astype(np.int64)
    rng = np.random.default_rng(0)
    model = parsed(
        """g (float[N,1,8,8] x) => (float[N,10] y) {
          c0 = Conv<pads=[1,1,1,1]>(x, w0)
          n0 = BatchNormalization(c0, gamma0, beta0, mean0, var0)
          r0 = Relu(n0)
          p0 = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r0)
          c1 = Conv<pads=[1,1,1,1]>(p0, w1)
          n1 = BatchNormalization(c1, gamma1, beta1, mean1, var1)
          r1 = Relu(n1)
          f = Flatten(r1)
          y = Gemm(f, head, bias)
        }""",
        w0=rng.standard_normal((12, 1, 3, 3)).astype(np.float32) / 3,
        w1=rng.standard_normal((24, 12, 3, 3)).astype(np.float32) / 10,
        head=rng.standard_normal((384, 10)).astype(np.float32) / 20,
        bias=np.zeros(10, np.float32),
        **{
            f"{name}{number}": np.full(width, value, np.float32)
            for number, width in ((0, 12), (1, 24))
            for name, value in {"gamma": 1, "beta": 0, "mean": 0, "var": 1}.items()
        },
    ).proto
    trainer = prepared(model, job_of(model, optimizer=optimizer))

    def accuracy() -> float:
        found = trainer.evaluate({"x": x[1400:]})["y"].argmax(1)
        return float((found == y[1400:]).mean())

    assert accuracy() < 0.3
    for _ in range(5):
        order = rng.permutation(1400)
        for first in range(0, 1400, 64):
            some = order[first : first + 64]
            trainer.step({"x": x[some]}, {"labels": y[some]}, rate=rate)
    assert accuracy() > 0.9


def test_a_name_says_where_to_compute() -> None:
    assert isinstance(trainer_of("torch"), TorchTrainer)
    with pytest.raises(UsageError, match="device 'cuda:63'"):
        trainer_of("torch:cuda:63").prepare(chain(), job_of(chain()))
    with pytest.raises(UsageError, match="trainer is 'jax'"):
        trainer_of("jax")
