"""A better basis for channels that nothing but sums see.

Between layers without an activation (the narrow ends of inverted residuals, the values of
attention) channels are only added up and multiplied with weights. Nothing there asks for single
channels of the original: what survives may carry any mixture of them, and the mixtures that lose
least of what the readers make are known in closed form. Those become the targets of the layers that
make the channels; the layers that read them are refitted anyway.

Source: reduced-rank regression (Izenman 1975); slicing in a rotated basis as in SliceGPT (Ashkboos
    et al. 2024, arXiv:2401.15024).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from onnxprune.affine import Affine
from onnxprune.calibrate import stream
from onnxprune.carried import FLOOR, Carried, Mixture, Stream, is_dense
from onnxprune.data import Data
from onnxprune.shown import shown_behind
from onnxprune.sites import Site
from onnxprune.types import AnyArray, ChannelGroup, Float64Array, IntArray

_WORTH = 0.9  # of what the survivors lose as they are: a basis that loses more changes nothing
_NOTHING = 1e-6  # of what the readers make: for less no weight is touched


class Streams:
    """Finds groups that only layers read, and the mixtures they are best cut in.

    Args:
        carried: Where the groups of a cut are.
    """

    def __init__(self, carried: Carried) -> None:
        self.carried = carried
        self.original = carried.original

    def candidates(self) -> list[Stream]:
        """Groups that only sums see, as far as the graph tells."""
        carried = self.carried
        makers: dict[int, set[str]] = {}
        readers: dict[int, set[str]] = {}
        out = carried.exposed()
        for node in self.original.nodes:
            if node.key in self.original.derived:
                continue
            reads = carried.groups(node.inputs)
            makes = carried.groups(node.outputs)
            for group in reads | makes:
                if is_dense(node, self.original):
                    if not self._along_one_axis(node.inputs[0], group):
                        out.add(group)
                    if not self._along_one_axis(node.outputs[0], group):
                        out.add(group)
                    if group in makes:
                        makers.setdefault(group, set()).add(node.key)
                    if group in reads:
                        readers.setdefault(group, set()).add(node.key)
                elif not carried.alike(node, group):
                    out.add(group)
        return [
            Stream(group, frozenset(makers[group.id]), frozenset(readers[group.id]))
            for group in carried.plan.graph.prunable
            if group.id in makers and group.id in readers and group.id not in out
        ]

    def _along_one_axis(self, name: str, group: int) -> bool:
        """Whether a tensor has each unit of a group that it carries once, on one axis."""
        return not self.carried.has(name, group) or self.carried.places(name, group) is not None

    def confirmed(self, streams: Sequence[Stream], fit: Mapping[str, Site]) -> list[Stream]:
        """The streams all of whose layers can be refitted, norms and biases included.

        Args:
            streams: Candidates.
            fit: Layers that can be refitted, by their first output.
        """
        good = []
        for one in streams:
            found = [fit[key] for key in (*one.makers, *one.readers) if key in fit]
            complete = len(found) == len(one.makers) + len(one.readers)
            if not complete or not self.carried.folded(one, found):
                continue
            goals = [fit[key].goal for key in one.makers]
            if all(self._whole(goal, one) for goal in goals):
                good.append(one)
        return good

    def _whole(self, goal: str, one: Stream) -> bool:
        """Whether what a maker aims at is cut along its channels alone."""
        along = self.carried.cut_along_one_axis(goal)
        return along and self.carried.places(goal, one.group.id) is not None

    def mixtures(
        self, streams: Sequence[Stream], fit: Mapping[str, Site], data: Data
    ) -> list[Mixture]:
        """What tensors that makers aim at are to carry, for the streams that gain by it.

        Args:
            streams: Confirmed ones.
            fit: Layers that can be refitted, by their first output.
            data: What the model reads.
        """
        seen = self._covariances(streams, data)
        found: list[Mixture] = []
        for one in streams:
            parts = [self._read(fit[key], one, seen) for key in sorted(one.readers)]
            known = [part for part in parts if part is not None]
            if len(known) < len(parts) or not all(np.isfinite(c).all() for _, c in known):
                continue
            matrix = _mixtures(one.group, self.carried.plan.keep[one.group.id], known)
            if matrix is None:
                continue
            for goal in sorted({fit[key].goal for key in one.makers}):
                places = self.carried.places(goal, one.group.id)
                if places is not None:
                    found.append(Mixture(one, goal, places[1], matrix))
        return found

    def _covariances(self, streams: Sequence[Stream], data: Data) -> Mapping[str, Float64Array]:
        """Covariance of the channels of each tensor that a reader sees, (channels, channels)."""
        axes: dict[str, int] = {}
        for one in streams:
            for key in one.readers:
                name = self.original.producer[key].inputs[0]
                places = self.carried.places(name, one.group.id)
                if places is not None:
                    axes[name] = places[0]
        sums = {name: _Covariance() for name in axes}
        for values in stream(self.original.model, sorted(axes), data) if axes else ():
            for name, axis in axes.items():
                sums[name].add(values[name], axis)
        return {name: one.value for name, one in sums.items()}

    def _read(
        self, site: Site, one: Stream, seen: Mapping[str, Float64Array]
    ) -> tuple[Float64Array, Float64Array] | None:
        """What a reader makes of a stream, (units, outputs), and covariance, (units, units)."""
        node = self.original.producer[site.layer.node.key]
        shown = shown_behind(self.original, node.inputs[1])
        places = self.carried.places(node.inputs[0], one.group.id)
        if shown is None or places is None:
            return None
        layer = replace(site.layer, node=node, weight=shown.leaf, seen=node.inputs[1],
                        data=node.inputs[0])  # fmt: skip
        norm = None if site.norm is None else self.original.producer[site.norm.key]
        there = replace(site, layer=layer, shown=shown, norm=norm, added=None)
        affine = Affine(there, self.original, lambda n: self.original.constants[n].weight.read())
        product = affine.product()
        if product is None:
            return None
        units = places[1]
        each, rest = divmod(product[0].shape[1], len(seen[layer.data]))
        if len(product[0]) != 1 or rest or not each:
            return None
        taps = product[0][0].reshape(len(seen[layer.data]), each, -1)[units]
        return taps.reshape(units.size, -1), seen[layer.data][np.ix_(units, units)]


class _Covariance:
    """Second moments of channels around their mean, over a stream of batches."""

    def __init__(self) -> None:
        self.rows = 0
        self.square: Float64Array | float = 0.0
        self.sum: Float64Array | float = 0.0

    def add(self, array: AnyArray, axis: int) -> None:
        """Add every position of a tensor."""
        last = np.moveaxis(np.asarray(array, np.float32), axis, -1)
        rows = last.reshape(-1, last.shape[-1])
        self.rows += len(rows)
        self.square = self.square + (rows.T @ rows).astype(np.float64)
        self.sum = self.sum + rows.sum(axis=0, dtype=np.float64)

    @property
    def value(self) -> Float64Array:
        """The covariance."""
        mean = np.asarray(self.sum) / max(self.rows, 1)
        return np.asarray(self.square) / max(self.rows, 1) - np.outer(mean, mean)


def _mixtures(
    group: ChannelGroup, keep: IntArray, parts: Sequence[tuple[Float64Array, Float64Array]]
) -> Float64Array | None:
    """What each survivor is to carry, shape (units, survivors): rows mix among themselves alone.

    Args:
        group: The group.
        keep: Its survivors.
        parts: For each reader what it makes of the units, (units, outputs), and their covariance.

    Returns:
        None where the survivors as they are lose next to nothing, or hardly more.
    """
    want = np.zeros((group.size, group.size))
    covariance = np.mean([moment for _, moment in parts], axis=0)
    for weight, moment in parts:
        energy = float(np.einsum("io,ij,jo->", weight, moment, weight, optimize=True))
        want += weight @ weight.T / max(energy, 1e-30)
    found = np.zeros((group.size, keep.size))
    plain = mixed = 0.0
    for cell in group.cells:
        mine = np.flatnonzero(np.isin(keep, cell))
        block = np.ix_(cell, cell)
        local = np.searchsorted(cell, keep[mine])
        found[np.ix_(cell, mine)] = _best(want[block], covariance[block], local)
        chosen = np.eye(cell.size)[:, local]
        plain += _lost(want[block], covariance[block], chosen)
        mixed += _lost(want[block], covariance[block], found[np.ix_(cell, mine)])
    whole = float(np.einsum("ij,ij->", want, covariance))
    return found if plain > _NOTHING * whole and mixed < _WORTH * plain else None


def _lost(want: Float64Array, covariance: Float64Array, carried: Float64Array) -> float:
    """Energy of what readers make that the best regression on some mixtures leaves."""
    across = covariance @ carried
    told = across @ np.linalg.pinv(carried.T @ across, rcond=FLOOR, hermitian=True) @ across.T
    return float(np.einsum("ij,ij->", want, covariance - told))


def _best(want: Float64Array, covariance: Float64Array, kept: IntArray) -> Float64Array:
    """Best mixtures of one row, turned and scaled so that they look like what survives.

    With x of this covariance, and readers that make Wᵀx, W Wᵀ = ``want``: as many mixtures Pᵀx as
    survive from which all Wᵀx can be told with the least error.
    """
    spread, axes = np.linalg.eigh(covariance)
    spread = np.maximum(spread, max(float(spread.max()) * FLOOR, 1e-30))
    root = (axes * np.sqrt(spread)) @ axes.T
    back = (axes / np.sqrt(spread)) @ axes.T
    _, found = np.linalg.eigh(root @ want @ root)
    mixtures = back @ found[:, ::-1][:, : kept.size]  # each of variance 1
    # The nearest to the survivors among all bases of the same space (Procrustes).
    left, _, right = np.linalg.svd(mixtures.T @ covariance[:, kept])
    size = np.sqrt(np.maximum(np.diag(covariance)[kept], 1e-30))
    return np.asarray(mixtures @ (left @ right) * size, np.float64)
