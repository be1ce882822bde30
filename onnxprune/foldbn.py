"""Fold BatchNormalization, and scales and shifts, into the layers before and after them.

Only where what lies between is read by nothing else, and the weight belongs to that layer alone:
then nothing is computed twice and the model does not grow. The function stays the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx
from onnx import TensorProto

from onnxprune import messages
from onnxprune.affines import FLOATS, LAYERS, Affine, Layer, affine_of, joined
from onnxprune.graph import captured_names
from onnxprune.messages import without
from onnxprune.model import Model, Weight
from onnxprune.replaced import replaced
from onnxprune.skeleton import skeleton
from onnxprune.types import AnyArray, Float64Array

_FIRST_IR_WITH_PRIVATE_INITIALIZERS = 4
NORM = "BatchNormalization"
_A_NODE = 48  # bytes that a node takes in a file, at least, less what a new bias takes beside it

_Part = tuple[Float64Array, Float64Array]


@dataclass(frozen=True)
class Merged:
    """A model with fewer nodes that computes the same.

    Attributes:
        model: The model.
        into: For each node that went the first output of it, and of the layer it went into.
        changed: Constants with other values, or new ones.
    """

    model: Model
    into: tuple[tuple[str, str], ...] = ()
    changed: tuple[str, ...] = ()


def fold_norms(model: Model) -> Merged:
    """Fold what can be folded; the model itself where nothing can."""
    folder = _Folder(model)
    folder.run()
    return folder.built() if folder.into else Merged(model)


@dataclass
class _Folder:
    model: Model
    into: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        graph = self.model.proto.graph
        self.nodes: list[onnx.NodeProto | None] = list(graph.node)
        self.taken = {name for node in graph.node for name in (*node.input, *node.output)}
        private = self.model.proto.ir_version >= _FIRST_IR_WITH_PRIVATE_INITIALIZERS
        fed = {value.name for value in graph.input} if private else set()
        self.weights = {n: w for n, w in self.model.weights().items() if n not in fed}
        self.fixed = {value.name for value in graph.output}  # what others than nodes see
        self.fixed.update(name for node in graph.node for name in captured_names(node))
        self.reads: Counter[str] = Counter(name for node in graph.node for name in node.input)
        self.reader: dict[str, int] = {
            name: index for index, node in enumerate(graph.node) for name in node.input
        }
        self.tensors = dict(_tensors(graph))
        self.values: dict[int, Callable[[], AnyArray]] = {}
        self.added: list[TensorProto] = []
        self.gone: list[str] = []  # what removed nodes read
        self.renamed: set[str] = set()
        self._shapes: dict[str, tuple[int | None, ...]] | None = None

    def run(self) -> None:
        for index in range(len(self.nodes)):
            self._after(index)
        for index in range(len(self.nodes)):
            self._before(index)

    # -- a layer and what follows it ---------------------------------------------------------------

    def _after(self, index: int) -> None:
        layer = self._layer(index)
        if layer is None:
            return
        chain: list[int] = []
        parts: list[_Part] = []
        name = layer.node.output[0]
        while (found := self._follower(name, layer)) is not None:
            chain.append(found[0])
            parts.append(found[1])
            name = self._node(found[0]).output[0]
        if not chain:
            return
        scale, shift = joined(parts)
        multiplies = layer.node.op_type == "MatMul"
        if multiplies and bool((scale == 1).all()) and len(chain) == 1:
            return  # it is a bias, and stays one
        if not self._has_room(layer, chain):
            return
        if not self._set_weight(layer, scale, shift, behind=True):
            return
        last = self._node(chain[-1])
        key = layer.node.output[0]
        made = onnx.NodeProto()
        made.CopyFrom(layer.node)
        made.output[0] = last.output[0]
        bias = layer.after(scale, shift)[1]
        if multiplies and bias.any():
            made.output[0] = key
            adder = onnx.helper.make_node(
                "Add", [key, self._new_bias(layer, bias)], [last.output[0]], name=last.name
            )
            self.nodes[chain[-1]] = adder
        elif not multiplies:
            self._set_bias(made, layer, bias)
            self.nodes[chain[-1]] = None
            self.renamed.add(key)
        else:
            self.nodes[chain[-1]] = None
            self.renamed.add(key)
        for at in chain[:-1]:
            self.renamed.add(self._node(at).output[0])
            self.nodes[at] = None
        self._note(chain, key)
        self.nodes[index] = made

    def _note(self, chain: Sequence[int], key: str) -> None:
        for at in chain:
            node = self.model.proto.graph.node[at]
            self.into[node.output[0]] = key
            self.gone.extend(name for name in node.input if name in self.weights)

    def _follower(self, name: str, layer: Layer) -> tuple[int, _Part] | None:
        """The node that alone reads a tensor, if it scales or shifts its channels."""
        if self.reads[name] != 1 or name in self.fixed:
            return None
        index = self.reader[name]
        found = self._affine(index, layer.rank)
        if found is None or not self._fits(found, layer):
            return None
        part = found.of(layer.outputs)
        return None if part is None else (index, part)

    @staticmethod
    def _fits(found: Affine, layer: Layer) -> bool:
        return found.axis == layer.axis or all(one.size == 1 for one in found.parts)

    def _affine(self, index: int, rank: int | None) -> Affine | None:
        node = self.nodes[index]
        if node is None or len(node.output) < 1:
            return None
        known = {n: self.weights[n] for n in node.input if n in self.weights}
        if any(weight.data_type not in FLOATS for weight in known.values()):
            return None
        if rank is None and known:
            shape = self._shape(next((n for n in node.input if n not in known), ""))
            rank = None if shape is None else len(shape)
        return affine_of(node, rank, {name: weight.read() for name, weight in known.items()})

    # -- a layer and what precedes it --------------------------------------------------------------

    def _before(self, index: int) -> None:
        node = self.nodes[index]
        if node is None or not node.output or self.reads[node.output[0]] != 1:
            return
        name = node.output[0]
        if name in self.fixed or node.op_type in LAYERS:
            return
        layer = self._layer(self.reader[name])
        if layer is None or layer.node.input[0] != name or list(layer.node.input).count(name) != 1:
            return
        found = self._affine(index, layer.rank)
        if found is None or not self._fits(found, layer):
            return
        part = found.of(layer.inputs)
        source = next(n for n in node.input if n not in self.weights)
        if part is None or not self._as_wide(found, node, source, layer):
            return
        scale, shift = part
        if shift.any() and (layer.pads_zeros or layer.node.op_type == "MatMul"):
            return
        if any(a.name == "transA" and a.i for a in layer.node.attribute):
            return
        if shift.any() and not self._has_room(layer, [index]):
            return
        if not self._set_weight(layer, scale, shift, behind=False):
            return
        key = layer.node.output[0]
        made = onnx.NodeProto()
        made.CopyFrom(layer.node)
        made.input[0] = source
        if shift.any():
            self._set_bias(made, layer, layer.before(scale, shift)[1])
        self.nodes[self.reader[name]] = made
        self.reader[source] = self.reader[name]
        self.nodes[index] = None
        self.renamed.add(name)
        self._note([index], key)

    def _as_wide(self, found: Affine, node: onnx.NodeProto, source: str, layer: Layer) -> bool:
        """Whether what goes in has the channels already, and is not widened by the constant."""
        if node.op_type == NORM or all(one.size == 1 for one in found.parts):
            return True
        shape = self._shape(source)
        return bool(shape) and shape is not None and shape[found.axis] == layer.inputs

    # -- layers ------------------------------------------------------------------------------------

    def _layer(self, index: int) -> Layer | None:
        """A layer whose weight is its own."""
        node = self.nodes[index]
        if node is None or node.op_type not in LAYERS or node.domain not in ("", "ai.onnx"):
            return None
        name = node.input[1] if len(node.input) > 1 else ""
        weight = self.weights.get(name)
        if weight is None or name not in self.tensors or self.reads[name] != 1:
            return None
        if (
            name in self.fixed
            or weight.data_type not in FLOATS
            or id(self.tensors[name]) in (self.values)
        ):
            return None
        if len(weight.shape) < 2 or (len(weight.shape) > 2) != ("Conv" in node.op_type):
            return None
        bias = None
        if len(node.input) > 2 and node.input[2]:
            held = self.weights.get(node.input[2])
            if held is None or any(size != 1 for size in held.shape[:-1]):
                return None
            bias = held.read().reshape(-1)
        return Layer(node, weight.read(), bias)

    def _set_weight(
        self, layer: Layer, scale: Float64Array, shift: Float64Array, *, behind: bool
    ) -> bool:
        """Note the new weight, computed again when it is read; False where it has no such value."""
        name = layer.node.input[1]
        weight = self.weights[name]
        node, bias = layer.node, layer.bias

        def changed() -> tuple[Float64Array, Float64Array]:
            again = Layer(node, weight.read(), bias)
            return again.after(scale, shift) if behind else again.before(scale, shift)

        def compute() -> AnyArray:
            values: AnyArray = changed()[0].astype(weight.dtype)
            return values

        with np.errstate(over="ignore", invalid="ignore"):
            stored = (part.astype(weight.dtype).astype(np.float64) for part in changed())
            if not all(np.isfinite(part).all() for part in stored):
                return False
        self.values[id(self.tensors[name])] = compute
        return True

    def _has_room(self, layer: Layer, chain: Sequence[int]) -> bool:
        """Whether a new bias takes no more room than what goes: nodes, and what they alone read."""
        old = layer.node.input[2] if len(layer.node.input) > 2 else ""
        if self._is_own(old, layer.outputs):
            return True
        names = {name for at in chain for name in self._node(at).input if name in self.weights}
        freed = sum(self.weights[n].nbytes for n in names if self.reads[n] == 1)
        return layer.outputs * layer.weight.dtype.itemsize <= freed + _A_NODE * len(chain)

    def _is_own(self, name: str, channels: int) -> bool:
        """Whether a bias can take new values in its place."""
        alone = name in self.tensors and self.reads[name] == 1 and name not in self.fixed
        return alone and self.weights[name].size == channels

    def _set_bias(self, made: onnx.NodeProto, layer: Layer, bias: Float64Array) -> None:
        """Give the layer its new bias: in the place of the old one where that is its own."""
        old = layer.node.input[2] if len(layer.node.input) > 2 else ""
        for attribute in list(made.attribute):
            if attribute.name == "beta":
                made.attribute.remove(attribute)
        if self._is_own(old, bias.size):
            array = bias.astype(layer.weight.dtype).reshape(self.weights[old].shape)
            self.values[id(self.tensors[old])] = lambda: array
            return
        if old:
            self.gone.append(old)
        del made.input[2:]
        made.input.append(self._new_bias(layer, bias))

    def _new_bias(self, layer: Layer, bias: Float64Array) -> str:
        whole = np.broadcast_to(bias, (layer.outputs,)).astype(layer.weight.dtype)
        name = base = f"{layer.node.input[1]}__bias"
        count = 1
        while name in self.taken:
            count += 1
            name = f"{base}{count}"
        self.taken.add(name)
        self.added.append(Weight.from_array(name, np.ascontiguousarray(whole)).to_proto())
        return name

    # -- the rest ----------------------------------------------------------------------------------

    def _node(self, index: int) -> onnx.NodeProto:
        node = self.nodes[index]
        assert node is not None
        return node

    def _shape(self, name: str) -> tuple[int | None, ...] | None:
        """A shape as inference gives it, None in it where a dimension is not known."""
        if self._shapes is None:
            self._shapes = shapes_of(self.model)
        return self._shapes.get(name)

    def built(self) -> Merged:
        """The model with all that was noted."""
        named = {id(tensor): name for name, tensor in self.tensors.items()}
        changed = [named[key] for key in self.values]
        filled = replaced(self.model, self.values)
        # Constant nodes have their new values there; all else is as it was.
        nodes = [
            filled.proto.graph.node[at] if node is self.model.proto.graph.node[at] else node
            for at, node in enumerate(self.nodes)
            if node is not None
        ]
        return Merged(
            rebuilt(filled, nodes, added=self.added, dropped=self.renamed, maybe=self.gone),
            tuple(self.into.items()),
            (*changed, *(tensor.name for tensor in self.added)),
        )


def _tensors(graph: onnx.GraphProto) -> Iterator[tuple[str, TensorProto]]:
    for tensor in graph.initializer:
        yield tensor.name, tensor
    for node in graph.node:
        if messages.is_constant(node):
            for attribute in node.attribute:
                if attribute.name == "value":
                    yield node.output[0], attribute.t


def shapes_of(model: Model) -> dict[str, tuple[int | None, ...]]:
    """Shapes by name, as far as inference gets; a dimension is None where it is not fixed."""
    try:
        proto = onnx.shape_inference.infer_shapes(skeleton(model), data_prop=True)
    except onnx.shape_inference.InferenceError:
        proto = model.proto
    graph = proto.graph
    found: dict[str, tuple[int | None, ...]] = {}
    for value in (*graph.input, *graph.value_info, *graph.output):
        kind = value.type.tensor_type
        if value.type.HasField("tensor_type") and kind.HasField("shape"):
            found[value.name] = tuple(
                dim.dim_value if dim.HasField("dim_value") else None for dim in kind.shape.dim
            )
    return found


def rebuilt(
    model: Model,
    nodes: Sequence[onnx.NodeProto],
    *,
    added: Sequence[TensorProto] = (),
    dropped: set[str] | frozenset[str] = frozenset(),
    maybe: Sequence[str] | None = None,
) -> Model:
    """The model with other nodes, and without what these leave unused.

    Args:
        model: Where all else comes from: metadata, functions, opsets, inputs and outputs.
        nodes: The nodes, in order.
        added: New initializers.
        dropped: Tensors that are no more, whose declarations go.
        maybe: Constants that may have become unused; None looks at all of them.
    """
    source = model.proto
    graph = source.graph
    kept, used, doubted = _alive(graph, nodes, maybe)
    fed = {value.name for value in graph.input}
    stays = set() if maybe is None else {t.name for t in graph.initializer} - doubted
    proto = without(source, ("graph",))
    proto.graph.MergeFrom(without(graph, ("node", "initializer", "value_info")))
    names = used | fed | stays
    proto.graph.initializer.extend(t for t in graph.initializer if t.name in names)
    if source.ir_version < _FIRST_IR_WITH_PRIVATE_INITIALIZERS:
        proto.graph.node.extend(
            onnx.helper.make_node("Constant", [], [tensor.name], value=tensor) for tensor in added
        )
    else:
        proto.graph.initializer.extend(added)
    proto.graph.node.extend(kept)
    made = {name for node in proto.graph.node for name in node.output}
    known = made | fed | {tensor.name for tensor in proto.graph.initializer}
    proto.graph.value_info.extend(
        value for value in graph.value_info if value.name not in dropped and value.name in known
    )
    deferred = {name: weight for name, weight in model.deferred.items() if name in known}
    return replace(model, proto=proto, deferred=deferred, file_bytes=0)


def _alive(
    graph: onnx.GraphProto, nodes: Sequence[onnx.NodeProto], maybe: Sequence[str] | None
) -> tuple[list[onnx.NodeProto], set[str], set[str]]:
    """Nodes that stay, what they read, and what may have lost its readers.

    Without ``maybe`` every node that nothing reads goes, else those that made what is in it.
    """
    used = {value.name for value in graph.output}
    kept = []
    doubted = set(maybe or ())
    for node in reversed(nodes):
        wanted = any(name in used for name in node.output)
        if not wanted and (maybe is None or any(name in doubted for name in node.output)):
            doubted.update(node.input)
            continue
        used.update(name for name in (*node.input, *captured_names(node)) if name)
        kept.append(node)
    return kept[::-1], used, doubted
