"""Pictures made up for models that look at pictures, where there is no data.

Overlapping shapes of one colour each, of all sizes (dead leaves), and clouds whose spectrum falls
as that of photographs does: what layers make of them is correlated much as what they make of
photographs, which is what a refit needs to know. Noise of independent pixels is not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from onnxprune.calibrate import stream
from onnxprune.data import Data
from onnxprune.errors import VerificationError
from onnxprune.feeds import Input, inputs_of
from onnxprune.graph import Graph
from onnxprune.types import AnyArray, Float64Array, Shape

SAMPLES = 128
_BATCH = 32
_MOST_PIXELS = 1 << 23  # of all pictures together, where they are large
MOST_MACS = 1 << 39  # of one run on all of them, where they are asked for
QUICK = 1 << 37  # the same where they are not: some seconds on one core
_FEWEST = 16
_COLOURS = (1, 3, 4)  # channels that a picture may have
_SMALLEST = 8  # pixels of a side
# Mean and standard deviation of what a model takes: normalised, [-1, 1], [0, 1], [0, 255].
_RANGES = ((0.0, 1.0), (0.0, 0.5), (0.45, 0.25), (115.0, 64.0))
_LEAVES = 40  # in one picture
_SMALLEST_LEAF = 0.06  # of the largest
_FALL = 1.5  # the amplitude of clouds falls as frequency to this power
_TINY = 1e-8
_MOST_APART = 1e3  # a channel that was dead in training says no more than this
_SHARED = 0.8  # share of the variance that the colours of a picture have in common


def drawable(graph: Graph) -> bool:
    """Whether a model takes one picture and nothing else."""
    try:
        inputs = inputs_of(graph.model)
    except VerificationError:
        return False
    if len(inputs) != 1 or inputs[0].dims is None or len(inputs[0].dims) != 4:
        return False
    dims = inputs[0].dims
    colours = dims[1] in _COLOURS or dims[3] in _COLOURS
    return colours and _paintable(inputs[0])


def pictures(
    graph: Graph,
    shapes: Mapping[str, Shape],
    macs: int = 0,
    seed: int = 0,
    most: int = MOST_MACS,
) -> Data | None:
    """Pictures for a model, scaled to what its BatchNormalizations saw in training.

    Args:
        graph: The model.
        shapes: Sizes of its inputs.
        macs: What it costs at these sizes: the more, the fewer pictures.
        seed: Same seed, same pictures.
        most: What all of them may cost together.

    Returns:
        Half dead leaves and half clouds; None where the model takes anything but one picture, or
        is too large to be fitted by the way.

    Raises:
        VerificationError: ONNX Runtime cannot run the model.

    Source: Lee, Mumford and Huang 2001, Occlusion Models for Natural Images; training on such
        pictures as in Baradad et al. 2021, Learning to See by Looking at Noise (arXiv:2106.05963).
    """
    if not drawable(graph):
        return None
    (value,) = inputs_of(graph.model)
    frame = _Frame.of(value, shapes.get(value.name))
    if frame is None:
        return None
    each = macs // shapes[value.name][0]
    pixels = _MOST_PIXELS * most // MOST_MACS  # drawing costs too
    affordable = min(SAMPLES, most // max(each, 1), pixels // frame.pixels)
    if affordable < _FEWEST:
        return None
    plain = frame.drawn(affordable, np.random.default_rng(seed))
    label = f"random pictures, seed {seed}"
    if frame.value.dtype.kind == "u":
        return _data(frame, plain, _RANGES[-1], label)
    some = plain[: max(_FEWEST, len(plain) // 2)]
    fits = [_misfit(graph, _data(frame, some, bounds, label)) for bounds in _RANGES]
    return _data(frame, plain, _RANGES[int(np.argmin(fits))], label)


@dataclass(frozen=True)
class _Frame:
    """Where a picture goes.

    Attributes:
        value: The input.
        batch: Pictures in one run.
        fixed: The model takes just so many.
        colours, height, width: Of one picture.
        last: Colours are the last axis.
    """

    value: Input
    batch: int
    fixed: bool
    colours: int
    height: int
    width: int
    last: bool

    @classmethod
    def of(cls, value: Input, shape: Shape | None) -> _Frame | None:
        """The frame of an input; None where that is no picture."""
        if shape is None or len(shape) != 4 or not _paintable(value):
            return None
        last = shape[1] not in _COLOURS and shape[3] in _COLOURS
        colours, height, width = (shape[3], *shape[1:3]) if last else shape[1:]
        if colours not in _COLOURS or min(height, width) < _SMALLEST:
            return None
        fixed = value.dims is not None and (value.dims[0] or 0) > 0
        return cls(value, shape[0] if fixed else _BATCH, fixed, colours, height, width, last)

    @property
    def pixels(self) -> int:
        """In one picture."""
        return self.height * self.width

    def drawn(self, most: int, rng: np.random.Generator) -> Float64Array:
        """Pictures of mean 0 and variance 1, shape (pictures, colours, height, width)."""
        whole = self.fixed or most > self.batch
        count = max(most // self.batch, 1) * self.batch if whole else most
        half = count // 2
        size = (self.colours, self.height, self.width)
        made = np.concatenate([_leaves(half, *size, rng), _clouds(count - half, *size, rng)])
        return made[rng.permutation(count)]


def _paintable(value: Input) -> bool:
    return value.dtype.kind == "f" or value.dtype == np.uint8


def _data(frame: _Frame, plain: Float64Array, bounds: tuple[float, float], label: str) -> Data:
    scaled = bounds[0] + bounds[1] * plain
    if frame.value.dtype.kind == "u":
        scaled = np.clip(np.round(scaled), 0, 255)
    turned = scaled.transpose(0, 2, 3, 1) if frame.last else scaled
    array = np.ascontiguousarray(turned.astype(frame.value.dtype))
    step = frame.batch if frame.fixed else min(frame.batch, -(-len(array) // 2))
    batches = [{frame.value.name: array[at : at + step]} for at in range(0, len(array), step)]
    return Data(batches, label, random=True, samples=len(array))


def _misfit(graph: Graph, data: Data) -> float:
    """How far what BatchNormalizations get is from what they were trained on: a mean divergence.

    0 where the model has none, so that the first of several candidates is taken.
    """
    norms = [node for node in graph.nodes if node.op_type == "BatchNormalization"]
    norms = [node for node in norms if all(name in graph.constants for name in node.inputs[3:5])]
    if not norms:
        return 0.0
    names = list(dict.fromkeys(node.inputs[0] for node in norms))
    seen = _moments(stream(graph.model, names, data))
    found = []
    for node in norms:
        (mean, variance), wanted = seen[node.inputs[0]], graph.constants
        center, around = (
            wanted[name].weight.read().astype(np.float64) for name in node.inputs[3:5]
        )
        around, variance = around + _TINY, variance + _TINY
        ratio = variance / around
        apart = ratio - 1 - np.log(ratio) + np.square(mean - center) / around
        found.append(float(np.mean(np.minimum(apart, _MOST_APART))))
    return float(np.mean(found))


def _moments(
    values: Iterator[Mapping[str, AnyArray]],
) -> Mapping[str, tuple[Float64Array, Float64Array]]:
    """Mean and variance of each channel, axis 1."""
    sums: dict[str, list[Float64Array]] = {}
    count: dict[str, int] = {}
    for batch in values:
        for name, array in batch.items():
            by_channel = np.asarray(array, np.float64).swapaxes(0, 1).reshape(array.shape[1], -1)
            new = [by_channel.sum(axis=1), np.square(by_channel).sum(axis=1)]
            sums[name] = (
                [a + b for a, b in zip(sums[name], new, strict=True)] if name in sums else new
            )
            count[name] = count.get(name, 0) + by_channel.shape[1]
    found = {}
    for name, (first, second) in sums.items():
        mean = first / count[name]
        found[name] = (mean, np.maximum(second / count[name] - np.square(mean), 0))
    return found


# -- what is drawn ---------------------------------------------------------------------------------


def _leaves(
    count: int, colours: int, height: int, width: int, rng: np.random.Generator
) -> Float64Array:
    """Discs and rectangles that cover one another; large ones are rarer, as with real things."""
    rows, columns = np.mgrid[:height, :width]
    made = np.empty((count, colours, height, width))
    for picture in made:
        picture[:] = _colour(colours, rng)[:, None]
        for _ in range(_LEAVES):
            radius = 2 / rng.uniform(_SMALLEST_LEAF, 1)
            radius = min(radius, max(height, width) / 2)
            down, right = rows - rng.uniform(0, height), columns - rng.uniform(0, width)
            colour = _colour(colours, rng)
            if rng.random() < 0.5:
                covered = np.square(down) + np.square(right) < radius**2
            else:
                angle, shape = rng.uniform(0, np.pi), rng.uniform(0.3, 1.5)
                along = down * np.cos(angle) + right * np.sin(angle)
                across = right * np.cos(angle) - down * np.sin(angle)
                covered = (np.abs(along) < radius) & (np.abs(across) < radius * shape)
            picture[:, covered] = colour
    return _normalised(made)


def _colour(colours: int, rng: np.random.Generator) -> Float64Array:
    """Shape (colours, 1): mostly grey."""
    own = rng.standard_normal((colours, 1))
    return np.asarray(np.sqrt(_SHARED) * rng.standard_normal() + np.sqrt(1 - _SHARED) * own)


def _clouds(
    count: int, colours: int, height: int, width: int, rng: np.random.Generator
) -> Float64Array:
    """Noise of a falling spectrum."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1 / (1.5 * max(height, width))

    def cloud(channels: int) -> Float64Array:
        noise = np.fft.rfft2(rng.standard_normal((count, channels, height, width)))
        return _normalised(np.fft.irfft2(noise * frequency**-_FALL, s=(height, width)))

    return np.asarray(np.sqrt(_SHARED) * cloud(1) + np.sqrt(1 - _SHARED) * cloud(colours))


def _normalised(array: AnyArray) -> Float64Array:
    return np.asarray((array - array.mean()) / max(float(array.std()), _TINY), np.float64)
