"""Resampling: every axis by itself, as a matrix product with the weights of its taps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from onnxprune.train.torch_ops.lazy import Tensor, functional, torch
from onnxprune.train.torch_ops.registry import Op, op
from onnxprune.types import Float64Array, IntArray

_ROUNDING: dict[str, Callable[[Float64Array], Float64Array]] = {
    "round_prefer_floor": lambda x: np.ceil(x - 0.5),
    "round_prefer_ceil": lambda x: np.floor(x + 0.5),
    "floor": np.floor,
    "ceil": np.ceil,
}


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis to resample: where it lies, its sizes, its scale and its part of the region."""

    place: int
    before: int
    after: int
    scale: float
    start: float
    end: float


@op("Resize", host=(1, 2, 3))
def resize(
    node: Op,
    x: Tensor,
    second: Sequence[float] | None = None,
    third: Sequence[float] | None = None,
    sizes: Sequence[int] | None = None,
) -> Tensor:
    """Inputs are (x, scales) in version 10, and (x, region, scales, sizes) from 11 on."""
    region, scales = (None, second) if node.version < 11 else (second, third)
    places = [axis % x.ndim for axis in node.attributes.get("axes", range(x.ndim))]
    return _resample(node, x, _axes(node, x, places, region or [], scales or [], sizes))


@op("Upsample", host=(1,))
def upsample(node: Op, x: Tensor, scales: Sequence[float] | None = None) -> Tensor:
    """What Resize was before version 10."""
    given = node.ints("scales", scales) or []
    return _resample(node, x, _axes(node, x, list(range(x.ndim)), [], given, None))


def _axes(
    node: Op,
    x: Tensor,
    places: Sequence[int],
    region: Sequence[float],
    scales: Sequence[float],
    sizes: Sequence[int] | None,
) -> list[Axis]:
    count, before = len(places), [int(x.shape[place]) for place in places]
    if node.text("coordinate_transformation_mode", "half_pixel") != "tf_crop_and_resize":
        region = [0.0] * count + [1.0] * count
    if sizes:
        scales = [size / n for size, n in zip(sizes, before, strict=True)]
        policy = node.text("keep_aspect_ratio_policy", "stretch")
        if policy != "stretch":
            one = min(scales) if policy == "not_larger" else max(scales)
            scales = [one] * count
            sizes = [int(one * n + 0.5) for n in before]
    else:
        spans = [region[count + n] - region[n] for n in range(count)]
        sizes = [
            int(np.floor(np.float32(n) * np.float32(span) * np.float32(scale)))
            for n, span, scale in zip(before, spans, scales, strict=True)
        ]
    rows = zip(places, before, sizes, scales, strict=True)
    return [
        Axis(place, n, int(size), float(scale), region[number], region[count + number])
        for number, (place, n, size, scale) in enumerate(rows)
        if size != n or scale != 1 or region[number] != 0 or region[count + number] != 1
    ]


def _coordinates(node: Op, axis: Axis) -> Float64Array:
    """Where each output lies on the input."""
    x = np.arange(axis.after, dtype=np.float64)
    old = "asymmetric" if node.version < 11 else "half_pixel"
    match node.text("coordinate_transformation_mode", old):
        case "asymmetric":
            return x / axis.scale
        case "align_corners":
            return x * (axis.before - 1) / max(axis.after - 1, 1)
        case "pytorch_half_pixel":
            return (x + 0.5) / axis.scale - 0.5 if axis.after > 1 else np.zeros(1)
        case "half_pixel":
            return (x + 0.5) / axis.scale - 0.5
        case "half_pixel_symmetric":
            # The output is centred on the input where its size had to be rounded.
            whole = axis.scale * axis.before
            shift = axis.before / 2 * (1 - axis.after / whole)
            return shift + (x + 0.5) / axis.scale - 0.5
        case "tf_half_pixel_for_nn":
            return (x + 0.5) / axis.scale
        case "tf_crop_and_resize":
            if axis.after == 1:
                return np.array([0.5 * (axis.start + axis.end) * (axis.before - 1)])
            step = (axis.end - axis.start) * (axis.before - 1) / (axis.after - 1)
            return axis.start * (axis.before - 1) + x * step
        case other:
            raise node.fail(f"coordinate_transformation_mode {other}")


def _resample(node: Op, x: Tensor, axes: Sequence[Axis]) -> Tensor:
    mode = node.text("mode", "nearest")
    outside = []
    for axis in axes:
        where = _coordinates(node, axis)
        if node.text("coordinate_transformation_mode", "") == "tf_crop_and_resize":
            outside.append((axis, (where < 0) | (where > axis.before - 1)))
        if mode == "nearest":
            x = _nearest(node, x, axis, where)
            continue
        if axis not in node.kept:
            matrix = _matrix(node, mode, axis, where)
            node.kept[axis] = node.tensor(matrix.astype(np.float64))
        x = torch.matmul(x.movedim(axis.place, -1), node.kept[axis].T).movedim(-1, axis.place)
    for axis, gone in outside:
        mask = torch.from_numpy(gone).to(x.device)
        mask = mask.reshape([-1, *[1] * (x.ndim - axis.place - 1)])
        x = torch.where(mask, node.real("extrapolation_value", 0.0), x)
    return x


def _nearest(node: Op, x: Tensor, axis: Axis, where: Float64Array) -> Tensor:
    old = "floor" if node.version < 11 else "round_prefer_floor"
    rounded = _ROUNDING[node.text("nearest_mode", old)](where)
    found = np.clip(rounded, 0, axis.before - 1).astype(np.int64)
    times, rest = divmod(axis.after, axis.before)
    if rest == 0 and np.array_equal(found, np.arange(axis.after) // times):
        return x.repeat_interleave(times, axis.place)
    return x.index_select(axis.place, torch.from_numpy(found).to(x.device))


def _matrix(node: Op, mode: str, axis: Axis, where: Float64Array) -> Float64Array:
    """Weights of the inputs (columns) in each output (rows)."""
    wide = bool(node.integer("antialias", 0)) and axis.scale < 1
    # Antialiasing stretches the kernel over as many inputs as make one output.
    stretch = 1 / axis.scale if wide else 1.0
    reach = (2 if mode == "cubic" else 1) * stretch
    taps: IntArray = np.arange(int(np.ceil(2 * reach)) + 2) - int(np.ceil(reach))
    places = np.floor(where)[:, None].astype(np.int64) + taps[None, :]
    distance = np.abs(where[:, None] - places) / stretch
    alpha = node.real("cubic_coeff_a", -0.75)
    weights = _cubic(distance, alpha) if mode == "cubic" else np.maximum(1 - distance, 0)
    inside = (places >= 0) & (places < axis.before)
    excluded = bool(node.integer("exclude_outside", 0))
    if excluded:
        weights = np.where(inside, weights, 0.0)
    if excluded or wide:
        weights = weights / weights.sum(1, keepdims=True)
    matrix = np.zeros((axis.after, axis.before))
    rows = np.arange(axis.after)[:, None]
    np.add.at(matrix, (rows, np.clip(places, 0, axis.before - 1)), weights)
    return matrix


def _cubic(distance: Float64Array, a: float) -> Float64Array:
    """Keys' kernel (1981), with ``a`` as ONNX's ``cubic_coeff_a``."""
    near = (a + 2) * distance**3 - (a + 3) * distance**2 + 1
    far = a * distance**3 - 5 * a * distance**2 + 8 * a * distance - 4 * a
    return np.where(distance <= 1, near, np.where(distance < 2, far, 0.0))


@op("GridSample")
def grid_sample(node: Op, x: Tensor, grid: Tensor) -> Tensor:
    """Samples at places of -1 to 1."""
    mode = {"linear": "bilinear", "cubic": "bicubic"}.get(
        node.text("mode", "linear"), node.text("mode", "linear")
    )
    return functional.grid_sample(
        x,
        grid,
        mode=mode,
        padding_mode=node.text("padding_mode", "zeros"),
        align_corners=bool(node.integer("align_corners", 0)),
    )


@op("AffineGrid", host=(1,))
def affine_grid(node: Op, theta: Tensor, size: Sequence[int]) -> Tensor:
    """The grid of an affine map."""
    corners = bool(node.integer("align_corners", 0))
    return functional.affine_grid(theta, list(size), align_corners=corners)
