"""Rewrites of operators that move or mix pixels, for onnxruntime-training (see ``rewrites``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper

from onnxprune.model import Model
from onnxprune.runtime import session
from onnxprune.train.rewrites import NoRewriteError, Writer, rewrites
from onnxprune.types import AnyArray


@rewrites("Conv")
def _explicit_pads(w: Writer, node: onnx.NodeProto, a: Mapping[str, Any]) -> str | None:
    """``auto_pad`` SAME gives wrong gradients, silently: write the pads out."""
    auto = a.get("auto_pad", b"NOTSET").decode()
    if not auto.startswith("SAME"):
        return None
    weight = w.sizes(node.input[1])
    rank = len(weight) - 2
    kernel = a.get("kernel_shape") or weight[2:]
    strides, dilations = (a.get(name) or [1] * rank for name in ("strides", "dilations"))
    if all(stride == 1 for stride in strides):
        total = [(k - 1) * d for k, d in zip(kernel, dilations, strict=True)]
    else:
        sizes = w.spatial(node.input[0])
        total = [
            max(0, (-(-size // s) - 1) * s + (k - 1) * d + 1 - size)
            for size, k, s, d in zip(sizes, kernel, strides, dilations, strict=True)
        ]
    small, large = [t // 2 for t in total], [t - t // 2 for t in total]
    pads = small + large if auto == "SAME_UPPER" else large + small
    made = onnx.NodeProto()
    made.CopyFrom(node)
    kept = [one for one in made.attribute if one.name not in ("auto_pad", "pads")]
    del made.attribute[:]
    made.attribute.extend([*kept, helper.make_attribute("pads", pads)])
    w.nodes.append(made)
    return str(node.output[0])


@rewrites("ConvTranspose")
def _conv_transpose(w: Writer, node: onnx.NodeProto, a: Mapping[str, Any]) -> str:
    """Zeros between the pixels, then a convolution with the filter turned round."""
    x, weight = node.input[:2]
    shape = [int(size or 0) for size in w.sizes(weight)]
    groups, rank = a.get("group", 1), len(shape) - 2
    kernel, sizes = shape[2:], w.spatial(x)
    strides, dilations = (a.get(name) or [1] * rank for name in ("strides", "dilations"))
    begin, end = _transposed_pads(a, sizes, kernel, strides, dilations)
    if min(*begin, *end) < 0:
        raise NoRewriteError("with pads wider than its kernel")
    wide = _with_zeros(w, x, shape[0], sizes, strides)
    turned = w.reshape(weight, [groups, shape[0] // groups, *shape[1:]])
    turned = w.op("Transpose", turned, perm=[0, 2, 1, *range(3, 3 + rank)])
    turned = w.reshape(turned, [groups * shape[1], shape[0] // groups, *kernel])
    for axis, size in enumerate(kernel, start=2):
        if size > 1:
            order = w.constant(np.arange(size)[::-1], np.int64)
            turned = w.op("Gather", turned, order, axis=axis)
    return w.op(
        "Conv", wide, turned, *node.input[2:], to=node.output[0], group=groups,
        dilations=list(dilations), kernel_shape=kernel, pads=[*begin, *end],
    )  # fmt: skip


def _transposed_pads(
    a: Mapping[str, Any],
    sizes: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
) -> tuple[list[int], list[int]]:
    """What the convolution pads at the beginning and end of each axis."""
    rank = len(kernel)
    reach = [(k - 1) * d for k, d in zip(kernel, dilations, strict=True)]
    extra = a.get("output_padding") or [0] * rank
    pads = list(a.get("pads") or [0] * 2 * rank)
    auto, wanted = a.get("auto_pad", b"NOTSET").decode(), a.get("output_shape")
    if wanted or auto.startswith("SAME"):
        wanted = (wanted or [n * s for n, s in zip(sizes, strides, strict=True)])[-rank:]
        whole = [
            (n - 1) * s + r + 1 + e for n, s, r, e in zip(sizes, strides, reach, extra, strict=True)
        ]
        total = [have - want for have, want in zip(whole, wanted, strict=True)]
        half, rest = [t // 2 for t in total], [t - t // 2 for t in total]
        pads = half + rest if auto == "SAME_UPPER" else rest + half
    elif auto == "VALID":
        pads = [0] * 2 * rank
    begin = [r - p for r, p in zip(reach, pads[:rank], strict=True)]
    end = [r - p + e for r, p, e in zip(reach, pads[rank:], extra, strict=True)]
    return begin, end


def _with_zeros(
    w: Writer, x: str, channels: int, sizes: Sequence[int], strides: Sequence[int]
) -> str:
    """``stride - 1`` zeros between neighbours along each axis."""
    if all(stride == 1 for stride in strides):
        return x
    rank = len(sizes)
    spread = [one for size in sizes for one in (size, 1)]
    held = w.reshape(x, [-1, channels, *spread])
    ends = [0, 0] + [one for stride in strides for one in (0, stride - 1)]
    held = w.op("Pad", held, w.constant([0] * len(ends) + ends, np.int64))
    joined = [size * stride for size, stride in zip(sizes, strides, strict=True)]
    held = w.reshape(held, [-1, channels, *joined])
    last = [(size - 1) * stride + 1 for size, stride in zip(sizes, strides, strict=True)]
    axes = w.constant(range(2, 2 + rank), np.int64)
    return w.op("Slice", held, w.constant([0] * rank, np.int64), w.constant(last, np.int64), axes)


@rewrites("GlobalMaxPool")
def _global_max_pool(w: Writer, node: onnx.NodeProto, _: Mapping[str, Any]) -> str:
    size = list(w.spatial(node.input[0]))
    return w.op("MaxPool", node.input[0], to=node.output[0], kernel_shape=size)


@rewrites("DepthToSpace")
def _depth_to_space(w: Writer, node: onnx.NodeProto, a: Mapping[str, Any]) -> str:
    x, block = node.input[0], a["blocksize"]
    channels, (height, width) = w.sizes(x)[1], w.spatial(x)
    if channels is None:
        raise NoRewriteError("on an open number of channels")
    out = channels // block**2
    if a.get("mode", b"DCR") == b"DCR":
        split, order = [-1, block, block, out, height, width], [0, 3, 4, 1, 5, 2]
    else:
        split, order = [-1, out, block, block, height, width], [0, 1, 4, 2, 5, 3]
    turned = w.op("Transpose", w.reshape(x, split), perm=order)
    return w.reshape(turned, [-1, out, height * block, width * block], node.output[0])


@rewrites("SpaceToDepth")
def _space_to_depth(w: Writer, node: onnx.NodeProto, a: Mapping[str, Any]) -> str:
    x, block = node.input[0], a["blocksize"]
    channels, (height, width) = w.sizes(x)[1], w.spatial(x)
    if channels is None:
        raise NoRewriteError("on an open number of channels")
    down, across = height // block, width // block
    split = w.reshape(x, [-1, channels, down, block, across, block])
    turned = w.op("Transpose", split, perm=[0, 3, 5, 1, 2, 4])
    return w.reshape(turned, [-1, channels * block**2, down, across], node.output[0])


@rewrites("Resize")
def _resize(w: Writer, node: onnx.NodeProto, a: Mapping[str, Any]) -> str:
    """Along each axis it is a matrix: the runtime's own answer to unit vectors says which."""
    x = node.input[0]
    before, after = w.spatial(x), w.spatial(node.output[0])
    if w.sizes(x)[1] != w.sizes(node.output[0])[1] or a.get("axes"):
        raise NoRewriteError("of other axes than height and width")
    if a.get("coordinate_transformation_mode") == b"tf_crop_and_resize":
        raise NoRewriteError("that crops")
    made, rank = x, len(before) + 2
    given = node.input[2] if len(node.input) > 2 and node.input[2] else ""
    scales = w.value(given)[2:] if given and w.sizes(given) != (0,) else None
    changed = [at for at, pair in enumerate(zip(before, after, strict=True)) if pair[0] != pair[1]]
    for number, at in enumerate(changed):
        matrix = _matrix(w, a, before[at], after[at], None if scales is None else scales[at])
        to = node.output[0] if number == len(changed) - 1 else ""
        made = w.along(made, matrix, 2 + at, rank, to)
    return made if changed else w.op("Identity", x, to=node.output[0])


def _matrix(
    w: Writer, a: Mapping[str, Any], before: int, after: int, scale: float | None
) -> AnyArray:
    """The matrix (after, before) that a Resize multiplies into one axis."""
    if scale is None:
        names, given = ["", "", "sizes"], np.array([before, 1, 1, after], np.int64)
    else:
        names, given = ["", "scales"], np.array([1, 1, 1, scale], np.float32)
    kept = {k: v for k, v in a.items() if k != "keep_aspect_ratio_policy"}
    node = helper.make_node("Resize", ["x", *names], ["y"], **kept)
    value, real = helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [node],
        "resize",
        [value("x", real, [before, 1, 1, before])],
        [value("y", real, [before, 1, 1, after])],
        [onnx.numpy_helper.from_array(given, names[-1])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", w.opset)], ir_version=8)
    unit = np.eye(before, dtype=np.float32).reshape(before, 1, 1, before)
    return session(Model(model)).run({"x": unit})["y"].reshape(before, after).T


@rewrites("Pad")
def _pad(w: Writer, node: onnx.NodeProto, a: Mapping[str, Any]) -> str | None:
    """Modes other than constant repeat elements: a Gather along each axis."""
    mode = a.get("mode", b"constant").decode()
    if mode == "constant":
        return None
    x, pads = node.input[0], w.value(node.input[1]).astype(int).tolist()
    rank = len(w.sizes(x))
    axes = range(rank)
    if len(node.input) > 3 and node.input[3]:
        axes = [int(axis) % rank for axis in w.value(node.input[3])]  # type: ignore[assignment]
    made = x
    for at, axis in enumerate(axes):
        begin, end = pads[at], pads[at + len(pads) // 2]
        if begin == end == 0:
            continue
        size = w.sizes(x)[axis]
        if size is None:
            raise NoRewriteError("along an axis of open size")
        inner = np.arange(max(0, -begin), size - max(0, -end))
        order = np.pad(inner, (max(0, begin), max(0, end)), mode=mode)
        made = w.op("Gather", made, w.constant(order, np.int64), axis=axis)
    return w.op("Identity", made, to=node.output[0])
