"""One short rule for each operator. Importing this package registers them all."""

from onnxprune.ops import (
    contrib,
    conv,
    elementwise,
    join,
    linear,
    movement,
    norm,
    plain,
    pool,
    reduce,
)

__all__ = [
    "contrib",
    "conv",
    "elementwise",
    "join",
    "linear",
    "movement",
    "norm",
    "plain",
    "pool",
    "reduce",
]
