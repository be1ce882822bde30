"""ONNX Runtime, behind one door: the only module that makes sessions.

One kind of error, nothing on stdout or stderr, and tensors that numpy itself does not know
(bfloat16, float8) as ``ml_dtypes`` arrays.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from onnxprune.errors import VerificationError
from onnxprune.io import runnable
from onnxprune.model import Model
from onnxprune.types import AnyArray

if TYPE_CHECKING:
    import onnxruntime

_ELEMENT_TYPE = {
    "float": onnx.TensorProto.FLOAT,
    "double": onnx.TensorProto.DOUBLE,
    "float16": onnx.TensorProto.FLOAT16,
    "bfloat16": onnx.TensorProto.BFLOAT16,
    "float8e4m3fn": onnx.TensorProto.FLOAT8E4M3FN,
    "float8e4m3fnuz": onnx.TensorProto.FLOAT8E4M3FNUZ,
    "float8e5m2": onnx.TensorProto.FLOAT8E5M2,
    "float8e5m2fnuz": onnx.TensorProto.FLOAT8E5M2FNUZ,
    "int8": onnx.TensorProto.INT8,
    "int16": onnx.TensorProto.INT16,
    "int32": onnx.TensorProto.INT32,
    "int64": onnx.TensorProto.INT64,
    "uint8": onnx.TensorProto.UINT8,
    "uint16": onnx.TensorProto.UINT16,
    "uint32": onnx.TensorProto.UINT32,
    "uint64": onnx.TensorProto.UINT64,
    "bool": onnx.TensorProto.BOOL,
    "string": onnx.TensorProto.STRING,
}
# The way out for a model that cannot be run here.
UNPROVED = "--verify none writes the result without a proof"
_MISSING = "Could not find an implementation"  # ONNX Runtime's words where it lacks a kernel
_NO_BF16 = "it has no bfloat16 kernels on a CPU"
_FLOAT_FIRST = "work on the float32 model, and quantize last"
_FATAL = 4  # ONNX Runtime's log severity that lets only fatal errors through.
_LONGEST_REASON = 400
_KERNEL = "_kernel_time"  # how a profile marks the event that is a kernel's own time
_WARM_UP = 2
_TICKS = 3  # µs that two runs of the shortest kernel differ by


class RuntimeUnavailable(VerificationError):  # noqa: N818  (a condition, named as the others speak of it)
    """ONNX Runtime cannot load or run a model; ``reason`` is its own words in one line."""

    def __init__(self, message: str, *, reason: str, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Session:
    """A loaded model.

    Attributes:
        inputs: Type of every tensor input that has to be fed, by name.
        outputs: Names of the outputs that are tensors, in graph order.
        skipped: Names of the outputs that are not (sequences, maps, optionals, 4-bit tensors).
    """

    inputs: Mapping[str, np.dtype[np.generic]]
    outputs: tuple[str, ...]
    skipped: tuple[str, ...]
    _raw: onnxruntime.InferenceSession

    def run(self, feeds: Mapping[str, AnyArray]) -> dict[str, AnyArray]:
        """Run the model once.

        Args:
            feeds: An array for every name in ``inputs``.

        Returns:
            An array for every name in ``outputs``; strings as object arrays.

        Raises:
            RuntimeUnavailable: The runtime refuses the feeds or fails on the way.
        """
        import onnxruntime

        options = onnxruntime.RunOptions()
        options.log_severity_level = _FATAL
        names = [*self.outputs] or None
        with _one_line("ONNX Runtime cannot run the model"):
            if self._speaks_numpy():
                values = self._raw.run(names, dict(feeds), options)
            else:
                wrapped = {name: _to_ort(array) for name, array in feeds.items()}
                values = [
                    _from_ort(value)
                    for value in self._raw.run_with_ort_values(names, wrapped, options)
                ]
        return dict(zip(self.outputs, values, strict=False))

    def _speaks_numpy(self) -> bool:
        types = [*self._raw.get_inputs(), *self._raw.get_outputs()]
        return all(_numpy_type(value.type) is None or _is_native(value.type) for value in types)


def session(model: Model, *, optimise: bool = True, threads: int | None = None) -> Session:
    """Load ``model`` into ONNX Runtime on the CPU.

    Args:
        model: What to load.
        optimise: Let the runtime rewrite the graph; off gives the plain arithmetic of each node.
        threads: Threads inside an operator; None takes one for each usable core.

    Raises:
        RuntimeUnavailable: The runtime cannot load the model.
    """
    return _load(model, _options(optimise, threads))


def _options(optimise: bool, threads: int | None) -> onnxruntime.SessionOptions:
    import onnxruntime

    onnxruntime.set_default_logger_severity(_FATAL)
    onnxruntime.set_seed(0)  # Random operators without a seed of their own repeat.
    level = onnxruntime.GraphOptimizationLevel
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _FATAL
    options.use_deterministic_compute = True
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimise else level.ORT_DISABLE_ALL
    options.intra_op_num_threads = threads or usable_cores()
    options.inter_op_num_threads = 1
    return options


def _load(model: Model, options: onnxruntime.SessionOptions) -> Session:
    import onnxruntime

    what = "ONNX Runtime cannot load the model"
    try:
        with _one_line(what), runnable(model) as source:
            raw = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except RuntimeUnavailable as error:
        if _MISSING not in error.reason or not _brain_floats(model):
            raise
        raise RuntimeUnavailable(
            f"{what}: {_NO_BF16}", reason=_NO_BF16, hint=_FLOAT_FIRST
        ) from error
    inputs = {value.name: _numpy_type(value.type) for value in raw.get_inputs()}
    odd = [name for name, dtype in inputs.items() if dtype is None]
    if odd:
        reason = f"input '{odd[0]}' is not a tensor that can be fed from numpy"
        raise RuntimeUnavailable(reason, reason=reason, hint=UNPROVED)
    outputs = {value.name: _numpy_type(value.type) for value in raw.get_outputs()}
    return Session(
        inputs={name: dtype for name, dtype in inputs.items() if dtype is not None},
        outputs=tuple(name for name, dtype in outputs.items() if dtype is not None),
        skipped=tuple(name for name, dtype in outputs.items() if dtype is None),
        _raw=raw,
    )


def _brain_floats(model: Model) -> bool:
    """Whether a model reads bfloat16 tensors, or has such weights."""
    kinds = {value.type.tensor_type.elem_type for value in model.proto.graph.input}
    kinds |= {weight.data_type for weight in model.weights().values()}
    return onnx.TensorProto.BFLOAT16 in kinds


def accepts(model: Model, feeds: Mapping[str, AnyArray]) -> str | None:
    """None when the runtime runs ``model`` on ``feeds``, else the reason why not."""
    try:
        session(model).run(feeds)
    except RuntimeUnavailable as error:
        return error.reason
    return None


@dataclass(frozen=True, slots=True)
class Kernel:
    """One node of the graph that the runtime made of a model, and how long it takes.

    Attributes:
        name: Its name there; a node in the blocked layout is named after the tensor it makes.
        op_type: Its operator.
        inputs: The tensors it reads, by the names of the optimised graph.
        outputs: The tensors it makes, likewise.
        shape: Shape of its first output, channels rounded up where its layout is blocked.
        seconds: Mean of the faster half of the runs: what slows a run down is other programs.
    """

    name: str
    op_type: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    shape: tuple[int, ...]
    seconds: float


def profile(
    model: Model,
    feeds: Mapping[str, AnyArray],
    *,
    runs: int,
    threads: int | None = None,
    tensors: bool = True,
    between: Callable[[], object] | None = None,
) -> tuple[Kernel, ...]:
    """Time every kernel of the optimised model, in the order they run.

    Args:
        model: What to run.
        feeds: An array for every input.
        runs: Runs to time, after two that are not.
        threads: As in ``session``.
        tensors: Also say what each kernel reads and makes, for which the optimised model is
            written out once.
        between: Called before every run.

    Raises:
        RuntimeUnavailable: The runtime cannot load or run the model.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = _options(True, threads)
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        optimised = Path(folder) / "optimised.onnx"
        if tensors:
            options.optimized_model_filepath = str(optimised)
            options.add_session_config_entry(
                "session.optimized_model_external_initializers_file_name", "weights.bin"
            )
        loaded = _load(_named(model) if tensors else model, options)
        for _ in range(_WARM_UP + runs):
            if between is not None:
                between()
            loaded.run(feeds)
        events = json.loads(Path(loaded._raw.end_profiling()).read_text("utf-8"))
        nodes = onnx.load(optimised, load_external_data=False).graph.node if tensors else ()
    named = {node.name: node for node in nodes}
    found: dict[str, list[dict[str, Any]]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(_KERNEL):
            found.setdefault(event["name"].removesuffix(_KERNEL), []).append(event)
    return tuple(
        _kernel(name, of_one, named.get(name), _WARM_UP * len(of_one) // (_WARM_UP + runs))
        for name, of_one in found.items()
    )


def _named(model: Model) -> Model:
    """The model with a name of its own for each node, without which a profile tells none apart."""
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    for node in proto.graph.node:
        node.name = next((name for name in node.output if name), node.name)
    return Model(proto, model.directory, model.deferred)


def _kernel(
    name: str, events: Sequence[dict[str, Any]], node: onnx.NodeProto | None, skip: int
) -> Kernel:
    spent = sorted(event["dur"] for event in events[skip:])
    # Where other programs run beside, the same kernel of each run may be the one that has to wait.
    calm = [one for one in spent if one <= 2 * spent[0] + _TICKS]
    half = calm[: (len(spent) + 1) // 2]
    shapes = events[0]["args"].get("output_type_shape") or [{}]
    return Kernel(
        name=name,
        op_type=str(events[0]["args"]["op_name"]),
        inputs=tuple(node.input) if node is not None else (),
        outputs=tuple(node.output) if node is not None else (),
        shape=tuple(next(iter(shapes[0].values()), ())),
        seconds=sum(half) / len(half) * 1e-6,
    )


def cannot_run(error: RuntimeUnavailable, model: Model, *, hint: str = "") -> VerificationError:
    """What to tell a user whose own model the runtime does not take."""
    which = "this model" if model.path is None else f"'{model.path}'"
    if error.hint == _FLOAT_FIRST:
        hint = f"{hint}; or {_FLOAT_FIRST}" if hint else _FLOAT_FIRST
    return VerificationError(f"ONNX Runtime cannot run {which}: {error.reason}", hint=hint)


def usable_cores() -> int:
    """Number of cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _numpy_type(spelled: str) -> np.dtype[np.generic] | None:
    """Array type of an ONNX Runtime type such as ``tensor(float)``; None where numpy has none."""
    match = re.fullmatch(r"tensor\((\w+)\)", spelled)
    element = _ELEMENT_TYPE.get(match[1]) if match else None
    if element is None:
        return None
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(element))


def _is_native(spelled: str) -> bool:
    """Whether the runtime's own numpy bridge knows the type."""
    return "bfloat16" not in spelled and "float8" not in spelled


def _to_ort(array: AnyArray) -> onnxruntime.OrtValue:
    """Wrap an array of any tensor type."""
    import onnxruntime

    array = np.ascontiguousarray(array)
    element = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
    if array.dtype.kind != "V" and array.dtype.isbuiltin == 1:
        return onnxruntime.OrtValue.ortvalue_from_numpy(array)
    bits = array.view(np.dtype(f"u{array.dtype.itemsize}"))
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, element)


def _from_ort(value: onnxruntime.OrtValue) -> AnyArray:
    """Copy a tensor out of the runtime, also where it has no numpy bridge for the type."""
    dtype = _numpy_type(value.data_type())
    if dtype is None or _is_native(value.data_type()):
        return np.asarray(value.numpy())
    shape = tuple(value.shape())
    size = int(np.prod(shape)) * dtype.itemsize
    raw = ctypes.string_at(value.data_ptr(), size) if size else b""
    return np.frombuffer(raw, dtype).reshape(shape)


@contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Turn whatever the runtime raises into one ``RuntimeUnavailable``."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    kinds: tuple[type[Exception], ...] = (RuntimeError, ValueError, TypeError, IndexError)
    for kind in vars(state).values():  # The runtime's errors have no base class of their own.
        if isinstance(kind, type) and issubclass(kind, Exception):
            kinds += (kind,)
    try:
        yield
    except kinds as error:
        reason = _clean(str(error))
        raise RuntimeUnavailable(f"{what}: {reason}", reason=reason) from error


def _clean(message: str) -> str:
    """The runtime's message in one line, without error codes, C++ paths and signatures."""
    text = " ".join(message.split())
    text = re.sub(r"\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    text = re.sub(r"^(?:Fatal error|Error): ", "", text)
    text = re.sub(r"Load model from \S+ failed: ?", "", text)
    while (match := re.search(r"\S+\.(?:cc|cpp|cu|h|hpp|inl):\d+ ", text)) is not None:
        text = text[: match.start()] + _after_signature(text[match.end() :])
    text = text.strip(" .")
    if len(text) > _LONGEST_REASON:
        text = text[: _LONGEST_REASON - 1] + "…"
    return text or "no reason given"


def _after_signature(text: str) -> str:
    """What follows a C++ function's signature at the start of ``text``."""
    depth = 0
    for position, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if character == ")" and depth == 0:
            rest = text[position + 1 :].lstrip()
            rest = re.sub(r"^(?:const|noexcept)\b\s*", "", rest)
            return re.sub(r"^\[with [^\]]*\]\s*", "", rest)
    return text
