"""Asks TensorRT-RTX to parse and build one model, in a process of its own: it may crash or hang.

    python -m onnxprune.targets.worker < request.json

A request is one JSON object: ``model`` (path), ``result`` (path of the JSON to write), ``build``,
``sparse``, and ``profiles``: smallest, best and largest shape of each dynamic input.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

# Without a driver every error brings along one about CUDA, which says nothing about the model.
NOISE = re.compile(r"catchCudaError|cudaError|CUDA driver version|CUDA initialization", re.I)
# Lines that say where in a message one is, and which node an error names anyway.
_FRAME = re.compile(r"ModelImporter\.cpp:\d+: (While parsing|---)|Node name: *$|Invalid Node - ")
_LAST_RESORT = 1000  # the kernel ends this process first where memory runs out
_MOST_ERRORS = 50


def main() -> int:
    """Answer one request."""
    request = json.load(sys.stdin)
    with suppress(OSError):  # other systems have no such file
        Path("/proc/self/oom_score_adj").write_text(str(_LAST_RESORT))
    answer = ask(request)
    Path(request["result"]).write_text(json.dumps(answer), "utf-8")
    return 0


def ask(request: Mapping[str, Any]) -> dict[str, object]:
    """What TensorRT-RTX says of a model."""
    os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1"
    os.environ["POLYGRAPHY_AUTOINSTALL_DEPS"] = "0"
    import tensorrt_rtx as trt

    logger = _logger(trt)
    builder = trt.Builder(logger)
    typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(typed)
    parser = trt.OnnxParser(network, logger)
    answer: dict[str, object] = {"version": trt.__version__, "seconds": {}, "errors": []}
    begun = time.perf_counter()
    parsed = parser.parse_from_file(request["model"])
    seconds = {"parse": time.perf_counter() - begun}
    answer |= {"seconds": seconds, "status": "parsed" if parsed else "refused"}
    if not parsed:
        answer["errors"] = _parser_errors(parser, request["model"]) or _said(logger.errors, ())
        return answer
    if not request["build"]:
        return answer
    begun = time.perf_counter()
    size = _build(builder, network, request)
    seconds["build"] = time.perf_counter() - begun
    names = [network.get_layer(at).name for at in range(network.num_layers)]
    answer["status"] = "built" if size else "failed"
    answer["engine_bytes"] = size
    answer["errors"] = [] if size else _said(logger.errors, names)
    return answer


def _logger(trt: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]  # a class of theirs, which has no types
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.errors.append(message)

    return Logger()


def _build(builder: Any, network: Any, request: Mapping[str, Any]) -> int:
    """Bytes of the engine, 0 where there is none; the logger knows why."""
    from polygraphy.backend.trt import CreateConfig, EngineBytesFromNetwork, Profile
    from polygraphy.exception import PolygraphyException

    profile = Profile()
    inputs = [network.get_input(at) for at in range(network.num_inputs)]
    for tensor in inputs:
        shapes = request["profiles"].get(tensor.name)
        if shapes is not None and not tensor.is_shape_tensor:
            profile.add(tensor.name, *(tuple(shape) for shape in shapes))
    try:
        filled = profile.fill_defaults(network)
        config = CreateConfig(profiles=[filled], sparse_weights=bool(request["sparse"]))
        engine = EngineBytesFromNetwork((builder, network), config)()
    except PolygraphyException:
        return 0
    return int(getattr(engine, "nbytes", None) or len(engine))


def _parser_errors(parser: Any, path: str) -> list[dict[str, str]]:
    """Errors with the nodes they are about, each once."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for at in range(min(parser.num_errors, _MOST_ERRORS)):
        error = parser.get_error(at)
        text = plainly(error.desc())
        if NOISE.search(text):
            continue
        operator, name = error.node_operator(), error.node_name()
        if operator and not name and not error.local_function_stack_size():
            name = _first_output(path, error.node(), operator)
        where = f"{operator} '{name}'" if name else operator
        found.setdefault((where, text), {"node": where, "message": text})
    return list(found.values())


def _first_output(path: str, index: int, operator: str) -> str:
    """What to call a node without a name; "" where the index is not one of the main graph."""
    import onnx

    nodes = onnx.load(path, load_external_data=False).graph.node
    if not 0 <= index < len(nodes) or nodes[index].op_type != operator:
        return ""
    return next((name for name in nodes[index].output if name), "")


def _said(errors: Sequence[str], names: Iterable[str]) -> list[dict[str, str]]:
    """Errors of the builder, those about the missing driver last and only if there are no others.

    Of the layers an error names, the longest name counts.
    """
    texts = list(dict.fromkeys(map(plainly, errors)))
    telling = [text for text in texts if not NOISE.search(text)] or texts[-1:]
    known = sorted((name for name in names if name), key=len, reverse=True)
    return [
        {"node": next((name for name in known if name in text), ""), "message": text}
        for text in telling[:_MOST_ERRORS]
    ]


def plainly(text: str) -> str:
    """One line, without noise and the names of NVIDIA's source files.

    A text that is all noise stays, so that there is one.
    """
    lines = [line.strip() for line in text.splitlines()]
    telling = [line for line in lines if line and not NOISE.search(line) and not _FRAME.match(line)]
    line = " ".join(" ".join(telling or lines).split())
    line = re.sub(r"\s*\bIn [\w:~()]+ at \S+?:\d+", "", line)
    line = re.sub(r"^Assertion failed: ", "", line)
    line = re.sub(
        r'^[^"]*&& "([^"]*)"\.?$', r"\1", line
    )  # a condition of theirs, and what it means
    # Of an operator that it has no code for, the parser says no more than that a check failed.
    return "TensorRT does not know this operator" if line == "false" else line


if __name__ == "__main__":
    sys.exit(main())
