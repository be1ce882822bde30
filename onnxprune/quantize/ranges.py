"""How large activations become on data: measured in the graph, one number for each tensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np
import onnx
from onnx import helper

from onnxprune.data import Data
from onnxprune.model import Model
from onnxprune.runtime import session


def peaks(model: Model, names: Iterable[str], data: Data) -> Mapping[str, float]:
    """Largest magnitude of float tensors over all of ``data``; NaN where one is not a number.

    The graph itself reduces each tensor, so that no activation leaves the runtime.

    Raises:
        VerificationError: ONNX Runtime cannot run the model.
    """
    wanted = list(dict.fromkeys(names))
    if not wanted:
        return {}
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    del proto.graph.output[:]
    for at, name in enumerate(wanted):
        magnitude, peak = f"__magnitude_{at}", f"__peak_{at}"
        proto.graph.node.append(helper.make_node("Abs", [name], [magnitude]))
        proto.graph.node.append(helper.make_node("ReduceMax", [magnitude], [peak], keepdims=0))
        proto.graph.output.append(onnx.ValueInfoProto(name=peak))
    loaded = session(replace(model, proto=proto))
    found = dict.fromkeys(wanted, 0.0)
    for batch in data.batches:
        made = loaded.run(batch)
        for at, name in enumerate(wanted):
            value = made[f"__peak_{at}"]
            found[name] = float(np.maximum(found[name], value)) if value.size else found[name]
    return found
