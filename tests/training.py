"""What tests of training share: small models with gradients in numpy, and data for them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from onnxprune.errors import MissingExtraError
from onnxprune.model import Model
from onnxprune.train.own import FromGradients
from onnxprune.train.place import Place, place, set_up
from tests.small import parsed

FEATURES, CLASSES, COUNT = 6, 3, 240


def linear(seed: int = 0, scale: float = 0.3) -> Model:
    """Scores of three classes, y = x w + b."""
    rng = np.random.default_rng(seed)
    return parsed(
        f"g (float[n,{FEATURES}] x) => (float[n,{CLASSES}] y) {{y = Gemm(x, w, b)}}",
        w=(scale * rng.standard_normal((FEATURES, CLASSES))).astype(np.float32),
        b=np.zeros(CLASSES, np.float32),
    )


def points(seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Points, and the classes that a hidden linear function gives them."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((COUNT, FEATURES)).astype(np.float32)
    hidden = np.random.default_rng(7).standard_normal((FEATURES, CLASSES))
    return x, (x @ hidden).argmax(1).astype(np.int64)


def written(folder: Path) -> tuple[Path, Path]:
    """The points as files."""
    x, y = points()
    np.savez(folder / "points.npz", x=x)
    np.save(folder / "classes.npy", y)
    return folder / "points.npz", folder / "classes.npy"


def softmax(
    weights: Mapping[str, np.ndarray],
    inputs: Mapping[str, np.ndarray],
    targets: Mapping[str, np.ndarray],
) -> tuple[float, dict[str, np.ndarray]]:
    """Cross entropy of ``linear``, and its gradients."""
    x, labels = inputs["x"], targets["ce/y"]
    scores = x @ weights["w"] + weights["b"]
    exp = np.exp(scores - scores.max(1, keepdims=True))
    share = exp / exp.sum(1, keepdims=True)
    rows = np.arange(len(x))
    loss = -float(np.log(share[rows, labels]).mean())
    share[rows, labels] -= 1
    off = share / len(x)
    return loss, {"w": x.T @ off, "b": off.sum(0)}


def trainer() -> FromGradients:
    """Trains ``linear`` with cross entropy."""
    return FromGradients(softmax, "numpy")


@cache
def installed() -> Place:
    """Where onnxruntime-training is, after installing it; skips the test where it cannot be had."""
    try:
        where = place()
        if not where.ready:
            set_up(where, lambda _: None)
    except MissingExtraError as error:
        pytest.skip(str(error))
    return where
