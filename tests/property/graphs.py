"""Random small networks: a trunk of layers with motifs between them, and heads that read it."""

from __future__ import annotations

from collections.abc import Sequence

import onnx
from hypothesis import strategies as st

import tests.property.attention
import tests.property.movements
import tests.property.norms
import tests.property.numbers
import tests.property.pointwise
import tests.property.spatial
import tests.property.transformers  # noqa: F401  (these register their motifs)
from tests.property.builder import Builder
from tests.property.choices import Choices, Dice, Drawn
from tests.property.layers import bent, channels_last, conv, gemm, layer, matmul
from tests.property.motifs import ANY, MOTIFS, Motif, motifs_of
from tests.property.pointwise import activation
from tests.property.tensors import Open, T


def random_model(seed: int, focus: str | None = None) -> onnx.ModelProto:
    """The model of a seed; ``focus`` names an operator that it has to contain, if it can."""
    return build(Dice(seed), focus)


@st.composite
def models(draw: st.DrawFn) -> onnx.ModelProto:
    """Models whose choices hypothesis makes, and shrinks."""
    return build(Drawn(draw), draw(st.sampled_from([None, *known_ops()])))


def build(choices: Choices, focus: str | None = None) -> onnx.ModelProto:
    """A model from a source of choices."""
    wanted = motifs_of(focus) if focus else []
    since = min((m.since for m in wanted), default=7)
    until = max((m.until for m in wanted), default=23)
    b = Builder(choices, since=since, until=until)
    wanted = [m for m in wanted if m.since <= b.opset <= m.until]
    middle = b.pick(wanted) if wanted else None
    x = _producer(b, b.pick(middle.on if middle else ANY))
    for _ in range(b.integer(0, 2)):
        x = _same_kind(b, x)
    if middle:
        x = _applied(b, x, middle) or x
    for _ in range(b.integer(0, 2)):
        x = _anything(b, x)
    _heads(b, x)
    return b.model()


def _producer(b: Builder, kind: str) -> T:
    """Inputs and the first layer, with whatever kind of tensor is asked for."""
    batch = Open(2) if b.dynamic else b.pick((2, 1, 3))
    side = Open(32) if b.dynamic == "space" and kind in ("map1", "map2") else 8
    if kind == "flat":
        x = b.input((batch, 7))
    elif kind == "last":
        x = b.input(b.pick(((batch, 6, 5), (batch, 4, 4, 5))), c=-1)
        x = T(x.name, x.shape, x.rank - 1, x.dtype)
    else:
        space = {"map1": (side,), "map2": (side, side), "map3": (4, 4, 4)}[kind]
        x = b.input((batch, 3, *space))
    x = layer(b, x)
    return activation(b, x) if b.one_in(2) else x


def _same_kind(b: Builder, x: T) -> T:
    """A motif that leaves the kind of tensor as it was; one that does not becomes a dead branch."""
    y = _anything(b, x)
    return y if y.kind == x.kind else x


def _anything(b: Builder, x: T) -> T:
    """A motif, or one more layer."""
    fitting = [m for m in MOTIFS if m.fits(b, x) and (m.op != "Custom" or b.one_in(4))]
    y = _applied(b, x, b.pick(fitting))
    if y is None or b.one_in(3):
        y = bent(b, layer(b, y or x))
    if b.one_in(12):
        b.output(y)
    return y


def _applied(b: Builder, x: T, chosen: Motif) -> T | None:
    if not chosen.fits(b, x):
        return None
    y = chosen.build(b, x, chosen.op)
    return y if y is not None and y.rank >= 2 and y.channels > 0 else None


def _heads(b: Builder, x: T) -> None:
    """One or two readers; the second of an activation of the first's input."""
    b.output(_reader(b, x))
    if b.one_in(4):
        b.output(_reader(b, activation(b, x)))
    if b.one_in(8):
        layer(b, x)  # a branch that nobody reads


def _reader(b: Builder, x: T) -> T:
    out = b.pick((5, 3))
    if x.rank == 2:
        return gemm(b, x, out) if b.one_in(2) else matmul(b, x, out)
    if x.kind in ("last", "other"):
        return matmul(b, channels_last(b, x), out)
    if x.rank > 5 or b.one_in(3):
        return _pooled(b, x, out)
    return conv(b, x, out)


def _pooled(b: Builder, x: T, out: int) -> T:
    y = b.op("GlobalAveragePool", x, shape=[*x.shape[:2], *(1,) * (x.rank - 2)])
    y = b.op("Flatten", y, shape=x.shape[:2])
    return gemm(b, y, out)


def known_ops() -> Sequence[str]:
    """Every operator that some motif is there for."""
    return sorted({m.op for m in MOTIFS} - {"Custom"})
