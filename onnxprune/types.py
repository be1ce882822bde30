"""The frozen data that the arrows of the pipeline pass to one another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from onnxprune.targets.findings import Checked

FloatArray: TypeAlias = NDArray[np.floating]
Float32Array: TypeAlias = NDArray[np.float32]
Float64Array: TypeAlias = NDArray[np.float64]
IntArray: TypeAlias = NDArray[np.int64]
BoolArray: TypeAlias = NDArray[np.bool_]
AnyArray: TypeAlias = NDArray[np.generic]
Scalar = TypeVar("Scalar", bound=np.generic)
Shape: TypeAlias = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class WeightAxis:
    """One axis of one weight that makes, reads or accompanies the channels of a group.

    Attributes:
        tensor: Name of the weight (initializer, or output of its Constant node).
        axis: Axis of that tensor.
        role: ``producer``, ``consumer`` or ``parameter``.
        op_type: Operator that uses the weight.
        node: Name of that node, or its first output where it has none.
        input_index: Which input of the node the weight feeds, directly or through a constant chain.
        view: Dimensions under which the weight is seen: its own shape, or with an axis split into
            groups where every group slices ``axis`` for itself.
        axes: Axes of ``view`` on which the positions lie; one, unless rows differ.
        index: Flat positions on ``axes`` of ``view``, shape (members,).
        unit: For each position, the unit of the group it belongs to, shape (members,).
    """

    tensor: str
    axis: int
    role: str
    op_type: str
    node: str
    input_index: int
    view: Shape
    axes: tuple[int, ...]
    index: IntArray = field(repr=False)
    unit: IntArray = field(repr=False)


@dataclass(frozen=True, slots=True)
class ChannelGroup:
    """Coupled channels that sit on the same axes and so compete with one another.

    Attributes:
        id: Position in ``DependencyGraph.groups``; stable for one model.
        size: Number of units.
        width: Positions along the producers' axis that the units take together.
        unit: What one unit is: ``channel``, ``head``, ``group`` or ``pair``.
        classes: Slot class of each unit, shape (size,).
        cells: Partition of the units into rows that must keep equal counts, each shape (n,).
        producers, consumers, parameters: Weight axes by role.
        frozen: Why nothing of the group may go, or None.
    """

    id: int
    size: int
    width: int
    unit: str
    classes: IntArray = field(repr=False)
    cells: tuple[IntArray, ...] = field(repr=False)
    producers: tuple[WeightAxis, ...]
    consumers: tuple[WeightAxis, ...]
    parameters: tuple[WeightAxis, ...]
    frozen: str | None = None

    @property
    def name(self) -> str:
        """Name of the first producing weight, which names the group in every report."""
        return self.producers[0].tensor if self.producers else f"group {self.id}"


@dataclass(frozen=True, slots=True)
class Cell:
    """Units of one group that share a row; ``slots`` is what one unit counts in its rows."""

    group: int
    units: IntArray
    slots: int


@dataclass(frozen=True, slots=True)
class BalanceSet:
    """Cells that must be cut by one ratio, counted in slots.

    Attributes:
        cells: The cells, in group order.
        step: Every cell drops a multiple of this many slots.
    """

    cells: tuple[Cell, ...]
    step: int


@dataclass(frozen=True, slots=True)
class Absorption:
    """What dropped constant channels gave to a node that reads them, made up for in its constants.

    Attributes:
        node: Position of the node in ``Graph.nodes``.
        bias: To be added to its output, shape (out,) before the cut; None where columns are added.
        weight: Name of its weight, of which columns are added.
        axis: Axis of the weight on which columns lie.
        group: Groups of channels that each have columns of their own.
        source, target: Columns that go, and the column each is added to, in the original's count.
        factor: What each is multiplied by first.
    """

    node: int
    bias: Float64Array | None = None
    weight: str = ""
    axis: int = 0
    group: int = 1
    source: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))
    target: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))
    factor: Float64Array = field(default_factory=lambda: np.zeros(0))


@dataclass(frozen=True, slots=True)
class LayerStats:
    """Cost of one node.

    Attributes:
        node: Its label.
        op_type: Its operator.
        params: Elements of the constants it reads.
        macs: One multiply-accumulate for each weight use, bias not counted.
        moved_bytes: Bytes it reads and writes, weights included; 0 where it does not multiply.
        inputs: Channels it reads, 0 where that is not known.
        outputs: Channels it makes, likewise.
        depthwise: It has filters of its own for each channel.
        groups: Groups of a convolution, 1 elsewhere.
    """

    node: str
    op_type: str
    params: int
    macs: int
    moved_bytes: int = 0
    inputs: int = 0
    outputs: int = 0
    depthwise: bool = False
    groups: int = 1

    @property
    def density(self) -> float:
        """Multiply-accumulates for each byte moved: below a few, memory sets the pace."""
        return self.macs / self.moved_bytes if self.moved_bytes else 0.0


@dataclass(frozen=True, slots=True)
class ModelStats:
    """Cost of a model.

    Attributes:
        params: Elements of float or quantized constants, BN running statistics left out.
        macs: Multiply-accumulates at the stand-in shapes.
        bytes: File plus external data.
        channels: Width of all producing weight axes together.
        layers: One entry for each node that holds weights or multiplies.
    """

    params: int
    macs: int
    bytes: int
    channels: int
    layers: tuple[LayerStats, ...] = field(default=(), repr=False)


@dataclass(frozen=True, slots=True)
class Epoch:
    """One epoch of training.

    Attributes:
        number: From 1; 0 is the state before the first.
        loss: Mean loss of its steps, NaN for number 0.
        held_out: Loss on the samples held out.
        metric: Share of the held-out samples with the right class, or the teacher's; NaN where
            there are no classes.
        seconds: Wall-clock time.
    """

    number: int
    loss: float
    held_out: float
    metric: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Round:
    """One round of cutting and training.

    Attributes:
        number: From 1.
        params: Left after it.
        macs: Left after it.
        before: Share of right classes, or of agreement, on the samples held out, before training.
        after: The same after training.
        path: File of its model.
        measure: What the shares are of: ``top1``, ``agreement`` with the original, or "".
    """

    number: int
    params: int
    macs: int
    before: float
    after: float
    path: str
    measure: str = ""


@dataclass(frozen=True)
class Tuned:
    """What fine-tuning did.

    Attributes:
        trainer: Who computed.
        losses: Kinds of loss, such as ``("kd",)``.
        optimizer: ``adamw`` or ``sgd``.
        rate: Largest learning rate.
        batch_size: Samples of a step.
        samples: Trained on, and held out.
        weights: Weights that were trained, and elements of them.
        zeros: Elements that had to stay zero.
        measure: What ``metric`` of an epoch is: ``top1``, ``agreement`` or "".
        epochs: Before the first, then one by one.
        best: Number of the epoch whose weights were kept.
        checked: Weights whose gradients were compared with finite differences.
        drift_before: Of the model that came in from the teacher, by output.
        drift_after: Of the result.
    """

    trainer: str
    losses: tuple[str, ...]
    optimizer: str
    rate: float
    batch_size: int
    samples: tuple[int, int]
    weights: tuple[int, int]
    zeros: int
    measure: str
    epochs: tuple[Epoch, ...]
    best: int
    checked: int
    drift_before: Mapping[str, Drift] = field(default_factory=dict)
    drift_after: Mapping[str, Drift] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Drift:
    """How far one output of the pruned model lies from the original's.

    ``cosine`` in [-1, 1]; ``snr_db`` in decibels; ``rel_l2`` and ``max_abs`` >= 0; ``top1`` the
    share of samples with the same arg max, or None where the output does not look like classes.
    """

    cosine: float
    snr_db: float
    rel_l2: float
    max_abs: float
    top1: float | None


@dataclass(frozen=True, slots=True)
class TwinResult:
    """Largest difference of pruned model and masked twin, at the output that differs most.

    Attributes:
        passed: Every output is within its tolerance.
        max_abs: Largest absolute difference of that output.
        max_rel: The same, divided by the output's scale; for integers the share that differs.
        tolerance: What ``max_rel`` was held against.
        output: Name of that output.
    """

    passed: bool
    max_abs: float
    max_rel: float
    tolerance: float
    output: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What verification found.

    Attributes:
        status: ``passed``, ``failed``, ``not_run`` (no test was possible) or ``none`` (not asked).
        reason: Why, in one line; "" where all is well.
        twin: Pruned model against masked twin, or None where that was not compared.
        drift: Pruned model against the original, by output name.
        inputs: What both were run on.
        ours: A failure that is a bug of onnxprune, not a limit the user set.
        notes: What could not be compared, and the like.
    """

    status: str
    reason: str
    twin: TwinResult | None
    drift: Mapping[str, Drift]
    inputs: str
    ours: bool = False
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether nothing spoke against the result."""
        return self.status in ("passed", "none")


@dataclass(frozen=True, slots=True)
class Limits:
    """The user's own limits on drift; None means no limit."""

    max_drift: float | None = None
    min_cosine: float | None = None
    min_top1: float | None = None


@dataclass(frozen=True, slots=True)
class GroupReport:
    """One group in the report.

    Attributes:
        id: As in ``ChannelGroup``.
        size, kept: Positions along the producers' axis, before and after.
        unit: What one unit is.
        units: Number of units before.
        producers, consumers: Weights that make and read the channels.
        nodes: Nodes that use the producers.
        frozen: Why nothing may go, or None.
        why: What was done, or why nothing was.
    """

    id: int
    size: int
    kept: int
    unit: str
    units: int
    producers: tuple[str, ...]
    nodes: tuple[str, ...]
    consumers: tuple[str, ...]
    frozen: str | None
    why: str = ""


@dataclass(frozen=True, slots=True)
class Width:
    """Channels on one side of a layer; of a grouped convolution's inputs those of one group.

    Attributes:
        before, after: How many; after is None where nothing was cut.
        wants: What the hardware wants them to be a multiple of.
        step: What rounding to ``auto`` makes them a multiple of.
        aligned: They are what the hardware wants.
        why: Why they are not; or why that step.
    """

    before: int
    after: int | None
    wants: int
    step: int
    aligned: bool
    why: str


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One layer that multiplies, in the report.

    Attributes:
        before, after: What it costs; after is None where nothing was cut.
        thin: The cut left it too thin to be fast.
        inputs, outputs: Its channels; None where it multiplies by no constant weight.
    """

    before: LayerStats
    after: LayerStats | None
    thin: bool
    inputs: Width | None
    outputs: Width | None

    @property
    def aligned(self) -> bool:
        """Channels in and out are what the hardware wants."""
        return all(side is None or side.aligned for side in (self.inputs, self.outputs))


@dataclass(frozen=True, slots=True)
class Moved:
    """An axis of a weight whose entries stand in another order.

    ``kept``: the original position of each entry, in the new order.
    """

    tensor: str
    axis: int
    role: str
    kept: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Permuted:
    """What looking for a better order of a group's channels came to.

    Attributes:
        group: Its name.
        size: Channels.
        readers: Weights whose runs its channels make.
        before, after: Sum of the scores that the pattern keeps, in the old order and in the new.
        best: The same without runs: the largest scores, as many of them.
        why: Why the order stays, "" where it is new.
    """

    group: str
    size: int
    readers: tuple[str, ...]
    before: float
    after: float
    best: float
    why: str


@dataclass(frozen=True, slots=True)
class Refitted:
    """What refitting did to one layer.

    Attributes:
        node: Its node.
        before, after: Held-out error of its output before and after, as a share of the variance
            of the original's; before is with what feeds it refitted already. NaN where nothing
            was compared.
        ridge: How strongly it was held to its old weights, None where those were kept.
        why: Why they were kept; or that a sample of the rows had to do.
    """

    node: str
    before: float
    after: float
    ridge: float | None
    why: str = ""


@dataclass(frozen=True, slots=True)
class ThinLayer:
    """What a sparsity pattern did to one layer.

    Attributes:
        node: The layer.
        op_type: Its operator.
        tensor: Where its weight is stored, None where it is no constant.
        data_type: Element type of that tensor, a value of ``onnx.TensorProto.DataType``.
        done: The pattern was imposed.
        axis: Axis of the stored tensor along which the pattern runs, None where that is not known.
        groups: Groups of a convolution, or matrices of a stack.
        outputs, channels, taps: Of each: outputs, channels that each sums over, kernel positions.
        pattern: The pattern, "" where it stays dense.
        sparsity: Share of weights, blocks or kernels that went.
        zeros: Share of weights that are zero now.
        kept: Sum of the magnitudes that stay, as a share of all.
        error: Change of the weights: norm of the difference by norm of the original.
        eligible: It could take the pattern, whatever was asked to stay dense.
        aligned: Its outputs and channels are what sparse kernels want; None where not known.
        gains: A GPU is expected to run it faster.
        why: Why it stays dense, or why no gain is expected.
        shared: Its weight is that of another layer, where it is counted.
        method: How what stays was chosen, "" where it stays dense.
    """

    node: str
    op_type: str
    tensor: str | None
    data_type: int
    done: bool
    axis: int | None
    groups: int
    outputs: int
    channels: int
    taps: int
    pattern: str = ""
    sparsity: float = 0.0
    zeros: float = 0.0
    kept: float = 1.0
    error: float = 0.0
    eligible: bool = False
    aligned: bool | None = None
    gains: bool = False
    why: str = ""
    shared: bool = False
    method: str = ""

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.groups * self.outputs * self.channels * self.taps


@dataclass(frozen=True, slots=True)
class HeldWeight:
    """What sparsity a weight has.

    Attributes:
        node, op_type, tensor, axis, groups, outputs, channels, taps: As in ``ThinLayer``.
        zeros: Share of zeros.
        runs: The N:M patterns among 1:4, 2:4 and 4:8 that it holds.
        blocks: Share of whole blocks that are zero, by pattern; ``kernel`` for whole kernels.
        zero_outputs, zero_channels: Outputs made, and channels read, by zeros alone.
    """

    node: str
    op_type: str
    tensor: str
    axis: int
    groups: int
    outputs: int
    channels: int
    taps: int
    zeros: float
    runs: tuple[str, ...]
    blocks: Mapping[str, float]
    zero_outputs: int
    zero_channels: int


@dataclass(frozen=True, slots=True)
class Sparsified:
    """What a sparsity pattern did to a model.

    Attributes:
        pattern: The pattern.
        sparsity: Share of weights, blocks or kernels that was to go.
        scope: Of each layer (``local``) or of all together (``global``).
        method: How the values that stay were chosen.
        layers: Every layer.
        packed_bytes: Values that are left in the thinned weights, and where they are, packed.
        dense_bytes: The same weights in full, which is how they are stored.
        xz_bytes: The model before and after, each compressed with xz; None where not measured.
    """

    pattern: str
    sparsity: float
    scope: str
    method: str
    layers: tuple[ThinLayer, ...]
    packed_bytes: int
    dense_bytes: int
    xz_bytes: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Latency:
    """How long two models take, measured in turn in ONNX Runtime.

    Attributes:
        before: Median seconds of the first.
        after: Median seconds of the second.
        ratio: Median of second over first, round by round.
        low, high: Interval of that median at 95 %.
        runs: Rounds.
        threads: Threads inside an operator; None is one for each usable core.
        predicted: Seconds that were predicted for the second, None where nothing was.
        before_p90, after_p90: Seconds that nine of ten runs stay under.
        batch: Samples in one run, None where inputs have no axes.
    """

    before: float
    after: float
    ratio: float
    low: float
    high: float
    runs: int
    threads: int | None
    predicted: float | None = None
    before_p90: float | None = None
    after_p90: float | None = None
    batch: int | None = None


@dataclass(frozen=True, slots=True)
class Tidied:
    """What folding and simplifying left.

    Attributes:
        nodes: Nodes of the graph before and after.
        norms: BatchNormalizations before and after.
    """

    nodes: tuple[int, int]
    norms: tuple[int, int]


@dataclass(frozen=True, slots=True)
class NextStep:
    """What to run on a model next.

    Attributes:
        command: The line, ready for a shell.
        expect: What to expect of it, a line each.
    """

    command: str
    expect: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class KeptNode:
    """A node that quantization leaves in its type, and why."""

    node: str
    op_type: str
    why: str


@dataclass(frozen=True, slots=True)
class Quantized:
    """What quantization did to a model.

    Attributes:
        to: ``fp16``, ``bf16`` or ``int8``.
        method: How ranges of activations were found: ``minmax``, ``entropy`` or ``percentile``; ""
            for floats.
        done: Nodes that compute in the new type; for int8 the layers with weights.
        kept: Nodes that do not.
        lost: Weights other than zero that became zero.
        bytes: Of the weights, before and after.
        tried: Held-out error of each calibration method.
    """

    to: str
    method: str
    done: tuple[str, ...]
    kept: tuple[KeptNode, ...]
    lost: int
    bytes: tuple[int, int]
    tried: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Report:
    """Everything a verb has to say; ``report.build.as_json`` and ``report.tables`` print it.

    Attributes:
        verb: ``inspect``, ``shrink``, ``sparsify``, ``quantize``, ``compare``, ``check`` or
            ``finetune``.
        input_path: File of the model, "" for one in memory.
        before: Its cost.
        output_path: File that was written, or None.
        after: Cost of the result, or None where there is none.
        importance: Method that ranked the channels, "" where nothing was ranked.
        importance_why: Why that method.
        exact: The masked twin can prove the result; None where nothing was cut by us.
        groups: Every channel group.
        verdict: What verification found.
        stand_ins: Input shapes that costs are counted at.
        seconds: Wall-clock time of each stage.
        peak_memory_bytes: Most memory the process had.
        warnings: What a person should know, in order.
        recipe: The recipe as JSON, {} where nothing was removed.
        written: Every file that was written.
        restored: What refitting did to each layer, in execution order.
        shifted: Constants that restoring gave other values.
        without_effect: Channels that ``--lossless`` would remove, None where nobody looked.
        latency: Measured times, None where that was not asked for.
        layers: Every layer that multiplies.
        rounded: Channels left were rounded to something that was asked for.
        round_to: What they were rounded to.
        sparsified: What a sparsity pattern did, None where there was none.
        held: What sparsity every weight has, None where nobody looked.
        checked: What a check for a target found, None where there was none.
        following: What to run next, None where no file was written.
        tidied: What folding and simplifying left, None where nobody asked for it.
        tuned: What fine-tuning did, None where there was none.
        rounds: Rounds of cutting and training, where there were any.
        quantized: What quantization did, None where there was none.
    """

    verb: str
    input_path: str
    before: ModelStats
    output_path: str | None
    after: ModelStats | None
    importance: str
    importance_why: str
    exact: bool | None
    groups: tuple[GroupReport, ...]
    verdict: Verdict
    stand_ins: Mapping[str, Shape]
    seconds: Mapping[str, float]
    peak_memory_bytes: int
    warnings: tuple[str, ...] = ()
    recipe: Mapping[str, object] = field(default_factory=dict, repr=False)
    written: tuple[Path, ...] = ()
    restored: tuple[Refitted, ...] = ()
    shifted: int = 0
    without_effect: int | None = None
    latency: Latency | None = None
    layers: tuple[LayerReport, ...] = ()
    rounded: bool = False
    round_to: int | str = 1
    sparsified: Sparsified | None = None
    held: tuple[HeldWeight, ...] | None = None
    checked: Checked | None = None
    following: NextStep | None = None
    tidied: Tidied | None = None
    tuned: Tuned | None = None
    rounds: tuple[Round, ...] = ()
    quantized: Quantized | None = None
