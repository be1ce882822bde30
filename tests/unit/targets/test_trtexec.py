"""The command to run next."""

from __future__ import annotations

import shlex

import ml_dtypes
import numpy as np
import pytest

from onnxprune.model import Model
from onnxprune.targets.trtexec import next_step
from tests.small import conv_chain, parsed
from tests.unit.targets.cases import CASES


def product(dtype: type, *, sparse: bool = False, width: int = 32) -> Model:
    weight = np.ones((width, 32), np.float32)
    if sparse:
        weight[0::4] = weight[1::4] = 0
    spelled = {np.float32: "float", np.float16: "float16", ml_dtypes.bfloat16: "bfloat16"}[dtype]
    return parsed(
        f"g ({spelled}[1,{width}] x) => ({spelled}[1,32] y) {{y = MatMul(x, w)}}",
        w=weight.astype(dtype),
    )


def arguments(model: Model, path: str = "m.onnx", known: tuple = ()) -> list[str]:
    return shlex.split(next_step(model, path, known).command)


def test_float32_model_has_the_file_alone_and_is_pointed_to_16_bits() -> None:
    step = next_step(product(np.float32), "m.onnx", ())
    assert step.command == "trtexec --onnx=m.onnx"
    assert len(step.expect) == 1
    assert "onnxprune quantize m.onnx --to fp16" in step.expect[0]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_16_bit_model_keeps_its_types(dtype: type) -> None:
    assert arguments(product(dtype)) == ["trtexec", "--onnx=m.onnx", "--stronglyTyped"]


def test_quantized_model_keeps_its_types() -> None:
    model = next(case for case in CASES if case.name == "qdq").make()
    assert "--stronglyTyped" in arguments(model)


def test_sparse_kernels_are_permitted_where_layers_suit_them() -> None:
    assert "--sparsity=enable" in arguments(product(np.float16, sparse=True))
    assert "--sparsity=enable" in arguments(product(np.float32, sparse=True))
    assert "--sparsity=enable" not in arguments(product(np.float16))
    assert "--sparsity=enable" not in arguments(product(np.float16, sparse=True, width=24))
    said = next_step(product(np.float16, sparse=True), "m.onnx", ()).expect
    assert "2:4 in 1 layer;" in said[-1]


def test_shapes_of_a_dynamic_model() -> None:
    known = ({"x": (1, 3, 8, 8)}, {"x": (3, 3, 8, 8)})
    assert arguments(conv_chain(batch="n"), known=known)[2:] == [
        "--minShapes=x:1x3x8x8",
        "--optShapes=x:1x3x8x8",
        "--maxShapes=x:3x3x8x8",
    ]


def test_path_and_names_are_quoted_for_the_shell() -> None:
    model = parsed('g (float[n,4] "a b") => (float[n,4] y) {y = Relu("a b")}')
    known = ({"a b": (1, 4)},)
    step = next_step(model, "out dir/m.onnx", known)
    assert "--onnx='out dir/m.onnx'" in step.command
    assert "--minShapes=a b:1x4" in shlex.split(step.command)
