"""Rules about the file: where its weights lie, its versions, what is stored in it and how."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from onnxprune.model import Model
from onnxprune.presented import domain_of
from onnxprune.stream import INLINE_LIMIT
from onnxprune.targets.findings import ERROR, NOTE, WARNING, Finding, Profile
from onnxprune.targets.nodes import bodies
from onnxprune.targets.profiles import spelled

# Conv and Relu were parsed and built at each of these by TensorRT-RTX 1.7 (tools/notes/0014).
_OPSETS, _IRS = range(1, 28), range(1, 16)


def file_findings(model: Model) -> Iterator[Finding]:
    """What TensorRT would mind in the file itself."""
    yield from _versions(model)
    for body in bodies(model):
        if body.graph is not None and len(body.graph.sparse_initializer):
            name = body.graph.sparse_initializer[0].values.name
            # Measured: "Node input was not registered".
            yield Finding(
                ERROR, "sparse-initializer", "",
                f"'{name}' is stored as a sparse tensor, which TensorRT's parser does not read",
                "store it dense: zeros cost no time, and compress well",
            )  # fmt: skip
    outside = [path.name for path in model.sources if path != model.path]
    if outside:
        yield Finding(
            NOTE, "external-data", "",
            f"weights lie in {', '.join(outside)}: TensorRT reads them from the folder of the "
            "model, when it parses a path and not bytes",
            "copy the files together",
        )  # fmt: skip
    if model.file_bytes > INLINE_LIMIT:
        yield Finding(
            NOTE, "large", "",
            f"{model.file_bytes / 1e9:.1f} GB in all: from Python, parse_from_file(path) takes it, "
            "parse(bytes) does not",
        )  # fmt: skip


def _versions(model: Model) -> Iterator[Finding]:
    opset = next(
        (one.version for one in model.proto.opset_import if not domain_of(one.domain)), None
    )
    tried = ((opset, "opset", _OPSETS), (model.proto.ir_version, "IR version", _IRS))
    for version, what, range_ in tried:
        if version is not None and version not in range_:
            yield Finding(
                WARNING, "version", "",
                f"{what} {version} was not tried: {range_[0]} to {range_[-1]} were",
                f"export with a lower {what}",
            )  # fmt: skip


def profile_findings(profiles: Mapping[str, Profile]) -> Iterator[Finding]:
    """Inputs of open shape, with the shapes the engine is for."""
    for name, profile in profiles.items():
        low, best, high = (
            spelled({name: profile}, which).rpartition(":")[2]
            for which in (lambda p: p.least, lambda p: p.best, lambda p: p.most)
        )
        whose = "as given" if profile.given else "chosen by onnxprune, at which it is analysed"
        yield Finding(
            NOTE, "profile", "",
            f"input '{name}' has an open shape: the engine is for {low} to {high}, tuned for "
            f"{best} ({whose})",
            "" if profile.given else "give yours: --min-shape --opt-shape --max-shape NAME:1x3x…",
        )  # fmt: skip
