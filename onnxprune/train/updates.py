"""The optimizers, in numpy and in place: one for every trainer that has gradients and no own.

Only numpy and the standard library are used: the worker that runs onnxruntime-training has little
more.

Sources: Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization" (arXiv:1711.05101);
    the penalty's sub-gradient as in Liu et al. 2017, "Network Slimming" (arXiv:1708.06519).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

_BETAS = (0.9, 0.999)
_EPSILON = 1e-8
_MOMENTUM = 0.9
_STEPS = "#steps"


class Updates:
    """Changes weights by their gradients.

    Args:
        weights: float32 arrays, changed in place by ``apply``.
        optimizer: ``adamw`` or ``sgd``.
        masks: By name, True where a weight may be other than zero.
        l1: Factor of the penalty, by name.
        decayed: Names of the weights that decay.
        weight_decay: By how much.
        clip: Largest norm of all gradients together; 0 for no limit.
    """

    def __init__(
        self,
        weights: Mapping[str, Any],
        *,
        optimizer: str = "adamw",
        masks: Mapping[str, Any] | None = None,
        l1: Mapping[str, float] | None = None,
        decayed: frozenset[str] = frozenset(),
        weight_decay: float = 0.0,
        clip: float = 0.0,
    ) -> None:
        self.weights = weights
        self.masks = {name: np.asarray(mask, np.float32) for name, mask in (masks or {}).items()}
        self._l1, self._decayed = dict(l1 or {}), decayed
        self._decay, self._clip, self._adam = weight_decay, clip, optimizer == "adamw"
        self._steps = 0
        kinds = ("#m/", "#v/") if self._adam else ("#m/",)
        self._moments = {
            kind + name: np.zeros_like(array) for kind in kinds for name, array in weights.items()
        }
        self.keep_zeros()

    def keep_zeros(self) -> None:
        """Set to zero what the masks say."""
        for name, mask in self.masks.items():
            weight = self.weights[name]
            np.multiply(weight, mask, out=weight)

    def apply(self, gradients: Mapping[str, Any], rate: float, l1: float = 0.0) -> None:
        """Make one update; masked weights are exactly zero after it.

        A weight without a gradient stays as it is.
        """
        self._steps += 1
        scale = self._scale(gradients)
        for name, weight in self.weights.items():
            if name not in gradients:
                continue
            gradient = gradients[name] * np.float32(scale)  # a copy, whatever the scale
            if l1 and name in self._l1:
                gradient += np.float32(l1 * self._l1[name]) * np.sign(weight)
            decay = self._decay if name in self._decayed else 0.0
            if self._adam:
                self._adamw(name, weight, gradient, rate, decay)
            else:
                self._sgd(name, weight, gradient, rate, decay)
        self.keep_zeros()

    def _scale(self, gradients: Mapping[str, Any]) -> float:
        if not self._clip:
            return 1.0
        total = sum(float(np.vdot(one, one)) for one in gradients.values())
        norm = math.sqrt(total)
        return 1.0 if norm <= self._clip or not math.isfinite(norm) else self._clip / norm

    def _adamw(self, name: str, weight: Any, gradient: Any, rate: float, decay: float) -> None:
        first, second = self._moments["#m/" + name], self._moments["#v/" + name]
        first *= np.float32(_BETAS[0])
        first += np.float32(1 - _BETAS[0]) * gradient
        second *= np.float32(_BETAS[1])
        np.multiply(gradient, gradient, out=gradient)
        second += np.float32(1 - _BETAS[1]) * gradient
        if decay:
            weight *= np.float32(1 - rate * decay)
        root = np.sqrt(second, out=gradient)
        root /= np.float32(math.sqrt(1 - _BETAS[1] ** self._steps))
        root += np.float32(_EPSILON)
        np.divide(first, root, out=root)
        root *= np.float32(rate / (1 - _BETAS[0] ** self._steps))
        weight -= root

    def _sgd(self, name: str, weight: Any, gradient: Any, rate: float, decay: float) -> None:
        if decay:
            gradient += np.float32(decay) * weight
        speed = self._moments["#m/" + name]
        speed *= np.float32(_MOMENTUM)
        speed += gradient
        weight -= np.float32(rate) * speed

    def state(self) -> dict[str, Any]:
        """Arrays of the optimizer, all that ``load`` needs."""
        return {_STEPS: np.array(self._steps, np.int64), **self._moments}

    def load(self, state: Mapping[str, Any]) -> None:
        """Put back what ``state`` gave, as far as it is there."""
        if _STEPS in state:
            self._steps = int(state[_STEPS])
        for name, moment in self._moments.items():
            if name in state:
                np.copyto(moment, state[name])
