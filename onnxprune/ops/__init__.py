"""One short rule for each operator. Importing this package registers them all."""

from onnxprune.ops import conv, elementwise, join, linear, movement, norm, plain, pool, reduce

__all__ = ["conv", "elementwise", "join", "linear", "movement", "norm", "plain", "pool", "reduce"]
