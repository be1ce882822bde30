"""A model run piece by piece over all the data, so that weights may change on the way.

Each piece is a small model of the nodes up to some point; what later nodes read stays, for every
batch, in memory or, above a limit, in a temporary file.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import helper

from onnxprune.data import Data
from onnxprune.graph import Graph, Node
from onnxprune.model import Model, Weight
from onnxprune.runtime import session
from onnxprune.types import AnyArray

_IN_MEMORY = 2 << 30  # bytes of tensors that are kept there
_SMALL = 1 << 16  # bytes of an array that is not worth a file

Values = list[AnyArray]


class Stepwise:
    """A model that has run up to some node on every batch.

    Attributes:
        constants: Values that differ from the graph's, by name of the constant.
    """

    def __init__(
        self, graph: Graph, data: Data, reserved: Iterable[str] = (), kept: Iterable[str] = ()
    ) -> None:
        """Start with the inputs.

        Args:
            graph: The model.
            data: What it runs on.
            reserved: Tensors that stay until they are asked for.
            kept: Tensors that stay to the end.
        """
        self.graph = graph
        self._reserved = set(reserved)
        self._kept = frozenset(kept)
        self.constants: dict[str, AnyArray] = {}
        self._live: dict[str, Values] = {
            name: [batch[name] for batch in data.batches] for name in graph.inputs
        }
        self._batches = len(data.batches)
        self._done = 0  # nodes that have run
        self._last_use = self._uses()
        self._opsets = list(graph.model.proto.opset_import)
        self._held = 0  # bytes in memory, of what nodes made
        self._spill: tempfile.TemporaryDirectory[str] | None = None
        self._files = 0

    def __enter__(self) -> Stepwise:
        return self

    def __exit__(self, *_: object) -> None:
        self._live.clear()
        if self._spill is not None:
            self._spill.cleanup()

    @property
    def done(self) -> int:
        """Number of nodes that have run."""
        return self._done

    def _uses(self) -> Mapping[str, int]:
        last: dict[str, int] = {}
        for node in self.graph.nodes:
            for name in (*node.inputs, *node.captures):
                if name:
                    last[name] = node.index
        return last

    def until(self, stop: int, wanted: Sequence[str]) -> Mapping[str, Values]:
        """Run every node before position ``stop`` and give some tensors.

        Args:
            stop: Position in ``Graph.nodes``; may not be less than the last time.
            wanted: Tensors that those nodes make, or that some later node reads.

        Returns:
            For each tensor its value on every batch.
        """
        nodes = self.graph.nodes[self._done : stop]
        if nodes:
            made = [n for node in nodes for n in node.outputs if n]
            asked = self._reserved | self._kept | set(wanted)
            keep = [n for n in made if n in asked or self._last_use.get(n, -1) >= stop]
            keep = [n for n in keep if n not in self.graph.derived]
            if keep:
                self._run(nodes, keep)
            self._done = stop
        found = {name: self._live[name] for name in wanted}
        self._reserved -= set(wanted)
        over = [n for n in self._live if self._last_use.get(n, -1) < self._done]
        for name in over:
            if name not in self._reserved and name not in self._kept:
                values = self._live.pop(name)
                if name not in self.graph.inputs:
                    self._held -= sum(_in_memory(value) for value in values)
        return found

    def put(self, name: str, values: Values) -> None:
        """Let later nodes read other values of a tensor; nothing where none of them reads it."""
        if name in self._live:
            self._held -= sum(_in_memory(value) for value in self._live[name])
            self._live[name] = [self._stored(value) for value in values]

    def _run(self, nodes: Sequence[Node], keep: Sequence[str]) -> None:
        # Nodes that nothing kept depends on would ask for tensors that are gone.
        needed, chosen = set(keep), []
        for node in reversed(nodes):
            if needed & set(node.outputs):
                chosen.append(node)
                needed.update(name for name in (*node.inputs, *node.captures) if name)
        inside = {name for node in chosen for name in node.outputs}
        for node in self._presenting(needed):
            chosen.append(node)
            inside.update(node.outputs)
            needed.update(name for name in node.inputs if name)
        chosen.sort(key=lambda node: node.index)
        piece = onnx.ModelProto(ir_version=max(4, self.graph.model.proto.ir_version))
        piece.opset_import.extend(self._opsets)
        piece.functions.extend(self.graph.model.proto.functions)
        piece.graph.name = "piece"
        piece.graph.node.extend(node.proto for node in chosen)
        deferred: dict[str, Weight] = {}
        fed = []
        for name in sorted(needed - inside):
            if name in self.graph.constants:
                deferred[name] = self._weight(name)
                kind, dims = deferred[name].data_type, deferred[name].shape
                piece.graph.initializer.add(name=name, data_type=kind, dims=dims)
            else:
                fed.append(name)
                first = self._live[name][0]
                kind = helper.np_dtype_to_tensor_dtype(first.dtype)
                symbols = [None] * first.ndim
                piece.graph.input.append(helper.make_tensor_value_info(name, kind, symbols))
        piece.graph.output.extend(onnx.ValueInfoProto(name=name) for name in keep)
        loaded = session(Model(piece, self.graph.model.directory, deferred))
        results: dict[str, Values] = {name: [] for name in keep}
        for batch in range(self._batches):
            ran = loaded.run({name: self._live[name][batch] for name in fed})
            for name in keep:
                results[name].append(self._stored(ran[name]))
        self._live |= results

    def _presenting(self, needed: set[str]) -> list[Node]:
        """Nodes that compute needed tensors from constants alone, wherever they stand."""
        found: dict[int, Node] = {}
        pending = list(needed)
        while pending:
            name = pending.pop()
            node = self.graph.producer.get(name)
            if name in self.graph.derived and node is not None and node.index not in found:
                if node.index >= self._done:
                    continue
                found[node.index] = node
                pending += [n for n in node.inputs if n]
        return list(found.values())

    def _weight(self, name: str) -> Weight:
        if name in self.constants:
            return Weight.from_array(name, self.constants[name])
        old = self.graph.constants[name].weight
        return Weight.lazily(name, old.shape, old.data_type, old.read)

    def _stored(self, array: AnyArray) -> AnyArray:
        if (
            self._held + array.nbytes < _IN_MEMORY
            or array.nbytes < _SMALL
            or array.dtype.kind == "O"
        ):
            self._held += array.nbytes
            return array
        if self._spill is None:
            self._spill = tempfile.TemporaryDirectory(prefix="onnxprune-")
        self._files += 1
        path = Path(self._spill.name, str(self._files))
        array.tofile(path)
        kept = np.memmap(path, mode="r", dtype=array.dtype, shape=array.shape)
        if os.name == "posix":
            path.unlink()  # the mapping stays until nothing needs it: then the space is free
        return kept


def _in_memory(array: AnyArray) -> int:
    return 0 if isinstance(array, np.memmap) else array.nbytes
