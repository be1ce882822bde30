"""Concrete sizes for symbolic input dimensions, found by trying plausible ones."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

import onnx

from onnxprune.dims import size_of
from onnxprune.errors import ModelError, UsageError, VerificationError
from onnxprune.feeds import random_feeds
from onnxprune.graph import Graph
from onnxprune.model import Model
from onnxprune.prepare import prepare
from onnxprune.runtime import Session, session
from onnxprune.shapes import environment
from onnxprune.types import Shape

_MOST_TRIALS = 60
_LARGEST_TRIAL = 500_000_000  # bytes of a model that is loaded only to try input sizes
_MOST_IMAGE_CHANNELS = 4  # a last axis this short holds channels, not width
_IMAGE_SIDES: tuple[tuple[int, int], ...] = (
    (64, 96),
    (96, 160),
    (224, 224),
    (256, 256),
    (128, 192),
    (32, 64),
    (320, 320),
)
_IMAGE_SIDES += ((512, 512), (640, 640), (384, 384), (28, 28), (299, 299), (16, 16), (8, 8))
_LENGTHS = (8, 24, 16, 32, 64, 128, 256, 77, 197, 512, 1, 16000, 4096)


def stand_ins(
    model: Model, overrides: Mapping[str, Shape] | None = None
) -> tuple[Mapping[str, Shape], ...]:
    """Concrete input shapes to run a model at: one choice if it is static, else two that differ.

    Args:
        model: The model.
        overrides: ``--input-shape``, by input name.

    Raises:
        UsageError: An override names no input, has the wrong rank or contradicts a fixed dimension.
        ModelError: No plausible sizes were accepted.
    """
    return find_stand_ins(prepare(model), overrides)


def find_stand_ins(
    graph: Graph, overrides: Mapping[str, Shape] | None = None
) -> tuple[Mapping[str, Shape], ...]:
    """``stand_ins`` for a graph that is prepared already."""
    values = {value.name: value for value in graph.model.proto.graph.input}
    declared = {name: _declared(values[name]) for name in graph.inputs}
    _check_overrides(declared, overrides or {})
    for name, shape in (overrides or {}).items():
        declared[name] = list(shape)
    symbols = _Symbols(graph, declared)
    if not symbols.names:
        return (symbols.fill({}),)
    complaint = ""
    accepted: list[Mapping[str, Shape]] = []
    trial = _Trial(graph.model, symbols)
    for batch in (1, 3):
        doubtful: Mapping[str, Shape] | None = None
        for choice in itertools.islice(symbols.choices(batch, skip=accepted), _MOST_TRIALS):
            shapes = symbols.fill(choice)
            env = environment(graph, shapes, observe=False)
            if env.errors:
                complaint = complaint or f"{env.errors[0][0].label}: {env.errors[0][1]}"
            elif trial.accepts(shapes):
                accepted.append(shapes)
                break
            else:
                doubtful = doubtful or shapes
        else:
            # A model the runtime cannot run at any size is still analysed.
            accepted += [] if doubtful is None else [doubtful]
    if not accepted:
        raise ModelError(
            f"no input size was found that the model accepts; at the first one, {complaint}",
            hint="give it with --input-shape NAME:1x3x224x224",
        )
    return tuple(accepted)


class _Trial:
    """Asks ONNX Runtime whether it takes a size, where shape inference alone may not know.

    Reflection padding, for one, needs a length that inference does not ask for. A batch needs no
    trial, and neither does a model too large to load for it.
    """

    def __init__(self, model: Model, symbols: _Symbols) -> None:
        roles = {role for role, _, _ in symbols.names.values()}
        self._model = model
        self._wanted = bool(roles & {"side", "length"}) and model.file_bytes < _LARGEST_TRIAL
        self._loaded: Session | None = None

    def accepts(self, shapes: Mapping[str, Shape]) -> bool:
        if not self._wanted:
            return True
        try:
            self._loaded = self._loaded or session(self._model)
            feeds = random_feeds(self._model, [shapes], seed=0, batches=1, loaded=self._loaded)
            self._loaded.run(feeds[0])
        except VerificationError:
            return False
        return True


def _declared(value: onnx.ValueInfoProto) -> list[int | str]:
    """Dimensions of an input: a number where fixed, a symbol where not."""
    dims: list[int | str] = []
    for axis, dim in enumerate(value.type.tensor_type.shape.dim):
        size = size_of(dim)
        if size is None or (axis == 0 and size == 0):  # no samples: nobody means that
            dims.append(dim.dim_param or f"{value.name}.{axis}")
        else:
            dims.append(size)
    return dims


def _check_overrides(
    declared: Mapping[str, Sequence[int | str]], overrides: Mapping[str, Shape]
) -> None:
    for name, shape in overrides.items():
        if name not in declared:
            known = ", ".join(declared)
            raise UsageError(
                f"--input-shape: the model has no input '{name}'", hint=f"it has {known}"
            )
        dims = declared[name]
        if len(dims) != len(shape):
            raise UsageError(
                f"--input-shape: input '{name}' has {len(dims)} dimensions, {len(shape)} were given"
            )
        for axis, (dim, size) in enumerate(zip(dims, shape, strict=True)):
            if isinstance(dim, int) and dim != size:
                raise UsageError(
                    f"--input-shape: dimension {axis} of '{name}' is fixed at {dim}, not {size}"
                )


class _Symbols:
    """The symbolic dimensions of a model's inputs, and plausible sizes for them."""

    def __init__(self, graph: Graph, declared: Mapping[str, Sequence[int | str]]) -> None:
        self.declared = declared
        self.names: dict[str, tuple[str, int, int]] = {}  # symbol -> role, order, channels
        for name, dims in declared.items():
            for axis, dim in enumerate(dims):
                if isinstance(dim, str) and dim not in self.names:
                    self.names[dim] = self._role(graph, name, axis, dims)

    def _role(
        self, graph: Graph, name: str, axis: int, dims: Sequence[int | str]
    ) -> tuple[str, int, int]:
        channels, by_conv = _first_width(graph, name, len(dims))
        image, last = len(dims) >= 4, len(dims) - 1
        channels_last = image and isinstance(dims[-1], int) and dims[-1] <= _MOST_IMAGE_CHANNELS
        channel_axis = 1 if by_conv and not channels_last else last
        if axis == 0:
            return ("batch", 0, 0)
        if axis == channel_axis and channels:
            return ("fixed", 0, channels)
        if image:
            return ("side", axis - (1 if channels_last else 2), 0)
        return ("length", 0, 0)

    def choices(
        self, batch: int, skip: Sequence[Mapping[str, Shape]]
    ) -> Iterator[Mapping[str, int]]:
        """Assignments of sizes to symbols; those used in ``skip`` come last."""
        used = {side for shapes in skip for shape in shapes.values() for side in shape[1:]}
        roles = {role for role, _, _ in self.names.values()}
        sides = sorted(_IMAGE_SIDES, key=lambda s: s[0] in used) if "side" in roles else [(0, 0)]
        lengths = sorted(_LENGTHS, key=used.__contains__) if "length" in roles else [0]
        for batch_size in (batch, 4 - batch):
            for length, side in itertools.product(lengths, sides):
                yield {
                    symbol: {
                        "batch": batch_size,
                        "fixed": channels,
                        "side": side[min(order, 1)],
                        "length": length,
                    }[role]
                    for symbol, (role, order, channels) in self.names.items()
                }

    def fill(self, choice: Mapping[str, int]) -> Mapping[str, Shape]:
        return {
            name: tuple(choice[dim] if isinstance(dim, str) else dim for dim in dims)
            for name, dims in self.declared.items()
        }


def _first_width(graph: Graph, name: str, rank: int) -> tuple[int, bool]:
    """Channels that the first weight behind an input reads, 0 if unknown; whether a Conv's."""
    for _ in range(8):
        readers = graph.consumers.get(name, [])
        for node, position in readers:
            weight = graph.constants.get(node.inputs[1]) if len(node.inputs) > 1 else None
            if weight is None or position != 0:
                continue
            if node.op_type == "Conv" and len(weight.weight.shape) == rank:
                return weight.weight.shape[1] * node.int("group", 1), True
            if node.op_type == "Gemm":
                return weight.weight.shape[1 if node.int("transB", 0) else 0], False
            if node.op_type == "MatMul":
                return weight.weight.shape[0], False
        if len(readers) != 1:
            return 0, False
        name = readers[0][0].outputs[0]
    return 0, False
