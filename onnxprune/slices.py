"""What a cut leaves of each constant: its new shape, and how to get its values."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnxprune import fields
from onnxprune.graph import Graph
from onnxprune.groups import DependencyGraph
from onnxprune.record import dead_births
from onnxprune.slots import Birth
from onnxprune.survivors import Survivors
from onnxprune.trace import PRESERVING, Trace
from onnxprune.types import AnyArray, BoolArray, Shape


@dataclass(frozen=True, slots=True)
class Slice:
    """The part of a constant that stays.

    Attributes:
        shape: Its new shape.
        view: Dimensions under which the dead elements are known.
        dead: What goes.
        key: Equal for two copies of one constant that end equal.
    """

    shape: Shape
    view: Shape
    dead: Sequence[fields.Dead]
    key: bytes

    def take(self, array: AnyArray) -> AnyArray:
        """The values that stay."""
        return fields.compact(array.reshape(self.view), *self.dead).reshape(self.shape)


def slice_of(trace: Trace, shape: Shape, births: Sequence[tuple[Birth, BoolArray]]) -> Slice:
    """What stays of a constant of a shape, given what goes by each of its births."""
    view = max((birth.view for birth, _ in births), key=len)
    dead = [_in_view(trace, birth, mask, view) for birth, mask in births]
    left = fields.survivors_shape(view, dead)
    extra = len(view) - len(shape)
    new_shape = (int(np.prod(left[: extra + 1])), *left[extra + 1 :]) if shape else ()
    digest = hashlib.sha256()
    for birth, mask in births:
        digest.update(repr((birth.view, birth.axes)).encode() + np.packbits(mask).tobytes())
    return Slice(new_shape, view, dead, digest.digest())


def slices(dependency: DependencyGraph, survivors: Survivors) -> Mapping[str, Slice]:
    """The slice of every constant of which something goes."""
    constants = dependency.graph.constants
    return {
        name: slice_of(survivors.trace, constants[name].weight.shape, births)
        for name, births in dead_births(dependency, survivors.dead)
    }


def shown_shapes(graph: Graph, found: Mapping[str, Slice]) -> dict[str, Shape]:
    """New shapes of constants, and of the tensors that show them element by element."""
    shown = {name: part.shape for name, part in found.items()}
    for node in graph.nodes:
        if node.op_type in PRESERVING and node.inputs[0] in shown:
            shown[node.outputs[0]] = shown[node.inputs[0]]
    return shown


def _in_view(trace: Trace, birth: Birth, mask: BoolArray, view: Shape) -> fields.Dead:
    """What dies by one birth, under a view that may split the constant's first axis."""
    cut = trace.cut_axis(birth.field)
    if len(birth.view) == len(view):
        return fields.Dead(mask, cut)
    shape = (1, 1) if mask.shape[0] == 1 else view[:2]
    split = mask.reshape(*shape, *mask.shape[1:])
    # Rows of the split axis shrink on their own, by equal counts, unless whole groups go.
    whole = bool(split.all(axis=1).any())
    return fields.Dead(split, 1 if mask.shape[0] > 1 and cut is None and not whole else None)
