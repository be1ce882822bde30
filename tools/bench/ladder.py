"""Analysis time against depth and width, and the exponent of the straight line through them.

    python tools/bench/ladder.py

Residual networks of 1 × 1 convolutions with BatchNormalization, made in memory and without the
weights. Wanted: exponents of at most 1.15.
"""

from __future__ import annotations

import sys
import time

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from onnxprune.analyse import analyse
from onnxprune.model import Model

DEPTHS = (50, 200, 1000, 5000)
WIDTHS = (64, 512, 4096, 16384)
WANTED = 1.15
REPEATS = 3


def network(layers: int, width: int) -> Model:
    """Conv, BatchNormalization, Relu, and a sum with the layer before at every other layer."""
    ones = np.ones(width, np.float16)
    nodes, constants, x = [], [], "x"
    for layer in range(layers):
        names = [f"{kind}{layer}" for kind in ("gamma", "beta", "mean", "variance")]
        constants += [numpy_helper.from_array(ones, name) for name in names]
        # The analysis asks for shapes alone, so the weights themselves can be missing.
        dims = (width, 3 if layer == 0 else width, 1, 1)
        constants.append(TensorProto(name=f"w{layer}", data_type=TensorProto.FLOAT16, dims=dims))
        nodes += [
            helper.make_node("Conv", [x, f"w{layer}"], [f"c{layer}"]),
            helper.make_node("BatchNormalization", [f"c{layer}", *names], [f"n{layer}"]),
            helper.make_node("Relu", [f"n{layer}"], [f"r{layer}"]),
        ]
        if layer % 2:
            nodes.append(helper.make_node("Add", [f"r{layer}", x], [f"a{layer}"]))
        x = nodes[-1].output[0]
    nodes.append(helper.make_node("GlobalAveragePool", [x], ["y"]))
    graph = helper.make_graph(
        nodes,
        "ladder",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT16, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT16, None)],
        constants,
    )
    opset = [helper.make_opsetid("", 17)]
    return Model(helper.make_model(graph, opset_imports=opset, ir_version=8))


def seconds(layers: int, width: int) -> float:
    """The fastest of a few analyses."""
    model, best = network(layers, width), float("inf")
    for _ in range(REPEATS if layers <= 1000 else 1):
        start = time.perf_counter()
        found = analyse(model)
        best = min(best, time.perf_counter() - start)
    assert found.prunable
    return best


def exponent(sizes: tuple[int, ...], times: list[float]) -> float:
    """Slope of the line through the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(times), 1)[0])


def main() -> int:
    worst = 0.0
    for what, sizes, shape in (
        ("layers", DEPTHS, lambda size: (size, 64)),
        ("channels", WIDTHS, lambda size: (20, size)),
    ):
        times = [seconds(*shape(size)) for size in sizes]
        slope = exponent(sizes, times)
        worst = max(worst, slope)
        for size, spent in zip(sizes, times, strict=True):
            print(f"{size:>6} {what:<9} {spent:8.3f} s")
        print(f"       exponent  {slope:8.2f}   (wanted: at most {WANTED})")
    return int(worst > WANTED)


if __name__ == "__main__":
    sys.exit(main())
