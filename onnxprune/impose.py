"""Impose a pattern as a person asks for it: which method, what it saves, what a recipe keeps."""

from __future__ import annotations

import lzma
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from onnxprune.errors import RecipeError, UnsupportedModelError, UsageError
from onnxprune.messages import bits
from onnxprune.model import Model
from onnxprune.patterns import NM, Block, Kernel, parse
from onnxprune.recipe import Recipe, SparsifyOptions
from onnxprune.stream import write_to
from onnxprune.thin import MAGNITUDE, Thinned, Wish, thin
from onnxprune.types import Float64Array, Refitted, Sparsified, ThinLayer

METHODS = ("auto", MAGNITUDE, "wanda", "sparsegpt")
_ROUNDED = 8  # channels that `--round-to auto` gives multiples of, where there are enough
_XZ_UNASKED = 16_000_000  # bytes of a model that xz takes a second or two for


def check_method(method: str) -> None:
    """Refuse a method that does not exist.

    Raises:
        UsageError: There is none of that name.
    """
    if method not in METHODS:
        raise UsageError(f"method is '{method}'", hint=f"give one of {', '.join(METHODS)}")


def afterwards(pattern: str | None, sparsity: float | None) -> SparsifyOptions | None:
    """Options for a pattern to impose after a cut: half goes, where nothing else is said.

    Args:
        pattern: The pattern, None for none.
        sparsity: Share that goes; None takes what the pattern implies, or half.

    Raises:
        UsageError: There is no such pattern, it means another share, or there is a share alone.
    """
    if pattern is None:
        if sparsity is not None:
            raise UsageError("sparsity goes with a pattern", hint="--then unstructured")
        return None
    if sparsity is None and not isinstance(parse(pattern), NM):
        sparsity = 0.5
    return options_of(Wish.read(pattern, sparsity), MAGNITUDE)


def impose(model: Model, options: SparsifyOptions) -> Thinned:
    """Thin every layer that can take the pattern.

    Args:
        model: The model, which stays as it is.
        options: What to impose.

    Raises:
        UsageError: ``ignore`` or ``only`` matches nothing.
        UnsupportedModelError: None can.
    """
    found = thin(model, wish_of(options))
    if not any(one.eligible for one in found.layers):
        reasons = list(dict.fromkeys(f"{one.node}: {one.why}" for one in found.layers))
        said = "; ".join(reasons[:3]) or "it has no layer with a weight"
        more = f"; and {len(reasons) - 3} more" if len(reasons) > 3 else ""
        raise UnsupportedModelError(f"no layer can take pattern {options.pattern}: {said}{more}")
    return found


def by_method(found: Thinned, fitted: Sequence[Refitted], method: str) -> Thinned:
    """The same, with the method in each layer that was solved for.

    Args:
        found: What was imposed; layers that no data spoke of keep their largest weights.
        fitted: What was solved.
        method: How.
    """
    nodes = {one.node for one in fitted if one.ridge is not None}
    solved = {one.tensor for one in found.done if one.node in nodes}
    layers = (
        replace(one, method=method) if one.done and one.tensor in solved else one
        for one in found.layers
    )
    return replace(found, layers=tuple(layers))


def wants_rounding(found: Thinned, rounding: int | str) -> str | None:
    """What to say where blocks are wider than what widths were rounded to, and layers lack them.

    Args:
        found: What was imposed.
        rounding: What widths were rounded to.
    """
    pattern = found.wish.pattern
    side = max(pattern.outputs, pattern.channels) if isinstance(pattern, Block) else 1
    narrow = [one for one in found.layers if not one.eligible and "not a multiple of" in one.why]
    fits = isinstance(rounding, int) and rounding % side == 0
    if side <= _ROUNDED or fits or not narrow:
        return None
    many = "1 layer stays" if len(narrow) == 1 else f"{len(narrow)} layers stay"
    return (
        f"{many} dense, first '{narrow[0].node}': {narrow[0].why}; widths are not rounded to "
        f"blocks of {side} by themselves: --round-to {side} does that where layers are wide enough"
    )


def measured_against(before: Model, found: Thinned) -> Thinned:
    """The same, with what is kept and what changed counted on weights that nothing was fitted to.

    Args:
        before: The model before values were chosen.
        found: What was imposed.
    """
    old, new = before.weights(), found.model.weights()

    def measured(one: ThinLayer) -> ThinLayer:
        was, now = (None if one.tensor is None else w.get(one.tensor) for w in (old, new))
        if not one.done or was is None or now is None or was.shape != now.shape:
            return one
        values = was.read()
        if values.dtype.kind in "iub":  # in integers zero is the zero point
            return one
        first: Float64Array = values.astype(np.float64)
        after: Float64Array = now.read().astype(np.float64)
        total, norm = np.abs(first).sum(), np.linalg.norm(first)
        if not total:
            return one
        stays = float(np.abs(first[after != 0]).sum() / total)
        return replace(one, kept=stays, error=float(np.linalg.norm(after - first) / norm))

    return replace(found, layers=tuple(map(measured, found.layers)))


def wish_of(options: SparsifyOptions) -> Wish:
    """What recorded options ask for."""
    return Wish.read(
        options.pattern,
        options.sparsity,
        scope=options.scope,
        ignore=options.ignore,
        only=options.only,
        only_gain=options.only_gain,
    )


def options_of(wish: Wish, method: str) -> SparsifyOptions:
    """Options as a recipe keeps them."""
    return SparsifyOptions(
        pattern=str(wish.pattern),
        sparsity=wish.sparsity,
        scope=wish.scope,  # type: ignore[arg-type]  # Wish checked it
        method=MAGNITUDE if method == "auto" else method,  # type: ignore[arg-type]  # checked
        only_gain=wish.only_gain,
        ignore=wish.ignore,
        only=wish.only,
    )


def check_replay(recipe: Recipe, found: Thinned) -> None:
    """Refuse a model in which a recipe thins other tensors than it says.

    Raises:
        RecipeError: It was made for another model.
    """
    made = {(one.tensor, one.axis, one.pattern) for one in found.done}
    if made != {(entry.tensor, entry.axis, entry.pattern) for entry in recipe.sparsity}:
        raise RecipeError("the recipe does not fit this model: other weights would be thinned")


def sparsified(
    found: Thinned, options: SparsifyOptions, before: Model, after: Model, *, xz: bool | None
) -> Sparsified:
    """What a report says of it.

    Args:
        found: What was done.
        options: As a recipe keeps them.
        before: The original.
        after: What is written.
        xz: Compress both to see what that saves; None does so where it is quick.
    """
    size = sum(weight.nbytes for weight in before.weights().values())
    measured = None
    if xz or (xz is None and size <= _XZ_UNASKED):
        measured = (xz_bytes(before), xz_bytes(after))
    return Sparsified(
        pattern=options.pattern,
        sparsity=options.sparsity,
        scope=options.scope,
        method=options.method,
        layers=found.layers,
        packed_bytes=sum(map(_packed, found.done)),
        dense_bytes=sum(-(-one.size * _bits(one) // 8) for one in found.done),
        xz_bytes=measured,
    )


def _packed(layer: ThinLayer) -> int:
    """Bytes of the values that are left, and of what says where they belong."""
    pattern = parse(layer.pattern)
    match pattern:
        case NM(n, m):  # for each value that stays its place in the run
            values = layer.size // m * n
            index = values * math.ceil(math.log2(m))
        case Block(height, width):  # a bit for each block
            values, index = round(layer.size * (1 - layer.sparsity)), layer.size // (height * width)
        case Kernel():
            values, index = round(layer.size * (1 - layer.sparsity)), layer.size // layer.taps
        case _:
            values, index = round(layer.size * (1 - layer.sparsity)), layer.size
    return -(-(values * _bits(layer) + index) // 8)


def _bits(layer: ThinLayer) -> int:
    return bits(layer.data_type)


class _Counting:
    """A file that only counts what xz would write."""

    def __init__(self) -> None:
        self._packer = lzma.LZMACompressor(preset=0)
        self.size = 0

    def write(self, data: bytes | memoryview) -> int:
        self.size += len(self._packer.compress(data))
        return len(data)

    def close(self) -> int:
        return self.size + len(self._packer.flush())


def xz_bytes(model: Model) -> int:
    """Size of a model compressed with xz at its fastest, weights in the file."""
    out = _Counting()
    write_to(model, out)
    return out.close()
