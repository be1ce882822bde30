"""The built-in trainer: onnxruntime-training, in a process and a folder of its own."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxprune.dims import size_of
from onnxprune.errors import TrainingError, UnsupportedModelError
from onnxprune.train import spatial, wire
from onnxprune.train.losses import add_loss
from onnxprune.train.place import Place
from onnxprune.train.protocol import Arrays, Blocking, Job
from onnxprune.train.rewrites import Writer, rewritten

_OLDEST, _NEWEST, _NEWEST_IR = 12, 21, 10  # what version 1.19.2 takes
_OLD_TO = 17  # where older models are converted to
_WAIT = 10  # seconds after which a worker whose pipe has ended is said not to answer
_PARTING = 1  # second that it has to end by itself
# No gradient, or no kernel for it, once the rewrites are done.
_WITHOUT_GRADIENT = frozenset(
    """
    Celu Col2Im ConvTranspose CumSum DeformConv DepthToSpace Det DFT Einsum Elu GRU GridSample
    GroupNormalization HardSigmoid HardSwish If InstanceNormalization LRN LSTM Loop LpNormalization
    LpPool MaxRoiPool MaxUnpool Mean MeanVarianceNormalization Mish PRelu RNN ReduceMax ReduceMin
    ReduceProd Resize RoiAlign Scan Selu Softplus Softsign SpaceToDepth Sum ThresholdedRelu
    """.split()  # noqa: SIM905  (read as lines)
)
_LONGEST = 300  # characters of an error
__all__ = ["OrtTrainer", "spatial"]  # the second registers its rewrites


class OrtTrainer:
    """Trains with onnxruntime-training 1.19.2.

    Args:
        place: Where it is installed, and which interpreter runs it.
    """

    name = "ort"

    def __init__(self, place: Place) -> None:
        self._place = place
        self._process: subprocess.Popen[bytes] | None = None
        self._amid = False  # of a request and its answer

    def supports(self, model: onnx.ModelProto) -> Sequence[Blocking]:
        """Nodes behind a weight that have no gradient."""
        try:
            made = _converted(model)
        except UnsupportedModelError as error:
            return [Blocking("", "", f"{self.name}: {error}")]
        names = {node.output[0]: node.name or node.output[0] for node in model.graph.node}
        failed = rewritten(made, frozenset())
        found = []
        for node in _behind_weights(made):
            key = next((name for name in node.output if name), "")
            why = failed.get(key)
            standard = node.domain in ("", "ai.onnx")
            if why is not None or (standard and node.op_type in _WITHOUT_GRADIENT):
                reason = f"{self.name}: no gradient for {node.op_type} {why or ''}".strip()
                found.append(Blocking(names.get(key, key), node.op_type, reason))
        return found

    def prepare(self, model: onnx.ModelProto, job: Job) -> None:
        """Rewrite the model, append the loss, and start the worker on it.

        Raises:
            UnsupportedModelError: The runtime finds no gradients for it.
            TrainingError: The worker cannot be started.
        """
        made = _converted(model)
        listed = set(job.statistics)
        frozen = frozenset(
            node.output[0]
            for node in made.graph.node
            if node.op_type == "BatchNormalization" and not listed & set(node.input[3:5])
        )
        rewritten(made, frozen)
        inferred = onnx.shape_inference.infer_shapes(made, data_prop=True)
        shapes = {
            value.name: tuple(size_of(dim) for dim in value.type.tensor_type.shape.dim)
            for value in (*inferred.graph.value_info, *inferred.graph.output)
        }
        loss = add_loss(made, job.terms, Writer(made, shapes))
        del made.graph.value_info[:]
        self._start()
        say = {
            "do": "prepare",
            "loss": loss,
            "weights": list(job.weights),
            "statistics": list(job.statistics),
            "optimizer": job.optimizer,
            "l1": dict(job.l1),
            "decayed": sorted(job.decayed),
            "weight_decay": job.weight_decay,
            "clip": job.clip,
            "seed": job.seed,
            "threads": job.threads,
        }
        arrays = dict(job.masks)
        arrays["model"] = np.frombuffer(made.SerializeToString(), np.uint8)
        try:
            self._ask(say, arrays)
        except _RefusedError as error:
            raise UnsupportedModelError(
                f"onnxruntime-training cannot train this model: {error}", hint="--trainer torch"
            ) from error

    def gradients(self, inputs: Arrays, targets: Arrays) -> tuple[float, Arrays]:
        """Loss and gradients of a batch, without an update."""
        return self._told({"do": "gradients"}, {**inputs, **targets})

    def step(self, inputs: Arrays, targets: Arrays, *, rate: float, l1: float = 0.0) -> float:
        """Make one update and return the loss before it; a loss that is no number makes none."""
        say = {"do": "step", "rate": rate, "l1": l1}
        return float(self._told(say, {**inputs, **targets})[0])

    def weights(self) -> Arrays:
        """Weights and statistics as they stand."""
        found: Arrays = self._told({"do": "weights"})[1]
        return found

    def state(self) -> Arrays:
        """Weights, statistics and the optimizer's arrays."""
        found: Arrays = self._told({"do": "state"})[1]
        return found

    def load(self, state: Arrays) -> None:
        """Put a state back."""
        self._told({"do": "load"}, state)

    def close(self) -> None:
        """End the worker."""
        process, self._process = self._process, None
        if process is None:
            return
        if self._amid:  # it may wait for us, and we would for it
            process.kill()
        with contextlib.suppress(OSError):
            assert process.stdin is not None
            process.stdin.close()  # the worker ends with its input
        try:
            process.wait(_PARTING)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()

    def _start(self) -> None:
        environment = {**os.environ, "PYTHONPATH": str(self._place.folder)}
        for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
            environment.setdefault(name, "1")  # the arithmetic of updates is bound by memory
        worker = Path(__file__).with_name("worker.py")
        self._amid = False
        try:
            self._process = subprocess.Popen(
                [self._place.python, "-P", str(worker)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,  # an interruption is for us, who save first
            )
        except OSError as error:
            raise TrainingError(
                f"cannot start '{self._place.python}': {error.strerror}", hint="--train-python"
            ) from error

    def _told(self, say: dict[str, Any], arrays: Arrays | None = None) -> tuple[Any, Any]:
        try:
            return self._ask(say, arrays or {})
        except _RefusedError as error:
            raise TrainingError(f"onnxruntime-training failed: {error}") from error

    def _ask(self, say: dict[str, Any], arrays: Arrays) -> tuple[Any, Any]:
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise TrainingError("the training process is not running")
        if self._amid:
            raise TrainingError("the training process was left amid an answer")
        self._amid = True  # stays so where an interruption comes: the next answer is another's
        try:
            wire.send(process.stdin, say, arrays)
            answer, got = wire.receive(process.stdout)
            self._amid = False
        except wire.WireError as error:
            raise TrainingError(f"the training process {self._how_it_ended(process)}") from error
        if "error" in answer:
            text = " ".join(str(answer["error"]).split())
            raise _RefusedError(text[:_LONGEST])
        return answer["value"], got

    def _how_it_ended(self, process: subprocess.Popen[bytes]) -> str:
        try:
            code = process.wait(_WAIT)
        except subprocess.TimeoutExpired:
            return "does not answer"
        self.close()
        if code < 0:
            return f"was killed by signal {-code}" + (" (out of memory?)" if code == -9 else "")
        return f"ended with exit status {code}"


class _RefusedError(Exception):
    """What the worker says it cannot do."""


def _converted(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy at an opset and IR version that the runtime takes."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    entry = next((e for e in made.opset_import if e.domain in ("", "ai.onnx")), None)
    if entry is not None and not _OLDEST <= entry.version <= _NEWEST:
        target = _NEWEST if entry.version > _NEWEST else _OLD_TO
        try:
            made = onnx.version_converter.convert_version(made, target)
        except (RuntimeError, onnx.version_converter.ConvertError) as error:
            reason = " ".join(str(error).split())[:_LONGEST]
            raise UnsupportedModelError(
                f"it takes opsets {_OLDEST} to {_NEWEST}, and {entry.version} cannot be converted: "
                f"{reason}",
                hint="--trainer torch",
            ) from error
    made.ir_version = min(made.ir_version, _NEWEST_IR)
    return made


def _behind_weights(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Nodes that read, directly or not, a float constant of more than one element."""
    floats = onnx.TensorProto.FLOAT
    reached = {
        tensor.name
        for tensor in model.graph.initializer
        if tensor.data_type == floats and int(np.prod(tensor.dims)) > 1
    }
    found = []
    for node in model.graph.node:
        if any(name in reached for name in node.input):
            reached.update(node.output)
            found.append(node)
    return found
