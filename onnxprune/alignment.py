"""How many channels suit the hardware: what each layer wants, and what each group is rounded to.

Tensor Cores take channels in and out of a layer in eights for floats, in sixteens where the weight
holds a 2:4 pattern or is to, and in TensorRT's int8 layouts in thirty-twos; a width between two
multiples is padded to the next and costs as much (NVIDIA, "Optimizing for Tensor Cores" in
TensorRT's best practices, and "Matrix Multiplication Background"). Their largest tile is 64 wide.

What a group of coupled channels is rounded to:

* the least common multiple of what every layer that makes or reads it wants: the strictest;
* counted in units, so that a head of 16 channels is aligned by itself;
* a grouped convolution wants the inputs of *each* group to be a multiple, where each has at least
  two of them;
* halved until a group can lose half of what it has and still be a multiple: one that is too narrow
  for that gets 4, 2 or 1;
* where nobody asked for a rounding and int8 comes behind a pattern, halved down to what floats want
  until a group can lose some of what was asked for: aligned to 32 but whole is no cut.

64 costs nothing where the width that is left is a multiple of 64 anyway: the group keeps not one
channel more than at the smaller step. That is what is reported as a step of 64. Rounding further up
for it would keep channels that were to go, so it is never done.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from math import gcd, lcm

import numpy as np
from onnx import TensorProto

from onnxprune.graph import Graph, Node
from onnxprune.groups import DependencyGraph
from onnxprune.moments import seen_weight
from onnxprune.types import AnyArray, ChannelGroup, LayerStats, WeightAxis, Width

FOR_FLOATS, FOR_PATTERN, FOR_INT8, FREE = 8, 16, 32, 64


class Coming(Enum):
    """What floats of a model are to become once its channels are cut."""

    pattern = FOR_PATTERN, "the 2:4 pattern"
    int8 = FOR_INT8, "int8"


_RUN, _MOST = 4, 2  # of the pattern: non-zeros in a run
_INT8: Mapping[int, str] = {TensorProto.INT8: "int8", TensorProto.UINT8: "uint8"}
_SPELLED: Mapping[int, str] = {TensorProto.FLOAT: "float32", TensorProto.DOUBLE: "float64"}
# Operators with a weight as second input, and the axis of that weight that is summed over.
_CONVOLUTIONS = {"Conv": 1, "FusedConv": 1, "ConvTranspose": 0}
_PRODUCTS = ("Gemm", "MatMul")


@dataclass(frozen=True, slots=True)
class Want:
    """What one layer wants its channels to be a multiple of.

    Attributes:
        node: The layer.
        weight: Constant that holds its weight.
        multiple: Of what its channels in and out should be a multiple.
        kind: What asks for it: the type of the weight, or its pattern.
        groups: Groups of a convolution, 1 elsewhere.
    """

    node: Node
    weight: str
    multiple: int
    kind: str
    groups: int


def steps(
    graph: DependencyGraph, coming: Coming | None = None, ratio: float = 0.0
) -> Mapping[int, int]:
    """What the units of each prunable group should stay a multiple of, by group id.

    Args:
        graph: The analysis.
        coming: What its weights are to become, None where they stay as they are.
        ratio: Share that is to go of each group. Where the thirty-twos of int8 would keep a group
            whole, its step is halved until some can go, down to what floats want. 0 halves none.
    """
    found = Alignment(graph, coming)
    wanted = {group.id: found.step(group) for group in graph.prunable}
    if not ratio or coming is not Coming.int8:
        return wanted
    floats = Alignment(graph)
    return {
        group.id: _eased(group.size, wanted[group.id], floats.step(group), ratio)
        for group in graph.prunable
    }


def _eased(size: int, step: int, least: int, ratio: float) -> int:
    """A step halved, to no less than ``least``, until a group can lose some of what is asked."""
    while step // 2 >= least and not loses(size, step, ratio):
        step //= 2
    return step


def loses(size: int, step: int, ratio: float) -> bool:
    """Whether a group of that many units loses any, where no more go than asked."""
    left = size - int(size * ratio)
    return -(-left // step) * step < size


@dataclass(frozen=True, slots=True)
class _Demand:
    """What the layers of one group want.

    Attributes:
        step: What its units should stay a multiple of.
        wants: The first layer of each multiple that is wanted.
    """

    step: int
    wants: tuple[Want, ...]


class Alignment:
    """What the layers of a model want, and what that makes of its groups.

    Attributes:
        graph: The analysis.
        wants: Every layer that multiplies by a constant weight, by label and operator.
    """

    def __init__(self, graph: DependencyGraph, coming: Coming | None = None) -> None:
        self.graph = graph
        found = tuple(_wants(graph, coming))
        self.wants = {(want.node.label, want.node.op_type): want for want in found}
        self._readers: dict[str, list[Want]] = {}
        for want in found:
            self._readers.setdefault(want.weight, []).append(want)
        self._demands: dict[int, _Demand] = {}
        self._axes: dict[str, list[tuple[ChannelGroup, WeightAxis]]] = {}
        self._made: dict[str, ChannelGroup] = {}
        for group in graph.groups:
            for axis in (*group.producers, *group.consumers, *group.parameters):
                self._axes.setdefault(axis.tensor, []).append((group, axis))
            for axis in group.producers:
                self._made.setdefault(axis.node, group)

    def step(self, group: ChannelGroup) -> int:
        """What the units of a group should stay a multiple of."""
        return self._demand(group).step

    def _demand(self, group: ChannelGroup) -> _Demand:
        # Once for each group: a residual stream has as many members as the model has layers.
        if group.id not in self._demands:
            step, firsts = 1, dict[int, Want]()
            for units, want in self._asked(group):
                step = lcm(step, units)
                if want is not None:
                    firsts.setdefault(want.multiple, want)
            while step > 1 and group.size < 2 * step:
                step //= 2
            self._demands[group.id] = _Demand(step, tuple(firsts.values()))
        return self._demands[group.id]

    def _asked(self, group: ChannelGroup) -> Iterator[tuple[int, Want | None]]:
        """How many units each layer wants a multiple of, and the layer."""
        some = False
        for axis in (*group.producers, *group.consumers, *group.parameters):
            each = max(1, axis.index.size // group.size)
            for want in self._readers.get(axis.tensor, ()):
                some = True
                multiple = want.multiple
                of_all = multiple * want.groups
                if axis.role == "consumer" and axis.index.size >= 2 * of_all:
                    multiple = of_all
                yield multiple // gcd(multiple, each), want
        if not some:
            each = max(1, group.width // group.size)
            yield FOR_FLOATS // gcd(FOR_FLOATS, each), None

    def said(self, group: ChannelGroup, kept: int) -> str:
        """Whether what a group keeps suits the hardware, in words.

        Args:
            group: The group.
            kept: Width that is left of it.
        """
        wanted = max((want.multiple for want in self._demand(group).wants), default=FOR_FLOATS)
        if kept % wanted == 0:
            widest = next(step for step in (FREE, FOR_INT8, FOR_PATTERN, wanted) if not kept % step)
            return f"aligned to {widest}"
        reason = f"keeps {kept}, --round-to {wanted} would align it"
        if group.frozen is not None:
            reason = f"frozen at {kept}"
        elif self.step(group) * max(1, group.width // group.size) % wanted:
            reason = f"only {_counted(group, group.width)} to begin with"
        return f"not aligned to {wanted}: {reason}"

    # -- the two sides of a layer --------------------------------------------------------------

    def widths(self, before: LayerStats, after: LayerStats | None) -> tuple[Width, Width] | None:
        """Channels into and out of a layer; None where its weight is no constant.

        Args:
            before: The layer in the original.
            after: The same after a cut, None where there was none.
        """
        want = self.wants.get((before.node, before.op_type))
        if want is None or not before.inputs or not before.outputs:
            return None
        read = [before.inputs // before.groups]
        made = [before.outputs]
        if after is not None:
            read.append(after.inputs // after.groups)
            made.append(after.outputs)
        return self._side(want, read, reads=True), self._side(want, made, reads=False)

    def _side(self, want: Want, widths: list[int], *, reads: bool) -> Width:
        groups = self._groups(want, reads=reads)
        left = widths[-1]
        step = self._step_of_side(want, groups, reads=reads)
        aligned = left % want.multiple == 0
        if aligned and left % FREE == 0:
            step, why = FREE, f"{FREE} costs nothing"
        elif aligned:
            why = self._why(want, groups, step)
        else:
            why = self._why_not(want, groups, widths, step, reads=reads)
        return Width(
            before=widths[0],
            after=left if len(widths) > 1 else None,
            wants=want.multiple,
            step=step,
            aligned=aligned,
            why=why,
        )

    def _groups(self, want: Want, *, reads: bool) -> list[tuple[ChannelGroup, WeightAxis]]:
        """Groups that lie along one side, and where."""
        roles = {"consumer"} if reads else {"producer"}
        if not reads and want.groups > 1:
            roles.add("parameter")  # the filters of a depthwise convolution
        return [(g, axis) for g, axis in self._axes.get(want.weight, ()) if axis.role in roles]

    def _step_of_side(
        self, want: Want, groups: list[tuple[ChannelGroup, WeightAxis]], *, reads: bool
    ) -> int:
        """What the width of a side is rounded to, in channels; what is wanted where it is fixed."""
        free = [(group, axis) for group, axis in groups if group.frozen is None]
        step = gcd(*(self.step(g) * max(1, axis.index.size // g.size) for g, axis in free))
        if reads and step:
            step //= gcd(step, want.groups)
        return step or want.multiple

    def _why(self, want: Want, groups: list[tuple[ChannelGroup, WeightAxis]], step: int) -> str:
        own = f"{want.multiple} for {want.kind}"
        if step <= want.multiple:
            return own
        for group, axis in groups:
            if axis.index.size > group.size:
                return f"{own}; whole {group.unit}s go"
            for other in self._demand(group).wants:
                if other.multiple > want.multiple:
                    return f"{other.multiple} for {other.kind} of '{other.node.label}', tied to it"
        return own

    def _why_not(
        self,
        want: Want,
        groups: list[tuple[ChannelGroup, WeightAxis]],
        widths: list[int],
        step: int,
        *,
        reads: bool,
    ) -> str:
        before, left = widths[0], widths[-1]
        each = f" in each of {want.groups} groups" if reads and want.groups > 1 else ""
        if each and before == 1:
            return "each filter reads 1 channel"
        held = {group.id: (axis.index.size, group.frozen) for group, axis in groups if group.frozen}
        if held:
            count = sum(size for size, _ in held.values()) // (want.groups if reads else 1)
            many = f"{count} of {left} are frozen" if count < left else f"frozen at {left}"
            return f"{many}{each}: {next(iter(held.values()))[1]}"
        if not groups:
            return self._origin(want.node, left) if reads else f"makes {left}, and all stay"
        if step % want.multiple:
            return _too_narrow(before, each, groups)
        whole = f"{before}{each} to begin with" if left == before else f"{left}{each} are left"
        return f"{whole}: a cut by --round-to auto would align them"

    def _origin(self, layer: Node, width: int) -> str:
        """Why the channels that a layer reads are in no group: where they come from."""
        graph = self.graph.graph
        pending, seen = [layer.inputs[0]], set[str]()
        while pending:
            name = pending.pop(0)
            if name in graph.inputs:
                channels = "channel" if width == 1 else "channels"
                return f"{width} {channels} of input '{name}'"
            maker = graph.producer.get(name)
            if maker is None or name in seen:
                continue
            seen.add(name)
            group = self._made.get(maker.label)
            if group is not None:
                return f"frozen at {width}: {group.frozen or 'they lie along another axis'}"
            pending += [n for n in maker.inputs if n and n not in graph.derived]
        return f"fixed at {width}"


def _too_narrow(width: int, each: str, groups: list[tuple[ChannelGroup, WeightAxis]]) -> str:
    """Why a side is rounded to less than its layer wants."""
    apart = {group.id: (group, axis.index.size) for group, axis in groups}
    if len(apart) > 1:
        narrowest = min(apart.values(), key=lambda one: one[1])
        return (
            f"{len(apart)} channel groups lie along it and are rounded apart, the narrowest of "
            f"{_counted(*narrowest)}"
        )
    for group, size in apart.values():
        if not each:
            return f"only {_counted(group, size)} to begin with"
    return f"only {width}{each} to begin with"


def _counted(group: ChannelGroup, width: int) -> str:
    """How wide a group is on an axis; where whole heads or the like go, how many of what width."""
    each = width // max(1, group.size)
    if group.unit == "channel" or each < 2:
        return str(width)
    return f"{group.size} {group.unit}s of {each}"


# -- what layers want ------------------------------------------------------------------------------


def _wants(found: DependencyGraph, coming: Coming | None) -> Iterator[Want]:
    graph, env = found.graph, found.envs[0]
    for node in graph.nodes:
        axis = _summed_over(node)
        if axis is None or node.key in graph.derived or node.inputs[0] in graph.derived:
            continue
        leaf = _leaf(graph, node.inputs[1])
        if leaf is None:
            continue
        kind = graph.constants[leaf].weight.data_type
        seen = env.data_type(node.inputs[1])
        spelled = _SPELLED.get(seen) or TensorProto.DataType.Name(seen).lower()
        multiple = FOR_FLOATS
        if kind in _INT8:
            multiple, spelled = FOR_INT8, _INT8[kind]
        elif coming is not None:
            multiple, spelled = coming.value
        else:
            weight = seen_weight(graph, node.inputs[1])
            if weight is not None and holds_pattern(weight, axis):
                multiple, spelled = Coming.pattern.value
        groups = node.int("group", 1) if node.op_type in _CONVOLUTIONS else 1
        yield Want(node, leaf, multiple, spelled, groups)


def _summed_over(node: Node) -> int | None:
    """Axis of a layer's weight, as the node sees it, that is summed over; None for other nodes."""
    if len(node.inputs) < 2:
        return None
    if node.op_type in _PRODUCTS:
        return -1 if node.op_type == "Gemm" and node.int("transB", 0) else -2
    return _CONVOLUTIONS.get(node.op_type)


def _leaf(graph: Graph, name: str) -> str | None:
    """The constant behind a weight, None where it is computed at run time."""
    while name not in graph.constants:
        if name not in graph.derived or name not in graph.producer:
            return None
        name = graph.producer[name].inputs[0]
    return name


def holds_pattern(weight: AnyArray, axis: int) -> bool:
    """Whether a weight is 2:4 sparse: at most two of every four neighbours are not zero.

    Args:
        weight: As its layer sees it.
        axis: The axis that is summed over; less than four there are no pattern.
    """
    if weight.ndim < 2 or weight.shape[axis] < _RUN:
        return False
    runs = np.moveaxis(weight, axis, 0)
    # Of nearly every weight the first run tells already.
    return _sparse(runs[:_RUN]) and _sparse(runs) and bool(np.any(runs))


def _sparse(weight: AnyArray) -> bool:
    """Whether each run along the first axis, and what is left of one at the end, is sparse."""
    filled = (weight != 0).view(np.uint8)
    whole = len(filled) // _RUN * _RUN
    runs = [filled[at:whole:_RUN] for at in range(_RUN)]
    counts = runs[0] + runs[1] + runs[2] + runs[3]
    rest = filled[whole:].sum(axis=0)
    return bool((counts <= _MOST).all() and (rest <= _MOST).all())
