"""``analyse`` for the verbs: its two stages timed apart, and what it noted in the log."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from onnxprune.analyse import analyse_graph
from onnxprune.groups import DependencyGraph
from onnxprune.model import Model
from onnxprune.prepare import prepare
from onnxprune.report.clock import Clock
from onnxprune.request import Mode
from onnxprune.shapes import environment
from onnxprune.standins import find_stand_ins
from onnxprune.types import Shape

_log = logging.getLogger(__name__)


def analysed(
    model: Model, shapes: Mapping[str, Shape], mode: Mode, clock: Clock
) -> DependencyGraph:
    """``analyse`` with its two stages timed apart."""
    with clock.stage("prepare"):
        prepared = prepare(model)
        envs = tuple(
            environment(prepared, choice) for choice in find_stand_ins(prepared, shapes or None)
        )
    with clock.stage("analyse"):
        found = analyse_graph(prepared, envs, attention=mode.attention, allow_norm=mode.allow_norm)
    for note in found.notes:
        _log.info("%s", note)
    return found
