"""Verdicts on results: the proof of a cut, the drift of what is written, and who fails it."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
from onnx import TensorProto

from onnxprune.checks import Check
from onnxprune.data import Data, random_data
from onnxprune.errors import BUG, VerificationError
from onnxprune.feeds import Batch
from onnxprune.groups import DependencyGraph
from onnxprune.model import Model
from onnxprune.quantize.convert import Converted
from onnxprune.report.build import NOT_VERIFIED
from onnxprune.report.clock import Clock
from onnxprune.restoring import Restored
from onnxprune.runtime import accepts
from onnxprune.select import PruningPlan
from onnxprune.thin import Thinned
from onnxprune.tidy import Tidy, check_tidied, tidied
from onnxprune.twin import masked_twin
from onnxprune.types import Limits, Verdict
from onnxprune.verify import ABSORBED_TOLERANCE
from onnxprune.verify import verify as run_checks

_log = logging.getLogger(__name__)
_TRIES = 4  # random inputs tried until one shows more than the model's own noise


def made_up_data(graph: DependencyGraph, seed: int) -> Data:
    """Random inputs at the stand-in sizes of an analysis: two runs, of two sizes if it has two."""
    model = graph.graph.model
    if len(graph.envs) == 1:
        return random_data(model, seed=seed, shapes=graph.stand_ins)
    parts = [random_data(model, seed=seed, shapes=env.inputs, batches=1) for env in graph.envs]
    batches = tuple(batch for part in parts for batch in part.batches)
    return replace(parts[0], batches=batches, samples=sum(part.samples for part in parts))


def proved(
    graph: DependencyGraph,
    plan: PruningPlan,
    made: Model,
    check: Check,
    clock: Clock,
    *,
    lossless: bool,
) -> Verdict:
    """The verdict on a result that may be written; a failed one raises."""
    if check.level == "none":
        return NOT_VERIFIED
    source, prepared = graph.graph.source, graph.graph.model
    twin = masked_twin(plan) if graph.exact(plan.keep) and not lossless else None
    tries = range(check.seed, check.seed + (_TRIES if check.data is None else 1))
    with clock.stage("verify"):
        for seed in tries:
            data = check.data if check.data is not None else made_up_data(graph, seed)
            verdict = run_checks(
                source,
                made,
                twin=twin,
                data=data,
                level=check.level,
                limits=check.limits,
                lossless=lossless,
                tolerance=ABSORBED_TOLERANCE if plan.absorbed else None,
            )
            if prepared is not source and verdict.status == "passed":
                # The twin has computed weights as constants: that must be the same function.
                same = run_checks(
                    source, prepared, twin=None, data=data, level="twin", lossless=True
                )
                if same.status == "failed":
                    verdict = replace(same, reason=f"weights computed ahead: {same.reason}")
            # What one random input cannot tell from rounding, another may.
            if verdict.status != "not_run":
                break
    return judged(verdict, check.limits)


def quantized_verdict(original: Model, made: Converted, data: Data, check: Check) -> Verdict:
    """The verdict on a quantized model that may be written; a failed one raises.

    Raises:
        VerificationError: It is wrong, or passes a limit, or cannot be run.
    """
    verdict = run_checks(
        original,
        made.model,
        twin=None,
        data=data,
        level=check.level,
        limits=check.limits,
        runs_as=made.runs_as,
    )
    notes = verdict.notes
    if made.found.to == "bf16":
        notes += ("ONNX Runtime has no bfloat16 kernels on a CPU: this is an emulation that rounds "
                  "after every node",)  # fmt: skip
    elif made.found.to == "fp16":
        refused = accepts(made.model, _halved(made.model, data.probes[0]))
        if refused is not None:
            raise VerificationError(f"quantized model: {refused}", hint=BUG)
        notes += ("rounded after every node, as hardware does and ONNX Runtime on a CPU does not",)
    return judged(replace(verdict, notes=notes), check.limits)


def _halved(model: Model, batch: Batch) -> Batch:
    """A batch in the types of a model's inputs."""
    wanted = {value.name: value.type.tensor_type.elem_type for value in model.proto.graph.input}
    return {
        name: array.astype(np.float16) if wanted.get(name) == TensorProto.FLOAT16 else array
        for name, array in batch.items()
    }


def judged(verdict: Verdict, limits: Limits) -> Verdict:
    """A verdict on a result that may be written; a failed one raises."""
    if verdict.status == "failed":
        hint = BUG if verdict.ours else "nothing was written"
        raise VerificationError(verdict.reason, hint=hint)
    if verdict.status == "not_run" and limits != Limits():
        raise VerificationError(
            f"{verdict.reason}, so your limit cannot be judged", hint="nothing was written"
        )
    if verdict.status == "not_run":
        _log.warning("not verified: %s", verdict.reason)
    return verdict


def measured(
    graph: DependencyGraph,
    made: Model,
    first: Verdict,
    check: Check,
    clock: Clock,
    recovered: Restored | None,
    narrow: Converted | None,
) -> Verdict:
    """The verdict on what is written: the proof of the plain cut, and its own drift."""
    if check.level == "none":
        return first
    unseen = None if recovered is None else recovered.unseen
    data = check.data if check.data is not None else unseen
    data = data if data is not None else made_up_data(graph, check.seed)
    with clock.stage("verify"):
        source = graph.graph.source
        if narrow is not None:
            found = quantized_verdict(source, narrow, data, check)
        else:
            found = run_checks(
                source, made, twin=None, data=data, level=check.level, limits=check.limits
            )
    if found.status == "failed":
        hint = BUG if found.ours else "nothing was written"
        raise VerificationError(found.reason, hint=hint)
    notes = (*first.notes, *found.notes)
    if recovered is None:
        return replace(first, drift=found.drift, inputs=found.inputs, notes=notes)
    if recovered.how == "refit" and found.drift:
        notes = (*notes, "the model was refitted to these inputs: on others the drift is larger")
    if recovered.note:
        notes = (*notes, recovered.note)
    return replace(first, drift=found.drift, inputs=found.inputs, notes=notes)


def made_tidy(
    model: Model,
    graph: DependencyGraph,
    thinned: Thinned | None,
    how: tuple[bool, bool],
    check: Check,
) -> Tidy:
    """Norms folded and the rest simplified, as ``how`` says, and checked to compute the same.

    Raises:
        VerificationError: It does not.
    """
    keep = () if thinned is None else tuple(str(one.tensor) for one in thinned.done)
    tidy = tidied(model, fold_bn=how[0], simplify=how[1], keep=keep)
    if check.level != "none" and tidy.anything:
        data = check.data if check.data is not None else made_up_data(graph, check.seed)
        check_tidied(model, tidy.model, data)
    return tidy
