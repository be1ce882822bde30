"""The oracle of nearly every test: a pruned model equals its masked twin, nothing else changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from onnxprune.analyse import DependencyGraph, analyse, random_keep
from onnxprune.data import Data, random_data
from onnxprune.model import Model
from onnxprune.rewrite import Surgery, masked_twin, operate
from onnxprune.runtime import session
from onnxprune.select import PruningPlan
from onnxprune.skeleton import skeleton
from onnxprune.survivors import Survivors
from onnxprune.types import AnyArray, IntArray

TOLERANCE = 1e-4  # of an output's scale
NOISE_FACTOR = 10.0
HALF_TOLERANCE = 2e-2  # where a model computes in 16 bits
NON_VACUOUS = 1e-3
# A float on the other side of a step is no error: such models may try other inputs.
_STEPS = {
    *("ArgMax", "ArgMin", "TopK", "Hardmax", "Ceil", "Floor", "Round", "Sign", "Cast", "Mod"),
    *("QuantizeLinear", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Equal"),
}
_TRIES = 3

Outputs = Sequence[Mapping[str, AnyArray]]  # one mapping for each run


class OracleError(AssertionError):
    """The pruned model is wrong; the message says in what."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the oracle saw.

    Attributes:
        cut: Number of units that went.
        touched: Operators with a tensor of which something went, one entry for each node.
        effect: Largest difference of twin and original over all outputs, by their scale.
        error: The same of pruned model and twin.
    """

    cut: int
    touched: tuple[str, ...]
    effect: float
    error: float


def as_model(model: Model | onnx.ModelProto) -> Model:
    return model if isinstance(model, Model) else Model(model)


def assert_equals_masked_twin(
    model: Model | onnx.ModelProto,
    plan: PruningPlan | None = None,
    *,
    data: Data | None = None,
    vacuous: bool = False,
) -> Outcome:
    """Cut a model as a plan says and hold it against its masked twin in ONNX Runtime.

    Args:
        model: The original; it must be the one that ``plan`` was made for.
        plan: None takes half of every balance set, at random.
        data: Inputs; None makes them up, at two sizes where the model is dynamic.
        vacuous: The cut need not show in any output (dead branches).

    Raises:
        OracleError: Pruned model and twin differ, or names, interface or validity suffered.
    """
    if plan is None:
        model = as_model(model)
        plan = plan_at(analyse(model), 0.5)
    model = plan.graph.graph.model
    surgery = operate(plan)
    _assert_valid(model, surgery)
    twin = masked_twin(plan)
    tries = _TRIES if any(node.op_type in _STEPS for node in model.proto.graph.node) else 1
    runs = [data] if data else [random_data(model, seed=seed) for seed in range(tries)]
    for number, inputs in enumerate(runs):
        try:
            error, effect = _assert_equal(model, surgery.model, twin, inputs)
            break
        except OracleError:
            if number == len(runs) - 1:
                raise
    if plan.removes and effect < NON_VACUOUS and not vacuous:
        raise OracleError(f"the cut does not show: twin and original differ by {effect:.1e}")
    return Outcome(plan.removes, touched(plan), effect, error)


def assert_rewrites(model: Model | onnx.ModelProto, plan: PruningPlan) -> Surgery:
    """The part of the oracle that does not run the model: for operators nothing can run."""
    surgery = operate(plan)
    _assert_kept(as_model(model).proto, surgery)
    return surgery


def _assert_valid(model: Model, surgery: Surgery) -> None:
    _assert_kept(model.proto, surgery)
    complaint = _complaint(surgery.model)
    if complaint and not _complaint(model):
        raise OracleError(f"onnx.checker: {complaint}")


def _complaint(model: Model) -> str:
    try:
        onnx.checker.check_model(skeleton(model), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        return " ".join(str(error).split())
    return ""


def _assert_kept(before: onnx.ModelProto, surgery: Surgery) -> None:
    """Interface, versions, and the names of nodes and tensors stay."""
    after = surgery.model.proto
    weights = {tensor.name for tensor in before.graph.initializer}
    for kind in ("input", "output"):
        pairs = [getattr(proto.graph, kind) for proto in (before, after)]
        kept = [[v for v in values if v.name not in weights] for values in pairs]
        if [v.name for v in pairs[0]] != [v.name for v in pairs[1]] or kept[0] != kept[1]:
            raise OracleError(f"an {kind} of the graph changed")
    if before.opset_import != after.opset_import or before.ir_version != after.ir_version:
        raise OracleError("opset imports or IR version changed")
    _assert_names_kept(before, after)


def _assert_names_kept(before: onnx.ModelProto, after: onnx.ModelProto) -> None:
    """A node that still makes what it made has its name, or that of a node it stands for."""
    known = {name: node for node in before.graph.node for name in node.output if name}
    names = {node.name for node in before.graph.node}
    made = [name for node in after.graph.node for name in node.output if name]
    made += [tensor.name for tensor in after.graph.initializer]
    if len(made) != len(set(made)):
        raise OracleError("a tensor is written twice")
    for node in after.graph.node:
        old = known.get(node.output[0])
        if old is None or old.op_type != node.op_type or old.name == node.name:
            continue
        if node.name not in names:  # a run of movements goes by the name of its first
            raise OracleError(f"{node.op_type} '{old.name}' is called '{node.name}' now")


# -- numbers ---------------------------------------------------------------------------------------


def _assert_equal(model: Model, pruned: Model, twin: Model, data: Data) -> tuple[float, float]:
    original, wanted, got = (_run(m, data) for m in (model, twin, pruned))
    half = _computes_in_half(model)
    worst = 0.0
    for name in wanted[0]:
        error = gap(wanted, got, name)
        worst = max(worst, error)
        allowed = HALF_TOLERANCE if half else TOLERANCE
        if error > allowed:
            noise = gap(wanted, _run(twin, data, optimise=True), name)
            allowed = max(allowed, NOISE_FACTOR * noise)
        if not error <= allowed:
            raise OracleError(f"output '{name}' differs by {error:.2g}, allowed {allowed:.2g}")
    return worst, max((gap(original, wanted, name) for name in wanted[0]), default=0.0)


def _run(model: Model, data: Data, *, optimise: bool = False) -> Outputs:
    loaded = session(model, optimise=optimise, threads=1)
    return [loaded.run(batch) for batch in data.probes]


def _computes_in_half(model: Model) -> bool:
    kinds = {tensor.data_type for tensor in model.proto.graph.initializer}
    return bool(kinds & {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16})


def gap(wanted: Outputs, got: Outputs, name: str) -> float:
    """Largest difference of one output over all runs, by its scale; inf where shapes differ."""
    scale = largest = 0.0
    for one, other in zip(wanted, got, strict=True):
        if one[name].shape != other[name].shape:
            return float("inf")
        want, have = (array.astype(np.float64) for array in (one[name], other[name]))
        if not np.array_equal(np.isfinite(want), np.isfinite(have)):
            return float("inf")
        finite = np.isfinite(want)
        scale = max(scale, float(np.max(np.abs(want[finite]), initial=0.0)))
        largest = max(largest, float(np.max(np.abs(want[finite] - have[finite]), initial=0.0)))
    return largest / scale if scale else largest


# -- plans -----------------------------------------------------------------------------------------


def plan_at(graph: DependencyGraph, ratio: float | None, seed: int = 0) -> PruningPlan:
    """Random units at one ratio; None: another random ratio for each balance set."""
    return PruningPlan(graph, random_keep(graph, ratio, np.random.default_rng(seed)))


def plan_at_random(graph: DependencyGraph, seed: int) -> PruningPlan:
    """Any numbers and any units that the constraints allow, all or nothing of a set included."""
    rng = np.random.default_rng(seed)
    keep = {group.id: np.ones(group.size, np.bool_) for group in graph.prunable}
    for balance in graph.balance_sets:
        steps = min(cell.units.size * cell.slots for cell in balance.cells) // balance.step
        most = max(steps - 1, 0) if rng.random() < 0.9 else 0
        share = int(rng.integers(0, most + 1)) * balance.step
        sizes = {cell.units.size * cell.slots for cell in balance.cells}
        if len(sizes) > 1:
            return plan_at(graph, None, seed)
        for cell in balance.cells:
            gone = rng.permutation(cell.units)[: share // cell.slots]
            keep[cell.group][gone] = False
    return PruningPlan(graph, {key: np.flatnonzero(kept) for key, kept in keep.items()})


def plan_without(graph: DependencyGraph, gone: Mapping[int, Sequence[int]]) -> PruningPlan:
    """A plan that drops the units named, by group."""
    keep: dict[int, IntArray] = {}
    for group in graph.prunable:
        keep[group.id] = np.setdiff1d(np.arange(group.size), gone.get(group.id, ()))
    return PruningPlan(graph, keep)


def touched(plan: PruningPlan) -> tuple[str, ...]:
    """Operators that read or write a tensor of which something goes, or what meets one.

    One entry for each node, the last first.
    """
    graph = plan.graph
    survivors = Survivors(graph.tracer.traces[0], graph.dead(plan.keep))
    found: list[str] = []
    met: set[str] = set()  # tensors without labels that meet cut ones further on
    for node in reversed(graph.graph.nodes):
        cut = any(survivors.cut(name) for name in (*node.inputs, *node.outputs) if name)
        if cut or met.intersection(node.outputs):
            found.append(node.op_type)
            met.update(name for name in node.inputs if not graph.tracer.traces[0].fields.get(name))
    return tuple(found)
