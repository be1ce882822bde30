"""How many cuts a study would measure, and about how long that would take: nothing is measured.

A run takes as long as its share of the multiply-accumulates says; one run of the original tells how
long the whole takes, one product of matrices how long a refit does.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from onnxprune.calibrate import inputs_of, sampled_positions
from onnxprune.cost import stats
from onnxprune.curves import Estimate
from onnxprune.feeds import Batch
from onnxprune.groups import DependencyGraph
from onnxprune.layers import Layer
from onnxprune.runtime import RuntimeUnavailable, cannot_run, session
from onnxprune.sensitivity import Bench, samples_of
from onnxprune.suffix import Suffix
from onnxprune.sweep import TIMED, SweepPoint

_PROBE = 512  # rows of the matrices whose product tells how fast a refit is
_SOLVES = 4  # of one fit: three ridges are mostly tried, and the best once more on all rows
_GATHERING = 2e-9  # seconds to bring one number into the rows of a fit


@dataclass(frozen=True, slots=True)
class _Pace:
    """What one run of the original takes.

    Attributes:
        load: Seconds to load it.
        run: Seconds to run it on all batches.
        macs: Multiply-accumulates of each node, by label.
    """

    load: float
    run: float
    macs: dict[str, int]

    @classmethod
    def of(cls, graph: DependencyGraph, batches: Sequence[Batch]) -> _Pace:
        """Time the original on the first batch.

        Raises:
            VerificationError: ONNX Runtime cannot run it.
        """
        try:
            begun = time.perf_counter()
            loaded = session(graph.graph.source)
            load = time.perf_counter() - begun
            loaded.run(batches[0])
            begun = time.perf_counter()
            loaded.run(batches[0])
        except RuntimeUnavailable as error:
            raise cannot_run(error, graph.graph.source) from error
        run = (time.perf_counter() - begun) * len(batches)
        return cls(load, run, {layer.node: layer.macs for layer in stats(graph).layers})

    def share(self, suffix: Suffix) -> float:
        """Share of the work that lies behind a cut."""
        behind = sum(self.macs.get(node.label, 0) for node in suffix.nodes)
        return behind / max(sum(self.macs.values()), 1)


def of_sensitivity(bench: Bench, graph: DependencyGraph, batches: Sequence[Batch]) -> Estimate:
    """What is still to be measured of a study.

    Args:
        bench: Knows the cuts.
        graph: The analysis.
        batches: What the cuts would be run on.

    Raises:
        VerificationError: ONNX Runtime cannot run the original.
    """
    pace = _Pace.of(graph, batches)
    samples = sum(samples_of(batch) for batch in batches)
    speed = _speed() if any(suffix.readers for suffix in bench.suffixes.values()) else 1.0
    points, seconds = 0, 0.0
    for suffix in bench.suffixes.values():
        cuts, share = len(suffix.edits), pace.share(suffix)
        points += cuts
        seconds += share * (pace.load + cuts * pace.run)
        layers = (reader.layer for reader in suffix.readers if reader.layer is not None)
        seconds += sum(_refit(graph, layer, samples, cuts, speed) for layer in layers)
    if points:
        seconds += bench.rounds * (pace.load + pace.run)
    return Estimate(points=points, seconds=round(seconds, 3))


def of_sweep(
    graph: DependencyGraph, points: Sequence[SweepPoint], batches: Sequence[Batch]
) -> Estimate:
    """What a sweep would measure.

    Raises:
        VerificationError: ONNX Runtime cannot run the original.
    """
    pace = _Pace.of(graph, batches)
    whole = max(sum(pace.macs.values()), 1)
    seconds = pace.load + pace.run + TIMED * len(points)
    seconds += sum(point.macs / whole * (pace.load + pace.run) for point in points)
    return Estimate(points=len(points), seconds=round(seconds, 3))


def _refit(graph: DependencyGraph, layer: Layer, samples: int, cuts: int, speed: float) -> float:
    """Seconds to sum the moments of a layer, and to solve for every cut and every ridge."""
    env = graph.envs[0]
    weight = env.shape(layer.seen) or (1, 1)
    made = env.shape(layer.node.outputs[0]) or (1, 1)
    inputs, groups = inputs_of(layer, weight), layer.groups
    spatial = prod(made[2:]) if layer.kind in ("conv", "deconv") else prod(made[1:-1])
    rows = samples * min(spatial, sampled_positions(inputs, samples))
    outputs = (made[1] if layer.kind in ("conv", "deconv") else made[-1]) // groups
    summing = 2 * rows * inputs**2
    solving = 2 / 3 * inputs**3 + 2 * inputs**2 * outputs
    work = groups * (summing + cuts * _SOLVES * solving)
    return work / speed + _GATHERING * groups * rows * inputs


def _speed() -> float:
    """Multiplications and additions a second in a product of matrices."""
    rng = np.random.default_rng(0)
    a = rng.standard_normal((_PROBE, _PROBE))
    np.matmul(a, a)
    begun = time.perf_counter()
    np.matmul(a, a)
    return 2.0 * _PROBE**3 / max(time.perf_counter() - begun, 1e-6)
