"""Rules about layers: channels in the multiples that Tensor Cores take, and the 2:4 pattern."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from onnx import TensorProto

from onnxprune.alignment import holds_pattern
from onnxprune.chains import Scaled, shown
from onnxprune.patterns import NM
from onnxprune.presented import FLOATS
from onnxprune.targets.findings import NOTE, WARNING, Finding
from onnxprune.thin import gain, unaligned
from onnxprune.types import LayerReport, Width
from onnxprune.weights import SparseLayer

_AXES = {"conv": 1, "deconv": 0, "rows": -1, "columns": -2}
_PATTERN = NM(2, 4)
_CURABLE = "would align them"  # how a reason ends that a cut removes


@dataclass(frozen=True, slots=True)
class Weights:
    """What the weights of a model's layers are.

    Attributes:
        sparse: Layers whose weight holds 2:4, in the order in which they run.
        kinds: Element types that the weights have as stored.
        quantized: Some weight is scaled from integers.
    """

    sparse: tuple[SparseLayer, ...]
    kinds: frozenset[int]
    quantized: bool

    @property
    def eligible(self) -> tuple[SparseLayer, ...]:
        """Sparse layers whose channels suit sparse kernels."""
        return tuple(layer for layer in self.sparse if unaligned(layer) is None)

    @property
    def typed(self) -> bool:
        """The file says more of types than that all is float32."""
        return self.quantized or bool(self.kinds - {TensorProto.FLOAT, TensorProto.DOUBLE})

    @property
    def single(self) -> bool:
        """All weights are float32."""
        return self.kinds == {TensorProto.FLOAT} and not self.quantized


def weights_of(layers: Sequence[SparseLayer]) -> Weights:
    """Look at every weight; of nearly all the first run of four tells that they are dense."""
    known = [layer for layer in layers if layer.seen is not None and layer.form]
    return Weights(
        sparse=tuple(layer for layer in known if _sparse(layer)),
        kinds=frozenset(layer.stored.weight.data_type for layer in known),
        quantized=any(_scaled(layer) for layer in known),
    )


def _sparse(layer: SparseLayer) -> bool:
    if layer.why_not is not None:
        return False
    assert layer.seen is not None
    if _scaled(layer):  # zero may be stored as another number
        return holds_pattern(layer.matrix(), 2)
    seen = shown(layer.stored.weight.read(), layer.seen.steps)
    return holds_pattern(seen, _AXES[layer.form])


def _scaled(layer: SparseLayer) -> bool:
    """Integers that are scaled, not floats times something."""
    assert layer.seen is not None
    if layer.stored.weight.data_type in FLOATS:
        return layer.seen.quantized
    return any(isinstance(step, Scaled) for step in layer.seen.steps)


def sparse_findings(found: Weights) -> Iterator[Finding]:
    """Layers that hold 2:4, and why a sparse kernel is or is not to be expected."""
    for layer in found.sparse:
        label = f"{layer.node.op_type} '{layer.label}'"
        reason = unaligned(layer)
        if reason is not None:
            yield Finding(
                WARNING, "sparse-channels", label, f"its weight is 2:4 sparse, but it has {reason}",
                "where channels may go, shrink --round-to auto --then 2:4 leaves a multiple",
            )  # fmt: skip
            continue
        reason = gain(layer, _PATTERN)
        if reason is not None:
            yield Finding(
                NOTE, "sparse-gain", label,
                f"its weight is 2:4 sparse, no gain expected: {reason}",
            )  # fmt: skip
    if found.eligible and found.single:
        yield Finding(
            WARNING, "sparse-type", "",
            f"{len(found.eligible)} layers hold 2:4 in float32: sparse kernels are for 16-bit and "
            "8-bit types (documented)",
            "onnxprune quantize MODEL --to fp16",
        )  # fmt: skip


def width_findings(layers: Sequence[LayerReport]) -> Iterator[Finding]:
    """Sides of layers whose channels TensorRT pads to the next multiple, which costs as much."""
    for layer in layers:
        label = f"{layer.before.op_type} '{layer.before.node}'"
        for side, verb in ((layer.inputs, "reads"), (layer.outputs, "makes")):
            if side is not None and not side.aligned:
                yield _width(label, side, verb)


def _width(label: str, side: Width, verb: str) -> Finding:
    count = side.before if side.after is None else side.after
    channels = "channel" if count == 1 else "channels"
    text = f"{verb} {count} {channels}, not a multiple of {side.wants}"
    if side.why.endswith(_CURABLE):
        return Finding(
            WARNING, "channels", label, text, f"shrink --round-to {side.wants} aligns them"
        )
    return Finding(NOTE, "channels", label, f"{text}: {side.why}")
