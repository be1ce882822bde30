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
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxprune.targets.worker import NOISE, plainly

TYPES = ("float", "float16", "bfloat16", "double", "int8", "uint8", "int32", "int64", "bool")
_CASES = 12  # of one operator that are asked about as they are
_RETYPED = 2  # of those that are taken, in how many other types are tried
_PATIENCE = 300  # seconds for one operator


# Operators that ONNX has no test of with one node.
_OTHERS = {
    "GlobalLpPool": "g (float[1,8,8,8] x) => (float[1,8,1,1] y) {y = GlobalLpPool(x)}",
    "Multinomial": "g (float[2,8] x) => (int32[2,1] y) {y = Multinomial(x)}",
    "RandomNormal": "g (float[2,3] x) => (float[2,3] y) {r = RandomNormal<shape=[2,3]>() "
    "y = Add(x, r)}",
    "RandomNormalLike": "g (float[2,3] x) => (float[2,3] y) {y = RandomNormalLike(x)}",
    "RandomUniform": "g (float[2,3] x) => (float[2,3] y) {r = RandomUniform<shape=[2,3]>() "
    "y = Add(x, r)}",
    "RandomUniformLike": "g (float[2,3] x) => (float[2,3] y) {y = RandomUniformLike(x)}",
    "SequenceConstruct": "g (float[2,3] x) => (float[2,3] y) {s = SequenceConstruct(x, x) "
    "i = Constant<value_int=0>() y = SequenceAt(s, i)}",
}


@dataclass
class Case:
    """A model, and arrays for its inputs; none where it is asked about as it is only."""

    model: onnx.ModelProto
    arrays: list[Any]


def cases() -> dict[str, list[Case]]:
    """ONNX's own backend tests of one node, by operator of the standard domain, and a few more."""
    from onnx.backend.test.case.node import collect_testcases

    found = defaultdict(list)
    for case in collect_testcases(None):
        nodes = case.model.graph.node
        if len(nodes) == 1 and nodes[0].domain in ("", "ai.onnx") and case.data_sets:
            found[nodes[0].op_type].append(Case(case.model, list(case.data_sets[0][0])))
    for name, text in _OTHERS.items():
        model = onnx.parser.parse_model('<ir_version: 10, opset_import: ["" : 21]>\n' + text)
        found[name].append(Case(model, []))
    return found


def variants(case: Case) -> Iterator[tuple[str, onnx.ModelProto]]:
    """The model as it is, with its first output only, and with inputs as constants.

    First with all inputs but the first as constants, then with all.
    """
    yield "free", case.model
    names = [value.name for value in case.model.graph.input]
    usable = all(isinstance(one, np.ndarray) for one in case.arrays) and case.arrays
    for outputs in dict.fromkeys((len(case.model.graph.output), 1)):
        model = onnx.ModelProto()
        model.CopyFrom(case.model)
        if outputs < len(case.model.graph.output):
            del model.graph.output[outputs:]
            del model.graph.node[0].output[outputs:]
            yield "free", model
        for free, how in ((1, "constant"), (0, "all constant")) if usable else ():
            if len(names) > free:
                fixed = onnx.ModelProto()
                fixed.CopyFrom(model)
                del fixed.graph.input[free:]
                for name, array in zip(names[free:], case.arrays[free:], strict=False):
                    fixed.graph.initializer.append(numpy_helper.from_array(array, name))
                yield how, fixed


def typed(model: onnx.ModelProto, kind: int) -> Iterator[onnx.ModelProto]:
    """The model with its first input in another type.

    First with all that ONNX ties to that type, then with all that had the same: GridSample may have
    its grid in another type than its data, but TensorRT wants one.
    """
    node, schema = model.graph.node[0], schema_of(model)
    old = model.graph.input[0].type.tensor_type.elem_type
    values = (*model.graph.input, *model.graph.output)
    if not all(value.type.HasField("tensor_type") for value in values):
        return
    tied = {
        name
        for given, formal in ((node.input, schema.inputs), (node.output, schema.outputs))
        for name, one in zip(given, spread(formal, len(given)), strict=False)
        if one.type_str == schema.inputs[0].type_str
    }
    same = {value.name for value in values if value.type.tensor_type.elem_type == old}
    same |= {tensor.name for tensor in model.graph.initializer if tensor.data_type == old}
    for names in (tied, same) if tied != same else (tied,):
        made = onnx.ModelProto()
        made.CopyFrom(model)
        for value in (*made.graph.input, *made.graph.output):
            if value.name in names:
                value.type.tensor_type.elem_type = kind
        for tensor in made.graph.initializer:
            if tensor.name in names:
                array = numpy_helper.to_array(tensor)
                dtype = helper.tensor_dtype_to_np_dtype(kind)
                tensor.CopyFrom(numpy_helper.from_array(array.astype(dtype), tensor.name))
        yield made


def spread(formal: Sequence[Any], count: int) -> list[Any]:
    """What a schema says of each input or output; the last stands for all further ones."""
    return [formal[min(at, len(formal) - 1)] for at in range(count)] if formal else []


def schema_of(model: onnx.ModelProto) -> Any:
    """Schema of the model's first node."""
    version = next(one.version for one in model.opset_import if one.domain in ("", "ai.onnx"))
    return onnx.defs.get_schema(model.graph.node[0].op_type, version)


def allowed(model: onnx.ModelProto) -> set[str]:
    """Element types that ONNX allows for the first input of the model's node."""
    inputs = schema_of(model).inputs
    if len(model.graph.node) > 1 or not inputs:
        return set()
    return {spelled[7:-1] for spelled in inputs[0].types if spelled.startswith("tensor(")}


def said(model: onnx.ModelProto) -> str:
    """ "" where TensorRT-RTX parses and builds a model."""
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
        who, texts = "parser", [parser.get_error(at).desc() for at in range(parser.num_errors)]
    else:
        from polygraphy.backend.trt import CreateConfig, Profile

        config = CreateConfig(profiles=[Profile().fill_defaults(network)])(builder, network)
        if builder.build_serialized_network(network, config) is not None:
            return "", ""
        who, texts = "builder", logger.errors
    told = [text for text in texts if not NOISE.search(text)] or texts or ["no reason given"]
    return who, plainly(told[0])[:200]


Answer = tuple[str, str, tuple[str, str]]  # how asked, element type, who complains and how


def operator(found: list[Case], out: Any) -> None:
    """All there is to say of one operator, sent on as it is found."""
    taken = 0
    for case in found[:_CASES]:
        first = case.model.graph.input[0].type if case.model.graph.input else None
        if first is None or not first.HasField("tensor_type"):
            continue
        spelled = TensorProto.DataType.Name(first.tensor_type.elem_type).lower()
        for how, model in variants(case):
            if how == "all constant" and taken:
                continue
            complaint = said(model)
            out.put((how, spelled, complaint))
            if complaint[0] or how == "all constant":
                taken += not complaint[0]
                continue
            taken += 1
            if taken > _RETYPED:
                continue
            for other in sorted(set(TYPES) & allowed(model) - {spelled}):
                for made in typed(model, TensorProto.DataType.Value(other.upper())):
                    out.put((how, other, said(made)))
    out.put(None)


def asked(found: list[Case]) -> list[Answer]:
    """``operator`` in a process of its own."""
    context = multiprocessing.get_context("fork")
    out = context.SimpleQueue()
    process = context.Process(target=operator, args=(found, out))
    process.start()
    answers: list[Answer] = []
    reader = out._reader  # type: ignore[attr-defined]  # the only way to wait with a limit
    until = time.monotonic() + _PATIENCE
    while time.monotonic() < until:
        if reader.poll(1):
            answer = out.get()
            if answer is None:
                break
            answers.append(answer)
        elif not process.is_alive():
            answers.append(("free", "?", ("parser", f"the process died: {process.exitcode}")))
            break
    process.kill()
    process.join()
    return answers


def summed(answers: list[Answer]) -> dict[str, Any] | None:
    """One operator's entry; None where nothing was asked of it."""
    if not answers:
        return None
    taken = sorted({kind for _, kind, (who, _) in answers if not who})
    refused: dict[str, list[str]] = {}
    for _, kind, (who, text) in answers:
        if who and kind not in taken:
            refused.setdefault(kind, [who, text])
    entry: dict[str, Any] = {"types": taken}
    if taken:
        return entry | {"refused": refused}
    # The builder's complaint, if there is one: then some test got further than the parser.
    complaints = sorted((who, at, text) for at, (*_, (who, text)) in enumerate(answers))
    return entry | {"said": [complaints[0][0], complaints[0][2]]}


def main() -> int:
    import tensorrt_rtx as trt

    table = {}
    for name, found in sorted(cases().items()):
        entry = summed(asked(found))
        print(name, entry, file=sys.stderr, flush=True)
        if entry is not None:
            table[name] = entry
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
