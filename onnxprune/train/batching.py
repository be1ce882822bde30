"""How many samples a model takes at a time, and whether it would take more."""

from __future__ import annotations

import numpy as np
import onnx

from onnxprune.dims import size_of
from onnxprune.model import Model
from onnxprune.runtime import RuntimeUnavailable, session
from onnxprune.train.protocol import Arrays

_TOLERANCE = 1e-4  # by an output's scale


def fixed_batch(model: onnx.ModelProto) -> int | None:
    """Samples that the inputs are fixed at, None where they are open."""
    given = {tensor.name for tensor in model.graph.initializer}
    for value in model.graph.input:
        dims = value.type.tensor_type.shape.dim
        if value.name not in given and dims:
            return size_of(dims[0])
    return None


def with_sizes(model: onnx.ModelProto, batch: Arrays) -> onnx.ModelProto:
    """A copy whose inputs have the sizes of the data, but for the number of samples.

    What the file leaves open (height, width, length) is one size in a set of samples. Trainers
    rely on it: with open sizes onnxruntime-training 1.19.2 gets broadcasts wrong, or crashes.
    """
    made = onnx.ModelProto()
    made.CopyFrom(model)
    for value in made.graph.input:
        dims = value.type.tensor_type.shape.dim
        array = batch.get(value.name)
        if array is None or len(dims) != array.ndim:
            continue
        for axis, dim in enumerate(dims):
            if size_of(dim) is None:
                dim.Clear()
                if axis:
                    dim.dim_value = array.shape[axis]
                else:
                    dim.dim_param = "batch"
    for value in made.graph.output:
        for dim in value.type.tensor_type.shape.dim:
            if size_of(dim) is None:
                dim.Clear()
    return made


def with_open_batch(model: onnx.ModelProto, batch: Arrays) -> onnx.ModelProto | None:
    """A copy that takes any number of samples, None where that would be another function.

    Args:
        model: Fixed at the size of ``batch``.
        batch: Inputs, to try it on.
    """
    size = fixed_batch(model)
    made = onnx.ModelProto()
    made.CopyFrom(model)
    given = {tensor.name for tensor in model.graph.initializer}
    for value in (*made.graph.input, *made.graph.output):
        dims = value.type.tensor_type.shape.dim
        if value.name not in given and dims and size_of(dims[0]) == size:
            dims[0].dim_param = "batch"
    double = {name: np.concatenate([array, array[::-1]]) for name, array in batch.items()}
    try:
        one = session(Model(model)).run(batch)
        two = session(Model(made)).run(double)
    except RuntimeUnavailable:
        return None
    for name, value in one.items():
        wide = two[name]
        if value.ndim == 0 or wide.shape != (2 * len(value), *value.shape[1:]):
            return None
        if value.dtype.kind != "f":
            continue
        scale = float(np.abs(value).max(initial=0.0)) or 1.0
        if not np.allclose(wide[: len(value)], value, rtol=0, atol=_TOLERANCE * scale):
            return None
    return made
