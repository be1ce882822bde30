"""What a sensitivity run found, as a file, and how much it allows each group to lose.

The file grows as groups are done, and a run that was stopped goes on from it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from onnxprune.errors import UsageError
from onnxprune.feeds import Batch
from onnxprune.gauges import Measure
from onnxprune.groups import DependencyGraph
from onnxprune.recording import digest, layout
from onnxprune.sensitivity import Point
from onnxprune.types import AnyArray

_log = logging.getLogger(__name__)
_ATTENTION = Literal["heads", "dims", "none"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class PointEntry(_Part):
    """One cut; null stands for a figure that is not finite."""

    ratio: float
    removed: int = Field(description="Units that went, of all groups of the entry.")
    figure: float | None = Field(description="Drift, accuracy, or what the metric gave.")
    loss: float | None = Field(description="Drift, or how far the figure fell.")


class GroupEntry(_Part):
    """A channel group."""

    id: int
    name: str
    size: int
    unit: str


class CurveEntry(_Part):
    """Groups that are cut together, and what that costs at each ratio."""

    groups: tuple[GroupEntry, ...]
    points: tuple[PointEntry, ...]


class ModelEntry(_Part):
    """The model that was measured."""

    path: str | None
    sha256: str
    layout_sha256: str = Field(description="Of the names and shapes of its constants.")


class MetricEntry(_Part):
    """A user's function, by name and text."""

    function: str
    sha256: str


class Estimate(_Part):
    """What a dry run says of the run: cuts it would measure, and about how long that takes."""

    points: int
    seconds: float


class Sensitivity(_Part):
    """What the verb ``sensitivity`` found."""

    schema_: Literal[1] = Field(1, alias="schema")
    verb: Literal["sensitivity"] = "sensitivity"
    version: str
    model: ModelEntry
    importance: str
    attention: _ATTENTION
    restore: Literal["none", "bias", "refit"] = "none"
    input_shape: dict[str, tuple[int, ...]] = {}
    seed: int = 0
    ratios: tuple[float, ...]
    measure: Measure
    metric: MetricEntry | None = None
    data: str
    samples: int
    data_sha256: str
    labels_sha256: str | None = None
    baseline: float | None = Field(description="The original's figure; 0 for drift.")
    groups: tuple[CurveEntry, ...] = ()
    complete: bool = False
    seconds: float = 0.0
    estimate: Estimate | None = Field(
        default=None, description="Of a dry run, which measures nothing."
    )

    def as_json(self) -> dict[str, object]:
        """One JSON object."""
        left_out = {"estimate"} if self.estimate is None else set()
        return self.model_dump(mode="json", by_alias=True, exclude=left_out)

    def with_curves(
        self, found: Mapping[tuple[int, ...], CurveEntry], *, complete: bool, seconds: float
    ) -> Sensitivity:
        """The same run with these curves, in the order of the groups."""
        curves = tuple(found[key] for key in sorted(found))
        return self.model_copy(
            update={"groups": curves, "complete": complete, "seconds": round(seconds, 3)}
        )


# Of a run that is gone on with, only these may differ.
_GROWING = {"version", "baseline", "groups", "complete", "seconds"}


def curve(graph: DependencyGraph, family: Iterable[int], points: Sequence[Point]) -> CurveEntry:
    """What was measured of one family of groups, as it is written."""
    groups = [graph.groups[number] for number in family]
    return CurveEntry(
        groups=tuple(
            GroupEntry(id=group.id, name=group.name, size=group.size, unit=group.unit)
            for group in groups
        ),
        points=tuple(
            PointEntry(
                ratio=point.ratio,
                removed=point.removed,
                figure=finite(point.figure),
                loss=finite(point.loss),
            )
            for point in points
        ),
    )


def finite(value: float) -> float | None:
    """The value, None where it is not finite."""
    return float(value) if math.isfinite(value) else None


def arrays_digest(batches: Iterable[Batch]) -> str:
    """SHA-256 of names, types, shapes and values of all arrays."""
    found = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            _add(found, name, batch[name])
    return found.hexdigest()


def labels_digest(labels: AnyArray | None) -> str | None:
    """SHA-256 of the labels, None where there are none."""
    return None if labels is None else arrays_digest([{"labels": labels}])


def _add(found: hashlib._Hash, name: str, array: AnyArray) -> None:
    found.update(repr((name, str(array.dtype), array.shape)).encode())
    plain = array.dtype.kind not in "OUS"
    found.update(np.ascontiguousarray(array).tobytes() if plain else repr(array.tolist()).encode())


# -- the file --------------------------------------------------------------------------------------


def read(path: Path | str) -> Sensitivity:
    """A result file.

    Raises:
        UsageError: It cannot be read, or is none.
    """
    path = Path(path)
    try:
        return Sensitivity.model_validate_json(path.read_text("utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read '{path}': {error.strerror}") from error
    except (UnicodeDecodeError, ValidationError) as error:
        raise UsageError(
            f"'{path}' is no result of `onnxprune sensitivity`", hint="give its JSON file"
        ) from error


class _Document(Protocol):
    def as_json(self) -> dict[str, object]: ...


def write(path: Path | str, found: _Document) -> None:
    """Write the whole file, or leave it as it was.

    Raises:
        UsageError: It cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".onnxprune-{secrets.token_hex(8)}.tmp")
    try:
        text = json.dumps(found.as_json(), indent=1, allow_nan=False) + "\n"
        temporary.write_text(text, "utf-8", newline="\n")
        temporary.replace(path)
    except OSError as error:
        raise UsageError(f"cannot write '{path}': {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def done_before(path: Path | str, run: Sensitivity) -> dict[tuple[int, ...], CurveEntry]:
    """Curves that an earlier run of the same measurement left in a file, by group ids.

    Raises:
        UsageError: The file is of another model, other options or other data.
    """
    before = read(path)
    old, new = before.as_json(), run.as_json()
    differing = [
        name for name in new if name not in _GROWING | {"model"} and old[name] != new[name]
    ]
    if before.model.sha256 != run.model.sha256:  # the file may have been moved
        differing.insert(0, "model")
    if differing:
        raise UsageError(
            f"'{path}' cannot be gone on with: it was made with another {differing[0]}",
            hint="--force starts afresh",
        )
    return {tuple(group.id for group in entry.groups): entry for entry in before.groups}


@dataclass(frozen=True)
class Allowance:
    """A result file and how much may be lost by it.

    Attributes:
        found: What the file holds.
        sha256: Of the file.
        max_loss: Most that any one group may lose: of drift, accuracy, or the metric.
    """

    found: Sensitivity
    sha256: str
    max_loss: float

    @classmethod
    def read(cls, path: Path | str, max_loss: float) -> Allowance:
        """Read a file.

        Raises:
            UsageError: It is no complete result, or ``max_loss`` is negative.
        """
        found = read(path)
        if not max_loss >= 0:
            raise UsageError(f"max-loss is {max_loss:g}", hint="give 0 or more")
        if not found.complete:
            raise UsageError(f"'{path}' is not complete", hint="finish it with --resume")
        return cls(found, hashlib.sha256(Path(path).read_bytes()).hexdigest(), max_loss)

    def ratios(
        self, graph: DependencyGraph, importance: str, most: float | None, restore: str
    ) -> dict[int, float]:
        """As ``allowed_ratios``, with a warning where cuts were ranked or restored otherwise."""
        if self.found.restore not in ("none", restore):
            _log.warning(
                "groups were measured with restore %s: with %s each loses more",
                self.found.restore, restore,
            )  # fmt: skip
        if importance != self.found.importance:
            _log.warning(
                "groups were measured with importance %s and are cut by %s",
                self.found.importance, importance,
            )  # fmt: skip
        return allowed_ratios(self.found, graph, self.max_loss, most=most)


# -- what it allows --------------------------------------------------------------------------------


def allowed_ratios(
    found: Sensitivity, graph: DependencyGraph, max_loss: float, *, most: float | None = None
) -> dict[int, float]:
    """For each prunable group the largest ratio whose loss is allowed.

    Args:
        found: A complete result for this model, or for one that differs in weight values only.
        graph: The analysis of the model that is to be cut.
        max_loss: Most that may be lost: of drift, accuracy, or the metric.
        most: No ratio is above this.

    Raises:
        UsageError: The result is of another model.
    """
    if found.model.layout_sha256 != layout(graph.graph.source):
        raise UsageError(
            "the sensitivity file was made for a model with other weight names or shapes",
            hint="run `onnxprune sensitivity` on this one",
        )
    if found.model.sha256 != digest(graph.graph.source):
        _log.warning("the sensitivity file is of another file: same names and shapes, other values")
    ratios: dict[int, float] = {}
    known = {(g.id, g.name, g.size): entry for entry in found.groups for g in entry.groups}
    for group in graph.prunable:
        entry = known.get((group.id, group.name, group.size))
        if entry is None:
            raise UsageError(
                f"the sensitivity file has no group '{group.name}' of {group.size} {group.unit}s",
                hint=f"it was made with --attention {found.attention}",
            )
        ratio = largest_ratio(entry.points, max_loss)
        ratios[group.id] = ratio if most is None else min(ratio, most)
    return ratios


def largest_ratio(points: Sequence[PointEntry], max_loss: float) -> float:
    """Where the loss reaches ``max_loss``, on straight lines between the measured ratios.

    The loss is taken to be 0 at ratio 0 and never to fall from one ratio to the next: what a
    larger cut seems to win back is chance. Beyond the last measured ratio nothing is allowed.
    """
    ratio, loss = 0.0, 0.0
    for point in sorted(points, key=lambda point: point.ratio):
        if point.loss is None:
            return ratio
        highest = max(loss, point.loss)
        if highest > max_loss:
            return ratio + (point.ratio - ratio) * (max_loss - loss) / (highest - loss)
        ratio, loss = point.ratio, highest
    return ratio
