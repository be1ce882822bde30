"""What flows through a model on calibration data: a stream of its inner tensors, and statistics.

Forward passes are ONNX Runtime's. Nothing is kept but the statistics: memory is one batch of the
tensors asked for, and the matrices being summed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx

from onnxprune.data import Data
from onnxprune.graph import Graph
from onnxprune.layers import Layer, columns, groups_of, kernel_size
from onnxprune.model import Model
from onnxprune.runtime import session
from onnxprune.shapes import Environment
from onnxprune.types import AnyArray, Float64Array, Shape

_MOST_GRAM_BYTES = 1 << 30
_ROWS_PER_INPUT = 6  # rows of X for each input of the product, over all of the data
_FEWEST_ROWS = 20_000


def stream(model: Model, names: Sequence[str], data: Data) -> Iterator[Mapping[str, AnyArray]]:
    """Values of inner tensors (or outputs), batch by batch.

    Args:
        model: What to run; tensors that ONNX Runtime would fuse away are kept.
        names: Tensors to look at; graph inputs are allowed.
        data: What to run it on.

    Raises:
        VerificationError: ONNX Runtime cannot run the model.
    """
    watched = with_outputs(model, names)
    loaded = session(watched) if watched.proto.graph.output else None
    for batch in data.batches:
        made = loaded.run(batch) if loaded is not None else {}
        yield {name: made[name] if name in made else batch[name] for name in names}


def with_outputs(model: Model, names: Sequence[str]) -> Model:
    """The model with these inner tensors as its only outputs."""
    made = {name for node in model.proto.graph.node for name in node.output}
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    del proto.graph.output[:]
    for name in dict.fromkeys(names):
        if name in made:
            proto.graph.output.append(onnx.ValueInfoProto(name=name))
    return replace(model, proto=proto)


def energies(
    graph: Graph, layers: Sequence[Layer], data: Data
) -> Mapping[tuple[str, int], Float64Array]:
    """Mean square of each channel that layers read.

    Returns:
        Shape (channels,) by tensor and axis.
    """
    wanted = {(layer.data, layer.axis) for layer in layers}
    names = sorted({name for name, _ in wanted})
    total: dict[tuple[str, int], Float64Array] = {}
    count: dict[tuple[str, int], int] = {}
    for values in stream(graph.model, names, data):
        for key in wanted:
            array = np.asarray(values[key[0]], np.float32)
            axis = key[1] % array.ndim
            rest = tuple(a for a in range(array.ndim) if a != axis)
            square: Float64Array = np.asarray(np.sum(np.square(array), axis=rest, dtype=np.float64))
            total[key] = total[key] + square if key in total else square
            count[key] = count.get(key, 0) + array.size // array.shape[axis]
    return {key: total[key] / count[key] for key in total}


@dataclass
class Gram:
    """Second moments of the inputs of a layer's product.

    Attributes:
        matrix: XᵀX, shape (groups, inputs, inputs), float64; where that would be too large, of
            input channels, with each kernel position a row of its own.
        rows: Rows of X that were summed.
    """

    matrix: Float64Array
    rows: int = 0

    def add(self, x: AnyArray) -> None:
        """Add the rows of X, shape (groups, rows, inputs)."""
        self.matrix += np.matmul(x.transpose(0, 2, 1), x)
        self.rows += x.shape[1]


def grams(
    graph: Graph, env: Environment, layers: Sequence[Layer], data: Data, seed: int = 0
) -> Iterator[tuple[Layer, Gram]]:
    """Gram matrix of each layer's inputs, as many in one pass over the data as memory allows."""
    pending: list[tuple[Layer, Shape, int]] = []
    for layer in layers:
        weight = env.shape(layer.seen) or ()
        size, groups = inputs_of(layer, weight), groups_of(layer, weight)
        if 8 * groups * size * size > _MOST_GRAM_BYTES:
            size //= kernel_size(layer, weight)
        held = sum(8 * g * n * n for g, n in _sizes(pending))
        if pending and held + 8 * groups * size * size > _MOST_GRAM_BYTES:
            yield from _pass(graph, pending, data, seed)
            pending = []
        pending.append((layer, weight, size))
    if pending:
        yield from _pass(graph, pending, data, seed)


def _sizes(pending: Sequence[tuple[Layer, Shape, int]]) -> Iterator[tuple[int, int]]:
    for layer, weight, size in pending:
        yield groups_of(layer, weight), size


def inputs_of(layer: Layer, weight: Shape) -> int:
    """Inputs of the product of one group of a layer."""
    if layer.kind == "conv":
        return int(np.prod(weight[1:]))
    if layer.kind == "deconv":
        return weight[0] // layer.groups * int(np.prod(weight[2:]))
    if layer.kind == "scale":
        return 1
    if layer.kind == "left" or (layer.kind == "gemm" and layer.node.int("transB", 0)):
        return weight[-1]
    return weight[-2]


def sampled_positions(inputs: int, samples: int) -> int:
    """Output positions to look at in each sample, so that the whole gives enough rows."""
    return max(4, -(-max(_FEWEST_ROWS, _ROWS_PER_INPUT * inputs) // max(1, samples)))


def _pass(
    graph: Graph,
    pending: Sequence[tuple[Layer, Shape, int]],
    data: Data,
    seed: int,
) -> Iterator[tuple[Layer, Gram]]:
    found = [
        Gram(np.zeros((groups_of(layer, weight), size, size))) for layer, weight, size in pending
    ]
    names = sorted({layer.data for layer, _, _ in pending})
    rng = np.random.default_rng(seed)
    for values in stream(graph.model, names, data):
        for gram, (layer, weight, size) in zip(found, pending, strict=True):
            most = sampled_positions(size, data.samples)
            x = columns(layer, values[layer.data], weight, most, rng)[0]
            if x.shape[2] > size:  # (groups, rows, channels, kernel positions)
                x = x.reshape(*x.shape[:2], size, -1).swapaxes(2, 3).reshape(len(x), -1, size)
            gram.add(x)
    for gram, (layer, _, _) in zip(found, pending, strict=True):
        yield layer, gram
