"""Fresh exports of networks that the zoo does not have: pruned by half, each against its twin.

    python tools/bench/exports.py --out FOLDER --markdown tools/bench/results/exports.md

Needs torch, torchvision, timm and onnxscript beside onnxprune. Weights and BatchNormalization
statistics are random. A file that is already in FOLDER is not exported again.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from trial import GOOD, Trial, short, state, table, trial

for _name in ("nms", "qnms"):  # PyTorch 2.13 without the operators of torchvision's library
    try:
        torch.library.define(
            f"torchvision::{_name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        )
    except RuntimeError:
        continue


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.SiLU(),
    )


class C2f(nn.Module):
    """YOLOv8's block: halves, residual bottlenecks, everything concatenated."""

    def __init__(self, inputs: int, outputs: int, depth: int = 2) -> None:
        super().__init__()
        self.half = outputs // 2
        self.enter = conv(inputs, outputs, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(conv(self.half, self.half), conv(self.half, self.half))
            for _ in range(depth)
        )
        self.leave = conv((2 + depth) * self.half, outputs, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = list(self.enter(x).split(self.half, 1))
        for block in self.blocks:
            parts.append(parts[-1] + block(parts[-1]))
        return self.leave(torch.cat(parts, 1))


class Elan(nn.Module):
    """YOLOv7's block."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        half = outputs // 2
        self.left, self.right = conv(inputs, half, 1), conv(inputs, half, 1)
        self.one, self.two = conv(half, half), conv(half, half)
        self.leave = conv(4 * half, outputs, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        right = self.right(x)
        one = self.one(right)
        return self.leave(torch.cat([self.left(x), right, one, self.two(one)], 1))


class Yolo(nn.Module):
    """C2f backbone, ELAN neck, Detect head with distribution focal loss."""

    def __init__(self, classes: int = 5, bins: int = 16) -> None:
        super().__init__()
        self.classes, self.bins = classes, bins
        self.stem = nn.Sequential(conv(3, 16, 3, 2), conv(16, 32, 3, 2), C2f(32, 32))
        self.down = nn.Sequential(conv(32, 64, 3, 2), C2f(64, 64))
        self.pool = nn.MaxPool2d(5, 1, 2)
        self.spp = conv(256, 64, 1)
        self.neck, self.back = Elan(96, 32), Elan(96, 64)
        self.step = conv(32, 32, 3, 2)
        self.box = nn.ModuleList(
            nn.Sequential(conv(n, 32), nn.Conv2d(32, 4 * bins, 1)) for n in (32, 64)
        )
        self.kind = nn.ModuleList(
            nn.Sequential(conv(n, 32), nn.Conv2d(32, classes, 1)) for n in (32, 64)
        )
        self.dfl = nn.Conv2d(bins, 1, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        high = self.stem(x)
        low = self.down(high)
        pooled = [low]
        for _ in range(3):
            pooled.append(self.pool(pooled[-1]))
        low = self.spp(torch.cat(pooled, 1))
        high = self.neck(torch.cat([nn.functional.interpolate(low, scale_factor=2.0), high], 1))
        low = self.back(torch.cat([self.step(high), low], 1))
        maps = [
            torch.cat([box(x), kind(x)], 1)
            for x, box, kind in zip((high, low), self.box, self.kind, strict=True)
        ]
        flat = torch.cat([x.flatten(2) for x in maps], 2)
        box, kind = flat.split((4 * self.bins, self.classes), 1)
        box = box.view(box.shape[0], 4, self.bins, -1).transpose(1, 2).softmax(1)
        return torch.cat([self.dfl(box).flatten(1, 2), kind.sigmoid()], 1)


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([conv(3, 16), conv(16, 32), conv(32, 64)])
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * n, n, 2, 2) for n in (32, 16))
        self.join = nn.ModuleList(conv(2 * n, n) for n in (32, 16))
        self.head = nn.Conv2d(16, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.down[0](x)
        second = self.down[1](nn.functional.max_pool2d(first, 2))
        x = self.down[2](nn.functional.max_pool2d(second, 2))
        for up, join, skip in zip(self.up, self.join, (second, first), strict=True):
            x = join(torch.cat([up(x), skip], 1))
        return self.head(x)


class Style(nn.Module):
    """Style transfer: InstanceNorm with parameters, reflection padding, a residual block."""

    def __init__(self) -> None:
        super().__init__()

        def layer(inputs: int, outputs: int, stride: int = 1) -> nn.Module:
            return nn.Sequential(
                nn.ReflectionPad2d(1),
                nn.Conv2d(inputs, outputs, 3, stride),
                nn.InstanceNorm2d(outputs, affine=True),
                nn.ReLU(),
            )

        self.enter = nn.Sequential(layer(3, 16), layer(16, 32, 2), layer(32, 64, 2))
        self.middle = nn.Sequential(layer(64, 64), layer(64, 64))
        self.leave = nn.Sequential(
            nn.Upsample(scale_factor=2.0), layer(64, 32), nn.Upsample(scale_factor=2.0),
            layer(32, 16), nn.Conv2d(16, 3, 3, padding=1),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x)
        return self.leave(x + self.middle(x))


def super_resolution() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 5, padding=2), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1),
        nn.PixelShuffle(2), nn.PReLU(16), nn.Conv2d(16, 12, 3, padding=1), nn.PixelShuffle(2),
    )  # fmt: skip


def audio() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(1, 32, 9, 4), nn.GroupNorm(8, 32), nn.GELU(),
        nn.Conv1d(32, 64, 9, 4), nn.GroupNorm(8, 64), nn.GELU(),
        nn.Conv1d(64, 64, 3, groups=64), nn.Conv1d(64, 96, 1), nn.GroupNorm(1, 96), nn.ReLU(),
        nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(96, 10),
    )  # fmt: skip


class First(nn.Module):
    """The main output of a torchvision segmentation network."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return cast("torch.Tensor", self.network(x)["out"])


class SsdLite(nn.Module):
    """Backbone and head of SSDlite; its anchors and boxes are no network."""

    def __init__(self) -> None:
        super().__init__()
        zoo = import_module("torchvision.models.detection")
        whole = zoo.ssdlite320_mobilenet_v3_large(
            weights=None, weights_backbone=None, num_classes=7
        )
        self.backbone, self.head = whole.backbone, whole.head

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = self.head(list(self.backbone(x).values()))
        return found["bbox_regression"], found["cls_logits"]


def segmentation(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        zoo = import_module("torchvision.models.segmentation")
        return First(getattr(zoo, name)(weights=None, weights_backbone=None, num_classes=6))

    return make


def timm(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        create = import_module("timm").create_model
        return cast("nn.Module", create(name, pretrained=False, num_classes=50))

    return make


@dataclass(frozen=True)
class Export:
    """A network and how it is exported.

    Attributes:
        how: ``script``; ``bn``, the same with BatchNormalization kept; ``dynamic``, the same with
            free batch and space; ``dynamo``, the new exporter; ``raw``, it without optimising.
    """

    name: str
    make: Callable[[], nn.Module]
    how: str
    shape: Sequence[int] = (1, 3, 96, 96)


EXPORTS = (
    Export("yolo", Yolo, "script"),
    Export("yolo", Yolo, "dynamo"),
    Export("unet", UNet, "dynamic"),
    Export("unet", UNet, "raw"),
    Export("super_resolution", super_resolution, "dynamic", (1, 3, 32, 32)),
    Export("super_resolution", super_resolution, "dynamo", (1, 3, 32, 32)),
    Export("audio", audio, "script", (1, 1, 2000)),
    Export("audio", audio, "raw", (1, 1, 2000)),
    Export("style", Style, "dynamic", (1, 3, 64, 64)),
    Export("style", Style, "dynamo", (1, 3, 64, 64)),
    Export("ssdlite", SsdLite, "script", (1, 3, 160, 160)),
    Export("lraspp", segmentation("lraspp_mobilenet_v3_large"), "bn"),
    Export("skresnet18", timm("skresnet18"), "script"),
    Export("resnest14d", timm("resnest14d"), "bn"),
    Export("selecsls42b", timm("selecsls42b"), "dynamic"),
    Export("nf_regnet_b0", timm("nf_regnet_b0"), "script"),
    Export("resnetblur50", timm("resnetblur50"), "bn"),
    Export("tf_efficientnetv2_b0", timm("tf_efficientnetv2_b0"), "script"),
    Export("cspresnet50", timm("cspresnet50"), "script"),
    Export("dpn68", timm("dpn68"), "bn"),
    Export("cspdarknet53", timm("cspdarknet53"), "script"),
    Export("xception41", timm("xception41"), "bn"),
    Export("deeplabv3", segmentation("deeplabv3_mobilenet_v3_large"), "script"),
    Export("skresnet18", timm("skresnet18"), "raw"),
    Export("resnest14d", timm("resnest14d"), "dynamo"),
    Export("nf_regnet_b0", timm("nf_regnet_b0"), "dynamo"),
    Export("nf_regnet_b0", timm("nf_regnet_b0"), "raw"),
    Export("yolo", Yolo, "raw"),
    Export("style", Style, "raw", (1, 3, 64, 64)),
    Export("cspresnet50", timm("cspresnet50"), "raw"),
    Export("resnet50_gn", timm("resnet50_gn"), "raw"),
    Export("dpn68", timm("dpn68"), "raw"),
    Export("tf_efficientnetv2_b0", timm("tf_efficientnetv2_b0"), "raw"),
    Export("eca_nfnet_l0", timm("eca_nfnet_l0"), "script"),
    Export("eca_nfnet_l0", timm("eca_nfnet_l0"), "raw"),
    Export("resnetv2_50x1_bit", timm("resnetv2_50x1_bit"), "script", (1, 3, 64, 64)),
)


def randomise(network: nn.Module) -> None:
    """Statistics and parameters of the normalisations that no identity can stand for."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
        weight = getattr(module, "weight", None)
        if "Norm" in type(module).__name__ and isinstance(weight, nn.Parameter):
            nn.init.uniform_(weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.2)


def write(export: Export, path: Path) -> None:
    torch.manual_seed(0)
    network = export.make().eval()
    randomise(network)
    options: dict[str, Any] = {"dynamo": export.how in ("dynamo", "raw"), "input_names": ["input"]}
    if export.how == "raw":
        options["optimize"] = False
    if not options["dynamo"]:
        options["opset_version"] = 17
    if export.how == "bn":
        options["training"] = torch.onnx.TrainingMode.PRESERVE
        options["do_constant_folding"] = False
    if export.how == "dynamic":
        options["dynamic_axes"] = {"input": {0: "batch", 2: "height", 3: "width"}}
    torch.onnx.export(network, (torch.randn(*export.shape),), path, **options)


def row(export: Export, result: Trial, spent: float) -> Sequence[str]:
    frozen = "; ".join(f"{one.width} {one.name}: {one.reason}" for one in result.frozen[:2])
    return (
        export.name,
        export.how,
        state(result),
        f"{result.before:,}",
        f"{result.left:.3f}",
        "-" if result.gap is None else f"{result.gap:.0e}",
        f"{result.total:.2f}",
        f"{spent:.1f}",
        short(frozen if result.status == "ok" else result.reason, 160),
    )


def main() -> int:
    """Exit 1 where some result is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the exported files")
    parser.add_argument("--only", default="*", help="glob on network.exporter")
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rows, failed, wrong = [], [], 0
    for export in EXPORTS:
        path = args.out / f"{export.name}.{export.how}.onnx"
        if not fnmatchcase(path.stem, args.only):
            continue
        begin = time.perf_counter()
        try:
            if not path.exists():
                write(export, path)
        except Exception as error:
            said = traceback.format_exception_only(error)[-1]
            failed.append(f"- {path.stem}: {short(said, 160)}")
            print(failed[-1], file=sys.stderr, flush=True)
            path.unlink(missing_ok=True)
            continue
        spent = time.perf_counter() - begin
        result = trial(path, ratio=args.ratio, importance="random")
        wrong += result.status not in GOOD
        rows.append(row(export, result, spent))
        print(" ".join(rows[-1]), file=sys.stderr, flush=True)
        page = report(rows, failed, args.ratio)
        if args.markdown is not None:  # so far: the run may be cut short
            args.markdown.write_text(page, "utf-8")
    if args.markdown is None and rows:
        print(page)
    return int(wrong > 0)


def report(rows: Sequence[Sequence[str]], failed: Sequence[str], ratio: float) -> str:
    header = ("network", "export", "status", "params", "left", "twin", "s", "export s", "why")
    exact = sum(one[2] == "ok" for one in rows)
    return "\n".join(
        (
            "# Fresh exports",
            "",
            f"`tools/bench/exports.py`, ratio {ratio:g} in each group, random channels, random "
            "weights; seconds on two cores. Last column: the two widest groups that stayed whole.",
            "",
            f"- pruned and equal to the masked twin: {exact} of {len(rows)}",
            "",
            table(header, rows),
            "",
            *(("The exporter failed:", "", *failed, "") if failed else ()),
        )
    )


if __name__ == "__main__":
    sys.exit(main())
