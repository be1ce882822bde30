"""The forward pass: every rule applied in order, repeated until no component changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

import onnxprune.ops  # noqa: F401  (registers the rules)
from onnxprune import copies, fields, moves
from onnxprune.effects import (
    Adopts,
    Consumes,
    Contracts,
    Effect,
    Freeze,
    Heads,
    Inexact,
    Later,
    Produces,
    Rows,
    Tie,
)
from onnxprune.graph import Graph, Node
from onnxprune.ops.plain import lookup_rows
from onnxprune.ops.registry import Entry, lookup
from onnxprune.ops.view import Copies, OpView, Value
from onnxprune.rows import RowRule, Signature, row_signature
from onnxprune.runs import Run
from onnxprune.shapes import Environment
from onnxprune.slots import PassBirths, SlotTable, content
from onnxprune.types import BoolArray, IntArray, Shape

_MOST_PASSES = 24
# Operators that present a constant element by element, so that slots of its elements carry over.
_QUANTIZING = {"DequantizeLinear", "QuantizeLinear"}
PRESERVING = {"Cast", "CastLike", "Identity", "DequantizeLinear", "QuantizeLinear"}


@dataclass(frozen=True, slots=True)
class Contraction:
    """A product of two activations over channels that no weight reads."""

    node: Node
    effect: Contracts


@dataclass
class Trace:
    """Result of the analysis under one environment.

    Attributes:
        fields: Fields of each tensor that has any, compressed.
        elements: Slots of the elements of a moved constant, where a grid met it.
        rows: Rows that rules asked for.
        cuts: For the content of a grid, which of its varying axes is cut.
        classes: Class of each slot when the passes had settled.
        grids: Fields that vary on several axes, one for each content.
    """

    env: Environment
    fields: dict[str, list[IntArray]] = field(default_factory=dict)
    elements: dict[str, IntArray] = field(default_factory=dict)
    rows: list[RowRule] = field(default_factory=list)
    grids: dict[bytes, IntArray] = field(default_factory=dict)
    contractions: list[Contraction] = field(default_factory=list)
    cuts: Mapping[bytes, int] = field(default_factory=dict)
    classes: IntArray = field(default_factory=lambda: np.zeros(1, np.int64))

    def cut_axis(self, f: IntArray) -> int | None:
        """Axis of a grid along which its rows shrink, None where that is not asked for."""
        labels = fields.compress(f, self.classes)
        moving = fields.varying(labels) if labels is not None else ()
        if labels is None or len(moving) < 2:
            return None
        position = self.cuts.get(content(labels))
        return None if position is None else moving[position]


@dataclass
class Tracer:
    """Runs passes over a graph under one or several environments that share their slots."""

    graph: Graph
    envs: Sequence[Environment]
    runs: Mapping[int, Run]
    attention: str = "heads"
    allow_norm: bool = False
    table: SlotTable = field(init=False)
    traces: list[Trace] = field(default_factory=list)
    producing: BoolArray = field(default_factory=lambda: np.zeros(0, np.bool_))
    consuming: BoolArray = field(default_factory=lambda: np.zeros(0, np.bool_))
    contracted: BoolArray = field(default_factory=lambda: np.zeros(0, np.bool_))
    effective: BoolArray = field(default_factory=lambda: np.zeros(0, np.bool_))
    inexact: BoolArray = field(default_factory=lambda: np.zeros(0, np.bool_))
    heads: BoolArray = field(default_factory=lambda: np.zeros(0, np.bool_))
    reasons: list[tuple[IntArray, str]] = field(default_factory=list)
    undecided: list[Effect] = field(default_factory=list)
    adopted: dict[tuple[str, int], IntArray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.table = SlotTable(self.graph)
        self.skipped = {node.index for run in self.runs.values() for node in run.nodes[1:]}
        self.entries = [lookup(n.op_type, n.domain, n.since) for n in self.graph.nodes]

    def settle(self, extra: Sequence[Effect] = ()) -> None:
        """Repeat the pass until nothing changes; ``extra`` effects come on top.

        What rules could not decide by then takes what they fall back to, and it goes on.
        """
        added = list(extra)
        for _ in range(_MOST_PASSES):
            if self._pass(added):
                continue
            if not self.undecided:
                return
            added += self.undecided

    def _pass(self, extra: Sequence[Effect]) -> bool:
        walks, adopted = [], len(self.adopted)
        for position, env in enumerate(self.envs):
            walk = _Walk(self, env, self.signature(position))
            walk.run()
            walks.append(walk)
        for effect in extra:
            walks[0].take(effect, "")
        self.table.grow()
        size = self.table.size
        ties = [tie for walk in walks for tie in walk.ties]
        freezes = [f for walk in walks for f in walk.freezes]
        a = np.concatenate([t[0] for t in ties]) if ties else np.zeros(0, np.int64)
        b = np.concatenate([t[1] for t in ties]) if ties else np.zeros(0, np.int64)
        cold = np.concatenate([f[0] for f in freezes]) if freezes else np.zeros(0, np.int64)
        self.producing = _mark(size, [s for walk in walks for s in walk.produced])
        self.consuming = _mark(size, [s for walk in walks for s in walk.consumed])
        self.contracted = _mark(size, [-s for walk in walks for s in walk.contracted])
        self.inexact = _mark(size, [-s for walk in walks for s in walk.inexact])
        # Once a head is tied whole nothing marks it again, so what was seen stays seen.
        heads = _mark(size, [-s for walk in walks for s in walk.heads])
        heads[: self.heads.size] |= self.heads
        self.heads = heads
        self.effective = _mark(size, [a, b, *(s for walk in walks for s in walk.touched)])
        self.effective |= self.producing | self.consuming
        self.reasons = [*self.reasons, *freezes]
        self.traces = [walk.trace for walk in walks]
        self.undecided = [effect for walk in walks for effect in walk.undecided]
        return self.table.merge(a, b, cold) or len(self.adopted) > adopted

    def signature(self, position: int) -> Signature:
        """Rows that each component lies in, as the last pass under one environment found."""
        self.table.grow()
        rules = self.traces[position].rows if self.traces else []
        now = [replace(rule, classes=self.table.classes(rule.classes)) for rule in rules]
        return row_signature(now, self.table.size)


def _mark(size: int, slots: Sequence[IntArray]) -> BoolArray:
    """Flag the slots of constants among ``slots``; classes do not count."""
    marked = np.zeros(size, np.bool_)
    for array in slots:
        marked[array[array > 0]] = True
    return marked


class _Walk:
    """One walk over the nodes under one environment."""

    def __init__(self, tracer: Tracer, env: Environment, signature: Signature) -> None:
        self.tracer = tracer
        self.graph = tracer.graph
        self.env = env
        self.table = tracer.table
        self.births = PassBirths(tracer.table, env.shape, signature=signature)
        self.trace = Trace(env)
        self.births.seen = self.trace.elements
        self.ties: list[tuple[IntArray, IntArray]] = []
        self.freezes: list[tuple[IntArray, str]] = []
        self.produced: list[IntArray] = []
        self.consumed: list[IntArray] = []
        self.contracted: list[IntArray] = []
        self.touched: list[IntArray] = []
        self.heads: list[IntArray] = []
        self.inexact: list[IntArray] = []
        self.undecided: list[Effect] = []
        self.copies: dict[str, Sequence[Copies]] = {}
        self.kept: dict[tuple[Shape, bytes], IntArray | None] = {}
        self.shared: dict[tuple[Shape, bytes], IntArray] = {}
        self.outputs = frozenset(self.graph.outputs)
        self.given = {name: name for name in self.graph.inputs}  # what inputs are rearranged to

    def run(self) -> None:
        for node in self.graph.nodes:
            if node.index not in self.tracer.skipped:
                self._node(node)

    def _node(self, node: Node) -> None:
        run = self.tracer.runs.get(node.index)
        last = run.nodes[-1] if run else node
        view = self._view(node, last)
        for name in node.captures:
            self._freeze_captured(node, name)
        rule = self._effects(view, self.tracer.entries[node.index], run)
        for effect in rule:
            self.take(effect, node.label, node)
        if node.op_type in copies.REPEATING:
            view.out([*view.outputs.get(0, []), *self._repeated(view), *self._adopted(view)])
        elif run is None:
            self._keep_copies(copies.carried(view, self.tracer.entries[node.index], node), node)
        if all(v.derived for v in view.present) and view.present:
            self._note_derived(view, run)
        entry = self.tracer.entries[node.index]
        source = self.given.get(node.inputs[0], "") if node.inputs else ""
        rearranged = node.op_type in PRESERVING or (entry is not None and entry.move is not None)
        for position, name in enumerate(last.outputs):
            if name and source and rearranged:
                self.given[name] = source
            if name:
                self._settle(name, view.outputs.get(position, []), last)

    def _view(self, node: Node, last: Node) -> OpView:
        inputs = tuple(self._value(name) if name else None for name in node.inputs)
        shapes = tuple(self.env.shape(name) if name else None for name in last.outputs)
        tracer = self.tracer
        options = (tracer.attention, tracer.allow_norm, node.since)
        return OpView(node, inputs, shapes, self.env, self.births, *options)

    def _value(self, name: str) -> Value:
        shape = self.env.shape(name)
        constant = self.graph.constants.get(name)
        if constant is not None and name not in self.trace.fields:
            self._bear(name)
        return Value(
            name,
            shape if shape is not None else (),
            self.trace.fields.get(name, []),
            name in self.graph.derived,
            self.env.values.get(name),
            self.given.get(name, ""),
            self.copies.get(name, ()),
        )

    def _bear(self, name: str) -> None:
        """Give a constant a field for each of its axes."""
        constant = self.graph.constants[name]
        shape = constant.weight.shape
        born = []
        for axis, extent in enumerate(shape):
            if extent > 1:
                f = self.table.born(name, shape, (axis,))
                if f is not None:
                    born.append(f)
                    if constant.pinned:
                        self.freezes.append((f.reshape(-1), f"'{name}' {constant.pinned}"))
        self.trace.fields[name] = born

    def _effects(self, view: OpView, entry: Entry | None, run: Run | None) -> Iterator[Effect]:
        labelled = any(v.fields for v in view.present)
        if not labelled:
            return iter(())
        node = view.node
        unknown = [
            name
            for name in (*node.inputs, *node.outputs)
            if name and self.env.shape(name) is None and self._matters(name)
        ]
        if entry is None:
            return view.freeze(view.inputs, "has no rule")
        if unknown and run is None:
            return view.freeze(view.inputs, f"has a tensor of unknown shape ('{unknown[0]}')")
        if run is not None:
            return _run_effects(view, run)
        if entry.move is not None:
            return _movement_effects(view, entry)
        assert entry.rule is not None
        return entry.rule(view)

    def _repeated(self, view: OpView) -> list[IntArray]:
        """Fields of copies that are as many as the channels of another tensor: they go together."""
        shape = view.node.inputs[-1]
        maker = self.graph.producer.get(shape)
        made = view.out_shapes[0]
        if maker is None or maker.op_type != "Shape" or made is None:
            return []
        whole = self.env.shape(maker.inputs[0])
        if whole is None:
            return []
        seen = slice(maker.int("start", 0), maker.int("end", len(whole)))
        source = view.x.shape if len(view.inputs) > 1 else ()
        if made != whole[seen]:
            return []
        before = fields.lift_shape(source, len(made))
        found = []
        for f in self.trace.fields.get(maker.inputs[0], []):
            inner = f.shape[seen]
            if np.prod(inner) == f.size and all(
                before[axis] == 1 for axis, size in enumerate(inner) if size > 1
            ):
                found.append(f.reshape(inner))
        return found

    def _adopted(self, view: OpView) -> list[IntArray]:
        """Labels that copies took over from what they met in an earlier pass."""
        found = copies.made(view)
        self._keep_copies(found, view.node)
        known = [(one, self.tracer.adopted.get((one.tensor, one.axis))) for one in found]
        return [
            fields.along(slots, one.axis, one.places.ndim)
            for one, slots in known
            if slots is not None and slots.size == one.places.size
        ]

    def _keep_copies(self, found: Sequence[Copies], node: Node) -> None:
        if found:
            self.copies[node.outputs[0]] = found

    def _matters(self, name: str) -> bool:
        return name in self.trace.fields or name not in self.graph.constants

    def take(self, effect: Effect, label: str, node: Node | None = None) -> None:
        """Record one effect."""
        match effect:
            case Tie(a, b):
                left, right = np.broadcast_arrays(a, b)
                self._tie(left.reshape(-1), right.reshape(-1), label)
            case Freeze(slots, reason):
                self._freeze(slots, reason)
            case Rows(f, axes, hard):
                self._rows(f, axes, hard)
            case Adopts(tensor, axis, slots):
                known = self.tracer.adopted.setdefault((tensor, axis), slots)
                if known.shape == slots.shape:
                    self._tie(known.reshape(-1), slots, label)
                else:
                    self._freeze(slots, f"'{label}' meets copies of another number")
            case Produces(slots):
                self.produced.append(slots)
            case Consumes(slots):
                self.consumed.append(slots)
            case Inexact(slots):
                self.inexact.append(self.table.classes(slots))
            case Heads(slots):
                self.heads.append(self.table.classes(slots))
            case Later(wanted):
                self.undecided.append(wanted)
            case Contracts(f, _, _):
                self.contracted.append(self.table.classes(f))
                assert node is not None
                self.trace.contractions.append(Contraction(node, effect))

    def _tie(self, a: IntArray, b: IntArray, label: str) -> None:
        # Slot 0 is no channel: being tied to it means being kept, without joining everything kept.
        kept_a, kept_b = a == 0, b == 0
        if kept_a.any() or kept_b.any():
            self._freeze(np.concatenate([b[kept_a], a[kept_b]]), f"'{label}' ties it to what stays")
            free = ~(kept_a | kept_b)
            a, b = a[free], b[free]
        if a.size:
            self.ties.append((a, b))

    def _freeze(self, slots: IntArray, reason: str) -> None:
        slots = slots.reshape(-1)
        slots = slots[slots != 0]
        if slots.size:
            self.freezes.append((slots, reason))

    def _rows(self, f: IntArray, axes: Sequence[int], hard: bool) -> None:
        labels = self._compress(f)
        if labels is None:
            return
        moving = fields.varying(labels)
        rows = tuple(axis for axis in axes if axis in moving)
        if len(rows) == len(moving):
            if hard and moving:
                # Rows of one coupled channel each: none can go without the others.
                self._freeze(labels, "every row must keep its only channel")
            return
        if not rows:
            return
        self.trace.rows.append(RowRule(labels, rows, hard))

    def _note_derived(self, view: OpView, run: Run | None) -> None:
        """Remember how a constant-derived tensor shows the constant, for slots of its elements."""
        node = view.node
        source, entry = node.inputs[0], self.tracer.entries[node.index]
        name = (run.nodes[-1] if run else node).outputs[0]
        if node.op_type in PRESERVING:
            scale = view.get(1) if node.op_type in _QUANTIZING else None
            scaled = scale is not None and scale.shape not in ((), (1,))
            if not scaled or view.axis("axis", 1, view.x.rank) == 0:
                self.births.same[name] = source
            if scaled:
                self.births.scaled.add(name)
        elif entry is not None and entry.move is not None and view.out_shapes[0] is not None:
            steps = entry.move(view, view.x.shape, [s or () for s in view.out_shapes])
            if steps:
                shape = view.x.shape
                self.births.moved[name] = (source, lambda f: moves.run(steps[0], f, shape))

    def _freeze_captured(self, node: Node, name: str) -> None:
        reason = f"'{name}' is read inside a subgraph of {node.op_type} '{node.label}'"
        if name in self.graph.constants:
            self._value(name)
        for f in self.trace.fields.get(name, []):
            self._freeze(f, reason)

    def _settle(self, name: str, found: Sequence[IntArray], node: Node) -> None:
        """Compress the fields of a new tensor, drop what is kept or doubled, freeze content."""
        result: list[IntArray] = []
        compressed: list[IntArray] = []
        derived = name in self.graph.derived
        for f in found:
            labels = self._compress(f)
            if labels is None:
                # A constant keeps even what is frozen, so that a report can name it.
                result += [f] if derived else []
                continue
            if labels.size == 1:
                why = f"{node.op_type} '{node.label}' turns one channel into content"
                self._freeze(labels, why)
                continue
            if any(labels is other for other in compressed):
                continue
            compressed.append(labels)
            # A constant keeps its slots: what is said of them names the weight they belong to.
            result.append(f if derived else labels)
            if not derived:
                self.touched.append(f)
            if len(fields.varying(labels)) > 1:
                self.trace.grids.setdefault(content(labels), labels)
        if name in self.outputs:
            for f in result:
                self._freeze(f, f"reaches output '{name}' through {node.op_type} '{node.label}'")
        if result:
            self.trace.fields[name] = result

    def _compress(self, f: IntArray) -> IntArray | None:
        key = (f.shape, f.tobytes())
        if key not in self.kept:
            self.table.grow()
            self.kept[key] = self._shared(fields.compress(f, self.table.resolved))
        return self.kept[key]

    def _shared(self, labels: IntArray | None) -> IntArray | None:
        """One array for each content, so that later stages can remember what they found for it."""
        if labels is None:
            return None
        return self.shared.setdefault((labels.shape, labels.tobytes()), labels)


def _run_effects(view: OpView, run: Run) -> Iterator[Effect]:
    rank = view.x.rank
    view.out([fields.take(f, run.axis, run.indices) if rank else f for f in view.x.fields])
    yield from ()


def _movement_effects(view: OpView, entry: Entry) -> Iterator[Effect]:
    assert entry.move is not None
    source, targets = view.x.shape, [shape or () for shape in view.out_shapes]
    steps = entry.move(view, source, targets)
    if steps is None:
        if view.node.op_type == "Gather":
            yield from lookup_rows(view)
        else:
            yield from view.freeze([view.x], "moves data in a way that is not known")
        return
    for position, output in enumerate(steps):
        view.out([moves.run(output, f, source) for f in view.x.fields], position)
