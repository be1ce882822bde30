"""A model checked for TensorRT: our own rules, and where it is installed TensorRT-RTX itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from onnxprune.model import Model
from onnxprune.targets.builder import EXTRA
from onnxprune.targets.files import file_findings, profile_findings
from onnxprune.targets.findings import ERROR, SEVERITIES, WARNING, Build, Checked, Finding, Profile
from onnxprune.targets.layered import sparse_findings, weights_of, width_findings
from onnxprune.targets.operators import operator_findings
from onnxprune.targets.quantized import quantized_findings
from onnxprune.targets.trtexec import trtexec
from onnxprune.types import LayerReport
from onnxprune.weights import sparse_layers

Builder = Callable[[Model, Mapping[str, Profile], bool], Build]
NOT_INSTALLED = f"TensorRT itself was not asked, these are our own rules: {EXTRA}"
NOT_WANTED = "TensorRT itself was not asked: --no-build"
_SHAPES = ("violate shape constraints", "optimization profile", "kOPT", "kMIN", "kMAX")


def checked(
    model: Model,
    path: str,
    layers: Sequence[LayerReport],
    profiles: Mapping[str, Profile],
    builder: Builder | None,
    *,
    wanted: bool = True,
) -> Checked:
    """All that can be said of a model before it meets a GPU.

    Args:
        model: The model.
        path: Its file, or the one it will have.
        layers: Its layers, with the channels of each side.
        profiles: Shapes of dynamic inputs.
        builder: Asks TensorRT-RTX; None where it is not to be asked.
        wanted: It is to be asked if it can be.
    """
    weights = weights_of(sparse_layers(model))
    ours = (
        *file_findings(model),
        *operator_findings(model),
        *quantized_findings(model),
        *profile_findings(profiles),
        *width_findings(layers),
        *sparse_findings(weights),
    )
    build = None if builder is None else builder(model, profiles, bool(weights.eligible))
    following = trtexec(path, weights, profiles)
    return Checked(
        target="tensorrt",
        findings=_together(ours, build),
        build=build,
        unasked="" if build is not None else NOT_INSTALLED if wanted else NOT_WANTED,
        profiles=profiles,
        command=following.command,
        expect=following.expect,
    )


def _together(ours: Sequence[Finding], build: Build | None) -> tuple[Finding, ...]:
    """Ours and TensorRT's, the worst first; where both speak of a node, it has the last word."""
    theirs: Sequence[Finding] = () if build is None else build.findings
    if build is not None and build.built:
        ours = [
            replace(one, severity=WARNING, message=f"{one.message}; {build.version} built it "
                    "all the same") if one.severity == ERROR else one
            for one in ours
        ]  # fmt: skip
    cures = {one.node: one.cure for one in ours if one.severity == ERROR and one.node}
    cured = [replace(one, cure=one.cure or cures.get(one.node) or _cure(one)) for one in theirs]
    return tuple(sorted((*cured, *ours), key=lambda one: SEVERITIES.index(one.severity)))


def _cure(one: Finding) -> str:
    if any(words in one.message for words in _SHAPES):
        return "give shapes it can run at: --min-shape --opt-shape --max-shape NAME:1x3x224x224"
    return ""
