"""The least-squares problem of one layer, or of several that share a weight.

Tied layers have one matrix and a bias each: the weight of an input that is 1 in the rows of that
layer and 0 in all others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from onnxprune.affine import Affine
from onnxprune.calibrate import sampled_positions
from onnxprune.layers import Layer, columns, kernel_size, matrix, outputs, unmatrix
from onnxprune.patterned import Imposed, PatternFitter
from onnxprune.refit import Fit, Fitter, most_rows, sketched
from onnxprune.through import Function, Through
from onnxprune.types import AnyArray, BoolArray, Float32Array, Float64Array

Pairs = Sequence[tuple[Sequence[AnyArray], Sequence[AnyArray]]]  # read and wanted, by batch


class Problem:
    """Layers with one weight, under what their constants are now."""

    def __init__(
        self,
        affines: Sequence[Affine],
        products: Sequence[tuple[Float64Array, Float64Array]],
        imposed: Imposed | None = None,
    ) -> None:
        """One affine form for each layer, its weight and bias, and what the weight is to hold."""
        self.affines = affines
        self.imposed = imposed
        self.keep: BoolArray | None = None  # where a pattern lets weights be other than zero
        self.start = products[0][0]
        self.shifts = [shift for _, shift in products]
        self.free = [affine.bias is not None for affine in affines]
        self.tied = len(affines) > 1
        self.seen = affines[0].seen.shape
        groups, inputs, _ = self.start.shape
        self.limit = most_rows(groups, inputs) if sketched(groups, inputs) else None

    def fitted(
        self,
        pairs: Pairs,
        rng: np.random.Generator,
        activation: Function | None = None,
        added: Sequence[AnyArray] | None = None,
        metric: Float64Array | None = None,
    ) -> tuple[Fit, str]:
        """The fit, and what to say of it where only a sample of the rows is used.

        Args:
            pairs: For each of the layers.
            rng: Draws the output positions that are looked at.
            activation: What alone reads the output of the one layer there is, if it is known.
            added: What is added to that output in front of the activation, by batch.
            metric: How errors of outputs count together, for a pattern.
        """
        inputs = self.start.shape[1]
        samples = sum(array.shape[0] for read, _ in pairs for array in read)
        most = sampled_positions(inputs, samples)
        if self.limit is not None:
            most = max(1, min(most, self.limit // max(1, samples)))
        total = sum(self._count(z, most) for _, wanted in pairs for z in wanted)
        rows = total if self.limit is None else min(total, self.limit)
        fitter = self._fitter(rows, metric)
        state = int(rng.integers(1 << 62))

        def batches() -> Iterator[tuple[Float32Array, Float32Array, Float32Array | None]]:
            drawn = np.random.default_rng(state)
            seen = taken = 0
            for x, y, more in self._rows(pairs, added, most, drawn):
                seen += x.shape[1]
                due = seen * rows // total - taken
                taken += due
                some = slice(None) if due == x.shape[1] else np.sort(
                    drawn.choice(x.shape[1], due, replace=False)
                )  # fmt: skip
                yield x[:, some], y[:, some], None if more is None else more[:, some]

        for x, y, _ in batches():
            fitter.add(x, y)
        through = None
        if activation is not None and self.free[0] and not self.tied and self._bends:
            through = Through(activation, batches)
        start, bias = self.start, self.shifts[0]
        if self.tied:
            start = np.concatenate([start, np.stack(self._free_shifts(), axis=1)], axis=1)
        exact = all(affine.exact for affine in self.affines)
        fit = fitter.solve(start, bias, None if exact else self._settled, through)
        if isinstance(fitter, PatternFitter):
            self.keep = fitter.keep[:, :inputs]
        said = f"fitted to a sample of {rows:,} rows for {inputs:,} inputs"
        return fit, said if self.limit is not None else ""

    @property
    def _bends(self) -> bool:
        """Whether it is worth to look through the activation behind.

        Not for products in a pattern: those of a sentence encoder end no nearer in 2:4 (cosine
        0.9425 with it, 0.9427 without), after a seventh more time.
        """
        conv = self.affines[0].site.layer.kind in ("conv", "deconv")
        return self.imposed is None or conv

    def written(self, fit: Fit) -> Mapping[str, AnyArray]:
        """New values of the constants; {} where they cannot be stored."""
        found: dict[str, AnyArray] = {}
        for affine, (weight, bias) in zip(
            self.affines, self._parts(fit.weight, fit.bias), strict=True
        ):
            values = affine.written(weight, bias)
            if not values:
                return {}
            found |= values if self.keep is None else self._thinned(affine, values)
        return found

    def _fitter(self, rows: int, metric: Float64Array | None) -> Fitter:
        groups, inputs, made = self.start.shape
        marks = len(self.affines) * self.tied
        intercept = self.free[0] and not self.tied
        if self.imposed is None:
            return Fitter(groups, inputs + marks, made, rows, intercept=intercept)
        taps = kernel_size(self.affines[0].site.layer, self.seen)
        return PatternFitter(
            (groups, inputs + marks, made), rows, self.imposed,
            taps=taps, free=marks, intercept=intercept, metric=metric,
        )  # fmt: skip

    def _thinned(self, affine: Affine, values: Mapping[str, AnyArray]) -> Mapping[str, AnyArray]:
        """What is written, zero where the pattern wants it: some channels kept their weights."""
        layer, shown = affine.site.layer, affine.site.shown
        value = affine.among(values)
        seen = matrix(layer, shown.forth(values[shown.leaf], value))
        assert self.keep is not None
        if not seen[~self.keep].any():
            return values
        kept = unmatrix(layer, seen * self.keep, self.seen)
        return {**values, shown.leaf: shown.back(kept, value)}

    def _rows(
        self,
        pairs: Pairs,
        added: Sequence[AnyArray] | None,
        most: int,
        rng: np.random.Generator,
    ) -> Iterator[tuple[Float32Array, Float32Array, Float32Array | None]]:
        for number, (read, wanted) in enumerate(pairs):
            layer = self.affines[number].site.layer
            for batch, (x, z) in enumerate(zip(read, wanted, strict=True)):
                rows, chosen = columns(layer, x, self.seen, most, rng)
                target = outputs(layer, z, chosen, self.seen)
                more = None if added is None else outputs(layer, added[batch], chosen, self.seen)
                if not self.free[number]:
                    target = target - self.shifts[number][:, None].astype(np.float32)
                if self.tied:
                    mark = np.zeros((*rows.shape[:2], len(self.affines)), np.float32)
                    mark[:, :, number] = self.free[number]
                    rows = np.concatenate([rows, mark], axis=2)
                yield rows, target, more

    def _count(self, wanted: AnyArray, most: int) -> int:
        """Rows that one batch gives."""
        layer: Layer = self.affines[0].site.layer
        if layer.kind in ("conv", "deconv", "scale"):
            positions = int(np.prod(wanted.shape[2:], dtype=np.int64))
            return int(wanted.shape[0] * min(most, positions))
        groups, _, made = self.start.shape
        return int(wanted.size // (groups * made))

    def _free_shifts(self) -> list[Float64Array]:
        return [shift * free for shift, free in zip(self.shifts, self.free, strict=True)]

    def _parts(
        self, weight: Float64Array, bias: Float64Array
    ) -> Iterator[tuple[Float64Array, Float64Array]]:
        """Weight and bias of each layer."""
        inputs = self.start.shape[1]
        for number in range(len(self.affines)):
            own = weight[:, inputs + number] if self.tied else bias
            yield weight[:, :inputs], own

    def _settled(
        self, weight: Float64Array, bias: Float64Array
    ) -> tuple[Float64Array, Float64Array]:
        """What storing makes of weights and biases."""
        stored = [
            affine.settled(*parts)
            for affine, parts in zip(self.affines, self._parts(weight, bias), strict=True)
        ]
        if not self.tied:
            return stored[0]
        after = [own * free for (_, own), free in zip(stored, self.free, strict=True)]
        return np.concatenate([stored[0][0], np.stack(after, axis=1)], axis=1), bias
