"""Small models for the tests: ONNX text, weights from a seeded generator."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx

from onnxprune.io import load
from onnxprune.model import Model

HEAD = '<ir_version: 10, opset_import: ["" : 21]>\n'
MODELS = Path(__file__).resolve().parent.parent / "models"


def parsed(text: str, **weights: np.ndarray) -> Model:
    proto = onnx.parser.parse_model(HEAD + text)
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return Model(proto)


def conv_chain(
    widths: Sequence[int] = (3, 8, 12), *, bn: bool = True, seed: int = 0, batch: str = "1"
) -> Model:
    """Conv, BatchNormalization and Relu for each width, then pooling and a Gemm to 4 classes."""
    rng = np.random.default_rng(seed)
    weights: dict[str, np.ndarray] = {}
    lines, x = [], "x"
    for number, (before, after) in enumerate(pairwise(widths)):
        weights[f"w{number}"] = rng.standard_normal((after, before, 3, 3)).astype(np.float32)
        lines.append(f"c{number} = Conv<pads=[1,1,1,1]>({x}, w{number})")
        made = f"c{number}"
        if bn:
            weights[f"gamma{number}"] = rng.uniform(-1, 1, after).astype(np.float32)
            weights[f"beta{number}"] = rng.standard_normal(after).astype(np.float32)
            weights[f"mean{number}"] = rng.standard_normal(after).astype(np.float32)
            weights[f"var{number}"] = rng.uniform(0.5, 2, after).astype(np.float32)
            names = ", ".join(f"{p}{number}" for p in ("gamma", "beta", "mean", "var"))
            lines.append(f"n{number} = BatchNormalization({made}, {names})")
            made = f"n{number}"
        lines.append(f"r{number} = Relu({made})")
        x = f"r{number}"
    weights["head"] = rng.standard_normal((4, widths[-1])).astype(np.float32)
    lines += [f"p = GlobalAveragePool({x})", "f = Flatten(p)", "y = Gemm<transB=1>(f, head)"]
    body = "\n".join(lines)
    return parsed(
        f"chain (float[{batch},{widths[0]},8,8] x) => (float[{batch},4] y) {{\n{body}\n}}",
        **weights,
    )


def reloaded(model: Model, path: Path) -> Model:
    """The model as a file gives it."""
    onnx.save(model.proto, path)
    return load(path)


def array(model: Model, name: str) -> np.ndarray:
    return np.asarray(model.weights()[name].read())
