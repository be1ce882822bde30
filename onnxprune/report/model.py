"""The shape of ``--json``: pydantic models, from which the JSON Schema is made."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class StatsJson(_Part):
    """Cost of one model; ``path`` is null for a model that is in no file."""

    path: str | None
    params: int
    macs: int
    bytes: int
    channels: int


class GroupJson(_Part):
    """A channel group.

    ``size`` and ``kept`` count along the producers' axis; ``units`` is how many heads, groups,
    pairs or channels that is; ``nodes`` use the producers.
    """

    id: int
    name: str
    size: int
    kept: int
    unit: Literal["channel", "head", "group", "pair"]
    units: int
    producers: list[str]
    nodes: list[str]
    consumers: list[str]
    frozen: str | None
    why: str


class TwinJson(_Part):
    """The pruned model against the masked twin."""

    passed: bool
    max_abs: float | None
    max_rel: float | None
    tolerance: float | None
    output: str


class DriftJson(_Part):
    """One output of the pruned model against the original's; null where there is no figure."""

    cosine: float | None
    snr_db: float | None
    rel_l2: float | None
    max_abs: float | None
    top1: float | None


class VerifyJson(_Part):
    """What verification found, and on which inputs."""

    status: Literal["passed", "failed", "not_run", "none"]
    reason: str
    twin: TwinJson | None
    drift: dict[str, DriftJson]
    inputs: str
    notes: list[str]


class OperatorJson(_Part):
    """One operator of the model; ``rule`` is null where it freezes what it touches."""

    op_type: str
    domain: str
    count: int
    params: int
    macs: int
    rule: str | None


class RefittedJson(_Part):
    """One refitted layer: held-out error of its output as a share of the original's variance.

    ``ridge`` is null where the old weights were kept, and ``why`` says the reason.
    """

    node: str
    before: float | None
    after: float | None
    ridge: float | None
    why: str | None = None


class CostJson(_Part):
    """A cost before and after the cut; ``after`` is null where nothing was cut."""

    before: int
    after: int | None


class DensityJson(_Part):
    """Multiply-accumulates for each byte moved, before and after the cut."""

    before: float
    after: float | None


class WidthJson(_Part):
    """Channels on one side of a layer; of a grouped convolution's inputs those of one group.

    ``wants`` is what the hardware wants a multiple of, ``step`` what ``--round-to auto`` rounds to;
    ``why`` says why they are not aligned, or why that step.
    """

    before: int
    after: int | None
    wants: int
    step: int
    aligned: bool
    why: str


class LayerJson(_Part):
    """One layer that multiplies; of two models, those they share by name.

    ``bytes`` are moved by one run, weights included; ``thin``: the cut left it too thin to be fast.
    ``inputs`` and ``outputs`` are null where it multiplies by no constant weight.
    """

    node: str
    op_type: str
    macs: CostJson
    bytes: CostJson
    density: DensityJson
    thin: bool
    inputs: WidthJson | None
    outputs: WidthJson | None


class LatencyJson(_Part):
    """Median times of two models in milliseconds, their ratio and its interval at 95 %.

    ``p90``: what nine of ten runs stay under; ``threads`` is null for all usable cores, ``batch``
    where inputs have no axes.
    """

    before_ms: float
    after_ms: float
    ratio: float
    low: float
    high: float
    runs: int
    predicted_ms: float | None = None
    before_p90_ms: float | None = None
    after_p90_ms: float | None = None
    threads: int | None = None
    batch: int | None = None


class ChangeJson(_Part):
    """A count before and after."""

    before: int
    after: int


class TidiedJson(_Part):
    """Nodes of the graph, and BatchNormalizations, before and after folding and simplifying."""

    nodes: ChangeJson
    norms: ChangeJson


class ThinLayerJson(_Part):
    """One layer and what a sparsity pattern did to it.

    ``shape`` is groups, outputs of each, channels that each output sums over, kernel positions;
    ``aligned``: they suit sparse kernels; ``kept`` is a share of the sum of magnitudes, ``error``
    the norm of the difference by that of the original; ``why`` says why it stays dense, or why no
    gain is expected; ``shared``: its weight is counted with another layer; ``method``: how what
    stays was chosen, by magnitude where the layer has no least-squares form.
    """

    node: str
    op_type: str
    tensor: str | None
    eligible: bool
    done: bool
    axis: int | None
    shape: tuple[int, int, int, int] | None
    aligned: bool | None
    sparsity: float
    zeros: float
    kept: float
    error: float
    gains: bool
    why: str
    shared: bool
    method: str


class XzJson(_Part):
    """Bytes of the model compressed with xz, before and after."""

    before: int
    after: int


class SparsityJson(_Part):
    """What a sparsity pattern did to a model.

    ``packed_bytes``: values left in the thinned weights, and where they belong; ``dense_bytes``:
    the same weights in full, as they are stored.
    """

    pattern: str
    sparsity: float
    scope: Literal["local", "global"]
    method: str
    layers: list[ThinLayerJson]
    packed_bytes: int
    dense_bytes: int
    xz: XzJson | None


class HeldJson(_Part):
    """What sparsity a weight has.

    ``zeros`` is the share of zeros, ``runs`` the N:M patterns that hold, ``blocks`` the share of
    blocks that are zero as a whole; ``zero_outputs`` and ``zero_channels`` count.
    """

    node: str
    op_type: str
    tensor: str
    axis: int
    shape: tuple[int, int, int, int]
    zeros: float
    runs: list[str]
    blocks: dict[str, float]
    zero_outputs: int
    zero_channels: int


class FindingJson(_Part):
    """One thing that a target minds; ``node`` is null for the model as a whole."""

    severity: Literal["error", "warning", "note"]
    rule: str
    node: str | None
    message: str
    cure: str | None


class BuildJson(_Part):
    """What the target made of the model; ``version`` is null where it died before it said one."""

    status: Literal["built", "refused", "failed", "crashed", "timeout"]
    version: str | None
    seconds: dict[str, float]
    engine_bytes: int | None


class ProfileJson(_Part):
    """Shapes of a dynamic input that an engine is for; ``given`` by the user, or ours."""

    min: list[int]
    opt: list[int]
    max: list[int]
    given: bool


class CheckJson(_Part):
    """What a check for a target found; ``build`` is null where the target itself was not asked.

    ``unasked`` says why it was not.
    """

    target: Literal["tensorrt"]
    passed: bool
    errors: int
    warnings: int
    notes: int
    findings: list[FindingJson]
    build: BuildJson | None
    unasked: str | None
    profiles: dict[str, ProfileJson]


class NextJson(_Part):
    """What to run next, and what to expect of it."""

    command: str
    expect: list[str]


class EpochJson(_Part):
    """One epoch; number 0 is the state before the first, which has no loss of its own."""

    number: int
    loss: float | None
    held_out: float | None
    metric: float | None
    seconds: float


class TunedJson(_Part):
    """What fine-tuning did.

    ``samples`` are those trained on and those held out; ``zeros`` weights had to stay zero;
    ``metric`` of an epoch is the share of held-out samples with the right class (``top1``) or the
    teacher's (``agreement``); ``best`` is the epoch whose weights were kept, ``checked`` how many
    gradients were compared with finite differences; drifts are from the teacher, before and after.
    """

    trainer: str
    losses: list[Literal["ce", "mse", "kd"]]
    optimizer: Literal["adamw", "sgd"]
    rate: float
    batch_size: int
    samples: tuple[int, int]
    tensors: int
    weights: int
    zeros: int
    measure: Literal["top1", "agreement", ""]
    epochs: list[EpochJson]
    best: int
    checked: int
    drift_before: dict[str, DriftJson]
    drift_after: dict[str, DriftJson]


class RoundJson(_Part):
    """One round of cutting and training: what is left, the share right before and after it."""

    number: int
    params: int
    macs: int
    before: float | None
    after: float | None
    path: str
    measure: Literal["top1", "agreement", ""]


class KeptNodeJson(_Part):
    """A node that quantization left in its type, and why."""

    node: str
    op_type: str
    why: str


class QuantizedJson(_Part):
    """What quantization did to a model.

    ``method`` is how int8 found the ranges of activations, ``tried`` the held-out error of each;
    ``lost`` counts weights that became zero; ``weight_bytes`` are before and after.
    """

    to: Literal["fp16", "bf16", "int8"]
    method: Literal["minmax", "percentile", "entropy"] | None
    done: list[str]
    kept: list[KeptNodeJson]
    lost: int
    weight_bytes: CostJson
    tried: dict[str, float | None]


class ReportJson(_Part):
    """What a verb has to say."""

    schema_: Literal[1] = Field(1, alias="schema")
    verb: Literal["inspect", "shrink", "sparsify", "quantize", "compare", "check", "finetune"]
    input: StatsJson
    output: StatsJson | None
    importance: str | None
    importance_why: str
    exact: bool | None
    groups: list[GroupJson]
    operators: list[OperatorJson] | None
    verify: VerifyJson
    stand_ins: dict[str, list[int]]
    seconds: dict[str, float]
    peak_memory_bytes: int
    warnings: list[str]
    without_effect: int | None
    restored: list[RefittedJson]
    latency: LatencyJson | None = None
    layers: list[LayerJson] = []
    sparsity: SparsityJson | None = None
    held: list[HeldJson] | None = None
    check: CheckJson | None = None
    next: NextJson | None = None
    tidied: TidiedJson | None = None
    tuned: TunedJson | None = None
    rounds: list[RoundJson] = []
    quantized: QuantizedJson | None = None
