"""What is done with a result: files, the clock, the check by a target."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from onnxprune.files import write_texts
from onnxprune.io import save_with
from onnxprune.model import Model
from onnxprune.recipe import Recipe
from onnxprune.types import ModelStats


@dataclass(frozen=True)
class Written:
    """Files that a run left.

    Attributes:
        files: Bytes of each, the model last.
        model_bytes: Of the model and its external data, or None where it was not written.
    """

    files: Mapping[Path, int]
    model_bytes: int | None

    def of(self, costs: ModelStats) -> ModelStats:
        """Costs with the size that the file really has."""
        return costs if self.model_bytes is None else replace(costs, bytes=self.model_bytes)


@dataclass(frozen=True)
class Writing:
    """What is done with a result.

    Attributes:
        output: File to write, or None.
        force: Overwrite what exists.
        recipe_out: File to write the recipe to, or None.
        target: What must take the result before it is written, or None.
        latency: Time original and result; None does so where it is quick.
        threads: For that.
    """

    output: Path | str | None
    force: bool = False
    recipe_out: Path | str | None = None
    target: str | None = None
    latency: bool | None = False
    threads: int | None = 1

    def save(
        self,
        made: Model,
        recipe: Callable[[], Recipe] | None = None,
        *,
        check: Callable[[Model], None] | None = None,
        texts: Mapping[Path, str] | None = None,
    ) -> Written:
        """Write the model, the recipe and more texts: all of them or none.

        Args:
            made: What to write.
            recipe: The recipe, made only where a file of its own is asked for.
            check: As in ``save_with``.
            texts: More files, by path.

        Raises:
            UsageError: A file cannot be written.
        """
        beside = dict(texts or {})
        if self.recipe_out is not None and recipe is not None:
            beside[Path(self.recipe_out)] = recipe().readable()
        if self.output is None:
            return Written(write_texts(beside), None)
        files = save_with(made, self.output, beside, force=self.force, check=check)
        return Written(files, sum(size for path, size in files.items() if path not in beside))
