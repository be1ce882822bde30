"""The line that builds and times an engine with NVIDIA's ``trtexec``, and what to expect of it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

from onnxprune.model import Model
from onnxprune.targets.findings import Profile
from onnxprune.targets.layered import Weights, weights_of
from onnxprune.targets.profiles import Wanted, spelled
from onnxprune.types import NextStep, Shape
from onnxprune.weights import sparse_layers


def next_step(model: Model, path: str, known: Sequence[Mapping[str, Shape]]) -> NextStep:
    """What to run next on a model that was written.

    Args:
        model: The model.
        path: Its file.
        known: Sizes of its inputs at which it is analysed.
    """
    weights = weights_of(sparse_layers(model))
    return trtexec(path, weights, Wanted.read(model).profiles(known))


def trtexec(path: str, weights: Weights, profiles: Mapping[str, Profile]) -> NextStep:
    """The command for a file with these weights and inputs of open shape."""
    parts = ["trtexec", f"--onnx={shlex.quote(path)}"]
    if profiles:
        # Of all dynamic inputs in one flag each; quoted, since names may hold anything.
        for flag, shapes in (
            ("min", spelled(profiles, lambda profile: profile.least)),
            ("opt", spelled(profiles, lambda profile: profile.best)),
            ("max", spelled(profiles, lambda profile: profile.most)),
        ):
            parts.append(f"--{flag}Shapes={shlex.quote(shapes)}")
    if weights.typed:
        parts.append("--stronglyTyped")
    if weights.eligible:
        parts.append("--sparsity=enable")
    return NextStep(" ".join(parts), tuple(_expect(path, weights, profiles)))


def _expect(path: str, weights: Weights, profiles: Mapping[str, Profile]) -> list[str]:
    """Plainly what TensorRT will make of it; nothing of this was timed."""
    said = []
    if any(not profile.given for profile in profiles.values()):
        said.append("shapes in the command are those the model was analysed at: put yours")
    if weights.single:
        said.append(
            "float32: TensorRT 11 runs it as such (10 has --fp16); "
            f"`onnxprune quantize {shlex.quote(path)} --to fp16` makes it 16-bit"
        )
    elif weights.typed:
        said.append(
            "--stronglyTyped makes TensorRT 10 keep the types of the file; TensorRT 11 always does"
        )
    if weights.eligible:
        count = len(weights.eligible)
        said.append(
            f"--sparsity=enable permits sparse kernels for 2:4 in {count} "
            f"layer{'s' if count != 1 else ''}; TensorRT takes them in 16-bit and 8-bit types, "
            "where its own timing favours them"
        )
    return said
