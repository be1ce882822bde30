"""Each operator of the torch trainer: values as ONNX Runtime's, gradients as differences."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the trainer 'torch' needs PyTorch")

from onnxprune.train.torch_ops.registry import names
from tests.torch_oracle import Case, assert_as_onnx_runtime, assert_gradients

pytestmark = pytest.mark.training

_RNG = np.random.default_rng(0)
_MS = "com.microsoft:"
CASES: list[Any] = []


def r(*shape: int, low: float = -2.0, high: float = 2.0) -> np.ndarray:
    return _RNG.uniform(low, high, shape).astype(np.float32)


def i(*values: Any, kind: Any = np.int64) -> np.ndarray:
    return np.array(values[0] if len(values) == 1 else values, kind)


def add(op: str, *inputs: Any, opset: int = 21, n: int = 1, smooth: bool = True, **kw: Any) -> None:
    tolerance, fixed = kw.pop("tolerance", 1e-5), kw.pop("fixed", ())
    shown = ",".join(f"{key}={value}" for key, value in kw.items() if not hasattr(value, "dims"))
    shown = f"{op}-{opset}-{len(CASES)}-{shown}"[:90]
    CASES.append(
        pytest.param(
            Case(op, inputs, opset, kw, n, smooth, tolerance, fixed), id=shown.replace(" ", "")
        )
    )


# element by element
for _name in "Abs Atan Ceil Cos Cosh Erf Exp Floor Neg Relu Round Sigmoid Sign Sin Sinh".split():  # noqa: SIM905
    add(_name, r(3, 4), smooth=_name not in ("Ceil", "Floor", "Round", "Sign"))
for _name in "Tan Tanh Acos Asin Atanh Asinh Softsign Softplus Mish HardSwish".split():  # noqa: SIM905
    add(_name, r(3, 4, low=-0.9, high=0.9))
for _name in ("Log", "Sqrt", "Reciprocal", "Acosh"):
    add(_name, r(3, 4, low=1.1, high=3))
add("IsNaN", np.float32([1, np.nan]), smooth=False)
add("IsInf", np.float32([1, np.inf, -np.inf]), detect_negative=0, smooth=False)
add("Not", i([True, False], kind=bool), smooth=False)
add("BitwiseNot", i(1, 2, 3), smooth=False)
for _name in ("Add", "Sub", "Mul"):
    add(_name, r(2, 3, 4), r(3, 1))
    add(_name, i(5, 6), i(2, 3), smooth=False)
add("Div", r(2, 3), r(2, 3, low=1))
add("Div", i(-7, 7, 6), i(2, -2, 4), smooth=False)
add("Mod", i(-7, 7), i(3, -3), smooth=False)
add("Mod", r(4), r(4, low=1), fmod=1, smooth=False)
add("Pow", r(2, 3, low=0.5), r(1, 3))
add("Pow", r(2, 3), np.float32(2.0), fixed=[1])
add("Pow", r(2, 3, low=0.5), np.float32([0.5]))
add("Pow", i(2, 3), np.float32(2.0), smooth=False)
for _name in ("And", "Or", "Xor"):
    add(_name, i([True, False], kind=bool), i([True, True], kind=bool), smooth=False)
for _name in ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"):
    add(_name, i(1, 2, 3), i(3, 2, 1), smooth=False)
for _name in ("BitwiseAnd", "BitwiseOr", "BitwiseXor"):
    add(_name, i(5, 6), i(3, 9), smooth=False)
add("BitShift", i(5, 6, kind=np.uint8), i(1, 2, kind=np.uint8), direction="LEFT", smooth=False)
for _name in ("Sum", "Mean", "Min", "Max"):
    add(_name, r(2, 3), r(3), r(2, 1))
    add(_name, r(2, 3))
add("Where", i([True, False, True], kind=bool), r(2, 3), r(3))
add("Clip", r(3, 4), np.float32(-0.5), np.float32(1.0))
add("Clip", r(3, 4), None, np.float32(1.0))
add("Clip", r(3, 4), np.float32(-0.5))
add("Clip", r(3, 4), opset=6, min=-0.5, max=0.5)
add("Cast", r(3, 4), to=7, smooth=False)
add("Cast", i(1, 0), to=1, smooth=False)
add("CastLike", i(1, 2), r(1), smooth=False)

# activations
add("LeakyRelu", r(3, 4), alpha=0.2)
add("PRelu", r(2, 3, 4), r(3, 1))
add("ThresholdedRelu", r(3, 4), alpha=0.7)
add("Elu", r(3, 4), alpha=1.5)
add("Celu", r(3, 4), alpha=1.5)
add("Selu", r(3, 4))
add("Selu", r(3, 4), alpha=1.2, gamma=0.7)
add("HardSigmoid", r(3, 4), alpha=0.3, beta=0.4)
add("Shrink", r(3, 4), lambd=0.6, bias=0.2)
add("Gelu", r(3, 4))
add("Gelu", r(3, 4), approximate="tanh")
add("Swish", r(3, 4), opset=24, alpha=1.3)
for _opset in (9, 13):
    for _name in ("Softmax", "LogSoftmax", "Hardmax"):
        add(_name, r(2, 3, 4), opset=_opset, smooth=_name != "Hardmax")
        add(_name, r(2, 3, 4), opset=_opset, axis=1, smooth=_name != "Hardmax")
add(_MS + "Gelu", r(3, 4))
add(_MS + "QuickGelu", r(3, 4), alpha=1.702)
add(_MS + "BiasGelu", r(3, 4), r(4))
add(_MS + "FastGelu", r(3, 4), r(4))

# convolutions
add("Conv", r(2, 3, 7, 8), r(4, 3, 3, 3), r(4), pads=[1, 1, 1, 1])
add("Conv", r(2, 4, 7, 8), r(6, 2, 3, 2), group=2, strides=[2, 1], pads=[0, 1, 2, 0])
add("Conv", r(2, 4, 9, 9), r(4, 1, 3, 3), group=4, dilations=[2, 2])
add("Conv", r(2, 3, 9), r(4, 3, 3), r(4), strides=[2], opset=11)
add("Conv", r(1, 2, 5, 5, 4), r(3, 2, 2, 2, 2))
for _auto in ("SAME_UPPER", "SAME_LOWER", "VALID"):
    add("Conv", r(1, 2, 7, 8), r(3, 2, 4, 3), strides=[2, 3], auto_pad=_auto)
    add("MaxPool", r(1, 2, 7, 8), kernel_shape=[4, 3], strides=[2, 3], auto_pad=_auto)
    add("AveragePool", r(1, 2, 7, 8), kernel_shape=[4, 3], strides=[2, 3], auto_pad=_auto)
    add("ConvTranspose", r(1, 2, 5, 4), r(2, 3, 4, 3), strides=[2, 3], auto_pad=_auto)
add(_MS + "FusedConv", r(1, 2, 5, 5), r(3, 2, 3, 3), r(3), activation="Relu")
add(
    _MS + "FusedConv", r(1, 2, 5, 5), r(3, 2, 3, 3), r(3),
    activation="LeakyRelu", activation_params=[0.1],
)  # fmt: skip
add("ConvTranspose", r(2, 4, 5, 6), r(4, 3, 3, 3), r(3), strides=[2, 2], pads=[1, 1, 1, 1])
add("ConvTranspose", r(1, 4, 5, 6), r(4, 2, 3, 3), r(4), group=2, strides=[2, 2], output_padding=[1, 1], pads=[1, 0, 1, 0])  # fmt: skip  # noqa: E501
add("ConvTranspose", r(1, 2, 5, 6), r(2, 3, 3, 3), r(3), strides=[2, 2], pads=[0, 1, 1, 0])
add("ConvTranspose", r(1, 2, 5, 6), r(2, 3, 3, 3), dilations=[2, 2])
add("ConvTranspose", r(1, 2, 5, 5), r(2, 3, 3, 3), strides=[2, 2], output_shape=[10, 10])
add("ConvTranspose", r(1, 2, 5, 5), r(2, 3, 4, 4), strides=[2, 2], output_shape=[9, 10], auto_pad="SAME_UPPER")  # fmt: skip  # noqa: E501
add("ConvTranspose", r(1, 2, 6), r(2, 3, 4), strides=[2])

# pools
add("MaxPool", r(1, 2, 7, 8), kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
add("MaxPool", r(1, 2, 7, 8), kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1)
add("MaxPool", r(1, 2, 6, 6), kernel_shape=[2, 2], strides=[3, 3], pads=[1, 1, 1, 1], ceil_mode=1)
add("MaxPool", r(1, 2, 7, 8), kernel_shape=[2, 3], pads=[0, 1, 1, 0])
add("MaxPool", r(1, 2, 9), kernel_shape=[3], dilations=[2])
add("MaxPool", r(2, 2, 6, 6), kernel_shape=[2, 2], strides=[2, 2], n=2)
add("MaxPool", r(1, 2, 5, 5, 5), kernel_shape=[2, 2, 2])
add("AveragePool", r(1, 2, 7, 8), kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
add("AveragePool", r(1, 2, 7, 8), kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1)
add("AveragePool", r(1, 2, 7, 8), kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1)
add("AveragePool", r(1, 2, 7, 8), kernel_shape=[3, 2], pads=[0, 1, 2, 0], strides=[2, 2])
add("AveragePool", r(1, 2, 9, 9), kernel_shape=[2, 2], dilations=[2, 3])
add("AveragePool", r(1, 2, 7, 7), kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 0, 0], ceil_mode=1, count_include_pad=1)  # fmt: skip  # noqa: E501
add("LpPool", r(1, 2, 7, 8), kernel_shape=[3, 3], p=2, pads=[1, 1, 1, 1])
for _name in ("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"):
    add(_name, r(2, 3, 4, 5))
add("MaxUnpool", r(1, 1, 2, 2), i([[[[0, 3], [9, 14]]]]), kernel_shape=[2, 2], strides=[2, 2])

# normalisations
for _opset in (9, 15):
    add(
        "BatchNormalization",
        r(2, 3, 4, 5),
        r(3),
        r(3),
        r(3),
        r(3, low=0.5),
        fixed=[3, 4],
        opset=_opset,
    )
add("BatchNormalization", r(4, 3), r(3), r(3), r(3), r(3, low=0.5), fixed=[3, 4], epsilon=1e-2)
add("BatchNormalization", r(4, 3, 5), r(3), r(3), r(3), r(3, low=0.5), training_mode=1, momentum=0.8, n=3)  # fmt: skip  # noqa: E501
add("InstanceNormalization", r(2, 3, 4, 5), r(3), r(3), tolerance=1e-4)
add("LayerNormalization", r(2, 3, 4), r(4), r(4), opset=17)
add("LayerNormalization", r(2, 3, 4), r(3, 4), axis=1, opset=17)
add("LayerNormalization", r(2, 3, 4), r(4), r(4), n=3, opset=17)
add("GroupNormalization", r(2, 6, 4, 5), r(6), r(6), num_groups=2, opset=21)
add("GroupNormalization", r(2, 6, 4, 5), r(2), r(2), num_groups=2, opset=18)
add("RMSNormalization", r(2, 3, 4), r(4), opset=23)
add("SimplifiedLayerNormalization", r(2, 3, 4), r(4), axis=-1, epsilon=1e-5, opset=17)
add(_MS + "SkipLayerNormalization", r(2, 3, 4), r(2, 3, 4), r(4), r(4), r(4), epsilon=1e-6)
add(_MS + "SkipSimplifiedLayerNormalization", r(2, 3, 4), r(2, 3, 4), r(4), epsilon=1e-6)
add("LRN", r(2, 6, 3, 3), size=3, alpha=0.3, beta=0.6, bias=1.1)
add("LRN", r(2, 6, 3, 3), size=5, alpha=0.3)
add("LpNormalization", r(2, 3, 4), axis=1)
add("LpNormalization", r(2, 3, 4), p=1)
add("MeanVarianceNormalization", r(2, 3, 4, 5), tolerance=1e-4)

# movements
add("Identity", r(2, 3))
add("Dropout", r(2, 3), opset=13)
add("Dropout", r(2, 3), opset=7, ratio=0.3)
add("Shape", r(2, 3, 4), start=1, smooth=False)
add("Shape", r(2, 3, 4), opset=11, smooth=False)
add("Size", r(2, 3, 4), smooth=False)
add("Reshape", r(2, 3, 4), i(0, -1))
add("Reshape", r(2, 3, 4), i(4, 6))
add("Flatten", r(2, 3, 4))
add("Flatten", r(2, 3, 4), axis=-1, opset=13)
add("Flatten", r(2, 3, 4), axis=0)
add("Transpose", r(2, 3, 4))
add("Transpose", r(2, 3, 4), perm=[1, 0, 2])
add("Squeeze", r(1, 3, 1), i([2]))
add("Squeeze", r(1, 3, 1), opset=11, axes=[0])
add("Squeeze", r(1, 3, 1))
add("Unsqueeze", r(3, 4), i(0, -1))
add("Unsqueeze", r(3, 4), opset=11, axes=[0, 3])
add("Concat", r(2, 3), r(2, 1), axis=1)
add("Concat", r(2, 3), r(1, 3), axis=-2, opset=13)
add("Split", r(2, 5), i(2, 3), axis=1, n=2)
add("Split", r(2, 6), axis=1, n=2, opset=11, split=[2, 4])
add("Split", r(2, 6), axis=1, n=3, opset=13)
add("Split", r(2, 5), axis=1, n=2, num_outputs=2)
add("Slice", r(4, 5, 6), i(1, -3), i(100, -1), i(0, 2))
add("Slice", r(4, 5), i([-1]), i([-(2**31)]), i([1]), i([-2]))
add("Slice", r(4, 5), i(3, 0), i(0, 5), i(0, 1), i(-1, 2))
add("Slice", r(4, 5), i([-1]), i([-(2**63) + 1]), i([0]), i([-1]))
add("Slice", r(4, 5), i([-100]), i([100]), i([0]))
add("Slice", r(4, 5), opset=9, starts=[1], ends=[3], axes=[1])
add("Slice", r(4, 5), opset=9, starts=[1, 0], ends=[3, -1])
add("Expand", r(3, 1), i(2, 1, 4))
add("Tile", r(2, 3), i(2, 2))
add("Pad", r(2, 3, 4), i(0, 1, 0, 0, 0, 2), np.float32(1.5), fixed=[2])
add("Pad", r(1, 4, 4), i(0, -1, 1, 0, 1, -1))
for _mode in ("reflect", "edge", "wrap"):
    add("Pad", r(2, 3, 4), i(0, 1, 2, 0, 2, 1), mode=_mode)
add("Pad", r(2, 3, 4), i(1, 2), None, i([-1]))
add("Pad", r(2, 3), opset=9, pads=[0, 1, 0, 1], value=0.5)
for _mode in ("DCR", "CRD"):
    add("DepthToSpace", r(2, 8, 2, 3), blocksize=2, mode=_mode)
add("SpaceToDepth", r(2, 3, 4, 6), blocksize=2)
add("ConstantOfShape", i(2, 3), smooth=False)
add("Range", i(1), i(9), i(3), smooth=False)
add("EyeLike", r(3, 4), k=1, smooth=False)
add("Trilu", r(3, 4), i(1))
add("Trilu", r(3, 4), upper=0)
add("Col2Im", r(1, 8, 9), i(4, 4), i(2, 2), opset=18)
add("Col2Im", r(1, 8, 9), i(4, 4), i(2, 2), opset=18, strides=[2, 2], pads=[1, 1, 1, 1])

# by places
add("Gather", r(4, 3), i([[0, -1], [2, 2]]))
add("Gather", r(4, 3), i(1), axis=1)
add("Gather", r(2, 4, 3), i(1, 3), axis=1)
add("GatherElements", r(3, 4), i([[0, -1, 2, 1]]), axis=0)
add("GatherND", r(3, 4, 2), i([[0, 1], [2, -1]]))
add("GatherND", r(3, 4, 2), i([[1], [0], [3]]), batch_dims=1)
add("ScatterND", r(4, 3), i([[1], [3]]), r(2, 3))
add("ScatterND", r(4, 3), i([[1], [1]]), r(2, 3), reduction="add")
add("ScatterElements", r(3, 4), i([[0, 2, 1, 0]]), r(1, 4))
add("ScatterElements", r(3, 4), i([[0, -1, 1, 0]]), r(1, 4), axis=0, reduction="add")
add("OneHot", i(0, 2, -1), i(4), np.float32([0.5, 2]), smooth=False)
add("OneHot", i([[0, 2]]), i([3]), np.float32([0, 1]), axis=1, smooth=False)
add("NonZero", i([[1, 0], [0, 2]]), smooth=False)
add("Compress", r(3, 4), i([True, False, True], kind=bool), axis=0)
add("TopK", r(3, 6), i([2]), n=2)
add("TopK", r(3, 6), i([2]), n=2, axis=0, largest=0)
for _name in ("ArgMax", "ArgMin"):
    add(_name, r(3, 4), axis=1, smooth=False)
    add(_name, i([[1, 3, 3, 1]]), axis=1, select_last_index=1, keepdims=0, smooth=False)
add("CumSum", r(3, 4), i(1))
add("CumSum", r(3, 4), i(-1), exclusive=1, reverse=1)
add("ReverseSequence", r(4, 3), i(1, 4, 2), smooth=True)

# reductions
for _name in ("Sum", "Mean", "Max", "Min", "Prod", "L1", "L2", "SumSquare", "LogSumExp"):
    add(f"Reduce{_name}", r(2, 3, 4), i(0, 2), opset=18)
    add(f"Reduce{_name}", r(2, 3, 4), keepdims=0, opset=18)
    add(f"Reduce{_name}", r(2, 3, 4), opset=11, axes=[1, -1], keepdims=0)
add("ReduceLogSum", r(2, 3, low=0.5), i([1]), opset=18)
add("ReduceSum", r(2, 3), noop_with_empty_axes=1)
add("ReduceSum", i([[1, 2], [3, 4]]), i([1]), smooth=False)
add("ReduceMax", i([[1, 2], [3, 4]]), i([1]), opset=18, smooth=False)

# products
add("MatMul", r(2, 3, 4), r(4, 5))
add("MatMul", r(4), r(2, 4, 5))
add("Gemm", r(3, 4), r(4, 5), r(5))
add("Gemm", r(4, 3), r(5, 4), r(3, 1), transA=1, transB=1, alpha=0.5, beta=2.0)
add("Gemm", r(3, 4), r(4, 5))
add("Einsum", r(2, 3, 4), r(2, 5, 4), equation="bij, bkj -> bik")
add(_MS + "FusedMatMul", r(2, 4, 3), r(2, 5, 4), transA=1, transB=1, alpha=0.5)
add(_MS + "FusedGemm", r(3, 4), r(4, 5), r(5), activation="Relu")
_Q = i(_RNG.integers(-100, 100, (4, 6)), kind=np.int8)
add("DequantizeLinear", _Q, np.float32(0.1), i(3, kind=np.int8))
add("DequantizeLinear", _Q, r(6, low=0.1), axis=1)
add("DequantizeLinear", _Q, r(4, low=0.1), i(1, 2, 3, 4, kind=np.int8), axis=0)
add("DequantizeLinear", _Q, r(4, 2, low=0.1), axis=1, block_size=3)

# attention
add("Attention", r(2, 3, 4, 8), r(2, 3, 5, 8), r(2, 3, 5, 6), opset=23)
add("Attention", r(2, 4, 12), r(2, 4, 6), r(2, 4, 6), opset=23, q_num_heads=4, kv_num_heads=2, is_causal=1)  # fmt: skip  # noqa: E501
add("Attention", r(1, 2, 4, 8), r(1, 2, 5, 8), r(1, 2, 5, 8), r(4, 5), opset=23, scale=0.2, softcap=1.5)  # fmt: skip  # noqa: E501
add("Attention", r(1, 2, 4, 8), r(1, 2, 2, 8), r(1, 2, 2, 8), i(_RNG.random((4, 5)) < 0.8, kind=bool), r(1, 2, 3, 8), r(1, 2, 3, 8), opset=23, n=3)  # fmt: skip  # noqa: E501
add("RotaryEmbedding", r(2, 3, 4, 8), r(4, 4)[None].repeat(2, 0), r(2, 4, 4), opset=23)
add("RotaryEmbedding", r(2, 4, 24), r(9, 2), r(9, 2), i([[0, 1, 2, 3], [4, 5, 6, 7]]), opset=23, num_heads=3, rotary_embedding_dim=4, interleaved=1)  # fmt: skip  # noqa: E501
add(_MS + "RotaryEmbedding", r(2, 4, 24), i([[0, 1, 2, 3], [4, 5, 6, 7]]), r(9, 4), r(9, 4))
add(_MS + "RotaryEmbedding", r(2, 3, 4, 8), i([2]), r(9, 4), r(9, 4), interleaved=1)
add(_MS + "Attention", r(2, 4, 6), r(6, 18), r(18), num_heads=3)
add(_MS + "Attention", r(2, 4, 6), r(6, 18), r(18), i([[1, 1, 0, 1], [1, 1, 1, 0]], kind=np.int32), num_heads=2, unidirectional=1)  # fmt: skip  # noqa: E501
add(_MS + "MultiHeadAttention", r(2, 4, 6), r(2, 5, 6), r(2, 5, 6), r(18), num_heads=3)

# resampling
for _mode in ("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel", "half_pixel_symmetric"):  # fmt: skip  # noqa: E501
    for _kind in ("linear", "cubic", "nearest"):
        add("Resize", r(1, 2, 4, 5), None, np.float32([1, 1, 2, 1.5]), opset=19, mode=_kind, coordinate_transformation_mode=_mode)  # fmt: skip  # noqa: E501
        add("Resize", r(1, 2, 6, 7), None, None, i(1, 2, 4, 3), opset=19, mode=_kind, coordinate_transformation_mode=_mode)  # fmt: skip  # noqa: E501
for _kind in ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil"):
    add("Resize", r(1, 1, 4, 5), None, None, i(1, 1, 6, 9), nearest_mode=_kind)
for _kind in ("linear", "cubic"):
    add("Resize", r(1, 2, 9, 8), None, None, i(1, 2, 4, 3), opset=18, mode=_kind, antialias=1)
add("Resize", r(1, 2, 4, 5), None, np.float32([1, 1, 2, 2]), mode="cubic", exclude_outside=1, cubic_coeff_a=-0.5)  # fmt: skip  # noqa: E501
add("Resize", r(1, 1, 6, 6), np.float32([0, 0, 0.2, 0.3, 1, 1, 0.8, 1.4]), None, i(1, 1, 5, 4), mode="linear", coordinate_transformation_mode="tf_crop_and_resize", extrapolation_value=3.0)  # fmt: skip  # noqa: E501
add("Resize", r(1, 2, 4, 5), None, None, i(8, 10), opset=18, axes=[2, 3], mode="linear")
add("Resize", r(1, 2, 4, 6), None, None, i(8, 8), opset=18, axes=[2, 3], mode="linear", keep_aspect_ratio_policy="not_larger")  # fmt: skip  # noqa: E501
add("Resize", r(1, 2, 4, 5), np.float32([1, 1, 2, 2]), opset=10, mode="nearest")
add("Upsample", r(1, 2, 4, 5), np.float32([1, 1, 2, 2]), opset=9, mode="nearest")
add("Upsample", r(1, 2, 4, 5), np.float32([1, 1, 2, 2]), opset=9, mode="linear")
add("Upsample", r(1, 2, 4, 5), opset=7, mode="nearest", scales=[1.0, 1.0, 2.0, 3.0])
for _mode in ("linear", "nearest", "cubic"):
    for _pad in ("zeros", "border", "reflection"):
        _corner = int(_pad == "border")
        add("GridSample", r(1, 2, 4, 5), r(1, 3, 3, 2, low=-1.2, high=1.2), opset=20, mode=_mode, padding_mode=_pad, align_corners=_corner)  # fmt: skip  # noqa: E501
add("AffineGrid", r(1, 2, 3), i(1, 2, 4, 5), opset=20, align_corners=1)

# recurrent
for _way in ("forward", "reverse", "bidirectional"):
    _d = 2 if _way == "bidirectional" else 1
    for _lengths in (None, i(4, 2, kind=np.int32)):
        add("LSTM", r(4, 2, 3), r(_d, 20, 3), r(_d, 20, 5), r(_d, 40), _lengths, hidden_size=5, direction=_way, n=3)  # fmt: skip  # noqa: E501
        add("GRU", r(4, 2, 3), r(_d, 15, 3), r(_d, 15, 5), r(_d, 30), _lengths, hidden_size=5, direction=_way, n=2)  # fmt: skip  # noqa: E501
        add("RNN", r(4, 2, 3), r(_d, 5, 3), r(_d, 5, 5), r(_d, 10), _lengths, hidden_size=5, direction=_way, n=2)  # fmt: skip  # noqa: E501
add("LSTM", r(4, 2, 3), r(1, 20, 3), r(1, 20, 5), None, None, r(1, 2, 5), r(1, 2, 5), r(1, 15), hidden_size=5, n=3)  # fmt: skip  # noqa: E501
add("GRU", r(4, 2, 3), r(1, 15, 3), r(1, 15, 5), r(1, 30), None, r(1, 2, 5), hidden_size=5, linear_before_reset=1, n=2)  # fmt: skip  # noqa: E501
add("RNN", r(4, 2, 3), r(1, 5, 3), r(1, 5, 5), hidden_size=5, activations=["Relu"], n=2)


@pytest.mark.parametrize("case", CASES)
def test_values_are_those_of_onnx_runtime(case: Case) -> None:
    assert_as_onnx_runtime(case)


@pytest.mark.parametrize("case", [case for case in CASES if case.values[0].smooth])
def test_gradients_agree_with_finite_differences(case: Case) -> None:
    assert_gradients(case)


def test_every_operator_of_the_table_has_a_case_here_or_a_test_of_its_own() -> None:
    elsewhere = set(
        """If Loop Scan SequenceConstruct SequenceEmpty SequenceAt SequenceInsert SequenceLength
        ConcatFromSequence SplitToSequence TransposeMatMul Scatter BiasAdd""".split()  # noqa: SIM905
    )
    tried = {case.values[0].op.rpartition(":")[2] for case in CASES}
    assert {name for _, name in names()} <= tried | elsewhere
