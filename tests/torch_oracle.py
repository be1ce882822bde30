"""Oracles of the torch interpreter: ONNX Runtime for values, finite differences for gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnxprune import runtime
from onnxprune.model import Model

_IR = 10
_STEP = 1e-6


@dataclass(frozen=True)
class Case:
    """One node with its inputs.

    Attributes:
        op: Operator, with its domain and a colon in front where that is not ONNX's.
        inputs: Arrays; None leaves an input out.
        opset: Version of the domain "".
        attributes: Of the node.
        outputs: How many.
        smooth: Whether gradients can be compared with finite differences.
        tolerance: Of values, relative to the largest.
        fixed: Positions of inputs that no gradient goes to.
    """

    op: str
    inputs: Sequence[Any]
    opset: int = 21
    attributes: Mapping[str, Any] = field(default_factory=dict)
    outputs: int = 1
    smooth: bool = True
    tolerance: float = 1e-5
    fixed: Sequence[int] = ()

    @property
    def names(self) -> list[str]:
        return ["" if array is None else f"i{n}" for n, array in enumerate(self.inputs)]

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        return {
            name: np.asarray(array)
            for name, array in zip(self.names, self.inputs, strict=True)
            if name
        }

    def model(self, held: Mapping[str, np.ndarray]) -> onnx.ModelProto:
        """The model, with ``held`` as initializers and the other inputs fed."""
        domain, _, op_type = self.op.rpartition(":")
        outputs = [f"o{n}" for n in range(self.outputs)]
        node = helper.make_node(op_type, self.names, outputs, domain=domain, **self.attributes)
        graph = helper.make_graph(
            [node],
            "one",
            [
                helper.make_tensor_value_info(
                    name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape
                )
                for name, array in self.arrays.items()
                if name not in held
            ],
            [onnx.ValueInfoProto(name=name) for name in outputs],
            [numpy_helper.from_array(array, name) for name, array in held.items()],
        )
        opsets = [helper.make_opsetid("", self.opset), helper.make_opsetid("com.microsoft", 1)]
        ir = _IR if self.opset < 22 else 11
        return helper.make_model(graph, opset_imports=opsets, ir_version=ir)


def assert_as_onnx_runtime(case: Case) -> None:
    """Every output is what ONNX Runtime gives, fed and held alike."""
    from onnxprune.train.torch_graph import TorchGraph

    whole = {name: array for name, array in case.arrays.items() if array.dtype.kind != "f"}
    model = case.model(whole)  # shapes and axes as constants, as models have them
    feeds = {name: array for name, array in case.arrays.items() if name not in whole}
    expected = runtime.session(Model(model), threads=1).run(feeds)
    found = TorchGraph(model).run(feeds)
    fed = TorchGraph(case.model({})).run(case.arrays)
    for name, wanted in expected.items():
        for made in (found[name], fed[name]):
            array = made.detach().numpy()
            assert array.shape == wanted.shape, name
            if wanted.dtype.kind != "f":
                np.testing.assert_array_equal(array, wanted)
                continue
            scale = max(float(np.max(np.abs(wanted), initial=0)), 1e-6)
            np.testing.assert_allclose(array, wanted, rtol=0, atol=case.tolerance * scale)


def assert_gradients(case: Case, *, seed: int = 0) -> None:
    """Gradients of all real inputs agree with differences along a random direction."""
    from onnxprune.train.torch_ops.registry import lookup

    domain, _, op_type = case.op.rpartition(":")
    entry = lookup(op_type, domain)
    assert entry is not None
    fixed = {f"i{place}" for place in (*case.fixed, *entry.host)}
    real = {name: array for name, array in case.arrays.items() if array.dtype.kind == "f"}
    feeds = {name: array for name, array in case.arrays.items() if name not in real}
    trained = [name for name in real if name not in fixed]
    assert_model_gradients(case.model(real), trained, feeds, seed=seed)


def assert_model_gradients(
    model: onnx.ModelProto,
    trained: Sequence[str],
    feeds: Mapping[str, np.ndarray],
    *,
    statistics: Sequence[str] = (),
    seed: int = 0,
) -> None:
    """The same for a whole model: loss is a random weighting of all real outputs, in float64."""
    import torch

    from onnxprune.train.torch_graph import TorchGraph

    graph = TorchGraph(model, trained=trained, statistics=statistics, double=True)
    generator = torch.Generator().manual_seed(seed)
    factors: dict[str, torch.Tensor] = {}

    def loss() -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for name, value in graph.run(feeds, training=bool(statistics)).items():
            if value.is_floating_point() and value.requires_grad:
                if name not in factors:
                    factors[name] = torch.randn(value.shape, generator=generator).double()
                total = total + (value * factors[name]).sum()
        return total

    loss().backward()
    for name, weight in graph.parameters.items():
        gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
        direction = torch.randn(weight.shape, generator=generator).double()
        with torch.no_grad():
            weight.add_(direction, alpha=_STEP)
        after = loss().item()
        with torch.no_grad():
            weight.sub_(direction, alpha=2 * _STEP)
        before = loss().item()
        with torch.no_grad():
            weight.add_(direction, alpha=_STEP)
        slope, expected = (gradient * direction).sum().item(), (after - before) / (2 * _STEP)
        size = max(abs(expected), gradient.abs().max().item(), 1e-3)
        assert abs(slope - expected) <= 1e-5 * size, f"{name}: {slope} is not {expected}"
