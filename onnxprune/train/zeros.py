"""Zeros that stay: which weights a sparsity pattern was imposed on, and are they zero still?"""

from __future__ import annotations

import numpy as np

from onnxprune.errors import BUG, RecipeError, UsageError, VerificationError
from onnxprune.model import Model
from onnxprune.prepare import prepare
from onnxprune.recipe import METADATA_KEY, Recipe, read
from onnxprune.train.copying import TrainingCopy
from onnxprune.train.protocol import Arrays
from onnxprune.types import BoolArray

CHOICES = ("auto", "all", "none")
_MANY = 1 / 3  # share of zeros that no dense training leaves


def recipe_of(model: Model) -> Recipe | None:
    """The recipe a model carries, or None."""
    if not any(entry.key == METADATA_KEY for entry in model.proto.metadata_props):
        return None
    try:
        return read(model)
    except RecipeError:
        return None  # of another version: what it says is not needed to train


def masks(copy: TrainingCopy, recipe: Recipe | None, keep: str) -> dict[str, BoolArray]:
    """By weight, False where it must stay zero.

    Args:
        copy: The model.
        recipe: What it carries.
        keep: ``auto``: weights that the recipe made sparse, and those at least a third of which is
            zero; ``all``: every zero of every weight that multiplies; ``none``.

    Raises:
        UsageError: There is no such choice.
    """
    if keep not in CHOICES:
        raise UsageError(f"keep-zeros is '{keep}'", hint=f"give {', '.join(CHOICES)}")
    listed = set() if recipe is None else {entry.tensor for entry in recipe.sparsity}
    found: dict[str, BoolArray] = {}
    for name in copy.matrices if keep != "none" else ():
        constant = copy.graph.constants[name]
        filled = np.asarray(constant.weight.read() != 0)
        zeros = 1 - float(filled.mean()) if filled.size else 0.0
        wanted = keep == "all" or name in listed or constant.origin in listed
        wanted = wanted or _MANY <= zeros < 1
        if zeros and wanted:
            found[name] = filled
    return found


def check_zeros(written: Model, held: Arrays) -> None:
    """Refuse a model in which a weight is not zero that should be.

    Raises:
        VerificationError: That is so.
    """
    constants = prepare(written).constants if held else {}
    for name, mask in held.items():
        if name in constants and np.any(constants[name].weight.read()[mask == 0]):
            raise VerificationError(f"zeros of '{name}' are not zero any more", hint=BUG)
