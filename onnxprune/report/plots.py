"""Plots of what the measuring verbs found, through matplotlib."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from onnxprune.curves import CurveEntry, Sensitivity
from onnxprune.errors import MissingExtraError, UsageError
from onnxprune.sweep import Sweep

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FORMATS = {".png", ".svg"}
_MOST_NAMES = 10  # in the legend
_LONGEST_NAME = 40
SPELLED = {"drift": "relative L2 drift", "top1": "top-1 accuracy", "metric": "metric"}


def check_plot(path: Path | str | None) -> None:
    """Refuse, before any work is done, a plot that cannot be made.

    Raises:
        UsageError: It is neither PNG nor SVG.
        MissingExtraError: matplotlib is not installed.
    """
    if path is None:
        return
    if Path(path).suffix.lower() not in _FORMATS:
        raise UsageError(f"'{path}' is neither .png nor .svg")
    if find_spec("matplotlib") is None:
        raise MissingExtraError("--plot needs matplotlib", hint="pip install 'onnxprune[report]'")


def sensitivity_plot(found: Sensitivity, path: Path) -> None:
    """Loss over ratio, a line for each group, first to last by colour; the worst by name."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    worst = sorted(found.groups, key=_area, reverse=True)[:_MOST_NAMES]
    for number, entry in enumerate(found.groups):
        points = [(point.ratio, point.loss) for point in entry.points if point.loss is not None]
        colour = colormaps["viridis"](number / max(len(found.groups) - 1, 1))
        label = name_of(entry)[-_LONGEST_NAME:] if entry in worst else None
        axes.plot(*zip((0.0, 0.0), *points, strict=True), color=colour, marker=".", label=label)
    axes.set_xlabel("share of the group removed")
    lost = SPELLED[found.measure]
    axes.set_ylabel(lost if found.measure == "drift" else f"loss of {lost}")
    axes.set_title(f"{found.data} · dark: first groups, light: last")
    axes.grid(alpha=0.3)
    if worst:
        axes.legend(fontsize="small", title="most sensitive", loc="center left",
                    bbox_to_anchor=(1.0, 0.5))  # fmt: skip
    _save(figure, path)


def sweep_plot(found: Sweep, path: Path) -> None:
    """Drift or accuracy, and what is left of parameters, MACs and latency, over the ratio."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    quality, cost = figure.subplots(1, 2)
    ratios = [point.ratio for point in found.points]
    figures = [float("nan") if p.figure is None else p.figure for p in found.points]
    quality.plot(ratios, figures, marker="o")
    quality.set_ylabel(SPELLED[found.measure])
    quality.set_title(found.data)
    first = found.points[0]
    for name, label in (("params", "params"), ("macs", "MACs"), ("latency_ms", "latency")):
        left = [100 * getattr(p, name) / (getattr(first, name) or 1) for p in found.points]
        cost.plot(ratios, left, marker="o", label=label)
    cost.set_ylabel(f"% of ratio {first.ratio:g}")
    cost.set_ylim(bottom=0)
    cost.legend()
    for axes in (quality, cost):
        axes.set_xlabel("ratio")
        axes.grid(alpha=0.3)
    _save(figure, path)


def name_of(entry: CurveEntry) -> str:
    """The first group's name, and how many are cut with it."""
    more = len(entry.groups) - 1
    return entry.groups[0].name + (f" (+{more})" if more else "")


def _area(entry: CurveEntry) -> float:
    """What orders curves by sensitivity: the sum of losses, without end where one is not finite."""
    return sum(float("inf") if point.loss is None else point.loss for point in entry.points)


def _save(figure: Figure, path: Path) -> None:
    from matplotlib import rc_context

    # The same plot is the same file.
    metadata = {"Date": None} if path.suffix.lower() == ".svg" else {}
    try:
        with rc_context({"svg.hashsalt": "onnxprune"}):
            figure.savefig(path, dpi=150, metadata=metadata)
    except OSError as error:
        raise UsageError(f"cannot write '{path}': {error.strerror}") from error
