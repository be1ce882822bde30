"""Fashion-MNIST as the networks of `models/` take it, from the Debian package of that name."""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

FOLDER = Path("/usr/share/datasets/fashion-mnist")
MEAN, STD = 0.2860, 0.3530
_HEADERS = {"images": 16, "labels": 8}  # bytes
Images, Labels = NDArray[np.float32], NDArray[np.int64]


def training(count: int, seed: int = 0) -> tuple[Images, Labels]:
    """Some of the 60,000 training images, drawn at random."""
    images, labels = _read("train")
    at = np.random.default_rng(seed).choice(len(images), count, replace=False)
    return _normalised(images[at]), labels[at].astype(np.int64)


def held_out() -> tuple[Images, Labels]:
    """All 10,000 test images."""
    images, labels = _read("t10k")
    return _normalised(images), labels.astype(np.int64)


def _read(part: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    found = []
    for kind, rank in (("images", 3), ("labels", 1)):
        path = FOLDER / f"{part}-{kind}-idx{rank}-ubyte.gz"
        if not path.is_file():
            sys.exit(f"{path} not found: install the Debian package dataset-fashion-mnist")
        raw = gzip.decompress(path.read_bytes())
        found.append(np.frombuffer(raw, np.uint8, offset=_HEADERS[kind]))
    images, labels = found
    return images.reshape(len(labels), 1, 28, 28), labels


def _normalised(pixels: NDArray[np.uint8]) -> Images:
    made: Images = ((pixels.astype(np.float32) / 255 - MEAN) / STD).astype(np.float32)
    return made
