"""A read-only index of a model: nodes, constants, who makes and who reads each tensor."""

from __future__ import annotations

import builtins
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import onnx

from onnxprune.model import Model, Weight

# Bodies that may read tensors of the graph around them.
_GRAPH = onnx.AttributeProto.GRAPH
_GRAPHS = onnx.AttributeProto.GRAPHS


class Node:
    """One node, with its attributes decoded on demand.

    Attributes:
        index: Position in ``Graph.nodes``.
        proto: The node as it stands in the prepared model; never changed.
        since: Version of the operator's schema in force, 0 where no schema is known.
        captures: Outer tensors that subgraphs of this node read.
    """

    def __init__(self, index: builtins.int, proto: onnx.NodeProto, since: builtins.int) -> None:
        self.index = index
        self.proto = proto
        self.since = since
        self.op_type: str = proto.op_type
        self.domain: str = "" if proto.domain == "ai.onnx" else proto.domain
        self.inputs: tuple[str, ...] = tuple(proto.input)
        self.outputs: tuple[str, ...] = tuple(proto.output)
        self.captures: tuple[str, ...] = tuple(captured_names(proto))

    @property
    def label(self) -> str:
        """Name to show a person: the node's name, else its first output."""
        return self.proto.name or self.key

    @property
    def key(self) -> str:
        """First non-empty output, which identifies the node in a recipe."""
        return next((name for name in self.outputs if name), self.proto.name)

    @cached_property
    def attributes(self) -> Mapping[str, onnx.AttributeProto]:
        """Attributes by name."""
        return {attribute.name: attribute for attribute in self.proto.attribute}

    def has(self, name: str) -> bool:
        """Whether an attribute is given."""
        return name in self.attributes

    def int(self, name: str, default: builtins.int) -> builtins.int:
        """An integer attribute."""
        attribute = self.attributes.get(name)
        return default if attribute is None else builtins.int(attribute.i)

    def ints(self, name: str) -> tuple[builtins.int, ...] | None:
        """A list attribute, None where it is absent."""
        attribute = self.attributes.get(name)
        return None if attribute is None else tuple(attribute.ints)

    def float(self, name: str, default: builtins.float) -> builtins.float:
        """A number attribute."""
        attribute = self.attributes.get(name)
        return default if attribute is None else builtins.float(attribute.f)

    def setting(self, name: str) -> builtins.int | builtins.float | tuple[builtins.int, ...] | None:
        """An attribute of one or several numbers, None where it is absent."""
        attribute = self.attributes.get(name)
        if attribute is None:
            return None
        value = onnx.helper.get_attribute_value(attribute)
        return tuple(value) if isinstance(value, list) else value

    def string(self, name: str, default: str) -> str:
        """A string attribute."""
        attribute = self.attributes.get(name)
        return default if attribute is None else attribute.s.decode()

    def __repr__(self) -> str:
        return f"{self.op_type}({self.label})"


@dataclass(frozen=True, slots=True)
class Constant:
    """A constant of the prepared graph.

    Attributes:
        weight: Lazy handle on the values.
        origin: Name in the original model; differs from ``weight.name`` for a copy.
        in_node: Stored in a Constant node, not in an initializer.
        pinned: Why it may not change shape, or None.
    """

    weight: Weight
    origin: str
    in_node: bool
    pinned: str | None = None


@dataclass(frozen=True)
class Graph:
    """The prepared graph: constants lifted out of the node list, shared ones copied.

    Attributes:
        source: The model as loaded.
        model: The same with computed weights as constants (``fold``).
        nodes: Every node but the top-level Constant nodes, in execution order.
        constants: Top-level constants by name.
        inputs: Graph inputs that a caller feeds.
        outputs: Graph outputs.
        opsets: Version by domain.
        clones: First outputs of nodes that preparation cloned, and what they were cloned from.
        folded: Tensors of the source that became constants.
    """

    source: Model
    model: Model
    nodes: Sequence[Node]
    constants: Mapping[str, Constant]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    opsets: Mapping[str, int]
    clones: Mapping[str, str] = field(default_factory=dict)
    folded: tuple[str, ...] = ()

    @cached_property
    def producer(self) -> Mapping[str, Node]:
        """Node that writes each tensor."""
        return {name: node for node in self.nodes for name in node.outputs if name}

    @cached_property
    def consumers(self) -> Mapping[str, list[tuple[Node, int]]]:
        """Nodes that read each tensor directly, with the input position."""
        readers: dict[str, list[tuple[Node, int]]] = {}
        for node in self.nodes:
            for position, name in enumerate(node.inputs):
                if name:
                    readers.setdefault(name, []).append((node, position))
        return readers

    @cached_property
    def captured(self) -> frozenset[str]:
        """Tensors that a subgraph reads."""
        return frozenset(name for node in self.nodes for name in node.captures)

    @cached_property
    def derived(self) -> frozenset[str]:
        """Tensors computed from constants alone, the constants included."""
        known = set(self.constants)
        for node in self.nodes:
            names = [name for name in node.inputs if name]
            if names and not node.captures and all(name in known for name in names):
                known.update(name for name in node.outputs if name)
        return frozenset(known)

    @cached_property
    def uses(self) -> Mapping[str, tuple[Node, int]]:
        """First node that reads a constant as data, past those that only present it, and where."""
        uses: dict[str, tuple[Node, int]] = {}
        for node in reversed(self.nodes):
            presents = bool(node.outputs) and node.outputs[0] in self.derived
            for position, name in enumerate(node.inputs):
                if name in self.derived:
                    onward = uses.get(node.outputs[0]) if presents else None
                    uses[name] = onward or (node, position)
        return uses


def captured_names(node: onnx.NodeProto) -> Iterator[str]:
    """Outer tensors that the subgraphs of a node read, each once, in order."""
    seen: set[str] = set()
    for attribute in node.attribute:
        bodies = [attribute.g] if attribute.type == _GRAPH else list(attribute.graphs)
        if attribute.type not in (_GRAPH, _GRAPHS):
            continue
        for body in bodies:
            for name in _free_names(body):
                if name not in seen:
                    seen.add(name)
                    yield name


def _free_names(body: onnx.GraphProto) -> Iterator[str]:
    bound = {value.name for value in body.input} | {tensor.name for tensor in body.initializer}
    bound |= {tensor.values.name for tensor in body.sparse_initializer}
    for node in body.node:
        for name in (*node.input, *captured_names(node)):
            if name and name not in bound:
                yield name
        bound.update(node.output)
    for value in body.output:
        if value.name not in bound:
            yield value.name


def since_version(op_type: str, domain: str, opsets: Mapping[str, int]) -> int:
    """Version of the schema in force for an operator, 0 where the domain or operator is unknown."""
    version = opsets.get(domain, 0)
    try:
        return int(onnx.defs.get_schema(op_type, version, domain).since_version)
    except onnx.defs.SchemaError:
        return 0
