"""Splits into a sequence of which single elements are taken, as plain slices.

Raw exports spell ``torch.split`` as SplitToSequence and SequenceAt. A sequence hides the channels
it holds; a Slice of the same tensor shows them, whatever its size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import accumulate

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnxprune.graph import captured_names
from onnxprune.model import Model
from onnxprune.types import IntArray

_UNTIL_THE_END = np.iinfo(np.int64).max


def slice_sequences(model: Model) -> Model:
    """The model with such splits as slices; the model itself if it has none."""
    nodes = model.proto.graph.node
    if not any(node.op_type == "SplitToSequence" for node in nodes):
        return model
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in nodes:
        for name in (*node.input, *captured_names(node)):
            readers.setdefault(name, []).append(node)
    outputs = {value.name for value in model.proto.graph.output}
    integers = _integers(model)
    starts: dict[str, tuple[onnx.NodeProto, int, int]] = {}  # SequenceAt's output: slice of whom
    dropped: set[str] = set()
    for node in nodes:
        if node.op_type != "SplitToSequence" or node.output[0] in outputs:
            continue
        found = _slices(node, readers.get(node.output[0], []), integers)
        if found:
            dropped.add(node.output[0])
            starts |= {name: (node, *span) for name, span in found.items()}
    return _rewritten(model, starts, dropped) if starts else model


def _integers(model: Model) -> Mapping[str, IntArray]:
    """Values of the small integer constants."""
    return {
        name: np.asarray(weight.read(), np.int64)
        for name, weight in model.weights().items()
        if weight.data_type in (onnx.TensorProto.INT64, onnx.TensorProto.INT32)
        and len(weight.shape) <= 1
    }


def _slices(
    split: onnx.NodeProto, readers: list[onnx.NodeProto], integers: Mapping[str, IntArray]
) -> dict[str, tuple[int, int]]:
    """Start and end of each element that is taken; {} where something else reads the sequence."""
    sizes = integers.get(split.input[1]) if len(split.input) > 1 else None
    found: dict[str, tuple[int, int]] = {}
    for reader in readers:
        index = integers.get(reader.input[1]) if reader.op_type == "SequenceAt" else None
        if sizes is None or index is None:
            return {}
        number = int(index.reshape(-1)[0])
        if sizes.ndim == 0:
            if number < 0:
                return {}  # counted from the end, which nobody knows here
            found[reader.output[0]] = (number * int(sizes), (number + 1) * int(sizes))
            continue
        ends = list(accumulate(sizes.tolist()))
        number %= len(ends)
        last = number == len(ends) - 1
        end = _UNTIL_THE_END if last else ends[number]
        found[reader.output[0]] = (ends[number] - int(sizes[number]), end)
    return found


def _rewritten(
    model: Model, starts: Mapping[str, tuple[onnx.NodeProto, int, int]], dropped: set[str]
) -> Model:
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    graph = proto.graph
    del graph.node[:]
    taken = {name for node in model.proto.graph.node for name in (*node.input, *node.output)}
    taken |= set(model.weights()) | {value.name for value in graph.input}
    for node in model.proto.graph.node:
        if node.output and node.output[0] in dropped:
            continue
        if not node.output or node.output[0] not in starts:
            graph.node.append(node)
            continue
        split, start, end = starts[node.output[0]]
        axis = next((a.i for a in split.attribute if a.name == "axis"), 0)
        values = {"starts": start, "ends": end, "axes": axis}
        names = [_fresh(f"{node.output[0]}_{what}", taken) for what in values]
        for name, value in zip(names, values.values(), strict=True):
            graph.node.append(
                helper.make_node(
                    "Constant", [], [name], value=numpy_helper.from_array(np.asarray([value]))
                )
            )
        graph.node.append(
            helper.make_node("Slice", [split.input[0], *names], [node.output[0]], name=node.name)
        )
    return replace(model, proto=proto)


def _fresh(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    taken.add(name)
    return name
