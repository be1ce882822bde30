"""How many channels suit the hardware: what each group should be a multiple of, and what it is.

Tensor Cores take fp16 and bf16 in eights, int8 in sixteens and TensorRT's int8 layouts in
thirty-twos (NVIDIA, "Matrix Multiplication Background", and TensorRT's best practices).
"""

from __future__ import annotations

from collections.abc import Mapping

from onnx import TensorProto

from onnxprune.groups import DependencyGraph
from onnxprune.types import ChannelGroup

FOR_FLOATS, FOR_INT8 = 8, 32
_INT8 = (TensorProto.INT8, TensorProto.UINT8)


def steps(graph: DependencyGraph) -> Mapping[int, int]:
    """What the width of each prunable group should stay a multiple of, by group id.

    8 for floats and 32 for quantized weights; half of that, and so on, for groups that are too
    narrow to keep two steps or are no multiple to begin with.
    """
    return {group.id: _step(graph, group) for group in graph.prunable}


def _step(graph: DependencyGraph, group: ChannelGroup) -> int:
    constants = graph.graph.constants
    weights = [constants[axis.tensor].weight.data_type for axis in group.producers]
    step = FOR_INT8 if weights and all(kind in _INT8 for kind in weights) else FOR_FLOATS
    while step > 1 and (group.size < 2 * step or group.size % step):
        step //= 2
    return step


def alignment(group: ChannelGroup, kept: int, graph: DependencyGraph) -> str:
    """Whether what a group keeps suits Tensor Cores, in words."""
    whole = group.frozen is not None
    for step in (64, 32, 16, 8):
        if kept % step == 0:
            return f"aligned to {step}"
    if whole:
        return f"not aligned to {FOR_FLOATS}: frozen at {kept}"
    wanted = _step(graph, group)
    if wanted < FOR_FLOATS:
        return f"not aligned to {FOR_FLOATS}: only {group.size} to begin with"
    return f"not aligned to {FOR_FLOATS}: keeps {kept}, --round-to {FOR_FLOATS} would align it"
