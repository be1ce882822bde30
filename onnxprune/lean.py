"""Where targets should lean: what a layer makes, moved towards what its readers miss.

A refit wants of each layer what the original made there, whatever reads it. Where channels went,
another mixture in those that stay may serve their readers better. After a refit the errors of the
readers are carried back through their weights, as a gradient is, and the targets of the layer in
front move that way, for the next refit.

Source: target propagation (LeCun 1986) with steps as in Gauss-Newton, held near to the layer's own
    target as by auxiliary coordinates (Carreira-Perpiñán and Wang 2014, arXiv:1212.5921).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnxprune.activations import Activation, activation_behind
from onnxprune.graph import Graph
from onnxprune.reach import Reach, reachable
from onnxprune.sites import Site
from onnxprune.stepwise import Values
from onnxprune.through import slope
from onnxprune.types import AnyArray, Float32Array, Float64Array

_OWN = 0.1  # what the layer's own target counts beside those of its readers
_FURTHER = 1.5  # of the step that is best for a straight line: a refit follows it in part only
_DAMPING = 1e-3  # of the mean diagonal of what a step is divided by
_NUDGE = 1e-2  # of the size of a tensor, for the slope of an activation
_MOST_BYTES = 1 << 28  # of all tensors that are looked at; there are four or so of each


@dataclass(frozen=True)
class Link:
    """A layer, and the layers that read it, at most through an activation of its own."""

    site: Site
    activation: Activation | None
    readers: tuple[Site, ...]


def links(work: Graph, sites: Sequence[Site]) -> list[Link]:
    """All layers that have readers whose errors can be carried back, in execution order."""
    reading: dict[str, list[Site]] = {}
    for site in sites:
        if not site.ties and reachable(site):
            reading.setdefault(site.layer.data, []).append(site)
    found = []
    for site in sites:
        activation = None if site.ties else activation_behind(work, site.goal)
        readers = reading.get(site.goal if activation is None else activation.made, [])
        alike = len({one.layer.kind == "conv" for one in readers}) == 1
        if not site.ties and alike:
            found.append(Link(site, activation, tuple(readers)))
    return found


class Leaning:
    """How far targets have moved, refit after refit.

    Attributes:
        goals: Tensors to be looked at; none where they would be too large.
        moved: What is added to a target by now, batch by batch, by the tensor that is aimed at.
    """

    def __init__(self, work: Graph, sites: Sequence[Site], sizes: Mapping[str, int]) -> None:
        """``sizes``: elements of each goal over all of the data."""
        self.work = work
        self.links = links(work, sites)
        self.goals = {one.goal for link in self.links for one in (link.site, *link.readers)}
        if 4 * sum(sizes[goal] for goal in self.goals) > _MOST_BYTES:
            self.links, self.goals = [], set()
        self.moved: dict[str, list[Float32Array]] = {}
        self._seen = {goal: activation_behind(work, goal) for goal in self.goals}
        self._counts: dict[str, float] = {}

    def missed(self, wanted: Mapping[str, Values], made: Mapping[str, Values]) -> float:
        """What readers miss, as shares of what varies there, added up.

        Args:
            wanted: What the original has at each goal, cut to what survives, by batch.
            made: What the refitted model has there.

        Returns:
            The sum, inf where a number is none.
        """
        if not all(np.isfinite(a).all() for values in (wanted, made)
                   for goal in self.goals for a in values[goal]):  # fmt: skip
            return np.inf
        readers = {one.goal for link in self.links for one in link.readers}
        total = 0.0
        for goal in sorted(readers):
            pairs = [self._both(goal, *pair) for pair in zip(wanted[goal], made[goal], strict=True)]
            self._count(goal, [want for want, _ in pairs])
            total += self._counts[goal] * sum(_square(want - have) for want, have in pairs)
        return total

    def follow(
        self,
        value: Callable[[str], AnyArray],
        wanted: Mapping[str, Values],
        made: Mapping[str, Values],
    ) -> None:
        """Lean further, by what the readers miss.

        Args:
            value: Constants as the refit left them, by name.
            wanted: As for ``missed``, which has to be asked before.
            made: As for ``missed``.
        """
        found: dict[str, list[Float32Array]] = {}
        for link in self.links:
            goal = link.site.goal
            reaches = [(Reach.of(one, self.work, value), one.goal) for one in link.readers]
            known = [(reach, name) for reach, name in reaches if reach is not None]
            if len(known) == len(reaches):
                self._count(goal, [self._shown(goal, want) for want in wanted[goal]])
                found |= self._step(link, known, wanted, made)
        self.moved |= found

    def _step(
        self,
        link: Link,
        reaches: Sequence[tuple[Reach, str]],
        wanted: Mapping[str, Values],
        made: Mapping[str, Values],
    ) -> dict[str, list[Float32Array]]:
        """Where a target is after one more step; {} where numbers overflow."""
        goal, axis = link.site.goal, reaches[0][0].axis
        own = _OWN * self._counts[goal]
        channels = made[goal][0].shape[axis]
        metric = own * np.eye(channels)
        for reach, name in reaches:
            metric += self._counts[name] * reach.square(channels)
        metric += np.eye(channels) * (_DAMPING * np.trace(metric) / channels)
        inverse = np.asarray(np.linalg.inv(metric), np.float64)
        old = self.moved.get(goal) or [np.zeros_like(one, np.float32) for one in made[goal]]
        steps, gain, cost = [], 0.0, 0.0
        for batch, now in enumerate(made[goal]):
            bend = _bend(link.activation, np.asarray(now, np.float32))
            pull = -np.float32(own) * old[batch]
            for reach, name in reaches:
                error = self._error(name, wanted[name][batch], made[name][batch])
                pull += np.float32(self._counts[name]) * reach.back(error, now.shape) * bend
            steps.append(_mixed(pull, inverse, axis))
            gain += float(np.sum(pull * steps[-1], dtype=np.float64))
            cost += own * _square(steps[-1])
            for reach, name in reaches:
                cost += self._counts[name] * _square(reach.forth(steps[-1] * bend))
        size = np.float32(_FURTHER * gain / max(cost, 1e-30))
        if not np.isfinite(size):
            return {}
        return {goal: [one + size * step for one, step in zip(old, steps, strict=True)]}

    def _count(self, goal: str, seen: Sequence[Float32Array]) -> None:
        """Let an error count as a share of what varies at a goal."""
        if goal not in self._counts:
            mean = np.float32(np.mean([one.mean(dtype=np.float64) for one in seen]))
            self._counts[goal] = 1 / max(sum(_square(one - mean) for one in seen), 1e-30)

    def _error(self, goal: str, want: AnyArray, have: AnyArray) -> Float32Array:
        """How what is made at a goal should change, as far as it is seen."""
        miss = np.asarray(want, np.float32) - np.asarray(have, np.float32)
        if self._seen[goal] is None:
            return miss
        shown, now = self._both(goal, want, have)
        return np.square(slope(shown - now, miss)) * miss

    def _both(self, goal: str, want: AnyArray, have: AnyArray) -> tuple[Float32Array, Float32Array]:
        return self._shown(goal, want), self._shown(goal, have)

    def _shown(self, goal: str, array: AnyArray) -> Float32Array:
        """What is seen of a tensor."""
        real: Float32Array = np.asarray(array, np.float32)
        activation = self._seen[goal]
        return real if activation is None else activation(real)


def _bend(activation: Activation | None, now: Float32Array) -> Float32Array:
    """The slope of an activation at what there is now."""
    if activation is None:
        return np.ones_like(now)
    step = np.float32(_NUDGE * np.sqrt(max(_square(now) / max(now.size, 1), 1e-12)))
    difference: Float32Array = activation(now + step) - activation(now - step)
    return difference / (2 * step)


def _mixed(pull: Float32Array, inverse: Float64Array, axis: int) -> Float32Array:
    """A symmetric matrix over the channels, which lie along ``axis``."""
    mixed: Float32Array = np.moveaxis(pull, axis, -1) @ inverse.astype(np.float32)
    return np.ascontiguousarray(np.moveaxis(mixed, -1, axis))


def _square(array: Float32Array) -> float:
    return float(np.sum(np.square(array), dtype=np.float64))
