"""How long models, and layers alone, take here in ONNX Runtime: measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import prod, sqrt
from statistics import median

import numpy as np
from onnx import TensorProto, helper

from onnxprune.extents import Extents, Layer, alone
from onnxprune.model import Model
from onnxprune.runtime import Session, profile, session
from onnxprune.types import AnyArray

RUNS = 15  # of a profile
_WARM_UP = 3  # runs of each model that are not counted
_FEWEST, _MOST = 7, 2000  # rounds of a measurement, whatever the time
_SCRUBBED = 1 << 22  # bytes written between runs of a layer alone: more than a core's own cache
_CHAIN = 100  # kernels that do nothing
_PROBE = 20  # outputs of a convolution: padded to 32 in blocks of 16, to 24 in blocks of 8
_OLDEST_OPSET = 13

# -- whole models ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Timing:
    """How long one run takes.

    Attributes:
        seconds: Median.
        low, high: Interval of the median at 95 %.
        runs: Runs that were counted.
        samples: Seconds of every run, in the order they were taken.
    """

    seconds: float
    low: float
    high: float
    runs: int
    samples: tuple[float, ...] = ()


def measure(
    models: Sequence[Model],
    feeds: Mapping[str, AnyArray],
    *,
    seconds: float = 5.0,
    threads: int | None = 1,
) -> list[Timing]:
    """Time models in ONNX Runtime, in turn (A B A B ...), so that noise hits all alike.

    On one thread it is the thread's own processor time that is taken: the same as wall time on an
    idle machine, and not lengthened where other programs run beside. On several it is wall time.

    Args:
        models: Models that take the same inputs.
        feeds: An array for every input.
        seconds: Time to spend in all, loading and warm-up left out; at least seven rounds are run.
        threads: Threads inside an operator; None takes one for each usable core.

    Returns:
        One timing for each model, all with as many runs.

    Raises:
        RuntimeUnavailable: The runtime cannot load or run a model.
    """
    loaded = [session(model, threads=threads) for model in models]
    return measure_sessions(loaded, feeds, seconds=seconds, threads=threads)


def measure_sessions(
    loaded: Sequence[Session],
    feeds: Mapping[str, AnyArray],
    *,
    seconds: float,
    threads: int | None,
) -> list[Timing]:
    """As ``measure``, for models that were loaded with that number of threads."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    rounds = interleaved([partial(one.run, feeds) for one in loaded], seconds, clock)
    return [timing(samples) for samples in rounds]


def interleaved(
    calls: Sequence[Callable[[], object]],
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> list[list[float]]:
    """Seconds of each call in every round.

    A round makes each call twice, in order, and counts the second: the first brings back into the
    caches what the calls before it drove out.
    """
    for _ in range(_WARM_UP):
        for call in calls:
            call()
    spent: list[list[float]] = [[] for _ in calls]
    begun = clock()
    while len(spent[0]) < _FEWEST or (clock() - begun < seconds and len(spent[0]) < _MOST):
        for call, samples in zip(calls, spent, strict=True):
            call()
            start = clock()
            call()
            samples.append(clock() - start)
    return spent


def timing(samples: Sequence[float]) -> Timing:
    """Median of a sample and its interval."""
    low, high = median_interval(samples)
    return Timing(median(samples), low, high, len(samples), tuple(samples))


def compare_timings(before: Timing, after: Timing) -> tuple[float, float, float]:
    """Median of ``after / before``, round by round, and its interval at 95 %."""
    pairs = [new / old for old, new in zip(before.samples, after.samples, strict=True)]
    return median(pairs), *median_interval(pairs)


def median_interval(samples: Sequence[float]) -> tuple[float, float]:
    """Interval of the median at 95 %, from order statistics alone: no distribution is assumed.

    Source: Conover, "Practical Nonparametric Statistics", sec. 3.2 (normal approximation).
    """
    ordered, count = sorted(samples), len(samples)
    reach = 1.96 * sqrt(count) / 2
    low = max(0, int(count / 2 - reach))
    high = min(count - 1, int(count / 2 + reach))
    return ordered[low], ordered[high]


# -- layers alone ----------------------------------------------------------------------------------


def time_layers(
    layers: Sequence[tuple[Layer, Extents]], *, threads: int | None = 1, runs: int = RUNS
) -> list[float]:
    """Seconds of each layer's own kernel at given extents, measured in ONNX Runtime.

    Before each run other memory is written, so that weights are no nearer than in a network.
    """
    elsewhere = np.zeros(_SCRUBBED, np.uint8)
    found: list[float] = []
    for layer, extents in layers:
        model, feeds = alone([(layer, extents)], _OLDEST_OPSET)
        kernels = profile(
            model,
            feeds,
            runs=runs,
            threads=threads,
            tensors=False,
            between=partial(np.add, elsewhere, 1, out=elsewhere),
        )
        found.append(sum(k.seconds for k in kernels if k.name.startswith("layer0_")))
    return found


@dataclass(frozen=True, slots=True)
class Peculiarities:
    """What the runtime adds on this machine.

    Attributes:
        block: Channels in a block of its layout for convolutions, 1 where it has none.
        reorder: Seconds to bring one element into or out of that layout.
        profiling: Seconds that a profile adds to each kernel.
    """

    block: int
    reorder: float
    profiling: float

    def corrected(self, seconds: float) -> float:
        """Time of a kernel without what the profile adds."""
        return max(seconds - self.profiling, 0.1 * seconds)

    @staticmethod
    def measured(threads: int | None = 1) -> Peculiarities:
        """Ask the runtime."""
        layer = Layer("Conv", (1, 64, _PROBE), (1, 56, 56), (1, 1))
        model, feeds = alone([(layer, layer.extents)], _OLDEST_OPSET)
        block, reorder = 1, 0.0
        for kernel in profile(model, feeds, runs=RUNS, threads=threads, tensors=False):
            if kernel.name.startswith("layer0_"):
                block = {32: 16, 24: 8}.get(kernel.shape[1], 1)
            if kernel.op_type == "ReorderInput":
                reorder = kernel.seconds / prod(kernel.shape)
        return Peculiarities(block, reorder, _profiling(threads))


def _profiling(threads: int | None) -> float:
    """Seconds that a profile adds to each kernel, from a chain of kernels that do nothing."""
    names = [f"t{number}" for number in range(_CHAIN + 1)]
    nodes = [helper.make_node("Abs", [a], [b], name=b) for a, b in pairwise(names)]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in (names[0], names[-1])]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:])
    opsets = [helper.make_opsetid("", _OLDEST_OPSET)]
    model = Model(helper.make_model(graph, opset_imports=opsets, ir_version=8))
    feeds = {names[0]: np.ones(1, np.float32)}
    kernels = profile(model, feeds, runs=RUNS, threads=threads, tensors=False)
    plain = measure([model], feeds, seconds=0.1, threads=threads)[0].seconds
    return max(0.0, (sum(kernel.seconds for kernel in kernels) - plain) / _CHAIN)
