"""What models are run on: arrays from a file, or made up and said to be so."""

from __future__ import annotations

import logging
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import overload

import numpy as np

from onnxprune.errors import UsageError
from onnxprune.feeds import Batch, Input, inputs_of, random_feeds, spell
from onnxprune.model import Model
from onnxprune.standins import stand_ins
from onnxprune.types import AnyArray, Shape

_log = logging.getLogger(__name__)
_IN_MEMORY = "the given arrays"  # instead of a file's name


@dataclass(frozen=True, slots=True)
class Data:
    """Inputs for a model.

    Attributes:
        batches: One mapping of input name to array for each run; may be iterated again and again.
        label: Where they come from, as every report says it.
        random: They are made up, so drift on them says little about quality.
        samples: Number of samples in all batches.
    """

    batches: Sequence[Batch] = field(repr=False)
    label: str
    random: bool
    samples: int

    @property
    def probes(self) -> tuple[Batch, ...]:
        """First and last batch: enough to test exactness, and two sizes wherever there are two."""
        return (self.batches[0], self.batches[-1]) if len(self.batches) > 1 else (self.batches[0],)

    def halves(self) -> tuple[Data, Data]:
        """The first half of the batches and the rest; twice all of it where there is one batch."""
        half = (len(self.batches) + 1) // 2
        parts = [self.batches[:half], self.batches[half:] or self.batches]
        counts = [sum(next(iter(batch.values())).shape[0] for batch in part) for part in parts]
        first, rest = (
            replace(self, batches=part, samples=count)
            for part, count in zip(parts, counts, strict=True)
        )
        return first, rest


AnyData = Data | Path | str | Mapping[str, AnyArray]


def digest_of(data: Data | None) -> str | None:
    """SHA-256 of the samples, however they are cut into batches; None for no data of the user's."""
    if data is None or data.random:
        return None
    found = sha256()
    for name in sorted(data.batches[0]):
        first = data.batches[0][name]
        found.update(repr((name, first.dtype.str, first.shape[1:])).encode())
        for batch in data.batches:
            found.update(np.ascontiguousarray(batch[name]).tobytes())
    return found.hexdigest()


# ------------------------------------------------------------------------------ random inputs


def random_data(
    model: Model,
    *,
    seed: int = 0,
    shapes: Mapping[str, Shape] | None = None,
    batches: int = 2,
) -> Data:
    """Made-up inputs for ``model``: normal floats, small integers, images of 0..255 in uint8.

    Args:
        model: Its graph inputs say what is needed.
        seed: Same seed, same arrays.
        shapes: Shape of each input; None takes the stand-ins of ``onnxprune.standins``, which are
            two sizes for a model with symbolic dimensions.
        batches: Number of runs; at least one for each size.

    Raises:
        VerificationError: An input takes strings, or no tensor at all.
    """
    sizes = _sizes(model, inputs_of(model), shapes)
    made = random_feeds(model, sizes, seed=seed, batches=batches)
    return Data(made, f"random, seed {seed}", random=True, samples=sum(map(_samples, made)))


def _sizes(
    model: Model, inputs: Sequence[Input], shapes: Mapping[str, Shape] | None
) -> tuple[Mapping[str, Shape], ...]:
    """Concrete shapes of all inputs: one mapping, or two where the model is dynamic."""
    static: dict[str, Shape] = {}
    for value in inputs:
        if value.dims is not None and None not in value.dims:
            static[value.name] = tuple(dim for dim in value.dims if dim is not None)
    known = {**static, **(shapes or {})}
    if all(value.name in known for value in inputs):
        return (known,)
    return tuple({**found, **(shapes or {})} for found in stand_ins(model))


def _samples(batch: Batch) -> int:
    """Length of axis 0 of the first input that has one."""
    return next((array.shape[0] for array in batch.values() if array.ndim), 1)


# ---------------------------------------------------------------------------- inputs from a file


def load_data(path: Path | str, model: Model, *, batch: int = 32, limit: int | None = None) -> Data:
    """Inputs from an ``.npz`` file: a key for each input name, axis 0 counts samples.

    One array for one input may have any key. A model of fixed batch is fed in pieces of that
    size. An array of one more axis than its input (or one axis for a scalar input) holds a whole
    input for each run. The arrays are read once and handed out as slices.

    Args:
        path: File to read; arrays of Python objects are refused.
        model: Its graph inputs say what is needed.
        batch: Samples in one run, where the model leaves that open.
        limit: Use no more than the first so many samples.

    Raises:
        UsageError: The file cannot be read, or does not fit the model.
    """
    path = Path(path)
    inputs = inputs_of(model)
    return _cut_up(path, inputs, _read(path, inputs), batch, limit)


def as_data(data: AnyData | None, model: Model) -> Data | None:
    """Data of whatever the caller has: as they are, an ``.npz`` file, or arrays by input name.

    Raises:
        UsageError: They cannot be read, do not fit the model, or are something else.
    """
    match data:
        case None | Data():
            return data
        case str() | Path():
            return load_data(data, model)
        case Mapping():
            return given_arrays(data, model)
    raise UsageError(
        f"data is a {type(data).__name__}",
        hint="give an .npz file, a mapping of input name to array, or Data",
    )


def given_arrays(
    arrays: Mapping[str, AnyArray], model: Model, *, batch: int = 32, limit: int | None = None
) -> Data:
    """``load_data`` for arrays that are in memory already, by input name.

    Raises:
        UsageError: They do not fit the model.
    """
    name, inputs = Path(_IN_MEMORY), inputs_of(model)
    try:
        named = {str(key): np.asarray(array) for key, array in arrays.items()}
    except ValueError as error:  # rows of unequal length
        raise UsageError(f"data cannot be made into arrays: {error}") from error
    keys = list(named)
    found = {value.name: named[_key(name, keys, value, inputs)] for value in inputs}
    return _cut_up(name, inputs, found, batch, limit)


def _cut_up(
    path: Path,
    inputs: Sequence[Input],
    arrays: Mapping[str, AnyArray],
    batch: int,
    limit: int | None,
) -> Data:
    for value in inputs:
        _check_values(path, value, arrays[value.name])
    step = _step(inputs, arrays, batch)
    runs = {
        value.name: _Pieces.cut(path, value, arrays[value.name], step=step, limit=limit)
        for value in inputs
    }
    counts = {name: pieces.samples for name, pieces in runs.items() if pieces.samples is not None}
    plain = {count for name, count in counts.items() if not runs[name].stacked}
    if len(plain) > 1 or len({len(pieces.cuts) for pieces in runs.values() if pieces.cuts}) > 1:
        said = ", ".join(f"'{name}' {count}" for name, count in counts.items())
        raise UsageError(f"{path.name}: the inputs have different numbers of samples: {said}")
    batches = _Batches(runs)
    samples = next(iter(counts.values()), 1)
    return Data(batches, f"{path.name}, {samples} samples", random=False, samples=samples)


def _read(path: Path, inputs: Sequence[Input]) -> dict[str, AnyArray]:
    """The array of each input."""
    hint = "np.savez(path, input_name=array) writes such a file"
    try:
        archive = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path.name} is not an .npz file of arrays", hint=hint) from error
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise UsageError(f"{path.name} holds one bare array, not an .npz file", hint=hint)
    with archive:
        return {
            value.name: _member(path, archive, _key(path, archive.files, value, inputs))
            for value in inputs
        }


def _key(path: Path, keys: Sequence[str], value: Input, inputs: Sequence[Input]) -> str:
    """Key of one input: its name, or any where one array meets one input."""
    if value.name in keys:
        return value.name
    if len(keys) == 1 and len(inputs) == 1:
        return keys[0]
    held = ", ".join(f"'{key}'" for key in keys) or "nothing"
    raise UsageError(
        f"{path.name} has no array for input '{value.name}' ({value.spelled}): it holds {held}",
        hint="keys are input names",
    )


def _member(path: Path, archive: Mapping[str, AnyArray], key: str) -> AnyArray:
    """One array of the file, which is where pickles and damage come to light."""
    try:
        array = archive[key]
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        if "pickle" in str(error).lower():
            raise UsageError(
                f"{path.name}: '{key}' holds Python objects (a pickle), which are refused",
                hint="save plain numbers: array.astype(np.float32)",
            ) from error
        raise UsageError(f"{path.name}: '{key}' cannot be read: {error}") from error
    if not isinstance(array, np.ndarray):
        raise UsageError(f"{path.name}: '{key}' is not an array")
    return array


def _check_values(path: Path, value: Input, array: AnyArray) -> None:
    """Refuse what cannot be cast to the input's type without changing its meaning."""
    found, wanted = array.dtype, value.dtype
    text, number = found.kind in "OUS", wanted.kind not in "OUS"
    if text == number or found.kind in "cmM" or (found.kind == "f" and wanted.kind in "iub"):
        raise UsageError(
            f"{path.name}: input '{value.name}' is {value.spelled}, "
            f"found {found} {spell(array.shape)}"
        )
    if array.size == 0 or text:
        return
    if found.kind == "f" and np.isnan(np.min(array)):  # min hands on a NaN, and makes no copy
        raise UsageError(f"{path.name}: the array for input '{value.name}' has NaN in it")
    if found.kind == "f" and wanted.kind == "f":
        _check_finite(path, value, array)
    if wanted.kind in "iu" and found.kind in "iu":
        low, high = int(array.min()), int(array.max())
        range_ = np.iinfo(wanted)  # type: ignore[type-var]  # an integer
        if low < range_.min or high > range_.max:
            raise UsageError(
                f"{path.name}: input '{value.name}' is {wanted}, found {found} values "
                f"from {low} to {high}"
            )


def _check_finite(path: Path, value: Input, array: AnyArray) -> None:
    """Refuse floats that are infinite, or would be in the input's type.

    Minus infinity stands in masks that are added to scores: those have nothing above zero.
    """
    low, high = float(array.min()), float(array.max())
    if np.isneginf(low) and high <= 0:
        return
    peak = max(-low, high)
    largest = float(np.finfo(value.dtype).max)  # type: ignore[type-var]  # a float
    if peak > largest:
        what = "infinite values" if np.isinf(peak) else f"{peak:.3g}, which is infinite as a float"
        raise UsageError(
            f"{path.name}: the array for input '{value.name}' has {what} in it",
            hint="leave such samples out",
        )


def _step(inputs: Sequence[Input], arrays: Mapping[str, AnyArray], batch: int) -> int:
    """Samples in one run where no input fixes it: one if an array holds an input a run."""
    for value in inputs:
        if value.dims and value.dims[0] is not None:
            return value.dims[0] or 1
    stacked = any(
        value.dims is not None and arrays[value.name].ndim == len(value.dims) + 1
        for value in inputs
    )
    return 1 if stacked else batch


@dataclass(frozen=True, slots=True)
class _Pieces:
    """One input's array, cut into runs. ``samples`` is None where every run gets all of it."""

    array: AnyArray
    dtype: np.dtype[np.generic]
    cuts: tuple[tuple[int, int], ...]
    stacked: bool
    samples: int | None

    @classmethod
    def cut(
        cls, path: Path, value: Input, array: AnyArray, *, step: int, limit: int | None
    ) -> _Pieces:
        """Plan the cuts of ``array`` for runs of ``step`` samples."""
        if value.dims == () and array.ndim == 0:
            return cls(array, value.dtype, (), stacked=False, samples=None)
        rank = array.ndim if value.dims is None else len(value.dims)
        dims = value.dims if value.dims is not None else (None,) * rank
        stacked = array.ndim == rank + 1
        shape, expected = (array.shape[1:], dims) if stacked else (array.shape[1:], dims[1:])
        fits = array.ndim in (rank, rank + 1) and all(
            want is None or want == got for want, got in zip(expected, shape, strict=True)
        )
        if not fits:
            raise UsageError(
                f"{path.name}: input '{value.name}' is {value.spelled}, "
                f"found {array.dtype} {spell(array.shape)}"
            )
        total = array.shape[0] if limit is None else min(limit, array.shape[0])
        if stacked:
            cuts = [(index, index + 1) for index in range(total)]
        else:
            fixed = dims[0] is not None
            cuts = _cuts(total, step, keep_rest=not fixed)
            used = cuts[-1][1] if cuts else 0
            if used < total and cuts:
                _log.warning(
                    "%s: the model takes %d samples at a time; the last %d of '%s' are left out",
                    path.name, step, total - used, value.name,
                )  # fmt: skip
            total = used
        if not cuts:
            raise UsageError(
                f"{path.name}: input '{value.name}' takes {value.spelled}, but the file has "
                f"{array.shape[0]} samples"
            )
        return cls(array, value.dtype, tuple(cuts), stacked=stacked, samples=total)

    def piece(self, run: int) -> AnyArray:
        """The slice for one run, cast to the input's type (a view where it has that already)."""
        if self.samples is None:
            return self.array.astype(self.dtype, copy=False)
        start, stop = self.cuts[run]
        part = self.array[start] if self.stacked else self.array[start:stop]
        return np.asarray(part).astype(self.dtype, copy=False)


def _cuts(total: int, step: int, *, keep_rest: bool) -> list[tuple[int, int]]:
    """Consecutive runs of ``step``; where the size is free there are two sizes if possible."""
    stops = list(range(step, total + 1, step))
    if keep_rest:
        if total % step:
            stops.append(total)
        if total > 1 and step > 1 and (len(stops) == 1 or total % step == 0):
            stops.insert(-1, total - 1)  # So that a batch size baked into a model shows.
    return list(zip([0, *stops[:-1]], stops, strict=True)) if stops else []


@dataclass(frozen=True, slots=True)
class _Batches(Sequence[Batch]):
    """The runs of all inputs together; arrays are sliced when asked for."""

    runs: Mapping[str, _Pieces]

    def __len__(self) -> int:
        counts = [len(pieces.cuts) for pieces in self.runs.values() if pieces.samples is not None]
        return min(counts, default=1)

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Batch]: ...
    def __getitem__(self, index: int | slice) -> Batch | Sequence[Batch]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        run = index % len(self)
        return {name: pieces.piece(run) for name, pieces in self.runs.items()}

    def __iter__(self) -> Iterator[Batch]:
        return (self[run] for run in range(len(self)))
