"""Train the four small Fashion-MNIST networks of ``models/`` and write their data files.

Run it from the repository root, with torch, onnx and numpy installed (onnxprune is not needed):

    python tools/train_fashion.py

The images are those of the Debian package ``dataset-fashion-mnist``; ``--data`` names another
folder with the same four idx files. All networks read pixels in [0, 1], minus 0.2860, over 0.3530.
"""

from __future__ import annotations

import argparse
import gzip
import math
import struct
import sys
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

PACKAGE = "dataset-fashion-mnist"
DATA = Path("/usr/share/datasets/fashion-mnist")
MODELS = Path(__file__).resolve().parent.parent / "models"
MEAN, STD = 0.2860, 0.3530
SIDE, CLASSES, SHIFT = 28, 10, 2
CALIBRATION_IMAGES, TEST_IMAGES_PER_CLASS = 256, 200
OPSET = 17


# --- data -----------------------------------------------------------------------------------------


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Read one gzipped idx file of unsigned bytes.

    Args:
        path: For example ``train-images-idx3-ubyte.gz``.

    Returns:
        Array of the shape the file's header states.

    Raises:
        SystemExit: The file is missing or is not an idx file of bytes.
    """
    if not path.is_file():
        sys.exit(f"{path} not found: install the Debian package {PACKAGE} or pass --data")
    raw = gzip.decompress(path.read_bytes())
    zero, kind, rank = struct.unpack_from(">HBB", raw)
    if (zero, kind) != (0, 0x08):  # 0x08: unsigned byte
        sys.exit(f"{path} is not an idx file of unsigned bytes")
    shape = struct.unpack_from(f">{rank}I", raw, 4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape)


def normalise(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Turn bytes of shape (n, 28, 28) into the networks' float32 input, shape (n, 1, 28, 28)."""
    scaled = (pixels[:, None].astype(np.float32) / 255 - MEAN) / STD
    return scaled.astype(np.float32)


def balanced(labels: NDArray[np.uint8], per_class: int) -> NDArray[np.int64]:
    """Positions of the first ``per_class`` images of each class, the classes taking turns.

    Any prefix whose length is a multiple of the number of classes is balanced too.
    """
    columns = [np.flatnonzero(labels == label)[:per_class] for label in range(CLASSES)]
    return np.stack(columns, axis=1).reshape(-1)


@dataclass(frozen=True, slots=True)
class Fashion:
    """The data set, as bytes: images (n, 28, 28) and labels (n,)."""

    train_images: NDArray[np.uint8]
    train_labels: NDArray[np.uint8]
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.uint8]

    @classmethod
    def load(cls, folder: Path) -> Fashion:
        """Read the four idx files of ``folder``."""
        return cls(
            read_idx(folder / "train-images-idx3-ubyte.gz"),
            read_idx(folder / "train-labels-idx1-ubyte.gz"),
            read_idx(folder / "t10k-images-idx3-ubyte.gz"),
            read_idx(folder / "t10k-labels-idx1-ubyte.gz"),
        )

    def save_samples(self, folder: Path, rng: np.random.Generator) -> None:
        """Write ``fashion_calib.npz`` (training images only) and ``fashion_test.npz``."""
        picked = rng.choice(len(self.train_images), CALIBRATION_IMAGES, replace=False)
        np.savez_compressed(
            folder / "fashion_calib.npz", input=normalise(self.train_images[picked])
        )
        rows = balanced(self.test_labels, TEST_IMAGES_PER_CLASS)
        np.savez_compressed(
            folder / "fashion_test.npz",
            input=normalise(self.test_images[rows]),
            labels=self.test_labels[rows].astype(np.int64),
        )


def augmented_batches(
    images: NDArray[np.uint8], labels: NDArray[np.uint8], *, batch: int, rng: np.random.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch in random order; each image shifted by up to 2 pixels and flipped half the time."""
    padded = np.pad(images, ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT)))
    order = rng.permutation(len(images))
    for start in range(0, len(order) - batch + 1, batch):
        picked = order[start : start + batch]
        offsets = rng.integers(0, 2 * SHIFT + 1, size=(2, batch, 1))
        rows, columns = offsets + np.arange(SIDE)  # each (batch, 28)
        flip = rng.integers(0, 2, batch).astype(bool)
        columns[flip] = columns[flip, ::-1]
        shifted = padded[picked[:, None, None], rows[:, :, None], columns[:, None, :]]
        targets = torch.from_numpy(labels[picked].astype(np.int64))
        yield torch.from_numpy(normalise(shifted)), targets


# --- networks -------------------------------------------------------------------------------------


def named(**layers: nn.Module) -> nn.Sequential:
    """A chain whose layers keep their names in the ONNX file."""
    return nn.Sequential(OrderedDict(layers))


def conv_bn(
    inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    """A convolution that keeps the size (over ``stride``), and its BatchNormalization."""
    return named(
        conv=nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        bn=nn.BatchNorm2d(outputs),
    )


def classifier(width: int) -> dict[str, nn.Module]:
    """Mean over the image, then one linear layer."""
    return {
        "mean": nn.AdaptiveAvgPool2d(1),
        "flatten": nn.Flatten(),
        "head": nn.Linear(width, CLASSES),
    }


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside an identity, or a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        """Build the block for ``inputs`` to ``outputs`` channels."""
        super().__init__()
        self.first = conv_bn(inputs, outputs, stride=stride)
        self.second = conv_bn(outputs, outputs)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else conv_bn(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, inputs, h, w) to (batch, outputs, h / stride, w / stride)."""
        y = self.second(torch.relu(self.first(x)))
        return torch.relu(y + self.shortcut(x))


def resnet() -> nn.Module:
    """Residual network: three stages of two blocks, 16, 32 and 64 channels wide."""
    layers: dict[str, nn.Module] = {"stem": conv_bn(1, 16), "relu": nn.ReLU()}
    inputs = 16
    shapes = ((16, 1), (16, 1), (32, 2), (32, 1), (64, 2), (64, 1))
    for number, (outputs, stride) in enumerate(shapes, start=1):
        layers[f"block{number}"] = ResidualBlock(inputs, outputs, stride)
        inputs = outputs
    return named(**layers, **classifier(inputs))


def vgg() -> nn.Module:
    """Plain chain of convolution, BatchNormalization and ReLU, with two max poolings.

    Scales start at 0.5, as in Network Slimming (arXiv:1708.06519).
    """
    layers: dict[str, nn.Module] = {}
    inputs = 1
    for number, outputs in enumerate((16, 32, 64, 64, 96, 96, 96), start=1):
        layers[f"layer{number}"] = conv_bn(inputs, outputs)
        layers[f"relu{number}"] = nn.ReLU()
        if number in {2, 4}:
            layers[f"pool{number}"] = nn.MaxPool2d(2)
        inputs = outputs
    network = named(**layers, **classifier(inputs))
    for scale in batch_norm_scales(network):
        nn.init.constant_(scale, 0.5)
    return network


class SqueezeExcite(nn.Module):
    """Scales each channel by a gate in [0, 1] computed from the means of all channels."""

    def __init__(self, channels: int) -> None:
        """Build the two 1x1 convolutions of the gate; the middle has a quarter of the channels."""
        super().__init__()
        middle = channels // 4
        self.gate = named(
            mean=nn.AdaptiveAvgPool2d(1),
            squeeze=nn.Conv2d(channels, middle, 1),
            relu=nn.ReLU(),
            excite=nn.Conv2d(middle, channels, 1),
            sigmoid=nn.Hardsigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Gate ``x``, shape (batch, channels, h, w)."""
        gated: Tensor = x * self.gate(x)
        return gated


class InvertedResidual(nn.Module):
    """Widen, depthwise convolution, squeeze-excite, narrow; an identity where the shape stays."""

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int) -> None:
        """Build the block, ``expand`` times as wide inside as ``inputs``."""
        super().__init__()
        wide = inputs * expand
        self.same = inputs == outputs and stride == 1
        self.body = named(
            widen=conv_bn(inputs, wide, 1),
            swish1=nn.Hardswish(),
            depthwise=conv_bn(wide, wide, 3, stride, groups=wide),
            swish2=nn.Hardswish(),
            excite=SqueezeExcite(wide),
            narrow=conv_bn(wide, outputs, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, inputs, h, w) to (batch, outputs, h / stride, w / stride)."""
        y: Tensor = self.body(x)
        return x + y if self.same else y


def mobile() -> nn.Module:
    """MobileNetV3-like network: six inverted residuals with squeeze-excite and Hardswish."""
    layers: dict[str, nn.Module] = {"stem": conv_bn(1, 16), "swish": nn.Hardswish()}
    inputs = 16
    shapes = ((24, 2, 2), (24, 1, 3), (24, 1, 3), (48, 2, 4), (48, 1, 4), (48, 1, 4))
    for number, (outputs, stride, expand) in enumerate(shapes, start=1):
        layers[f"block{number}"] = InvertedResidual(inputs, outputs, stride, expand)
        inputs = outputs
    layers |= {"last": conv_bn(inputs, 128, 1), "last_swish": nn.Hardswish()}
    return named(**layers, **classifier(128))


class Attention(nn.Module):
    """Multi-head self-attention with one linear layer for queries, keys and values."""

    def __init__(self, width: int, heads: int, tokens: int) -> None:
        """Build the layer for sequences of exactly ``tokens`` tokens."""
        super().__init__()
        self.heads, self.tokens, self.width = heads, tokens, width
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, tokens, width) to the same shape."""
        each = self.width // self.heads
        qkv = self.qkv(x).reshape(-1, self.tokens, 3, self.heads, each).permute(2, 0, 3, 1, 4)
        query, key, value = qkv[0], qkv[1], qkv[2]  # each (batch, heads, tokens, each)
        weights = torch.softmax(query @ key.transpose(-2, -1) * each**-0.5, dim=-1)
        mixed = (weights @ value).transpose(1, 2).reshape(-1, self.tokens, self.width)
        result: Tensor = self.out(mixed)
        return result


class TransformerBlock(nn.Module):
    """Pre-LN block: attention, then a GELU MLP, each beside an identity."""

    def __init__(self, width: int, heads: int, tokens: int) -> None:
        """Build the block; the MLP is three times as wide as ``width``."""
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads, tokens)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = named(
            widen=nn.Linear(width, 3 * width), gelu=nn.GELU(), narrow=nn.Linear(3 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, tokens, width) to the same shape."""
        x = x + self.attention(self.norm1(x))
        result: Tensor = x + self.mlp(self.norm2(x))
        return result


class VisionTransformer(nn.Module):
    """ViT on 4x4 patches: class token, learned positions, pre-LN blocks, linear head."""

    def __init__(self, width: int = 64, heads: int = 4, depth: int = 5, patch: int = 4) -> None:
        """Build ``depth`` blocks of ``width`` channels and ``heads`` heads."""
        super().__init__()
        tokens = (SIDE // patch) ** 2 + 1
        self.embed = nn.Conv2d(1, width, patch, patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, tokens, width) * 0.02)
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads, tokens) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (batch, 1, 28, 28) to logits (batch, 10)."""
        patches = self.embed(x).flatten(2).transpose(1, 2)  # (batch, 49, width)
        first = self.class_token.expand(patches.shape[0], -1, -1)
        sequence = torch.cat([first, patches], dim=1) + self.position
        result: Tensor = self.head(self.norm(self.blocks(sequence))[:, 0])
        return result


# --- training -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one network is built and trained.

    Attributes:
        slimming: Weight of Network Slimming's L1 penalty on the BatchNormalization scales.
        floor: Accuracy on all 10,000 test images below which the network is not written.
    """

    build: Callable[[], nn.Module]
    epochs: int
    rate: float
    decay: float
    floor: float
    adam: bool = False
    slimming: float = 0.0


RECIPES = {
    "resnet": Recipe(resnet, epochs=10, rate=0.1, decay=5e-4, floor=0.90),
    "vgg": Recipe(vgg, epochs=10, rate=0.1, decay=5e-4, floor=0.90, slimming=2e-3),
    "mobile": Recipe(mobile, epochs=10, rate=0.1, decay=2e-4, floor=0.90),
    "vit": Recipe(VisionTransformer, epochs=12, rate=2e-3, decay=0.05, floor=0.88, adam=True),
}
BATCH = 128
HALF = 0.5  # share of the scales that must be small after slimming


def batch_norm_scales(network: nn.Module) -> list[nn.Parameter]:
    """The scale (gamma) of every BatchNormalization of ``network``."""
    return [module.weight for module in network.modules() if isinstance(module, nn.BatchNorm2d)]


def share_of_small_scales(network: nn.Module) -> float:
    """Share of all |gamma| below 1 % of the largest |gamma|."""
    scales = torch.cat([scale.detach().abs() for scale in batch_norm_scales(network)])
    return float((scales < 0.01 * scales.max()).float().mean())


def optimiser_of(network: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """SGD with momentum, or AdamW; norms, biases and other vectors do not decay."""
    matrices = [p for p in network.parameters() if p.ndim > 1]
    vectors = [p for p in network.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": recipe.decay}, {"params": vectors}]
    if recipe.adam:
        return torch.optim.AdamW(groups, lr=recipe.rate, weight_decay=0.0)
    return torch.optim.SGD(groups, lr=recipe.rate, momentum=0.9, nesterov=True)


def train(recipe: Recipe, data: Fashion, seed: int) -> nn.Module:
    """Train one network, one line an epoch on stderr; returns it in eval mode."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    network = recipe.build().to(memory_format=torch.channels_last)
    optimiser = optimiser_of(network, recipe)
    total = recipe.epochs * (len(data.train_images) // BATCH)
    warm_up = total // 20

    def rate(step: int) -> float:
        return min((step + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * step / total))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, rate)
    for epoch in range(recipe.epochs):
        started, losses = time.monotonic(), []
        network.train()
        batches = augmented_batches(data.train_images, data.train_labels, batch=BATCH, rng=rng)
        for images, labels in batches:
            loss = nn.functional.cross_entropy(network(images), labels)
            optimiser.zero_grad()
            loss.backward()
            if recipe.slimming:
                for scale in batch_norm_scales(network):  # sub-gradient of slimming * sum |gamma|
                    scale.grad.add_(scale.detach().sign(), alpha=recipe.slimming)
            optimiser.step()
            schedule.step()
            losses.append(loss.item())
        line = f"epoch {epoch + 1:2}  loss {np.mean(losses):.4f}"
        if recipe.slimming:
            line += f"  small scales {share_of_small_scales(network):.3f}"
        print(f"{line}  {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    return network.eval()


def evaluate(network: nn.Module, data: Fashion) -> float:
    """Top-1 accuracy on all test images."""
    with torch.inference_mode():
        pieces = torch.from_numpy(normalise(data.test_images)).split(500)
        guesses = torch.cat([network(piece).argmax(1) for piece in pieces])
    return float(np.mean(guesses.numpy() == data.test_labels))


# --- export ---------------------------------------------------------------------------------------


def export(network: nn.Module, path: Path) -> None:
    """Write ``network`` (in eval mode) as ONNX, its BatchNormalization nodes not folded away."""
    with warnings.catch_warnings():
        # One says that this exporter is the old one, one that PRESERVE keeps the network's mode.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network.to(memory_format=torch.contiguous_format),
            (torch.zeros(1, 1, SIDE, SIDE),),
            str(path),
            input_names=["input"],
            output_names=["logits"],
            dynamic_axes={"input": {0: "batch"}, "logits": {0: "batch"}},
            opset_version=OPSET,
            training=torch.onnx.TrainingMode.PRESERVE,
            dynamo=False,
        )
    onnx.checker.check_model(onnx.load(path), full_check=True)


def main() -> None:
    """Parse the command line; train, check and export."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA, help="folder of idx files (%(default)s)")
    parser.add_argument("--output", type=Path, default=MODELS, help="default: models/")
    parser.add_argument("--only", nargs="*", choices=RECIPES, help="default: all")
    parser.add_argument("--samples-only", action="store_true", help="write the .npz files only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(mode=True)
    data = Fashion.load(options.data)
    options.output.mkdir(parents=True, exist_ok=True)
    data.save_samples(options.output, np.random.default_rng(options.seed))
    for name in [] if options.samples_only else options.only or RECIPES:
        recipe = RECIPES[name]
        print(f"{name}: {recipe.epochs} epochs", file=sys.stderr)
        network = train(recipe, data, options.seed)
        score = evaluate(network, data)
        if score < recipe.floor:
            sys.exit(f"{name}: accuracy {score:.4f} is below {recipe.floor}; not written")
        if recipe.slimming and share_of_small_scales(network) < HALF:
            sys.exit(f"{name}: fewer than half of the scales are small; not written")
        export(network, options.output / f"fashion_{name}.onnx")
        print(f"{name}: accuracy {score:.4f} on {len(data.test_labels)} test images")


if __name__ == "__main__":
    main()
