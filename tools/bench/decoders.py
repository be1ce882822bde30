"""Decoders as both exporters write them, with and without a cache: cut by half in every mode.

    python tools/bench/decoders.py --out FOLDER --markdown tools/bench/results/decoders.md

Needs torch and onnxscript beside onnxprune. Weights are random. A file that is already in FOLDER is
not exported again.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import chain, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from trial import GOOD, Trial, short, state, table, trial

_VOCABULARY, _WIDTH, _HEADS, _LAYERS, _LENGTH, _PAST = 50, 32, 4, 2, 6, 3
_EACH = _WIDTH // _HEADS

Cache = list[tuple[Tensor, Tensor]]


class RMSNorm(nn.Module):
    """As LLaMA and T5 write it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * (x * scale)


def causal(scores: Tensor) -> Tensor:
    """Minus infinity where a key lies behind its query."""
    queries, keys = scores.shape[-2], scores.shape[-1]
    mask = torch.ones(queries, keys, dtype=torch.bool, device=scores.device)
    return scores.masked_fill(~mask.tril(keys - queries), -1e9)


def joined(past: tuple[Tensor, Tensor] | None, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    if past is None:
        return k, v
    return torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)


# -- GPT-2 -----------------------------------------------------------------------------------------


class Conv1D(nn.Module):
    """GPT-2's linear layer: the weight lies the other way round."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)
        self.bias = nn.Parameter(torch.randn(outputs) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], self.bias.shape[0])
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).view(shape)


class GptBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.middle = nn.LayerNorm(_WIDTH), nn.LayerNorm(_WIDTH)
        self.c_attn, self.c_proj = Conv1D(_WIDTH, 3 * _WIDTH), Conv1D(_WIDTH, _WIDTH)
        self.up, self.down = Conv1D(_WIDTH, 4 * _WIDTH), Conv1D(4 * _WIDTH, _WIDTH)

    def forward(
        self, x: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        parts = self.c_attn(self.before(x)).split(_WIDTH, 2)
        q, k, v = (p.view(*p.shape[:2], _HEADS, _EACH).transpose(1, 2) for p in parts)
        present = joined(past, k, v)
        scores = q @ present[0].transpose(-1, -2) / _EACH**0.5
        y = causal(scores).softmax(-1) @ present[1]
        y = y.transpose(1, 2).reshape(x.shape)
        x = x + self.c_proj(y)
        return x + self.down(functional.gelu(self.up(self.middle(x)), approximate="tanh")), present


class Gpt(nn.Module):
    """Fused queries, keys and values; the head is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(_VOCABULARY, _WIDTH), nn.Embedding(32, _WIDTH)
        self.blocks = nn.ModuleList(GptBlock() for _ in range(_LAYERS))
        self.end = nn.LayerNorm(_WIDTH)

    def forward(self, ids: Tensor, past: Cache | None = None) -> Any:
        start = past[0][0].shape[2] if past else 0
        at = torch.arange(start, start + ids.shape[1], device=ids.device)
        x = self.words(ids) + self.places(at)
        presents = []
        for number, block in enumerate(self.blocks):
            x, present = block(x, past[number] if past else None)
            presents.append(present)
        logits = functional.linear(self.end(x), self.words.weight)
        return (logits, presents) if past else logits


# -- LLaMA and Mixtral -----------------------------------------------------------------------------


def halves_turned(x: Tensor) -> Tensor:
    one, two = x.chunk(2, -1)
    return torch.cat([-two, one], -1)


def pairs_turned(x: Tensor) -> Tensor:
    return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)


def repeated(x: Tensor, times: int) -> Tensor:
    """Each key head serves several query heads."""
    batch, heads, length, each = x.shape
    return x[:, :, None].expand(batch, heads, times, length, each).reshape(
        batch, heads * times, length, each
    )  # fmt: skip


class LlamaAttention(nn.Module):
    def __init__(self, kv_heads: int, interleaved: bool) -> None:
        super().__init__()
        self.kv_heads, self.interleaved = kv_heads, interleaved
        self.q, self.o = (nn.Linear(_WIDTH, _WIDTH, bias=False) for _ in range(2))
        self.k, self.v = (nn.Linear(_WIDTH, kv_heads * _EACH, bias=False) for _ in range(2))
        rate = 100.0 ** -(torch.arange(0, _EACH, 2) / _EACH)
        self.register_buffer("rate", rate)

    def turned(self, x: Tensor, at: Tensor) -> Tensor:
        angle = at[:, None] * self.rate
        if self.interleaved:
            angle = torch.stack([angle, angle], -1).flatten(-2)
            return x * angle.cos() + pairs_turned(x) * angle.sin()
        angle = torch.cat([angle, angle], -1)
        return x * angle.cos() + halves_turned(x) * angle.sin()

    def forward(
        self, x: Tensor, at: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        q, k, v = (
            layer(x).view(*x.shape[:2], -1, _EACH).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        present = joined(past, self.turned(k, at), v)
        k, v = (repeated(y, _HEADS // self.kv_heads) for y in present)
        scores = self.turned(q, at) @ k.transpose(2, 3) * _EACH**-0.5
        y = causal(scores).softmax(-1) @ v
        return self.o(y.transpose(1, 2).reshape(x.shape)), present


class SwiGlu(nn.Module):
    def __init__(self, inner: int = 48) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(_WIDTH, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, _WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(functional.silu(self.gate(x)) * self.up(x))


class DenseExperts(nn.Module):
    """Every expert works on every token; a router's weights sum them up."""

    def __init__(self, experts: int = 4, chosen: int = 2) -> None:
        super().__init__()
        self.chosen = chosen
        self.router = nn.Linear(_WIDTH, experts, bias=False)
        self.experts = nn.ModuleList(SwiGlu(24) for _ in range(experts))

    def weights(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values, indices = torch.topk(self.router(x).softmax(-1), self.chosen, dim=-1)
        return values / values.sum(-1, keepdim=True), indices

    def dense(self, x: Tensor) -> Tensor:
        values, indices = self.weights(x)
        return torch.zeros_like(self.router(x)).scatter(-1, indices, values)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.dense(x)
        parts = [expert(x) * weights[..., n, None] for n, expert in enumerate(self.experts)]
        return torch.stack(parts).sum(0)


class GatheredExperts(DenseExperts):
    """Each expert works on the tokens that chose it and adds what it made in their places."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, _WIDTH)
        weights = self.dense(flat)
        result = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            rows = torch.nonzero(weights[:, number])[:, 0]
            made = expert(flat[rows]) * weights[rows, number, None]
            result = result.index_add(0, rows, made)
        return result.view(x.shape)


class StackedExperts(DenseExperts):
    """The experts' matrices lie in one tensor each: (experts, inputs, outputs)."""

    def __init__(self, experts: int = 4, chosen: int = 2, inner: int = 24) -> None:
        super().__init__(experts, chosen)
        del self.experts
        self.up = nn.Parameter(torch.randn(experts, _WIDTH, 2 * inner) / _WIDTH**0.5)
        self.down = nn.Parameter(torch.randn(experts, inner, _WIDTH) / inner**0.5)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, _WIDTH)
        weights = self.dense(flat)
        gate, up = torch.matmul(flat[None], self.up).chunk(2, -1)
        made = torch.matmul(functional.silu(gate) * up, self.down)
        return (made * weights.t()[..., None]).sum(0).view(x.shape)


class PickedExperts(StackedExperts):
    """Every token picks the matrices of its experts out of the stack."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, 1, 1, _WIDTH)
        values, indices = self.weights(x.reshape(-1, _WIDTH))
        gate, up = torch.matmul(flat, self.up[indices]).chunk(2, -1)
        made = torch.matmul(functional.silu(gate) * up, self.down[indices])
        return (made[:, :, 0] * values[..., None]).sum(1).view(x.shape)


class Llama(nn.Module):
    def __init__(
        self,
        *,
        kv_heads: int = 2,
        interleaved: bool = False,
        norm: Callable[[int], nn.Module] = RMSNorm,
        mlp: Callable[[], nn.Module] = SwiGlu,
    ) -> None:
        super().__init__()
        self.words = nn.Embedding(_VOCABULARY, _WIDTH)
        self.before, self.middle = (
            nn.ModuleList(norm(_WIDTH) for _ in range(_LAYERS)) for _ in range(2)
        )
        self.attentions = nn.ModuleList(
            LlamaAttention(kv_heads, interleaved) for _ in range(_LAYERS)
        )
        self.mlps = nn.ModuleList(mlp() for _ in range(_LAYERS))
        self.end, self.head = norm(_WIDTH), nn.Linear(_WIDTH, _VOCABULARY, bias=False)

    def forward(self, ids: Tensor, past: Cache | None = None) -> Any:
        start = past[0][0].shape[2] if past else 0
        at = torch.arange(start, start + ids.shape[1], device=ids.device).float()
        x, presents = self.words(ids), []
        for number, attention in enumerate(self.attentions):
            y, present = attention(self.before[number](x), at, past[number] if past else None)
            x = x + y
            x = x + self.mlps[number](self.middle[number](x))
            presents.append(present)
        logits = self.head(self.end(x))
        return (logits, presents) if past else logits


# -- T5 --------------------------------------------------------------------------------------------


class T5Attention(nn.Module):
    """No scale; a bias looked up in a table of distances."""

    def __init__(self, biased: bool) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(_WIDTH, _WIDTH, bias=False) for _ in range(4))
        self.table = nn.Embedding(8, _HEADS) if biased else None

    def heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], _HEADS, _EACH).transpose(1, 2)

    def bias(self, queries: int, keys: int, device: torch.device) -> Tensor:
        apart = torch.arange(keys, device=device) - torch.arange(queries, device=device)[:, None]
        bucket = torch.where(apart > 0, 4, 0) + torch.clamp(apart.abs(), max=3)
        return self.table(bucket).permute(2, 0, 1)[None]

    def forward(
        self, x: Tensor, source: Tensor, past: tuple[Tensor, Tensor] | None, mask: bool
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        present = joined(past, self.heads(self.k(source)), self.heads(self.v(source)))
        scores = self.heads(self.q(x)) @ present[0].transpose(2, 3)
        if self.table is not None:
            keys = present[0].shape[2]
            scores = scores + self.bias(keys, keys, x.device)[:, :, -x.shape[1] :]
        scores = causal(scores) if mask else scores
        y = scores.softmax(-1) @ present[1]
        return self.o(y.transpose(1, 2).reshape(x.shape)), present


class T5(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(_VOCABULARY, _WIDTH)
        self.own, self.self_, self.cross = T5Attention(True), T5Attention(True), T5Attention(False)
        self.norms = nn.ModuleList(RMSNorm(_WIDTH) for _ in range(7))
        self.up, self.down = (
            nn.ModuleList(nn.Linear(a, b, bias=False) for _ in range(2))
            for a, b in ((_WIDTH, 64), (64, _WIDTH))
        )

    def mlp(self, x: Tensor, number: int) -> Tensor:
        return self.down[number](functional.relu(self.up[number](x)))

    def forward(self, source: Tensor, ids: Tensor, past: Cache | None = None) -> Any:
        x = self.words(source)
        normed = self.norms[0](x)
        x = x + self.own(normed, normed, None, False)[0]
        x = self.norms[2](x + self.mlp(self.norms[1](x), 0))
        y = self.words(ids)
        normed = self.norms[3](y)
        made, present = self.self_(normed, normed, past[0] if past else None, True)
        y = y + made
        y = y + self.cross(self.norms[4](y), x, None, False)[0]
        y = self.norms[6](y + self.mlp(self.norms[5](y), 1))
        logits = functional.linear(y * _WIDTH**-0.5, self.words.weight)
        return (logits, [present]) if past else logits


@dataclass(frozen=True)
class Network:
    """A network; ``cached``: layers with a cache and its heads; ``texts``: inputs of tokens."""

    name: str
    make: Callable[[], nn.Module]
    cached: tuple[int, int]
    texts: int = 1


def _llama(name: str, kv_heads: int = 2, **options: Any) -> Network:
    return Network(name, lambda: Llama(kv_heads=kv_heads, **options), (_LAYERS, kv_heads))


NETWORKS = (
    Network("gpt", Gpt, (_LAYERS, _HEADS)),
    _llama("llama"),
    _llama("llama_pairs", interleaved=True),
    _llama("llama_mqa", 1),
    _llama("llama_mha", 4),
    _llama("mixtral_dense", mlp=DenseExperts),
    _llama("mixtral_gathered", mlp=GatheredExperts),
    _llama("mixtral_stacked", mlp=StackedExperts),
    _llama("mixtral_picked", mlp=PickedExperts),
    Network("t5", T5, (1, _HEADS), texts=2),
)
HOW = ("script", "script.dynamic", "dynamo", "dynamo.dynamic")


class Flat(nn.Module):
    """The cache as a flat list of inputs and outputs."""

    def __init__(self, network: nn.Module, texts: int) -> None:
        super().__init__()
        self.network, self.texts = network, texts

    def forward(self, *given: Tensor) -> Any:
        texts, flat = given[: self.texts], given[self.texts :]
        if not flat:
            return self.network(*texts)
        past = list(zip(flat[::2], flat[1::2], strict=True))
        logits, presents = self.network(*texts, past)
        return (logits, *chain.from_iterable(presents))


def write(network: Network, how: str, cache: bool, path: Path) -> None:
    """Export one network."""
    torch.manual_seed(0)
    made = Flat(network.make(), network.texts).eval()
    randomise(made)
    given = [torch.randint(0, _VOCABULARY, (2, _LENGTH)) for _ in range(network.texts)]
    names = ["ids"] if network.texts == 1 else ["source", "ids"]
    results = ["logits"]
    if cache:
        layers, heads = network.cached
        for number, kind in product(range(layers), ("key", "value")):
            given.append(torch.randn(2, heads, _PAST, _EACH))
            names.append(f"past_{kind}.{number}")
            results.append(f"present_{kind}.{number}")
    options: dict[str, Any] = {"input_names": names, "output_names": results}
    if how.endswith("dynamic"):
        axes = {name: {0: "batch", 1: name} for name in names[: network.texts]}
        axes |= {name: {0: "batch", 2: "past"} for name in names[network.texts :]}
        if how.startswith("script"):
            options["dynamic_axes"] = axes
        else:
            options["dynamic_shapes"] = (
                tuple(dict.fromkeys(axes[name], torch.export.Dim.DYNAMIC) for name in names),
            )
    dynamo = how.startswith("dynamo")
    options |= {"dynamo": True, "external_data": False} if dynamo else {"dynamo": False}
    if not dynamo:
        options["opset_version"] = 17
    torch.onnx.export(made, tuple(given), path, **options)


def randomise(network: nn.Module) -> None:
    """Norms that no identity can stand for."""
    for name, value in network.named_parameters():
        if value.ndim == 1:
            if name.endswith("weight"):
                nn.init.uniform_(value, 0.5, 1.5)
            else:
                nn.init.uniform_(value, -0.2, 0.2)


def rows(path: Path, ratio: float) -> Iterator[tuple[Sequence[str], Trial]]:
    """Both modes of cutting attention."""
    for mode in ("heads", "dims"):
        result = trial(path, ratio=ratio, importance="random", attention=mode)
        frozen = "; ".join(f"{one.width} {one.name}: {one.reason}" for one in result.frozen)
        yield (
            (
                path.stem,
                mode,
                state(result),
                f"{result.before:,}",
                f"{result.left:.3f}",
                "-" if result.gap is None else f"{result.gap:.0e}",
                short(frozen if result.status == "ok" else result.reason, 600),
            ),
            result,
        )


def main() -> int:
    """Exit 1 where some result is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the exported files")
    parser.add_argument("--only", default="*", help="glob on network.cache.exporter")
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    found: list[Sequence[str]] = []
    failed: list[str] = []
    wrong = 0
    for network, cache, how in product(NETWORKS, (False, True), HOW):
        path = args.out / f"{network.name}.{'cache' if cache else 'plain'}.{how}.onnx"
        if not fnmatchcase(path.stem, args.only):
            continue
        try:
            if not path.exists():
                write(network, how, cache, path)
        except Exception as error:
            said = traceback.format_exception_only(error)[-1]
            failed.append(f"- {path.stem}: {short(said, 300)}")
            print(failed[-1], file=sys.stderr, flush=True)
            path.unlink(missing_ok=True)
            continue
        for row, result in rows(path, args.ratio):
            wrong += result.status not in GOOD
            found.append(row)
            print(" ".join(row), file=sys.stderr, flush=True)
    page = report(found, failed, args.ratio)
    if args.markdown is not None:
        args.markdown.write_text(page, "utf-8")
    else:
        print(page)
    return int(wrong > 0)


def report(found: Sequence[Sequence[str]], failed: Sequence[str], ratio: float) -> str:
    """A page of Markdown."""
    header = ("network", "attention", "status", "params", "left", "twin", "what stayed whole")
    exact = sum(one[2] == "ok" for one in found)
    return "\n".join(
        (
            "# Decoders",
            "",
            f"`tools/bench/decoders.py`, ratio {ratio:g} in each group, random channels, random "
            "weights. `script` and `dynamo` are PyTorch's two exporters, `dynamic` leaves batch "
            "and lengths open, `cache` has keys and values of earlier tokens as inputs and as "
            "outputs.",
            "",
            f"- pruned and equal to the masked twin: {exact} of {len(found)}",
            "",
            table(header, found),
            "",
            *(("The exporter failed:", "", *failed, "") if failed else ()),
        )
    )


if __name__ == "__main__":
    sys.exit(main())
