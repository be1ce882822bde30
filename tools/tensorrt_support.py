"""Ask TensorRT-RTX's parser and builder which operators they take, in which element types.

    python tools/tensorrt_support.py onnxprune/targets/tensorrt.json

Needs the extra `tensorrt`; asks nothing of a GPU; minutes. The models are those that ONNX tests
backends with, of one node each, so that nothing is found out about two nodes together. Each is
asked about as it is, then with all inputs but the first as constants, then with all; where it is
taken, once more in every other element type that ONNX allows for its first input. An operator that
TensorRT takes in one of these cases is listed with the types; one that it takes in none, with what
it said.
"""

from __future__ import annotations

import json
import multiprocessing
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

TYPES = ("float", "float16", "bfloat16", "double", "int8", "uint8", "int32", "int64", "bool")
_NOISE = re.compile(r"catchCudaError|cudaError", re.I)
_CASES = 12  # of one operator that are asked about as they are
_RETYPED = 2  # of those that are taken, in how many other types are tried
_PATIENCE = 300  # seconds for one operator


def cases() -> dict[str, list[Any]]:
    """ONNX's own backend tests of one node, by operator of the standard domain."""
    from onnx.backend.test.case.node import collect_testcases

    found = defaultdict(list)
    for case in collect_testcases(None):
        nodes = case.model.graph.node
        if len(nodes) == 1 and nodes[0].domain in ("", "ai.onnx") and case.data_sets:
            found[nodes[0].op_type].append(case)
    return found


def variants(case: Any) -> Iterator[tuple[str, onnx.ModelProto]]:
    """The model as it is, and with all inputs but the first as constants."""
    yield "free", case.model
    arrays = case.data_sets[0][0]
    names = [value.name for value in case.model.graph.input]
    if not all(isinstance(one, np.ndarray) for one in arrays):
        return
    for free, how in ((1, "constant"), (0, "all constant")):
        if len(names) > free:
            fixed = onnx.ModelProto()
            fixed.CopyFrom(case.model)
            del fixed.graph.input[free:]
            for name, array in zip(names[free:], arrays[free:], strict=False):
                fixed.graph.initializer.append(numpy_helper.from_array(array, name))
            yield how, fixed


def typed(model: onnx.ModelProto, kind: int) -> onnx.ModelProto | None:
    """The model with every tensor that has the first input's type in another, None if none."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    old = made.graph.input[0].type.tensor_type.elem_type
    for value in (*made.graph.input, *made.graph.output):
        if not value.type.HasField("tensor_type"):
            return None
        if value.type.tensor_type.elem_type == old:
            value.type.tensor_type.elem_type = kind
    for tensor in made.graph.initializer:
        if tensor.data_type == old:
            array = numpy_helper.to_array(tensor)
            dtype = helper.tensor_dtype_to_np_dtype(kind)
            tensor.CopyFrom(numpy_helper.from_array(array.astype(dtype), tensor.name))
    return made


def allowed(model: onnx.ModelProto) -> set[str]:
    """Element types that ONNX allows for the first input of the model's node."""
    node = model.graph.node[0]
    version = next(one.version for one in model.opset_import if one.domain in ("", "ai.onnx"))
    schema = onnx.defs.get_schema(node.op_type, version)
    return {spelled[7:-1] for spelled in schema.inputs[0].types if spelled.startswith("tensor(")}


def said(model: onnx.ModelProto) -> str:
    """ "" where TensorRT-RTX parses and builds a model, else its first complaint."""
    import os

    os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1"
    import tensorrt_rtx as trt

    class Silent(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)

    logger = Silent()
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model.SerializeToString()):
        texts = [parser.get_error(at).desc() for at in range(parser.num_errors)]
    else:
        from polygraphy.backend.trt import CreateConfig, Profile

        config = CreateConfig(profiles=[Profile().fill_defaults(network)])(builder, network)
        if builder.build_serialized_network(network, config) is not None:
            return ""
        texts = logger.errors
    told = [text for text in texts if not _NOISE.search(text)] or texts or ["no reason given"]
    return re.sub(r"^Assertion failed: ", "", " ".join(told[0].split()))[:200]


def operator(name: str, found: list[Any], out: Any) -> None:
    """All there is to say of one operator, sent on as it is found."""
    taken = 0
    for case in found[:_CASES]:
        if not case.model.graph.input or not case.model.graph.input[0].type.HasField("tensor_type"):
            continue
        kind = case.model.graph.input[0].type.tensor_type.elem_type
        spelled = TensorProto.DataType.Name(kind).lower()
        for how, model in variants(case):
            if how == "all constant" and taken:
                break
            complaint = said(model)
            out.put((name, how, spelled, complaint))
            if complaint or how == "all constant":
                taken += not complaint
                continue
            taken += 1
            if taken > _RETYPED:
                continue
            for other in sorted(set(TYPES) & allowed(model) - {spelled}):
                made = typed(model, TensorProto.DataType.Value(other.upper()))
                if made is not None:
                    out.put((name, how, other, said(made)))
    out.put(None)


def asked(name: str, found: list[Any]) -> list[tuple[str, str, str, str]]:
    """``operator`` in a process of its own."""
    context = multiprocessing.get_context("fork")
    out = context.SimpleQueue()
    process = context.Process(target=operator, args=(name, found, out))
    process.start()
    answers = []
    reader = out._reader  # type: ignore[attr-defined]  # the only way to wait with a limit
    while reader.poll(_PATIENCE if process.is_alive() else 0):
        answer = out.get()
        if answer is None:
            break
        answers.append(answer)
        if not process.is_alive() and not reader.poll(0):
            break
    process.join(1)
    if process.is_alive():
        process.kill()
    elif process.exitcode:
        answers.append((name, "free", "?", f"the process died: {process.exitcode}"))
    return answers


def summed(answers: list[tuple[str, str, str, str]]) -> dict[str, Any]:
    """One operator's entry."""
    taken = sorted({kind for _, _, kind, complaint in answers if not complaint})
    free = {kind for _, how, kind, complaint in answers if how == "free" and not complaint}
    complaints = [complaint for *_, complaint in answers if complaint]
    refused: dict[str, str] = {}
    for _, _, kind, complaint in answers:
        if complaint and kind not in taken:
            refused.setdefault(kind, complaint)
    entry: dict[str, Any] = {"types": taken}
    if taken and not free:
        entry["constants_only"] = True
    if taken:
        entry["refused"] = refused
    else:
        entry["said"] = next(iter(complaints), "not asked: it takes no tensor first")
    return entry


def main() -> int:
    import tensorrt_rtx as trt

    table = {}
    for name, found in sorted(cases().items()):
        table[name] = summed(asked(name, found))
        print(name, table[name], file=sys.stderr, flush=True)
    page = {
        "source": {
            "asked": f"TensorRT-RTX {trt.__version__}, ONNX parser and builder, no GPU",
            "cases": f"onnx {onnx.__version__} backend tests of one node, opset of the test",
            "by": "tools/tensorrt_support.py",
        },
        "operators": table,
    }
    Path(sys.argv[1]).write_text(json.dumps(page, indent=1) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
