"""Repeat a recipe on the model it was made for, or on a retrained one."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator

import numpy as np

from onnxprune.data import Data, digest_of
from onnxprune.errors import RecipeError
from onnxprune.groups import DependencyGraph
from onnxprune.lossless import lossless_plan
from onnxprune.model import Model
from onnxprune.recipe import Recipe, RemovedEntry
from onnxprune.recording import digest, layout, removed_entry
from onnxprune.rewrite import operate
from onnxprune.select import PruningPlan
from onnxprune.types import BoolArray, WeightAxis

_log = logging.getLogger(__name__)


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
    if tuple(map(removed_entry, operate(plan).removed)) != recipe.removed:
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
    if tuple(map(removed_entry, operate(plan).removed)) != recipe.removed:
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
