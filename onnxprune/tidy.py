"""The last step before writing: fold norms, simplify, and prove that nothing changed by it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from onnxprune.data import Data
from onnxprune.errors import VerificationError
from onnxprune.foldbn import NORM, fold_norms
from onnxprune.model import Model
from onnxprune.simplify import simplified
from onnxprune.types import Tidied
from onnxprune.verify import TWIN_TOLERANCE
from onnxprune.verify import verify as run_checks


@dataclass(frozen=True)
class Tidy:
    """A model made tidy.

    Attributes:
        model: The model.
        changed: Constants with other values, or new ones.
        into: For each node that was folded its first output, and that of the layer it went into.
        said: What a report says.
        anything: Whether something was done.
    """

    model: Model
    changed: tuple[str, ...]
    into: tuple[tuple[str, str], ...]
    said: Tidied
    anything: bool = False


def tidied(model: Model, *, fold_bn: bool, simplify: bool, keep: Collection[str] = ()) -> Tidy:
    """Fold norms into layers, and leave out what a model can do without.

    Args:
        model: The model.
        fold_bn: Fold BatchNormalization, scales and shifts.
        simplify: Compute what is constant; leave out what hands on, what is there twice, and what
            nothing reads.
        keep: Constants that keep their names.
    """
    made = simplified(model, keep) if simplify else model
    changed: tuple[str, ...] = ()
    into: tuple[tuple[str, str], ...] = ()
    if fold_bn:
        merged = fold_norms(made)
        made, changed, into = merged.model, merged.changed, merged.into
    said = Tidied(
        nodes=(len(model.proto.graph.node), len(made.proto.graph.node)),
        norms=(_norms(model), _norms(made)),
    )
    return Tidy(made, changed, into, said, made is not model)


def check_tidied(before: Model, after: Model, data: Data) -> None:
    """Refuse a tidied model that does not compute what it did.

    Raises:
        VerificationError: It does not, or cannot be run.
    """
    found = run_checks(
        before, after, twin=None, data=data, level="twin", lossless=True, tolerance=TWIN_TOLERANCE
    )
    if found.status == "failed":
        raise VerificationError(
            f"folded or simplified, the model is not the same: {found.reason}",
            hint="leave out --fold-bn and --simplify; please report it with the model",
        )


def _norms(model: Model) -> int:
    return sum(node.op_type == NORM for node in model.proto.graph.node)
