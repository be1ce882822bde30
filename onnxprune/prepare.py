"""From a loaded model to the graph that is analysed: constants lifted out, sharing undone.

Exporters merge equal constants, so that one zero bias serves half the network and would couple it.
Every use of a constant therefore gets its own copy (a handle, not the data); copies that end equal
are merged again when the result is written. A weight matrix used twice as a weight is truly tied
and stays one tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import onnx

from onnxprune.fold import fold
from onnxprune.graph import Constant, Graph, Node, captured_names, since_version
from onnxprune.model import Model, Weight
from onnxprune.sequences import slice_sequences

# Inputs that are weights: a matrix that sits in two of these places is tied, not merely shared.
_WEIGHT_INPUTS = {
    ("Conv", 1),
    ("ConvTranspose", 1),
    ("FusedConv", 1),
    ("Gemm", 0),
    ("Gemm", 1),
    ("MatMul", 0),
    ("MatMul", 1),
    ("Gather", 0),
}
# Nodes between a constant and its use that only present the constant in another form.
_CHAIN_OPS = {
    "Cast",
    "CastLike",
    "DequantizeLinear",
    "Expand",
    "Flatten",
    "Identity",
    "Reshape",
    "Slice",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
}
_ASK_A_SHAPE = ("Shape", "Size")
_CONVOLUTIONS = ("Conv", "ConvTranspose", "FusedConv")
_FIRST_IR_WITH_PRIVATE_INITIALIZERS = 4

_Use = tuple[int, int]  # (position in the node list, input position)
_Role = tuple[str, int]  # (kind of operator, groups)


def prepare(model: Model) -> Graph:
    """Build the graph that every later stage works on. The model itself is left untouched."""
    folded, names = fold(slice_sequences(model))
    return _Preparation(folded).graph(model, names)


class _Preparation:
    def __init__(self, model: Model) -> None:
        self.model = model
        proto = model.proto.graph
        self.weights: dict[str, Weight] = dict(model.weights())
        in_nodes = {
            node.output[0]: index for index, node in enumerate(proto.node) if _is_constant(node)
        }
        self.in_node = {name for name in in_nodes if name in self.weights}
        lifted = {in_nodes[name] for name in self.in_node}
        self.nodes: list[onnx.NodeProto] = [
            node for index, node in enumerate(proto.node) if index not in lifted
        ]
        self.owned: set[int] = set()
        self.cloned_after: dict[int, list[onnx.NodeProto]] = {}
        self.clones: dict[str, str] = {}
        self.constants: dict[str, Constant] = {}
        self.outputs = tuple(value.name for value in proto.output)
        self.taken = set(self.weights) | {value.name for value in proto.input}
        self.taken.update(name for node in proto.node for name in node.output)
        self.weight_chains: dict[str, _Role] = {}
        self.next_number: dict[str, int] = {}

    def graph(self, source: Model, folded: tuple[str, ...]) -> Graph:
        proto = self.model.proto
        opsets = {_domain(entry.domain): entry.version for entry in proto.opset_import}
        self._unshare(self._pinned())
        protos = list(self._in_order())
        nodes = [
            Node(index, node, since_version(node.op_type, _domain(node.domain), opsets))
            for index, node in enumerate(protos)
        ]
        inputs = tuple(v.name for v in proto.graph.input if v.name not in self.weights)
        return Graph(
            source,
            self.model,
            nodes,
            self.constants,
            inputs,
            self.outputs,
            opsets,
            dict(self.clones),
            folded,
        )

    def _pinned(self) -> Mapping[str, str]:
        """Constants that something outside the node list can see, with the reason."""
        pinned = dict.fromkeys(self.outputs, "is a graph output")
        for node in self.nodes:
            for name in captured_names(node):
                pinned[name] = f"is read inside a subgraph of {node.name or node.output[0]}"
        if self.model.proto.ir_version >= _FIRST_IR_WITH_PRIVATE_INITIALIZERS:
            for value in self.model.proto.graph.input:
                pinned[value.name] = "is also a graph input, so a caller may override it"
        return pinned

    def _unshare(self, pinned: Mapping[str, str]) -> None:
        uses: dict[str, list[_Use]] = {}
        for index, node in enumerate(self.nodes):
            for position, name in enumerate(node.input):
                if name:
                    uses.setdefault(name, []).append((index, position))
        chain = self._chain_nodes()
        for index in reversed(chain):  # users before the constants they show
            output = self.nodes[index].output[0]
            if output not in pinned:
                self._clone_chain_node(index, uses.get(output, []), uses)
        for name, weight in self.weights.items():
            reason = pinned.get(name)
            groups = self._groups(uses.get(name, []))
            self.constants[name] = Constant(weight, name, name in self.in_node, reason)
            for group in groups if reason else groups[1:]:
                self._copy_constant(name, weight, group)

    def _chain_nodes(self) -> list[int]:
        known = set(self.weights)
        chain = []
        for index, node in enumerate(self.nodes):
            data = node.input[:1] if node.op_type == "CastLike" else node.input
            if node.op_type in _CHAIN_OPS and all(name in known for name in data if name):
                chain.append(index)
                known.update(node.output)
        return chain

    def _groups(self, uses: list[_Use]) -> list[list[_Use]]:
        """Split uses into those that share one tensor: weight uses of one kind, others alone."""
        groups: list[list[_Use]] = []
        tied: dict[_Role, list[_Use]] = {}
        asked = [use for use in uses if self._node(use[0]).op_type in _ASK_A_SHAPE]
        for use in uses:
            role = self._role(use)
            if use in asked:
                continue
            if role is None:
                groups.append([use])
            elif role in tied:
                tied[role].append(use)
            else:
                tied[role] = [use]
                groups.append(tied[role])
        if not asked:
            return groups
        # What only asks for the shape needs no values of its own.
        return [[*groups[0], *asked], *groups[1:]] if groups else [asked]

    def _role(self, use: _Use) -> _Role | None:
        """How a node slices a weight; None for what is no weight."""
        node = self._node(use[0])
        if (node.op_type, use[1]) not in _WEIGHT_INPUTS:
            return self.weight_chains.get(node.output[0])
        group = next((a.i for a in node.attribute if a.name == "group"), 1)
        return (node.op_type if node.op_type in _CONVOLUTIONS else "", group)

    def _clone_chain_node(
        self, index: int, uses: list[_Use], all_uses: dict[str, list[_Use]]
    ) -> None:
        groups = self._groups(uses)
        role = self._role(uses[0]) if len(groups) == 1 else None
        if role is not None:
            self.weight_chains[self.nodes[index].output[0]] = role
        for group in groups[1:]:
            clone = onnx.NodeProto()
            clone.CopyFrom(self.nodes[index])
            original = clone.output[0]
            clone.output[0] = self._free(original)
            if clone.name:
                clone.name = f"{clone.name}{clone.output[0][len(original) :]}"
            self.clones[clone.output[0]] = original
            position = self._add_clone(index, clone)
            for pos, name in enumerate(clone.input):
                if name:
                    all_uses[name].append((position, pos))
            self._redirect(group, clone.output[0])

    def _add_clone(self, index: int, clone: onnx.NodeProto) -> int:
        # Clones live past the end of the list so that positions stay valid until _in_order.
        self.cloned_after.setdefault(index, []).append(clone)
        self.nodes.append(clone)
        self.owned.add(len(self.nodes) - 1)
        return len(self.nodes) - 1

    def _copy_constant(self, name: str, weight: Weight, group: list[_Use]) -> None:
        copy = self._free(name)
        self.constants[copy] = Constant(
            Weight.lazily(copy, weight.shape, weight.data_type, weight.read),
            name,
            name in self.in_node,
        )
        self._redirect(group, copy)

    def _redirect(self, group: list[_Use], name: str) -> None:
        for index, position in group:
            self._node(index, own=True).input[position] = name

    def _node(self, index: int, *, own: bool = False) -> onnx.NodeProto:
        if own and index not in self.owned:
            copy = onnx.NodeProto()
            copy.CopyFrom(self.nodes[index])
            self.nodes[index] = copy
            self.owned.add(index)
        return self.nodes[index]

    def _free(self, name: str) -> str:
        count = self.next_number.get(name, 2)
        while f"{name}__{count}" in self.taken:
            count += 1
        self.next_number[name] = count + 1
        self.taken.add(f"{name}__{count}")
        return f"{name}__{count}"

    def _in_order(self) -> Iterator[onnx.NodeProto]:
        originals = len(self.nodes) - sum(len(clones) for clones in self.cloned_after.values())
        for index in range(originals):
            yield self.nodes[index]
            yield from self.cloned_after.get(index, ())


def _is_constant(node: onnx.NodeProto) -> bool:
    return node.op_type == "Constant" and node.domain in ("", "ai.onnx")


def _domain(name: str) -> str:
    return "" if name == "ai.onnx" else name
