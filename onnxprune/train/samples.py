"""Training data by sample: inputs, labels, and what the teacher says of them."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from onnxprune.data import Data
from onnxprune.errors import UsageError
from onnxprune.runtime import Session
from onnxprune.train.classes import whole_classes
from onnxprune.train.protocol import Arrays
from onnxprune.types import AnyArray, IntArray

_IN_MEMORY = 1 << 28  # bytes of teacher outputs; more go to a temporary file
_ON_DISK = 1 << 34  # bytes; beyond this the teacher runs again for each batch
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Samples:
    """Inputs, by sample along axis 0 of every array.

    Attributes:
        inputs: By name of graph input, as the model takes them.
        labels: Class of each sample, shape (samples, …), or None.
        label: Where they come from, as reports say it.
    """

    inputs: Arrays = field(repr=False)
    labels: IntArray | None
    label: str

    @classmethod
    def of(cls, data: Data, labels: AnyArray | None) -> Samples:
        """All samples of ``data`` in one piece.

        Raises:
            UsageError: Inputs are not counted by samples.
        """
        names = list(data.batches[0])
        joined = {
            name: np.concatenate([np.atleast_1d(batch[name]) for batch in data.batches])
            for name in names
        }
        counts = {len(array) for array in joined.values()}
        if len(counts) != 1:
            raise UsageError(
                "the inputs do not have one entry for each sample along axis 0",
                hint="training needs batches of samples",
            )
        count = counts.pop()
        if labels is not None and len(labels) < count:
            raise UsageError(f"there are {len(labels)} labels for {count} samples")
        held = None if labels is None else whole_classes(labels[:count])
        return cls(joined, held, data.label)

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    def take(self, at: IntArray) -> Samples:
        """Some of them, copied."""
        inputs = {name: array[at] for name, array in self.inputs.items()}
        return Samples(inputs, None if self.labels is None else self.labels[at], self.label)

    def batches(self, size: int) -> Iterator[tuple[Arrays, slice]]:
        """In order, the last one smaller."""
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            yield {name: array[part] for name, array in self.inputs.items()}, part

    def split(self, share: float, seed: int) -> tuple[Samples, Samples]:
        """For training and for validation, drawn at random.

        Raises:
            UsageError: One of the two would be empty.
        """
        order = np.random.default_rng([seed, 1]).permutation(len(self))
        held = round(share * len(self))
        if not 0 < held < len(self):
            raise UsageError(
                f"--val {share:g} of {len(self)} samples leaves none to train or to validate on",
                hint="give more samples, another share, or a file",
            )
        return self.take(np.sort(order[held:])), self.take(np.sort(order[:held]))


class Teacher:
    """Outputs of the model that is to be imitated, for each sample of a set.

    Each is computed once and kept: in memory, in a temporary file where that is too little, and
    where a disk is too small too the teacher runs again whenever it is asked.

    Args:
        session: The teacher.
        samples: What it sees.
        outputs: Names of the outputs wanted.
        batch: Samples in one run.
        heard: Called after each run with the share done.
    """

    def __init__(
        self,
        session: Session,
        samples: Samples,
        outputs: Sequence[str],
        batch: int,
        heard: Callable[[float], object] = lambda _: None,
    ) -> None:
        self._session, self._samples, self._batch = session, samples, batch
        self._names = tuple(outputs)
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._kept: dict[str, AnyArray] | None = {}
        for inputs, part in samples.batches(batch):
            said = self._say(inputs)
            if not self._keep(said, part):
                break
            heard(min(1.0, part.stop / len(samples)))

    def _say(self, inputs: Arrays) -> dict[str, AnyArray]:
        given = {
            name: array.astype(self._session.inputs.get(name, array.dtype), copy=False)
            for name, array in inputs.items()
        }
        said = self._session.run(given)
        found: dict[str, AnyArray] = {
            name: np.asarray(said[name], np.float32) for name in self._names
        }
        rows = len(next(iter(inputs.values())))
        for name, array in found.items():
            if array.ndim == 0 or len(array) != rows:
                raise UsageError(
                    f"output '{name}' of the teacher does not have one entry for each sample",
                    hint="such a model cannot be imitated",
                )
        return found

    def _keep(self, said: Mapping[str, AnyArray], part: slice) -> bool:
        if self._kept is None:
            return False
        if not self._kept and not self._make_room(said):
            return False
        for name, array in said.items():
            if array.shape[1:] != self._kept[name].shape[1:]:
                self._forget()
                return False
            self._kept[name][part] = array
        return True

    def _make_room(self, said: Mapping[str, AnyArray]) -> bool:
        """Arrays for all samples; False where there is no room."""
        shapes = {name: (len(self._samples), *array.shape[1:]) for name, array in said.items()}
        size = 4 * sum(int(np.prod(shape)) for shape in shapes.values())
        if size <= _IN_MEMORY:
            self._kept = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
            return True
        if size > _ON_DISK:
            self._forget()
            return False
        try:
            self._folder = tempfile.TemporaryDirectory(prefix="onnxprune-")
            self._kept = {}
            for at, (name, shape) in enumerate(shapes.items()):
                path = Path(self._folder.name, f"{at}.f32")
                with path.open("wb") as file:  # written out, so that a full disk shows now
                    for _ in range(shape[0]):
                        file.write(bytes(4 * int(np.prod(shape[1:]))))
                self._kept[name] = np.memmap(path, np.float32, "r+", shape=shape)
        except OSError as error:
            _log.info("teacher outputs are not kept: %s", error.strerror)
            self._forget()
            return False
        return True

    def _forget(self) -> None:
        self._kept = None
        self.close()

    def close(self) -> None:
        """Remove the temporary file."""
        if self._folder is not None:
            self._kept = None
            self._folder.cleanup()
            self._folder = None

    def outputs(self, at: IntArray | slice) -> dict[str, AnyArray]:
        """What it says of some samples, float32."""
        if self._kept is not None:
            return {name: np.asarray(array[at]) for name, array in self._kept.items()}
        parts = []
        places = np.arange(len(self._samples))[at]
        for start in range(0, len(places), self._batch):
            some = places[start : start + self._batch]
            parts.append(self._say({n: a[some] for n, a in self._samples.inputs.items()}))
        return {name: np.concatenate([part[name] for part in parts]) for name in self._names}
