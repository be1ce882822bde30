"""Random transformer blocks: attention of every make, its norms, its units, its cache."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import onnx
from hypothesis import strategies as st

from tests.property.builder import Builder
from tests.property.choices import Choices, Dice, Drawn
from tests.property.layers import matmul
from tests.property.motifs import motif
from tests.property.tensors import Open, T, at
from tests.property.weights import weight


@dataclass(frozen=True)
class _Form:
    """What one attention is like: heads of queries and of keys, and their dimensions."""

    heads: int
    few: int
    each: int
    values: int

    @property
    def times(self) -> int:
        return self.heads // self.few


def random_transformer(seed: int) -> onnx.ModelProto:
    """The transformer of a seed."""
    return build(Dice(seed))


@st.composite
def transformers(draw: st.DrawFn) -> onnx.ModelProto:
    """Transformers whose choices hypothesis makes, and shrinks."""
    return build(Drawn(draw))


def build(choices: Choices) -> onnx.ModelProto:
    """One or two blocks between a layer that makes the stream and one that reads it."""
    b = Builder(choices, since=9)
    b.real = np.float32
    batch = Open(2) if b.dynamic else b.pick((2, 1, 3))
    length = Open(6) if b.dynamic == "space" else 6
    x = matmul(b, T(b.input((batch, length, 5), c=2).name, (batch, length, 5), 2), b.pick((8, 12)))
    for _ in range(b.integer(1, 2)):
        x = block(b, x)
    b.output(matmul(b, x, 3))
    return b.model()


@motif("Softmax", "MatMul", on=("last",), since=9)
def transformer_block(b: Builder, x: T, op: str) -> T | None:
    if x.rank != 3 or b.real is not np.float32 or x.channels < 3:
        return None
    return block(b, x)


@motif("Attention", "RotaryEmbedding", on=("last",), since=23)
def attention_in_one_operator(b: Builder, x: T, op: str) -> T | None:
    """Queries, keys and values as layers make them, turned or not, and one operator."""
    if x.rank != 3 or b.real is not np.float32:
        return None
    heads, own, each = b.pick(((4, 4, 4), (4, 2, 4), (2, 1, 6)))
    q, k, v = (matmul(b, x, count * each) for count in (heads, own, own))
    if op == "RotaryEmbedding":
        q, k = _rotated_by_tables(b, q, heads), _rotated_by_tables(b, k, own)
    o = b.op("Attention", q, k, v, shape=q.shape, q_num_heads=heads, kv_num_heads=own)
    return matmul(b, o, x.channels)


def _rotated_by_tables(b: Builder, x: T, heads: int) -> T:
    pairs = x.channels // heads // 2
    tables = [weight(b, b.normal(16, pairs)) for _ in range(2)]
    places = b.input(x.shape[:2], c=0, dtype=np.int64)
    kind = b.pick((0, 1))
    return b.op(
        "RotaryEmbedding", x, *tables, places, shape=x.shape, num_heads=heads, interleaved=kind
    )


def block(b: Builder, x: T) -> T:
    """Attention and units, each added to the stream or instead of it."""
    form = b.pick((
        _Form(2, 2, 4, 4), _Form(4, 4, 4, 4), _Form(4, 2, 4, 4), _Form(2, 1, 4, 4),
        _Form(2, 2, 4, 6), _Form(4, 2, 8, 2), _Form(1, 1, 8, 8), _Form(3, 3, 2, 4),
    ))  # fmt: skip
    y = attention(b, _normed(b, x), form)
    x = b.op("Add", *b.shuffled([x, y])) if b.one_in(2) else y
    y = _units(b, _normed(b, x))
    return b.op("Add", *b.shuffled([x, y])) if b.one_in(2) else y


# -- norms and units -------------------------------------------------------------------------------


def _normed(b: Builder, x: T) -> T:
    style = b.pick(("none", "none", "layer", "rms", "middle"))
    if style == "none":
        return x
    if style == "layer" and b.opset >= 17:
        vectors = [weight(b, b.factors(x.channels)) for _ in range(2)]
        return b.op("LayerNormalization", x, *vectors, axis=-1)
    if style == "rms" and b.opset >= 23:
        return b.op("RMSNormalization", x, weight(b, b.factors(x.channels)), axis=-1)
    if style != "rms":
        x = b.op("Sub", x, _mean(b, x))
    square = b.op("Pow", x, b.scalar(2)) if b.one_in(2) else b.op("Mul", x, x)
    root = b.op("Sqrt", b.op("Add", _mean(b, square), b.scalar(1e-3)))
    y = b.op("Div", x, root, shape=x.shape)
    return b.op("Mul", *b.shuffled([y, weight(b, b.factors(x.channels))]), shape=x.shape)


def _mean(b: Builder, x: T) -> T:
    return b.with_ints("ReduceMean", x, "axes", [-1], 18, shape=[*x.shape[:2], 1], keepdims=1)


def _units(b: Builder, x: T) -> T:
    """Plain, gated by two matrices or by halves of one, or experts in one tensor."""
    inner, out = b.pick((8, 6)), b.pick((x.channels, 12))
    style = b.pick(("plain", "gated", "halved", "experts", "none"))
    if style == "none":
        return x
    if style == "experts":
        return _experts(b, x, inner)
    if style == "plain":
        y = b.op("Tanh", matmul(b, x, inner))
    elif style == "gated":
        y = b.op("Mul", b.op("Sigmoid", matmul(b, x, inner)), matmul(b, x, inner))
    else:
        one, two = b.split(matmul(b, x, 2 * inner), 2, [inner, inner], equal=b.one_in(2))
        y = b.op("Mul", b.op("Sigmoid", one), two)
    return matmul(b, y, x.channels if b.one_in(2) else out) if out == x.channels else (
        matmul(b, matmul(b, y, out), x.channels)
    )  # fmt: skip


def _experts(b: Builder, x: T, inner: int) -> T:
    """Matrices of all experts in one tensor each; a router's weights sum up what they make."""
    count, wide = b.pick((2, 3)), x.channels
    route = b.op("Softmax", matmul(b, x, count), axis=-1 if b.opset >= 13 else 2)
    up, down = (
        weight(b, b.normal(count, *s, scale=math.sqrt(1 / s[0])))
        for s in ((wide, inner), (inner, wide))
    )
    flat = b.unsqueeze(x, 1)  # batch, 1, length, channels
    shape = [x.shape[0], count, x.shape[1]]
    y = b.op("Tanh", b.op("MatMul", flat, up, shape=[*shape, inner], c=3))
    y = b.op("MatMul", y, down, shape=[*shape, wide], c=3)
    route = b.unsqueeze(b.transpose(route, (0, 2, 1)), 3)
    y = b.op("Mul", y, route, shape=[*shape, wide], c=3)
    return b.with_ints("ReduceSum", y, "axes", [1], 13, shape=x.shape, c=2, keepdims=0)


# -- attention -------------------------------------------------------------------------------------


def attention(b: Builder, x: T, form: _Form) -> T:
    """Of x to itself, or to another text."""
    source = x
    if b.one_in(4):
        source = b.input((x.shape[0], Open(5) if b.dynamic == "space" else 5, 4), c=2)
        source = matmul(b, source, 6) if b.one_in(2) else source
    q, k, v = _projected(b, x, source, form)
    if source is x and form.each % 2 == 0 and b.one_in(2):
        angles = _angles(b, q, paired=b.one_in(2), run_time=b.one_in(2))
        q, k = _turned(b, q, angles), _turned(b, k, angles)
    if source is x and b.one_in(5):
        k, v = (_cached(b, y) for y in (k, v))
    if form.times > 1 and not (form.few == 1 and b.one_in(2)):  # else broadcast by MatMul
        k, v = (_repeated(b, y, form.times) for y in (k, v))
    return _read(b, x, _attend(b, q, k, v), form)


def _projected(b: Builder, x: T, source: T, form: _Form) -> tuple[T, T, T]:
    """Queries (N, h, T, d), keys (N, few, S, d) and values (N, few, S, e)."""
    sizes = (form.heads * form.each, form.few * form.each, form.few * form.values)
    style = b.pick(("separate", "split", "slices", "fused", "squeezed"))
    alike = form.few == form.heads and form.each == form.values
    if source is not x or (style in ("fused", "squeezed") and not alike):
        style = "separate"
    if style in ("fused", "squeezed"):
        y = matmul(b, x, sum(sizes))
        y = b.reshape(y, [at(0), at(1), 3, form.heads, at(2, over=3 * form.heads)], c=4)
        y = b.transpose(y, (2, 0, 3, 1, 4))
        if style == "fused":
            q, k, v = (b.gather(y, 0, number) for number in range(3))
        else:
            q, k, v = (b.squeeze(part, [0]) for part in b.split(y, 0, [1, 1, 1]))
        return q, k, v
    if style == "separate":
        parts = [matmul(b, y, n) for y, n in zip((x, source, source), sizes, strict=True)]
    elif style == "split":
        parts = b.split(matmul(b, x, sum(sizes)), 2, sizes)
    else:
        y, ends = matmul(b, x, sum(sizes)), np.cumsum(sizes)
        parts = [b.slice(y, 2, int(e - n), int(e)) for e, n in zip(ends, sizes, strict=True)]
    q, k, v = (
        _split_heads(b, part, n)
        for part, n in zip(parts, (form.heads, form.few, form.few), strict=True)
    )
    return q, k, v


def _split_heads(b: Builder, x: T, heads: int) -> T:
    y = b.reshape(x, [at(0), at(1), heads, at(2, over=heads)], c=3)
    return b.transpose(y, (0, 2, 1, 3))


def _angles(b: Builder, x: T, *, paired: bool, run_time: bool) -> tuple[T | str, T | str, bool]:
    """Cosines and sines (T, d), each angle twice: d/2 apart, or side by side."""
    length, each = x.shape[2], x.shape[3]
    rate = (10.0 ** -(np.arange(each // 2) * 2 / each)).astype(b.real)
    if not run_time and not isinstance(length, Open):
        angle = np.arange(int(length), dtype=b.real)[:, None] * rate
        angle = np.repeat(angle, 2, 1) if paired else np.concatenate([angle, angle], 1)
        return b.initializer(np.cos(angle)), b.initializer(np.sin(angle)), paired
    place = _places(b, x)
    shape = [length, each // 2]
    if b.one_in(2):
        angle = b.op("Mul", *b.shuffled([place, b.initializer(rate)]), shape=shape, c=1)
    else:
        angle = b.op("MatMul", place, b.initializer(rate[None]), shape=shape, c=1)
    if paired:
        two = b.concat([b.unsqueeze(angle, 2)] * 2, 2, 2)
        angle = b.reshape(two, [at(0), at(1, 2)], c=1)
    else:
        angle = b.concat([angle, angle], 1, each)
    return b.op("Cos", angle), b.op("Sin", angle), paired


def _places(b: Builder, x: T) -> T:
    """Positions as a column (T, 1) of floats."""
    if b.one_in(2) and not isinstance(x.shape[2], Open):
        return b.input((x.shape[2], 1), c=1)
    return b.cast(b.unsqueeze(_running(b, x), 1), b.real)


def _running(b: Builder, x: T) -> T:
    shape = b.op("Shape", x, shape=[x.rank], c=0, dtype=np.int64)
    size = b.op("Gather", shape, b.scalar(2, np.int64), shape=(), axis=0)
    if b.opset >= 11:
        zero, one = (b.scalar(n, np.int64) for n in (0, 1))
        return b.op("Range", zero, size, one, shape=[x.shape[2]], c=0, dtype=np.int64)
    ones = b.op("ConstantOfShape", b.unsqueeze(size, 0), shape=[x.shape[2]], c=0, dtype=b.real)
    ones = b.op("Add", ones, b.scalar(1))
    y = b.op("NonZero", ones, shape=[1, x.shape[2]], c=1, dtype=np.int64)
    return b.squeeze(y, [0])


def _turned(b: Builder, x: T, angles: tuple[T | str, T | str, bool]) -> T:
    cos, sin, paired = angles
    each = x.shape[3]
    if paired:
        y = b.reshape(x, [at(0), at(1), at(2), at(3, over=2), 2], c=4)
        one, two = (b.gather(y, 4, np.array([n])) for n in (0, 1))
        y = b.concat([b.op("Neg", two), one], 4, 2)
        y = b.reshape(y, [at(0), at(1), at(2), at(3, 4)], c=3)
    else:
        if b.one_in(2):
            one, two = b.split(x, 3, [each // 2] * 2, equal=b.one_in(2))
        else:
            one, two = b.slice(x, 3, 0, each // 2), b.slice(x, 3, each // 2, each)
        y = b.concat([b.op("Neg", two), one], 3, each)
    return b.op("Add", b.op("Mul", x, cos), b.op("Mul", y, sin))


def _cached(b: Builder, x: T) -> T:
    """Keys or values of earlier tokens come in, all go out."""
    past = b.input((x.shape[0], x.shape[1], 2, x.shape[3]), c=3)
    y = b.concat([past, x], 2, x.shape[2] + 2)
    if b.one_in(2):
        b.output(y)
    return y


def _repeated(b: Builder, x: T, times: int) -> T:
    """Each head several times."""
    y = b.unsqueeze(x, 2)
    shape = [*x.shape[:2], times, *x.shape[2:]]
    if b.one_in(3):
        y = b.concat([y] * times, 2, times)
    else:
        y = b.op("Expand", y, b.ints(1, 1, times, 1, 1), shape=shape)
    return b.reshape(y, [at(0), b.pick((x.shape[1] * times, at(1, 2))), at(3), at(4)], c=3)


def _attend(b: Builder, q: T, k: T, v: T) -> T:
    """Softmax(q · kᵀ · scale + bias) · v, or without Softmax in another order."""
    if b.one_in(6):
        return _linear(b, q, k, v)
    shape = [*q.shape[:3], k.shape[2]]
    scale = b.pick(("none", "query", "both", "scores", "root"))
    if scale in ("query", "both"):
        q = b.op("Mul", q, b.scalar(0.5))
    if scale == "both":
        k = b.op("Mul", k, b.scalar(0.7))
    scores = b.op("MatMul", q, b.transpose(k, (0, 1, 3, 2)), shape=shape, c=1)
    if scale == "scores":
        scores = b.op("Mul", *b.shuffled([scores, b.scalar(0.4)]), shape=shape)
    if scale == "root":
        size = b.op("Shape", q, shape=[q.rank], c=0, dtype=np.int64)
        size = b.op("Gather", size, b.scalar(3, np.int64), shape=(), axis=0)
        scores = b.op("Div", scores, b.op("Sqrt", b.cast(size, b.real)))
    scores = _biased(b, scores)
    axis = b.pick((3, -1)) if b.opset >= 11 else 3
    return b.op("MatMul", b.op("Softmax", scores, axis=axis), v, shape=[*q.shape[:3], v.shape[3]])


def _biased(b: Builder, scores: T) -> T:
    free = [1 if isinstance(s, Open) else int(s) for s in scores.shape[2:]]
    style = b.pick(("none", "table", "buckets", "run time", "mask", "given"))
    heads = scores.shape[1]
    if style == "table":
        return b.op("Add", scores, weight(b, b.normal(1, heads, *free)))
    if style in ("buckets", "run time"):
        places = b.rng.integers(0, 7, free)
        table: T | str = b.initializer(b.normal(7, heads))
        at_ = b.initializer(places)
        if style == "run time":
            at_ = b.op("Add", b.input((1,), c=0, dtype=np.int64), b.initializer(places * 0),
                       shape=free, dtype=np.int64).name  # fmt: skip
        bias = b.op("Gather", table, at_, shape=[*free, heads], c=2, dtype=b.real, axis=0)
        bias = b.unsqueeze(b.transpose(bias, (2, 0, 1)), 0)
        return b.op("Add", scores, bias, shape=scores.shape)
    if style == "mask":
        mask = np.tril(np.ones(free, np.bool_))[None, None]
        return b.op("Where", b.initializer(mask), scores, b.scalar(-1e4), shape=scores.shape, c=1,
                    dtype=b.real)  # fmt: skip
    if style == "given" and not isinstance(scores.shape[3], Open):
        mask_ = b.input((scores.shape[0], 1, 1, scores.shape[3]), c=3)
        return b.op("Add", scores, mask_, shape=scores.shape)
    return scores


def _linear(b: Builder, q: T, k: T, v: T) -> T:
    q, k = (b.op("Sigmoid", y) for y in (q, k))
    shape = [*k.shape[:2], k.shape[3], v.shape[3]]
    kv = b.op("MatMul", b.transpose(k, (0, 1, 3, 2)), v, shape=shape, c=3)
    return replace(b.op("MatMul", q, kv, shape=[*q.shape[:3], v.shape[3]]), c=3)


def _read(b: Builder, x: T, y: T, form: _Form) -> T:
    y = b.transpose(replace(y, c=3), (0, 2, 1, 3))
    wide = form.heads * form.values
    y = b.reshape(y, [at(0), at(1), b.pick((wide, at(2, 3)))], c=2)
    return matmul(b, y, x.channels)
