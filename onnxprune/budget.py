"""What a model would cost after a cut, without making it: for searches that try hundreds of plans.

Shapes after the cut follow from the labels alone, so the count is that of the written file but for
copies that end equal and are merged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from onnxprune.cost import parameters_by_name, stored_bytes
from onnxprune.groups import DependencyGraph, half_keep
from onnxprune.messages import stored_bytes as bytes_of
from onnxprune.ops.registry import macs_of
from onnxprune.runs import movement_view
from onnxprune.slices import Slice, shown_shapes, slices
from onnxprune.survivors import Survivors
from onnxprune.types import IntArray, Shape


@dataclass(frozen=True, slots=True)
class Bill:
    """Parameters, multiply-accumulates and bytes of a model."""

    params: int
    macs: int
    bytes: int


@dataclass
class _CutShapes:
    """Shapes of tensors after a cut, where an ``Environment`` is asked for."""

    survivors: Survivors
    shown: Mapping[str, Shape]
    values: Mapping[str, object]

    def shape(self, name: str) -> Shape | None:
        return self.shown[name] if name in self.shown else self.survivors.shape(name)


class Budget:
    """Costs of any cut of one analysed model."""

    def __init__(self, graph: DependencyGraph) -> None:
        self.graph = graph
        self._env = graph.envs[0]
        self._multiplying = [
            node
            for node in graph.graph.nodes
            if macs_of(node) is not None and node.key not in graph.graph.derived
        ]
        self._parameters = parameters_by_name(graph.graph.model)

    @cached_property
    def whole(self) -> Bill:
        """Cost of the model as it is."""
        return self.of({})

    def of(self, keep: Mapping[int, IntArray]) -> Bill:
        """Cost when each group keeps ``keep[group.id]``; groups left out stay whole."""
        survivors = Survivors(self.graph.tracer.traces[0], self.graph.dead(keep))
        found = slices(self.graph, survivors)
        shown = shown_shapes(self.graph.graph, found)
        shapes = _CutShapes(survivors, shown, self._env.values)
        macs = 0
        for node in self._multiplying:
            view = movement_view(node, shapes)  # type: ignore[arg-type]  # asks for shapes only
            count = macs_of(node)
            macs += count(view) if view is not None and count is not None else 0
        params, stored = self._stored(found)
        return Bill(params, macs, stored)

    def _stored(self, found: Mapping[str, Slice]) -> tuple[int, int]:
        """Parameters and bytes of the constants; copies that end equal are one."""
        params = sum(self._parameters.values())
        stored = self._stored_whole
        ends: dict[str, set[bytes]] = {}
        for name, constant in self.graph.graph.constants.items():
            part = found.get(name)
            if part is not None or constant.origin != name:
                ends.setdefault(constant.origin, set())
        for origin, keys in ends.items():
            weight = self.graph.graph.constants[origin].weight
            counts = origin in self._parameters
            params -= weight.size if counts else 0
            stored -= weight.nbytes
            for name in self._copies[origin]:
                part = found.get(name)
                key = b"" if part is None else part.key
                if key not in keys:
                    keys.add(key)
                    shape = weight.shape if part is None else part.shape
                    stored += bytes_of(weight.data_type, shape)
                    params += int(np.prod(shape, dtype=np.int64)) if counts else 0
        return params, stored

    @cached_property
    def _stored_whole(self) -> int:
        return stored_bytes(self.graph.graph.model)

    @cached_property
    def _copies(self) -> Mapping[str, list[str]]:
        copies: dict[str, list[str]] = {}
        for name, constant in self.graph.graph.constants.items():
            copies.setdefault(constant.origin, []).append(name)
        return copies

    @cached_property
    def per_unit(self) -> Mapping[int, Bill]:
        """What one unit of each prunable group saves, by id; the mean of groups cut together."""
        sizes = {group.id: group.size for group in self.graph.prunable}
        found = {}
        for part in self.graph.together:
            keep = half_keep(self.graph, part)
            gone = max(1, sum(sizes[group] - units.size for group, units in keep.items()))
            bill = self.of(keep)
            saved = Bill(
                max(0, self.whole.params - bill.params) // gone,
                max(0, self.whole.macs - bill.macs) // gone,
                max(0, self.whole.bytes - bill.bytes) // gone,
            )
            found.update(dict.fromkeys(part, saved))
        return found


def shares(bill: Bill, whole: Bill) -> Mapping[str, float]:
    """What is left of each, by the names that targets have."""
    return {
        name: getattr(bill, name) / max(getattr(whole, name), 1)
        for name in ("params", "macs", "bytes")
    }
