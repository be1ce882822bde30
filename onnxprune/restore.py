"""Accuracy back without training: every layer refitted to what the original produced there.

Layer by layer in execution order: inputs are what the pruned model, refitted so far, feeds the
layer; the target is the original's output. The last layer before an Add aims at the original's sum
minus what the other branch now delivers, so that errors along a residual stream are corrected.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256

import numpy as np
from onnx import helper

from onnxprune import fields
from onnxprune.calibrate import inputs_of, sampled_positions
from onnxprune.data import Data
from onnxprune.emit import ConstantEdit, Emitter
from onnxprune.graph import Graph, Node
from onnxprune.io import Model
from onnxprune.layers import Layer, columns, layer_of, matrix, outputs, unmatrix
from onnxprune.prepare import prepare
from onnxprune.refit import Fit, Fitter
from onnxprune.select import PruningPlan
from onnxprune.shapes import Environment
from onnxprune.stepwise import Stepwise, Values
from onnxprune.survivors import Survivors
from onnxprune.types import AnyArray, Float64Array, Refitted

_log = logging.getLogger(__name__)
_PRESENT = ("Identity", "Cast")  # nodes between a constant and a layer that change no value
_MOST_MOMENTS = 1 << 30  # bytes of the sums for one layer
_SMALL_SCALE = 1e-4  # of the largest: a channel scaled by less is left as it is

Heard = Callable[[int, int, str], None]  # done, of, node


@dataclass(frozen=True)
class _Site:
    """A layer to refit, and where its output is compared.

    Attributes:
        layer: The layer in the pruned graph.
        leaf: Constant that holds the weight.
        turned: How the node sees the constant: permutation of its axes, None as it is.
        norm: BatchNormalization that alone reads the layer, folded into it for the fit.
        added: Node and input position of a constant that is added to a MatMul.
        made: Tensor that is compared.
        total: Sum that the original should get there, "" where there is none.
        other: The other summand.
    """

    layer: Layer
    leaf: str
    turned: tuple[int, ...] | None
    norm: Node | None
    added: tuple[Node, int] | None
    made: str
    total: str = ""
    other: str = ""


def refit(
    plan: PruningPlan, pruned: Model, data: Data, *, seed: int = 0, heard: Heard | None = None
) -> tuple[Model, tuple[Refitted, ...], tuple[str, ...]]:
    """Refit what a cut left to calibration data.

    Args:
        plan: The cut.
        pruned: The model it made.
        data: Unlabelled inputs; a few hundred samples are enough.
        seed: Draws the output positions that are looked at.
        heard: Called before each layer.

    Returns:
        The refitted model, what happened to each layer, and the constants that changed.

    Raises:
        VerificationError: ONNX Runtime cannot run a piece of a model.

    Source: layer-wise reconstruction as in He et al. 2017, Channel Pruning for Accelerating Very
        Deep Neural Networks (arXiv:1707.06168), with ridge and residual-aware targets.
    """
    original = plan.graph.graph
    survivors = Survivors(plan.graph.tracer.traces[0], plan.graph.dead(plan.keep))
    with_biases, added = _with_biases(pruned, original, survivors)
    work = prepare(with_biases)
    sites = list(_sites(work, original, survivors))
    rng = np.random.default_rng(seed)
    emitter = Emitter(work)
    results: list[Refitted] = []
    goals = [site.total or site.made for site in sites]
    with Stepwise(original, data, goals) as first, Stepwise(work, data) as second:
        for number, site in enumerate(sites):
            if heard is not None:
                heard(number, len(sites), site.layer.node.label)
            read, target = _pairs(site, first, second, original, survivors)
            fit = _solved(site, work, second, read, target, rng)
            if fit is None:
                continue
            written = _written(site, work, second, fit) if fit.ridge is not None else {}
            second.constants |= written
            after, ridge = (fit.after, fit.ridge) if written else (fit.before, None)
            results.append(Refitted(site.layer.node.label, fit.before, after, ridge))
    for name, values in second.constants.items():
        emitter.constants[name] = _edit(values)
    for site in sites:
        if site.layer.bias in added and site.layer.bias not in second.constants:
            del emitter.node(site.layer.node).input[2]
    changed = tuple(sorted(second.constants))
    return emitter.build(), tuple(results), changed


def _edit(values: AnyArray) -> ConstantEdit:
    key = b"refit" + sha256(values.tobytes()).digest()
    return ConstantEdit(values.shape, lambda _: values, key)


# -- which layers ----------------------------------------------------------------------------------


def _sites(work: Graph, original: Graph, survivors: Survivors) -> Iterator[_Site]:
    """Layers whose inputs are no longer what they were, in execution order."""
    moved: set[str] = set()
    for node in work.nodes:
        if node.key in work.derived:
            continue
        lost = any(name and survivors.cut(name) and name not in work.constants
                   for name in node.inputs)  # fmt: skip
        sums = lost and not all(survivors.cut(name) for name in node.outputs if name)
        reads = sums or (lost and _narrower(node, work, survivors))
        if not reads and not moved.intersection(node.inputs):
            continue
        moved.update(name for name in node.outputs if name)
        found = _site(node, work, original, survivors.trace.env)
        if found is not None:
            yield found


def _narrower(node: Node, work: Graph, survivors: Survivors) -> bool:
    """Whether a node sums over an axis that was cut."""
    layer = _layer(node, work)
    if layer is None:
        return False
    rank = len(survivors.trace.env.shape(layer.data) or ())
    if not rank:
        return False
    depthwise = layer.kind in ("conv", "deconv") and layer.groups > 1
    shape = work.constants[layer.weight].weight.shape if layer.weight in work.constants else ()
    if depthwise and shape and shape[1] == 1:
        return False
    return survivors.alive(layer.data, layer.axis % rank) is not None


def _layer(node: Node, work: Graph) -> Layer | None:
    if len(node.inputs) < 2 or node.inputs[1] not in work.derived:
        return None
    leaf = _leaf(work, node.inputs[1])
    if leaf is None:
        return None
    layer = layer_of(work, leaf[0])
    return layer if layer is not None and layer.node is node else None


def _leaf(work: Graph, name: str) -> tuple[str, tuple[int, ...] | None] | None:
    """The constant that a tensor shows, and how its axes are turned."""
    turned: tuple[int, ...] | None = None
    while name not in work.constants:
        node = work.producer.get(name)
        if node is None or _only_reader(work, name) is None:
            return None
        if node.op_type == "Transpose" and turned is None:
            turned = node.ints("perm") or ()  # all axes reversed
        elif node.op_type not in _PRESENT:
            return None
        name = node.inputs[0]
    constant = work.constants[name]
    alone = len(work.consumers.get(name, ())) == 1 and constant.pinned is None
    real = constant.weight.dtype.kind == "f" or constant.weight.dtype.name == "bfloat16"
    if turned == ():
        turned = tuple(reversed(range(len(constant.weight.shape))))
    return (name, turned) if alone and real else None


def _site(node: Node, work: Graph, original: Graph, env: Environment) -> _Site | None:
    layer = _layer(node, work)
    leaf = _leaf(work, node.inputs[1]) if layer is not None else None
    if layer is None or leaf is None:
        return None
    if not _plain(layer, len(work.constants[leaf[0]].weight.shape)):
        return None
    made, norm, added = node.outputs[0], None, None
    reader = _only_reader(work, made)
    if layer.kind in ("conv", "deconv") and reader is not None and _is_norm(reader, work):
        norm, made = reader, reader.outputs[0]
    elif layer.kind == "matmul" and reader is not None and reader.op_type == "Add":
        position = 1 - reader.inputs.index(made)
        constant = work.constants.get(reader.inputs[position])
        if constant is not None and constant.pinned is None and len(constant.weight.shape) == 1:
            added, made = (reader, position), reader.outputs[0]
    if made not in original.producer:
        return None
    site = _Site(layer, leaf[0], leaf[1], norm, added, made)
    reader = _only_reader(work, made)
    if reader is not None and reader.op_type == "Add" and reader.outputs[0] in original.producer:
        other = reader.inputs[1 - reader.inputs.index(made)]
        maker = work.producer.get(other)
        known = other in work.inputs or (maker is not None and maker.index < node.index)
        shape = env.shape(made)
        alike = shape is not None and env.shape(reader.outputs[0]) == shape
        if known and alike and other not in work.derived and other != made:
            return replace(site, total=reader.outputs[0], other=other)
    return site


def _plain(layer: Layer, rank: int) -> bool:
    """Whether a layer is Y = X W and no more: no activation inside, one matrix for all rows."""
    if layer.kind in ("gemm", "matmul"):
        return rank == 2 and layer.axis != 0
    return layer.node.op_type != "FusedConv"


def _only_reader(graph: Graph, name: str) -> Node | None:
    readers = graph.consumers.get(name, [])
    if len(readers) != 1 or name in graph.outputs or name in graph.captured:
        return None
    return readers[0][0]


def _is_norm(node: Node, work: Graph) -> bool:
    plain = node.op_type == "BatchNormalization" and not node.int("training_mode", 0)
    constants = [work.constants.get(name) for name in node.inputs[1:5]]
    return plain and all(
        c is not None and c.pinned is None and len(work.consumers[name]) == 1
        for c, name in zip(constants, node.inputs[1:5], strict=True)
    )


def _with_biases(
    pruned: Model, original: Graph, survivors: Survivors
) -> tuple[Model, frozenset[str]]:
    """The model with a zero bias for each layer to be refitted that has none, and their names."""
    work = prepare(pruned)
    emitter = Emitter(work)
    added: set[str] = set()
    for site in _sites(work, original, survivors):
        layer = site.layer
        if layer.kind == "matmul" or site.norm is not None or layer.bias:
            continue
        weight = work.constants[site.leaf].weight
        axis = 0 if layer.kind == "conv" or layer.node.int("transB", 0) else 1
        stored = axis if site.turned is None else site.turned[axis]
        width = weight.shape[stored] * (layer.groups if layer.kind == "deconv" else 1)
        proto = emitter.node(layer.node)
        while len(proto.input) < 3:
            proto.input.append("")
        kind = survivors.trace.env.data_type(layer.node.outputs[0])
        zeros = np.zeros(width, helper.tensor_dtype_to_np_dtype(kind) if kind else np.float32)
        proto.input[2] = emitter.literal(f"{layer.node.key}_bias", zeros)
        added.add(proto.input[2])
    return (emitter.build() if added else pruned), frozenset(added)


# -- the fit of one layer --------------------------------------------------------------------------


def _pairs(
    site: _Site, first: Stepwise, second: Stepwise, original: Graph, survivors: Survivors
) -> tuple[Values, Values]:
    """What the layer reads now, and what it should make, batch by batch."""
    wanted = [site.layer.data, *([site.other] if site.other else [])]
    now = second.until(site.layer.node.index, wanted)
    goal = site.total or site.made
    stop = original.producer[goal].index + 1
    aims = first.until(max(stop, first.done), [goal])[goal]
    gone = survivors.masks(goal)
    target: Values = []
    for batch, aim in enumerate(aims):
        part = np.asarray(fields.compact(aim, *gone), np.float32)
        if site.other:
            part = part - np.asarray(now[site.other][batch], np.float32)
        target.append(part)
    return list(now[site.layer.data]), target


def _solved(
    site: _Site,
    work: Graph,
    run: Stepwise,
    read: Sequence[AnyArray],
    target: Sequence[AnyArray],
    rng: np.random.Generator,
) -> Fit | None:
    layer = site.layer
    seen = _seen(site, work, run)
    start = matrix(layer, seen)
    scale, shift = _affine(site, work, run, start.shape[0] * start.shape[2])
    if scale is None or shift is None:
        return None
    groups, inputs, made = start.shape
    if 8 * groups * inputs * inputs > _MOST_MOMENTS:
        _log.info("%s reads too many values at once to be refitted", layer.node.label)
        return None
    fitter = Fitter(groups, inputs, made, intercept=_has_bias(site))
    samples = sum(array.shape[0] for array in read)
    most = sampled_positions(inputs_of(layer, seen.shape), samples)
    for x, z in zip(read, target, strict=True):
        rows, chosen = columns(layer, x, seen.shape, most, rng)
        fitter.add(rows, outputs(layer, z, chosen))
    per_group = (groups, 1, made)
    fit = fitter.solve(start * scale.reshape(per_group), shift.reshape(groups, made))
    return fit if np.isfinite(fit.before) else None  # the data overflow here


def _has_bias(site: _Site) -> bool:
    place, factor = _bias_of(site)
    return bool(place) and factor != 0


def _seen(site: _Site, work: Graph, run: Stepwise) -> AnyArray:
    """The weight as the node sees it."""
    array = _value(work, run, site.leaf)
    return array if site.turned is None else array.transpose(site.turned)


def _value(work: Graph, run: Stepwise, name: str) -> AnyArray:
    found = run.constants.get(name)
    return work.constants[name].weight.read() if found is None else found


def _affine(
    site: _Site, work: Graph, run: Stepwise, width: int
) -> tuple[Float64Array | None, Float64Array | None]:
    """Scale and shift between the product and the tensor that is compared, by output channel."""
    scale, shift = np.ones(width), np.zeros(width)
    node = site.layer.node
    if site.layer.kind == "gemm":
        scale *= node.attributes["alpha"].f if node.has("alpha") else 1.0
    if site.layer.bias:
        if site.layer.bias not in work.constants:
            return None, None
        bias = _value(work, run, site.layer.bias).astype(np.float64).reshape(-1)
        if bias.size != width:
            return None, None
        shift += bias * (node.attributes["beta"].f if node.has("beta") else 1.0)
    if site.added is not None:
        reader, position = site.added
        bias = _value(work, run, reader.inputs[position]).astype(np.float64)
        if bias.size != width:
            return None, None
        shift += bias
    if site.norm is not None:
        gamma, beta, mean, variance = (
            _value(work, run, name).astype(np.float64) for name in site.norm.inputs[1:5]
        )
        norm = site.norm
        epsilon = norm.attributes["epsilon"].f if norm.has("epsilon") else 1e-5
        factor = gamma / np.sqrt(variance + epsilon)
        scale, shift = scale * factor, (shift - mean) * factor + beta
    return scale, shift


def _written(site: _Site, work: Graph, run: Stepwise, fit: Fit) -> Mapping[str, AnyArray]:
    """New values of the constants of a layer."""
    layer = site.layer
    seen = _seen(site, work, run)
    groups, _, made = fit.weight.shape
    scale, shift = _affine(site, work, run, groups * made)
    assert scale is not None
    assert shift is not None
    start = matrix(layer, seen)
    per_group = (groups, 1, made)
    usable = np.abs(scale) > _SMALL_SCALE * max(float(np.abs(scale).max()), 1e-30)
    safe = np.where(usable, scale, 1.0).reshape(per_group)
    weight = np.where(usable.reshape(per_group), fit.weight / safe, start)
    back = unmatrix(layer, weight, seen.shape)
    if site.turned is not None:
        back = back.transpose(np.argsort(site.turned))
    stored = work.constants[site.leaf].weight
    found: dict[str, AnyArray] = {site.leaf: _cast(np.ascontiguousarray(back), stored.dtype)}
    # What a channel that is not usable still gives through its old weights counts as no change.
    moved = np.where(usable, fit.bias.reshape(-1) - shift, 0.0)
    place, factor = _bias_of(site)
    if place and factor:
        old = _value(work, run, place)
        new = old.astype(np.float64) + (moved / factor).reshape(old.shape)
        found[place] = _cast(new, old.dtype)
    # Half precision may be too narrow for what single precision found.
    return found if all(np.isfinite(values).all() for values in found.values()) else {}


def _cast(array: Float64Array, kind: np.dtype[np.generic]) -> AnyArray:
    with np.errstate(over="ignore"):
        return array.astype(kind)


def _bias_of(site: _Site) -> tuple[str, float]:
    """The constant that shifts a layer's output, and what it is multiplied by."""
    if site.norm is not None:
        return site.norm.inputs[2], 1.0
    if site.added is not None:
        return site.added[0].inputs[site.added[1]], 1.0
    node = site.layer.node
    return site.layer.bias, node.attributes["beta"].f if node.has("beta") else 1.0
