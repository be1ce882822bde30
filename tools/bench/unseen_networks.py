"""Networks of families that the zoo, exports.py and real.py do not have, small, untrained."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

# -- networks of one's own -------------------------------------------------------------------------


def conv(inputs: int, outputs: int, kernel: int = 3, **options: Any) -> nn.Sequential:
    layer = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False, **options)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU())


class Diffusion(nn.Module):
    """A denoising U-Net: time embedding, GroupNorm, self and cross attention, GEGLU."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.time = nn.Sequential(nn.Linear(16, width), nn.SiLU(), nn.Linear(width, width))
        self.enter = nn.Conv2d(4, width, 3, padding=1)
        self.shift = nn.Linear(width, 2 * width)
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for _ in range(3))
        self.block = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.down = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.layer = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.qkv = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(3))
        self.cross = nn.ModuleList(nn.Linear(n, width, bias=False) for n in (width, 24, 24))
        self.out = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.glu, self.back = nn.Linear(width, 8 * width), nn.Linear(4 * width, width)
        self.up = nn.Conv2d(2 * width, width, 3, padding=1)
        self.leave = nn.Conv2d(width, 4, 3, padding=1)

    def attend(self, parts: nn.ModuleList, x: Tensor, other: Tensor) -> Tensor:
        q, k, v = (
            part(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part, y in zip(parts, (x, other, other), strict=True)
        )
        return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def forward(self, x: Tensor, step: Tensor, text: Tensor) -> Tensor:
        angle = step[:, None] * torch.exp(-torch.arange(8) / 2)
        time = self.time(torch.cat([angle.sin(), angle.cos()], -1))
        x = self.enter(x)
        h = self.block[0](functional.silu(self.norms[0](x)))
        scale, shift = self.shift(functional.silu(time))[:, :, None, None].chunk(2, 1)
        h = self.norms[1](h) * (1 + scale) + shift
        skip = x + self.block[1](functional.silu(h))
        h = self.down(skip)
        batch, width, height, length = h.shape
        y = self.norms[2](h).flatten(2).transpose(1, 2)
        z = self.layer[0](y)
        y = y + self.out[0](self.attend(self.qkv, z, z))
        y = y + self.out[1](self.attend(self.cross, self.layer[1](y), text))
        value, gate = self.glu(self.layer[2](y)).chunk(2, -1)
        y = y + self.back(value * functional.gelu(gate))
        h = h + y.transpose(1, 2).reshape(batch, width, height, length)
        h = functional.interpolate(h, scale_factor=2.0, mode="nearest")
        return self.leave(functional.silu(self.up(torch.cat([h, skip], 1))))


class ConvTasNet(nn.Module):
    """Speech separation: a learned filter bank, dilated depthwise blocks, masks, overlap-add."""

    def __init__(self, basis: int = 48, width: int = 24, hidden: int = 40) -> None:
        super().__init__()
        self.encode = nn.Conv1d(1, basis, 16, 8, bias=False)
        self.norm, self.enter = nn.GroupNorm(1, basis), nn.Conv1d(basis, width, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv1d(width, hidden, 1), nn.PReLU(), nn.GroupNorm(1, hidden),
                nn.Conv1d(hidden, hidden, 3, padding=2**n, dilation=2**n, groups=hidden),
                nn.PReLU(hidden), nn.BatchNorm1d(hidden), nn.Conv1d(hidden, 2 * width, 1),
            ) for n in range(3)
        )  # fmt: skip
        self.masks = nn.Conv1d(width, 2 * basis, 1)
        self.decode = nn.ConvTranspose1d(basis, 1, 16, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        coded = self.encode(x)
        y = self.enter(self.norm(coded))
        total = torch.zeros_like(y)
        for block in self.blocks:
            onward, skip = block(y).chunk(2, 1)
            y, total = y + onward, total + skip
        masks = self.masks(functional.relu(total)).unflatten(1, (2, -1)).sigmoid()
        found = masks * coded[:, None]
        return self.decode(found.flatten(0, 1)).unflatten(0, (-1, 2)).squeeze(2)


class Demucs(nn.Module):
    """Music separation: strided Conv with GLU, an LSTM in the middle, ConvTranspose, skips."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for before, after in pairwise((2, width, 2 * width)):
            self.down.append(nn.Sequential(
                nn.Conv1d(before, after, 8, 4), nn.ReLU(), nn.Conv1d(after, 2 * after, 1), nn.GLU(1)
            ))  # fmt: skip
            self.up.insert(0, nn.Sequential(
                nn.Conv1d(after, 2 * after, 3, padding=1), nn.GLU(1),
                nn.ConvTranspose1d(after, before, 8, 4),
            ))  # fmt: skip
        self.lstm = nn.LSTM(2 * width, 2 * width, bidirectional=True)
        self.linear = nn.Linear(4 * width, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for down in self.down:
            x = down(x)
            skips.append(x)
        y, _ = self.lstm(x.permute(2, 0, 1))
        x = self.linear(y).permute(1, 2, 0)
        for number, up in enumerate(self.up):
            skip = skips.pop()
            x = up(x[..., : skip.shape[-1]] + skip[..., : x.shape[-1]])
            if number < len(self.up) - 1:
                x = functional.relu(x)
        return x


class Generator(nn.Module):
    """A StyleGAN-like generator: mapped style, modulation by AdaIN, noise, skip images."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.map = nn.Sequential(
            *(m for _ in range(3) for m in (nn.Linear(width, width), nn.LeakyReLU()))
        )
        self.start = nn.Parameter(torch.randn(1, width, 4, 4))
        self.conv = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(3))
        self.style = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(3))
        self.image = nn.ModuleList(nn.Conv2d(width, 3, 1) for _ in range(3))

    def forward(self, z: Tensor) -> Tensor:
        z = z * torch.rsqrt(z.square().mean(1, keepdim=True) + 1e-8)
        w = self.map(z)
        x = self.start.repeat(z.shape[0], 1, 1, 1)
        image = None
        for layer, style, leave in zip(self.conv, self.style, self.image, strict=True):
            x = functional.interpolate(layer(x), scale_factor=2.0, mode="bilinear")
            scale, shift = style(w).view(-1, 2, x.shape[1], 1, 1).unbind(1)
            x = functional.leaky_relu(functional.instance_norm(x) * (scale + 1) + shift, 0.2)
            made = leave(x)
            up = None if image is None else functional.interpolate(image, scale_factor=2.0)
            image = made if up is None else up + made
        assert image is not None
        return image.tanh()


class Siamese(nn.Module):
    """Two pictures through one network, compared by cosine and by a correlation of their maps."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(3, 16), nn.MaxPool2d(2), conv(16, 32), conv(32, 32))
        self.left, self.head = nn.Linear(32, 24), nn.Linear(48, 5)
        self.mix = conv(64 + 64, 16)
        self.leave = nn.Conv2d(16, 1, 1)

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, y = self.body(a), self.body(b)
        volume = torch.einsum("nchw,ncij->nhwij", x, y).flatten(3).permute(0, 3, 1, 2)
        p, q = (self.left(m.mean((2, 3))) for m in (x, y))
        alike = functional.cosine_similarity(p, q)
        both = self.leave(self.mix(torch.cat([x, y, volume], 1)))
        return alike, self.head(torch.cat([(p - q).abs(), p * q], 1)), both


class Einsum(nn.Module):
    """Attention, a bilinear form and a low-rank layer, all by Einsum."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        each = width // heads
        self.enter = nn.Linear(12, width)
        self.q, self.k, self.v = (nn.Parameter(torch.randn(width, heads, each) / 6) for _ in "qkv")
        self.o = nn.Parameter(torch.randn(heads, each, width) / 6)
        self.a, self.b = (nn.Parameter(torch.randn(*s) / 4) for s in ((width, 20), (20, width)))
        self.leave = nn.Linear(width, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        q, k, v = (torch.einsum("bnc,chd->bhnd", x, w) for w in (self.q, self.k, self.v))
        scores = torch.einsum("bhnd,bhmd->bhnm", q, k).softmax(-1)
        picked = torch.einsum("bhnm,bhmd->bnhd", scores, v)
        x = x + torch.einsum("bnhd,hdc->bnc", picked, self.o)
        x = x + torch.einsum("bnr,rc->bnc", torch.einsum("bnc,cr->bnr", x, self.a).relu(), self.b)
        return self.leave(x.mean(1))


class Windows(nn.Module):
    """Roll, Unfold and Fold, grid sampling by learned offsets, reflect and negative padding."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.mid = conv(3, 16), conv(16, 24)
        self.patch = nn.Linear(24 * 9, 24 * 9)
        self.flow = nn.Conv2d(24, 2, 3, padding=1)
        self.leave = nn.Conv2d(48, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.pad(self.enter(x), (1, 1, 1, 1), mode="reflect")
        x = self.mid(torch.roll(x, (2, -1), (2, 3)))[:, :, 1:-1, 1:-1]
        size = (x.shape[2], x.shape[3])
        y = self.patch(functional.unfold(x, 3, padding=1).transpose(1, 2)).transpose(1, 2)
        y = functional.fold(y, size, 3, padding=1)
        grid = functional.affine_grid(torch.eye(2, 3).expand(x.shape[0], 2, 3), [*x.shape], False)
        warped = functional.grid_sample(
            x, grid + 0.1 * self.flow(x).permute(0, 2, 3, 1).tanh(), align_corners=False
        )
        return self.leave(torch.cat([y, warped], 1))


class Video(nn.Module):
    """3-D convolutions, plain, factored, depthwise and transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv3d(3, 16, 3, padding=1), nn.BatchNorm3d(16), nn.ReLU(), nn.MaxPool3d((1, 2, 2)),
            nn.Conv3d(16, 20, (1, 3, 3), padding=(0, 1, 1)), nn.Conv3d(20, 32, (3, 1, 1)),
            nn.GELU(), nn.Conv3d(32, 32, 3, padding=1, groups=32), nn.InstanceNorm3d(32),
            nn.ConvTranspose3d(32, 12, 2, 2), nn.GroupNorm(3, 12),
        )  # fmt: skip
        self.leave = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.body(x).mean((2, 3, 4)))


class Reparametrised(nn.Module):
    """weight_norm, spectral_norm, standardised and generated weights; a shuffle of groups."""

    def __init__(self) -> None:
        super().__init__()
        given, spectral = nn.utils.parametrizations.weight_norm, nn.utils.spectral_norm
        self.a, self.b = given(nn.Conv2d(3, 16, 3)), spectral(nn.Conv2d(16, 32, 3))
        self.c = nn.Conv2d(32, 48, 3, groups=4)
        self.d = nn.Conv2d(48, 32, 1, groups=2)
        self.latent, self.leave = nn.Parameter(torch.randn(8)), given(nn.Linear(32, 5))
        self.make = nn.Linear(8, 32 * 32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).relu()).relu()
        weight = self.c.weight
        weight = (weight - weight.mean((1, 2, 3), keepdim=True)) / (
            weight.std((1, 2, 3), keepdim=True) + 0.01
        )
        x = functional.conv2d(x, weight, self.c.bias, groups=4).relu()
        x = functional.channel_shuffle(x, 4)
        x = self.d(x)
        made = self.make(self.latent).view(32, 32, 1, 1)
        return self.leave(functional.conv2d(x, made / 6).relu().amax((2, 3)))


class Graph(nn.Module):
    """Message passing on a given adjacency: gather, scatter-add, attention over neighbours."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.enter, self.edge = nn.Linear(6, width), nn.Linear(2 * width, width)
        self.gate = nn.GRUCell(width, width)
        self.score, self.leave = nn.Linear(width, 1), nn.Linear(width, 4)

    def forward(self, x: Tensor, adjacency: Tensor, source: Tensor, target: Tensor) -> Tensor:
        h = self.enter(x).relu()
        for _ in range(2):
            sent = self.edge(torch.cat([h[source], h[target]], -1)).relu()
            place = target[:, None].expand(-1, sent.shape[1])
            h = self.gate(torch.zeros_like(h).scatter_add(0, place, sent), h)
        weights = (adjacency + self.score(h)).softmax(-1)
        return self.leave(weights @ h)


class Recommender(nn.Module):
    """Wide and deep: several tables, crosses, a factorisation machine, numbers beside them."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(n, width) for n in (30, 20, 10))
        self.bag = nn.Embedding(40, width)
        self.cross = nn.ModuleList(nn.Linear(4 * width + 5, 4 * width + 5) for _ in range(2))
        self.deep = nn.Sequential(
            nn.Linear(4 * width + 5, 64),
            nn.BatchNorm1d(64),
            nn.ReLU(),
            nn.Linear(64, 32),
            nn.PReLU(),
        )
        self.leave = nn.Linear(32 + 4 * width + 5 + width, 2)

    def forward(self, ids: Tensor, bag: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        found = [table(ids[:, n]) for n, table in enumerate(self.tables)]
        found.append(self.bag(bag).mean(1))
        stack = torch.stack(found, 1)
        pairs = 0.5 * (stack.sum(1).square() - stack.square().sum(1))
        x = torch.cat([*found, numbers], 1)
        crossed = x
        for layer in self.cross:
            crossed = x * layer(crossed) + crossed
        both = self.leave(torch.cat([self.deep(x), crossed, pairs], 1))
        return both.sigmoid(), pairs.sum(1)


class Recognise(nn.Module):
    """CRNN: columns of a map through a two-layer bidirectional LSTM, then CTC scores."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv(1, 16), nn.MaxPool2d(2), conv(16, 32), nn.MaxPool2d((2, 1)),
            nn.Conv2d(32, 48, (8, 1)), nn.BatchNorm2d(48), nn.Hardswish(),
        )  # fmt: skip
        self.lstm = nn.LSTM(48, 32, 2, bidirectional=True, batch_first=True)
        self.gru, self.leave = nn.GRU(64, 24, batch_first=True), nn.Linear(24, 11)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x).squeeze(2).transpose(1, 2)
        y, _ = self.gru(self.lstm(y)[0])
        return self.leave(y).log_softmax(-1)


class Experts(nn.Module):
    """A dense mixture of experts with stacked weights, RMSNorm with a plus one, tied head."""

    def __init__(self, width: int = 32, experts: int = 4, hidden: int = 48) -> None:
        super().__init__()
        self.table = nn.Embedding(40, width)
        self.route = nn.Linear(width, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, width, 2 * hidden) / 6)
        self.down = nn.Parameter(torch.randn(experts, hidden, width) / 6)
        self.scale = nn.Parameter(torch.zeros(width))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.scale)
        value, gate = (y.unsqueeze(1) @ self.up).chunk(2, -1)
        found = (value * functional.silu(gate)) @ self.down
        weight = self.route(y).softmax(-1).transpose(1, 2).unsqueeze(-1)
        return (x + (found * weight).sum(1)) @ self.table.weight.T


class Selective(nn.Module):
    """A state-space block: gated depthwise Conv1d and a recurrence unrolled over time."""

    def __init__(self, width: int = 24, state: int = 8) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(width, 4 * width), nn.Linear(2 * width, width)
        self.conv = nn.Conv1d(2 * width, 2 * width, 4, padding=3, groups=2 * width)
        self.rates, self.step = nn.Linear(2 * width, 2 * state + 6), nn.Linear(6, 2 * width)
        self.a, self.d = (
            nn.Parameter(torch.rand(2 * width, state)),
            nn.Parameter(torch.rand(2 * width)),
        )
        self.state, self.norm, self.head = state, nn.LayerNorm(width), nn.Linear(width, 9)

    def forward(self, x: Tensor) -> Tensor:
        y, gate = self.enter(self.norm(x)).chunk(2, -1)
        y = functional.silu(self.conv(y.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))
        low, b, c = self.rates(y).split((6, self.state, self.state), -1)
        step = functional.softplus(self.step(low))
        hidden, found = torch.zeros(x.shape[0], y.shape[2], self.state), []
        for t in range(6):
            decay = (step[:, t, :, None] * -self.a.exp()).exp()
            hidden = decay * hidden + (step[:, t] * y[:, t])[:, :, None] * b[:, t, None]
            found.append((hidden * c[:, t, None]).sum(-1))
        y = torch.stack(found, 1) + y * self.d
        return self.head(x + self.leave(y * functional.silu(gate)))


class Detector(nn.Module):
    """A Faster R-CNN-like neck and heads: FPN by lateral adds, shared heads, decoded boxes."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            [conv(3, 16, stride=2), conv(16, 32, stride=2), conv(32, 48, stride=2)]
        )
        self.lateral = nn.ModuleList(nn.Conv2d(n, 24, 1) for n in (16, 32, 48))
        self.smooth = nn.ModuleList(nn.Conv2d(24, 24, 3, padding=1) for _ in range(3))
        self.tower = nn.Sequential(nn.Conv2d(24, 24, 3, padding=1), nn.GroupNorm(4, 24), nn.ReLU())
        self.kind, self.box = nn.Conv2d(24, 3 * 5, 3, padding=1), nn.Conv2d(24, 3 * 4, 3, padding=1)
        self.scales = nn.Parameter(torch.rand(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        top, kinds, boxes = None, [], []
        for n in (2, 1, 0):
            level = self.lateral[n](maps[n])
            if top is not None:
                level = level + functional.interpolate(top, size=level.shape[2:], mode="nearest")
            top = level
            y = self.tower(self.smooth[n](level))
            kind, box = self.kind(y), self.box(y) * self.scales[n]
            kinds.append(kind.unflatten(1, (3, 5)).permute(0, 3, 4, 1, 2).flatten(1, 3))
            boxes.append(box.unflatten(1, (3, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3).exp())
        return torch.cat(kinds, 1).sigmoid(), torch.cat(boxes, 1)
