"""Labels: are they classes that the model has?"""

from __future__ import annotations

import numpy as np

from onnxprune.errors import UsageError
from onnxprune.feeds import spell
from onnxprune.types import IntArray, Shape

_HINT = "give the class of each sample as a whole number"


def whole_classes(labels: object) -> IntArray:
    """Labels as int64; floats are fine where they are whole.

    Raises:
        UsageError: They are no whole numbers.
    """
    try:
        held = np.asarray(labels)
    except ValueError as error:  # rows of unequal length
        raise UsageError(f"labels cannot be made into an array: {error}", hint=_HINT) from error
    if held.dtype.kind not in "biuf":
        raise UsageError(f"labels are {held.dtype}, not numbers", hint=_HINT)
    if held.dtype.kind == "f":
        odd = held[~np.isfinite(held) | (held != np.round(held))]
        if odd.size:
            raise UsageError(f"labels have {odd.flat[0]:g} in them", hint=_HINT)
    return held.astype(np.int64)


def check_classes(labels: IntArray, scores: Shape, axis: int, output: str) -> None:
    """Refuse labels that the scores of a model do not speak of.

    Args:
        labels: Class of each sample, shape (samples, …).
        scores: Shape of the output for one or more samples.
        axis: Of it, along which the classes are.
        output: Its name.

    Raises:
        UsageError: The shape is another, or a class is out of range.
    """
    axis %= len(scores)
    wanted = tuple(size for at, size in enumerate(scores) if at not in (0, axis))
    if labels.shape[1:] != wanted:
        many = labels.ndim == len(wanted) + 2
        one = many and labels.shape[-1] == 1
        hint = "labels.argmax(-1) makes classes of one-hot rows" if many and not one else _HINT
        raise UsageError(
            f"labels have shape {spell((None, *labels.shape[1:]))}, not {spell((None, *wanted))} "
            f"as output '{output}' wants them",
            hint="labels[..., 0] has one axis less" if one else hint,
        )
    count = scores[axis]
    odd = labels[(labels < 0) | (labels >= count)]
    if odd.size:
        raise UsageError(
            f"label {odd.flat[0]} is none of the {count} classes of output '{output}'",
            hint=f"give classes from 0 to {count - 1}",
        )
