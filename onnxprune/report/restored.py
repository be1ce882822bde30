"""What refitting did to each layer."""

from __future__ import annotations

import math
from collections.abc import Iterable

from rich.console import RenderableType

from onnxprune.report.layout import text_line
from onnxprune.types import Report


def restored_lines(report: Report, *, verbose: bool) -> Iterable[RenderableType]:
    """What refitting did, in one line, or a line for each layer."""
    if not report.restored:
        if report.shifted:
            yield text_line(
                f"restored: {report.shifted} biases make up for what was dropped "
                "(without data; --data FILE.npz refits every layer)"
            )
        return
    taken = [one for one in report.restored if one.ridge is not None]
    compared = [one for one in report.restored if math.isfinite(one.before)]
    options = report.recipe.get("options")
    drawn = isinstance(options, dict) and options.get("restore") == "pictures"
    fitted = "made-up pictures" if drawn else report.verdict.inputs or "the data"
    line = f"restored: {len(taken)} of {len(report.restored)} layers refitted on {fitted}"
    if compared:
        before = sum(one.before for one in compared) / len(compared)
        after = sum(one.after for one in compared) / len(compared)
        line += f"; mean held-out error {before:.3g} → {after:.3g}"
    if drawn:
        line += " (--restore refit --data FILE.npz fits to what it really sees)"
    yield text_line(line)
    left = [one for one in report.restored if one not in compared]
    if left and not verbose:
        counted = "1 layer" if len(left) == 1 else f"{len(left)} layers"
        yield text_line(f"  {counted} could not be refitted, first {left[0].node}: {left[0].why}")
    for one in report.restored if verbose else ():
        errors = f"{one.before:.3g} → {one.after:.3g}" if one in compared else "not refitted"
        yield text_line(f"  {one.node}: {errors}{f' ({one.why})' if one.why else ''}")
