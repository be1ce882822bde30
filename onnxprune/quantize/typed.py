"""Which float32 tensors of a model become 16-bit floats, and which nodes stay as they are and why.

The operators' own schemas say what may be 16-bit: each input and output is judged by the types its
formal parameter takes, so that the scales of a Resize stay float32 while its image does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import onnx
from onnx import TensorProto

from onnxprune.graph import captured_names
from onnxprune.model import Model, Weight
from onnxprune.skeleton import skeleton
from onnxprune.types import AnyArray, KeptNode

FP16 = TensorProto.FLOAT16
BF16 = TensorProto.BFLOAT16
FP32 = TensorProto.FLOAT
SPELLED: Mapping[int, str] = {FP16: "float16", BF16: "bfloat16"}
LARGEST = 65504.0  # float16
_VANISHES = 2.0**-25  # what rounds to zero in float16
_INFINITE = 1e30  # exporters write finfo.min where a mask means minus infinity
# What loses too much in 16 bits, or has no 16-bit kernel in the runtimes: as ONNX Runtime's list.
_BLOCKED = {
    "Bernoulli": "it draws random numbers",
    "CumSum": "it sums along an axis",
    "EyeLike": "it makes a tensor from sizes",
    "Multinomial": "it draws random numbers",
    "NonMaxSuppression": "it compares boxes",
    "RandomNormal": "it draws random numbers",
    "RandomNormalLike": "it draws random numbers",
    "RandomUniform": "it draws random numbers",
    "RandomUniformLike": "it draws random numbers",
    "Range": "it counts",
    "RoiAlign": "its coordinates need more than 11 bits",
    "TopK": "it compares scores",
    "Upsample": "it has no 16-bit form",
}
_NO_BF16 = {"HardSigmoid", "HardSwish"}  # TensorRT's parser refuses them, measured with RTX 1.7
_MAKERS = {"ConstantOfShape", "EyeLike", "Range"}
_LAYERS = {"Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum", "LSTM", "GRU", "RNN", "Attention"}
_SIZES = "it computes with sizes or positions"


@dataclass(frozen=True)
class Typing:
    """A decision for each use of each float32 tensor.

    Attributes:
        low: The 16-bit type.
        tensors: Names that hold it.
        reads: What each use wants: by node index and input position, ``low`` or float32.
        writes: The same for outputs.
        kept: Nodes that stay in float32.
        lost: Weights that become zero, and how many there are.
    """

    low: int
    tensors: frozenset[str]
    reads: Mapping[tuple[int, int], int]
    writes: Mapping[tuple[int, int], int]
    kept: tuple[KeptNode, ...]
    lost: tuple[int, int] = (0, 0)


@dataclass
class Typist:
    """Decides for one model; local functions must be inlined."""

    model: Model
    low: int
    ignored: Callable[[onnx.NodeProto], bool] = lambda _node: False
    kept: list[KeptNode] = field(default_factory=list)
    lost: int = 0
    weighed: int = 0

    def __post_init__(self) -> None:
        self.nodes = list(self.model.proto.graph.node)
        self.weights = dict(self.model.weights())
        self.opset = next(
            (o.version for o in self.model.proto.opset_import if o.domain in ("", "ai.onnx")), 1
        )

    @cached_property
    def kinds(self) -> Mapping[str, int]:
        """Element type of every tensor that inference knows; 0 for what is no tensor."""
        bones = onnx.shape_inference.infer_shapes(skeleton(self.model))
        graph = bones.graph
        found = {tensor.name: tensor.data_type for tensor in graph.initializer}
        for value in (*graph.input, *graph.output, *graph.value_info):
            found[value.name] = value.type.tensor_type.elem_type
        return found | {name: weight.data_type for name, weight in self.weights.items()}

    @cached_property
    def counts(self) -> frozenset[str]:
        """Float tensors made of integers and sizes by arithmetic: 11 bits are too few for them."""
        found: set[str] = set()
        for node in self.nodes:
            floats = [name for name in node.input if self.kinds.get(name) == FP32]
            source = node.op_type in _MAKERS or (
                node.op_type == "Cast" and not any(self._wide(name) for name in node.input)
            )
            known = all(name in found or name in self.weights for name in floats)
            inherits = known and any(name in found for name in floats)
            if (source or inherits) and node.op_type not in _LAYERS:
                found.update(name for name in node.output if self.kinds.get(name) == FP32)
        return frozenset(found)

    def _wide(self, name: str) -> bool:
        """It is a float of some kind, or nobody knows."""
        kind = self.kinds.get(name, FP32)
        return kind in (FP32, FP16, BF16, TensorProto.DOUBLE)

    def decide(self, peaks: Mapping[str, float]) -> Typing:
        """The decision, with the largest magnitude of each tensor as far as it was measured."""
        reads: dict[tuple[int, int], int] = {}
        writes: dict[tuple[int, int], int] = {}
        names: set[str] = set()
        for index, node in enumerate(self.nodes):
            why = "" if self.silent(node) else self.why_kept(node, peaks)
            if why:
                self.kept.append(KeptNode(node.name or node.output[0], node.op_type, why))
            for at, name in enumerate(node.input):
                if self.kinds.get(name) == FP32:
                    wants = not why and self._takes(node, at, output=False)
                    reads[index, at] = self.low if wants else FP32
            for at, name in enumerate(node.output):
                if name and self.kinds.get(name) == FP32 and name not in self.weights:
                    makes = not why and self._takes(node, at, output=True)
                    writes[index, at] = self.low if makes else FP32
                    names.update([name] if makes else [])
        return Typing(
            self.low, frozenset(names), reads, writes, tuple(self.kept), (self.lost, self.weighed)
        )

    def silent(self, node: onnx.NodeProto) -> bool:
        """The node has no float32 tensor at all, or only hands out a constant."""
        return node.op_type == "Constant" or not any(
            self.kinds.get(name) == FP32 or (name and name not in self.kinds)
            for name in (*node.input, *node.output)
        )

    def why_kept(self, node: onnx.NodeProto, peaks: Mapping[str, float]) -> str:
        """Why the node stays in float32; "" if it need not."""
        if self.ignored(node):
            return "you asked for it"
        if node.domain not in ("", "ai.onnx"):
            return f"an operator of {node.domain}"
        if any(True for _ in captured_names(node)) or _bodies(node):
            return "it has a body"
        if node.op_type in _BLOCKED:
            return _BLOCKED[node.op_type]
        if self.low == BF16 and node.op_type in _NO_BF16:
            return "TensorRT takes no bfloat16 in it"
        if any(name and not self.kinds.get(name) for name in (*node.input, *node.output)):
            return "the type of what it reads or makes is not known"
        if self._sizes(node):
            return _SIZES
        if not any(self._takes(node, at, output=False) for at in self._floats(node.input)) and (
            not any(self._takes(node, at, output=True) for at in self._floats(node.output))
        ):
            return f"{node.op_type} of opset {self.opset} takes no {SPELLED[self.low]}"
        return "" if self.low == BF16 else self._why_range(node, peaks)

    def _floats(self, names: list[str]) -> Iterator[int]:
        yield from (at for at, name in enumerate(names) if self.kinds.get(name) == FP32)

    def _sizes(self, node: onnx.NodeProto) -> bool:
        """It makes, or reads nothing but, what was computed from sizes."""
        made = [name for name in node.output if self.kinds.get(name) == FP32]
        if made:
            return any(name in self.counts for name in made)
        return any(name in self.counts for name in node.input)

    def _why_range(self, node: onnx.NodeProto, peaks: Mapping[str, float]) -> str:
        """A constant or an activation that float16 cannot hold."""
        for name in node.input:
            weight = self.weights.get(name)
            if weight is not None and weight.data_type == FP32:
                why = self._why_constant(name, weight)
                if why:
                    return why
        for name in (*node.input, *node.output):
            peak = peaks.get(name, 0.0)
            if not peak <= LARGEST / 2 and peak < _INFINITE:  # half: other inputs may give more
                return f"'{name}' reaches {peak:.3g} when it runs"
        return ""

    def _why_constant(self, name: str, weight: Weight) -> str:
        values = np.abs(weight.read().reshape(-1))
        large = values[(values > LARGEST) & (values < _INFINITE)]
        if large.size:
            return f"constant '{name}' reaches {large.max():.3g}"
        nonzero = np.count_nonzero(values)
        gone = nonzero - np.count_nonzero(values > _VANISHES)
        if nonzero and gone == nonzero:
            return f"constant '{name}' would be zero: {values.max():.3g}"
        self.lost += int(gone)
        self.weighed += int(nonzero)
        return ""

    def _takes(self, node: onnx.NodeProto, at: int, *, output: bool) -> bool:
        """Whether one input or output of an operator may be of the 16-bit type."""
        if node.op_type == "Cast":
            return True
        schema = self._schema(node.op_type)
        if schema is None:
            return False
        formal = schema.outputs if output else schema.inputs
        return f"tensor({SPELLED[self.low]})" in formal[min(at, len(formal) - 1)].types

    def _schema(self, op_type: str) -> onnx.defs.OpSchema | None:
        # TensorRT takes bfloat16 in all its operators; ONNX lists it in newer versions only.
        version = onnx.defs.onnx_opset_version() if self.low == BF16 else self.opset
        try:
            return onnx.defs.get_schema(op_type, version, "")
        except onnx.defs.SchemaError:
            return None


def halves_in(model: Model, *, edges: bool) -> tuple[int, str] | None:
    """What computes in 16 bits already.

    Args:
        model: Without local functions.
        edges: Look at inputs and outputs too.

    Returns:
        The type, and in words where it is; None where there is nothing of that.
    """
    kinds = Typist(model, FP16).kinds
    layers = [node for node in model.proto.graph.node if node.op_type in _LAYERS]
    found = [
        (kinds[name], node) for node in layers for name in node.input if kinds.get(name) in SPELLED
    ]
    low = {node.output[0]: node for _, node in found}
    if found:
        first = found[0][1]
        where = f"'{first.name or first.output[0]}'"
        if len(low) == len(layers):
            return found[0][0], "all its layers"
        return found[0][0], f"{len(low)} of its {len(layers)} layers, first {where}"
    for value in (*model.proto.graph.input, *model.proto.graph.output):
        if edges and kinds.get(value.name) in SPELLED:
            return kinds[value.name], f"'{value.name}'"
    return None


def _bodies(node: onnx.NodeProto) -> bool:
    return any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute)


def rounded(values: AnyArray, low: int) -> AnyArray:
    """Float32 values in 16 bits; what stands for infinity becomes the largest number there is."""
    dtype = onnx.helper.tensor_dtype_to_np_dtype(low)
    if low != FP16:
        return values.astype(dtype)
    standing = np.isfinite(values) & (np.abs(values) > LARGEST)
    clipped = np.where(standing, np.copysign(np.float32(LARGEST), values), values)
    return np.asarray(clipped, dtype)
