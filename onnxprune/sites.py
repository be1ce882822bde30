"""Which layers a cut left with other inputs, and what each can be compared with in the original."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import onnx

from onnxprune.graph import Graph, Node
from onnxprune.layers import Layer, layer_at
from onnxprune.shapes import Environment
from onnxprune.shown import Shown
from onnxprune.survivors import Survivors
from onnxprune.types import Shape

_LAYERS = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
# Other operators that sum over channels with weights.
_OTHERS = set(
    """
    Attention ConvInteger DeformConv Einsum FusedConv FusedGemm FusedMatMul GRU LSTM MatMulInteger
    MatMulNBits QAttention QLinearConv QLinearMatMul RNN
    """.split()  # noqa: SIM905  (read as lines)
)


@dataclass(frozen=True)
class Site:
    """A layer to refit, and where its output is compared.

    Attributes:
        layer: The layer in the pruned graph.
        shown: How the constant that holds the weight becomes what the node reads.
        norm: BatchNormalization that alone reads the layer, folded into it for the fit.
        added: Node and input position of a constant that is added to a MatMul.
        made: Tensor that is compared.
        total: Sum that the original should get there, "" where there is none.
        other: The other summand.
        ties: Other layers that read the same constant: one fit serves all of them.
    """

    layer: Layer
    shown: Shown
    norm: Node | None
    added: tuple[Node, int] | None
    made: str
    total: str = ""
    other: str = ""
    ties: tuple[Site, ...] = ()

    @property
    def all(self) -> tuple[Site, ...]:
        """This layer and those that are tied to it."""
        return (self, *self.ties)

    @property
    def goal(self) -> str:
        """Tensor of the original that the output is fitted to."""
        return self.total or self.made


@dataclass(frozen=True)
class Unfit:
    """A layer whose inputs are not what they were and that cannot be refitted."""

    node: Node
    why: str


def sites(
    work: Graph, original: Graph, survivors: Survivors, also: frozenset[str] = frozenset()
) -> Iterator[Site | Unfit]:
    """Layers whose inputs are no longer what they were, in execution order.

    Args:
        work: The pruned graph.
        original: What it was cut from.
        survivors: What is left of each tensor.
        also: First outputs of layers that count as such whatever they read.
    """
    return _Walk(work, original, survivors, also).run()


class _Walk:
    def __init__(
        self, work: Graph, original: Graph, survivors: Survivors, also: frozenset[str]
    ) -> None:
        self.work = work
        self.also = also
        self.original = original
        self.survivors = survivors
        self.env: Environment = survivors.trace.env
        self.folded: set[int] = set()  # norms that a layer in front of them is fitted with
        trace, dead = survivors.trace, survivors.dead
        self.narrowed = {  # products of two activations over less
            contraction.node.key
            for contraction in trace.contractions
            if dead.of(trace.classes[np.abs(contraction.effect.field)]).any()
        }

    def run(self) -> Iterator[Site | Unfit]:
        moved = self._moved()
        tied: set[str] = set()
        for node in self.work.nodes:
            if node.key in self.work.derived or node.index in self.folded:
                continue
            found = self._found(node, moved)
            if isinstance(found, Site):
                if found.shown.leaf in tied:
                    continue
                if found.norm is not None:
                    self.folded.add(found.norm.index)
                tied.update(found.shown.leaf for _ in found.ties[:1])
            if found is not None:
                yield found

    def _found(self, node: Node, moved: set[int]) -> Site | Unfit | None:
        """What a node is to refitting; None where it is no layer or nothing of it moved."""
        if node.op_type == "BatchNormalization":
            return self._norm(node) if node.index in moved else None
        if self._sums(node) and node.index in moved:
            return Unfit(node, f"{node.op_type} is no plain product")
        if node.index in moved and _holds_layers(node.proto):
            return Unfit(node, "the layers inside of it are not refitted")
        if node.op_type not in _LAYERS or node.domain or len(node.inputs) < 2:
            return None
        position = self._weight_position(node)
        if position is None:
            computed = node.op_type != "MatMul" and node.index in moved
            return Unfit(node, "its weight is computed at run time") if computed else None
        ends = self._ends(node.inputs[position])
        if not any(reader.index in moved for reader, _, _ in ends):
            return None
        found = self._fitting(node, position, ends)
        return None if isinstance(found, Unfit) and node.index not in moved else found

    def _weight_position(self, node: Node) -> int | None:
        constant = [name in self.work.derived for name in node.inputs[:2]]
        if constant[1]:
            return 1
        return 0 if constant[0] and node.op_type in ("MatMul", "Gemm") else None

    def _moved(self) -> set[int]:
        """Nodes whose inputs are not the original's, or that sum over less."""
        moved: set[int] = set()
        names: set[str] = set()
        for node in self.work.nodes:
            if node.key in self.work.derived:
                continue
            cut = self.survivors.cut
            lost = any(name and cut(name) and name not in self.work.constants
                       for name in node.inputs)  # fmt: skip
            sums = lost and not all(cut(name) for name in node.outputs if name)
            reads = sums or (lost and (self._sums(node) or self._narrower(node)))
            reads = reads or node.key in self.also or node.key in self.narrowed
            if reads or names.intersection((*node.inputs, *node.captures)):
                moved.add(node.index)
                names.update(name for name in node.outputs if name)
        return moved

    def _sums(self, node: Node) -> bool:
        """Whether an operator that is no plain layer sums over channels with weights."""
        weightless = node.op_type == "Attention" and not node.domain
        weighted = not weightless and any(name in self.work.derived for name in node.inputs)
        return node.op_type in _OTHERS and weighted

    def _narrower(self, node: Node) -> bool:
        """Whether a node sums over an axis that was cut."""
        position = self._weight_position(node) if node.op_type in _LAYERS else None
        if position is None:
            return False
        layer = layer_at(self.work, node, position, "")
        if layer is None:  # a form that is not refitted, but whose output is another
            return True
        rank = len(self.env.shape(layer.data) or ())
        if not rank:
            return False
        shape = self.env.shape(layer.seen) or ()
        if layer.kind in ("conv", "deconv") and layer.groups > 1 and shape and shape[1] == 1:
            return False
        return self.survivors.alive(layer.data, layer.axis % rank) is not None

    # -- one layer ---------------------------------------------------------------------------------

    def _ends(self, name: str) -> list[tuple[Node, int, tuple[Node, ...]]]:
        """Every node that reads the constant behind a tensor, where, and through what."""
        while name not in self.work.constants:
            name = self.work.producer[name].inputs[0]
        pending: list[tuple[str, tuple[Node, ...]]] = [(name, ())]
        found = []
        while pending:
            tensor, through = pending.pop()
            for reader, position in self.work.consumers.get(tensor, ()):
                if reader.key in self.work.derived:
                    pending.append((reader.outputs[0], (*through, reader)))
                else:
                    found.append((reader, position, through))
        return sorted(found, key=lambda end: end[0].index)

    def _fitting(
        self, node: Node, position: int, ends: list[tuple[Node, int, tuple[Node, ...]]]
    ) -> Site | Unfit:
        readers = [reader for reader, _, _ in ends]
        if node not in readers:  # behind more than one constant
            return Unfit(node, "its weight is computed")
        made = [self._site(*end, alone=len(ends) == 1) for end in ends]
        mine = made[readers.index(node)]
        if len(made) == 1 or not isinstance(mine, Site):
            return mine
        for reader, other in zip(readers, made, strict=True):
            if not isinstance(other, Site) or _form(other) != _form(mine):
                return Unfit(node, f"'{reader.label}' reads its weight in another way")
        first, *rest = [one for one in made if isinstance(one, Site)]
        return replace(first, ties=tuple(rest))

    def _site(
        self, node: Node, position: int, through: tuple[Node, ...], *, alone: bool
    ) -> Site | Unfit:
        leaf = through[0].inputs[0] if through else node.inputs[position]
        layer = layer_at(self.work, node, position, leaf)
        if layer is None:
            return Unfit(node, f"this form of {node.op_type} is no plain product")
        shown = Shown(self.work, leaf, through)
        why = shown.complaint()
        if layer.node.outputs[0] not in self.original.producer:
            why = why or "the original has no such tensor"
        if why:
            return Unfit(node, why)
        norm, added, made = self._behind(layer, alone=alone)
        site = Site(layer, shown, norm, added, made)
        return self._aimed_at_sum(site) if alone else site

    def _behind(
        self, layer: Layer, *, alone: bool
    ) -> tuple[Node | None, tuple[Node, int] | None, str]:
        """A norm or an added constant that can be taken for a part of the layer, and its output."""
        made = layer.node.outputs[0]
        reader = only_reader(self.work, made)
        if reader is None or any(name not in self.original.producer for name in reader.outputs[:1]):
            return None, None, made
        if layer.kind in ("conv", "deconv") and alone and is_norm(reader, self.work):
            return reader, None, reader.outputs[0]
        if layer.kind in ("matmul", "left") and reader.op_type == "Add":
            position = 1 - reader.inputs.index(made)
            if self._is_bias(reader.inputs[position], layer):
                return None, (reader, position), reader.outputs[0]
        return None, None, made

    def _is_bias(self, name: str, layer: Layer) -> bool:
        """Whether a constant has one value for each output of a MatMul's matrices."""
        constant = self.work.constants.get(name)
        given, weight = self.env.shape(name), self.env.shape(layer.seen)
        made = self.env.shape(layer.node.outputs[0])
        if constant is None or constant.pinned is not None or not given or not weight or not made:
            return False
        matrix = (1, weight[-1]) if layer.kind == "matmul" else (weight[-2], 1)
        whole = (*weight[:-2], *matrix)
        return len(given) <= len(made) and _bare(given) == _bare(whole)

    def _aimed_at_sum(self, site: Site) -> Site:
        """The site with the sum it goes into as its goal, where the other summand is known."""
        made = site.made
        reader = only_reader(self.work, made)
        if reader is None or reader.op_type != "Add" or reader.outputs[0] not in (
            self.original.producer
        ):  # fmt: skip
            return site
        other = reader.inputs[1 - reader.inputs.index(made)]
        maker = self.work.producer.get(other)
        known = other in self.work.inputs or (
            maker is not None and maker.index < site.layer.node.index
        )
        shape = self.env.shape(made)
        alike = shape is not None and self.env.shape(reader.outputs[0]) == shape
        if known and alike and other not in self.work.derived and other != made:
            return replace(site, total=reader.outputs[0], other=other)
        return site

    def _norm(self, node: Node) -> Site | None:
        """A BatchNormalization of its own: scale and shift of each channel."""
        if not is_norm(node, self.work) or node.outputs[0] not in self.original.producer:
            return None
        gamma = node.inputs[1]
        layer = Layer(node, gamma, gamma, node.inputs[0], "scale", 1)
        return Site(layer, Shown(self.work, gamma, ()), node, None, node.outputs[0])


def _form(site: Site) -> tuple[object, ...]:
    """What must be equal for two layers to be fitted as one."""
    layer = site.layer
    alpha = layer.node.attributes["alpha"].f if layer.node.has("alpha") else 1.0
    turned = layer.node.int("transB", 0)
    return (layer.kind, layer.groups, turned, alpha, site.shown.changes)


def _holds_layers(node: onnx.NodeProto) -> bool:
    """Whether there is a layer in the body of an If, Loop or Scan."""
    for attribute in node.attribute:
        for body in [attribute.g, *attribute.graphs]:
            if any(n.op_type in _LAYERS | _OTHERS or _holds_layers(n) for n in body.node):
                return True
    return False


def _bare(shape: Shape) -> Shape:
    """A shape without the axes of size 1 that it starts with."""
    first = next((axis for axis, size in enumerate(shape) if size > 1), len(shape))
    return shape[first:]


def only_reader(graph: Graph, name: str) -> Node | None:
    """The one node that reads a tensor, None where there are more, or others than nodes."""
    readers = graph.consumers.get(name, [])
    if len(readers) != 1 or name in graph.outputs or name in graph.captured:
        return None
    return readers[0][0]


def is_norm(node: Node, work: Graph) -> bool:
    """Whether a node is a BatchNormalization whose constants are its own and can be changed."""
    plain = node.op_type == "BatchNormalization" and not node.int("training_mode", 0)
    constants = [work.constants.get(name) for name in node.inputs[1:5]]
    return plain and all(
        c is not None and c.pinned is None and len(work.consumers[name]) == 1
        for c, name in zip(constants, node.inputs[1:5], strict=True)
    )
