"""One short rule for each operator. Importing this package registers them all."""

from onnxprune.ops import (
    attention,
    contrib,
    conv,
    einsum,
    elementwise,
    join,
    linear,
    movement,
    norm,
    places,
    plain,
    pool,
    reduce,
    rotary,
)

__all__ = [
    "attention",
    "contrib",
    "conv",
    "einsum",
    "elementwise",
    "join",
    "linear",
    "movement",
    "norm",
    "places",
    "plain",
    "pool",
    "reduce",
    "rotary",
]
