"""Against Torch-Pruning: the same networks, images and MACs; top-1 without any training.

    python tools/bench/peers.py --markdown tools/bench/results/peers.md

Needs torch and Torch-Pruning 1.6.1 (`pip install --no-deps torch-pruning==1.6.1`). The networks of
`tools/train_fashion.py` get the weights of `models/fashion_*.onnx`. The peer prunes each with every
one of its data-free criteria and scopes below, a hundredth of the channels at a time until the
target is met, and keeps of each point *the best by test accuracy*, which no user could know; the
best before and the best after BatchNormalization re-estimation are chosen apart. Re-estimation and
our data are the 256 images of `models/fashion_calib.npz`, without labels. Ours runs once with
defaults, and may use no more MACs than the peer's best after re-estimation (of ViT, which has no
BatchNormalization, before) really has. MACs of both are counted by onnxprune, on an ONNX export.

*Ahead* holds ours with data against the better of the peer's two. It compares what each does
without training: ours refits weights, the peer, which expects fine-tuning to follow, does not. The
2,000 test images give a standard error of about half a point.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import onnx
import torch
import torch_pruning as tp
from accuracy import MODELS, NETWORKS, Test
from onnx import numpy_helper
from torch import Tensor, nn

from onnxprune.analyse import analyse
from onnxprune.cost import stats
from onnxprune.data import Data, load_data
from onnxprune.io import load
from onnxprune.model import Model
from onnxprune.pipeline import shrink

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_fashion

TARGETS = (0.9, 0.75, 0.5, 0.25)
STEPS = 100  # of the peer, from nothing to all channels
CRITERIA: Mapping[str, Callable[[], tp.importance.Importance]] = {
    f"L{p} {reduction}": lambda p=p, reduction=reduction: tp.importance.GroupMagnitudeImportance(
        p=p, group_reduction=reduction
    )
    for p in (1, 2)
    for reduction in ("mean", "max")
} | {"BN scale": tp.importance.BNScaleImportance, "LAMP": tp.importance.LAMPImportance}
SCOPES: Mapping[str, Mapping[str, bool]] = {
    "local": {},
    "global": {"global_pruning": True},
    "isomorphic": {"global_pruning": True, "isomorphic": True},
}


# -- networks --------------------------------------------------------------------------------------


def network(name: str) -> nn.Module:
    """The network of ``tools/train_fashion.py`` with the weights of the ONNX file."""
    made = train_fashion.RECIPES[name].build()
    found = made.load_state_dict(state_of(onnx.load(MODELS / f"fashion_{name}.onnx")), strict=False)
    missing = [key for key in found.missing_keys if not key.endswith("num_batches_tracked")]
    if missing or found.unexpected_keys:
        raise SystemExit(f"{name}: no weights for {missing}, no place for {found.unexpected_keys}")
    for one in attentions(made):
        one.__class__ = Unbound
    return made.eval()


def attentions(made: nn.Module) -> list[train_fashion.Attention]:
    """All attention layers."""
    return [one for one in made.modules() if isinstance(one, train_fashion.Attention)]


def state_of(model: onnx.ModelProto) -> dict[str, Tensor]:
    """Weights by the names PyTorch has for them.

    The exporter stores equal tensors once, behind Identity, and a Linear on three axes as MatMul
    with a transposed weight without a name, then Add of the bias.
    """
    stored = {one.name: numpy_helper.to_array(one) for one in model.graph.initializer}
    maker = {output: node for node in model.graph.node for output in node.output}
    for node in model.graph.node:
        if node.op_type == "Identity" and node.input[0] in stored:
            stored[node.output[0]] = stored[node.input[0]]
        product = maker.get(node.input[1]) if node.op_type == "Add" else None
        if product is not None and product.op_type == "MatMul" and node.input[0] in stored:
            weight = stored.pop(product.input[1])
            stored[node.input[0].removesuffix("bias") + "weight"] = weight.T
    return {
        name: torch.from_numpy(array.copy())
        for name, array in stored.items()
        if name.rpartition(".")[2] in {"weight", "bias", "running_mean", "running_var"}
        or name in {"class_token", "position"}
    }


def top1(made: nn.Module, test: Test) -> float:
    """Per cent of the test images."""
    with torch.inference_mode():
        found = [made(piece).argmax(1) for piece in torch.from_numpy(test.images).split(500)]
    return float(100 * np.mean(torch.cat(found).numpy() == test.labels))


def macs_of(made: nn.Module) -> int:
    """MACs of the ONNX export."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "network.onnx")
        train_fashion.export(copy.deepcopy(made), path)
        return stats(analyse(load(path))).macs


class Unbound(train_fashion.Attention):
    """The same attention, its queries, keys and values parted as the peer can follow."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, tokens, width) to the same shape."""
        each = self.width // self.heads
        qkv = self.qkv(x).reshape(-1, self.tokens, 3, self.heads, each).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        weights = torch.softmax(query @ key.transpose(-2, -1) * each**-0.5, dim=-1)
        mixed = (weights @ value).transpose(1, 2).reshape(-1, self.tokens, self.width)
        result: Tensor = self.out(mixed)
        return result


# -- the peer --------------------------------------------------------------------------------------


def re_estimated(made: nn.Module, images: Tensor) -> nn.Module | None:
    """A copy whose BatchNormalization has the statistics of ``images``; None if it has none."""
    made = copy.deepcopy(made)
    norms = [module for module in made.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # plain mean over batches
        norm.train()
    with torch.no_grad():
        made(images)
    return made.eval() if norms else None


class Peer:
    """Torch-Pruning on one network, with one criterion and scope."""

    def __init__(self, made: nn.Module, criterion: str, scope: str, *, width: bool) -> None:
        self.made = copy.deepcopy(made)
        kept: list[nn.Module] = [self.made.get_submodule("head")]
        if not width:  # what writes the sum that all blocks add to
            kept.append(self.made.get_submodule("embed"))
        self.pruner = tp.pruner.BasePruner(
            self.made,
            torch.zeros(1, 1, train_fashion.SIDE, train_fashion.SIDE),
            importance=CRITERIA[criterion](),
            pruning_ratio=1.0,
            max_pruning_ratio=0.95,
            iterative_steps=STEPS,
            ignored_layers=kept,
            num_heads={one.qkv: one.heads for one in attentions(self.made)},
            in_channel_groups={},
            out_channel_groups={},
            **SCOPES[scope],
        )

    def step(self) -> bool:
        """Prune a little more; false at the end."""
        if self.pruner.current_step >= STEPS - 1:
            return False
        self.pruner.step()
        for one in attentions(self.made):
            self._mend(one)
        return True

    def _mend(self, one: train_fashion.Attention) -> None:
        """Sizes that are no layer's own; queries as large as before, by the number they share."""
        width = one.qkv.out_features // 3
        heads = self.pruner.num_heads[one.qkv]
        grown = (width / heads) / (one.width / one.heads)
        one.width, one.heads = width, heads
        with torch.no_grad():
            one.qkv.weight[:width] *= grown**0.5
            one.qkv.bias[:width] *= grown**0.5


def uses(made: nn.Module) -> int:
    """MACs of the layers with weights, as onnxprune counts them."""
    total = 0

    def count(module: nn.Module, _inputs: object, output: Tensor) -> None:
        nonlocal total
        places = output.numel() // output.shape[1 if isinstance(module, nn.Conv2d) else -1]
        total += module.weight.numel() * places

    def multiply(module: train_fashion.Attention, _inputs: object, _output: Tensor) -> None:
        nonlocal total
        total += 2 * module.tokens**2 * module.width

    hooks = [
        module.register_forward_hook(count)
        for module in made.modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    hooks += [one.register_forward_hook(multiply) for one in attentions(made)]
    with torch.inference_mode():
        made(torch.zeros(1, 1, train_fashion.SIDE, train_fashion.SIDE))
    for hook in hooks:
        hook.remove()
    return total


@dataclass
class Best:
    """The best that the peer reached at one target, before and after re-estimation."""

    plain: float = 0.0
    plain_by: str = "-"
    restored: float | None = None
    by: str = "-"
    made: nn.Module | None = None

    def offer(self, made: nn.Module, label: str, test: Test, images: Tensor) -> None:
        """Take ``made`` where it is better."""
        plain, again = top1(made, test), re_estimated(made, images)
        if plain > self.plain:
            self.plain, self.plain_by = plain, label
            if again is None:
                self.by, self.made = label, copy.deepcopy(made)
        if again is not None and (restored := top1(again, test)) > (self.restored or 0.0):
            self.restored, self.by, self.made = restored, label, again


def peer(
    made: nn.Module, targets: Sequence[float], test: Test, images: Tensor
) -> Mapping[float, Best]:
    """The best of all criteria and scopes at each target."""
    found = {target: Best() for target in targets}
    whole = uses(made)
    transformer = isinstance(made, train_fashion.VisionTransformer)
    for criterion, scope, width in product(CRITERIA, SCOPES, (True, False)):
        if (criterion == "BN scale") if transformer else not width:
            continue
        label = f"{criterion}, {scope}" + ("" if width else ", width kept")
        try:
            run(Peer(made, criterion, scope, width=width), label, whole, found, test, images)
        except (RuntimeError, ValueError, IndexError, ZeroDivisionError) as error:
            print(f"{label}: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
    return found


def run(
    one: Peer, label: str, whole: int, found: Mapping[float, Best], test: Test, images: Tensor
) -> None:
    """One pass through all targets, from the largest to the smallest."""
    waiting = sorted(found, reverse=True)
    while waiting and one.step():
        left = uses(one.made) / whole
        while waiting and left <= waiting[0]:
            found[waiting.pop(0)].offer(one.made, label, test, images)


# -- the bench -------------------------------------------------------------------------------------


def ours(model: Model, share: float, data: Data | None, test: Test) -> float:
    """Top-1 of what ``shrink`` makes with defaults and no more than a share of the MACs.

    A target is met to within a hundredth from either side; where more is left, less is asked for.
    """
    asked = share
    while True:
        made, report = shrink(model, targets={"macs": asked}, data=data, verify="none")
        assert report.after is not None
        over = report.after.macs / report.before.macs - share
        if over <= 0:
            return test(made)
        asked -= over + 0.001


def rows(name: str, targets: Sequence[float], test: Test) -> Iterator[str]:
    """The lines of one network."""
    made, path = network(name), MODELS / f"fashion_{name}.onnx"
    model = load(path)
    data = load_data(MODELS / "fashion_calib.npz", model)
    images = torch.from_numpy(np.load(MODELS / "fashion_calib.npz")["input"])
    theirs, uncut = top1(made, test), test(model)
    if abs(theirs - uncut) > 0.1:
        raise SystemExit(f"{name}: {theirs:.2f} in PyTorch, {uncut:.2f} in ONNX")
    whole = macs_of(made)
    for target, best in peer(made, targets, test, images).items():
        if best.made is None:
            yield f"| {name} | {uncut:.2f} | {target:g} | out of reach | | | | | |"
            continue
        share = macs_of(best.made) / whole
        bare, fitted = (ours(model, share, given, test) for given in (None, data))
        top = max(best.plain, best.restored or 0.0)
        again = "-" if best.restored is None else f"{best.restored:.2f} ({best.by})"
        yield (
            f"| {name} | {uncut:.2f} | {share:.3f} | {best.plain:.2f} ({best.plain_by}) | {again} "
            f"| {bare:.2f} | {fitted:.2f} | {ahead(fitted - top)} |"
        )


def ahead(points: float) -> str:
    """Who is, and by how much."""
    if abs(points) < 0.005:
        return "even"
    return f"{'ours' if points > 0 else 'peer'} {abs(points):.2f}"


def main() -> int:
    """Print a table, and write it as it grows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--targets", default=",".join(map(str, TARGETS)))
    parser.add_argument(
        "--images", type=Path, metavar="DIR", help="folder of Fashion-MNIST's files: all 10,000"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    test = Test(args.images)
    header = (
        "network", "uncut", "MACs left", "TP plain, best", "TP + BN re-estimation, best",
        "ours, no data", "ours, data", "ahead",
    )  # fmt: skip
    lines = ["# Against Torch-Pruning 1.6.1", "", *(__doc__ or "").splitlines()[4:], ""]
    lines += ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    print("\n".join(lines), flush=True)
    for name in args.networks.split(","):
        for line in rows(name, [float(target) for target in args.targets.split(",")], test):
            lines.append(line)
            print(line, flush=True)
            if args.markdown is not None:
                args.markdown.write_text("\n".join(lines) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
