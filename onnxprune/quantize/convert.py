"""From a model and what is asked for to the quantized model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import numpy as np
import onnx

from onnxprune.data import Data
from onnxprune.drift import measure_drift
from onnxprune.errors import BUG, UnsupportedModelError, UsageError, VerificationError
from onnxprune.model import Model
from onnxprune.quantize.calibration import METHODS, Ranges
from onnxprune.quantize.int8 import Layers, find_layers, quantized
from onnxprune.quantize.lowered import emulated, lowered
from onnxprune.quantize.ranges import peaks
from onnxprune.quantize.ready import inlined, opset_of, raised, swept, without_batch_norms
from onnxprune.quantize.typed import BF16, FP16, SPELLED, Typing, Typist, halves_in
from onnxprune.recipe import QuantizeOptions
from onnxprune.types import KeptNode, Quantized
from onnxprune.weights import sparse_layers

_LOW = {"fp16": FP16, "bf16": BF16}
_FIRST_OPSET = {"fp16": 8, "bf16": 22, "int8": 13}
_INTEGER = {  # what only quantized models have
    "QuantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger",
}  # fmt: skip
_HALF_SCALES = 19  # from which on scales of Q/DQ may be 16-bit
_WANTED = 0.05  # held-out error up to which no layer is taken back to float
_MOST_FLOAT = 0.25  # share of the layers that may be
_MOST_TRIALS = 64  # layers quantized alone to find the worst
_FEW = 8  # samples, below which ranges are a matter of chance
_HELD_OUT = 4  # one batch in so many

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Converted:
    """A quantized model.

    Attributes:
        model: The model.
        runs_as: A float32 model that computes what it does, where ONNX Runtime would not.
        options: What was done, to be repeated.
        found: What to report.
        plain: What was quantized: the model, made ready.
    """

    model: Model
    runs_as: Model | None
    options: QuantizeOptions
    found: Quantized
    plain: Model


def convert(model: Model, options: QuantizeOptions, data: Data | None, measured: Data) -> Converted:
    """Quantize a model.

    Args:
        model: In float32.
        options: What to do.
        data: Calibration data; needed by int8.
        measured: What 16-bit floats measure the ranges of activations on.

    Raises:
        UnsupportedModelError: There is nothing to quantize.
        VerificationError: ONNX Runtime cannot run the model.
    """
    if options.before is not None:
        first = convert(model, options.before, data, measured)
        rest = options.model_copy(update={"before": None})
        last = convert(first.model, rest, data, measured)
        said = last.options.model_copy(update={"before": first.options})
        return replace(last, options=said, plain=first.plain)
    ready = inlined(model)
    _check_types(ready, options.to)
    scaled = any(node.op_type == "DequantizeLinear" for node in ready.proto.graph.node)
    opset = _FIRST_OPSET[options.to]
    ready = raised(ready, max(opset, _HALF_SCALES) if scaled else opset)
    if options.to != "int8":
        made = _halves(model, ready, options, measured)
    else:
        assert data is not None
        made = _integers(model, ready, options, data)
        if data.samples < _FEW:
            _log.warning(
                "int8 takes its ranges from %d sample%s only: a few hundred are usual",
                data.samples, "" if data.samples == 1 else "s",
            )  # fmt: skip
    if opset_of(ready) != (before := opset_of(model)):  # said of what was done, not of an error
        _log.warning("opset raised from %d to %d, which has the types", before, opset_of(ready))
    return made


def _check_types(model: Model, to: str) -> None:
    """Refuse a model that is in few bits already, in whole or in part.

    16-bit types come last: what is int8 may have its floats in 16 bits too, not the other way.

    Raises:
        UnsupportedModelError: It is.
    """
    if to == "int8" and any(node.op_type in _INTEGER for node in model.proto.graph.node):
        raise UnsupportedModelError(
            "the model is quantized already", hint="give the float model it was made from"
        )
    found = halves_in(model, edges=to != "int8")
    if found is not None:
        kind, where = found
        raise UnsupportedModelError(
            f"the model is in {SPELLED[kind]} already: {where}",
            hint="give the float32 model it was made from; for both, int8 first, then 16 bits",
        )


def check_zeros(plain: Model, written: Model) -> None:
    """Refuse a quantized model in which a weight that was zero is none, or a layer has gone.

    Raises:
        VerificationError: That is so.
    """
    layers, found = sparse_layers(plain), sparse_layers(written)
    if [layer.node.op_type for layer in layers] != [layer.node.op_type for layer in found]:
        raise VerificationError("the quantized model has other layers", hint=BUG)
    for layer, after in zip(layers, found, strict=True):
        if layer.seen is None:
            continue
        if after.seen is None or after.seen.shape != layer.seen.shape:
            raise VerificationError(f"'{layer.label}' has lost its weight", hint=BUG)
        if np.any(after.seen.value()[layer.seen.value() == 0]):
            raise VerificationError(f"zeros in the weight of '{layer.label}' are none", hint=BUG)


def _left_in(model: Model, options: QuantizeOptions) -> Callable[[onnx.NodeProto], bool]:
    """Whether the filters leave a node in, by its name or that of a constant it reads.

    Raises:
        UsageError: A pattern matches nothing.
    """
    constants = set(model.weights())

    def names(node: onnx.NodeProto) -> set[str]:
        own = node.name or next((name for name in node.output if name), "")
        return {own, *(constants & set(node.input))}

    known = {name for node in model.proto.graph.node for name in names(node)}
    for option, patterns in (("--ignore", options.ignore), ("--only", options.only)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in known):
                raise UsageError(
                    f"{option} '{pattern}' matches no node or constant",
                    hint="onnxprune inspect -v names them",
                )

    def matches(patterns: Sequence[str], node: onnx.NodeProto) -> bool:
        return any(fnmatchcase(name, pattern) for name in names(node) for pattern in patterns)

    def wanted(node: onnx.NodeProto) -> bool:
        return not matches(options.ignore, node) and (
            not options.only or matches(options.only, node)
        )

    return wanted


# -- 16-bit floats ---------------------------------------------------------------------------------


def _halves(model: Model, ready: Model, options: QuantizeOptions, data: Data) -> Converted:
    ready = swept(ready)
    low, wanted = _LOW[options.to], _left_in(ready, options)
    first = Typist(ready, low, ignored=lambda node: not wanted(node))
    typing = first.decide({})
    if not typing.tensors and low not in {w.data_type for w in ready.weights().values()}:
        raise UnsupportedModelError(
            f"nothing in it can become {SPELLED[low]}: {_nothing(typing)}",
            hint="give a model in float32",
        )
    if low == FP16:
        again = Typist(ready, low, ignored=lambda node: not wanted(node))
        typing = again.decide(peaks(ready, sorted(typing.tensors), data))
    made = lowered(ready, typing, convert_io=options.convert_io)
    plain = lowered(ready, typing) if options.convert_io else made
    kept = {one.node for one in typing.kept}
    done = tuple(
        name
        for node in ready.proto.graph.node
        if node.op_type != "Constant" and (name := node.name or node.output[0]) not in kept
        and any(out in typing.tensors for out in node.output)
    )  # fmt: skip
    found = Quantized(options.to, "", done, typing.kept, typing.lost[0], _sizes(model, made))
    return Converted(made, emulated(plain, low), options, found, ready)


def _nothing(typing: Typing) -> str:
    return typing.kept[0].why if typing.kept else "it has no float32 tensor to compute with"


def _sizes(before: Model, after: Model) -> tuple[int, int]:
    return (
        sum(weight.nbytes for weight in before.weights().values()),
        sum(weight.nbytes for weight in after.weights().values()),
    )


# -- int8 ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Trial:
    """A model to be quantized, and how it is judged."""

    model: Model
    found: Layers
    judge: Data

    def error(self, thresholds: dict[str, float], floats: Sequence[str] = ()) -> float:
        """Mean relative L2 difference of the outputs to those of the model in float."""
        made = quantized(self.model, self.found, thresholds, floats)
        drift = measure_drift(self.model, made, self.judge)
        values = [one.rel_l2 for one in drift.values()]
        return float(np.mean(values)) if values else 0.0


def _integers(model: Model, ready: Model, options: QuantizeOptions, data: Data) -> Converted:
    flat, _ = without_batch_norms(ready)
    found = find_layers(flat, _left_in(ready, options))
    if not found.layers:
        why = found.kept[0].why if found.kept else "no layer in it has weights"
        raise UnsupportedModelError(f"nothing in it can become int8: {why}")
    fit, judge = _split(data)
    ranges = Ranges(flat, found.activations, fit)
    trial = _Trial(flat, found, judge)
    methods = METHODS if options.method is None else (options.method,)
    limits = {method: dict(ranges.thresholds(method)) for method in methods}
    tried = {method: trial.error(limits[method]) for method in methods}
    best = min(methods, key=lambda method: (not np.isfinite(tried[method]), tried[method]))
    floats = options.floats or _worst(trial, limits[best], tried[best])
    made = quantized(flat, found, limits[best], floats)
    kept = [*found.kept]
    for one in found.layers:
        if one.label in floats:
            kept.append(KeptNode(one.label, one.op_type, "in int8 the outputs drift too far"))
        elif not limits[best].get(one.activation, 0.0) > 0:
            kept.append(KeptNode(one.label, one.op_type, "what it reads is zero or not finite"))
    left = {one.node for one in kept}
    done = tuple(one.label for one in found.layers if one.label not in left)
    if not done:
        raise UnsupportedModelError(f"nothing in it can become int8: {kept[0].why}")
    result = Quantized(
        "int8", best, done, tuple(kept), 0, _sizes(model, made), tried if len(tried) > 1 else {}
    )
    said = options.model_copy(update={"method": best, "floats": tuple(floats)})
    return Converted(made, None, said, result, flat)


def _split(data: Data) -> tuple[Data, Data]:
    """What ranges are taken from, and what they are judged on."""
    count = len(data.batches)
    held = count // _HELD_OUT or (1 if count > 1 else 0)
    if not held:
        return data, data
    return (
        replace(data, batches=data.batches[: count - held]),
        replace(data, batches=data.batches[count - held :]),
    )


def _worst(trial: _Trial, thresholds: dict[str, float], error: float) -> tuple[str, ...]:
    """Layers to leave in float, the worst first, until the outputs are near enough."""
    layers = trial.found.layers
    if error <= _WANTED or len(layers) < 2 or len(layers) > _MOST_TRIALS:
        return ()
    labels = [one.label for one in layers]
    alone = {
        label: trial.error(thresholds, [other for other in labels if other != label])
        for label in labels
    }
    order = sorted(labels, key=lambda label: -alone[label])
    floats: list[str] = []
    for label in order[: max(1, int(_MOST_FLOAT * len(labels)))]:
        floats.append(label)
        if trial.error(thresholds, floats) <= _WANTED:
            break
    _log.info("left in float for their drift: %s", ", ".join(floats))
    return tuple(floats)
