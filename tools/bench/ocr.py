"""PaddleOCR's text models on rendered lines: what a cut costs them, and what restoring gives back.

    python tools/bench/ocr.py --markdown tools/bench/results/ocr.md
    python tools/bench/ocr.py --models rapidocr_onnxruntime/models --only cls --cuts 0.5

Needs Pillow, TrueType fonts (Debian: fonts-dejavu) and the models of the wheel
rapidocr-onnxruntime 1.4.4, of which only the files are read. The orientation classifier is scored
by top-1 on lines of which every other one is upside down, the recognition model by character
accuracy: 1 - edit distance / length, over all lines. Lines are English words and numbers; words
come from Python's own manual (`pydoc_data.topics`), one half for calibration, the other for the
test. Rankings and refits see the calibration lines, without labels. Nothing is trained.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise, product
from pathlib import Path
from pydoc_data import topics

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from onnxprune.data import Data
from onnxprune.errors import OnnxPruneError
from onnxprune.io import load
from onnxprune.latency import measure
from onnxprune.model import Model
from onnxprune.pipeline import shrink
from onnxprune.runtime import session
from onnxprune.types import Report

Array = NDArray[np.float32]
FONTS = Path("/usr/share/fonts")
HEIGHT = 48
BATCH = 32  # lines in one run


# -- lines -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scene:
    """How hard lines are to read.

    Attributes:
        words: Most words in a line.
        sizes: Font sizes, in pixels; lines are then scaled to a height of 48.
        noise: Most standard deviation of the noise, in grey levels.
        blur: Most radius of the blur, in pixels.
        ink: Least difference in grey levels between text and background.
        skew: Most rotation, in degrees.
    """

    words: int
    sizes: tuple[int, int]
    noise: float
    blur: float
    ink: int
    skew: float


class Lines:
    """Rendered lines of text, all from one seed."""

    def __init__(self, words: Sequence[str], fonts: Sequence[Path], scene: Scene, seed: int):
        self.words, self.fonts, self.scene = words, fonts, scene
        self.rng = np.random.default_rng(seed)

    def line(self, widest: float) -> tuple[str, Image.Image]:
        """A text and its image, no wider than ``widest`` heights (unless one word is)."""
        rng = self.rng
        size = int(rng.integers(*self.scene.sizes))
        font = ImageFont.truetype(str(self.fonts[rng.integers(len(self.fonts))]), size)
        words = [self._word() for _ in range(rng.integers(1, self.scene.words + 1))]
        margin = rng.integers(1, max(3, size // 4), size=4)
        while True:
            text = " ".join(words)
            left, top, right, bottom = map(int, font.getbbox(text))
            width, height = right - left + margin[:2].sum(), bottom - top + margin[2:].sum()
            if len(words) == 1 or width <= widest * height:
                break
            words.pop()
        image = self._background(int(width), int(height))
        ink = tuple(int(value) for value in self._ink)
        at = (int(margin[0]) - left, int(margin[2]) - top)
        ImageDraw.Draw(image).text(at, text, ink, font)
        return text, self._spoiled(image)

    def _word(self) -> str:
        """Three words in four are words, the rest numbers; some in capitals."""
        rng = self.rng
        if rng.random() < 0.25:
            return str(rng.integers(10, 10 ** rng.integers(2, 8)))
        word = str(rng.choice(self.words))
        style = rng.random()
        return word.upper() if style < 0.2 else word.capitalize() if style < 0.4 else word

    def _background(self, width: int, height: int) -> Image.Image:
        """A gradient between two close colours; the ink is chosen with it."""
        rng = self.rng
        while True:
            paper, ink = rng.integers(0, 256, 3), rng.integers(0, 256, 3)
            if abs(int(paper.mean()) - int(ink.mean())) >= self.scene.ink:
                break
        self._ink = ink
        far = paper + rng.integers(-30, 31, 3)
        along = np.linspace(0, 1, width)[None, :, None]
        plane = np.broadcast_to(paper + along * (far - paper), (height, width, 3))
        return Image.fromarray(np.clip(plane, 0, 255).astype(np.uint8))

    def _spoiled(self, image: Image.Image) -> Image.Image:
        """Turned a little, blurred, and with noise."""
        rng, scene = self.rng, self.scene
        corner = image.getpixel((0, 0))
        angle = rng.uniform(-scene.skew, scene.skew)
        image = image.rotate(angle, Image.Resampling.BILINEAR, fillcolor=corner)
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0, scene.blur)))
        grain = rng.normal(0, rng.uniform(0, scene.noise), (image.height, image.width, 1))
        return Image.fromarray(np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8))


def prepared(image: Image.Image, width: int) -> Array:
    """The network's input: 48 high, no wider than ``width``, [-1, 1], zeros to the right."""
    reach = min(width, -(-HEIGHT * image.width // image.height))
    scaled = image.resize((reach, HEIGHT), Image.Resampling.BILINEAR)
    made = np.zeros((3, HEIGHT, width), np.float32)
    made[:, :, :reach] = np.asarray(scaled, np.float32).transpose(2, 0, 1) / 127.5 - 1
    return made


def halves() -> tuple[list[str], list[str]]:
    """English words for calibration, and others for the test."""
    words = sorted(set(re.findall(r"\b[a-z]{2,11}\b", " ".join(topics.topics.values()))))
    np.random.default_rng(0).shuffle(words)
    return words[: len(words) // 2], words[len(words) // 2 :]


# -- tasks -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """One network, its lines and its measure.

    Attributes:
        score: Per cent right, from outputs (n, ...) and the truth of each line.
    """

    name: str
    file: str
    measure: str
    width: int
    scene: Scene
    cuts: tuple[float, ...]
    lines: int
    score: Callable[[Model, Sequence[NDArray[np.int64]], Sequence[str]], float]
    turns: bool = False

    def images(self, lines: Lines, count: int) -> tuple[Array, list[str]]:
        """Inputs (count, 3, 48, width) and what they say; every other one upside down if turned."""
        made, truth = [], []
        for number in range(count):
            text, image = lines.line(self.width / HEIGHT)
            turned = self.turns and number % 2 == 1
            made.append(prepared(image.rotate(180) if turned else image, self.width))
            truth.append(text if not self.turns else "180" if turned else "0")
        return np.stack(made), truth


def top1(_model: Model, found: Sequence[NDArray[np.int64]], truth: Sequence[str]) -> float:
    """Per cent of lines with the right orientation."""
    right = [("0", "180")[int(one)] == said for one, said in zip(found, truth, strict=True)]
    return 100 * float(np.mean(right))


def characters(model: Model, found: Sequence[NDArray[np.int64]], truth: Sequence[str]) -> float:
    """Character accuracy in per cent; not below zero."""
    stored = {entry.key: entry.value for entry in model.proto.metadata_props}
    alphabet = ["", *stored["character"].splitlines(), " "]
    wrong = 0
    for row, said in zip(found, truth, strict=True):
        steps = [int(new) for old, new in pairwise([0, *row]) if new != old]
        wrong += distance("".join(alphabet[step] for step in steps), said)
    return max(0.0, 100 * (1 - wrong / sum(map(len, truth))))


def distance(one: str, other: str) -> int:
    """Edit distance (Levenshtein)."""
    row = list(range(len(other) + 1))
    for number, letter in enumerate(one, start=1):
        corner, row[0] = row[0], number
        for at, against in enumerate(other, start=1):
            change = corner + (letter != against)
            corner, row[at] = row[at], min(row[at] + 1, row[at - 1] + 1, change)
    return row[-1]


TASKS = (
    Task(
        "orientation",
        "ch_ppocr_mobile_v2.0_cls_infer.onnx",
        "top-1",
        192,
        Scene(words=4, sizes=(14, 40), noise=16, blur=0.7, ink=80, skew=2),
        (0.3, 0.5),
        1000,
        top1,
        turns=True,
    ),
    Task(
        "recognition",
        "ch_PP-OCRv4_rec_infer.onnx",
        "character accuracy",
        320,
        Scene(words=3, sizes=(12, 40), noise=26, blur=1.0, ink=70, skew=2),
        (0.1, 0.3, 0.5),
        500,
        characters,
    ),
)


# -- the bench -------------------------------------------------------------------------------------


class Test:
    """A task's labelled lines."""

    def __init__(self, task: Task, lines: Lines, count: int) -> None:
        self.task = task
        self.images, self.truth = task.images(lines, count)

    def __call__(self, model: Model) -> float:
        loaded = session(model, threads=1)
        (name,), (output, *_) = loaded.inputs, loaded.outputs
        found: list[NDArray[np.int64]] = []
        for start in range(0, len(self.images), BATCH):
            found.extend(loaded.run({name: self.images[start : start + BATCH]})[output].argmax(-1))
        return self.task.score(model, found, self.truth)


@dataclass(frozen=True)
class Cut:
    """A smaller network and how well it reads."""

    model: Model
    report: Report
    score: float


@dataclass(frozen=True)
class Bench:
    """A network, its calibration lines and its test."""

    task: Task
    model: Model
    data: Data
    test: Test
    seconds: float

    def cut(self, ratio: float, round_to: int | str, restore: str, importance: str = "auto") -> Cut:
        """Shrink the network and score it."""
        model, report = shrink(
            self.model,
            ratio=ratio,
            round_to=round_to,
            importance=importance,
            restore=restore,
            data=self.data,
            verify="none",
            input_shapes={"x": (1, 3, HEIGHT, self.task.width)},
        )
        return Cut(model, report, self.test(model))

    def rows(self, cuts: Sequence[float], steps: Sequence[int | str]) -> Iterator[str]:
        """A row for each cut."""
        uncut = self.test(self.model)
        for ratio, round_to in product(cuts, steps):
            head = f"| {self.task.name} | {100 * ratio:.0f} % | {round_to} | "
            try:
                plain = self.cut(ratio, round_to, "none")
                shifted = self.cut(ratio, round_to, "bias", plain.report.importance)
                fitted = self.cut(ratio, round_to, "refit")
            except OnnxPruneError as error:
                yield f"{head} {error} |" + " |" * 9
                continue
            before, after, spent = fitted.report.before, fitted.report.after, fitted.report.seconds
            assert after is not None
            feeds = {"x": self.test.images[:1]}
            old, new = measure([self.model, fitted.model], feeds, seconds=self.seconds)
            cells = [
                f"{before.params / 1e3:,.0f} → {after.params / 1e3:,.0f}",
                f"{before.macs / 1e6:.1f} → {after.macs / 1e6:.1f}",
                *(f"{score:.1f}" for score in (uncut, plain.score, shifted.score, fitted.score)),
                f"{spent['score']:.0f} + {spent['restore']:.0f}",
                f"{1e3 * old.seconds:.2f} → {1e3 * new.seconds:.2f}",
                f"{plain.report.importance}, {fitted.report.importance}",
            ]
            yield head + " | ".join(cells) + " |"


def folder() -> Path | None:
    """Where the installed wheel keeps its models."""
    found = find_spec("rapidocr_onnxruntime")
    return None if found is None or not found.origin else Path(found.origin).parent / "models"


def benches(args: argparse.Namespace) -> Iterator[Bench]:
    """The networks asked for, each with its lines rendered."""
    fonts = sorted(path for path in args.fonts.rglob("*.ttf") if "Math" not in path.name)
    known, others = halves()
    for task in TASKS:
        if args.only and not task.name.startswith(args.only):
            continue
        model = load(args.models / task.file)
        images, _ = task.images(Lines(known, fonts, task.scene, seed=1), args.calibration)
        batches = [{"x": images[at : at + BATCH]} for at in range(0, len(images), BATCH)]
        data = Data(batches, f"{len(images)} rendered lines", random=False, samples=len(images))
        count = args.lines or task.lines
        test = Test(task, Lines(others, fonts, task.scene, seed=2), count)
        yield Bench(task, model, data, test, args.seconds)


def explained() -> Iterator[str]:
    """What the figures are."""
    yield (
        "`tools/bench/ocr.py`: the models of rapidocr-onnxruntime 1.4.4 on lines rendered in the "
        "DejaVu fonts, 256 for calibration and others for the test."
    )
    for task in TASKS:
        size = f"{task.lines:,} lines of {HEIGHT} x {task.width}"
        yield f"* {task.name}: {task.measure} in per cent, {size}."
    yield (
        "\n*Not restored* and *bias* are one cut, *refitted* may be another: its channels are "
        "chosen by what refitting gives back. *s* are its seconds, to rank and to refit, on one "
        "thread beside other work. *ms a line*: ONNX Runtime, one thread, medians of the uncut and "
        "the refitted network in turn."
    )


def main() -> int:
    """Print a table, and write it as it grows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", type=Path, default=folder(), help="default: the wheel's")
    parser.add_argument("--fonts", type=Path, default=FONTS)
    parser.add_argument("--only", help="how the names of the tasks begin")
    parser.add_argument("--cuts", help="ratios of channels, by commas; default: each task's own")
    parser.add_argument("--round-to", default="1,auto")
    parser.add_argument("--calibration", type=int, default=256, help="lines")
    parser.add_argument("--lines", type=int, help="of the test; default: each task's own")
    parser.add_argument("--seconds", type=float, default=10.0, help="of timing for each row")
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    if args.models is None:
        parser.error("rapidocr-onnxruntime is not installed: give --models")
    header = (
        "network", "cut", "round to", "k params", "M MACs", "uncut", "not restored", "bias",
        "refitted", "s", "ms a line", "rankings",
    )  # fmt: skip
    lines = ["# PaddleOCR on rendered lines", "", *explained(), ""]
    lines += ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    print("\n".join(lines), flush=True)
    steps = [int(step) if step.isdigit() else step for step in args.round_to.split(",")]
    for bench in benches(args):
        cuts = map(float, args.cuts.split(",")) if args.cuts else bench.task.cuts
        for line in bench.rows([*cuts], steps):
            lines.append(line)
            print(line, flush=True)
            if args.markdown is not None:
                args.markdown.write_text("\n".join(lines) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
