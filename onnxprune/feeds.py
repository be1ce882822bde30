"""Arrays made up for a model's inputs at given shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from onnxprune.dims import size_of
from onnxprune.errors import VerificationError
from onnxprune.model import Model
from onnxprune.runtime import UNPROVED, RuntimeUnavailable, Session, session
from onnxprune.types import AnyArray, Shape

Batch = Mapping[str, AnyArray]

_INT_RANGES = (100, 10, 2)  # Exclusive upper ends; the runtime says which one is a valid index.
_NEEDS_DATA = "give real inputs with --data FILE.npz, or skip the check by --verify none"


@dataclass(frozen=True, slots=True)
class Input:
    """A graph input that has to be fed. ``dims`` has None where the model leaves the size open."""

    name: str
    dtype: np.dtype[np.generic]
    dims: tuple[int | None, ...] | None

    @property
    def spelled(self) -> str:
        """Type and shape for people."""
        if self.dims is None:
            return f"{self.dtype} of any shape"
        return f"{self.dtype} {spell(self.dims)}"


def spell(dims: Sequence[int | None]) -> str:
    """A shape for people, e.g. ``[?, 3, 224, 224]``."""
    return "[" + ", ".join("?" if dim is None else str(dim) for dim in dims) + "]"


def inputs_of(model: Model) -> tuple[Input, ...]:
    """Inputs of ``model`` that are not initializers with a default."""
    graph = model.proto.graph
    given = {tensor.name for tensor in graph.initializer}
    given |= {tensor.values.name for tensor in graph.sparse_initializer}
    found = []
    for value in graph.input:
        if value.name in given:
            continue
        kind = value.type.WhichOneof("value")
        if kind != "tensor_type":
            raise VerificationError(
                f"input '{value.name}' is a {(kind or 'untyped value').removesuffix('_type')}, "
                "not a tensor: the model cannot be run here",
                hint=UNPROVED,
            )
        tensor = value.type.tensor_type
        dims = None
        if tensor.HasField("shape"):
            dims = tuple(map(size_of, tensor.shape.dim))
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))
        found.append(Input(value.name, dtype, dims))
    return tuple(found)


def random_feeds(
    model: Model,
    sizes: Sequence[Mapping[str, Shape]],
    *,
    seed: int,
    batches: int,
    loaded: Session | None = None,
) -> tuple[Batch, ...]:
    """Normal floats, small integers, images of 0..255 in uint8: one mapping for each run.

    What range an integer input bears is tried in ``loaded``, or in a session made for it.

    Raises:
        VerificationError: An input takes strings, or no tensor at all.
    """
    inputs = inputs_of(model)
    for value in inputs:
        if value.dtype.kind in "OUS":
            raise VerificationError(
                f"input '{value.name}' takes strings, which cannot be made up", hint=_NEEDS_DATA
            )
    limits = _integer_ranges(model, inputs, sizes[0], seed, loaded)
    return tuple(
        _draw(inputs, sizes[index % len(sizes)], limits, seed, index)
        for index in range(max(batches, len(sizes)))
    )


def _draw(
    inputs: Sequence[Input],
    sizes: Mapping[str, Shape],
    limits: Mapping[str, int],
    seed: int,
    batch: int,
) -> dict[str, AnyArray]:
    """One batch; each array depends on seed, batch and position alone."""
    made: dict[str, AnyArray] = {}
    for position, value in enumerate(inputs):
        rng = np.random.default_rng([seed, batch, position])
        shape = sizes[value.name]
        if value.dtype.kind == "b":
            made[value.name] = rng.integers(0, 2, shape).astype(np.bool_)
        elif value.dtype.kind in "iu":
            made[value.name] = rng.integers(0, limits[value.name], shape).astype(value.dtype)
        else:
            made[value.name] = rng.standard_normal(shape).astype(value.dtype)
    return made


def _integer_ranges(
    model: Model,
    inputs: Sequence[Input],
    sizes: Mapping[str, Shape],
    seed: int,
    loaded: Session | None,
) -> dict[str, int]:
    """For each integer input the widest range (exclusive upper end) that the runtime accepts.

    Token ids must stay below a vocabulary nobody tells us, segment ids are 0 or 1: so all inputs
    get the widest range, then each one that does not bear it a narrower one.
    """
    limits = {value.name: _widest(value, sizes[value.name]) for value in inputs if _is_int(value)}
    if not any(limit in _INT_RANGES[:-1] for limit in limits.values()):
        return limits
    try:
        runtime = loaded or session(model)
    except RuntimeUnavailable:
        return limits  # Verification says why, with the model's own inputs at hand.

    def runs(candidate: Mapping[str, int]) -> bool:
        try:
            runtime.run(_draw(inputs, sizes, candidate, seed, 0))
        except RuntimeUnavailable:
            return False
        return True

    if runs(limits):
        return limits
    narrow = {name: min(limit, _INT_RANGES[-1]) for name, limit in limits.items()}
    if not runs(narrow):
        return limits
    for name, widest in limits.items():
        for limit in (widest, *(end for end in _INT_RANGES if end < widest)):
            if limit <= narrow[name] or runs({**narrow, name: limit}):
                narrow[name] = limit
                break
    return narrow


def _is_int(value: Input) -> bool:
    return value.dtype.kind in "iu"


def _widest(value: Input, shape: Shape) -> int:
    """Where to start looking: images use all of uint8, masks are 0 or 1, ids are small."""
    if "mask" in value.name.lower():
        return _INT_RANGES[-1]
    if value.dtype == np.uint8 and len(shape) >= 3:
        return 256
    return _INT_RANGES[0]
