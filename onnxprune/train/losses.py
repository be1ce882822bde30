"""The loss of a job as nodes of the graph, for trainers that differentiate graphs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper

from onnxprune.train.protocol import Term
from onnxprune.train.rewrites import Writer


def add_loss(model: onnx.ModelProto, terms: Sequence[Term], writer: Writer) -> str:
    """Append the loss to ``model``; the name of the tensor that is it.

    Targets become graph inputs of their names.
    """
    total = ""
    for term in terms:
        sizes = list(writer.sizes(term.tensor))
        axis = term.axis % len(sizes) if sizes else 0
        if term.kind == "ce":
            shape, kind = sizes[:axis] + sizes[axis + 1 :], TensorProto.INT64
        else:
            shape, kind = sizes, TensorProto.FLOAT
        dims = [f"{term.target}_{at}" if size is None else size for at, size in enumerate(shape)]
        model.graph.input.append(helper.make_tensor_value_info(term.target, kind, dims))
        value = {"ce": _cross_entropy, "kd": _distillation, "mse": _squares}[term.kind](
            writer, term, axis, len(sizes)
        )
        weighted = writer.op("Mul", value, writer.constant(term.weight))
        total = weighted if not total else writer.op("Add", total, weighted)
    model.graph.node.extend(writer.nodes)
    return total


def _cross_entropy(w: Writer, term: Term, axis: int, rank: int) -> str:
    x = term.tensor
    if axis != 1:
        x = w.op("Transpose", x, perm=[0, axis, *(a for a in range(1, rank) if a != axis)])
    return _loss_node(w, x, term.target)


def _loss_node(w: Writer, scores: str, labels: str) -> str:
    made, logs = w.fresh(), w.fresh()
    w.nodes.append(
        helper.make_node(
            "SoftmaxCrossEntropyLoss", [scores, labels], [made, logs], reduction="mean"
        )
    )
    return made


def _distillation(w: Writer, term: Term, axis: int, rank: int) -> str:
    heat = w.constant(term.temperature)
    student, teacher = w.op("Div", term.tensor, heat), w.op("Div", term.target, heat)
    if axis != rank - 1:
        order = [*(a for a in range(rank) if a != axis), axis]
        student, teacher = (w.op("Transpose", one, perm=order) for one in (student, teacher))
    ours, theirs = (w.op("LogSoftmax", one, axis=-1) for one in (student, teacher))
    apart = w.op("Mul", w.op("Softmax", teacher, axis=-1), w.op("Sub", theirs, ours))
    if w.opset < 13:  # the axis is an attribute
        summed = w.op("ReduceSum", apart, keepdims=0, axes=[-1])
    else:
        summed = w.op("ReduceSum", apart, w.constant([-1], np.int64), keepdims=0)
    return w.op("Mul", _mean(w, summed), w.constant(term.temperature**2))


def _squares(w: Writer, term: Term, _axis: int, _rank: int) -> str:
    off = w.op("Sub", term.tensor, term.target)
    return _mean(w, w.op("Mul", off, off))


def _mean(w: Writer, x: str) -> str:
    return w.op("ReduceMean", x, keepdims=0)
