"""Structured pruning of ONNX models from any framework, proved exact, without training code.

    import onnxprune

    pruned, report = onnxprune.shrink("resnet50.onnx", ratio=0.5, output="smaller.onnx")

or step by step: ``load``, ``analyse``, ``score``, ``select``, ``rewrite``, ``verify``, ``save``.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from onnxprune import errors as errors
from onnxprune.errors import OnnxPruneError as OnnxPruneError

if TYPE_CHECKING:
    from onnxprune.analyse import analyse as analyse
    from onnxprune.checking import check as check
    from onnxprune.data import Data as Data
    from onnxprune.data import load_data as load_data
    from onnxprune.data import random_data as random_data
    from onnxprune.groups import DependencyGraph as DependencyGraph
    from onnxprune.io import load as load
    from onnxprune.io import save as save
    from onnxprune.model import Model as Model
    from onnxprune.pipeline import compare as compare
    from onnxprune.pipeline import inspect as inspect
    from onnxprune.pipeline import shrink as shrink
    from onnxprune.quantizing import quantize as quantize
    from onnxprune.report.build import report as report
    from onnxprune.rewrite import rewrite as rewrite
    from onnxprune.score import Importance as Importance
    from onnxprune.score import score as score
    from onnxprune.select import PruningPlan as PruningPlan
    from onnxprune.select import select as select
    from onnxprune.sparsifying import sparsify as sparsify
    from onnxprune.studies import sensitivity as sensitivity
    from onnxprune.studies import sweep as sweep
    from onnxprune.tuning import finetune as finetune
    from onnxprune.twin import masked_twin as masked_twin
    from onnxprune.types import Limits as Limits
    from onnxprune.types import Report as Report
    from onnxprune.types import Verdict as Verdict
    from onnxprune.verify import verify as verify

__version__ = "0.1.0"

_HOME = {
    "DependencyGraph": "groups",
    "analyse": "analyse",
    "check": "checking",
    "Data": "data",
    "load_data": "data",
    "random_data": "data",
    "Model": "io",
    "load": "io",
    "save": "io",
    "compare": "pipeline",
    "finetune": "tuning",
    "inspect": "pipeline",
    "shrink": "pipeline",
    "quantize": "quantizing",
    "report": "report.build",
    "masked_twin": "twin",
    "rewrite": "rewrite",
    "Importance": "score",
    "score": "score",
    "PruningPlan": "select",
    "select": "select",
    "sparsify": "sparsifying",
    "sensitivity": "studies",
    "sweep": "studies",
    "Limits": "types",
    "Report": "types",
    "Verdict": "types",
    "verify": "verify",
}

__all__ = [
    "Data",
    "DependencyGraph",
    "Importance",
    "Limits",
    "Model",
    "OnnxPruneError",
    "PruningPlan",
    "Report",
    "Verdict",
    "analyse",
    "check",
    "compare",
    "errors",
    "finetune",
    "inspect",
    "load",
    "load_data",
    "masked_twin",
    "quantize",
    "random_data",
    "report",
    "rewrite",
    "save",
    "score",
    "select",
    "sensitivity",
    "shrink",
    "sparsify",
    "sweep",
    "verify",
]


class _Package(ModuleType):
    """A package some of whose functions have the names of the modules they live in.

    The import system binds a submodule to its package; under such a name the function is meant,
    whatever was imported before. ``from onnxprune.verify import ...`` is not affected.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


def __getattr__(name: str) -> object:
    """Import public names when they are first used, so that importing the package stays cheap."""
    if name not in _HOME:
        raise AttributeError(f"module 'onnxprune' has no attribute '{name}'")
    value = getattr(import_module(f"onnxprune.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


sys.modules[__name__].__class__ = _Package
