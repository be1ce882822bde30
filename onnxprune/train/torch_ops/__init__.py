"""Operators in torch; importing the package fills the table."""

from onnxprune.train.torch_ops import (
    activation,
    attention,
    control,
    conv,
    elementwise,
    index,
    linear,
    movement,
    norm,
    pool,
    recurrent,
    reduce,
    resize,
)

__all__ = [
    "activation",
    "attention",
    "control",
    "conv",
    "elementwise",
    "index",
    "linear",
    "movement",
    "norm",
    "pool",
    "recurrent",
    "reduce",
    "resize",
]
