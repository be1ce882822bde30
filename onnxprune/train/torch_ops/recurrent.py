"""LSTM, GRU and RNN, step by step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from onnxprune.train.torch_ops.lazy import Tensor, torch
from onnxprune.train.torch_ops.registry import Op, op

# From (input part of the gates, states) to the next states; the first is what is put out.
Cell = Callable[[Tensor, list[Tensor]], list[Tensor]]


def _refuse(node: Op, *defaults: list[str]) -> None:
    wanted = [name.lower() for name in node.attributes.get("activations", [])]
    allowed = [[name.lower() for name in names] for names in defaults]
    if wanted and all(wanted not in (names, names * 2) for names in allowed):
        raise node.fail(f"activations {', '.join(wanted)}")
    if "clip" in node.attributes:
        raise node.fail("clip")


def _run(
    node: Op,
    x: Tensor,
    weights: tuple[Tensor, Tensor | None],
    lengths: Tensor | None,
    states: list[Tensor | None],
    cell_of: Callable[[int], Cell],
) -> tuple[Any, ...]:
    """Y (time, directions, N, hidden) and each last state (directions, N, hidden)."""
    weight, bias = weights
    hidden = node.attributes["hidden_size"]
    swapped = bool(node.integer("layout", 0))
    x = x.transpose(0, 1) if swapped else x  # (time, N, features)
    ways = {"forward": [False], "reverse": [True], "bidirectional": [False, True]}
    outs, lasts = [], []
    for way, backwards in enumerate(ways[node.text("direction", "forward")]):
        start = [
            torch.zeros(x.shape[1], hidden, dtype=x.dtype, device=x.device)
            if state is None
            else (state[:, way] if swapped else state[way])
            for state in states
        ]
        parts = torch.matmul(x, weight[way].T)  # all steps at once
        if bias is not None:
            parts = parts + bias[way]
        y, last = _one_way(parts, start, cell_of(way), lengths, backwards)
        outs.append(y)
        lasts.append(last)
    y = torch.stack(outs, 1)
    ends = [torch.stack(list(state), 0) for state in zip(*lasts, strict=True)]
    if swapped:
        return y.permute(2, 0, 1, 3), *(end.transpose(0, 1) for end in ends)
    return y, *ends


def _one_way(
    parts: Tensor, states: list[Tensor], cell: Cell, lengths: Tensor | None, backwards: bool
) -> tuple[Tensor, list[Tensor]]:
    steps = range(parts.shape[0])
    out: list[Tensor] = [parts] * len(steps)
    for step in reversed(steps) if backwards else steps:
        after = cell(parts[step], states)
        if lengths is None:
            states, out[step] = after, after[0]
            continue
        runs = (step < lengths.to(parts.device))[:, None]
        states = [torch.where(runs, new, old) for new, old in zip(after, states, strict=True)]
        out[step] = torch.where(runs, after[0], torch.zeros_like(after[0]))
    return torch.stack(out, 0), states


@op("LSTM")
def lstm(
    node: Op,
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    lengths: Tensor | None = None,
    h: Tensor | None = None,
    c: Tensor | None = None,
    p: Tensor | None = None,
) -> Any:
    """Gates in ONNX's order: input, output, forget, cell."""
    _refuse(node, ["Sigmoid", "Tanh", "Tanh"])
    if node.integer("input_forget", 0):
        raise node.fail("input_forget")

    def cell_of(way: int) -> Cell:
        peep = None if p is None else p[way].chunk(3)  # input, output, forget

        def cell(part: Tensor, states: list[Tensor]) -> list[Tensor]:
            before, carried = states
            i, o, f, g = (part + before @ r[way].T).chunk(4, -1)
            if peep is not None:
                i, f = i + peep[0] * carried, f + peep[2] * carried
            carried = torch.sigmoid(f) * carried + torch.sigmoid(i) * torch.tanh(g)
            o = o if peep is None else o + peep[1] * carried
            return [torch.sigmoid(o) * torch.tanh(carried), carried]

        return cell

    summed = None if b is None else b[:, : b.shape[1] // 2] + b[:, b.shape[1] // 2 :]
    return _run(node, x, (w, summed), lengths, [h, c], cell_of)


@op("GRU")
def gru(
    node: Op,
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    lengths: Tensor | None = None,
    h: Tensor | None = None,
) -> Any:
    """Gates in ONNX's order: update, reset, hidden."""
    _refuse(node, ["Sigmoid", "Tanh"])
    hidden = node.attributes["hidden_size"]
    inner = bool(node.integer("linear_before_reset", 0))

    def cell_of(way: int) -> Cell:
        bias = x.new_zeros(3 * hidden) if b is None else b[way, 3 * hidden :]
        matrix, own = r[way], bias[2 * hidden :]

        def cell(part: Tensor, states: list[Tensor]) -> list[Tensor]:
            (before,) = states
            gates = before @ matrix[: 2 * hidden].T + bias[: 2 * hidden] + part[:, : 2 * hidden]
            z, reset = torch.sigmoid(gates).chunk(2, -1)
            if inner:
                seen = reset * (before @ matrix[2 * hidden :].T + own)
            else:
                seen = (reset * before) @ matrix[2 * hidden :].T + own
            fresh = torch.tanh(part[:, 2 * hidden :] + seen)
            return [(1 - z) * fresh + z * before]

        return cell

    bias = None if b is None else b[:, : 3 * hidden]
    return _run(node, x, (w, bias), lengths, [h], cell_of)


@op("RNN")
def rnn(
    node: Op,
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    lengths: Tensor | None = None,
    h: Tensor | None = None,
) -> Any:
    """tanh, or relu."""
    _refuse(node, ["Tanh"], ["Relu"])
    kinds = [name.lower() for name in node.attributes.get("activations", ["tanh"])]
    function = torch.relu if kinds[0] == "relu" else torch.tanh

    def cell_of(way: int) -> Cell:
        return lambda part, states: [function(part + states[0] @ r[way].T)]

    summed = None if b is None else b[:, : b.shape[1] // 2] + b[:, b.shape[1] // 2 :]
    return _run(node, x, (w, summed), lengths, [h], cell_of)
