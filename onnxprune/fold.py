"""Weights that the graph computes from constants alone, computed once.

Weight standardisation, spectral norms and raw exports compute a filter or a bias while the network
runs. Where that only moves or scales elements the analysis follows it; where elements mix, cutting
one channel would change the others, so the result is taken as the weight. ONNX Runtime computes it,
with the arithmetic the model itself would see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property

import onnx
from onnx import TensorProto

from onnxprune.errors import VerificationError
from onnxprune.graph import captured_names
from onnxprune.model import Model, Weight
from onnxprune.runtime import session
from onnxprune.skeleton import LARGE
from onnxprune.types import AnyArray

# Operators through which a channel of a constant can be followed, element by element.
_TRANSPARENT = set(
    """
    Abs Add Cast Clip Concat Constant DepthToSpace DequantizeLinear Div Erf Exp Flatten Gather
    Identity Log Max Min Mul Neg Pad Pow QuantizeLinear Reciprocal Relu Reshape Sigmoid Slice
    SpaceToDepth Split Sqrt Squeeze Sub Sum Tanh Tile Transpose Unsqueeze Where
    """.split()  # noqa: SIM905  (read as lines)
)
_DRAWN = {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli"}
_DRAWN |= {"Multinomial", "Dropout"}
_FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE}
_FIRST_IR_WITH_PRIVATE_INITIALIZERS = 4
_SMALL = 1 << 16  # bytes that a folded constant may take whatever it was made from


def fold(model: Model) -> tuple[Model, tuple[str, ...]]:
    """A model in which computed weights are constants, and their names; the model itself if none.

    Values are computed when they are read, unless they are small.
    """
    folder = _Folder(model)
    folded = dict(folder.computed())
    return (folder.build(folded), tuple(folded)) if folded else (model, ())


class _Folder:
    def __init__(self, model: Model) -> None:
        self.model = model
        graph = model.proto.graph
        self.nodes = list(graph.node)
        self.inputs = {value.name for value in graph.input}
        self.outputs = {value.name for value in graph.output}
        self.weights = dict(model.weights())
        self.maker: dict[str, int] = {}  # node behind each tensor made from constants alone
        self.mixed: set[str] = set()
        self.captured = {name for node in self.nodes for name in captured_names(node)}

    def computed(self) -> Iterator[tuple[str, Weight]]:
        """Every mixed tensor that the rest of the graph reads, with its value."""
        self._follow()
        if not self.mixed:
            return
        used: dict[str, bool] = {}  # tensors read, and whether by the network proper
        for index, node in enumerate(self.nodes):
            proper = not any(self.maker.get(name) == index for name in node.output)
            for name in node.input:
                used[name] = used.get(name, False) or proper
        for name in sorted(self.mixed & used.keys(), key=self.maker.__getitem__):
            node = self.nodes[self.maker[name]]
            kept = self.outputs | self.captured
            alone = all(other == name or other not in used for other in node.output)
            if used[name] and alone and not kept & set(node.output):
                weight = self._weight(name)
                if weight is not None:
                    yield name, weight

    def _follow(self) -> None:
        overridable = self.model.proto.ir_version >= _FIRST_IR_WITH_PRIVATE_INITIALIZERS
        known = {name for name in self.weights if not (overridable and name in self.inputs)}
        for index, node in enumerate(self.nodes):
            if node.domain not in ("", "ai.onnx") or node.op_type in _DRAWN:
                continue
            names = [name for name in node.input if name]
            if node.op_type == "CastLike" and names[0] in known and self._type(names[1]):
                names = names[:1]
            if not names or not all(name in known for name in names):
                continue
            if any(True for _ in captured_names(node)):
                continue
            made = [name for name in node.output if name]
            known.update(made)
            self.maker.update(dict.fromkeys(made, index))
            if node.op_type not in _TRANSPARENT or any(name in self.mixed for name in names):
                self.mixed.update(made)

    def _type(self, name: str) -> int:
        """Element type of a tensor as the file declares it, 0 where it does not."""
        return int(self._types.get(name, TensorProto.UNDEFINED))

    @cached_property
    def _types(self) -> dict[str, int]:
        graph = self.model.proto.graph
        values = (*graph.value_info, *graph.input, *graph.output)
        declared = {value.name: value.type.tensor_type.elem_type for value in values}
        return declared | {name: weight.data_type for name, weight in self.weights.items()}

    def _weight(self, name: str) -> Weight | None:
        chain, leaves = self._behind(name)
        part = self._part(name, chain, leaves)
        try:
            value = _run(part, name)
        except VerificationError:  # an operator the runtime lacks: the analysis freezes it
            return None
        weight = Weight.from_array(name, value)
        if weight.data_type not in _FLOATS:
            return None
        if weight.nbytes > max(_SMALL, sum(self.weights[leaf].nbytes for leaf in leaves)):
            return None
        if weight.nbytes <= LARGE:
            return weight
        return Weight.lazily(name, weight.shape, weight.data_type, _reader(part, name))

    def _behind(self, name: str) -> tuple[list[int], list[str]]:
        """Nodes that compute a tensor, in order, and the constants they start from."""
        chain: set[int] = set()
        leaves: dict[str, None] = {}
        pending = [name]
        while pending:
            current = pending.pop()
            index = self.maker.get(current)
            if index is None:
                if current in self.weights:
                    leaves[current] = None
            elif index not in chain:
                chain.add(index)
                pending += [n for n in self.nodes[index].input if n]
        return sorted(chain), list(leaves)

    def _part(self, name: str, chain: Sequence[int], leaves: Sequence[str]) -> Model:
        proto = onnx.ModelProto()
        ir_version = self.model.proto.ir_version
        proto.ir_version = max(ir_version, _FIRST_IR_WITH_PRIVATE_INITIALIZERS)
        proto.opset_import.extend(self.model.proto.opset_import)
        proto.graph.name = "weight"
        deferred = {}
        for leaf in leaves:
            weight = self.weights[leaf]
            proto.graph.initializer.add(name=leaf, data_type=weight.data_type, dims=weight.shape)
            deferred[leaf] = weight
        for index in chain:
            node = self.nodes[index]
            if node.op_type == "CastLike":
                to = self._type(node.input[1])
                node = onnx.helper.make_node("Cast", node.input[:1], node.output, to=to)
            proto.graph.node.append(node)
        proto.graph.output.add(name=name)
        return Model(proto, self.model.directory, deferred)

    def build(self, folded: dict[str, Weight]) -> Model:
        """The model with these tensors as constants, without what only led to them."""
        needed = self.outputs | self.captured
        kept: list[int] = []
        for index in reversed(range(len(self.nodes))):
            node = self.nodes[index]
            foldable = node.op_type == "Constant" or self.maker.get(_first(node)) == index
            gone = any(name in folded for name in node.output)
            if gone or (foldable and not any(name in needed for name in node.output)):
                continue
            needed.update(node.input)
            kept.append(index)
        source = self.model.proto
        proto = onnx.ModelProto()
        for descriptor, value in source.ListFields():
            if descriptor.name != "graph":
                _copy(proto, descriptor.name, value)
        target = proto.graph
        for descriptor, value in source.graph.ListFields():
            if descriptor.name not in ("node", "initializer"):
                _copy(target, descriptor.name, value)
        read = {name for node in self.nodes for name in node.input}
        for tensor in source.graph.initializer:
            if tensor.name in needed or tensor.name not in read or tensor.name in self.inputs:
                target.initializer.append(tensor)
        deferred = {name: weight for name, weight in self.model.deferred.items() if name in needed}
        for name, weight in folded.items():
            tensor = TensorProto(name=name, data_type=weight.data_type, dims=weight.shape)
            if source.ir_version < _FIRST_IR_WITH_PRIVATE_INITIALIZERS:
                target.node.append(onnx.helper.make_node("Constant", [], [name], value=tensor))
            else:
                target.initializer.append(tensor)
            deferred[name] = weight
        target.node.extend(self.nodes[index] for index in reversed(kept))
        return replace(self.model, proto=proto, deferred=deferred)


def _first(node: onnx.NodeProto) -> str:
    return next((name for name in node.output if name), "")


def _run(part: Model, name: str) -> AnyArray:
    return session(part, optimise=False).run({})[name]


def _reader(part: Model, name: str) -> Callable[[], AnyArray]:
    return lambda: _run(part, name)


def _copy(target: onnx.ModelProto | onnx.GraphProto, name: str, value: object) -> None:
    field = getattr(target, name)
    if hasattr(field, "MergeFrom"):
        field.MergeFrom(value)
    else:
        setattr(target, name, value)
