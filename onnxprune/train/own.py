"""A trainer from one function of the user's: gradients are theirs, everything else is here."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx
from onnx import numpy_helper

from onnxprune.train.protocol import Arrays, Blocking, Job
from onnxprune.train.updates import Updates
from onnxprune.types import AnyArray

# Of weights, inputs and targets by name: the loss, and its gradient for every weight.
Gradients = Callable[[Arrays, Arrays, Arrays], tuple[float, Arrays]]


class FromGradients:
    """Trains with gradients that a function computes.

    Args:
        function: Of weights, inputs and targets, all by name; it gives the loss, and the gradient
            of each weight. It computes what the model computes, in whatever framework.
        name: How reports call it.
    """

    def __init__(self, function: Gradients, name: str = "own") -> None:
        self.name = name
        self._function = function
        self._held: dict[str, AnyArray] = {}

    def supports(self, model: onnx.ModelProto) -> Sequence[Blocking]:
        """Whatever the function computes."""
        return ()

    def prepare(self, model: onnx.ModelProto, job: Job) -> None:
        """Take the weights out of the model."""
        wanted = {*job.weights, *job.statistics}
        self._job = job
        self._held = {
            tensor.name: np.array(numpy_helper.to_array(tensor), np.float32)
            for tensor in model.graph.initializer
            if tensor.name in wanted
        }
        self._updates = Updates(
            {name: self._held[name] for name in job.weights},
            optimizer=job.optimizer,
            masks=job.masks,
            l1=job.l1,
            decayed=job.decayed,
            weight_decay=job.weight_decay,
            clip=job.clip,
        )

    def gradients(self, inputs: Arrays, targets: Arrays) -> tuple[float, Arrays]:
        """What the function says."""
        return self._function(self._held, inputs, targets)

    def step(self, inputs: Arrays, targets: Arrays, *, rate: float, l1: float = 0.0) -> float:
        """One update."""
        loss, gradients = self.gradients(inputs, targets)
        if np.isfinite(loss):
            held = {name: np.asarray(one, np.float32) for name, one in gradients.items()}
            self._updates.apply(held, rate, l1)
        return float(loss)

    def weights(self) -> Arrays:
        """Copies of all weights."""
        return {name: array.copy() for name, array in self._held.items()}

    def state(self) -> Arrays:
        """Copies of all weights and of the optimizer's arrays."""
        moments = {name: array.copy() for name, array in self._updates.state().items()}
        return {**self.weights(), **moments}

    def load(self, state: Arrays) -> None:
        """Put a state back."""
        for name, array in self._held.items():
            if name in state:
                np.copyto(array, np.asarray(state[name], np.float32))
        self._updates.load(state)
        self._updates.keep_zeros()

    def close(self) -> None:
        """Nothing to free."""
