"""The part of a model that a cut changes, as a model of its own.

Behind the nodes that read a cut channel everything is new; before them nothing is. So the tensors
at the border are taken from one run of the original, and only what lies behind is run again. The
weights that a cut zeroes are inputs of the sub-model, so that one session serves every ratio.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx
from onnx import helper

from onnxprune.feeds import Batch, inputs_of
from onnxprune.graph import Graph, Node
from onnxprune.groups import DependencyGraph
from onnxprune.model import Model, Weight
from onnxprune.restored_twin import Reader, Restored, shift_shape
from onnxprune.runtime import Session, session
from onnxprune.select import PruningPlan
from onnxprune.skeleton import LARGE
from onnxprune.twin import TwinEdits, twin_edits
from onnxprune.types import AnyArray

_FIRST_IR_WITH_PRIVATE_INITIALIZERS = 4


def families(graph: DependencyGraph) -> tuple[tuple[int, ...], ...]:
    """Ids of the prunable groups that must be cut together, in order of the first."""
    parent = {group.id: group.id for group in graph.prunable}

    def root(group: int) -> int:
        while parent[group] != group:
            group = parent[group]
        return group

    for balance in graph.balance_sets:
        roots = sorted({root(cell.group) for cell in balance.cells})
        parent.update(dict.fromkeys(roots, roots[0]))
    found: dict[int, list[int]] = {}
    for group in graph.prunable:
        found.setdefault(root(group.id), []).append(group.id)
    return tuple(map(tuple, found.values()))


def part(
    graph: Graph,
    outputs: Sequence[str],
    fed: Mapping[str, onnx.TypeProto],
    masks: Mapping[tuple[int, int], str] | None = None,
    shifts: Mapping[int, str] | None = None,
) -> Model:
    """The nodes between some tensors and others, as a model.

    Args:
        graph: The prepared model.
        outputs: Tensors to give.
        fed: Type of each tensor, constants among them, that is an input; what lies before them is
            left out.
        masks: For the index of a node and the position of one of its inputs, the name of a fed
            tensor that this input is multiplied by.
        shifts: For the index of a node, the name of a fed tensor that is added to its output.
    """
    chosen = sorted(_between(graph, outputs, fed), key=lambda node: node.index)
    source = graph.model.proto
    proto = onnx.ModelProto(ir_version=max(source.ir_version, _FIRST_IR_WITH_PRIVATE_INITIALIZERS))
    proto.opset_import.extend(source.opset_import)
    proto.functions.extend(source.functions)
    proto.graph.name = "part"
    for node in chosen:
        proto.graph.node.extend(_edited(node, masks or {}, (shifts or {}).get(node.index)))
    names = {name for node in chosen for name in (*node.inputs, *node.captures)}
    deferred: dict[str, Weight] = {}
    for name in sorted((names & set(graph.constants)) - set(fed)):
        weight = graph.constants[name].weight
        if weight.nbytes > LARGE:
            kind, shape = weight.data_type, weight.shape
            deferred[name] = Weight.lazily(name, shape, kind, weight.read)
            proto.graph.initializer.append(onnx.TensorProto(name=name, data_type=kind, dims=shape))
        else:
            tensor = weight.to_proto()
            tensor.name = name
            proto.graph.initializer.append(tensor)
    for name, kind_of in fed.items():
        proto.graph.input.append(onnx.ValueInfoProto(name=name, type=kind_of))
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    return Model(proto, graph.model.directory, deferred)


def _between(graph: Graph, outputs: Iterable[str], fed: Mapping[str, object]) -> list[Node]:
    found: dict[int, Node] = {}
    pending = [name for name in outputs if name not in fed]
    while pending:
        node = graph.producer.get(pending.pop())
        if node is not None and node.index not in found:
            found[node.index] = node
            pending += [n for n in (*node.inputs, *node.captures) if n and n not in fed]
    return list(found.values())


def _edited(
    node: Node, masks: Mapping[tuple[int, int], str], shift: str | None
) -> Iterator[onnx.NodeProto]:
    positions = [p for p in range(len(node.inputs)) if (node.index, p) in masks]
    if not positions and shift is None:
        yield node.proto
        return
    copy = onnx.NodeProto()
    copy.CopyFrom(node.proto)
    for position in positions:
        mask = masks[node.index, position]
        copy.input[position] = f"{mask}_product"
        yield helper.make_node("Mul", [node.inputs[position], mask], [copy.input[position]])
    if shift is not None:
        copy.output[0] = f"{shift}_before"
    yield copy
    if shift is not None:
        yield helper.make_node("Add", [copy.output[0], shift], [node.outputs[0]])


@dataclass(frozen=True)
class Suffix:
    """What is new behind a cut.

    Attributes:
        graph: The analysis.
        changed: Constants that some of the cuts zero.
        masks: Inputs of nodes (index, position) that some of the cuts multiply by a mask, and the
            name of the mask.
        border: Tensors made before any cut that nodes behind it read, graph inputs included.
        outputs: Graph outputs that the cuts can change.
        edits: What each plan does.
        readers: Layers that are restored.
    """

    graph: DependencyGraph
    changed: tuple[str, ...]
    masks: Mapping[tuple[int, int], str]
    border: tuple[str, ...]
    outputs: tuple[str, ...]
    edits: tuple[TwinEdits, ...]
    readers: tuple[Reader, ...] = ()

    @classmethod
    def of(cls, plans: Sequence[PruningPlan], readers: Sequence[Reader] = ()) -> Suffix:
        """The suffix that serves several plans of one graph, some layers of it restored."""
        dependency = plans[0].graph
        graph = dependency.graph
        edits = [twin_edits(plan) for plan in plans]
        changed = _changed(graph, edits)
        masks = {
            (node.index, mask.input): f"onnxprune_mask_{node.index}_{mask.input}"
            for one in edits
            for node, mask in one.masks
        }
        edited = {index for index, _ in masks} | {reader.node.index for reader in readers}
        border, outputs = _frontier(dependency, changed, edited)
        return cls(
            dependency,
            tuple(sorted(changed)),
            masks,
            border,
            outputs,
            tuple(edits),
            tuple(readers),
        )

    @cached_property
    def shifts(self) -> Mapping[int, str]:
        """Name of what is added to the output of each restored layer, by index of its node."""
        return {r.node.index: f"onnxprune_shift_{r.node.index}" for r in self.readers}

    @cached_property
    def nodes(self) -> Sequence[Node]:
        """Nodes that are run again."""
        fed = dict.fromkeys((*self.border, *self.changed))
        return _between(self.graph.graph, self.outputs, fed)

    def feeds(self, number: int, restored: Restored | None = None) -> dict[str, AnyArray]:
        """What one plan feeds besides the border: changed constants, masks, what is restored.

        Args:
            number: Of the plan.
            restored: What makes up for it; needed where there are readers.
        """
        edits = self.edits[number]
        graph, env = self.graph.graph, self.graph.envs[0]
        feeds: dict[str, AnyArray] = {}
        for name in self.changed:
            values = graph.constants[name].weight.read()
            edit = edits.constants.get(name)
            feeds[name] = values if edit is None else np.ascontiguousarray(edit.compute(values))
        for (index, position), name in self.masks.items():
            dtype = helper.tensor_dtype_to_np_dtype(
                env.data_type(graph.nodes[index].inputs[position])
            )
            feeds[name] = np.ones((1,), dtype)
        for node, mask in edits.masks:
            values = np.ones(mask.shape, np.float32)
            values.reshape(-1)[list(mask.zero)] = 0
            name = self.masks[node.index, mask.input]
            feeds[name] = values.astype(feeds[name].dtype)
        if restored is not None:
            feeds |= restored.weights
            feeds |= self._shifts(restored)
        return feeds

    def _shifts(self, restored: Restored) -> Iterator[tuple[str, AnyArray]]:
        env = self.graph.envs[0]
        for reader in self.readers:
            made = reader.node.outputs[0]
            dtype = helper.tensor_dtype_to_np_dtype(env.data_type(made))
            shift = restored.shifts.get(reader.node.index, np.zeros(1))
            shape = shift_shape(reader.node, len(env.shape(made) or ()))
            yield self.shifts[reader.node.index], shift.reshape(shape).astype(dtype)

    def load(self, border: Batch, feeds: Batch, *, threads: int | None = None) -> Session:
        """A session that takes the border and the feeds of a plan.

        Args:
            border: The border of one batch, which tells the types.
            feeds: Of any one plan.
            threads: As in ``runtime.session``.
        """
        static = all(
            value.dims is not None and None not in value.dims
            for value in inputs_of(self.graph.graph.model)
        )
        env = self.graph.envs[0]
        types = {
            name: _tensor_type(array, exact=static and env.shape(name) == array.shape)
            for name, array in border.items()
        }
        broadcast = {*self.masks.values(), *self.shifts.values()}
        types |= {
            name: _tensor_type(array, exact=name not in broadcast) for name, array in feeds.items()
        }
        made = part(self.graph.graph, self.outputs, types, self.masks, self.shifts)
        return session(made, threads=threads)


def _tensor_type(array: AnyArray, *, exact: bool) -> onnx.TypeProto:
    element = helper.np_dtype_to_tensor_dtype(array.dtype)
    dims: Sequence[int | None] = array.shape if exact else [None] * array.ndim
    return helper.make_tensor_type_proto(element, dims)


def _changed(graph: Graph, edits: Sequence[TwinEdits]) -> set[str]:
    """Constants that differ from the original under some plan.

    What only makes a channel changes where it is not finite; mostly it is, and then nothing
    before the readers has to be run again.
    """
    changed: set[str] = set()
    finite: dict[str, bool] = {}
    for one in edits:
        for name in one.constants:
            if name not in one.readers and name not in finite:
                finite[name] = _is_finite(graph.constants[name].weight.read())
            if name in one.readers or not finite[name]:
                changed.add(name)
    return changed


def _is_finite(array: AnyArray) -> bool:
    if array.dtype.kind in "iub":
        return True
    return bool(np.isfinite(array.astype(np.float32, copy=False)).all())


def _frontier(
    dependency: DependencyGraph, changed: set[str], masked: set[int]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Tensors at the border, and graph outputs behind it."""
    graph = dependency.graph
    new, behind = set(changed), []
    for node in graph.nodes:
        if node.index in masked or any(n in new for n in (*node.inputs, *node.captures)):
            new.update(name for name in node.outputs if name)
            behind.append(node)
    outputs = tuple(name for name in dict.fromkeys(graph.outputs) if name in new)
    border: dict[str, None] = {}
    seen: set[str] = set()
    pending = list(outputs)
    while pending:
        name = pending.pop()
        if not name or name in seen or name in graph.constants:
            continue
        seen.add(name)
        maker = graph.producer.get(name)
        again = name in new or name in graph.derived or not _is_tensor(dependency, name)
        if maker is None or not again:
            border[name] = None
        else:
            pending += [*maker.inputs, *maker.captures]
    place = {name: node.index for name, node in graph.producer.items()}
    return tuple(sorted(border, key=lambda name: (place.get(name, -1), name))), outputs


def _is_tensor(dependency: DependencyGraph, name: str) -> bool:
    """Whether numpy can hold it; what it cannot is computed again instead."""
    found = dependency.envs[0].types.get(name)
    return (
        found is not None
        and found.HasField("tensor_type")
        and found.tensor_type.elem_type not in (onnx.TensorProto.UNDEFINED, onnx.TensorProto.STRING)
    )


class Borders:
    """Tensors of the original, by batch, kept for as many suffixes as memory allows.

    Args:
        graph: The prepared model.
        batches: What it is run on.
        wanted: For each suffix the tensors it asks for, in the order the suffixes are likely to
            come.
        sizes: About how many bytes each tensor takes over all batches.
        budget: Bytes that may be kept; a suffix that needs more gets one batch at a time.
        threads: As in ``runtime.session``.
    """

    def __init__(
        self,
        graph: Graph,
        batches: Sequence[Batch],
        wanted: Mapping[int, Sequence[str]],
        sizes: Mapping[str, int],
        budget: int,
        threads: int | None,
    ) -> None:
        self._graph = graph
        self._batches = batches
        self._wanted = wanted
        self._sizes = sizes
        self._budget = budget
        self._threads = threads
        self._held: frozenset[int] = frozenset()
        self._kept: list[dict[str, AnyArray]] = []

    def of(self, number: int) -> Iterator[dict[str, AnyArray]]:
        """The tensors of one suffix, a mapping for each batch; what is no tensor is left out."""
        if number not in self._held:
            self._held, self._kept = frozenset(), []
            together = self._together(number)
            if not together:
                yield from self._run(self._wanted[number])
                return
            names = dict.fromkeys(name for one in together for name in self._wanted[one])
            self._kept, self._held = list(self._run([*names])), frozenset(together)
        wanted = self._wanted[number]
        yield from ({n: kept[n] for n in wanted if n in kept} for kept in self._kept)

    def _together(self, number: int) -> list[int]:
        """The suffix and those after it whose tensors fit into memory at once."""
        order = list(self._wanted)
        names: set[str] = set()
        chosen: list[int] = []
        for one in order[order.index(number) :]:
            names |= set(self._wanted[one])
            if sum(self._sizes.get(name, 0) for name in names) > self._budget:
                break
            chosen.append(one)
        return chosen

    def _run(self, names: Sequence[str]) -> Iterator[dict[str, AnyArray]]:
        inputs = {value.name: value for value in self._graph.model.proto.graph.input}
        made = [name for name in names if name in self._graph.producer]
        fed = {name: inputs[name].type for name in self._graph.inputs}
        loaded = session(part(self._graph, made, fed), threads=self._threads) if made else None
        for batch in self._batches:
            got = loaded.run(batch) if loaded is not None else {}
            seen = got.keys() | batch.keys()
            yield {name: (got if name in got else batch)[name] for name in names if name in seen}


def border_bytes(
    graph: DependencyGraph, names: Iterable[str], batches: Sequence[Batch]
) -> dict[str, int]:
    """About how many bytes tensors take over all batches, from their size at the stand-ins."""
    env = graph.envs[0]
    stand_in = sum(int(np.prod(shape, dtype=np.int64)) for shape in graph.stand_ins.values())
    fed = sum(array.size for batch in batches for array in batch.values())
    scale = fed / max(stand_in, 1)
    sizes: dict[str, int] = {}
    for name in names:
        shape, kind = env.shape(name), env.data_type(name)
        if shape is not None and kind != onnx.TensorProto.UNDEFINED:
            each = helper.tensor_dtype_to_np_dtype(kind).itemsize
            sizes[name] = int(np.prod(shape, dtype=np.int64) * each * scale)
    return sizes
