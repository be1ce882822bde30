"""Which sparsity patterns the weights of a model hold: in a file just written, or in any."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from onnxprune.errors import BUG, VerificationError
from onnxprune.model import Model, Weight
from onnxprune.patterns import NM, Block, Kernel, holds, misfit, zero_units
from onnxprune.thin import Thinned
from onnxprune.types import HeldWeight
from onnxprune.weights import SparseLayer, sparse_layers

_BLOCKS = (Block(1, 4), Block(4, 1), Block(2, 2), Block(4, 4))


def check_held(original: Model | None, written: Model, thinned: Thinned) -> None:
    """Refuse a model in which the pattern does not hold, or in which something else changed.

    None for the original asks for the pattern alone: norms were folded into the weights.

    Raises:
        VerificationError: That is so.
    """
    wrong = fault(original, written, thinned)
    if wrong is not None:
        raise VerificationError(wrong, hint=BUG)


def fault(original: Model | None, written: Model, thinned: Thinned) -> str | None:
    """What is wrong with a model that was to hold a pattern and be the original otherwise.

    Args:
        original: The model before; None where other values may have changed too.
        written: The model after, as it was read back.
        thinned: What was done.
    """
    pattern = thinned.wish.pattern
    rows = {str(one.tensor): one for one in thinned.done}
    before = {layer.stored.name: layer for layer in thinned.owners}
    missing = dict.fromkeys(rows)
    for layer in sparse_layers(written):
        row = None if layer.seen is None else rows.get(layer.stored.name)
        if row is None or layer.why_not is not None:
            continue
        if not holds(pattern, layer.matrix(), row.sparsity, taps=layer.taps):
            return f"the weight of '{layer.label}' does not hold {pattern} in the written file"
        if original is not None and not _thinned(layer, before[layer.stored.name]):
            return f"the weight of '{layer.label}' has other values than zeros that are new"
        missing.pop(layer.stored.name, None)
    if missing:
        return f"'{next(iter(missing))}' is not in the written file any more"
    if original is None:
        return None
    changed = {layer.stored.weight.name for layer in thinned.owners if layer.stored.top}
    found = written.weights()
    for name, weight in original.weights().items():
        if name not in changed and not _equal(weight, found.get(name)):
            return f"'{name}' changed, and should not have"
    return None


def _thinned(layer: SparseLayer, before: SparseLayer) -> bool:
    """Whether all that is not zero is what it was."""
    new, old = layer.stored.weight.read(), before.stored.weight.read()
    if new.dtype != old.dtype or new.shape != old.shape:
        return False
    same = new.view(np.uint8) == old.view(np.uint8) if new.dtype.itemsize == 1 else new == old
    return bool((same | (new == before.zero())).all())


def _equal(before: Weight, after: Weight | None) -> bool:
    if after is None or before.data_type != after.data_type or before.shape != after.shape:
        return False
    if before.dtype.kind in "OUS":
        return np.array_equal(before.read(), after.read())
    return memoryview(before.payload()) == memoryview(after.payload())


def held_weights(model: Model) -> Iterator[HeldWeight]:
    """What every layer's weight holds already, in the order in which layers run."""
    for layer in sparse_layers(model):
        if layer.seen is None or not layer.form or layer.why_not is not None:
            continue
        yield _held(layer)


def lost(before: Model, after: Model) -> int:
    """How many layers held 2:4 before and have a weight that does not now.

    Args:
        before: A model.
        after: What became of it; its weights have the same names.
    """
    pattern = NM(2, 4)
    held = {layer.stored.name for layer in _weighty(before) if _all_runs(pattern, layer)}
    if not held:
        return 0
    return sum(
        layer.stored.name in held and not _all_runs(pattern, layer) for layer in _weighty(after)
    )


def _weighty(model: Model) -> Iterator[SparseLayer]:
    """Layers whose weight can be seen as a matrix, each weight once."""
    layers = {layer.stored.name: layer for layer in sparse_layers(model) if layer.seen is not None}
    yield from (one for one in layers.values() if one.form and one.why_not is None)


def _all_runs(pattern: NM, layer: SparseLayer) -> bool:
    """Whether it holds the pattern; of nearly all weights the share of zeros tells already."""
    weight = layer.matrix()
    few = np.count_nonzero(weight) * pattern.m <= weight.size * pattern.n
    return bool(few and weight.any()) and holds(pattern, weight, 0.0, taps=layer.taps)


def _held(layer: SparseLayer) -> HeldWeight:
    weight = layer.matrix()
    filled = (weight != 0).astype(np.uint8)
    empty = not filled.any()
    runs = [
        str(pattern)
        for pattern in (NM(1, 4), NM(2, 4), NM(4, 8))
        if not empty and holds(pattern, filled, 0.0, taps=layer.taps)
    ]
    blocks = {}
    for block in _BLOCKS:
        if misfit(block, weight.shape, layer.taps) is None:
            zero, count = zero_units(block, filled)
            blocks[str(block)] = zero / count
    if layer.taps > 1:
        zero, count = zero_units(Kernel(), filled, taps=layer.taps)
        blocks["kernel"] = zero / count
    by_channel = filled.reshape(*weight.shape[:2], layer.taps, layer.channels)
    return HeldWeight(
        node=layer.label,
        op_type=layer.node.op_type,
        tensor=layer.stored.name,
        axis=layer.axis,
        groups=layer.groups,
        outputs=weight.shape[1],
        channels=layer.channels,
        taps=layer.taps,
        zeros=1 - int(np.count_nonzero(filled)) / max(1, filled.size),
        runs=tuple(runs),
        blocks=blocks,
        zero_outputs=int(np.count_nonzero(~filled.any(axis=2))),
        zero_channels=int(np.count_nonzero(~by_channel.any(axis=(1, 2)))),
    )
