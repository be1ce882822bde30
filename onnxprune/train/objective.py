"""What training aims at: terms of a loss on the outputs, and the same figures in numpy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx
from onnx import TensorProto

from onnxprune.dims import size_of
from onnxprune.errors import UsageError
from onnxprune.train.protocol import Arrays, Kind, Term
from onnxprune.types import AnyArray, Float64Array, FloatArray, IntArray

_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)
_LEAST = 1e-12  # a probability under which none is told from it
_FIRST_WITH_PLAIN_SOFTMAX = 13  # before, all axes from the given one on were one


@dataclass(frozen=True, slots=True)
class Aim:
    """One output of the model.

    Attributes:
        output: Its name.
        scores: The tensor that has a score for each class (logits); the output itself, or what its
            Softmax reads.
        axis: Of the classes, from the end; None where it does not look like classes.
        ending: ``Softmax`` or ``LogSoftmax`` where that makes the output, else "".
    """

    output: str
    scores: str
    axis: int | None
    ending: str = ""

    def logits(self, output: AnyArray) -> FloatArray:
        """Scores from what the output says, the same but for a constant."""
        if self.ending == "Softmax":
            return np.log(np.maximum(output, _LEAST, dtype=np.float32), dtype=np.float32)
        return np.asarray(output, np.float32)


def aims(model: onnx.ModelProto) -> tuple[Aim, ...]:
    """Every float output of a model."""
    made = {name: node for node in model.graph.node for name in node.output}
    inferred = onnx.shape_inference.infer_shapes(model)
    opset = next(e.version for e in model.opset_import if e.domain in ("", "ai.onnx"))
    found = []
    for value in inferred.graph.output:
        tensor = value.type.tensor_type
        if tensor.elem_type not in _FLOATS or not tensor.HasField("shape"):
            continue
        sizes = [size_of(dim) for dim in tensor.shape.dim]
        node = made.get(value.name)
        while node is not None and node.op_type == "Identity" and node.input[0] in made:
            node = made[node.input[0]]
        ending = node.op_type if node is not None else ""
        if node is not None and ending in ("Softmax", "LogSoftmax") and len(sizes) > 1:
            axis = next((a.i for a in node.attribute if a.name == "axis"), None)
            axis = (-1 if opset >= _FIRST_WITH_PLAIN_SOFTMAX else 1) if axis is None else axis
            axis -= len(sizes) if axis >= 0 else 0
            if axis == -1 or opset >= _FIRST_WITH_PLAIN_SOFTMAX:
                found.append(Aim(value.name, node.input[0], axis, ending))
                continue
        classes = len(sizes) == 2 and (sizes[1] is None or sizes[1] > 1)
        found.append(Aim(value.name, value.name, -1 if classes else None))
    return tuple(found)


@dataclass(frozen=True)
class Objective:
    """A loss, by the outputs it reads.

    Attributes:
        aims: Outputs, with what kind of loss is taken of each; a pair may come twice.
        temperature: Of ``kd``.
        scales: Factor of each output's ``mse``: one over the mean square of what the teacher says.
    """

    aims: tuple[tuple[Aim, Kind], ...]
    temperature: float = 1.0
    scales: Mapping[str, float] | None = None

    @cached_property
    def terms(self) -> tuple[Term, ...]:
        """The loss as trainers get it."""
        found = []
        for aim, kind in self.aims:
            scale = (self.scales or {}).get(aim.output, 1.0) if kind == "mse" else 1.0
            tensor = aim.output if kind == "mse" else aim.scores
            axis = -1 if aim.axis is None else aim.axis
            heat = self.temperature if kind == "kd" else 1.0
            found.append(Term(kind, tensor, f"{kind}/{aim.output}", scale, heat, axis))
        return tuple(found)

    @property
    def taught(self) -> tuple[str, ...]:
        """Outputs of the teacher that are needed."""
        return tuple(dict.fromkeys(aim.output for aim, kind in self.aims if kind != "ce"))

    @property
    def labelled(self) -> Aim | None:
        """The output that labels speak of."""
        return next((aim for aim, kind in self.aims if kind == "ce"), None)

    def targets(self, taught: Arrays, labels: IntArray | None) -> dict[str, AnyArray]:
        """Arrays of a batch, by target of each term."""
        found: dict[str, AnyArray] = {}
        for (aim, kind), term in zip(self.aims, self.terms, strict=True):
            if kind == "ce":
                assert labels is not None
                found[term.target] = labels
            else:
                said = taught[aim.output]
                found[term.target] = said if kind == "mse" else aim.logits(said)
        return found

    def loss(self, outputs: Arrays, targets: Arrays) -> float:
        """The loss of a batch, from what the finished model says."""
        total = 0.0
        for (aim, kind), term in zip(self.aims, self.terms, strict=True):
            said = np.asarray(outputs[aim.output], np.float32)
            wanted = np.asarray(targets[term.target], None if kind == "ce" else np.float32)
            if kind == "mse":
                value = float(np.mean(np.square(said.astype(np.float64) - wanted)))
            elif kind == "ce":
                logs = np.moveaxis(_log_softmax(aim.logits(said), term.axis), term.axis, -1)
                held = np.take_along_axis(logs, wanted.astype(np.int64)[..., None], axis=-1)
                value = -float(held.mean())
            else:
                ours = _log_softmax(aim.logits(said) / term.temperature, term.axis)
                theirs = _log_softmax(wanted / term.temperature, term.axis)
                apart = (np.exp(theirs) * (theirs - ours)).sum(axis=term.axis)
                value = term.temperature**2 * float(apart.mean())
            total += term.weight * value
        return total


def _log_softmax(scores: FloatArray, axis: int) -> Float64Array:
    off = scores.astype(np.float64) - scores.max(axis=axis, keepdims=True)
    logs: Float64Array = off - np.log(np.exp(off).sum(axis=axis, keepdims=True))
    return logs


def choose(
    found: Sequence[Aim], losses: Sequence[str], *, labels: bool, teacher: bool
) -> tuple[tuple[Aim, Kind], ...]:
    """What is asked of which output.

    Args:
        found: Outputs of the model.
        losses: ``ce``, ``kd``, ``mse``; none takes ``ce`` where there are labels, and imitation of
            the teacher where there is one: ``kd`` of classes, ``mse`` of all else.
        labels: There are labels.
        teacher: There is a teacher.

    Raises:
        UsageError: The model has no output for it, or labels or teacher are missing.
    """
    classes = [aim for aim in found if aim.axis is not None]
    if "ce" in losses and not labels:
        raise UsageError("--loss ce needs labels", hint="--labels Y.npy")
    if set(losses) & {"kd", "mse"} and not teacher:
        raise UsageError(
            f"--loss {'kd' if 'kd' in losses else 'mse'} needs the model to imitate",
            hint="--teacher ORIGINAL.onnx",
        )
    if set(losses) & {"ce", "kd"} and not classes:
        raise UsageError("no output has a score for each class", hint="--loss mse")
    if not found:
        raise UsageError("no output of the model is a float tensor")
    if not losses and not labels and not teacher:
        raise UsageError(
            "there is nothing to learn from: no labels, and no model to imitate",
            hint="--labels Y.npy, or --teacher ORIGINAL.onnx",
        )
    chosen: list[tuple[Aim, Kind]] = []
    if "ce" in losses or (not losses and labels and classes):
        chosen.append((classes[0], "ce"))
    for aim in found if teacher else ():
        imitated = "kd" in losses or not losses
        if aim.axis is not None and imitated:
            chosen.append((aim, "kd"))
        if "mse" in losses or (not losses and aim.axis is None):
            chosen.append((aim, "mse"))
    if not chosen:
        raise UsageError("no output has a score for each class", hint="--teacher ORIGINAL.onnx")
    return tuple(chosen)
