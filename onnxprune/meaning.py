"""Whether the nodes of a model make sense: ONNX's own checker, shapes, channel counts.

``onnx.load`` and ONNX Runtime accept much that breaks pruning later (a Conv whose weight does not
fit its input). So channel counts are compared here, and the rest is left to ``onnx.checker``.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import onnx

from onnxprune.dims import size_of
from onnxprune.errors import ModelError
from onnxprune.messages import label

_log = logging.getLogger(__name__)

_Shape: TypeAlias = tuple[int | None, ...]
_Shapes: TypeAlias = Mapping[str, _Shape]

_RUNTIME_LACKS_OPERATOR = (
    "is not a registered function/op",
    "No Op registered",
    "Could not find an implementation",
    "is not currently registered or supported",
)
_HARMLESS = ("is deprecated in domain", "Field 'shape' of 'type' is required")


def check_meaning(bones: onnx.ModelProto) -> None:
    """Let ``onnx.checker`` and shape inference look at a skeleton, and compare channel counts.

    The checker and inference err now and then on models that run well (GroupNormalization of opset
    18 counts as deprecated), so their verdict stands only where ONNX Runtime agrees. Channel counts
    are the reverse: the runtime finds out too late, or never.

    Args:
        bones: The model without large payloads; it loses its ``value_info``.

    Raises:
        ModelError: With the node at fault.
    """
    del bones.graph.value_info[:]  # often stale, and what is true of it is inferred again
    try:
        onnx.checker.check_model(bones)
    except onnx.checker.ValidationError as error:
        _refuse_if_runtime_does(bones, _one_line(str(error)))
    except UnicodeDecodeError as error:  # its complaint quotes such a string
        text = bytes(error.object).decode("utf-8", "backslashreplace")
        raise ModelError(_one_line(text), hint="export the model again") from None
    try:
        inferred, complaint = onnx.shape_inference.infer_shapes(bones, strict_mode=True), ""
    except onnx.shape_inference.InferenceError as error:
        inferred, complaint = onnx.shape_inference.infer_shapes(bones), _one_line(str(error))
    shapes = _known_shapes(inferred.graph)
    for node in bones.graph.node:
        _check_channels(node, [shapes.get(name, ()) for name in node.input])
    if complaint:
        _refuse_if_runtime_does(bones, complaint)


def _one_line(text: str) -> str:
    """The first complaint of the checker or of shape inference, with its node, in one line."""
    inference = re.search(
        r"\(op_type:(?P<op>[^,)]*)(?:, node name: (?P<node>.*?))?\): (?:\[\w+\] )?(?P<what>[^\n]*)",
        text,
    )
    if inference is not None:
        op, node, what = inference.group("op", "node", "what")
        return f"{op} '{node}': {what}" if node else f"{op}: {what}"
    context = re.search(r"==> Context: .*?Name: (?P<node>.*?) OpType: (?P<op>\S+)", text)
    what = text.partition("==> Context")[0]
    what = re.sub(r"(?:\S*/)?\w+\.(?:cc|cpp|h):\d+:?\s*(?:\w+: )?", "", what)  # C++ positions
    what = re.sub(r"^\[\w+\]\s*", "", " ".join(what.split()))
    if context is not None and context["node"] not in what:
        return f"{context['op']} '{context['node']}': {what}"
    return what


def _refuse_if_runtime_does(bones: onnx.ModelProto, complaint: str) -> None:
    """Raise the complaint unless ONNX Runtime loads the model all the same."""
    import onnxruntime  # only here: it costs 0.1 s
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    kinds: tuple[type[Exception], ...] = (RuntimeError, ValueError)
    for kind in vars(state).values():  # its own errors have no common base
        if isinstance(kind, type) and issubclass(kind, Exception):
            kinds += (kind,)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        onnxruntime.InferenceSession(
            bones.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except kinds as error:
        cannot_tell = any(reason in str(error) for reason in _RUNTIME_LACKS_OPERATOR)
        if not (cannot_tell and any(harmless in complaint for harmless in _HARMLESS)):
            raise ModelError(complaint, hint="export the model again") from error
    _log.info("accepted, although onnx complains: %s", complaint)


def _known_shapes(graph: onnx.GraphProto) -> _Shapes:
    """Shapes by tensor, a dimension that is unknown or symbolic as None."""
    shapes: dict[str, _Shape] = {}
    for value in (*graph.input, *graph.output, *graph.value_info):
        kind = value.type.tensor_type
        if value.type.HasField("tensor_type") and kind.HasField("shape"):
            # Some exporters write 0 where they do not know.
            shapes[value.name] = tuple(size_of(dim) or None for dim in kind.shape.dim)
    for tensor in graph.initializer:
        shapes[tensor.name] = tuple(tensor.dims)
    return shapes


def _check_channels(node: onnx.NodeProto, shapes: Sequence[_Shape]) -> None:
    """Compare what a node's weights say with its input; () stands for a shape not known."""
    if node.domain not in ("", "ai.onnx") or not shapes:
        return
    match node.op_type:
        case "Conv":
            _check_conv(node, *_three(shapes), transposed=False)
        case "ConvTranspose":
            _check_conv(node, *_three(shapes), transposed=True)
        case "QLinearConv" if len(shapes) >= 8:
            bias = shapes[8] if len(shapes) > 8 else ()
            _check_conv(node, shapes[0], shapes[3], bias, transposed=False)
        case "Gemm":
            _check_gemm(node, *_three(shapes))
        case "BatchNormalization" | "InstanceNormalization":
            if _integer(node, "spatial", 1) == 1 and len(shapes[0]) >= 2:
                for vector in shapes[1:]:
                    if len(vector) == 1 and _differ(vector[0], shapes[0][1]):
                        raise ModelError(
                            f"{label(node)} has {vector[0]} channels but its input has "
                            f"{shapes[0][1]}",
                            hint="the model was damaged; export it again",
                            node=node.name,
                        )


def _three(shapes: Sequence[_Shape]) -> tuple[_Shape, _Shape, _Shape]:
    x, weight, bias = [*shapes, (), (), ()][:3]
    return x, weight, bias


def _differ(a: int | None, b: int | None) -> bool:
    return a is not None and b is not None and a != b


def _integer(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((a.i for a in node.attribute if a.name == name), default)


def _misfit(node: onnx.NodeProto, what: str) -> ModelError:
    return ModelError(
        f"{label(node)}: {what}", hint="the model was damaged; export it again", node=node.name
    )


def _check_conv(
    node: onnx.NodeProto, x: _Shape, weight: _Shape, bias: _Shape, *, transposed: bool
) -> None:
    if len(weight) < 2:
        return
    group = _integer(node, "group", 1)
    wide, narrow = weight[0], weight[1]
    if narrow is not None:
        narrow *= group
    wanted, made = (wide, narrow) if transposed else (narrow, wide)
    if len(x) >= 2 and _differ(wanted, x[1]):
        raise _misfit(node, f"weight wants {wanted} input channels, tensor has {x[1]}")
    if group < 1 or (wide is not None and wide % group):
        raise _misfit(node, f"{wide} channels cannot be split into {group} groups")
    if len(bias) == 1 and _differ(bias[0], made):
        raise _misfit(node, f"bias has {bias[0]} entries, expected {made}")


def _check_gemm(node: onnx.NodeProto, a: _Shape, b: _Shape, bias: _Shape) -> None:
    if len(b) != 2:
        return
    inner, made = reversed(b) if _integer(node, "transB", 0) else b
    if len(a) == 2:
        has = a[0] if _integer(node, "transA", 0) else a[1]
        if _differ(inner, has):
            raise _misfit(node, f"weight wants {inner} input features, tensor has {has}")
    if bias and bias[-1] != 1 and _differ(bias[-1], made):
        raise _misfit(node, f"bias has {bias[-1]} entries, expected {made}")
