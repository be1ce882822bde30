"""What a declared dimension says."""

from __future__ import annotations

import onnx


def size_of(dim: onnx.TensorShapeProto.Dimension) -> int | None:
    """Size of a dimension, None where it is open: symbolic, not given, or negative.

    Some exporters write a literal -1 for "any". 0 is a size like others, since for an input that
    declares it ONNX Runtime takes empty arrays and nothing else; who only wants to analyse may
    still take it for unknown.
    """
    return dim.dim_value if dim.HasField("dim_value") and dim.dim_value >= 0 else None
