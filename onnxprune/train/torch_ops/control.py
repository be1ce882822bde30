"""Bodies that run once, many times or not at all, and sequences of tensors as lists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from onnxprune.train.torch_ops.lazy import Tensor, torch
from onnxprune.train.torch_ops.registry import Op, op


@op("If")
def if_(node: Op, condition: Tensor) -> Any:
    """One of two bodies, which read the tensors around them."""
    body = node.bodies["then_branch" if bool(condition) else "else_branch"]
    return tuple(body([], node.scope))


@op("Loop")
def loop(node: Op, trips: Tensor | None, condition: Tensor | None, *state: Any) -> Any:
    """The body takes (trip, condition, state …) and gives (condition, state …, collected …)."""
    going = True if condition is None else bool(condition)
    held, collected, trip = list(state), [], 0
    limit = None if trips is None else int(trips)
    while going and (limit is None or trip < limit):
        outs = node.bodies["body"]([torch.tensor(trip), torch.tensor(going), *held], node.scope)
        going, held = bool(outs[0]), outs[1 : 1 + len(held)]
        collected.append(outs[1 + len(held) :])
        trip += 1
    if not collected and node.outputs > len(held):
        raise node.fail("a loop that never runs, and collects")
    return *held, *(torch.stack(list(parts)) for parts in zip(*collected, strict=True))


@op("Scan")
def scan(node: Op, *inputs: Any) -> Any:
    """The body takes (state …, one slice of each input) and gives (state …, one slice of each)."""
    count = node.attributes["num_scan_inputs"]
    first = len(inputs) - count
    held = list(inputs[:first])
    if node.version < 9:
        raise node.fail("the batched form before version 9")
    axes = node.attributes.get("scan_input_axes", [0] * count)
    back = node.attributes.get("scan_input_directions", [0] * count)
    slices = [
        list(x.unbind(axis))[:: -1 if turned else 1]
        for x, axis, turned in zip(inputs[first:], axes, back, strict=True)
    ]
    collected = []
    for parts in zip(*slices, strict=True):
        outs = node.bodies["body"]([*held, *parts], node.scope)
        held, made = outs[: len(held)], outs[len(held) :]
        collected.append(made)
    results = []
    out_axes = node.attributes.get("scan_output_axes", [0] * len(collected[0]))
    out_back = node.attributes.get("scan_output_directions", [0] * len(collected[0]))
    for parts, axis, turned in zip(zip(*collected, strict=True), out_axes, out_back, strict=True):
        results.append(torch.stack(list(parts)[:: -1 if turned else 1], axis))
    return *held, *results


@op("SequenceConstruct")
def sequence_construct(_: Op, *xs: Tensor) -> list[Tensor]:
    """A list."""
    return list(xs)


@op("SequenceEmpty")
def sequence_empty(_: Op) -> list[Tensor]:
    """An empty list."""
    return []


@op("SequenceAt")
def sequence_at(_: Op, xs: Sequence[Tensor], place: Tensor) -> Tensor:
    """One of them."""
    return xs[int(place)]


@op("SequenceInsert")
def sequence_insert(_: Op, xs: Sequence[Tensor], x: Tensor, place: Tensor | None = None) -> Any:
    """One more, at the end unless a place is given."""
    at = len(xs) if place is None else int(place) % (len(xs) + 1 if int(place) >= 0 else len(xs))
    return [*xs[:at], x, *xs[at:]]


@op("SequenceLength")
def sequence_length(_: Op, xs: Sequence[Tensor]) -> Tensor:
    """How many."""
    return torch.tensor(len(xs))


@op("ConcatFromSequence")
def concat_from_sequence(node: Op, xs: Sequence[Tensor]) -> Tensor:
    """Along an axis of theirs, or a new one."""
    axis = node.attributes["axis"]
    return torch.stack(list(xs), axis) if node.integer("new_axis", 0) else torch.cat(list(xs), axis)


@op("SplitToSequence")
def split_to_sequence(node: Op, x: Tensor, sizes: Tensor | None = None) -> list[Tensor]:
    """Parts of the sizes given, of one size, or single slices."""
    axis = node.axis(x.ndim, 0)
    if sizes is None:
        parts = list(x.split(1, axis))
        return parts if node.integer("keepdims", 1) else [part.squeeze(axis) for part in parts]
    return list(x.split(int(sizes) if sizes.ndim == 0 else sizes.tolist(), axis))
