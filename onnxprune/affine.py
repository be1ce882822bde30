"""The constants of a layer as weight and bias of one product with what it is compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from onnxprune.graph import Graph, Node
from onnxprune.layers import matrix, unmatrix
from onnxprune.shown import Shown, shown_behind
from onnxprune.sites import Site
from onnxprune.types import AnyArray, Float64Array

_SMALL_SCALE = 1e-4  # of the largest: a channel scaled by less is left as it is
_FULL_PRECISION = ("float32", "float64")


@dataclass(frozen=True)
class Affine:
    """A site under some values of its constants: what is compared is X W + b.

    Attributes:
        site: The layer; those it is tied to share W alone.
        work: The pruned graph.
        value: Value of a constant by its name.
    """

    site: Site
    work: Graph
    value: Callable[[str], AnyArray]

    @property
    def bias(self) -> Shown | None:
        """What shifts each output channel and can be written, None where nothing can."""
        site, node = self.site, self.site.layer.node
        if site.norm is not None:
            return Shown(self.work, site.norm.inputs[2], ())
        if site.added is not None:
            return Shown(self.work, site.added[0].inputs[site.added[1]], ())
        if not site.layer.bias or _number(node, "beta") == 0:
            return None
        shown = shown_behind(self.work, site.layer.bias)
        return shown if shown is not None and not shown.complaint() and shown.alone() else None

    @property
    def seen(self) -> AnyArray:
        """The weight as the node reads it."""
        return self.site.shown.forth(self.value(self.site.shown.leaf), self.value)

    @property
    def exact(self) -> bool:
        """Whether constants hold what a fit gives them, up to single precision."""
        shown = [self.site.shown, *([self.bias] if self.bias is not None else [])]
        kinds = [self.work.constants[one.leaf].weight.dtype.name for one in shown]
        return all(kind in _FULL_PRECISION for kind in kinds)

    def product(self) -> tuple[Float64Array, Float64Array] | None:
        """W, shape (groups, inputs, outputs), and b, (groups, outputs); None where b is no such."""
        weight = matrix(self.site.layer, self.seen)
        groups, _, made = weight.shape
        scaled = self._scaled(weight)
        if scaled is None:
            return None
        scale, shift = scaled
        return weight * scale.reshape(groups, 1, made), shift.reshape(groups, made)

    def written(self, weight: Float64Array, bias: Float64Array) -> Mapping[str, AnyArray]:
        """New values of the constants; {} where the types are too narrow for them."""
        site, seen = self.site, self.seen
        start = matrix(site.layer, seen)
        scaled = self._scaled(start)
        assert scaled is not None
        scale, shift = scaled
        groups, _, made = start.shape
        usable = np.abs(scale) > _SMALL_SCALE * max(float(np.abs(scale).max()), 1e-30)
        per_group = (groups, 1, made)
        safe = np.where(usable, scale, 1.0).reshape(per_group)
        found = np.where(usable.reshape(per_group), weight / safe, start)
        wanted = unmatrix(site.layer, found, seen.shape)
        values = dict(site.shown.rescaled(wanted))
        values[site.shown.leaf] = site.shown.back(wanted, self.among(values))
        shown = self.bias
        if shown is not None:
            if site.layer.kind == "scale":  # whose mean is multiplied too
                shift = self._scaled(found)[1]  # type: ignore[index]  # as above
            # What a channel that is not usable still gives through its old weights is no change.
            moved = np.where(usable, bias.reshape(-1) - shift, 0.0)
            factor = _number(site.layer.node, "beta") if site.layer.kind == "gemm" else 1.0
            old = shown.forth(self.value(shown.leaf)).astype(np.float64)
            values[shown.leaf] = shown.back(old + (moved / factor).reshape(old.shape))
        whole = all(np.isfinite(array.astype(np.float64)).all() for array in values.values())
        return values if whole else {}

    def settled(
        self, weight: Float64Array, bias: Float64Array
    ) -> tuple[Float64Array, Float64Array]:
        """W and b as they are once they have been stored, no numbers where they cannot be."""
        values = self.written(weight, bias)
        if not values:
            return weight * np.nan, bias
        after = Affine(self.site, self.work, self.among(values))
        made = after.product()
        assert made is not None
        return made

    def among(self, values: Mapping[str, AnyArray]) -> Callable[[str], AnyArray]:
        """Constants by name, some of them with new values."""
        return lambda name: values[name] if name in values else self.value(name)

    def _scaled(self, weight: Float64Array) -> tuple[Float64Array, Float64Array] | None:
        """Scale and shift between X W and the tensor that is compared, by output channel."""
        site, node = self.site, self.site.layer.node
        width = weight.shape[0] * weight.shape[2]
        scale, shift = np.ones(width), np.zeros(width)
        if site.layer.kind == "gemm":
            scale *= _number(node, "alpha")
        if site.layer.bias:
            bias = self._bias_value()
            if bias is None or bias.size != width or bias.shape[-1:] != (width,):
                return None
            shift += bias.reshape(-1) * _number(node, "beta")
        if site.added is not None:
            reader, position = site.added
            shift += self._real(reader.inputs[position]).reshape(-1)
        if site.norm is not None:
            gamma, beta, mean, variance = (self._real(name) for name in site.norm.inputs[1:5])
            epsilon = _number(site.norm, "epsilon", 1e-5)
            deviation = np.sqrt(variance + epsilon)
            if site.layer.kind == "scale":
                return 1 / deviation, beta - mean * weight.reshape(-1) / deviation
            scale, shift = scale * gamma / deviation, (shift - mean) * gamma / deviation + beta
        return scale, shift

    def _bias_value(self) -> Float64Array | None:
        shown = shown_behind(self.work, self.site.layer.bias)
        return None if shown is None else shown.forth(self.value(shown.leaf)).astype(np.float64)

    def _real(self, name: str) -> Float64Array:
        return self.value(name).astype(np.float64)


def _number(node: Node, name: str, default: float = 1.0) -> float:
    return float(node.attributes[name].f) if node.has(name) else default
