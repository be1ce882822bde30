"""Top-1 accuracy of an ONNX classifier on labelled images.

    python tools/accuracy.py models/fashion_resnet.onnx

The images come from an .npz file with the arrays ``input`` (n, ...) and ``labels`` (n,); the
network has one input, of any name, and its first output is (batch, classes). A network of a fixed
batch size is fed in pieces of that size.
"""

from __future__ import annotations

import argparse
import json
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as ort_state

DATA = Path(__file__).resolve().parent.parent / "models" / "fashion_test.npz"
# ONNX Runtime's own exceptions share no base class but Exception.
ORT_ERRORS = tuple(
    kind
    for kind in vars(ort_state).values()
    if isinstance(kind, type) and issubclass(kind, Exception)
)
LOGITS_RANK = 2  # (batch, classes)
DTYPES = {"tensor(float16)": np.float16, "tensor(float)": np.float32, "tensor(double)": np.float64}


class AccuracyError(Exception):
    """The accuracy cannot be measured; the message is one line and says why."""


def first_line(error: Exception) -> str:
    """What ``error`` says, cut to its first line."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def load_labelled(data: Path) -> tuple[NDArray[np.generic], NDArray[np.generic]]:
    """Read the images (n, ...) and the labels (n,) of an .npz file.

    Raises:
        AccuracyError: The file cannot be read, or lacks an array, or has no images, or the two
            arrays differ in length.
    """
    try:
        with np.load(data) as arrays:
            images, labels = arrays["input"], arrays["labels"]
    except KeyError as error:
        message = f"{data} needs the arrays input and labels: {first_line(error)}"
        raise AccuracyError(message) from error
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        message = f"cannot read {data} as an .npz file: {first_line(error)}"
        raise AccuracyError(message) from error
    if labels.ndim != 1 or images.ndim == 0 or len(images) != len(labels) or len(labels) == 0:
        message = f"{data}: input {images.shape} and labels {labels.shape} do not match"
        raise AccuracyError(message)
    return images, labels


def open_session(model: str | Path | bytes) -> ort.InferenceSession:
    """Open ``model``, a file or its bytes, on the CPU.

    Raises:
        AccuracyError: ONNX Runtime cannot load it, or it has more or fewer than one input.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 4  # only fatal lines: errors are reported once, by us
    source = model if isinstance(model, bytes) else str(model)
    try:
        session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except ORT_ERRORS as error:
        name = "the model" if isinstance(model, bytes) else model
        message = f"cannot load {name}: {first_line(error)}"
        raise AccuracyError(message) from error
    names = [entry.name for entry in session.get_inputs()]
    if len(names) != 1:
        message = f"the model must have one input, has {len(names)}: {', '.join(names) or 'none'}"
        raise AccuracyError(message)
    return session


def predict(
    session: ort.InferenceSession, images: NDArray[np.generic], batch: int
) -> NDArray[np.int64]:
    """The class of each image.

    Raises:
        AccuracyError: The model cannot run on these images, or its output is not (batch, classes).
    """
    entry = session.get_inputs()[0]
    images = images.astype(DTYPES.get(entry.type, images.dtype), copy=False)
    first = entry.shape[0] if entry.shape else 0
    fixed = isinstance(first, int) and first > 0  # a name, None or -1 stands for any size
    size = int(first) if fixed else batch
    guesses = []
    for start in range(0, len(images), size):
        piece = images[start : start + size]
        missing = size - len(piece) if fixed else 0
        if missing:
            piece = np.concatenate([piece, np.repeat(piece[-1:], missing, axis=0)])
        try:
            logits = session.run(None, {entry.name: piece})[0]
        except ORT_ERRORS as error:
            message = f"the model does not run on these images: {first_line(error)}"
            raise AccuracyError(message) from error
        if np.ndim(logits) != LOGITS_RANK or len(logits) != len(piece):
            message = f"the output must be (batch, classes), is {np.shape(logits)}"
            raise AccuracyError(message)
        guesses.append(np.argmax(logits, axis=1)[: size - missing])
    return np.concatenate(guesses)


def accuracy(model: str | Path | bytes, data: Path = DATA, batch: int = 250) -> float:
    """Share of the images whose highest output is at their label.

    Args:
        model: ONNX file, or the bytes of one.
        data: The .npz file with ``input`` and ``labels``.
        batch: Images a run, > 0; a model of fixed batch size overrides it.

    Returns:
        Top-1 accuracy, 0 to 1.

    Raises:
        AccuracyError: The model or the data cannot be used.
    """
    images, labels = load_labelled(data)
    return float(np.mean(predict(open_session(model), images, batch) == labels))


def positive(text: str) -> int:
    """Parse a number > 0 for argparse."""
    number = int(text)
    if number < 1:
        message = f"{number} is not above 0"
        raise argparse.ArgumentTypeError(message)
    return number


def main() -> None:
    """Parse the command line and print the accuracy."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, metavar="MODEL.onnx")
    parser.add_argument("--data", type=Path, default=DATA, help="default: models/fashion_test.npz")
    parser.add_argument("--batch", type=positive, default=250, help="images a run (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    try:
        share = accuracy(options.model, options.data, options.batch)
        images = len(load_labelled(options.data)[1])
    except AccuracyError as error:
        sys.exit(f"accuracy.py: {error}")
    if options.json:
        print(json.dumps({"model": str(options.model), "images": images, "accuracy": share}))
    else:
        print(f"{options.model}: accuracy {share:.4f} on {images} images")


if __name__ == "__main__":
    main()
