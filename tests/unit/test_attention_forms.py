"""Attention and its surroundings in the forms they are written in, by heads and by dimensions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from typer.testing import CliRunner

from onnxprune.analyse import analyse
from onnxprune.cli import app
from onnxprune.model import Model
from onnxprune.rewrite import operate
from tests.oracle import assert_equals_masked_twin, plan_at, plan_at_random
from tests.unit.ops.models import model, reason, shapes

_QKV = "q0 = MatMul(x, wq) k0 = MatMul(x, wk) v0 = MatMul(x, wv)"
_SPLIT = """q1 = Reshape(q0, s) k1 = Reshape(k0, s) v1 = Reshape(v0, s)
    q = Transpose<perm=[0,2,1,3]>(q1) kt = Transpose<perm=[0,2,3,1]>(k1)
    v = Transpose<perm=[0,2,1,3]>(v1)"""
_ATTEND = "e = MatMul(q, kt) p = Softmax<axis=-1>(e) o = MatMul(p, v)"
_JOIN = "t = Transpose<perm=[0,2,1,3]>(o) m = Reshape(t, back) y = MatMul(m, wo)"
_WEIGHTS: Mapping[str, Any] = {
    "wq": (8, 8),
    "wk": (8, 8),
    "wv": (8, 8),
    "wo": (8, 3),
    "s": np.array([0, 0, 2, 4]),
    "back": np.array([0, 0, 8]),
}
_FUSED = {"w": (8, 24), "wo": (8, 3), "back": np.array([0, 0, 8])}
_HALVES = "wq 4 wk 4 wv 4 wo 4"


@dataclass(frozen=True)
class Form:
    """One way to write it.

    Attributes:
        body: ONNX text from x (2, 6, 8) to y.
        heads, dims: Weights and how long the axis that is cut is after half of everything went.
        masks: Products of two activations in which dimensions go, so that the twin masks them.
        inputs: More inputs, or others.
        axes: Which axis of a weight is meant, the last where nothing is said; 0 for ``wo``.
    """

    body: str
    heads: str = _HALVES
    dims: str = _HALVES
    masks: int = 1
    inputs: str = "float[2,6,8] x"
    outputs: str = "float[2,6,3] y"
    weights: Mapping[str, Any] = field(default_factory=dict)
    base: Mapping[str, Any] = field(default_factory=lambda: _WEIGHTS)
    axes: Mapping[str, int] = field(default_factory=dict)

    def model(self) -> Model:
        text = f"g ({self.inputs}) => ({self.outputs}) {{\n{self.body}\n}}"
        used = {**self.base, **self.weights}
        words = set(text.replace(",", " ").replace(")", " ").replace("(", " ").split())
        return model(text, **{name: value for name, value in used.items() if name in words})


def _angles(paired: bool) -> dict[str, np.ndarray]:
    angle = np.arange(6)[:, None] * np.array([1.0, 0.1])
    angle = np.repeat(angle, 2, 1) if paired else np.concatenate([angle, angle], 1)
    return {"cos": np.cos(angle).astype(np.float32), "sin": np.sin(angle).astype(np.float32)}


_HALF_TURN = """{0}a, {0}b = Split<axis=3, num_outputs=2>({0}_) {0}n = Neg({0}b)
    {0}r = Concat<axis=3>({0}n, {0}a) {0}c = Mul({0}_, cos) {0}s = Mul({0}r, sin)
    {0} = Add({0}c, {0}s)"""
_PAIR_TURN = """{0}5 = Reshape({0}_, pairs) {0}a = Gather<axis=4>({0}5, one)
    {0}b = Gather<axis=4>({0}5, two) {0}n = Neg({0}b) {0}6 = Concat<axis=4>({0}n, {0}a)
    {0}r = Reshape({0}6, unpaired) {0}c = Mul({0}_, cos) {0}s = Mul({0}r, sin)
    {0} = Add({0}c, {0}s)"""
_ROPE = """q1 = Reshape(q0, s) k1 = Reshape(k0, s) v1 = Reshape(v0, s)
    q_ = Transpose<perm=[0,2,1,3]>(q1) k_ = Transpose<perm=[0,2,1,3]>(k1)
    v = Transpose<perm=[0,2,1,3]>(v1)"""
_PAIRS = {
    "pairs": np.array([2, 2, 6, 2, 2]),
    "unpaired": np.array([2, 2, 6, 4]),
    "one": np.array([0]),
    "two": np.array([1]),
}
_KEYS = "kt = Transpose<perm=[0,1,3,2]>(k)"
_WINDOWS = {  # 4 × 4 positions in four windows of 2 × 2
    "grid": np.array([1, 2, 2, 2, 2, 8]), "flat": np.array([4, 4, 8]),
    "ungrid": np.array([1, 2, 2, 2, 2, 8]), "image": np.array([1, 4, 4, 8]),
    "a0": np.array([1]), "a1": np.array([9]), "b0": np.array([0]), "b1": np.array([1]),
    "z0": np.array([-1]), "both": np.array([1]), "second": np.array([2]),
    "mask": np.where(np.random.default_rng(1).random((1, 4, 1, 4, 4)) < 0.3, -9, 0).astype("f"),
    "split": np.array([1, 4, 2, 4, 4]), "merge": np.array([4, 2, 4, 4]),
}  # fmt: skip

FORMS: dict[str, Form] = {
    "separate": Form(f"{_QKV} {_SPLIT} {_ATTEND} {_JOIN}"),
    "fused, gathered": Form(
        f"""f = MatMul(x, w) r = Reshape(f, five) z = Transpose<perm=[2,0,3,1,4]>(r)
        q = Gather<axis=0>(z, i0) k = Gather<axis=0>(z, i1) v = Gather<axis=0>(z, i2)
        {_KEYS} {_ATTEND} {_JOIN}""",
        heads="w 12 wo 4", dims="w 12 wo 4", base=_FUSED,
        weights={"five": np.array([0, 0, 3, 2, 4]), "i0": np.array(0), "i1": np.array(1),
                 "i2": np.array(2)},
    ),
    "fused, split and squeezed": Form(
        f"""f = MatMul(x, w) r = Reshape(f, five) z = Transpose<perm=[2,0,3,1,4]>(r)
        q5, k5, v5 = Split<axis=0, num_outputs=3>(z) q = Squeeze(q5, zero) k = Squeeze(k5, zero)
        v = Squeeze(v5, zero) {_KEYS} {_ATTEND} {_JOIN}""",
        heads="w 12 wo 4", dims="w 12 wo 4", base=_FUSED,
        weights={"five": np.array([0, 0, 3, 2, 4]), "zero": np.array([0])},
    ),
    "fused, sliced": Form(
        f"""f = MatMul(x, w) q0 = Slice(f, n0, n8, two) k0 = Slice(f, n8, n16, two)
        v0 = Slice(f, n16, n24, two) {_SPLIT} {_ATTEND} {_JOIN}""",
        heads="w 12 wo 4", dims="w 12 wo 4",
        weights={"w": (8, 24), "two": np.array([2]),
                 **{f"n{n}": np.array([n]) for n in (0, 8, 16, 24)}},
    ),
    "fused head by head": Form(
        f"""f = MatMul(x, w) r = Reshape(f, five) z = Transpose<perm=[3,0,2,1,4]>(r)
        q = Gather<axis=0>(z, i0) k = Gather<axis=0>(z, i1) v = Gather<axis=0>(z, i2)
        {_KEYS} {_ATTEND} {_JOIN}""",
        heads="w 12 wo 4", dims="w 12 wo 4", base=_FUSED,
        weights={"five": np.array([0, 0, 2, 3, 4]), "i0": np.array(0), "i1": np.array(1),
                 "i2": np.array(2)},
    ),
    "grouped queries": Form(
        f"""q0 = MatMul(x, wq) k0 = MatMul(x, wk) v0 = MatMul(x, wv)
        q1 = Reshape(q0, sq) k1 = Reshape(k0, sk) v1 = Reshape(v0, sk)
        q = Transpose<perm=[0,2,1,3]>(q1) k2 = Transpose<perm=[0,2,1,3]>(k1)
        v2 = Transpose<perm=[0,2,1,3]>(v1) k3 = Unsqueeze(k2, two) v3 = Unsqueeze(v2, two)
        k4 = Expand(k3, more) v4 = Expand(v3, more) k = Reshape(k4, four) v = Reshape(v4, four)
        {_KEYS} {_ATTEND} {_JOIN}""",
        heads="wq 8 wk 4 wv 4 wo 8", dims="wq 8 wk 4 wv 4 wo 8",
        weights={"wq": (8, 16), "wo": (16, 3), "sq": np.array([0, 0, 4, 4]),
                 "sk": np.array([0, 0, 2, 4]), "two": np.array([2]),
                 "more": np.array([1, 1, 2, 1, 1]), "four": np.array([2, 4, 6, 4]),
                 "back": np.array([0, 0, 16])},
    ),
    "one key head for all": Form(
        f"""q0 = MatMul(x, wq) k0 = MatMul(x, wk) v0 = MatMul(x, wv) q1 = Reshape(q0, s)
        q = Transpose<perm=[0,2,1,3]>(q1) k = Unsqueeze(k0, one) v = Unsqueeze(v0, one)
        {_KEYS} {_ATTEND} {_JOIN}""",
        heads="wq 4 wk 4 wv 4 wo 4", dims="wq 4 wk 2 wv 2 wo 4",
        weights={"wk": (8, 4), "wv": (8, 4), "one": np.array([1])},
    ),
    "relative positions in a table": Form(
        f"""{_QKV} {_SPLIT} e0 = MatMul(q, kt) b0 = Gather<axis=0>(table, at)
        b = Transpose<perm=[2,0,1]>(b0) e = Add(e0, b) p = Softmax<axis=-1>(e)
        o = MatMul(p, v) {_JOIN}""",
        heads=f"{_HALVES} table 1", dims=f"{_HALVES} table 2",
        weights={"table": (11, 2), "at": np.arange(6)[:, None] - np.arange(6) + 5},
    ),
    "positions at run time, no scale": Form(
        f"""{_QKV} {_SPLIT} e0 = MatMul(q, kt) b0 = Gather<axis=0>(table, at)
        b = Transpose<perm=[2,0,1]>(b0) e = Add(e0, b) p = Softmax<axis=-1>(e)
        o = MatMul(p, v) {_JOIN}""",
        heads=f"{_HALVES} table 1", dims=f"{_HALVES} table 2",
        inputs="float[2,6,8] x, int64[6,6] at", weights={"table": (11, 2)},
    ),
    "causal, scaled by the shape": Form(
        f"""{_QKV} {_SPLIT} sh = Shape(q) d = Gather(sh, i3) df = Cast<to=1>(d) root = Sqrt(df)
        e0 = MatMul(q, kt) e1 = Div(e0, root) e = Where(mask, e1, low) p = Softmax<axis=-1>(e)
        o = MatMul(p, v) {_JOIN}""",
        weights={"i3": np.array(3), "mask": np.tril(np.ones((1, 1, 6, 6), bool)),
                 "low": np.array(-1e4, np.float32)},
    ),
    "to another text": Form(
        f"""q0 = MatMul(x, wq) k0 = MatMul(other, wk) v0 = MatMul(other, wv)
        {_SPLIT} {_ATTEND} {_JOIN}""",
        inputs="float[2,6,8] x, float[2,5,7] other", weights={"wk": (7, 8), "wv": (7, 8)},
    ),
    "angles, half and half": Form(
        f"""{_QKV} {_ROPE} {_HALF_TURN.format("q")} {_HALF_TURN.format("k")} {_KEYS}
        {_ATTEND} {_JOIN}""",
        weights=_angles(paired=False),
    ),
    "angles, in pairs": Form(
        f"""{_QKV} {_ROPE} {_PAIR_TURN.format("q")} {_PAIR_TURN.format("k")} {_KEYS}
        {_ATTEND} {_JOIN}""",
        weights={**_angles(paired=True), **_PAIRS},
    ),
    "angles of given places": Form(
        f"""{_QKV} {_ROPE} g0 = Mul(places, rate) g = Concat<axis=1>(g0, g0) cos = Cos(g)
        sin = Sin(g) {_HALF_TURN.format("q")} {_HALF_TURN.format("k")} {_KEYS}
        {_ATTEND} {_JOIN}""",
        inputs="float[2,6,8] x, float[6,1] places",
        weights={"rate": np.array([1.0, 0.1], np.float32)},
    ),
    "shifted windows": Form(
        f"""n0 = MatMul(x, we) n1 = Slice(n0, a0, a1, both) n2 = Slice(n0, b0, b1, both)
        n3 = Concat<axis=1>(n1, n2) g0 = Reshape(n3, grid) g1 = Transpose<perm=[0,1,3,2,4,5]>(g0)
        g = Reshape(g1, flat) q0 = MatMul(g, wq) k0 = MatMul(g, wk) v0 = MatMul(g, wv)
        {_SPLIT} e0 = MatMul(q, kt) e1 = Reshape(e0, split) e2 = Add(e1, mask)
        e = Reshape(e2, merge) p = Softmax<axis=-1>(e) o = MatMul(p, v)
        t = Transpose<perm=[0,2,1,3]>(o) m = Reshape(t, back) j = MatMul(m, wo)
        u0 = Reshape(j, ungrid) u1 = Transpose<perm=[0,1,3,2,4,5]>(u0) u2 = Reshape(u1, image)
        u3 = Slice(u2, z0, a1, both) u4 = Slice(u2, b0, z0, both) u = Concat<axis=1>(u3, u4)
        r = Add(u, n0) y = MatMul(r, wy)""",
        heads=f"we 4 {_HALVES} wy 4", dims=f"we 4 {_HALVES} wy 4", axes={"wy": 0},
        inputs="float[1,4,4,5] x", outputs="float[1,4,4,3] y",
        weights={"we": (5, 8), "wo": (8, 8), "wy": (8, 3), **_WINDOWS},
    ),
    "merged patches": Form(
        """f = MatMul(x, w) a = Slice(f, z, e, ax, st) b = Slice(f, o, e, ax, st)
        m = Concat<axis=2>(a, b) y = MatMul(m, wo)""",
        heads="w 4 wo 8", dims="w 4 wo 8", masks=0, outputs="float[2,3,3] y",
        base={"w": (8, 8), "wo": (16, 3), "z": np.array([0]), "o": np.array([1]),
              "e": np.array([99]), "ax": np.array([1]), "st": np.array([2])},
    ),
    "class token": Form(
        f"""x0 = MatMul(x, we) t1 = Concat<axis=1>(cls, x0) t2 = Add(t1, pos)
        q0 = MatMul(t2, wq) k0 = MatMul(t2, wk) v0 = MatMul(t2, wv) {_SPLIT} {_ATTEND}
        t = Transpose<perm=[0,2,1,3]>(o) m = Reshape(t, back) j = MatMul(m, wo)
        r = Add(j, t2) first = Gather<axis=1>(r, i0) y = MatMul(first, wy)""",
        heads=f"we 4 cls 4 pos 4 {_HALVES} wy 4", dims=f"we 4 cls 4 pos 4 {_HALVES} wy 4",
        axes={"wy": 0}, outputs="float[2,3] y",
        weights={"we": (8, 8), "cls": (2, 1, 8), "pos": (1, 7, 8), "wo": (8, 8), "wy": (8, 3),
                 "i0": np.array(0)},
    ),
    "linear": Form(
        f"""{_QKV} {_SPLIT} qs = Sigmoid(q) ks = Sigmoid(kt) kv = MatMul(ks, v)
        o = MatMul(qs, kv) {_JOIN}""",
    ),
    "across channels": Form(
        f"""{_QKV} q1 = Reshape(q0, s) k1 = Reshape(k0, s) v1 = Reshape(v0, s)
        q2 = Transpose<perm=[0,2,3,1]>(q1) k2 = Transpose<perm=[0,2,1,3]>(k1)
        v = Transpose<perm=[0,2,3,1]>(v1) q = LpNormalization<axis=3>(q2)
        kt = LpNormalization<axis=2>(k2) e0 = MatMul(q, kt) e = Mul(e0, heat)
        p = Softmax<axis=-1>(e) o = MatMul(p, v) t = Transpose<perm=[0,3,1,2]>(o)
        m = Reshape(t, back) y = MatMul(m, wo)""",
        heads=f"{_HALVES} heat 1", dims=f"{_HALVES} heat 1", masks=0, axes={"heat": 0},
        weights={"heat": (2, 1, 1)},
    ),
    "on maps, with distances of queries": Form(
        """q0 = Conv(x, cq) k0 = Conv(x, ck) v0 = Conv(x, cv) q1 = Reshape(q0, s)
        k1 = Reshape(k0, s) v1 = Reshape(v0, s) q = Transpose<perm=[0,1,3,2]>(q1)
        v = Transpose<perm=[0,1,3,2]>(v1) e0 = MatMul(q, k1) b = MatMul(q, far) e = Add(e0, b)
        p = Softmax<axis=-1>(e) o = MatMul(p, v) t = Transpose<perm=[0,1,3,2]>(o)
        m = Reshape(t, back) y = Conv(m, co)""",
        heads="cq 4 ck 4 cv 4 co 4", dims="cq 4 ck 4 cv 4 co 4",
        axes={"cq": 0, "ck": 0, "cv": 0, "co": 1},
        inputs="float[2,5,3,4] x", outputs="float[2,3,3,4] y",
        base={"cq": (8, 5, 1, 1), "ck": (8, 5, 1, 1), "cv": (8, 5, 1, 1), "co": (3, 8, 1, 1),
              "far": (4, 12), "s": np.array([2, 2, 4, 12]), "back": np.array([2, 8, 3, 4])},
    ),
    "one head on maps": Form(
        """q0 = Conv(x, cq) k0 = Conv(x, ck) v0 = Conv(x, cv) q1 = Reshape(q0, s)
        k = Reshape(k0, s) v1 = Reshape(v0, s) q = Transpose<perm=[0,2,1]>(q1)
        e = MatMul(q, k) p = Softmax<axis=-1>(e) pt = Transpose<perm=[0,2,1]>(p)
        o = MatMul(v1, pt) m = Reshape(o, back) y = Conv(m, co)""",
        heads="cq 4 ck 4 cv 4 co 4", dims="cq 4 ck 4 cv 4 co 4",
        axes={"cq": 0, "ck": 0, "cv": 0, "co": 1},
        inputs="float[2,5,3,4] x", outputs="float[2,3,3,4] y",
        base={"cq": (8, 5, 1, 1), "ck": (8, 5, 1, 1), "cv": (8, 5, 1, 1), "co": (3, 8, 1, 1),
              "s": np.array([0, 0, -1]), "back": np.array([0, 0, 3, 4])},
    ),
    "convolved keys and values": Form(
        f"""a = Conv(x, ca) k0 = Conv<group=8, pads=[1,1,1,1], strides=[2,2]>(a, dk)
        v0 = Conv<group=8, pads=[1,1,1,1], strides=[2,2]>(a, dv) af = Reshape(a, flat)
        kf = Reshape(k0, flat) vf = Reshape(v0, flat) at = Transpose<perm=[0,2,1]>(af)
        kn = Transpose<perm=[0,2,1]>(kf) vn = Transpose<perm=[0,2,1]>(vf)
        q0 = MatMul(at, wq) k00 = MatMul(kn, wk) v00 = MatMul(vn, wv)
        {_SPLIT.replace("k0", "k00").replace("v0", "v00")} {_ATTEND} {_JOIN}""",
        heads=f"ca 4 dk 4 dv 4 {_HALVES}", dims=f"ca 4 dk 4 dv 4 {_HALVES}",
        axes={"ca": 0, "dk": 0, "dv": 0},
        inputs="float[2,5,4,4] x", outputs="float[2,16,3] y",
        weights={"ca": (8, 5, 1, 1), "dk": (8, 1, 3, 3), "dv": (8, 1, 3, 3),
                 "flat": np.array([0, 0, -1])},
    ),
    "scaled layer": Form(
        f"""x0 = MatMul(x, we) q0 = MatMul(x0, wq) k0 = MatMul(x0, wk) v0 = MatMul(x0, wv)
        {_SPLIT} {_ATTEND} t = Transpose<perm=[0,2,1,3]>(o) m = Reshape(t, back)
        j = MatMul(m, wo) l = Mul(j, gamma) r = Add(x0, l) y = MatMul(r, wy)""",
        heads=f"we 4 gamma 4 {_HALVES} wy 4", dims=f"we 4 gamma 4 {_HALVES} wy 4",
        axes={"wy": 0}, weights={"we": (8, 8), "gamma": (8,), "wo": (8, 8), "wy": (8, 3)},
    ),
    "mixed tokens": Form(
        """x0 = MatMul(x, we) t0 = Transpose<perm=[0,2,1]>(x0) t1 = MatMul(t0, w1)
        t2 = Relu(t1) t3 = MatMul(t2, w2) t = Transpose<perm=[0,2,1]>(t3) r = Add(x0, t)
        y = MatMul(r, wy)""",
        heads="we 4 w1 5 w2 5 wy 4", dims="we 4 w1 5 w2 5 wy 4", masks=0,
        axes={"w2": 0, "wy": 0},
        base={"we": (8, 8), "w1": (6, 10), "w2": (10, 6), "wy": (8, 3)},
    ),
    "pooled tokens": Form(
        """a = Conv(x, ca) n = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1]>(a) d = Sub(n, a)
        l = Mul(d, gamma) r = Add(a, l) u = Conv(r, c1) v = Relu(u) z = Conv(v, c2)
        o = Add(r, z) y = Conv(o, c3)""",
        heads="ca 4 gamma 4 c1 6 c2 4 c3 4", dims="ca 4 gamma 4 c1 6 c2 4 c3 4", masks=0,
        axes={"ca": 0, "gamma": 0, "c1": 0, "c2": 0, "c3": 1},
        inputs="float[2,5,4,4] x", outputs="float[2,3,4,4] y",
        base={"ca": (8, 5, 1, 1), "gamma": (8, 1, 1), "c1": (12, 8, 1, 1), "c2": (8, 12, 1, 1),
              "c3": (3, 8, 1, 1)},
    ),
    "stacked experts": Form(
        """r0 = MatMul(x, wr) r1 = Softmax<axis=-1>(r0) r2 = Transpose<perm=[0,2,1]>(r1)
        r = Unsqueeze(r2, three) x1 = Unsqueeze(x, one) u = MatMul(x1, up)
        g, l = Split<axis=3, num_outputs=2>(u) gs = Sigmoid(g) h = Mul(gs, l)
        d = MatMul(h, down) w = Mul(d, r) y = ReduceSum<keepdims=0>(w, one)""",
        heads="up 6 down 3", dims="up 6 down 3", masks=0, axes={"down": 1},
        base={"wr": (8, 2), "up": (2, 8, 12), "down": (2, 6, 3), "one": np.array([1]),
              "three": np.array([3])},
    ),
    "experts on the tokens that chose them": Form(
        """f = Reshape(x, flat) r0 = MatMul(f, wr) r = Softmax<axis=-1>(r0)
        b = Greater(r, half) b0 = Gather<axis=1>(b, i0) b1 = Gather<axis=1>(b, i1)
        n0 = NonZero(b0) n1 = NonZero(b1) p0 = Transpose<perm=[1,0]>(n0)
        p1 = Transpose<perm=[1,0]>(n1) x0 = GatherND(f, p0) x1 = GatherND(f, p1)
        h0 = MatMul(x0, up0) h1 = MatMul(x1, up1) a0 = Relu(h0) a1 = Relu(h1)
        d0 = MatMul(a0, down0) d1 = MatMul(a1, down1) s0 = ScatterND<reduction="add">(zero, p0, d0)
        s1 = ScatterND<reduction="add">(s0, p1, d1) y = MatMul(s1, wy)""",
        heads="up0 3 up1 3 down0 4 down1 4 zero 4 wy 4",
        dims="up0 3 up1 3 down0 4 down1 4 zero 4 wy 4", masks=0, axes={"wy": 0},
        outputs="float[12,3] y",
        base={"flat": np.array([12, 8]), "wr": (8, 2), "half": np.array(0.5, np.float32),
              "i0": np.array(0), "i1": np.array(1), "up0": (8, 6), "up1": (8, 6),
              "down0": (6, 8), "down1": (6, 8), "zero": np.zeros((12, 8), np.float32),
              "wy": (8, 3)},
    ),
    "experts picked by each token": Form(
        """r0 = MatMul(x, wr) r = Softmax<axis=-1>(r0) best, which = TopK<axis=2>(r, one)
        u0 = Gather<axis=0>(up, which) d0 = Gather<axis=0>(down, which)
        u1 = Squeeze(u0, ax) d1 = Squeeze(d0, ax) x1 = Unsqueeze(x, ax) h = MatMul(x1, u1)
        a = Relu(h) d2 = MatMul(a, d1) z = Squeeze(d2, ax) y = Mul(z, best)""",
        heads="up 3 down 3", dims="up 3 down 3", axes={"down": 1},
        base={"wr": (8, 2), "one": np.array([1]), "ax": np.array([2]), "up": (2, 8, 6),
              "down": (2, 6, 3)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("mode", ["heads", "dims"])
@pytest.mark.parametrize("name", FORMS)
def test_half_of_everything_goes(name: str, mode: str) -> None:
    form = FORMS[name]
    found = form.model()
    graph = analyse(found, attention=mode)
    plan = plan_at(graph, 0.5)
    assert_equals_masked_twin(found, plan)
    for seed in range(2):
        assert_equals_masked_twin(found, plan_at_random(graph, seed), vacuous=True)
    surgery = operate(plan)
    left = shapes(surgery)
    words = (form.heads if mode == "heads" else form.dims).split()
    for weight, wanted in zip(words[::2], words[1::2], strict=True):
        axis = form.axes.get(weight, 0 if weight == "wo" else -1)
        assert left[weight][axis] == int(wanted), (weight, reason(graph, weight))
    if mode == "dims":
        assert len(surgery.masks) == form.masks
    for mask in surgery.masks:
        assert len(mask.zero) * 2 == math.prod(mask.shape)


# -- with the keys and values of earlier tokens ----------------------------------------------------

_CACHED = f"""{_QKV} q1 = Reshape(q0, s) k1 = Reshape(k0, s) v1 = Reshape(v0, s)
    q = Transpose<perm=[0,2,1,3]>(q1) k2 = Transpose<perm=[0,2,1,3]>(k1)
    v2 = Transpose<perm=[0,2,1,3]>(v1) present_k = Concat<axis=2>(past_k, k2)
    present_v = Concat<axis=2>(past_v, v2) kt = Transpose<perm=[0,1,3,2]>(present_k)
    e = MatMul(q, kt) p = Softmax<axis=-1>(e) o = MatMul(p, present_v)
    t = Transpose<perm=[0,2,1,3]>(o) m = Reshape(t, back) j = MatMul(m, wo)
    u = MatMul(j, w1) g = Relu(u) y = MatMul(g, w2)"""
_PRESENT = ", float[2,2,n,4] present_k, float[2,2,n,4] present_v"
_CACHE = Form(
    _CACHED,
    inputs="float[2,6,8] x, float[2,2,past,4] past_k, float[2,2,past,4] past_v",
    outputs=f"float[2,6,3] y{_PRESENT}",
    weights={"wo": (8, 8), "w1": (8, 12), "w2": (12, 3)},
)


@pytest.mark.parametrize("mode", ["heads", "dims"])
def test_cache_keeps_its_heads_and_is_named_while_all_else_goes(mode: str) -> None:
    found = _CACHE.model()
    graph = analyse(found, attention=mode)
    for weight, given in (("wq", "past_k"), ("wk", "past_k")):
        why = reason(graph, weight)
        assert f"is joined to input '{given}', whose shape is the model's interface" in why
    if mode == "heads":
        assert "input 'past_v', whose shape is the model's interface, too" in reason(graph, "wq")
    if mode == "dims":  # by heads queries, keys and values are one
        assert "input 'past_v'" in reason(graph, "wv")
    plan = plan_at(graph, 0.5)
    assert_equals_masked_twin(found, plan)
    left = shapes(operate(plan))
    assert left["wq"] == left["wk"] == left["wv"] == (8, 8)
    assert left["wo"] == (8, 4)
    assert left["w1"] == (4, 6)
    assert left["w2"] == (6, 3)


@pytest.mark.parametrize("mode", ["heads", "dims"])
def test_keys_that_only_leave_the_model_name_the_output(mode: str) -> None:
    body = _CACHED.replace("Concat<axis=2>(past_k, k2)", "Identity(k2)")
    body = body.replace("Concat<axis=2>(past_v, v2)", "Identity(v2)")
    found = replace(_CACHE, body=body, inputs="float[2,6,8] x").model()
    graph = analyse(found, attention=mode)
    assert "reaches output 'present_k'" in reason(graph, "wk")
    plan = plan_at(graph, 0.5)
    assert_equals_masked_twin(found, plan)
    assert shapes(operate(plan))["w1"] == (4, 6)


@pytest.mark.parametrize("mode", ["heads", "dims"])
def test_keys_of_another_text_in_a_cache_keep_the_queries(mode: str) -> None:
    """What an encoder made once comes in again and again, rearranged on its way."""
    body = f"""q0 = MatMul(x, wq) q1 = Reshape(q0, s) q = Transpose<perm=[0,2,1,3]>(q1)
        kt = Transpose<perm=[0,2,3,1]>(keys) v = Transpose<perm=[0,2,1,3]>(values)
        {_ATTEND} {_JOIN}"""
    inputs = "float[2,6,8] x, float[2,5,2,4] keys, float[2,5,2,4] values"
    found = Form(body, inputs=inputs).model()
    graph = analyse(found, attention=mode)
    assert "input 'keys', whose shape is the model's interface" in reason(graph, "wq")


def test_shrink_says_which_inputs_keep_channels(tmp_path: Path) -> None:
    path = tmp_path / "decoder.onnx"
    onnx.save(_CACHE.model().proto, path)
    result = CliRunner().invoke(app, ["shrink", str(path), "--ratio", "0.5"])
    assert result.exit_code == 0, result.output
    said = "must fit the shape of an input, as of a cache: 'past_k', 'past_v'"
    assert said in " ".join(result.output.split())
