"""Are a trainer's gradients right? A few against finite differences, before the first step.

A backend that computes wrong gradients without a word (it happens: convolutions with ``auto_pad``)
trains all the same, only badly, so nobody would see it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxprune.errors import VerificationError
from onnxprune.train.protocol import Arrays, Job, Trainer
from onnxprune.types import FloatArray

_TENSORS = 6  # weights that are looked at, spread over the network
_SHARES = (0.02, 0.005, 0.001)  # by which part of the loss a step should change it
_TOLERANCE = 0.15  # of the slope: kinks of ReLU and float32 leave some
_NOISE = 1e-6  # a loss that two passes give this far apart is random
_FARTHEST = 0.1  # a step, by the weight's norm


def check_gradients(trainer: Trainer, job: Job, inputs: Arrays, targets: Arrays) -> int:
    """Compare slopes along gradients with the loss a little before and behind.

    Args:
        trainer: Prepared; its state is the same afterwards.
        job: What it was prepared for.
        inputs: A batch.
        targets: Of the same samples.

    Returns:
        Number of weights that were compared; 0 where the loss itself is random.

    Raises:
        VerificationError: A gradient is wrong.
    """
    start = dict(trainer.state())
    loss, gradients = trainer.gradients(inputs, targets)
    found = {name: np.array(one, np.float32) for name, one in gradients.items()}
    trainer.load(start)
    again, _ = trainer.gradients(inputs, targets)
    trainer.load(start)
    if not np.isfinite(loss) or abs(again - loss) > _NOISE * max(1.0, abs(loss)):
        return 0
    compared = 0
    for name in _spread([name for name in job.weights if name in found], _TENSORS):
        slope, ratio = _compare(trainer, job, start, (inputs, targets), name, loss, found[name])
        if ratio is None:
            continue
        compared += 1
        if abs(ratio - 1) > _TOLERANCE:
            raise VerificationError(
                f"trainer '{trainer.name}' computes a wrong gradient for '{name}': slope "
                f"{slope:.4g}, by finite differences {slope * ratio:.4g}",
                hint="nothing was trained; try another --trainer, and please report it",
            )
    return compared


def _compare(
    trainer: Trainer,
    job: Job,
    start: Arrays,
    batch: tuple[Arrays, Arrays],
    name: str,
    loss: float,
    gradient: FloatArray,
) -> tuple[float, float | None]:
    """Slope along the gradient, and the measured one by it (the best of several step sizes).

    None where the loss hardly depends on the weight, so that rounding hides it.
    """
    weight = np.asarray(start[name], np.float32)
    mask = job.masks.get(name)
    along = gradient if mask is None else gradient * np.asarray(mask, np.float32)
    slope = float(np.linalg.norm(along))
    reach = _FARTHEST * (float(np.linalg.norm(weight)) or 1.0)
    if slope * reach < 1e-4 * max(abs(loss), 1e-3):
        return slope, None
    best: float | None = None
    for share in _SHARES:
        # Both shrink: where the slope is small, curvature is what a step of `reach` would measure.
        step = min(share * max(abs(loss), 1e-3) / slope, reach * share / _SHARES[0])
        off = (step / slope * along).astype(np.float32)
        values = []
        for moved in (weight + off, weight - off):
            trainer.load({**start, name: moved})
            values.append(trainer.gradients(*batch)[0])
        ratio = (values[0] - values[1]) / (2 * step * slope)
        if best is None or abs(ratio - 1) < abs(best - 1):
            best = ratio
        if abs(best - 1) <= _TOLERANCE:
            break
    trainer.load(start)
    return slope, best


def _spread(names: Sequence[str], count: int) -> list[str]:
    """Some of them, first and last among them."""
    places = np.unique(np.linspace(0, len(names) - 1, min(count, len(names))).round().astype(int))
    return [names[at] for at in places]
