"""How long a cut model would take here in ONNX Runtime: predicted from what was measured."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

import numpy as np
from onnx import TensorProto

from onnxprune.extents import CONVOLUTIONS, PRODUCTS, Extents, Layer, extents_of, layer_of
from onnxprune.graph import Graph, Node
from onnxprune.groups import DependencyGraph, random_keep
from onnxprune.ops.conv import surviving_groups
from onnxprune.runtime import Kernel, profile
from onnxprune.staircase import Staircase, fit
from onnxprune.survivors import DeadSlots, Survivors
from onnxprune.timing import RUNS, Peculiarities, measure, time_layers
from onnxprune.trace import Trace
from onnxprune.types import AnyArray, IntArray, Shape

_LEAST = 5e-7  # seconds that reordering a tensor takes, however small it is
# Most of a run, and most seconds, that may be spent outside kernels; more is noise.
_OUTSIDE, _OUTSIDE_SECONDS = 0.03, 5e-5
# Operators that take the blocked layout where all they read is in it.
_EITHER = {"BatchNormalization", "Relu", "Clip", "Sigmoid", "Tanh", "LeakyRelu", "HardSigmoid"}
_EITHER |= {"MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Add", "Sum", "Mul"}
_EITHER |= {"Concat", "HardSwish"}
_LAYOUT = re.compile(r"(_nchwc|_token_\d+)+$")  # what the runtime appends to a tensor's name
_NORM = "_bn"  # and before that, where a BatchNormalization became a depthwise Conv
# Kernels that multiply; the runtime's names for fused ones contain these.
_MULTIPLYING = ("Conv", "MatMul", "Gemm")


@dataclass(frozen=True, slots=True)
class Charge:
    """One kernel of the original and what its time depends on.

    Attributes:
        node: The node of the prepared graph it stands for, None where that is not known.
        seconds: Its time in the original.
        stairs: Cost of its layer by channel counts; None where it goes by ``tensors``.
        tensors: What it reads and writes.
        elements: How many elements these have in the original.
    """

    node: Node | None
    seconds: float
    stairs: Staircase | None
    tensors: tuple[str, ...]
    elements: int


LayerCost = Callable[[Sequence[tuple[Layer, Extents]]], Sequence[float]]


class LatencyTable:
    """What every kernel of a model costs on this machine, as a function of channel counts.

    The kernels that ONNX Runtime makes of the model are timed once, in place. Convolutions and
    matrix products are timed alone too, at full and at narrower widths; what they take in place
    beyond that, and everything else, goes by the elements read and written. Where a cut changes
    which layers take the blocked layout, tensors between the two are reordered.

    Attributes:
        graph: The analysis.
        runtime: What is peculiar to the runtime here.
        charges: Every kernel.
        seconds: Median time of the whole original.
        outside: Seconds of a run that are spent in no kernel.
        factor: By what the sum of all kernels is to be multiplied to give the rest.
    """

    def __init__(
        self,
        graph: DependencyGraph,
        feeds: Mapping[str, AnyArray],
        *,
        threads: int | None = 1,
        seconds: float = 2.0,
        runs: int = RUNS,
    ) -> None:
        """Measure.

        Args:
            graph: The analysis of the model.
            feeds: An array for every input; shapes should be the analysis's first stand-ins.
            threads: As in ``measure``.
            seconds: Time to spend on the whole model.
            runs: How often each kernel is timed.

        Raises:
            RuntimeUnavailable: The runtime cannot load or run the model.
        """
        self.graph = graph
        self._trace = graph.tracer.traces[0]
        model = graph.graph.model
        self.runtime = Peculiarities.measured(threads)

        def cost(layers: Sequence[tuple[Layer, Extents]]) -> Sequence[float]:
            spent = time_layers(layers, threads=threads, runs=runs)
            return [self.runtime.corrected(one) for one in spent]

        kernels = profile(model, feeds, runs=runs, threads=threads)
        self.charges = self._charges(kernels, cost)
        self.seconds = measure([model], feeds, seconds=seconds, threads=threads)[0].seconds
        self._blocks = Blocks(graph, self.runtime)
        self._calibrate()

    def _calibrate(self) -> None:
        """Make the prediction for the original what was measured."""
        self.outside, self.factor = 0.0, 1.0
        kernels = self.predict({})
        # A short model's kernels lose more to the profile than a chain of the same kernel does.
        if kernels > self.seconds:
            excess = min((kernels - self.seconds) / len(self.charges), self.runtime.profiling)
            self.charges = [
                replace(charge, seconds=max(charge.seconds - excess, 0.1 * charge.seconds))
                for charge in self.charges
            ]
            kernels = self.predict({})  # what is still too much, all of them took too long
        most = min(_OUTSIDE * self.seconds, _OUTSIDE_SECONDS)
        self.outside = min(max(self.seconds - kernels, 0.0), most)
        self.factor = (self.seconds - self.outside) / kernels

    def predict(self, keep: Mapping[int, IntArray]) -> float:
        """Seconds of the model once each group keeps the units ``keep[group.id]``."""
        shapes = _Shapes(self._trace, self.graph.dead(keep))
        kernels = sum(spent for _, spent in self._after(shapes))
        return self.outside + self.factor * (kernels + self._blocks.reordering(shapes))

    def layers(self, keep: Mapping[int, IntArray]) -> Mapping[str, tuple[float, float]]:
        """Seconds before and after a cut of each node that multiplies, by ``Node.key``."""
        shapes = _Shapes(self._trace, self.graph.dead(keep))
        return {
            charge.node.key: (charge.seconds, spent)
            for charge, spent in self._after(shapes)
            if charge.stairs is not None and charge.node is not None
        }

    def _after(self, shapes: _Shapes) -> Iterator[tuple[Charge, float]]:
        for charge in self.charges:
            alone = now = 0.0
            if charge.stairs is not None and charge.node is not None:
                layer = charge.stairs.layer
                alone = charge.stairs(layer.extents)
                now = charge.stairs(shapes.extents(charge.node) or layer.extents)
            before = charge.elements
            after = sum(prod(shapes.of(name) or ()) for name in charge.tensors)
            scale = after / before if before else 1.0
            # What a layer takes in place beyond what it takes alone is memory it waits for, or
            # all of it is slower there: the truth lies between, as measured.
            waiting = now + (charge.seconds - alone) * scale
            slower = charge.seconds * now / alone if alone else waiting
            yield charge, max((waiting + slower) / 2, now / 2)

    @cached_property
    def _half(self) -> _Shapes:
        """Shapes after some cut, to see what a cut can change."""
        keep = random_keep(self.graph, 0.5, np.random.default_rng(0))
        return _Shapes(self._trace, self.graph.dead(keep))

    def _charges(self, kernels: Sequence[Kernel], cost: LayerCost) -> list[Charge]:
        claimed: set[int] = set()
        found = [
            (kernel, source_of(kernel, self.graph.graph, claimed))
            for kernel in kernels
            if not kernel.op_type.startswith("Reorder")
        ]
        layers = {node.index: self._layer(node) for _, node in found if node is not None}
        stairs = fit(self._moving(layers), self.runtime.block, cost)
        charges = []
        makers: dict[str, Node | None] = {}
        for kernel, node in found:
            layer = layers[node.index] if node is not None else None
            makers.update(dict.fromkeys(kernel.outputs, node))
            # A kernel that nothing says the origin of is as large as what it reads.
            read = [made for name in kernel.inputs if (made := makers.get(name)) is not None]
            unnamed = dict.fromkeys(name for made in read for name in made.outputs if name)
            tensors = self._tensors(node) if node is not None else tuple(unnamed)
            own = layer is not None and any(word in kernel.op_type for word in _MULTIPLYING)
            charges.append(
                Charge(
                    node,
                    self.runtime.corrected(kernel.seconds),
                    stairs.get(layer) if layer is not None and own else None,
                    tensors,
                    sum(prod(self._trace.env.shape(name) or ()) for name in tensors),
                )
            )
        return charges

    def _moving(self, layers: Mapping[int, Layer | None]) -> Mapping[Layer, Sequence[bool]]:
        """The axes along which some cut changes each layer; layers without any are left out."""
        moving: dict[Layer, list[bool]] = {}
        for index, layer in layers.items():
            if layer is None:
                continue
            after = self._half.extents(self.graph.graph.nodes[index]) or layer.extents
            changed = [old != new for old, new in zip(layer.extents, after, strict=True)]
            known = moving.setdefault(layer, [False] * len(changed))
            moving[layer] = [a or b for a, b in zip(known, changed, strict=True)]
        return {layer: axes for layer, axes in moving.items() if any(axes)}

    def _tensors(self, node: Node) -> tuple[str, ...]:
        derived = self.graph.graph.derived
        weights = node.inputs[1:2] if node.op_type in (*CONVOLUTIONS, *PRODUCTS) else ()
        read = (name for name in node.inputs if name not in derived or name in weights)
        return tuple(dict.fromkeys(name for name in (*read, *node.outputs) if name))

    def _layer(self, node: Node) -> Layer | None:
        """The layer to time alone, None where it cannot be."""
        env, graph = self._trace.env, self.graph.graph
        if node.op_type not in (*CONVOLUTIONS, *PRODUCTS):
            return None
        if env.data_type(node.inputs[0]) != TensorProto.FLOAT:
            return None
        shapes = [env.shape(name) for name in node.inputs[:2]]
        weighted = node.inputs[1] in graph.derived
        if node.op_type in CONVOLUTIONS and not weighted:
            return None
        return layer_of(node, shapes, weighted=weighted)


class Blocks:
    """Which tensors are in the runtime's blocked layout, and what reordering them costs.

    Attributes:
        runtime: Block size and cost of reordering.
    """

    def __init__(self, graph: DependencyGraph, runtime: Peculiarities) -> None:
        self.runtime = runtime
        self._outputs = set(graph.graph.outputs)
        env, derived = graph.tracer.traces[0].env, graph.graph.derived
        self._steps: list[tuple[Node, Layer | None, tuple[str, ...]]] = []
        for node in graph.graph.nodes if runtime.block > 1 else ():
            if node.key in derived:
                continue
            read = tuple(name for name in node.inputs if name and name not in derived)
            layer = None
            if node.op_type == "Conv" and env.data_type(node.inputs[0]) == TensorProto.FLOAT:
                layer = layer_of(node, [env.shape(name) for name in node.inputs[:2]], weighted=True)
            self._steps.append((node, layer, read))

    def reordering(self, shapes: _Shapes) -> float:
        """Seconds that go into tensors that one kernel writes in one layout and another reads."""
        block = self.runtime.block
        blocked: set[str] = set()
        moved: set[tuple[str, bool]] = set()
        for node, layer, read in self._steps:
            if layer is not None:
                extents = shapes.extents(node) or layer.extents
                if not layer.blocked(extents, block):
                    moved.update((name, False) for name in read if name in blocked)
                    continue
                few = extents[0] == 1 and extents[1] < block
                moved.update((name, not few) for name in read if (name in blocked) == few)
                blocked.update(node.outputs)
            elif node.op_type in _EITHER and read and blocked.issuperset(read):
                blocked.update(node.outputs)
            else:
                moved.update((name, False) for name in read if name in blocked)
        moved.update((name, False) for name in self._outputs & blocked)
        return sum(_LEAST + self.runtime.reorder * prod(shapes.of(name) or ()) for name, _ in moved)


class _Shapes:
    """Shapes after a cut, each worked out once; tensors with the same labels share one."""

    def __init__(self, trace: Trace, dead: DeadSlots) -> None:
        self.trace = trace
        self.survivors = Survivors(trace, dead)
        self.known: dict[tuple[object, ...], Shape | None] = {}
        self.named: dict[str, Shape | None] = {}

    def of(self, name: str) -> Shape | None:
        if name not in self.named:
            # Fields of one content are one array.
            fields = tuple(map(id, self.trace.fields.get(name, ())))
            key = (self.trace.env.shape(name), fields, id(self.trace.elements.get(name)))
            if key not in self.known:
                self.known[key] = self.survivors.shape(name)
            self.named[name] = self.known[key]
        return self.named[name]

    def extents(self, node: Node) -> Extents | None:
        if node.op_type in CONVOLUTIONS and node.int("group", 1) > 1:
            return self._grouped(node)
        x, w = self.of(node.inputs[0]), self.of(node.inputs[1])
        return extents_of(node, x, w) if x and w else None

    def _grouped(self, node: Node) -> Extents | None:
        """Extents where filters are cut group by group, which their own shape does not show."""
        x, y = self.of(node.inputs[0]), self.of(node.outputs[0])
        if not x or not y:
            return None
        left = surviving_groups(node, "group", self.survivors)
        groups = left.get("group", node.int("group", 1))
        return groups, max(1, x[1] // groups), max(1, y[1] // groups)


def source_of(kernel: Kernel, graph: Graph, claimed: set[int]) -> Node | None:
    """The node of the prepared graph that a kernel of the optimised one stands for.

    A kernel that multiplies stands for the nearest node that does, at or before what it makes;
    each is claimed by one kernel.
    """
    own = _LAYOUT.sub("", kernel.name)
    # A fusion adds its own name behind a slash, "a/MatMulAddFusion", and renames what it makes.
    fused = (own[: match.start()] for match in reversed(list(re.finditer("/", own))))
    names = [*kernel.outputs, own, own.removesuffix(_NORM), *fused, *kernel.inputs]
    start = next((graph.producer[name] for name in names if name in graph.producer), None)
    if start is None or (start.op_type == "BatchNormalization" and own.endswith(_NORM)):
        return start
    if not any(word in kernel.op_type for word in _MULTIPLYING):
        return start
    seen, front = {start.index}, [start]
    while front:
        for node in front:
            if node.op_type in (*CONVOLUTIONS, *PRODUCTS) and node.index not in claimed:
                claimed.add(node.index)
                return node
        before = [
            graph.producer[name]
            for node in front
            if node.op_type not in (*CONVOLUTIONS, *PRODUCTS)
            for name in node.inputs
            if name in graph.producer and name not in graph.derived
        ]
        front = [node for node in before if node.index not in seen]
        seen.update(node.index for node in front)
    return start
