"""The recipe: everything that changed the weights, in the original's tensor names.

It is stored in the model it made, and replays on the same model or on a retrained one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from onnxprune.errors import ModelError, RecipeError
from onnxprune.io import load
from onnxprune.model import Model

METADATA_KEY = "onnxprune.recipe"


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
