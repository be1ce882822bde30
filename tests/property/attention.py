"""Attention in the forms exporters write it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tests.property.builder import Builder
from tests.property.layers import matmul
from tests.property.motifs import motif
from tests.property.tensors import Open, T, at
from tests.property.weights import weight


@motif("MatMul", on=("last",))
def attention(b: Builder, x: T, op: str) -> T | None:
    """Heads as (h, d) or (d, h), q k v separate or fused, softmax or linear."""
    if x.rank != 3:
        return None
    heads, each = b.pick((2, 4)), b.pick((4, 6, 2))
    q, k, v = _projections(b, x, heads, each)
    attend = _linear_attention if b.one_in(4) else _softmax_attention
    y = attend(b, q, k, v)
    y = b.transpose(y, (0, 2, 1, 3))
    y = b.reshape(y, [at(0), at(1), b.pick((heads * each, at(2, 3)))], c=2)
    y = matmul(b, y, x.channels)
    return b.op("Add", x, y) if b.one_in(2) else y


def _projections(b: Builder, x: T, heads: int, each: int) -> Sequence[T]:
    """q, k and v as (N, h, T, d)."""
    style = b.pick(("separate", "split", "fused", "transposed"))
    total = heads * each
    if style == "fused":
        y = matmul(b, x, 3 * total)
        y = b.reshape(y, [at(0), at(1), 3, heads, at(2, over=3 * heads)], c=4)
        y = b.transpose(y, (2, 0, 3, 1, 4))
        return [b.gather(y, 0, number) for number in range(3)]
    if style == "split":
        parts = b.split(matmul(b, x, 3 * total), 2, [total] * 3, equal=b.one_in(2))
    else:
        parts = [matmul(b, x, total) for _ in range(3)]
    return [_heads(b, part, heads, last=style != "transposed") for part in parts]


def _heads(b: Builder, x: T, heads: int, *, last: bool) -> T:
    if last:
        y = b.reshape(x, [at(0), at(1), heads, at(2, over=heads)], c=3)
        return b.transpose(y, (0, 2, 1, 3))
    y = b.reshape(x, [at(0), at(1), at(2, over=heads), heads], c=2)
    return b.transpose(y, (0, 3, 1, 2))


def _softmax_attention(b: Builder, q: T, k: T, v: T) -> T:
    shape = [*q.shape[:3], k.shape[2]]
    if b.one_in(2):
        q = b.op("Mul", q, b.scalar(1 / math.sqrt(4)))
    scores = b.op("MatMul", q, b.transpose(k, (0, 1, 3, 2)), shape=shape, c=1)
    if b.one_in(3):
        scores = _divided_by_root(b, scores, q)
    free = [1 if isinstance(s, Open) else s for s in shape[2:]]
    if b.one_in(3):
        table = b.normal(1, q.shape[1], *free)
        scores = b.op("Add", scores, weight(b, table))
    if b.opset >= 9 and b.one_in(4):
        mask = np.tril(np.ones(free, np.bool_))[None, None]
        scores = b.op("Where", b.initializer(mask), scores, b.scalar(-1e4), shape=shape, c=1,
                      dtype=q.dtype)  # fmt: skip
    scores = b.op("Softmax", scores, axis=3 if b.opset < 13 else -1)
    return b.op("MatMul", scores, v, shape=v.shape, c=v.c)


def _divided_by_root(b: Builder, scores: T, q: T) -> T:
    """Division by √d, where d is read from the shape."""
    shape = b.op("Shape", q, shape=[q.rank], c=0, dtype=np.int64)
    size = b.op("Gather", shape, b.scalar(3, np.int64), shape=(), axis=0)
    root = b.op("Sqrt", b.cast(size, b.real))
    return b.op("Div", scores, root)


def _linear_attention(b: Builder, q: T, k: T, v: T) -> T:
    """q · (kᵀ · v): two cuts meet in one product."""
    d, e = k.shape[3], v.shape[3]
    k = b.op("Sigmoid", k)
    kv = b.op("MatMul", b.transpose(k, (0, 1, 3, 2)), v, shape=[*k.shape[:2], d, e], c=3)
    y = b.op("MatMul", q, kv, shape=[*q.shape[:3], e])
    return replace(y, c=3)


@motif("Expand", on=("last",), since=8)
def grouped_query_attention(b: Builder, x: T, op: str) -> T | None:
    """Two key heads serve four query heads, repeated by Expand."""
    if x.rank != 3:
        return None
    few, times, each = 2, 2, 4
    q = _heads(b, matmul(b, x, few * times * each), few * times, last=True)
    k, v = (_repeated(b, matmul(b, x, few * each), few, times) for _ in range(2))
    y = _softmax_attention(b, q, k, v)
    y = b.transpose(y, (0, 2, 1, 3))
    return matmul(b, b.reshape(y, [at(0), at(1), at(2, 3)], c=2), x.channels)


def _repeated(b: Builder, x: T, few: int, times: int) -> T:
    y = b.unsqueeze(_heads(b, x, few, last=True), 2)
    target = [1, 1, times, 1, 1]
    shape = [s if t == 1 else t for s, t in zip(y.shape, target, strict=True)]
    y = b.op("Expand", y, b.ints(*target), shape=shape)
    return b.reshape(y, [at(0), b.pick((few * times, at(1, 2))), at(3), at(4)], c=3)
