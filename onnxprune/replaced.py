"""The same model with other values in some of its tensors: nothing else is touched."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import onnx

from onnxprune import messages
from onnxprune.messages import without
from onnxprune.model import Model, Weight
from onnxprune.skeleton import LARGE
from onnxprune.types import AnyArray

_PLACES = ("raw_data", "external_data", "data_location")
_TYPED = ("float_data", "double_data", "int32_data")  # of what can be a weight
_T = onnx.TensorProto
# In `int32_data` numbers stand as they are, these as their bits.
_AS_BITS = {_T.FLOAT16, _T.BFLOAT16}
_AS_NUMBERS = {_T.FLOAT, _T.DOUBLE, _T.INT8, _T.UINT8, _T.INT16, _T.UINT16, _T.INT32}

Compute = Callable[[], AnyArray]


def replaced(model: Model, values: Mapping[int, Compute]) -> Model:
    """A model with new values in some tensors, large ones computed when they are read.

    Every tensor is stored as it was: in raw bytes, number by number, or in a file beside.

    Args:
        model: The original, which stays as it is.
        values: New values by the ``id`` of the tensor's message in ``model.proto``; of the same
            shape and element type.
    """
    return _Replacement(model, values).build()


@dataclass
class _Replacement:
    model: Model
    values: Mapping[int, Compute]
    deferred: dict[str, Weight] = field(default_factory=dict)
    done: set[int] = field(default_factory=set)

    def build(self) -> Model:
        source = self.model.proto
        self.deferred.update(self.model.deferred)
        proto = without(source, ("graph",))
        proto.graph.MergeFrom(without(source.graph, ("node", "initializer")))
        for tensor in source.graph.initializer:
            proto.graph.initializer.append(self._tensor(tensor, tensor.name))
        for node in source.graph.node:
            if messages.is_constant(node) and any(a.HasField("t") for a in node.attribute):
                self._constant(node, proto.graph.node.add())
            else:
                proto.graph.node.append(node)
        # What is left lies in bodies and functions, which are copies by now.
        pairs = zip(messages.tensors(source), messages.tensors(proto), strict=True)
        for (old, _), (new, _) in pairs if self.values.keys() - self.done else ():
            compute = self.values.get(id(old))
            if compute is not None and id(old) not in self.done:
                new.CopyFrom(_filled(old, compute()))
        return replace(self.model, proto=proto, deferred=self.deferred, file_bytes=0)

    def _constant(self, node: onnx.NodeProto, copy: onnx.NodeProto) -> None:
        copy.MergeFrom(without(node, ("attribute",)))
        for attribute in node.attribute:
            made = copy.attribute.add()
            made.MergeFrom(without(attribute, ("t",)))
            if attribute.HasField("t"):
                made.t.CopyFrom(self._tensor(attribute.t, node.output[0]))

    def _tensor(self, tensor: onnx.TensorProto, name: str) -> onnx.TensorProto:
        """A tensor of the main graph as it will stand there."""
        compute = self.values.get(id(tensor))
        old = self.model.deferred.get(name)
        weight = old or Weight.from_tensor(tensor, self.model.directory, name=name)
        if compute is None:
            if old is not None or weight.nbytes <= LARGE or not tensor.HasField("raw_data"):
                return tensor
            self.deferred[name] = weight
            return without(tensor, _PLACES)
        self.done.add(id(tensor))
        if weight.nbytes <= LARGE or any(len(getattr(tensor, name)) for name in _TYPED):
            self.deferred.pop(name, None)
            return _filled(tensor, compute())
        self.deferred[name] = Weight.lazily(name, weight.shape, weight.data_type, compute)
        return without(tensor, _PLACES)


def _filled(tensor: onnx.TensorProto, array: AnyArray) -> onnx.TensorProto:
    """The tensor with other values, stored in the same field."""
    filled = without(tensor, (*_PLACES, *_TYPED))
    typed = next((name for name in _TYPED if len(getattr(tensor, name))), None)
    if typed is not None and tensor.data_type in _AS_BITS:
        bits = np.ascontiguousarray(array).view(np.uint16)
        getattr(filled, typed).extend(bits.reshape(-1).tolist())
    elif typed is not None and tensor.data_type in _AS_NUMBERS:
        getattr(filled, typed).extend(array.reshape(-1).tolist())
    else:
        filled.raw_data = bytes(Weight.from_array(tensor.name, array).payload())
    return filled
