"""Cut, restore, train, and again: ``shrink --finetune``.

Each round cuts what the last one trained, so that channels are ranked on weights that have settled.
Every round's models stay in a folder beside the output, each with the recipe of its own cut, which
is also what makes the loop resumable.

Source: iterative pruning as in Han et al. 2015 (arXiv:1506.02626); with a penalty on scales before
    it, Liu et al. 2017, "Network Slimming" (arXiv:1708.06519).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from onnxprune.aim import check_targets
from onnxprune.analysing import analysed
from onnxprune.checks import AnyModel, check_outputs
from onnxprune.errors import TargetError, UsageError
from onnxprune.files import write_texts
from onnxprune.io import as_model, load, save
from onnxprune.iterate import shares
from onnxprune.model import Model
from onnxprune.pipeline import compare, shrink
from onnxprune.recipe import read
from onnxprune.recording import digest
from onnxprune.replay import replay
from onnxprune.report.clock import Clock, Progress
from onnxprune.request import Mode
from onnxprune.select import PruningPlan
from onnxprune.targets.trtexec import next_step
from onnxprune.tuning import check_training, finetune
from onnxprune.twin import softened
from onnxprune.types import Report, Round

_log = logging.getLogger(__name__)
_FIGURES = "rounds.json"
_CHANNELS = "channels"  # beside the costs


def shrink_in_rounds(
    model: AnyModel,
    output: Path | str,
    *,
    cut: Mapping[str, Any],
    training: Mapping[str, Any],
    ratio: float | None = None,
    targets: Mapping[str, float] | None = None,
    steps: int = 1,
    schedule: str = "polynomial",
    l1_bn: float = 0.0,
    max_loss: float | None = None,
    soft: bool = False,
    resume: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> tuple[Model, Report]:
    """Make a model smaller in rounds of cutting, restoring and training.

    Args:
        model: A path, a loaded model, or a message.
        output: File to write; the rounds lie in the folder ``<output>.rounds`` beside it.
        cut: Further options of ``shrink`` for every round.
        training: Options of ``finetune`` for every round: ``data``, ``labels``, ``epochs`` …
        ratio: Share of channels to remove in the end; this or ``targets``.
        targets: Share to be left in the end, by cost.
        steps: How many rounds.
        schedule: How much goes in each: ``polynomial`` or ``linear``.
        l1_bn: Penalty on scales of BatchNormalization in a training before the first cut; 0 leaves
            that out.
        max_loss: Stop before the share of right classes (or of agreement with the original) falls
            by more than this.
        soft: Cut in the last round only; those before it set to zero what would go and train it
            on, so that a channel that was judged wrongly can come back (He et al. 2018, "Soft
            Filter Pruning", arXiv:1808.06866).
        resume: Take rounds that are there, and go on behind them.
        force: Overwrite what exists.
        progress: Called with a line on how it stands.

    Returns:
        The model of the last round that holds ``max_loss``, and its report, costs beside those of
        the original.

    Raises:
        UsageError: Options or files cannot be used.
        TargetError: The first round loses more than ``max_loss``.
    """
    if (ratio is None) == (not targets):
        raise UsageError("give one of ratio and target", hint="--ratio 0.5")
    if ratio is not None and not 0 < ratio < 1:
        raise UsageError(f"ratio is {ratio:g}", hint="give 0 < ratio < 1")
    check_targets(targets or {})
    if soft and (steps < 2 or max_loss is not None):
        what = "max_loss, which stops between cuts" if steps >= 2 else "one step"
        raise UsageError(f"soft cannot go with {what}", hint="--steps 3 --soft")
    parts = shares(steps, schedule)
    check_outputs(model, output, force=force, read=(training.get("data"), cut.get("data")))
    folder = Path(f"{output}.rounds")
    original = as_model(model)
    check_training(original, **training)
    key = _key(original, cut, training, ratio, targets, parts, l1_bn, soft)
    folder_of = _Folder.open(folder, key, resume=resume, force=force)
    walk = _Walk(original, folder_of, dict(cut), dict(training), progress)
    if l1_bn:
        walk.slim(l1_bn)
    base = walk.base() if max_loss is not None else None
    for number, part in enumerate(parts, start=1):
        wish = walk.wish(ratio, targets, part)
        if soft and number < steps:
            walk.soften(number, wish)
            continue
        walk.round(number, wish)
        last = walk.rounds[-1]
        if base is not None and max_loss is not None and base - last.after > max_loss:
            walk.rounds.pop()
            if not walk.rounds:
                raise TargetError(
                    f"the first round loses {base - last.after:.4f} of {base:.4f}, more than "
                    f"--max-loss {max_loss:g}",
                    hint="give more epochs or more --steps, or allow more",
                )
            _log.warning(
                "round %d of %d loses %.4f, more than --max-loss %g: round %d is the result",
                number, steps, base - last.after, max_loss, number - 1,
            )  # fmt: skip
            break
    return walk.result(Path(output), force=force)


def _key(original: Model, *options: object) -> str:
    """Digest of what the rounds follow from; a trainer counts by its name."""
    said = [
        {name: getattr(value, "name", value) for name, value in one.items()}
        if isinstance(one, dict)
        else one
        for one in options
    ]
    return sha256(f"{digest(original)} {said!r}".encode()).hexdigest()


@dataclass
class _Folder:
    """Where rounds are kept, with their figures."""

    path: Path
    key: str
    figures: dict[str, dict[str, Any]]

    @classmethod
    def open(cls, path: Path, key: str, *, resume: bool, force: bool) -> _Folder:
        """The folder, made where it is not there.

        Raises:
            UsageError: It is there and may not be used, or cannot be made.
        """
        listed = path / _FIGURES
        begun = any(path.glob("*.checkpoint.npz")) or any(path.glob("*.tuned.onnx"))
        begun = begun or any(path.glob("*.soft.onnx")) or (path / "0.onnx").exists()
        if listed.exists() and begun and not (resume or force):
            raise UsageError(
                f"there are rounds in '{path}'",
                hint="--resume goes on behind them, --force starts again",
            )
        found: dict[str, dict[str, Any]] = {}
        if not resume:
            for stale in path.glob("*.checkpoint.npz"):
                stale.unlink()
        elif listed.exists() and begun:
            try:
                held = json.loads(listed.read_text("utf-8"))
                found, old = held["rounds"], held["key"]
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise UsageError(
                    f"'{listed}' cannot be read", hint="delete it, and start again"
                ) from error
            if old != key:
                raise UsageError(
                    f"the rounds in '{path}' are of another model or other options",
                    hint="give the same ones, or leave out --resume",
                )
        try:
            path.mkdir(exist_ok=True)
        except OSError as error:
            raise UsageError(f"cannot make folder '{path}': {error.strerror}") from error
        return cls(path, key, found)

    def keep(self, name: str, figures: Mapping[str, Any]) -> None:
        """Remember a round that is done."""
        self.figures[name] = dict(figures)
        text = json.dumps({"key": self.key, "rounds": self.figures}, indent=2) + "\n"
        write_texts({self.path / _FIGURES: text})


class _Walk:
    """From round to round."""

    def __init__(
        self,
        original: Model,
        folder: _Folder,
        cut: dict[str, Any],
        training: dict[str, Any],
        progress: Progress | None,
    ) -> None:
        self.original, self.folder = original, folder
        self.cut, self.training, self.progress = cut, training, progress
        self.model = original
        self.teacher = original
        self.rounds: list[Round] = []
        self.left: dict[str, float] = {}  # shares of the original, by cost and of channels

    def _told(self, prefix: str) -> Progress:
        return lambda line: None if self.progress is None else self.progress(f"{prefix}: {line}")

    def wish(
        self, ratio: float | None, targets: Mapping[str, float] | None, part: float
    ) -> dict[str, Any]:
        """What a round takes of what is left now, so that ``part`` of all that is to go has gone.

        It goes by what is left indeed: rounding of one round does not add to that of the next.
        """
        if ratio is not None:
            return {"ratio": max(0.0, 1 - (1 - ratio * part) / self.left.get(_CHANNELS, 1.0))}
        return {
            "targets": {
                name: min(1.0, (1 - (1 - share) * part) / self.left.get(name, 1.0))
                for name, share in (targets or {}).items()
            }
        }

    def _cut(self, number: int, small: Path, wish: Mapping[str, Any]) -> None:
        """Cut what the last round left, and remember what is left now."""
        prefix = f"round {number}"
        _, report = shrink(
            self.model, output=small, force=True, progress=self._told(prefix),
            **{**self.cut, **wish},
        )  # fmt: skip
        assert report.after is not None
        able = [group for group in report.groups if group.frozen is None]
        shares_left = {
            _CHANNELS: sum(group.kept for group in able) / sum(group.size for group in able),
            "params": report.after.params / report.before.params,
            "macs": report.after.macs / max(1, report.before.macs),
            "bytes": report.after.bytes / report.before.bytes,
        }
        left = {name: self.left.get(name, 1.0) * one for name, one in shares_left.items()}
        left |= {name: share for name, share in wish.get("targets", {}).items() if name not in left}
        self.folder.keep(f"{number}.cut", left)

    def slim(self, l1_bn: float) -> None:
        """Train with a penalty on scales; what that gives is what is cut, and the teacher."""
        path = self.folder.path / "0.onnx"
        if "0" not in self.folder.figures:
            options = {**self.training, "loss": self._losses(with_teacher=False)}
            if not options["loss"]:
                options["teacher"] = self.original
            _, report = finetune(
                self.original, l1_bn=l1_bn, output=path, force=True,
                resume=self._checkpoint(path), progress=self._told("sparsity training"),
                **options,
            )  # fmt: skip
            assert report.tuned is not None
            self.folder.keep("0", {"after": report.tuned.epochs[-1].metric})
        self.model = self.teacher = load(path)

    def _losses(self, *, with_teacher: bool) -> tuple[str, ...]:
        given = self.training.get("loss") or ()
        if given or with_teacher or self.training.get("labels") is None:
            return tuple(given.split(",")) if isinstance(given, str) else tuple(given)
        return ("ce",)

    @staticmethod
    def _checkpoint(path: Path) -> bool:
        return path.with_name(f"{path.name}.checkpoint.npz").exists()

    def base(self) -> float:
        """Share of right classes before the first cut; of agreement that is 1."""
        if self.training.get("labels") is None:
            return 1.0
        options = {**self.training, "epochs": 0, "loss": ("ce",)}
        _, report = finetune(self.teacher, **options)
        assert report.tuned is not None
        return report.tuned.epochs[0].metric

    def round(self, number: int, wish: Mapping[str, Any]) -> None:
        """Cut what the last round left, restore and train it; or take what is there."""
        small, path = (self.folder.path / f"{number}.{kind}.onnx" for kind in ("cut", "tuned"))
        if str(number) in self.folder.figures and path.exists():
            self.rounds.append(Round(**self.folder.figures[str(number)]))
            self.left = self.folder.figures[f"{number}.cut"]
            self.model = load(path)
            return
        prefix = f"round {number}"
        # Half-way only where its training left a checkpoint; else the round starts with its cut.
        half = small.exists() and self._checkpoint(path) and f"{number}.cut" in self.folder.figures
        if not half:
            self._cut(number, small, wish)
        self.left = self.folder.figures[f"{number}.cut"]
        _, report = finetune(
            small, teacher=self.teacher, output=path, force=True,
            resume=self._checkpoint(path), progress=self._told(prefix), **self.training,
        )  # fmt: skip
        self._keep(number, report, path)

    def _keep(self, number: int, report: Report, path: Path) -> None:
        """Remember what a round's training gave."""
        tuned = report.tuned
        assert tuned is not None
        assert report.after is not None
        made = Round(
            number=number,
            params=report.after.params,
            macs=report.after.macs,
            before=tuned.epochs[0].metric,
            after=tuned.epochs[tuned.best].metric,
            path=str(path),
            measure=tuned.measure,
        )
        self.folder.keep(str(number), asdict(made))
        self.rounds.append(made)
        self.model = load(path)

    def soften(self, number: int, wish: Mapping[str, Any]) -> None:
        """Set to zero what a cut would take, and train all of it; or take what is there."""
        path = self.folder.path / f"{number}.soft.onnx"
        if str(number) in self.folder.figures and path.exists():
            self.rounds.append(Round(**self.folder.figures[str(number)]))
            self.model = load(path)
            return
        prefix = f"round {number}"
        options = {**self.cut, **wish, "restore": "none", "verify": "none"}
        made, cut = shrink(self.model, progress=self._told(prefix), **options)
        masked = softened(self._plan(made)) if cut.recipe else self.model
        _, report = finetune(
            masked, teacher=self.teacher, output=path, force=True, keep_zeros="none",
            resume=self._checkpoint(path), progress=self._told(prefix), **self.training,
        )  # fmt: skip
        self._keep(number, report, path)

    def _plan(self, made: Model) -> PruningPlan:
        """The cut that a model was made by, of the model it was made from."""
        recipe = read(made)
        by = recipe.options
        mode = Mode(by.attention, by.allow_norm)
        return replay(analysed(self.model, by.input_shape, mode, Clock(None)), recipe)

    def result(self, output: Path, *, force: bool) -> tuple[Model, Report]:
        """Write the last round's model, and say what it is beside the original."""
        made = load(self.rounds[-1].path)
        shapes = self.cut.get("input_shapes")
        report = compare(
            self.original, made, data=self.cut.get("data"), seed=self.cut.get("seed", 0),
            input_shapes=shapes, progress=self.progress,
        )  # fmt: skip
        save(made, output, force=force)
        assert report.after is not None
        verdict = replace(report.verdict, status="passed", reason="")
        return made, replace(
            report,
            verb="shrink",
            output_path=str(output),
            verdict=verdict,
            rounds=tuple(self.rounds),
            following=next_step(made, str(output), (report.stand_ins,)),
            written=(output,),
        )
