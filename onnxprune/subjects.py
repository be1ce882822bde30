"""What ``sensitivity`` and ``sweep`` measure: a model, analysed, ranked and run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from onnxprune import __version__, curves
from onnxprune.analyse import analyse
from onnxprune.checks import AnyModel, check_kinds
from onnxprune.curves import MetricEntry, ModelEntry, Sensitivity
from onnxprune.data import AnyData, Data, as_data
from onnxprune.errors import UnsupportedModelError, UsageError
from onnxprune.functions import UserFunction
from onnxprune.gauges import Gauge, read_labels
from onnxprune.groups import DependencyGraph
from onnxprune.io import as_model
from onnxprune.model import Model
from onnxprune.recording import digest, layout
from onnxprune.report.clock import Progress
from onnxprune.report.ops import nothing_prunable
from onnxprune.request import Mode
from onnxprune.score import Importance, score
from onnxprune.sensitivity import baseline, samples_of
from onnxprune.types import AnyArray, Shape
from onnxprune.verdicts import made_up_data


@dataclass(frozen=True)
class Subject:
    """A model, analysed and ranked, and what it is measured by."""

    model: Model
    graph: DependencyGraph
    importance: Importance
    data: Data
    gauge: Gauge
    baseline: float

    @classmethod
    def of(
        cls,
        model: AnyModel,
        importance: str,
        attention: str,
        input_shapes: Mapping[str, Shape],
        data: AnyData | None,
        labels: Path | str | AnyArray | None,
        metric: str | None,
        seed: int,
        progress: Progress | None,
    ) -> Subject:
        """Load, analyse, rank and run it once.

        Raises:
            UsageError: Data, labels or the metric cannot be used.
            ModelError: The model is unreadable or invalid.
            UnsupportedModelError: Nothing in it can be pruned.
            VerificationError: ONNX Runtime cannot run it.
        """
        function = None if metric is None else UserFunction.read(metric)
        if labels is not None and data is None:
            raise UsageError("labels need the data they belong to", hint="--data FILE.npz")
        say(progress, "load")
        loaded = as_model(model)
        given = as_data(data, loaded)
        say(progress, "analyse")
        graph = analyse(loaded, input_shapes=input_shapes, attention=Mode(attention).attention)
        if not graph.prunable:
            raise UnsupportedModelError(nothing_prunable(graph))
        fed = given if given is not None else made_up_data(graph, seed)
        if isinstance(labels, str | Path):
            labels = read_labels(labels, fed.samples, samples_of(fed.batches[0]))
        gauge = Gauge(labels, function)
        say(progress, "run")
        figure = baseline(graph, fed.batches, gauge)
        return cls(loaded, graph, score(graph, importance, seed=seed), fed, gauge, figure)

    def document(
        self,
        ratios: tuple[float, ...],
        attention: str,
        restore: str,
        input_shapes: Mapping[str, Shape],
        seed: int,
    ) -> Sensitivity:
        """The result file before anything is in it."""
        metric = self.gauge.metric
        return Sensitivity(
            schema=1,
            version=__version__,
            model=ModelEntry(
                path=path_of(self.model),
                sha256=digest(self.model),
                layout_sha256=layout(self.model),
            ),
            importance=self.importance.method,
            attention=Mode(attention).attention,  # type: ignore[arg-type]  # Mode checked it
            restore=restore,  # type: ignore[arg-type]  # one of the three
            input_shape={name: tuple(shape) for name, shape in input_shapes.items()},
            seed=seed,
            ratios=ratios,
            measure=self.gauge.measure,
            metric=None
            if metric is None
            else MetricEntry(
                function=metric.name, sha256=hashlib.sha256(metric.source.encode()).hexdigest()
            ),
            data=self.data.label,
            samples=self.data.samples,
            data_sha256=curves.arrays_digest(self.data.batches),
            labels_sha256=curves.labels_digest(self.gauge.labels),
            baseline=curves.finite(self.baseline),
        )


def say(progress: Progress | None, what: str) -> None:
    """Tell what is done now, if anybody listens."""
    if progress is not None:
        progress(what)


def path_of(model: Model) -> str | None:
    """The file it came from, as result files name it."""
    return None if model.path is None else str(model.path)


def checked_ratios(ratios: Sequence[float]) -> tuple[float, ...]:
    """The ratios, ascending, each once."""
    if not isinstance(ratios, Iterable):
        raise UsageError(f"ratios is {ratios!r}", hint="give numbers, such as [0.1, 0.3]")
    if not ratios:
        raise UsageError("no ratio is given", hint="--ratios 0.1,0.3,0.5")
    for ratio in ratios:
        if ratio is None:
            raise UsageError("ratio is None", hint="give 0 <= ratio < 1")
        check_kinds(numbers={"ratio": ratio})
        if not 0 <= ratio < 1:
            raise UsageError(f"ratio is {ratio:g}", hint="give 0 <= ratio < 1")
    return tuple(sorted({float(ratio) for ratio in ratios}))
