"""What a trainer is: it takes a model and a job, and makes one update at a time.

Everything else is the core's: batches and their order, the learning rate, teacher outputs,
validation, which weights were best, checkpoints, and writing weights back by name. A trainer needs
no import from here: any object with these methods will do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import onnx

from onnxprune.types import AnyArray

Kind = Literal["ce", "mse", "kd"]
Arrays = Mapping[str, AnyArray]


class Blocking(NamedTuple):
    """A node that a trainer cannot train through.

    Attributes:
        node: Its name, or its first output where it has none.
        op: Operator type.
        reason: Why, in words that end a sentence: ``ort: no gradient for DepthToSpace``.
    """

    node: str
    op: str
    reason: str


@dataclass(frozen=True, slots=True)
class Term:
    """One term of the loss; all terms are added.

    Classes run along ``axis`` of the tensor, and every other position counts alike: the mean is
    taken over all of them (so over the batch, and over pixels or time steps where there are any).

    Attributes:
        kind: ``ce``: softmax cross entropy with the true classes, -log softmax(tensor)[class].
            ``kd``: T² · KL(softmax(target / T) || softmax(tensor / T)), Hinton et al. 2015
            (arXiv:1503.02531). ``mse``: mean of (tensor - target)² over all elements.
        tensor: Tensor of the model that it reads: an output or any other, before a Softmax for
            ``ce`` and ``kd`` (logits). float32.
        target: Key of the array in ``targets`` that goes with it. ``ce``: int64, the tensor's
            shape without ``axis``; else float32 of the tensor's shape (logits for ``kd``).
        weight: Factor.
        temperature: T of ``kd``.
        axis: Where the classes are, negative from the end; ``mse`` does not use it.
    """

    kind: Kind
    tensor: str
    target: str
    weight: float = 1.0
    temperature: float = 1.0
    axis: int = -1


@dataclass(frozen=True)
class Job:
    """What to train, and how. Names are those of initializers of the model handed over.

    Attributes:
        weights: What the optimizer changes; float32 all.
        terms: The loss.
        statistics: Running means and variances of BatchNormalization that training updates. A
            BatchNormalization whose statistics are listed normalises with those of the batch
            while it trains, running = momentum · running + (1 - momentum) · batch (variance over
            N, as ONNX says); one whose are not listed works as in inference.
        masks: Of some weights, what may be other than zero: True or False by element. The rest is
            zero before the first step and exactly zero after each.
        l1: Weights with an L1 penalty, and the factor of each: the loss that is minimised has
            ``step``'s l1 · factor · sum |w| added. What ``step`` returns leaves it out.
        decayed: Weights that decay; AdamW's is decoupled: w -= rate · weight_decay · w.
        optimizer: ``adamw`` (betas 0.9 and 0.999, eps 1e-8, corrected for bias) or ``sgd`` with
            momentum 0.9 (v = 0.9 · v + g; w -= rate · v; decay added to g).
        weight_decay: Of the weights in ``decayed``.
        clip: Largest norm of all gradients together, before the update; 0 for no limit.
        batch_size: Samples of a full batch. The last one of an epoch may be smaller.
        seed: For what is random in the model (Dropout).
        threads: To compute on; 0 leaves it to the trainer.
    """

    weights: tuple[str, ...]
    terms: tuple[Term, ...]
    statistics: tuple[str, ...] = ()
    masks: Mapping[str, AnyArray] = field(default_factory=dict, repr=False)
    l1: Mapping[str, float] = field(default_factory=dict)
    decayed: frozenset[str] = frozenset()
    optimizer: Literal["adamw", "sgd"] = "adamw"
    weight_decay: float = 0.0
    clip: float = 0.0
    batch_size: int = 64
    seed: int = 0
    threads: int = 0


@runtime_checkable
class Trainer(Protocol):
    """Makes one update of the weights at a time. Used as: supports, prepare, step …, close.

    The model is a copy for training: local functions are inlined, float Constants are
    initializers, no initializer hides behind an Identity or is shared by chance,
    ``training_mode`` is gone, every initializer is held in the message (no external data), and
    what was float16 is float32. Opset and IR version are the user's.
    """

    @property
    def name(self) -> str:
        """How reports and errors call it."""
        ...

    def supports(self, model: onnx.ModelProto) -> Sequence[Blocking]:
        """Nodes that it cannot train through; none where it can take the model."""
        ...

    def prepare(self, model: onnx.ModelProto, job: Job) -> None:
        """Take the model in; once, before anything below. Keeps masked weights at zero at once.

        Raises:
            OnnxPruneError: It cannot: one line, naming the node.
        """
        ...

    def gradients(self, inputs: Arrays, targets: Arrays) -> tuple[float, Arrays]:
        """Loss and gradients of a batch in training mode, without L1, masks or an update.

        The core checks a few of them against finite differences before the first step. Running
        statistics may move; the core puts them back with ``load``.
        """
        ...

    def step(self, inputs: Arrays, targets: Arrays, *, rate: float, l1: float = 0.0) -> float:
        """Make one update and return the loss before it (L1 left out; NaN as it comes).

        Args:
            inputs: Array of each graph input, axis 0 counts samples.
            targets: Array of each term's ``target``.
            rate: Learning rate.
            l1: Factor of the L1 penalty.

        Raises:
            OnnxPruneError: It died, or ran out of memory: one line.
        """
        ...

    def weights(self) -> Arrays:
        """Values of ``job.weights`` and ``job.statistics`` as they stand: float32, copies."""
        ...

    def state(self) -> Arrays:
        """All that is needed to go on to the same result.

        That is ``weights()`` by their names, and the optimizer's own arrays by names with a ``#``
        in front (a count of steps is a 0-d array).
        """
        ...

    def load(self, state: Arrays) -> None:
        """Put back what ``state`` gave; or weights alone, and then the rest stays as it is."""
        ...

    def close(self) -> None:
        """Free everything; may be called twice, and after an error."""
        ...
