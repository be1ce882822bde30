"""Padding of convolutions and pools: sizes of windows, begins and ends by axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from onnxprune.train.torch_ops.registry import Op


@dataclass(frozen=True, slots=True)
class Window:
    """A sliding window over the spatial axes; every list has one number for each of them.

    Attributes:
        kernel: Size.
        strides: Step.
        dilations: Distance between taps.
        begins: Padding before.
        ends: Padding after.
    """

    kernel: list[int]
    strides: list[int]
    dilations: list[int]
    begins: list[int]
    ends: list[int]

    @property
    def even(self) -> bool:
        """Whether both sides are padded alike, and none is cut."""
        return self.begins == self.ends and min(self.begins, default=0) >= 0

    @property
    def extents(self) -> list[int]:
        """How far each window reaches."""
        return [(k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True)]


def window(node: Op, kernel: Sequence[int], sizes: Sequence[int]) -> Window:
    """The window of a Conv or pool over an input of ``sizes``."""
    rank = len(kernel)
    strides = list(node.attributes.get("strides", [1] * rank))
    dilations = list(node.attributes.get("dilations", [1] * rank))
    pads = list(node.attributes.get("pads", [0] * 2 * rank))
    auto = node.text("auto_pad", "NOTSET")
    made = Window(list(kernel), strides, dilations, pads[:rank], pads[rank:])
    if auto == "VALID":
        return Window(made.kernel, strides, dilations, [0] * rank, [0] * rank)
    if auto.startswith("SAME"):
        totals = [
            max((-(-size // stride) - 1) * stride + extent - size, 0)
            for size, stride, extent in zip(sizes, strides, made.extents, strict=True)
        ]
        less = [total // 2 for total in totals]
        more = [total - part for total, part in zip(totals, less, strict=True)]
        begins, ends = (less, more) if auto == "SAME_UPPER" else (more, less)
        return Window(made.kernel, strides, dilations, begins, ends)
    return made


def torch_pads(begins: Sequence[int], ends: Sequence[int]) -> list[int]:
    """Padding as torch spells it: last axis first, begin and end in turn."""
    pairs = list(zip(begins, ends, strict=True))
    return [number for pair in reversed(pairs) for number in pair]
