"""The trainer ``torch``: our interpreter, PyTorch's gradients and optimizers.

For Pythons, platforms, GPUs, opsets and operators that onnxruntime-training has no answer for. The
protocol leaves two things open: where to compute, which is given when the trainer is made, and
outputs of the model as it stands, for which there is ``evaluate``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx

from onnxprune.errors import InvariantError, TrainingError, UsageError
from onnxprune.train.protocol import Arrays, Blocking, Job, Term
from onnxprune.train.torch_graph import TorchGraph, unknown
from onnxprune.train.torch_ops.lazy import Tensor, functional, torch
from onnxprune.types import AnyArray

_MOMENTS = {"adamw": {"#m/": "exp_avg", "#v/": "exp_avg_sq"}, "sgd": {"#m/": "momentum_buffer"}}
_STEPS = "#steps"


class TorchTrainer:
    """Trains a model with PyTorch; a ``Trainer``.

    Args:
        device: ``auto`` takes a CUDA device where there is one, else the CPU; or as torch spells
            it: ``cpu``, ``cuda``, ``cuda:1``, ``mps``.
        channels_last: Keep images with the channels innermost, which convolutions run faster on;
            None does so where that is so.
    """

    name = "torch"

    def __init__(self, device: str = "auto", *, channels_last: bool | None = None) -> None:
        """Ready to prepare; PyTorch is imported here.

        Raises:
            MissingExtraError: It is not installed.
        """
        self.version = str(torch.__version__)
        self._device, self._channels_last = device, channels_last
        self._graph: TorchGraph | None = None
        self._threads: int | None = None

    def supports(self, model: onnx.ModelProto) -> Sequence[Blocking]:
        """Nodes whose operator the interpreter does not know; nothing is computed."""
        blocking = []
        for node in unknown(model):
            spelled = f"{node.domain}:{node.op_type}" if node.domain else node.op_type
            label = node.name or next(iter(node.output), "")
            blocking.append(Blocking(label, node.op_type, f"torch: {spelled} is not known"))
        return blocking

    def prepare(self, model: onnx.ModelProto, job: Job) -> None:
        """Compile the model, place the weights, set masked ones to zero.

        Raises:
            UnsupportedModelError: An operator is not known.
            UsageError: The device is not there, or a weight is not.
        """
        device = _device(self._device)
        if job.threads:
            self._threads = torch.get_num_threads()
            torch.set_num_threads(job.threads)
        graph = TorchGraph(
            model,
            trained=job.weights,
            statistics=job.statistics,
            device=device,
            seed=job.seed,
        )
        if _images(graph) if self._channels_last is None else self._channels_last:
            graph.use_channels_last()
        self._job, self._graph = job, graph
        self._optimizer, self._steps = _optimizer(graph, job), 0
        self._masks = {
            name: torch.empty_like(graph.parameters[name].detach()).copy_(_tensor(mask))
            for name, mask in job.masks.items()
        }
        self._keep_zeros()

    def gradients(self, inputs: Arrays, targets: Arrays) -> tuple[float, Arrays]:
        """Loss and gradients of a batch in training mode, without L1, masks or an update."""
        graph = self._ready()
        self._optimizer.zero_grad()
        with _one_line():
            loss = self._loss(inputs, targets)
            if loss.requires_grad:
                loss.backward()
        found = {
            name: _array(torch.zeros_like(weight) if weight.grad is None else weight.grad)
            for name, weight in graph.parameters.items()
        }
        self._optimizer.zero_grad()
        return float(loss.detach()), found

    def step(self, inputs: Arrays, targets: Arrays, *, rate: float, l1: float = 0.0) -> float:
        """Make one update and return the loss before it, without L1.

        Raises:
            UnsupportedModelError: A node cannot be computed.
            TrainingError: PyTorch failed on the way back, or memory is short.
        """
        graph, job = self._ready(), self._job
        self._optimizer.zero_grad()
        with _one_line():
            loss = self._loss(inputs, targets)
            if loss.requires_grad:
                loss.backward()
            weights = [weight for weight in graph.parameters.values() if weight.grad is not None]
            if job.clip and weights:
                torch.nn.utils.clip_grad_norm_(weights, job.clip)
            for name, factor in job.l1.items() if l1 else ():
                weight = graph.parameters[name]
                pull = torch.sign(weight.detach()) * (l1 * factor)
                weight.grad = pull if weight.grad is None else weight.grad.add_(pull)
            for group in self._optimizer.param_groups:
                group["lr"] = rate
            self._optimizer.step()
        self._steps += 1
        self._keep_zeros()
        return float(loss)

    def evaluate(self, inputs: Arrays, names: Sequence[str] = ()) -> Arrays:
        """Tensors of the model in inference mode, all outputs by default."""
        with torch.no_grad(), _one_line():
            found = self._ready().run(inputs, names)
        return {name: _array(value) for name, value in found.items()}

    def weights(self) -> Arrays:
        """Values of the trained weights and the running statistics: float32 copies."""
        graph = self._ready()
        names = (*self._job.weights, *self._job.statistics)
        return {name: _array(graph.constant(name)) for name in names}

    def state(self) -> Arrays:
        """``weights()`` and the optimizer's arrays: ``#steps``, ``#m/NAME``, ``#v/NAME``."""
        found = dict(self.weights())
        for name, weight in self._ready().parameters.items():
            own = self._optimizer.state.get(weight, {})
            for prefix, key in _MOMENTS[self._job.optimizer].items():
                moment = own.get(key)
                found[prefix + name] = _array(
                    torch.zeros_like(weight) if moment is None else moment
                )
        found[_STEPS] = np.array(self._steps, np.int64)
        return found

    def load(self, state: Arrays) -> None:
        """Put back what ``state`` gave, or weights alone."""
        graph = self._ready()
        with torch.no_grad():
            for name in (*self._job.weights, *self._job.statistics):
                if name in state:
                    tensor = graph.constant(name)
                    tensor.copy_(_tensor(state[name]))
        self._steps = int(state.get(_STEPS, np.array(self._steps)))
        for name, weight in graph.parameters.items():
            own = {}
            for prefix, key in _MOMENTS[self._job.optimizer].items():
                if prefix + name in state:
                    moment = _tensor(state[prefix + name])
                    own[key] = torch.empty_like(weight.detach()).copy_(moment)
            if own:
                if self._job.optimizer == "adamw":
                    own["step"] = torch.tensor(float(self._steps))
                self._optimizer.state[weight] = own
        self._keep_zeros()

    def close(self) -> None:
        """Free everything."""
        self._graph = None
        self._optimizer = None
        self._masks = {}
        if self._threads is not None:
            torch.set_num_threads(self._threads)
            self._threads = None

    def _ready(self) -> TorchGraph:
        if self._graph is None:
            raise InvariantError("the trainer was not prepared, or is closed")
        return self._graph

    def _keep_zeros(self) -> None:
        graph = self._ready()
        if self._masks:
            with torch.no_grad():
                weights = [graph.parameters[name] for name in self._masks]
                torch._foreach_mul_(weights, list(self._masks.values()))

    def _loss(self, inputs: Arrays, targets: Arrays) -> Tensor:
        graph, terms = self._ready(), self._job.terms
        found = graph.run(inputs, [term.tensor for term in terms], training=True)
        total = torch.zeros((), device=graph.device)
        for term in terms:
            target = torch.from_numpy(np.array(targets[term.target])).to(graph.device)
            total = total + term.weight * _term(term, found[term.tensor], target)
        return total


def _term(term: Term, made: Tensor, target: Tensor) -> Tensor:
    """One term of the loss; the mean is over all positions but the classes'."""
    if term.kind == "mse":
        return functional.mse_loss(made, target)
    if term.kind == "ce":
        scores = made.movedim(term.axis, -1)
        return functional.cross_entropy(scores.flatten(0, -2), target.flatten().long())
    heat = term.temperature
    ours = torch.log_softmax(made / heat, term.axis)
    theirs = torch.log_softmax(target / heat, term.axis)
    apart = (theirs.exp() * (theirs - ours)).sum(term.axis)
    return apart.mean() * heat**2


def _optimizer(graph: TorchGraph, job: Job) -> Any:
    """AdamW or SGD with momentum, over weights that decay and weights that do not."""
    split: Mapping[bool, list[Tensor]] = {True: [], False: []}
    for name, weight in graph.parameters.items():
        split[name in job.decayed].append(weight)
    groups = [
        {"params": weights, "weight_decay": job.weight_decay if decays else 0.0}
        for decays, weights in split.items()
        if weights
    ]
    if job.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=0.9)
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), eps=1e-8)


def _images(graph: TorchGraph) -> bool:
    """Whether convolutions of images are most of what is trained, and few of them depthwise.

    Measured on a CPU: a ResNet steps a fifth faster with channels innermost, a MobileNet slower.
    """
    weights = list(graph.parameters.values())
    filters = [weight for weight in weights if weight.ndim == 4]
    depthwise = sum(int(weight.shape[1]) == 1 for weight in filters)
    size = sum(int(weight.numel()) for weight in filters)
    most = 2 * size > sum(int(weight.numel()) for weight in weights)
    return most and 4 * depthwise < len(filters)


def _tensor(array: AnyArray) -> Tensor:
    """A float32 tensor of its own."""
    return torch.from_numpy(np.array(array, np.float32))


def _device(spelled: str) -> str:
    if spelled == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=spelled)
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"device '{spelled}' cannot be used: {reason}") from error
    return spelled


def _array(tensor: Tensor) -> AnyArray:
    """A copy on the host, in C order."""
    found: AnyArray = np.array(tensor.detach().cpu().numpy(), order="C")
    return found


@contextmanager
def _one_line() -> Iterator[None]:
    """What torch itself raises, as one line: of the backward pass, for the most part."""
    try:
        yield
    except (RuntimeError, ValueError, IndexError) as error:
        reason = " ".join(str(error).split())[:300]
        hint = "a smaller --batch-size needs less" if "memory" in reason else ""
        raise TrainingError(f"trainer 'torch' failed: {reason}", hint=hint) from error
