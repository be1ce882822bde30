"""What makes up for a cut in the layers that read it, where each group is cut alone.

The rest of the model stays as it was, so that one layer's loss is told apart from another's: with
``bias`` the mean of what goes, known without data, moves into the readers' outputs; with ``refit``
the weights of each reader are fitted anew. What the reader saw and made in the original is all a
fit needs, and it made X W: so the second moments of X, summed once, serve every ratio. Layers
further behind are not refitted, as ``shrink --restore refit`` does: the loss that is measured lies
above what is left after that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from onnxprune.calibrate import inputs_of, sampled_positions
from onnxprune.compensate import absorptions
from onnxprune.feeds import Batch
from onnxprune.graph import Graph, Node
from onnxprune.groups import DependencyGraph
from onnxprune.layers import Layer, columns, layer_of, matrix, unmatrix
from onnxprune.moments import seen_weight, spreads
from onnxprune.refit import Fitter
from onnxprune.select import PruningPlan
from onnxprune.sums import Moments, Rows
from onnxprune.survivors import Survivors
from onnxprune.twin import twin_edits
from onnxprune.types import AnyArray, BoolArray, Float64Array

WAYS = ("none", "bias", "refit")
_MOST_MOMENTS = 1 << 30  # bytes of the sums of layers that are fitted at a time

Rounds = Callable[[], Iterator[Batch]]  # tensors of the original, batch by batch, again each time


@dataclass(frozen=True, slots=True)
class Reader:
    """A layer that reads what goes.

    Attributes:
        node: Its node.
        layer: How it multiplies; None where its weights stay.
    """

    node: Node
    layer: Layer | None = None

    @property
    def weight(self) -> str | None:
        """Tensor that gets new values, None where that is none."""
        return None if self.layer is None else self.layer.seen


@dataclass(frozen=True, slots=True)
class Restored:
    """What makes up for one cut.

    Attributes:
        weights: New values of what readers see as their weights.
        shifts: What is added to the output of a node, by its index, shape (out,).
    """

    weights: Mapping[str, AnyArray] = field(default_factory=dict)
    shifts: Mapping[int, Float64Array] = field(default_factory=dict)


class Restorer:
    """Makes up for cuts of one analysed model.

    Args:
        graph: The analysis.
        how: ``none``, ``bias`` or ``refit``.
        samples: How many there are in the data.
        seed: Draws the output positions that are looked at.
    """

    def __init__(self, graph: DependencyGraph, how: str, *, samples: int, seed: int = 0) -> None:
        self.how = how
        self._graph = graph
        self._samples = samples
        self._seed = seed
        self._means = spreads(graph.graph, graph.envs[0]) if how == "bias" else {}

    def readers(self, plans: Sequence[PruningPlan]) -> tuple[Reader, ...]:
        """The layers that are restored under some of the plans, in execution order."""
        graph = self._graph.graph
        if self.how == "bias":
            nodes = {one.node for plan in plans for one in absorptions(plan, self._means)}
            return tuple(Reader(graph.nodes[index]) for index in sorted(nodes))
        if self.how == "none":
            return ()
        leaves = {name for plan in plans for name in twin_edits(plan).readers}
        layers = (_fittable(graph, name) for name in leaves)
        found = {layer.node.index: layer for layer in layers if layer is not None}
        return tuple(Reader(graph.nodes[index], found[index]) for index in sorted(found))

    def restored(
        self, plans: Sequence[PruningPlan], readers: Sequence[Reader], rounds: Rounds
    ) -> list[Restored]:
        """What makes up for each plan.

        Args:
            plans: Cuts of the same groups.
            readers: From ``readers``.
            rounds: Gives what the readers read in the original.
        """
        if self.how == "bias":
            return [self._shifted(plan) for plan in plans]
        weights: list[dict[str, AnyArray]] = [{} for _ in plans]
        shifts: list[dict[int, Float64Array]] = [{} for _ in plans]
        survivors = [
            Survivors(self._graph.tracer.traces[0], self._graph.dead(plan.keep)) for plan in plans
        ]
        for layers in self._together(readers):
            for layer, seen, fitter in self._summed(layers, rounds):
                for number, left in enumerate(survivors):
                    weight, shift = self._fitted(layer, seen, fitter, left)
                    weights[number][layer.seen] = weight
                    shifts[number][layer.node.index] = shift
        return [Restored(w, s) for w, s in zip(weights, shifts, strict=True)]

    def _shifted(self, plan: PruningPlan) -> Restored:
        nodes = self._graph.graph.nodes
        found = {
            one.node: one.bias * _alpha(nodes[one.node])
            for one in absorptions(plan, self._means)
            if one.bias is not None and np.isfinite(one.bias).all()
        }
        return Restored(shifts=found)

    # -- refitting -----------------------------------------------------------------------------

    def _together(self, readers: Sequence[Reader]) -> Iterator[list[Layer]]:
        """Layers whose sums fit into memory at once."""
        chosen: list[Layer] = []
        held = 0
        for layer in (reader.layer for reader in readers if reader.layer is not None):
            size = moment_bytes(self._graph, layer)
            if chosen and held + size > _MOST_MOMENTS:
                yield chosen
                chosen, held = [], 0
            chosen.append(layer)
            held += size
        if chosen:
            yield chosen

    def _summed(
        self, layers: Sequence[Layer], rounds: Rounds
    ) -> Iterator[tuple[Layer, AnyArray, Fitter]]:
        """Second moments of what each layer reads; a part of the rows is held out."""
        rng = np.random.default_rng(self._seed)
        found = []
        for layer in layers:
            seen = seen_weight(self._graph.graph, layer.seen)
            assert seen is not None
            inputs = inputs_of(layer, seen.shape)
            most = sampled_positions(inputs, self._samples)
            found.append((layer, seen, most, Fitter(layer.groups, inputs, 1, 0, summed=True)))
        for batch in rounds():
            for layer, seen, most, fitter in found:
                rows, _ = columns(layer, batch[layer.data], seen.shape, most, rng)
                fitter.add(rows, np.zeros((*rows.shape[:2], 1), np.float32))
        yield from ((layer, seen, fitter) for layer, seen, _, fitter in found)

    def _fitted(
        self, layer: Layer, seen: AnyArray, sums: Fitter, survivors: Survivors
    ) -> tuple[AnyArray, Float64Array]:
        """The weight that gives what the original's gave, without what goes, and the shift."""
        weight = matrix(layer, seen)
        groups, inputs, made = weight.shape
        rank = len(survivors.trace.env.shape(layer.data) or ())
        alive = survivors.alive(layer.data, layer.axis % rank)
        if alive is None:
            return seen, np.zeros(groups * made)
        # (group, in / group), each channel as often as the kernel has positions.
        left = np.repeat(alive.reshape(groups, -1), inputs * groups // alive.size, axis=1)
        fitter = Fitter(groups, inputs, made, 0, summed=True)
        fitter.fitted = _without(sums.fitted, weight, left)
        fitter.held = _without(sums.held, weight, left)
        if sums.origin is not None:
            fitter.origin = sums.origin[0], np.matmul(sums.origin[0], weight)
        fit = fitter.solve(weight * left[:, :, None], np.zeros((groups, made)))
        new = unmatrix(layer, fit.weight * left[:, :, None], seen.shape)
        with np.errstate(over="ignore"):
            cast = np.ascontiguousarray(new).astype(seen.dtype)
        shift = fit.bias.reshape(-1) * _alpha(layer.node)
        if not (np.isfinite(cast.astype(np.float32)).all() and np.isfinite(shift).all()):
            plain = unmatrix(layer, weight * left[:, :, None], seen.shape)
            return plain.astype(seen.dtype), np.zeros(groups * made)
        return cast, shift


def moment_bytes(graph: DependencyGraph, layer: Layer) -> int:
    """Bytes of the sums for one layer: of the rows that are fitted, and of those held out."""
    inputs = inputs_of(layer, graph.envs[0].shape(layer.seen) or (1, 1))
    return 2 * 8 * layer.groups * inputs * inputs


def _fittable(graph: Graph, leaf: str) -> Layer | None:
    """The layer that a weight belongs to, if it is Y = X W and no more, and nobody else's."""
    layer = layer_of(graph, leaf)
    if layer is None or layer.node.op_type == "FusedConv" or layer.data in graph.derived:
        return None
    names = {leaf, layer.seen}
    if any(len(graph.consumers.get(name, ())) != 1 for name in names) or names & graph.captured:
        return None
    seen = seen_weight(graph, layer.seen)
    if seen is None or not (seen.dtype.kind == "f" or seen.dtype.name == "bfloat16"):
        return None
    if layer.kind in ("gemm", "matmul") and (seen.ndim != 2 or layer.axis == 0):
        return None
    inputs = inputs_of(layer, seen.shape)
    return layer if 2 * 8 * layer.groups * inputs * inputs <= _MOST_MOMENTS else None


def _without(sums: Moments | Rows, weight: Float64Array, left: BoolArray) -> Moments:
    """Sums over the inputs that are left, for a target X W of all inputs.

    The last input is 1: the target has no part in it, and it stays.
    """
    assert isinstance(sums, Moments)
    groups, inputs, made = weight.shape
    whole = np.concatenate([weight, np.zeros((groups, 1, made))], axis=1)
    stays = np.concatenate([left, np.ones((groups, 1), np.bool_)], axis=1)
    found = Moments(groups, inputs + 1, made)
    product = np.matmul(sums.xx, whole)
    found.rows = sums.rows
    found.z = product[:, -1]
    found.xx = sums.xx * stays[:, :, None] * stays[:, None, :]
    found.xz = product * stays[:, :, None]
    found.zz = np.einsum("gio,gio->go", whole, product)
    return found


def _alpha(node: Node) -> float:
    """What a Gemm multiplies its product by."""
    return float(node.attributes["alpha"].f) if node.has("alpha") else 1.0


def shift_shape(node: Node, rank: int) -> tuple[int, ...]:
    """Shape under which a value for each output channel broadcasts to a node's output."""
    return (1, -1, *[1] * (rank - 2)) if "Conv" in node.op_type else (-1,)


def data_of(readers: Iterable[Reader]) -> tuple[str, ...]:
    """Tensors that refitting looks at."""
    return tuple(dict.fromkeys(r.layer.data for r in readers if r.layer is not None))
