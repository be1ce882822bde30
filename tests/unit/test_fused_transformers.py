"""Whole transformers as ONNX Runtime's optimiser writes them, cut by heads and by dimensions."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from onnxprune.analyse import analyse
from onnxprune.cost import stats, stats_after
from onnxprune.model import Model
from onnxprune.rewrite import operate
from onnxprune.score import score
from onnxprune.select import select
from tests.oracle import assert_equals_masked_twin, plan_at

_LAYERS = range(2)


def model(interface: str, body: str, **given: Any) -> Model:
    """Two operator sets, weights by shape, gains near 1."""
    head = '<ir_version: 10, opset_import: ["" : 17, "com.microsoft" : 1]>'
    proto = onnx.parser.parse_model(f"{head}\n{interface} {{\n{body}\n}}")
    rng = np.random.default_rng(0)
    for name, shape in given.items():
        array = np.asarray(shape)
        if isinstance(shape, tuple):
            array = rng.standard_normal(shape) * (0.1 if len(shape) == 1 else 0.4)
            array = np.float32(array + (name.startswith("gain")))
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return Model(proto)


def bert() -> Model:
    """4 heads of 4 in one weight, a mask, biases inside of sums and activations."""
    lines = ["""kinds = Sub(ids, ids)
        x0, lengths = com.microsoft.EmbedLayerNormalization(
            ids, kinds, words, places, types, gain, shift, mask)"""]  # fmt: skip
    given: dict[str, Any] = {"words": (30, 16), "places": (9, 16), "types": (2, 16)}
    given |= {"gain": (16,), "shift": (16,), "last": (16, 5)}
    for n in _LAYERS:
        lines.append(f"""o{n} = com.microsoft.Attention<num_heads=4>(x{n}, qkv{n}, c{n}, lengths)
            a{n} = MatMul(o{n}, wo{n})
            n{n} = com.microsoft.SkipLayerNormalization(a{n}, x{n}, gain{n}, s{n}, b{n})
            u{n} = MatMul(n{n}, up{n})
            g{n} = com.microsoft.BiasGelu(u{n}, e{n})
            d{n} = MatMul(g{n}, down{n})
            x{n + 1} = com.microsoft.SkipLayerNormalization(d{n}, n{n}, gain2{n}, s2{n}, b2{n})""")
        given |= {f"qkv{n}": (16, 48), f"c{n}": (48,), f"wo{n}": (16, 16), f"e{n}": (24,)}
        given |= {f"up{n}": (16, 24), f"down{n}": (24, 16)}
        given |= {f"{name}{n}": (16,) for name in ("gain", "s", "b", "gain2", "s2", "b2")}
    interface = "g (int32[N,7] ids, int32[N,7] mask) => (float[N,7,5] y)"
    return model(interface, "\n".join([*lines, "y = MatMul(x2, last)"]), **given)


def gpt(*, past: bool) -> Model:
    """4 heads of 4 in one weight, each token sees those before it, and perhaps a past."""
    lines = ["x0 = Gather(words, ids)"]
    given: dict[str, Any] = {"words": (30, 16), "last": (16, 5)}
    inputs, outputs = "", ""
    for n in _LAYERS:
        made, more = (f"o{n}, present{n}", f", , past{n}") if past else (f"o{n}", "")
        inputs += f", float[2,N,4,P,4] past{n}" * past
        outputs += f", float[2,N,4,T,4] present{n}" * past
        lines.append(f"""n{n} = LayerNormalization(x{n}, gain{n}, s{n})
            {made} = com.microsoft.Attention<num_heads=4, unidirectional=1>(
                n{n}, qkv{n}, c{n}{more})
            a{n} = MatMul(o{n}, wo{n})
            m{n}, e0{n}, e1{n}, r{n} = com.microsoft.SkipLayerNormalization(
                a{n}, x{n}, gain2{n}, s2{n}, b{n})
            u{n} = MatMul(m{n}, up{n})
            g{n} = com.microsoft.FastGelu(u{n}, e{n})
            d{n} = MatMul(g{n}, down{n})
            x{n + 1} = Add(d{n}, r{n})""")
        given |= {f"qkv{n}": (16, 48), f"c{n}": (48,), f"wo{n}": (16, 16), f"e{n}": (24,)}
        given |= {f"up{n}": (16, 24), f"down{n}": (24, 16)}
        given |= {f"{name}{n}": (16,) for name in ("gain", "s", "b", "gain2", "s2")}
    interface = f"g (int64[N,L] ids{inputs}) => (float[N,L,5] y{outputs})"
    return model(interface, "\n".join([*lines, "y = MatMul(x2, last)"]), **given)


def llama() -> Model:
    """4 query heads of 32 that share 2 of keys and values, rotated inside of the operator."""
    lines = ["""x0 = Gather(words, ids)
        n0 = SimplifiedLayerNormalization(x0, gain)
        shape = Shape(ids) size = Gather(shape, one) total = Cast<to=6>(size)
        first = Gather<axis=1>(ids, zero) none = Sub(first, first) last_one = Sub(size, one)
        ends = Add(none, last_one) lengths = Cast<to=6>(ends)"""]  # fmt: skip
    angles = np.arange(16)[:, None] / 100 ** (np.arange(16) / 16)
    given: dict[str, Any] = {"words": (30, 16), "last": (16, 5), "gain": (16,)}
    given |= {"one": np.array(1), "zero": np.array(0)}
    given |= {"cos": np.float32(np.cos(angles)), "sin": np.float32(np.sin(angles))}
    for n in _LAYERS:
        x = "x0" if n == 0 else f"r2{n - 1}"
        lines.append(f"""q{n} = MatMul(n{n}, wq{n}) k{n} = MatMul(n{n}, wk{n})
            v{n} = MatMul(n{n}, wv{n})
            o{n}, pk{n}, pv{n} = com.microsoft.GroupQueryAttention<
                num_heads=4, kv_num_heads=2, do_rotary=1>(
                q{n}, k{n}, v{n}, , , lengths, total, cos, sin)
            a{n} = MatMul(o{n}, wo{n})
            m{n}, e0{n}, e1{n}, r{n} = com.microsoft.SkipSimplifiedLayerNormalization(
                {x}, a{n}, gain{n})
            t{n} = MatMul(m{n}, gate{n}) u{n} = MatMul(m{n}, up{n})
            h{n} = com.microsoft.QuickGelu<alpha=1.0>(t{n}) g{n} = Mul(h{n}, u{n})
            d{n} = MatMul(g{n}, down{n})
            n{n + 1}, f0{n}, f1{n}, r2{n} = com.microsoft.SkipSimplifiedLayerNormalization(
                r{n}, d{n}, gain2{n})""")
        given |= {f"wq{n}": (16, 128), f"wk{n}": (16, 64), f"wv{n}": (16, 64), f"wo{n}": (128, 16)}
        given |= {f"gate{n}": (16, 24), f"up{n}": (16, 24), f"down{n}": (24, 16)}
        given |= {f"gain{n}": (16,), f"gain2{n}": (16,)}
    interface = "g (int64[N,L] ids) => (float[N,L,5] y)"
    return model(interface, "\n".join([*lines, "y = MatMul(n2, last)"]), **given)


@pytest.mark.parametrize("mode", ["heads", "dims"])
@pytest.mark.parametrize("found", [bert(), gpt(past=False), llama()], ids=["bert", "gpt", "llama"])
def test_half_of_attention_and_of_the_layers_between_goes(found: Model, mode: str) -> None:
    graph = analyse(found, attention=mode)
    for seed in range(2):
        assert_equals_masked_twin(found, plan_at(graph, 0.5, seed))
    plan = select(graph, score(graph, "l2"), ratio=0.5)
    before, after = stats(graph), stats_after(graph, operate(plan).model, plan.keep)
    kept = {layer.node: layer.macs for layer in after.layers}
    for layer in before.layers:
        if layer.macs and layer.node != "y":
            assert kept[layer.node] == layer.macs / 2


def test_past_of_packed_attention_leaves_the_layers_between_to_cut() -> None:
    found = gpt(past=True)
    for mode in ("heads", "dims"):
        graph = analyse(found, attention=mode)
        assert [group.producers[0].tensor for group in graph.prunable] == ["up0", "up1"]
        assert "Attention 'o0' continues what stays (tensor 'past0')" in str(graph)
        assert_equals_masked_twin(found, plan_at(graph, 0.5))
