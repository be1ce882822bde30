"""Fine-tuning of cut networks: what training gives back that refitting does not.

    python tools/bench/finetune.py --markdown tools/bench/results/finetune.md
    python tools/bench/finetune.py --only resnet --trainer torch

The networks of `models/` lose half of all channels (and 70 %), wherever they matter least or by
`--scope local` half of each layer, are refitted to the 256 images of
`fashion_calib.npz`, and then trained for three epochs on 10,000 training images: without labels,
by imitating the uncut network, and with them. PaddleOCR's orientation classifier, whose weights are
in Constant nodes, does the same on rendered lines of text. Accuracy is that on test images that
neither saw: the 10,000 of Fashion-MNIST, or 1,000 lines. Then 1,000 steps under 2:4: zeros must be
exact, and masks must cost no more than 2 % of a step. Needs the Debian package
dataset-fashion-mnist; the classifier also Pillow and TrueType fonts. A row is printed as soon as it
is done, so that an interruption loses one row.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from fashion import held_out, training
from numpy.typing import NDArray
from trial import REPOSITORY, table

from onnxprune.data import Data
from onnxprune.errors import OnnxPruneError
from onnxprune.io import load
from onnxprune.model import Model
from onnxprune.pipeline import shrink
from onnxprune.runtime import session
from onnxprune.sparsifying import sparsify
from onnxprune.train.backends import trainer_of
from onnxprune.train.copying import TrainingCopy
from onnxprune.train.protocol import Job, Term
from onnxprune.train.updates import Updates
from onnxprune.train.zeros import masks, recipe_of
from onnxprune.tuning import finetune

NETWORKS = ("resnet", "vgg", "mobile", "vit")
AIMS = {"kd": 0.5, "ce,kd": 0.3}  # points below the uncut network
MOST_OVERHEAD = 0.02
BATCH = 500


@dataclass(frozen=True)
class Case:
    """A network, what it is refitted to and trained on, and how it is scored."""

    name: str
    model: Model
    calibration: Data
    images: NDArray[np.float32] = field(repr=False)
    labels: NDArray[np.int64] = field(repr=False)
    test: tuple[NDArray[np.float32], NDArray[np.int64]] = field(repr=False)

    @property
    def data(self) -> Data:
        """What it is trained on."""
        name = self.model.proto.graph.input[0].name
        return Data(
            [{name: self.images}], "training images", random=False, samples=len(self.images)
        )

    def accuracy(self, model: Model) -> float:
        """Per cent of test samples with the right class."""
        loaded, right = session(model), 0
        (name,) = loaded.inputs
        for start in range(0, len(self.test[0]), BATCH):
            said = loaded.run({name: self.test[0][start : start + BATCH]})[loaded.outputs[0]]
            right += int(np.sum(said.argmax(-1) == self.test[1][start : start + BATCH]))
        return 100 * right / len(self.test[0])


def fashion(name: str, count: int) -> Case:
    """A network of `models/`."""
    model = load(REPOSITORY / "models" / f"fashion_{name}.onnx")
    calibration = np.load(REPOSITORY / "models" / "fashion_calib.npz")["input"]
    feed = model.proto.graph.input[0].name
    data = Data([{feed: calibration}], "fashion_calib.npz", random=False, samples=len(calibration))
    return Case(name, model, data, *training(count), held_out())


def lines(count: int, fonts: Path) -> Case:
    """PaddleOCR's orientation classifier on rendered lines."""
    import ocr

    task = ocr.TASKS[0]
    known, others = ocr.halves()
    found = sorted(path for path in fonts.rglob("*.ttf") if "Math" not in path.name)
    images, said = task.images(ocr.Lines(known, found, task.scene, seed=1), count)
    seen, truth = task.images(ocr.Lines(others, found, task.scene, seed=2), task.lines)
    labels = [np.array([int(one == "180") for one in names]) for names in (said, truth)]
    model = load(REPOSITORY / "models" / "paddleocr_cls.onnx")
    feed = model.proto.graph.input[0].name
    data = Data([{feed: images[:256]}], "rendered lines", random=False, samples=256)
    return Case("paddleocr_cls", model, data, images, labels[0], (seen, labels[1]))


def rows(case: Case, args: argparse.Namespace) -> Iterator[list[str]]:
    """A row for each cut and each way to train."""
    uncut = case.accuracy(case.model)
    shape = {case.model.proto.graph.input[0].name: (1, *case.images.shape[1:])}
    for ratio in args.cuts:
        begun = time.monotonic()
        small, cut = shrink(
            case.model,
            ratio=ratio,
            scope=args.scope,
            data=case.calibration,
            verify="none",
            input_shapes=shape,
        )
        refit = time.monotonic() - begun
        fitted = case.accuracy(small)
        assert cut.after is not None
        for loss in args.losses:
            begun = time.monotonic()
            with tempfile.TemporaryDirectory() as folder:
                tuned, report = finetune(
                    small,
                    data=case.data,
                    labels=case.labels if "ce" in loss else None,
                    teacher=case.model,
                    loss=loss,
                    epochs=args.epochs,
                    trainer=args.trainer,
                    threads=args.threads,
                    input_shapes=shape,
                    output=Path(folder, "tuned.onnx"),
                )
            spent = time.monotonic() - begun
            after = case.accuracy(tuned)
            aim = AIMS[loss] if ratio <= 0.5 else None
            lost = round(uncut - after, 6)
            verdict = "–" if aim is None else "yes" if lost <= aim else "no"
            assert report.tuned is not None
            yield [
                case.name, f"{100 * ratio:.0f} %", f"{cut.after.params / cut.before.params:.2f}",
                loss, f"{uncut:.2f}", f"{fitted:.2f}", f"{after:.2f}", f"{after - uncut:+.2f}",
                verdict, f"{refit:.0f}", f"{spent:.0f}", str(report.tuned.best),
            ]  # fmt: skip


HEAD = ["network", "channels cut", "params left", "loss", "uncut", "refitted", "tuned",
        "to uncut", "aim met", "refit, s", "training, s", "best epoch"]  # fmt: skip


def masked(args: argparse.Namespace) -> tuple[str, list[str]]:
    """1,000 steps under 2:4: are zeros exact, and what do the masks cost?"""
    case, findings = fashion("resnet", args.images), []
    sparse, _ = sparsify(case.model, data=case.calibration, verify="none")
    copy = TrainingCopy.of(sparse)
    held = masks(copy, recipe_of(sparse), "auto")
    output, feed = (getattr(sparse.proto.graph, kind)[0].name for kind in ("output", "input"))
    job = Job(
        tuple(copy.weights), (Term("ce", output, "labels"),), copy.statistics,
        masks=held, threads=args.threads or 1,
    )  # fmt: skip
    trainer, rng, times = trainer_of(args.trainer), np.random.default_rng(0), []
    trainer.prepare(copy.proto, job)
    for _ in range(args.steps):
        at = rng.integers(0, len(case.images), 16)
        begun = time.perf_counter()
        trainer.step({feed: case.images[at]}, {"labels": case.labels[at]}, rate=1e-3)
        times.append(time.perf_counter() - begun)
    weights = trainer.weights()
    trainer.close()
    nonzero = sum(int(np.count_nonzero(weights[n][mask == 0])) for n, mask in held.items())
    # What a step spends on masks, timed alone: on a machine with other work the difference of two
    # trainings says nothing.
    updates = Updates({name: np.array(weights[name]) for name in held}, masks=held)
    begun = time.perf_counter()
    for _ in range(100):
        updates.keep_zeros()
    spent, step = (time.perf_counter() - begun) / 100, float(np.median(times))
    if nonzero:
        findings.append(f"{nonzero} weights are not zero any more")
    if spent / step > MOST_OVERHEAD:
        findings.append(f"masks cost {100 * spent / step:.1f} % of a step")
    zeros = sum(int(np.count_nonzero(mask == 0)) for mask in held.values())
    cells = [str(args.steps), str(zeros), str(nonzero), f"{1e3 * step:.1f}", f"{1e3 * spent:.3f}",
             f"{100 * spent / step:.2f} %"]  # fmt: skip
    head = ["steps of 16", "zeros", "not zero after", "step, ms", "masks, ms", "masks"]
    return table(head, [cells]), findings


def main() -> int:
    """Run it all; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[*NETWORKS, "paddleocr_cls"])
    parser.add_argument("--cuts", type=float, nargs="*", default=[0.5, 0.7])
    parser.add_argument("--losses", nargs="*", default=list(AIMS))
    parser.add_argument("--scope", default="global", choices=["local", "global"])
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--lines", type=int, default=6_000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1_000, help="under 2:4; 0 leaves that out")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--trainer", default="ort")
    parser.add_argument("--fonts", type=Path, default=Path("/usr/share/fonts"))
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    found: list[Sequence[str]] = []
    findings: list[str] = []
    for name in args.only:
        try:
            case = lines(args.lines, args.fonts) if "ocr" in name else fashion(name, args.images)
            for row in rows(case, args):
                found.append(row)
                print(" | ".join(row), file=sys.stderr, flush=True)
        except OnnxPruneError as error:
            findings.append(f"{name}: {error}")
    text = table(HEAD, found)
    if args.steps:
        zeros, more = masked(args)
        text, findings = f"{text}\n\n{zeros}", findings + more
    text += "\n\n" + ("\n".join(f"- {one}" for one in findings) or "No findings.")
    print(text)
    if args.markdown:
        note = " ".join(__doc__.split("\n\n")[2].split())
        args.markdown.write_text(
            f"# Fine-tuning\n\nWritten by `tools/bench/finetune.py`, trainer `{args.trainer}`. "
            f"{note}\n\n{text}\n",
            "utf-8",
        )
    return bool(findings)


if __name__ == "__main__":
    sys.exit(main())
