"""Which networks the built-in trainers can train, and how fast they are.

    python tools/bench/trainable.py FOLDER … --markdown tools/bench/results/trainable.md
    python tools/bench/trainable.py FOLDER --trainers torch --only '*vit*'

Every `.onnx` file below the folders is copied for training as `finetune` does it, and handed to
each trainer: does it support the network, and do its gradients pass the check against finite
differences that `finetune` makes before the first step? The loss is the mean square distance of all
outputs from random numbers of the same size; statistics of BatchNormalization stay, as one image
has none. The torch interpreter's outputs are compared with ONNX Runtime's too. Then images per
second of training steps, on one thread, for the networks of `models/`. Each line is printed when it
is known; `--save` keeps what is known, and goes on from it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import onnx
from trial import REPOSITORY, table

from onnxprune.data import random_data
from onnxprune.errors import OnnxPruneError, VerificationError
from onnxprune.io import load
from onnxprune.model import Model
from onnxprune.runtime import session
from onnxprune.train import gradcheck
from onnxprune.train.backends import NAMES, trainer_of
from onnxprune.train.copying import TrainingCopy
from onnxprune.train.objective import aims
from onnxprune.train.protocol import Arrays, Job, Term, Trainer
from onnxprune.train.session import _reaching

TARGET = 0.9  # share that one of the trainers should take
BATCH = 64
STEPS = 8
NEAR = 0.02
Row = dict[str, str]


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", type=Path, nargs="*")
    parser.add_argument("--trainers", default=",".join(NAMES))
    parser.add_argument("--only", default="*")
    parser.add_argument("--size", type=int, default=0, help="of images, where a network takes it")
    parser.add_argument(
        "--tensors", type=int, default=6, help="weights whose gradients are checked"
    )
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--save", type=Path)
    given = parser.parse_args(arguments)
    names = given.trainers.split(",")
    gradcheck._TENSORS = given.tensors
    known: dict[str, Row] = {}
    if given.save and given.save.exists():
        known = json.loads(given.save.read_text("utf-8"))
    files = sorted(file for folder in given.folders for file in folder.rglob("*.onnx"))
    for file in files:
        key = f"{file.parent.name}/{file.stem}"
        if not fnmatchcase(key, given.only):
            continue
        row = known.setdefault(key, {})
        model = shrunk(load(file), given.size)
        for name in names:
            if name not in row:
                row[name] = tried(model, name)
        if "torch" in names and "gap" not in row:
            row["gap"] = gap(model)
        print(key, *row.values(), sep=" | ", flush=True)
        if given.save:
            given.save.write_text(json.dumps(known, indent=1), "utf-8")
    text = "\n\n".join(["# What can be trained", *summary(known, names), *speeds(names)])
    print(text)
    if given.markdown:
        given.markdown.write_text(text + "\n", "utf-8")
    return 0 if share(known, names) >= TARGET else 1


def shrunk(model: Model, size: int) -> Model:
    """The model with smaller pictures, which cost less; itself where that does not run."""
    made = onnx.ModelProto()
    made.CopyFrom(model.proto)
    del made.graph.value_info[:]
    dims = made.graph.input[0].type.tensor_type.shape.dim
    if not size or len(dims) != 4:
        return model
    for dim in dims[2:]:
        dim.dim_value = size
    smaller = Model(made)
    try:
        session(smaller).run(random_data(smaller, seed=0, batches=1).batches[0])
    except OnnxPruneError:
        return model
    return smaller


def tried(model: Model, name: str) -> str:
    """``ok (n)`` with the number of weights whose gradients were compared, or why not."""
    trainer = trainer_of(name)
    try:
        copy = TrainingCopy.of(model)
        blocking = trainer.supports(copy.proto)
        if blocking:
            ops = sorted({one.op or one.reason for one in blocking})
            return f"no: {', '.join(ops)} (as `{blocking[0].node}`)"
        (batch, targets), job = task(model, copy)
        trainer.prepare(copy.proto, job)
        try:
            compared = gradcheck.check_gradients(trainer, job, batch, targets)
        except VerificationError as error:
            if sharply(trainer, copy.proto, job, batch, targets):
                return f"ok in float64, though: {error.message}"
            return f"no: {error.message}"
    except OnnxPruneError as error:
        return f"no: {str(error)[:160]}"
    finally:
        trainer.close()
    return f"ok ({compared})"


def sharply(
    trainer: Trainer, model: onnx.ModelProto, job: Job, batch: Arrays, targets: Arrays
) -> bool:
    """Whether gradients are those in float64, and those agree with differences of tiny steps.

    Networks with random weights can bend so sharply that no step in float32 measures a slope.
    """
    import torch

    from onnxprune.train.torch_graph import TorchGraph

    graph = TorchGraph(model, trained=job.weights, double=True)
    _, found = trainer.gradients(batch, targets)

    def loss() -> torch.Tensor:
        made = graph.run(batch, [term.tensor for term in job.terms])
        parts = [
            term.weight
            * (made[term.tensor] - torch.from_numpy(targets[term.target])).square().mean()
            for term in job.terms
        ]
        return torch.stack(parts).sum()

    loss().backward()
    sharp = {n: w.grad for n, w in graph.parameters.items() if w.grad is not None}
    sizes = {name: float(one.norm()) for name, one in sharp.items()}
    for name, one in sharp.items():
        apart = float((torch.from_numpy(found[name]).double() - one).norm())
        if apart > NEAR * max(sizes[name], NEAR * max(sizes.values())):
            return False
    felt = [name for name in sharp if sizes[name] > NEAR**2 * max(sizes.values())]
    for name in gradcheck._spread(felt, 3):
        weight, losses = graph.parameters[name], []
        step = 1e-8 * float(weight.detach().norm()) * sharp[name] / sizes[name]
        for sign in (1, -2):
            with torch.no_grad():
                weight.add_(sign * step)
                losses.append(float(loss()))
        with torch.no_grad():
            weight.add_(step)
        slope = (losses[0] - losses[1]) / (2 * float(step.norm()))
        if abs(slope - sizes[name]) > NEAR * sizes[name]:
            return False
    return True


def task(model: Model, copy: TrainingCopy) -> tuple[tuple[Arrays, Arrays], Job]:
    """A batch with random targets, and what to do with it."""
    batch = random_data(model, seed=0, batches=1).batches[0]
    outputs = session(model).run(batch)
    rng = np.random.default_rng(0)
    terms, targets = [], {}
    for aim in aims(copy.proto):
        said = np.asarray(outputs[aim.output], np.float32)
        size = float(np.std(said)) or 1.0
        key = f"mse/{aim.output}"
        targets[key] = (said.mean() + size * rng.standard_normal(said.shape)).astype("f")
        terms.append(Term("mse", aim.output, key, weight=1 / size**2))
    weights = tuple(_reaching(copy.proto, [term.tensor for term in terms], copy.weights))
    inputs = {
        name: array.astype(np.float32) if array.dtype.kind == "f" else array
        for name, array in batch.items()
    }
    return (inputs, targets), Job(weights, tuple(terms), batch_size=1, threads=1)


def gap(model: Model) -> str:
    """Largest difference of the interpreter's outputs from ONNX Runtime's, by their size.

    Where that is more than 1e-4, the runtime's own distance from float64 stands beside it.
    """
    from onnxprune.train.torch_graph import TorchGraph

    batch = random_data(model, seed=0, batches=1).batches[0]
    expected = session(model).run(batch)
    plain = model.proto
    try:
        ours = outputs_of(TorchGraph(plain), batch)
        found = distance(ours, expected)
        if found < 1e-4:
            return f"{found:.0e}"
        sharp = outputs_of(TorchGraph(plain, double=True), batch)
    except OnnxPruneError as error:
        return str(error)[:120]
    from_sharp = distance(ours, sharp), distance(expected, sharp)
    return f"{found:.0e} (from float64: ours {from_sharp[0]:.0e}, ONNX Runtime {from_sharp[1]:.0e})"


def outputs_of(graph: object, batch: Arrays) -> Arrays:
    import torch

    from onnxprune.train.torch_graph import TorchGraph

    assert isinstance(graph, TorchGraph)
    with torch.no_grad():
        return {name: value.numpy() for name, value in graph.run(batch).items()}


def distance(one: Arrays, other: Arrays) -> float:
    """Largest difference, by the largest value of each output."""
    gaps = []
    for name, array in other.items():
        wanted, found = np.asarray(array, np.float64), np.asarray(one[name], np.float64)
        size = float(np.abs(wanted).max(initial=0)) or 1.0
        gaps.append(float(np.abs(wanted - found).max(initial=0)) / size)
    return max(gaps)


def share(known: Mapping[str, Row], names: Sequence[str]) -> float:
    """Of the networks that one of the trainers takes."""
    taken = [any(row.get(name, "").startswith("ok") for name in names) for row in known.values()]
    return sum(taken) / max(len(taken), 1)


def summary(known: Mapping[str, Row], names: Sequence[str]) -> list[str]:
    """Totals, and a line for each network that one of them does not take."""
    parts = []
    for name in names:
        taken = sum(row.get(name, "").startswith("ok") for row in known.values())
        parts.append(f"`{name}` trains {taken}")
    either = round(share(known, names) * len(known))
    text = f"Of {len(known)} networks {', '.join(parts)}, one or the other {either}."
    far = {key: row["gap"] for key, row in known.items() if "(" in row.get("gap", "")}
    same = sum("gap" in row for row in known.values()) - len(far)
    text += f" The interpreter's outputs are ONNX Runtime's within 1e-4 for {same}."
    refused = [
        [key, *(row.get(name, "") for name in names)]
        for key, row in known.items()
        if not all(row.get(name, "").startswith("ok") for name in names)
    ]
    found = [text]
    if refused:
        found.append(table(["network", *names], refused))
    if far:
        found.append(table(["network", "difference"], [list(pair) for pair in far.items()]))
    return found


def speeds(names: Sequence[str]) -> list[str]:
    """Images per second of the best of several steps, one thread each, in turn."""
    rows = []
    for network in ("resnet", "vgg", "mobile", "vit"):
        model = load(REPOSITORY / "models" / f"fashion_{network}.onnx")
        row = [network]
        for name in names:
            trainer = trainer_of(name)
            try:
                row.append(f"{speed(model, trainer):.0f}")
            except OnnxPruneError as error:
                row.append(str(error)[:60])
            finally:
                trainer.close()
        rows.append(row)
    heads = ["network", *(f"{name}, images/s" for name in names)]
    return [f"Training steps of {BATCH} images with AdamW, one thread:", table(heads, rows)]


def speed(model: Model, trainer: Trainer) -> float:
    copy = TrainingCopy.of(model)
    (term,) = (Term("ce", aim.output, "labels") for aim in aims(copy.proto))
    weights = tuple(_reaching(copy.proto, [term.tensor], copy.weights))
    job = Job(weights, (term,), copy.statistics, batch_size=BATCH, threads=1)
    rng = np.random.default_rng(0)
    (value,) = copy.proto.graph.input
    sizes = [dim.dim_value for dim in value.type.tensor_type.shape.dim][1:]
    x = {value.name: rng.standard_normal((BATCH, *sizes)).astype(np.float32)}
    y = {"labels": rng.integers(0, 10, BATCH)}
    trainer.prepare(copy.proto, job)
    took = []
    for _ in range(STEPS):
        start = time.perf_counter()
        trainer.step(x, y, rate=1e-3)
        took.append(time.perf_counter() - start)
    return BATCH / min(took)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
