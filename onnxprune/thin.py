"""Impose a sparsity pattern on the weights of a model's layers.

What can take the pattern takes it, all of it; what cannot stays dense, with the reason. Which
weights stay is decided by their magnitude; weights that hold the pattern already stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from math import prod

import numpy as np
from onnx import TensorProto

from onnxprune import patterns
from onnxprune.errors import UsageError
from onnxprune.model import Model
from onnxprune.patterns import NM, Block, Kernel, Pattern
from onnxprune.replaced import replaced
from onnxprune.types import AnyArray, BoolArray, FloatArray, IntArray, Shape, ThinLayer
from onnxprune.weights import SparseLayer, sparse_layers

MAGNITUDE = "magnitude"
_MOST_OF_ONE = 0.9  # share of one layer that a global sparsity may take, unless it asks for more
# Outputs and channels that sparse Tensor Cores want a multiple of: apex ASP's rule for floats,
# TensorRT's layouts for int8.
_FOR_FLOATS, _FOR_INT8 = (8, 16), (32, 32)
# Channels from which sparse kernels were seen to pay: of convolutions by NVIDIA's word in TensorRT
# issue 4065; nothing better is known of products, so the same.
_PAYS = 256


@dataclass(frozen=True, slots=True)
class Wish:
    """What is asked for.

    Attributes:
        pattern: The pattern.
        sparsity: Share of weights that goes.
        scope: Take it of each layer (``local``) or of all together (``global``).
        ignore, only: Patterns of nodes and tensors that stay dense, or alone do not.
        only_gain: Leave layers dense that no GPU runs faster.
    """

    pattern: Pattern
    sparsity: float
    scope: str = "local"
    ignore: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    only_gain: bool = False

    @classmethod
    def read(
        cls,
        pattern: str,
        sparsity: float | None,
        *,
        scope: str = "local",
        ignore: tuple[str, ...] = (),
        only: tuple[str, ...] = (),
        only_gain: bool = False,
    ) -> Wish:
        """What options mean.

        Raises:
            UsageError: They mean nothing, or contradict one another.
        """
        found = patterns.parse(pattern)
        if scope not in ("local", "global"):
            raise UsageError(f"scope is '{scope}'", hint="give local or global")
        if scope == "global" and isinstance(found, NM):
            raise UsageError(
                f"pattern {found} takes the same of every run", hint="leave out --scope global"
            )
        if only_gain and found != NM(2, 4):
            raise UsageError(
                f"TensorRT has no kernels for pattern {found}, so no layer gains",
                hint="--only-gain goes with --pattern 2:4",
            )
        share = patterns.sparsity_of(found, sparsity)
        return cls(found, share, scope, ignore, only, only_gain)


@dataclass(frozen=True)
class Thinned:
    """A model whose layers hold a pattern.

    Attributes:
        model: The new model.
        wish: What was asked for.
        layers: Every layer, with what was done or why nothing was.
        owners: For each tensor that was thinned, the layer whose matrices were cut.
    """

    model: Model
    wish: Wish
    layers: tuple[ThinLayer, ...]
    owners: tuple[SparseLayer, ...] = field(repr=False)

    @property
    def done(self) -> tuple[ThinLayer, ...]:
        """One entry for each tensor that was thinned."""
        return tuple(one for one in self.layers if one.done and not one.shared)


@dataclass(frozen=True)
class Candidates:
    """What can take a pattern, by the tensor it would be cut in, and why the rest cannot.

    Attributes:
        layers: Every layer.
        owners: Position of the layer that decides, for each tensor that can be cut.
        why: Why a layer stays dense, by position.
        eligible: Those that could take it, also where the caller leaves them dense.
    """

    layers: tuple[SparseLayer, ...]
    owners: tuple[int, ...]
    why: Mapping[int, str]
    eligible: frozenset[int]


def candidates(model: Model, wish: Wish) -> Candidates:
    """Which layers can take a pattern; no weight is read for it.

    Raises:
        UsageError: ``ignore`` or ``only`` matches nothing.
    """
    layers = sparse_layers(model)
    filtered = _filtered(layers, wish)
    why: dict[int, str] = {}
    together: dict[int, list[int]] = {}
    able: set[int] = set()
    for at, layer in enumerate(layers):
        reason = _why_not(layer, wish.pattern)
        if reason is None:
            able.add(at)
            reason = filtered.get(at) or _no_gain(layer, wish)
        if reason is not None:
            why[at] = reason
        if layer.seen is not None:
            together.setdefault(id(layer.stored.tensor), []).append(at)
    owners: list[int] = []
    for same in together.values():
        apart = _apart(layers, same, wish.pattern)
        bad = next((at for at in same if at in why), None)
        if bad is not None:
            shared = f"it shares its weight with '{layers[bad].label}': {why[bad]}"
            why.update((at, shared) for at in same if at not in why)
        elif apart is not None:
            for at in same:
                other = layers[same[0] if at != same[0] else apart].label
                why[at] = f"it shares its weight with '{other}', along another axis"
        else:
            owners.append(same[0])
        if apart is not None or not able.issuperset(same):
            able.difference_update(same)
    return Candidates(layers, tuple(owners), why, frozenset(able))


def _apart(layers: Sequence[SparseLayer], same: Sequence[int], pattern: Pattern) -> int | None:
    """First of some layers that share a tensor whose pattern would lie otherwise in it."""
    if len(same) < 2 or any(_why_not(layers[at], pattern) for at in same):
        return None
    marks = _marks(layers[same[0]], pattern)
    return next((at for at in same[1:] if not np.array_equal(_marks(layers[at], pattern), marks)),
                None)  # fmt: skip


def thin(
    model: Model,
    wish: Wish,
) -> Thinned:
    """Impose a pattern on every layer that can take it.

    Args:
        model: The model, which stays as it is.
        wish: What to impose.

    Raises:
        UsageError: ``ignore`` or ``only`` matches nothing.
    """
    found = candidates(model, wish)
    shares = _shares(found, wish)
    changes: dict[int, Callable[[], AnyArray]] = {}
    rows: dict[int, ThinLayer] = {}
    unfit: dict[int, str] = {}  # why a tensor that could be cut is not, once its values are known
    owners: list[SparseLayer] = []
    for at in found.owners:
        layer = found.layers[at]
        cut = _cut(layer, wish.pattern, shares[at])
        if isinstance(cut, str):
            unfit[id(layer.stored.tensor)] = cut
            continue
        rows[at], changes[id(layer.stored.tensor)] = cut
        owners.append(layer)
    by_tensor = {id(found.layers[at].stored.tensor): at for at in rows}
    table = []
    for at, layer in enumerate(found.layers):
        tensor = None if layer.seen is None else id(layer.stored.tensor)
        owner = None if tensor is None else by_tensor.get(tensor)
        if tensor in unfit:
            table.append(replace(_row(layer, done=False), why=unfit[tensor]))
        elif owner is None:
            could = at in found.eligible
            table.append(replace(_row(layer, done=False), why=found.why[at], eligible=could))
        elif owner == at:
            table.append(rows[at])
        else:
            shared = f"shares its weight with '{found.layers[owner].label}'"
            table.append(replace(rows[owner], node=layer.label, op_type=layer.node.op_type,
                                 why=shared, shared=True))  # fmt: skip
    return Thinned(replaced(model, changes), wish, tuple(table), tuple(owners))


# -- who can take it -------------------------------------------------------------------------------


def _why_not(layer: SparseLayer, pattern: Pattern) -> str | None:
    if layer.why_not is not None:
        return layer.why_not
    if layer.stored.pinned is not None:
        return f"its weight '{layer.stored.name}' stays: {layer.stored.pinned}"
    if layer.stored.readers:
        return f"its weight '{layer.stored.name}' stays: {layer.stored.readers[0]}"
    if isinstance(pattern, Kernel) and layer.form not in ("conv", "deconv"):
        return "a product has no kernels"
    return patterns.misfit(pattern, layer.shape, layer.taps)


def _no_gain(layer: SparseLayer, wish: Wish) -> str | None:
    if not wish.only_gain:
        return None
    reason = gain(layer, wish.pattern)
    return None if reason is None else f"no gain expected: {reason}"


def gain(layer: SparseLayer, pattern: Pattern) -> str | None:
    """Why a GPU is not expected to run a layer faster for its pattern; None where it is."""
    if pattern != NM(2, 4):
        return f"TensorRT has no kernels for {pattern}"
    reason = unaligned(layer)
    if reason is not None:
        return reason
    outputs, channels = layer.shape[1], layer.channels
    if min(channels, outputs) < _PAYS:
        return f"{channels} channels to {outputs}, sparse kernels pay from {_PAYS}"
    return None


def unaligned(layer: SparseLayer) -> str | None:
    """Which side of a layer is no multiple of what sparse kernels want; None where both are."""
    small = layer.stored.weight.data_type in (TensorProto.INT8, TensorProto.UINT8)
    by_outputs, by_channels = _FOR_INT8 if small else _FOR_FLOATS
    if layer.channels % by_channels:
        return f"{layer.channels} channels to sum over, not a multiple of {by_channels}"
    if layer.shape[1] % by_outputs:
        return f"{layer.shape[1]} outputs, not a multiple of {by_outputs}"
    return None


def _filtered(layers: Sequence[SparseLayer], wish: Wish) -> dict[int, str]:
    """Layers that patterns of names leave dense, and why."""
    found: dict[int, str] = {}
    chosen: set[int] = set()
    for option, globs in (("--ignore", wish.ignore), ("--only", wish.only)):
        for glob in globs:
            hit = [at for at, layer in enumerate(layers) if _is_named(layer, glob)]
            if not hit:
                raise UsageError(
                    f"{option} '{glob}' matches no layer or weight",
                    hint="`onnxprune inspect MODEL --sparsity` lists them",
                )
            if option == "--only":
                chosen.update(hit)
            else:
                found.update((at, f"--ignore {glob}") for at in hit)
    if wish.only:
        rest = (at for at in range(len(layers)) if at not in chosen)
        found.update((at, "--only leaves it out") for at in rest)
    return found


def _is_named(layer: SparseLayer, glob: str) -> bool:
    names = [layer.label, layer.node.name, layer.key]
    names += [] if layer.seen is None else [layer.stored.name, layer.stored.weight.name]
    return any(fnmatchcase(name, glob) for name in names)


def _marks(layer: SparseLayer, pattern: Pattern) -> IntArray:
    """For each stored element the first of those that go together with it: equal cuts, equal marks.

    Shape of the stored tensor.
    """
    shape, taps = layer.shape, layer.taps
    match pattern:
        case NM(_, m):
            units = np.repeat(np.arange(prod(shape) // m), m).reshape(shape)
        case Block(height, width):
            count: Shape = (shape[0], shape[1] // height, shape[2] // width)
            numbers = np.arange(prod(count)).reshape(count)
            units = np.repeat(np.repeat(numbers, height, axis=1), width, axis=2)
        case Kernel():
            count = (*shape[:2], shape[2] // taps)
            units = np.tile(np.arange(prod(count)).reshape(count), taps)
        case _:
            return np.zeros(layer.stored.weight.shape, np.int64)
    stored: IntArray = np.ascontiguousarray(layer.places(units))
    flat = stored.reshape(-1)
    first = np.full(int(flat.max()) + 1, flat.size)
    np.minimum.at(first, flat, np.arange(flat.size))
    return first[flat].reshape(stored.shape)


# -- what goes -------------------------------------------------------------------------------------


def _shares(found: Candidates, wish: Wish) -> Mapping[int, float]:
    """Sparsity of each layer, by position."""
    if wish.scope == "local" or not found.owners:
        return dict.fromkeys(found.owners, wish.sparsity)
    most = max(_MOST_OF_ONE, wish.sparsity)
    scores: list[AnyArray] = []
    for at in found.owners:
        layer = found.layers[at]
        units = patterns.units(wish.pattern, np.abs(layer.matrix()), taps=layer.taps).reshape(-1)
        mean = units.astype(np.float32) * np.float32(units.size / prod(layer.shape))
        np.nan_to_num(mean, copy=False, nan=np.inf)  # such a layer stays dense
        may_go = ~patterns.best(mean, patterns.gone(mean.size, most))
        scores.append(np.where(may_go, mean, np.inf))
    everything = np.concatenate(scores)
    keep = patterns.best(everything, patterns.gone(everything.size, wish.sparsity))
    shares, begin = {}, 0
    for at, one in zip(found.owners, scores, strict=True):
        left = np.count_nonzero(keep[begin : begin + one.size])
        shares[at], begin = 1 - left / one.size, begin + one.size
    return shares


def _cut(
    layer: SparseLayer, pattern: Pattern, sparsity: float
) -> tuple[ThinLayer, Callable[[], AnyArray]] | str:
    """What became of one layer, and its new stored tensor; or why it stays dense."""
    weight = layer.matrix()
    size = np.abs(weight)
    whole, energy = _sum(size), _energy(weight)
    if not np.isfinite(whole):
        return "its weight has NaN or infinite values"
    keep = patterns.mask(pattern, size, sparsity, taps=layer.taps)
    lost = weight * ~keep
    size *= keep
    reason = gain(layer, pattern)
    return replace(
        _row(layer, done=True),
        eligible=True,
        pattern=str(pattern),
        method=MAGNITUDE,
        sparsity=sparsity,
        zeros=1 - int(np.count_nonzero(size)) / size.size,
        kept=_sum(size) / whole if whole else 1.0,
        error=(_energy(lost) / energy) ** 0.5 if energy else 0.0,
        why=f"no gain expected: {reason}" if reason and pattern == NM(2, 4) else "",
        gains=reason is None,
    ), _masked(layer, keep)


def _sum(array: AnyArray) -> float:
    return float(array.sum(dtype=np.float64))


def _energy(array: FloatArray) -> float:
    """Sum of squares."""
    flat = array.reshape(-1)
    return float(np.dot(flat, flat))


def _masked(layer: SparseLayer, keep: BoolArray) -> Callable[[], AnyArray]:
    """The stored tensor with zeros where a mask says so; it is the mask that is remembered."""
    stored = layer.stored
    bits, read = np.packbits(layer.places(keep)), stored.weight.read

    def compute() -> AnyArray:
        mask = np.unpackbits(bits, count=stored.weight.size).view(np.bool_)
        return np.where(mask.reshape(stored.weight.shape), read(), layer.zero())

    return compute


def _row(layer: SparseLayer, *, done: bool) -> ThinLayer:
    """What there is to say of a layer before anything is done to it."""
    known = bool(layer.form) and 0 < prod(layer.shape) == layer.stored.weight.size
    return ThinLayer(
        node=layer.label,
        op_type=layer.node.op_type,
        tensor=None if layer.seen is None else layer.stored.name,
        data_type=0 if layer.seen is None else layer.stored.weight.data_type,
        done=done,
        axis=layer.axis if known else None,
        groups=layer.groups,
        outputs=layer.shape[1] if known else 0,
        channels=layer.channels if known else 0,
        taps=layer.taps if known else 0,
        aligned=unaligned(layer) is None if known else None,
    )
