"""Is the surgery right, and how far is the result from the original?

Two different questions (DESIGN sections 4 and 8). The *masked twin* answers the first exactly: a
failure there is our bug. *Drift* answers the second: it is the user's trade-off, and fails only
against a limit the user set.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import ge, le

import ml_dtypes
import numpy as np
import onnx

from onnxprune.data import Data
from onnxprune.drift import measure_drift
from onnxprune.feeds import Batch, spell
from onnxprune.model import Model
from onnxprune.runtime import UNPROVED, RuntimeUnavailable, cannot_run, session
from onnxprune.skeleton import skeleton
from onnxprune.types import AnyArray, Drift, Float64Array, Limits, TwinResult, Verdict

TWIN_TOLERANCE = 1e-4  # of the output's scale
LOSSLESS_TOLERANCE = 1e-5
# Where constants moved to biases: the original rounds them anew in every layer, and its mean over a
# map of 10,000 equal numbers is off by 1e-4.
ABSORBED_TOLERANCE = 1e-3
NOISE_FACTOR = 10.0  # how much more than the model's own noise is forgiven
NOISE_LIMIT = 1e-2  # a model noisier than this cannot be tested
MISMATCH_TOLERANCE = 1e-3  # share of integers that may differ: an arg max over a float tie
_ROUNDING = 8  # units in the last place that an input is moved by to learn a model's noise
HALF_FACTOR = 16.0  # tolerance of 16-bit models, in units of their epsilon
_NOT_ASKED = "not asked for"
_RANDOM = "random input, which says little about quality"


def verify(
    original: Model,
    pruned: Model,
    *,
    twin: Model | None,
    data: Data,
    level: str = "full",
    limits: Limits = Limits(),  # noqa: B008  (frozen)
    lossless: bool = False,
    tolerance: float | None = None,
    runs_as: Model | None = None,
) -> Verdict:
    """Check ``pruned`` against its masked twin and measure its drift from ``original``.

    Args:
        original: The model as the user gave it.
        pruned: The model after surgery (before restoring, if ``twin`` is to match).
        twin: The original with dropped channels zeroed at their consumers; None where there is
            none (``--allow-norm``).
        data: What to run the models on: the twin on first and last batch, drift on all of them.
        level: ``none``, ``twin`` or ``full`` (drift too).
        limits: The user's limits on drift.
        lossless: The pruned model must equal the original itself; ``twin`` is not used.
        tolerance: What may differ, by an output's scale; by default 1e-4, lossless 1e-5.
        runs_as: A model that computes what ``pruned`` does where the runtime would not: it is run
            in its place.

    Returns:
        A verdict; ``ours`` tells a bug of onnxprune from a limit of the user's.

    Raises:
        VerificationError: ONNX Runtime cannot run the original.
    """
    if level == "none":
        return Verdict("none", _NOT_ASKED, None, {}, "")
    verdict = Verdict("passed", "", None, {}, data.label)
    running = pruned if runs_as is None else runs_as
    fault = _interface_fault(original, running) or _checker_fault(original, pruned)
    if fault:
        return replace(verdict, status="failed", reason=fault, ours=True)
    try:
        candidate = session(running)
        ran = [candidate.run(batch) for batch in data.probes]
    except RuntimeUnavailable as error:
        _require_runnable(original, data)
        return replace(verdict, status="failed", reason=f"pruned model: {error}", ours=True)
    if candidate.skipped:
        names = ", ".join(f"'{name}'" for name in candidate.skipped)
        verdict = replace(verdict, notes=(f"not compared, no tensor: {names}",))
    reference = original if lossless else twin
    if reference is not None:
        allowed = tolerance or (LOSSLESS_TOLERANCE if lossless else TWIN_TOLERANCE)
        verdict = _compare_twin(
            verdict, original, reference, ran, data, lossless=lossless, tolerance=allowed
        )
    del ran
    if level != "full" or verdict.status == "failed":
        return verdict
    drift = measure_drift(original, candidate, data)
    verdict = replace(verdict, drift=drift)
    passed = _limit_passed(drift, limits, data)
    if limits != Limits() and data.random:
        verdict = replace(verdict, notes=(*verdict.notes, f"limits: judged on {_RANDOM}"))
    return replace(verdict, status="failed", reason=passed, ours=False) if passed else verdict


# -------------------------------------------------------------------- checker and interface


def _interface_fault(original: Model, pruned: Model) -> str | None:
    """A graph input or output that is no longer what it was."""
    # An input that is also a weight (IR version 3) follows the cut.
    weights = {tensor.name for tensor in original.proto.graph.initializer}
    for kind, before, after in (
        ("inputs", original.proto.graph.input, pruned.proto.graph.input),
        ("outputs", original.proto.graph.output, pruned.proto.graph.output),
    ):
        names, kept = [value.name for value in before], [value.name for value in after]
        if names != kept:
            return f"the graph's {kind} changed from {names} to {kept}"
        for was, now in zip(before, after, strict=True):
            if was.type != now.type and was.name not in weights:
                return f"type or shape of '{was.name}' changed, one of the graph's {kind}"
    return None


def _checker_fault(original: Model, pruned: Model) -> str | None:
    """What ``onnx.checker`` says of the pruned model and did not say of the original."""
    found = _checker_says(pruned)
    if found is None or _checker_says(original) is not None:
        return None
    return f"onnx.checker: {found}"


def _checker_says(model: Model) -> str | None:
    """First complaint of checker and strict shape inference, in one line, or None."""
    try:
        onnx.checker.check_model(skeleton(model), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        return " ".join(str(error).split())
    return None


def _require_runnable(original: Model, data: Data) -> None:
    """Raise if it is the original already that cannot be run."""
    try:
        loaded = session(original)
        for batch in data.probes:
            loaded.run(batch)
    except RuntimeUnavailable as error:
        raise cannot_run(error, original, hint=UNPROVED) from error


# ------------------------------------------------------------------------------ masked twin


@dataclass(frozen=True, slots=True)
class _Gap:
    """Largest difference of one output over some batches.

    Attributes:
        max_abs: The difference itself.
        rel: What is judged: the difference by the output's scale, or the share of unequal integers.
        finite: There was a finite value to compare.
        base: What ``rel`` may be in any case.
        noise: What ``rel`` is between the twin and itself, by ``_own_noise``.
    """

    max_abs: float
    rel: float
    finite: bool = True
    base: float = 0.0
    noise: float = 0.0

    @property
    def tolerance(self) -> float:
        return max(self.base, NOISE_FACTOR * self.noise)

    @property
    def beyond(self) -> bool:
        return not self.rel <= self.base

    @property
    def untestable(self) -> bool:
        return self.beyond and not self.noise <= max(NOISE_LIMIT, self.base)

    @property
    def wrong(self) -> bool:
        return not self.untestable and not self.rel <= self.tolerance


def _compare_twin(
    verdict: Verdict,
    original: Model,
    reference: Model,
    ran: Sequence[Batch],
    data: Data,
    *,
    lossless: bool,
    tolerance: float,
) -> Verdict:
    """The verdict with the twin's part filled in; ``ran`` is what the pruned model gave."""
    what = "original" if lossless else "masked twin"
    try:
        wanted = _run(reference, data)
    except RuntimeUnavailable as error:
        _require_runnable(original, data)
        return replace(verdict, status="failed", reason=f"{what}: {error}", ours=True)
    half = _half_epsilon(reference)
    gaps = {
        name: replace(
            gap, base=_base_tolerance(wanted[0][name].dtype, half, tolerance, lossless=lossless)
        )
        for name, gap in _gaps(wanted, ran).items()
    }
    if not gaps:
        return replace(verdict, status="not_run", reason="no output is a tensor")
    if any(gap.beyond for gap in gaps.values()):
        noise = _own_noise(reference, wanted, data)
        gaps = {name: replace(gap, noise=noise[name]) for name, gap in gaps.items()}
    wrong = [name for name, gap in gaps.items() if gap.wrong]
    noisy = [name for name, gap in gaps.items() if gap.untestable]
    name = max(wrong or noisy or gaps, key=lambda name: _excess(gaps[name]))
    worst = gaps[name]
    result = TwinResult(
        not wrong and not noisy, worst.max_abs, worst.rel, worst.tolerance, output=name
    )
    verdict = replace(verdict, twin=result)
    if wrong:
        how = _how(ran[0][name], wanted[0][name], worst)
        reason = f"output '{name}' of the pruned model and of the {what} {how}"
        return replace(verdict, status="failed", reason=reason, ours=True)
    if noisy:
        reason = (
            f"the model's own numerical noise is {worst.noise:.2g} at output '{name}' "
            "(other arithmetic, or rounding of its inputs): untestable"
        )
        return replace(verdict, status="not_run", reason=reason)
    if not any(gap.finite for gap in gaps.values()):
        reason = "every output is NaN or infinite on these inputs, before and after: untestable"
        return replace(verdict, status="not_run", reason=reason)
    return verdict


def _own_noise(model: Model, wanted: Sequence[Batch], data: Data) -> dict[str, float]:
    """How far the model is from itself: other arithmetic, or inputs that differ by rounding."""
    plain = _gaps(wanted, _run(model, data, optimise=False))
    loaded = session(model)
    nudged = _gaps(wanted, [loaded.run(_nudged(batch)) for batch in data.probes])
    # Where rounding changes the very shape of an output, only the arithmetic can be compared.
    return {
        name: max(gap.rel, nudged[name].rel if math.isfinite(nudged[name].rel) else 0.0)
        for name, gap in plain.items()
    }


def _nudged(batch: Batch) -> Batch:
    """The same inputs, floats a few units in the last place larger and smaller in turn.

    As much as rounding does on the way through a deep network: other channel counts make ONNX
    Runtime sum in another order, layer after layer. In 16 bits the tolerance covers that already.
    """
    moved = {}
    for name, array in batch.items():
        if array.dtype in (np.float32, np.float64):
            step = np.full(array.shape, _ROUNDING * float(np.finfo(array.dtype.name).eps))
            step.reshape(-1)[::2] *= -1
            moved[name] = (array * (1 + step)).astype(array.dtype)
        else:
            moved[name] = array
    return moved


def _how(got: AnyArray, wanted: AnyArray, gap: _Gap) -> str:
    """In what a wrong output differs."""
    if got.shape != wanted.shape:
        return f"has shape {spell(got.shape)} instead of {spell(wanted.shape)}"
    if math.isinf(gap.max_abs):
        return "are not finite at the same places"
    share = "of its scale" if _is_float(wanted.dtype) else "of its elements"
    return f"differs by {gap.rel:.2g} {share}, allowed {gap.tolerance:.2g}"


def _run(model: Model, data: Data, *, optimise: bool = True) -> list[dict[str, AnyArray]]:
    """Outputs of ``model`` on the probes; the session is gone afterwards."""
    loaded = session(model, optimise=optimise)
    return [loaded.run(batch) for batch in data.probes]


def _excess(gap: _Gap) -> float:
    """How many times the tolerance a difference is, to find the worst output."""
    return gap.rel / gap.tolerance if gap.tolerance else gap.rel


def _gaps(wanted: Sequence[Batch], got: Sequence[Batch]) -> dict[str, _Gap]:
    """Difference of every output over all batches."""
    return {
        name: _gap([one[name] for one in wanted], [one[name] for one in got]) for name in wanted[0]
    }


def _gap(wanted: Sequence[AnyArray], got: Sequence[AnyArray]) -> _Gap:
    """Difference of one output over all batches, relative to its largest finite value.

    Integers, booleans and strings: the share of elements that differ.
    """
    if any(want.shape != have.shape for want, have in zip(wanted, got, strict=True)):
        return _Gap(math.inf, math.inf)
    if not _is_float(wanted[0].dtype):
        return _discrete_gap(wanted, got)
    scale, largest, any_finite = 0.0, 0.0, False
    for want, have in zip(wanted, got, strict=True):
        a, b = _ordinary(want), _ordinary(have)
        finite = np.isfinite(a) & np.isfinite(b)
        if not np.array_equal(a[~finite], b[~finite], equal_nan=True):
            return _Gap(math.inf, math.inf)
        any_finite |= bool(finite.any())
        scale = max(scale, float(np.max(np.abs(a), where=finite, initial=0.0)))
        difference = np.subtract(a, b, out=np.zeros_like(a), where=finite)
        largest = max(largest, float(np.max(np.abs(difference), initial=0.0)))
    any_finite |= all(want.size == 0 for want in wanted)  # Nothing to compare is no NaN.
    if largest == 0.0:
        return _Gap(0.0, 0.0, any_finite)
    return _Gap(largest, largest / scale if scale else math.inf, any_finite)


def _discrete_gap(wanted: Sequence[AnyArray], got: Sequence[AnyArray]) -> _Gap:
    """Share of entries that are not equal."""
    different = sum(int(np.sum(want != have)) for want, have in zip(wanted, got, strict=True))
    total = sum(want.size for want in wanted)
    largest = 0.0
    if different and wanted[0].dtype.kind in "iub":
        largest = max(
            float(np.max(np.abs(want.astype(np.float64) - have.astype(np.float64)), initial=0.0))
            for want, have in zip(wanted, got, strict=True)
        )
    return _Gap(largest, different / total if total else 0.0)


def _ordinary(array: AnyArray) -> Float64Array:
    """Float64 values, where what stands for minus infinity in a mask is one.

    Exporters write ``finfo.min`` for it: as an ordinary value it would set the scale, and
    everything else would pass.
    """
    values = array.astype(np.float64)
    huge = _limits(array.dtype)[1] / 2
    with np.errstate(invalid="ignore"):
        return np.where(np.abs(values) > huge, np.copysign(np.inf, values), values)


def _limits(dtype: np.dtype[np.generic]) -> tuple[float, float]:
    """Epsilon and largest finite value of a float type, also one of ``ml_dtypes``."""
    found = ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]  # no stub
    return float(found.eps), float(found.max)


def _is_float(dtype: np.dtype[np.generic]) -> bool:
    """Also the types of ``ml_dtypes``, which numpy calls void."""
    return dtype.kind == "f" or dtype.name.startswith(("bfloat", "float"))


def _half_epsilon(model: Model) -> float:
    """Epsilon of the coarsest 16-bit type among the weights, 0 if they are all wider."""
    kinds = {tensor.data_type for tensor in model.proto.graph.initializer}
    for node in model.proto.graph.node:
        if node.op_type == "Constant":
            kinds |= {one.t.data_type for one in node.attribute if one.HasField("t")}
    if onnx.TensorProto.BFLOAT16 in kinds:
        return 2.0**-7
    return 2.0**-10 if onnx.TensorProto.FLOAT16 in kinds else 0.0


def _base_tolerance(
    dtype: np.dtype[np.generic], half: float, tolerance: float, *, lossless: bool
) -> float:
    """What is forgiven before the model's noise is asked for."""
    if not _is_float(dtype):
        return 0.0 if lossless and not half else MISMATCH_TOLERANCE
    epsilon = max(half, _limits(dtype)[0])
    return max(tolerance, HALF_FACTOR * epsilon) if epsilon > 1e-4 else tolerance


# ----------------------------------------------------------------------------------- limits


def _limit_passed(drift: Mapping[str, Drift], limits: Limits, data: Data) -> str | None:
    """Which limit of the user's some output passes, or None. What has no figure passes any."""
    on = f" on {_RANDOM}" if data.random else ""
    if limits.min_top1 is not None and all(one.top1 is None for one in drift.values()):
        return f"your limit: --min-top1 {limits.min_top1:g}, but no output looks like classes"
    for name, one in drift.items():
        for flag, limit, what, found, holds in (
            ("--max-drift", limits.max_drift, "relative L2", one.rel_l2, le),
            ("--min-cosine", limits.min_cosine, "cosine", one.cosine, ge),
            ("--min-top1", limits.min_top1, "top-1 agreement", one.top1, ge),
        ):
            if limit is not None and found is not None and not holds(found, limit):
                measured = "cannot be measured" if math.isnan(found) else f"is {found:.4g}"
                return f"your limit: {flag} {limit:g}, but {what} of output '{name}' {measured}{on}"
    return None
