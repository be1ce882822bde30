"""Weights that stay in a pattern get the values that data ask for, layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from onnxprune.data import Data
from onnxprune.errors import UsageError
from onnxprune.groups import DependencyGraph
from onnxprune.impose import wish_of
from onnxprune.model import Model
from onnxprune.patterned import METHODS as WITH_DATA
from onnxprune.patterned import Imposed
from onnxprune.recipe import SparsifyOptions
from onnxprune.restore import refit
from onnxprune.select import PruningPlan
from onnxprune.thin import MAGNITUDE, candidates
from onnxprune.types import Refitted


@dataclass(frozen=True)
class Valued:
    """A model whose layers hold a pattern as far as they have a least-squares form.

    Attributes:
        model: The model; imposing the pattern by magnitude changes nothing in those layers.
        layers: What happened to each.
        changed: Constants with other values than zeros that are new.
    """

    model: Model
    layers: tuple[Refitted, ...] = ()
    changed: tuple[str, ...] = ()


def chosen(method: str, data: Data | None, scope: str = "local", *, recorded: bool = False) -> str:
    """The method that ``auto`` means: magnitudes where layers share out a sparsity.

    Args:
        method: What was asked for, or ``recorded`` in a recipe.
        data: Unlabelled inputs.
        scope: ``local`` or ``global``.
        recorded: Only changes what an error says.

    Raises:
        UsageError: The method needs data, and there are none.
    """
    given = data is not None and not data.random
    if method in WITH_DATA and not given:
        source = "the recipe's method" if recorded else "method"
        raise UsageError(f"{source} {method} needs data", hint="--data FILE.npz")
    if method != "auto":
        return method
    return WITH_DATA[0] if given and scope == "local" else MAGNITUDE


def valued(
    graph: DependencyGraph,
    options: SparsifyOptions,
    data: Data | None,
    *,
    seed: int = 0,
    heard: Callable[[int, int, str], None] | None = None,
) -> Valued:
    """Solve every layer that can take the pattern, in execution order.

    Inputs are what the model feeds a layer with all in front of it thinned already, targets what
    the original made there; biases, and layers that stay dense, make up for what is lost too.

    Args:
        graph: The analysis of the model.
        options: Pattern and method; magnitudes leave the model as it is.
        data: Unlabelled inputs.
        seed: Draws the output positions that are looked at.
        heard: Called before each layer.

    Raises:
        UsageError: The method cannot share out a sparsity among layers.
        VerificationError: ONNX Runtime cannot run the model.
    """
    model = graph.graph.source
    if options.method == MAGNITUDE or data is None:
        return Valued(model)
    if options.scope == "global":
        raise UsageError(
            "only magnitudes compare between layers", hint="--method magnitude, or --scope local"
        )
    impose = imposed(model, options)
    if not impose:
        return Valued(model)
    plan = PruningPlan(graph, {group.id: np.arange(group.size) for group in graph.prunable})
    return Valued(*refit(plan, model, data, seed=seed, heard=heard, impose=impose))


def imposed(model: Model, options: SparsifyOptions) -> dict[str, Imposed]:
    """What a refit is to impose on layers of the main graph, by the first output of each.

    Args:
        model: The model.
        options: Pattern and method; magnitudes impose nothing.
    """
    if options.method == MAGNITUDE:
        return {}
    wish = wish_of(options)
    found = candidates(model, wish)
    wanted = Imposed(wish.pattern, wish.sparsity, options.method)
    owners = [found.layers[at] for at in found.owners]
    return {layer.key: wanted for layer in owners if not layer.scope}
