"""The recipe: everything that changed the weights, in the original's tensor names.

It is stored in the model it made, and replays on the same model or on a retrained one.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from onnxprune.data import Data, digest_of
from onnxprune.errors import ModelError, RecipeError
from onnxprune.groups import DependencyGraph
from onnxprune.io import load
from onnxprune.lossless import lossless_plan
from onnxprune.model import Model
from onnxprune.record import Copy, Mask, Removed
from onnxprune.rewrite import Surgery, operate
from onnxprune.select import PruningPlan
from onnxprune.stream import serialize
from onnxprune.types import BoolArray, Moved, ThinLayer, WeightAxis

METADATA_KEY = "onnxprune.recipe"
_CHUNK = 1 << 24  # bytes hashed at a time

_log = logging.getLogger(__name__)


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class SparsifyOptions(_Part):
    """What pattern was asked for, defaults filled in."""

    pattern: str
    sparsity: float
    scope: Literal["local", "global"] = "local"
    method: Literal["magnitude", "wanda", "sparsegpt"] = "magnitude"
    permute: bool = False
    only_gain: bool = False
    ignore: tuple[str, ...] = ()
    only: tuple[str, ...] = ()


class QuantizeOptions(_Part):
    """What quantization was asked for, and what it came to.

    ``method`` is null for floats; ``floats`` are layers that int8 left in float for their drift;
    ``before`` is a quantization that came first, as int8 does before fp16.
    """

    to: Literal["fp16", "bf16", "int8"]
    method: Literal["minmax", "percentile", "entropy"] | None = None
    ignore: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    convert_io: bool = False
    floats: tuple[str, ...] = ()
    before: QuantizeOptions | None = None


class Options(_Part):
    """What was asked for, defaults filled in."""

    ratio: float | None = None
    lossless: bool = False
    targets: dict[str, float] = {}
    scope: Literal["local", "global", "isomorphic"] = "local"
    importance: str = "auto"
    aggregate: Literal["sum", "mean", "max"] | None = None
    round_to: int | Literal["auto"] = 1
    min_channels: int = 1
    max_ratio: float = 0.9
    ignore: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    ratio_for: dict[str, float] = {}
    sensitivity_sha256: str | None = None
    max_loss: float | None = None
    data_sha256: str | None = None
    attention: Literal["heads", "dims", "none"] = "heads"
    allow_norm: bool = False
    input_shape: dict[str, tuple[int, ...]] = {}
    restore: Literal["none", "bias", "pictures", "refit"] = "none"
    steps: int = 1
    schedule: Literal["polynomial", "linear"] = "polynomial"
    seed: int = 0
    sparsify: SparsifyOptions | None = None
    fold_bn: bool = False
    simplify: bool = False
    quantize: QuantizeOptions | None = None


class CopyEntry(_Part):
    """A constant made from a shared one, and the node inputs that read it."""

    of: str
    uses: tuple[tuple[str, int], ...]


class RemovedEntry(_Part):
    """Positions that went from one axis of one weight; ``at``: the part of it this speaks of."""

    tensor: str
    axis: int
    role: Literal["producer", "consumer", "parameter"]
    indices: tuple[int, ...]
    at: dict[str, tuple[int, int]] | None = None


class MaskEntry(_Part):
    """A 0/1 mask the masked twin multiplies one input of a node by."""

    node: str
    input: int
    shape: tuple[int, ...]
    zero: tuple[int, ...]


class RewrittenEntry(_Part):
    """A shape constant, attribute or run of nodes that was written anew."""

    tensor: str | None = None
    node: str | None = None
    nodes: tuple[str, ...] | None = None
    attribute: str | None = None
    input: int | None = None
    before: Any = Field(None, alias="from")
    after: Any = Field(None, alias="to")


class SparsityEntry(_Part):
    """A sparsity pattern; the mask is ``weight != 0`` in the saved file."""

    tensor: str
    axis: int
    pattern: str
    sparsity: float | None = Field(None, description="Of patterns that do not imply it.")


class PermutedEntry(_Part):
    """An axis of a weight whose entries stand in another order: the original ones, in the new."""

    tensor: str
    axis: int
    role: Literal["producer", "consumer", "parameter"]
    kept: tuple[int, ...]


class MergedEntry(_Part):
    """A node that was folded into a layer, both by their first outputs in the model before."""

    node: str
    into: str


class Recipe(_Part):
    """Everything needed to repeat a run, and to check it with numpy alone."""

    schema_: Literal[1] = Field(1, alias="schema")
    version: str
    input_sha256: str
    layout_sha256: str = Field(description="Of the names and shapes of the original's constants.")
    options: Options
    copies: dict[str, CopyEntry] = {}
    removed: tuple[RemovedEntry, ...] = ()
    masks: tuple[MaskEntry, ...] = ()
    folded: tuple[str, ...] = Field(
        (), description="Tensors computed from constants alone, which became constants."
    )
    rewritten: tuple[RewrittenEntry, ...] = ()
    restored: tuple[str, ...] = ()
    sparsity: tuple[SparsityEntry, ...] = ()
    permuted: tuple[PermutedEntry, ...] = ()
    merged: tuple[MergedEntry, ...] = ()

    @property
    def thins_only(self) -> bool:
        """Whether it is one of ``sparsify``: weights are thinned, and no cut was asked for."""
        asked = self.options
        cut = (
            asked.ratio is not None or asked.targets or asked.lossless or asked.max_loss is not None
        )
        return asked.sparsify is not None and not cut and not self.removed

    def as_json(self) -> dict[str, object]:
        """The recipe as DESIGN §11 writes it."""
        written: dict[str, object] = self.model_dump(mode="json", by_alias=True)
        optional = {"sensitivity_sha256", "max_loss"} if self.options.max_loss is None else set()
        optional |= {"data_sha256"} if self.options.data_sha256 is None else set()
        optional |= {"sparsify"} if self.options.sparsify is None else set()
        optional |= {name for name in ("fold_bn", "simplify") if not getattr(self.options, name)}
        optional |= {"quantize"} if self.options.quantize is None else set()
        written["options"] = self.options.model_dump(mode="json", exclude=optional)
        written["sparsity"] = [
            entry.model_dump(mode="json", exclude_none=True) for entry in self.sparsity
        ]
        for name in ("permuted", "merged"):
            if not getattr(self, name):
                del written[name]
        written["removed"] = [
            entry.model_dump(mode="json", exclude_none=True) for entry in self.removed
        ]
        written["rewritten"] = [
            entry.model_dump(mode="json", by_alias=True, exclude_unset=True)
            for entry in self.rewritten
        ]
        return written

    def compact(self) -> str:
        """One line, the same for the same recipe."""
        return json.dumps(self.as_json(), sort_keys=True, separators=(",", ":"), ensure_ascii=False)

    def readable(self) -> str:
        """The same with one line for each entry."""
        return "".join(_lines(self.as_json()))


def _lines(written: Mapping[str, object]) -> Iterator[str]:
    opening = "{\n"
    for key in sorted(written):
        value = written[key]
        yield f"{opening}{json.dumps(key)}: "
        if isinstance(value, list) and value:
            entries = (json.dumps(entry, sort_keys=True, ensure_ascii=False) for entry in value)
            yield "[\n  " + ",\n  ".join(entries) + "\n]"
        else:
            yield json.dumps(value, sort_keys=True, ensure_ascii=False)
        opening = ",\n"
    yield "\n}\n"


# -- making ----------------------------------------------------------------------------------------


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
        removed=tuple(map(_removed, surgery.removed)),
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


def _removed(removed: Removed) -> RemovedEntry:
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


# -- reading ---------------------------------------------------------------------------------------


def read(source: Path | str | Model) -> Recipe:
    """The recipe in a JSON file or in a model that onnxprune made.

    Raises:
        RecipeError: There is none, or it is of another version.
    """
    if isinstance(source, Model):
        return _parse(_metadata(source, "the model"), "the model")
    path = Path(source)
    try:
        text = (
            path.read_text("utf-8") if path.suffix == ".json" else _metadata(load(path), str(path))
        )
    except OSError as error:
        raise RecipeError(f"cannot read recipe '{path}': {error.strerror}") from error
    except ModelError as error:
        raise RecipeError(f"cannot read recipe: {error.message}", hint=error.hint) from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"'{path}' is no recipe: it is not text") from error
    return _parse(text, str(path))


def _metadata(model: Model, name: str) -> str:
    for entry in model.proto.metadata_props:
        if entry.key == METADATA_KEY:
            return str(entry.value)
    raise RecipeError(
        f"'{name}' carries no recipe: onnxprune did not make it, or cut nothing when it did",
        hint="give a model that it cut, or the .json of --recipe-out",
    )


def _parse(text: str, name: str) -> Recipe:
    try:
        return Recipe.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise RecipeError(
            f"'{name}' is no recipe of this version: {where}: {first['msg']}"
        ) from error


def replay(graph: DependencyGraph, recipe: Recipe) -> PruningPlan:
    """The plan that cuts what a recipe says.

    Args:
        graph: Analysis of the same model, or of one that differs in nothing but weight values.
        recipe: What to repeat.

    Raises:
        RecipeError: The recipe was made for another model.
    """
    model = graph.graph.source
    _check_layout(model, recipe)
    if recipe.options.lossless:
        return _replay_lossless(graph, recipe)
    entries: dict[str, list[RemovedEntry]] = {}
    for entry in recipe.removed:
        if entry.role == "producer":
            entries.setdefault(entry.tensor, []).append(entry)
    keep, why = {}, {}
    for group in graph.prunable:
        gone = np.zeros(group.size, np.bool_)
        for axis in group.producers:
            for positions in _positions(axis, entries.get(axis.tensor, ())):
                gone[axis.unit[positions]] = True
        keep[group.id] = np.flatnonzero(~gone)
        why[group.id] = f"{int(gone.sum())} of {group.size} removed by the recipe"
    plan = PruningPlan(graph, keep, why)
    if tuple(map(_removed, operate(plan).removed)) != recipe.removed:
        raise RecipeError("the recipe does not fit this model: other channels would go")
    _warn_of_other_values(model, recipe)
    return plan


def warn_of_other_data(recipe: Recipe, data: Data | None) -> None:
    """Say so where weights follow from data, and these are not those of the recipe."""
    before, now = recipe.options.data_sha256, digest_of(data)
    if before is not None and now is not None and before != now:
        _log.warning("the recipe was made with other data: weights fitted to these differ")


def same_layout(model: Model, recipe: Recipe) -> None:
    """Refuse a model whose constants have other names or shapes; warn of other values.

    Raises:
        RecipeError: The recipe was made for another model.
    """
    _check_layout(model, recipe)
    _warn_of_other_values(model, recipe)


def _check_layout(model: Model, recipe: Recipe) -> None:
    if layout(model) != recipe.layout_sha256:
        raise RecipeError(
            "the recipe was made for a model with other weight names or shapes",
            hint="give the model it was made for, or a retrained one",
        )


def _replay_lossless(graph: DependencyGraph, recipe: Recipe) -> PruningPlan:
    """What has no effect is found again, since constants moved to biases follow from values."""
    options = recipe.options
    plan = lossless_plan(graph, ignore=options.ignore, only=options.only)
    if tuple(map(_removed, operate(plan).removed)) != recipe.removed:
        raise RecipeError(
            "the lossless recipe does not fit this model: other channels are without effect in it",
            hint="run shrink --lossless on it",
        )
    _warn_of_other_values(graph.graph.source, recipe)
    return plan


def _warn_of_other_values(model: Model, recipe: Recipe) -> None:
    if digest(model) != recipe.input_sha256:
        _log.warning("the recipe was made for another file: same names and shapes, other values")


def _positions(axis: WeightAxis, entries: Iterable[RemovedEntry]) -> Iterator[BoolArray]:
    """Which of an axis's positions each entry takes, shape (members,)."""
    shape = tuple(axis.view[a] for a in axis.axes)
    split = axis.axes[-1] - axis.axis  # 1 where the view splits the tensor's first axis in two
    for entry in entries:
        if entry.axis + split not in axis.axes:
            continue
        cut = axis.axes.index(entry.axis + split)
        gone = np.zeros(shape, np.bool_)
        if entry.at is None:
            lines = np.moveaxis(gone, cut, 0)
            lines[[index for index in entry.indices if index < shape[cut]]] = True
        else:
            ((row_axis, (start, _)),) = entry.at.items()
            row_of = 0 if split else axis.axes.index(int(row_axis))
            row = np.moveaxis(gone, row_of, 0)[start // axis.view[1] if split else start]
            row.flat[[index for index in entry.indices if index < row.size]] = True
        yield gone.reshape(-1)[axis.index]
