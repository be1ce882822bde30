"""Accuracy back without training: every layer refitted to what the original produced there.

Layer by layer in execution order: inputs are what the pruned model, refitted so far, feeds the
layer; the target is the original's output. The last layer before an Add aims at the original's sum
minus what the other branch now delivers, so that errors along a residual stream are corrected. A
BatchNormalization behind a layer is fitted with it; one behind something else is a layer itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from hashlib import sha256

import numpy as np
from onnx import helper

from onnxprune import fields
from onnxprune.activations import Activation, activation_behind
from onnxprune.affine import Affine
from onnxprune.bases import Streams
from onnxprune.carried import Carried
from onnxprune.data import Data
from onnxprune.emit import ConstantEdit, Emitter
from onnxprune.graph import Graph, Node
from onnxprune.lean import Leaning
from onnxprune.model import Model
from onnxprune.patterned import Imposed
from onnxprune.prepare import prepare
from onnxprune.problem import Problem
from onnxprune.products import Products
from onnxprune.select import PruningPlan
from onnxprune.sites import Site, Unfit, sites
from onnxprune.stepwise import Stepwise, Values
from onnxprune.survivors import Survivors
from onnxprune.types import AnyArray, Float64Array, Refitted
from onnxprune.unfuse import unfused
from onnxprune.weighed import Weighing, slopes

_MOST_WEIGHED = 1536  # inputs or outputs of a layer whose errors are weighed together
_SLOPES = 4096  # places at which slopes are looked at

_WORTH = 1e-3  # of what readers miss: for less there is no further refit
Heard = Callable[[int, int, str], None]  # done, of, node
# The refitted model, what happened to each layer, and the constants that changed.
Found = tuple[Model, tuple[Refitted, ...], tuple[str, ...]]


def refit(
    plan: PruningPlan,
    pruned: Model,
    data: Data,
    *,
    seed: int = 0,
    heard: Heard | None = None,
    impose: Mapping[str, Imposed] | None = None,
    again: int = 0,
) -> Found:
    """Refit what a cut left to calibration data.

    Args:
        plan: The cut.
        pruned: The model it made.
        data: Unlabelled inputs; a few hundred samples are enough.
        seed: Draws the output positions that are looked at.
        heard: Called before each layer.
        impose: Layers whose weights are to hold a pattern, by the first output of the node in the
            original; those that have no least-squares form stay as they are.
        again: Refits that follow, to targets that lean towards what the readers of a layer miss;
            they end where those miss no less. Small networks alone: all layers are in memory.

    Returns:
        The refitted model, what happened to each layer, and the constants that changed.

    Raises:
        VerificationError: ONNX Runtime cannot run a piece of a model.

    Source: layer-wise reconstruction as in He et al. 2017, Channel Pruning for Accelerating Very
        Deep Neural Networks (arXiv:1707.06168), with ridge and residual-aware targets.
    """
    plain: frozenset[int] = frozenset()
    while True:
        run = _Refit(plan, pruned, data, seed, plain, impose or {})
        found = run.run(heard)
        if not run.stuck():
            return run.leaning_further(found, again, heard)
        plain |= run.stuck()


class _Refit:
    """One refit of one model.

    Attributes:
        original: What to aim at, without fused layers.
        written: The model as it will be written, with a bias for every layer to be refitted.
        work: The same without fused layers.
        found: Every layer that the cut changed the inputs of, or that makes a stream.
        streams: Groups that are cut in a basis of their own.
        bases: What tensors of theirs are to carry.
    """

    def __init__(
        self,
        plan: PruningPlan,
        pruned: Model,
        data: Data,
        seed: int,
        plain: frozenset[int],
        impose: Mapping[str, Imposed],
    ) -> None:
        """``plain``: ids of groups whose survivors carry what they always did."""
        self.impose = impose
        apart = unfused(plan.graph.graph)
        self.original = apart.graph
        known = apart.known(plan.graph.tracer.traces[0])
        self.survivors = Survivors(known, plan.graph.dead(plan.keep))
        self.data = data
        self.seed = seed
        self.written = prepare(pruned)
        carried = Carried(plan, self.original, self.survivors)
        finders: tuple[Streams | Products, ...] = (Streams(carried), Products(carried))
        sought = [[s for s in one.candidates() if s.group.id not in plain] for one in finders]
        self.streams = [one for found in sought for one in found]
        found = self._sites(unfused(self.written).graph)
        fit = {site.layer.node.key: site for site in found if isinstance(site, Site)}
        mixtures = [
            mixture
            for finder, some in zip(finders, sought, strict=True)
            for mixture in finder.mixtures(finder.confirmed(some, fit), fit, data)
        ]
        gaining = {mixture.stream.group.id for mixture in mixtures}
        self.streams = [one for one in self.streams if one.group.id in gaining]
        self.bases = carried.bases(mixtures)
        self.added = self._add_biases()
        self.work = unfused(self.written).graph
        self.found = self._sites(self.work)
        fitted = [one for one in self.found if isinstance(one, Site)]
        self.leaning = Leaning(self.work, fitted, {one.goal: self._size(one) for one in fitted})

    def _sites(self, work: Graph) -> list[Site | Unfit]:
        also = frozenset(key for one in self.streams for key in one.makers) | set(self.impose)
        return list(sites(work, self.original, self.survivors, also))

    def stuck(self) -> frozenset[int]:
        """Groups that no longer fit together: a layer of theirs kept its weights."""
        return frozenset(
            one.group.id for one in self.streams if self.left & (one.makers | one.readers)
        )

    def leaning_further(self, found: Found, again: int, heard: Heard | None) -> Found:
        """Refit again, as long as the readers of layers miss less."""
        missed = self.leaning.missed(self.wanted, self.made) if again else 0.0
        for _ in range(again if self.leaning.links and np.isfinite(missed) else 0):
            self.leaning.follow(self.value, self.wanted, self.made)
            following = self.run(heard)
            least, missed = missed, self.leaning.missed(self.wanted, self.made)
            if self.stuck() or not missed < least * (1 - _WORTH):
                break
            found = following
        return found

    def run(self, heard: Heard | None) -> Found:
        """Refit every layer, from the plain weights."""
        self.left: set[str] = set()  # layers whose weights stay
        self.rng = np.random.default_rng(self.seed)
        self.wanted: dict[str, Values] = {}
        goals = sorted(self.leaning.goals)
        fitted = [found for found in self.found if isinstance(found, Site)]
        aims = [one.goal for site in fitted for one in site.all]
        results: list[Refitted] = []
        done = 0
        first = Stepwise(self.original, self.data, aims)
        with first, Stepwise(self.work, self.data, kept=goals) as second:
            self.changed = second.constants
            for found in self.found:
                if isinstance(found, Unfit):
                    results.append(_left(found.node, found.why))
                    continue
                if heard is not None:
                    heard(done, len(fitted), found.layer.node.label)
                done += 1
                results += self._layer(found, first, second)
            self.made = second.until(len(self.work.nodes), goals) if goals else {}
        return self._emitted(self.changed), tuple(results), tuple(sorted(self.changed))

    # -- the model -----------------------------------------------------------------------------

    def _add_biases(self) -> dict[str, str]:
        """Give a zero bias to each layer to be refitted that has none: node key by bias."""
        apart = unfused(self.written)
        emitter = Emitter(self.written)
        added: dict[str, str] = {}
        for site in self._sites(apart.graph):
            for one in site.all if isinstance(site, Site) else ():
                if one.layer.kind not in ("conv", "deconv", "gemm") or one.layer.bias:
                    continue
                if one.norm is not None or one.shown.quantized:
                    continue  # beside quantized weights a bias in floats would undo the fusion
                made = one.layer.node.key
                key = apart.inner.get(made, made)
                proto = emitter.node(self.written.producer[key])
                while len(proto.input) < 3:
                    proto.input.append("")
                proto.input[2] = emitter.literal(f"{key}_bias", self._zeros(one, apart.graph))
                added[proto.input[2]] = key
        if added:
            self.written = prepare(emitter.build())
        return added

    def _zeros(self, site: Site, graph: Graph) -> AnyArray:
        seen = Affine(site, graph, lambda name: graph.constants[name].weight.read()).seen
        layer = site.layer
        if layer.kind == "deconv":
            width = seen.shape[1] * layer.groups
        else:
            rows = layer.kind == "conv" or layer.node.int("transB", 0)
            width = seen.shape[0 if rows else 1]
        kind = self.survivors.trace.env.data_type(layer.node.outputs[0])
        return np.zeros(width, helper.tensor_dtype_to_np_dtype(kind) if kind else np.float32)

    def _emitted(self, changed: Mapping[str, AnyArray]) -> Model:
        emitter = Emitter(self.written)
        for name, constant in self.written.constants.items():
            # Two copies here may be one tensor where layers are no longer fused.
            source = name if name in self.work.constants else constant.origin
            if source in changed:
                emitter.constants[name] = _edit(changed[source])
        for bias, key in self.added.items():
            if bias not in changed:
                proto = emitter.node(self.written.producer[key])
                proto.input[2] = ""
                while not proto.input[-1]:
                    del proto.input[-1]
        return emitter.build()

    # -- one layer -----------------------------------------------------------------------------

    def _layer(self, site: Site, first: Stepwise, second: Stepwise) -> list[Refitted]:
        """Fit a layer, and those tied to it, and write what was found."""
        affines = [Affine(one, self.work, self.value) for one in site.all]
        pairs, added = self._pairs(site, first, second)
        nodes = [one.layer.node for one in site.all]
        products = [affine.product() for affine in affines]
        if any(product is None for product in products):
            self.left.update(node.key for node in nodes)
            return [_left(node, "its bias is not one constant for each output") for node in nodes]
        imposed = next((self.impose[n.key] for n in nodes if n.key in self.impose), None)
        wanted = [product for product in products if product is not None]
        problem = Problem(affines, wanted, imposed)
        behind = activation_behind(self.work, site.goal)
        metric = None if imposed is None else self._metric(site, behind, pairs, added)
        fit, sampled = problem.fitted(pairs, self.rng, behind, added, metric)
        if not np.isfinite(fit.before) and imposed is None:
            self.left.update(node.key for node in nodes)
            return [_left(node, "its data overflow") for node in nodes]
        taken = fit.ridge is not None or imposed is not None
        written = problem.written(fit) if taken else {}
        second.constants |= written
        if not written:
            self.left.update(node.key for node in nodes)
            kept = "no gain on held-out data"
            return [Refitted(node.label, fit.before, fit.before, None, kept) for node in nodes]
        return [Refitted(n.label, fit.before, fit.after, fit.ridge, sampled) for n in nodes]

    def _metric(
        self,
        site: Site,
        behind: Activation | None,
        pairs: list[tuple[Values, Values]],
        added: Values | None,
    ) -> Float64Array | None:
        """How errors of a convolution's channels count to what reads them."""
        layer = site.layer
        if layer.kind != "conv" or layer.groups > 1 or site.ties or site.goal in self.bases:
            return None
        (_, wanted), *_ = pairs
        channels = wanted[0].shape[1]
        if max(channels, self.value(site.shown.leaf)[0].size) > _MOST_WEIGHED:
            return None
        weighing = Weighing(self.work, self.survivors.trace.env.shape, self.value)
        if behind is None:
            return weighing.of(site.goal, channels)
        total = wanted if added is None else map(np.add, wanted, added)
        rows = np.concatenate([np.moveaxis(z, 1, -1).reshape(-1, channels) for z in total])
        some = self.rng.choice(len(rows), min(len(rows), _SLOPES), replace=False)
        return weighing.of(site.goal, channels, slopes(behind, rows[some]), behind.made)

    def _size(self, site: Site) -> int:
        """Elements of what a layer aims at, over all of the data."""
        shape = self.survivors.trace.env.shape(site.goal) or (1,)
        return int(self.data.samples * np.prod(shape[1:], dtype=np.int64))

    def value(self, name: str) -> AnyArray:
        """A constant as the last refit left it."""
        found = self.changed.get(name)
        return self.work.constants[name].weight.read() if found is None else found

    def _pairs(
        self, site: Site, first: Stepwise, second: Stepwise
    ) -> tuple[list[tuple[Values, Values]], Values | None]:
        """What each of the tied layers reads now, and what it should make, batch by batch.

        Then the other summand, where the layer aims at a sum.
        """
        wanted = [site.layer.data, *([site.other] if site.other else [])]
        now = second.until(site.layer.node.index, wanted)
        found = [(list(now[site.layer.data]), self._target(site, first, now.get(site.other)))]
        if site.ties:
            # A second run, of the model as it stands, looks ahead to what the others read.
            with Stepwise(self.work, self.data) as ahead:
                ahead.constants = dict(second.constants)
                for one in site.ties:
                    read = ahead.until(one.layer.node.index, [one.layer.data])[one.layer.data]
                    found.append((list(read), self._target(one, first, None)))
        return found, list(now[site.other]) if site.other else None

    def _target(self, site: Site, first: Stepwise, other: Values | None) -> Values:
        goal = site.goal
        stop = self.original.producer[goal].index + 1
        aims = first.until(max(stop, first.done), [goal])[goal]
        gone, basis = self.survivors.masks(goal), self.bases.get(goal)
        target: Values = []
        for batch, aim in enumerate(aims):
            cut = fields.compact(aim, *gone) if basis is None else basis.of(aim)
            part = np.asarray(cut, np.float32)
            if goal in self.leaning.goals:
                self.wanted.setdefault(goal, []).append(part)
            if goal in self.leaning.moved:
                part = part + self.leaning.moved[goal][batch]
            if other is not None:
                part = part - np.asarray(other[batch], np.float32)
            target.append(part)
        return target


def _left(node: Node, why: str) -> Refitted:
    return Refitted(node.label, float("nan"), float("nan"), None, why)


def _edit(values: AnyArray) -> ConstantEdit:
    key = b"refit" + sha256(values.tobytes()).digest()
    return ConstantEdit(values.shape, lambda _: values, key)
