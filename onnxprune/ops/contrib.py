"""Operators of ONNX Runtime's own domain, found in models it has optimised and saved."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from onnxprune.effects import Effect
from onnxprune.ops.conv import conv
from onnxprune.ops.elementwise import broadcast, meet, unary
from onnxprune.ops.registry import rule
from onnxprune.ops.view import OpView

_DOMAIN = "com.microsoft"


@rule("Gelu", "QuickGelu", domain=_DOMAIN)
def activation(op: OpView) -> Iterator[Effect]:
    """One element in, one element out."""
    return unary(op)


@rule("BiasGelu", "FastGelu", domain=_DOMAIN)
def biased_activation(op: OpView) -> Iterator[Effect]:
    """Adds a bias along the last axis, then works element by element."""
    return broadcast(op)


@rule("FusedConv", domain=_DOMAIN)
def fused_conv(op: OpView) -> Iterator[Effect]:
    """Conv, then the sum with a fourth input of the same shape, then an activation."""
    yield from conv(op)
    added = op.get(3)
    if added is not None:
        made = replace(added, fields=op.outputs.get(0, []), derived=False)
        found = yield from meet(op, [made, added])
        op.out(found)
