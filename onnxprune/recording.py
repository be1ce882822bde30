"""Recipes of what was done, and into the model that it made."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import replace

import onnx

from onnxprune.model import Model
from onnxprune.recipe import (
    METADATA_KEY,
    CopyEntry,
    MaskEntry,
    MergedEntry,
    Options,
    PermutedEntry,
    QuantizeOptions,
    Recipe,
    RemovedEntry,
    RewrittenEntry,
    SparsityEntry,
    read,
)
from onnxprune.record import Copy, Mask, Removed
from onnxprune.rewrite import Surgery
from onnxprune.stream import serialize
from onnxprune.types import Moved, ThinLayer

_CHUNK = 1 << 24  # bytes hashed at a time


def build(
    model: Model,
    surgery: Surgery,
    options: Options,
    version: str,
    sparsity: Iterable[ThinLayer] = (),
    permuted: Iterable[Moved] = (),
    merged: Iterable[tuple[str, str]] = (),
) -> Recipe:
    """The recipe of a surgery.

    Args:
        model: The original.
        surgery: From ``operate``.
        options: What was asked for, with the importance that ``auto`` took.
        version: Of onnxprune.
        sparsity: Layers whose weights hold a pattern now, one for each tensor.
        permuted: Axes of weights whose entries stand in another order.
        merged: First outputs of nodes that were folded into a layer, and of that layer.
    """
    return Recipe(
        schema=1,
        version=version,
        input_sha256=digest(model),
        layout_sha256=layout(model),
        options=options,
        copies={name: _copy(copy) for name, copy in surgery.copies.items()},
        removed=tuple(map(removed_entry, surgery.removed)),
        masks=tuple(map(_mask, surgery.masks)),
        folded=surgery.folded,
        restored=surgery.restored,
        sparsity=tuple(map(_sparsity, sparsity)),
        permuted=tuple(
            PermutedEntry(tensor=one.tensor, axis=one.axis, role=one.role, kept=one.kept)  # type: ignore[arg-type]  # pydantic checks it
            for one in permuted
        ),
        merged=tuple(MergedEntry(node=node, into=into) for node, into in merged),
        rewritten=tuple(
            RewrittenEntry.model_validate(
                {**change.what, "from": change.before, "to": change.after}
            )
            for change in surgery.changes
        ),
    )


def _copy(copy: Copy) -> CopyEntry:
    return CopyEntry(of=copy.of, uses=copy.uses)


def removed_entry(removed: Removed) -> RemovedEntry:
    """What went from one weight, as a recipe has it."""
    at = None if removed.at is None else {str(removed.at[0]): (removed.at[1], removed.at[2])}
    return RemovedEntry(
        tensor=removed.tensor,
        axis=removed.axis,
        role=removed.role,  # type: ignore[arg-type]  # pydantic checks it
        indices=removed.indices,
        at=at,
    )


def _sparsity(layer: ThinLayer) -> SparsityEntry:
    share = None if ":" in layer.pattern else layer.sparsity
    return SparsityEntry(
        tensor=layer.tensor or "", axis=layer.axis or 0, pattern=layer.pattern, sparsity=share
    )


def _mask(mask: Mask) -> MaskEntry:
    return MaskEntry(node=mask.node, input=mask.input, shape=mask.shape, zero=mask.zero)


def digest(model: Model) -> str:
    """SHA-256 of the file, its external data after it; of a model in memory, of its bytes."""
    found = hashlib.sha256()
    if not model.sources:
        found.update(serialize(model))
    for source in model.sources:
        with source.open("rb") as file:
            while chunk := file.read(_CHUNK):
                found.update(chunk)
    return found.hexdigest()


def layout(model: Model) -> str:
    """SHA-256 of names and shapes of all top-level constants: equal after retraining."""
    named = sorted((name, weight.shape) for name, weight in model.weights().items())
    return hashlib.sha256(json.dumps(named).encode()).hexdigest()


def embed(model: Model, recipe: Recipe) -> Model:
    """The model with the recipe in its metadata, in place of any that was there."""
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)  # large weights are deferred: nothing heavy is copied
    for entry in proto.metadata_props:
        if entry.key == METADATA_KEY:
            entry.value = recipe.compact()
            break
    else:
        proto.metadata_props.add(key=METADATA_KEY, value=recipe.compact())
    return replace(model, proto=proto)


def requantized(model: Model, source: Model, done: QuantizeOptions, version: str) -> Model:
    """The model with a recipe that says what its quantization did, after all that came before.

    Args:
        model: What ``source`` became.
        source: What was quantized, with a recipe or without.
        done: What was done.
        version: Of onnxprune.
    """
    carried = any(entry.key == METADATA_KEY for entry in source.proto.metadata_props)
    untouched = Surgery(source, (), {}, (), ())
    before = read(source) if carried else build(source, untouched, Options(), version)
    options = before.options.model_copy(update={"quantize": done})
    return embed(model, before.model_copy(update={"options": options}))


def quantized_before(model: Model) -> QuantizeOptions | None:
    """What quantization the recipe in a model speaks of."""
    carried = any(entry.key == METADATA_KEY for entry in model.proto.metadata_props)
    return read(model).options.quantize if carried else None
