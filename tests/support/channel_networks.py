"""Blocks of which random networks are made. Each keeps the shape of what it is given, but for the channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
INSTANCE_NORM = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


class ConvAct(nn.Module):
    """Convolution, a norm or none, an activation."""

    def __init__(
        self, rank: int, wide_in: int, wide: int, groups: int = 1, norm: str = "batch", act: str = "relu"
    ) -> None:
        super().__init__()
        self.conv = CONV[rank - 1](wide_in, wide, 3, padding=1, groups=groups, bias=norm != "batch")
        norms = {
            "batch": lambda: BATCH_NORM[rank - 1](wide),
            "none": nn.Identity,
            "group": lambda: nn.GroupNorm(2, wide),
            "instance": lambda: INSTANCE_NORM[rank - 1](wide, affine=True),
            "layer": lambda: nn.GroupNorm(1, wide),
        }
        self.norm = norms[norm]()
        self.act = {"relu": nn.ReLU(), "prelu": nn.PReLU(wide), "silu": nn.SiLU(inplace=True), "tanh": nn.Tanh()}[act]

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class Residual(nn.Module):
    """x + f(x), the stream's width left as it is."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Dense(nn.Module):
    """Concatenation of the input and of two branches."""

    def __init__(self, rank: int, wide_in: int, wide: int) -> None:
        super().__init__()
        self.left, self.right = ConvAct(rank, wide_in, wide), ConvAct(rank, wide_in, wide + 1, norm="none")

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.left(x), x, self.right(x)], 1)


class Gate(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, rank: int, wide: int) -> None:
        super().__init__()
        self.rank = rank
        self.down, self.up = nn.Linear(wide, max(wide // 2, 2)), nn.Linear(max(wide // 2, 2), wide)

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.up(F.relu(self.down(x.flatten(2).mean(2)))))
        return x * gate.reshape(*gate.shape, *[1] * self.rank)


class Shuffle(nn.Module):
    """Channels of two groups interleaved."""

    def forward(self, x: Tensor) -> Tensor:
        batch, wide, *space = x.shape
        return x.view(batch, 2, wide // 2, *space).transpose(1, 2).reshape(batch, wide, *space)


class Halves(nn.Module):
    """One half passes, the other is convolved."""

    def __init__(self, rank: int, wide: int) -> None:
        super().__init__()
        self.body = ConvAct(rank, wide // 2, wide // 2)

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 1)
        return torch.cat([self.body(left), right], 1)


class Twice(nn.Module):
    """One layer used two times."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x))


class Flow(nn.Module):
    """A stem, blocks, pooling, heads."""

    def __init__(
        self, rank: int, stem: nn.Module, blocks: list[nn.Module], wide: int, heads: int = 1, as_: str = "tensor"
    ) -> None:
        super().__init__()
        self.rank, self.as_ = rank, as_
        self.stem, self.blocks = stem, nn.Sequential(*blocks)
        self.heads = nn.ModuleList(nn.Linear(wide, 3) for _ in range(heads))

    def forward(self, x: Tensor) -> Any:
        x = self.blocks(self.stem(x)).flatten(2).mean(2)
        return packed([head(x) for head in self.heads], self.as_)


@dataclass
class Answer:
    """Outputs as a plain dataclass."""

    first: Tensor
    others: list[Tensor]


def packed(outputs: list[Tensor], as_: str) -> Any:
    """Outputs as models give them."""
    if as_ == "dict":
        return {str(index): each for index, each in enumerate(outputs)}
    if as_ == "dataclass":
        return Answer(outputs[0], outputs[1:])
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


# -- tokens -------------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Written by hand: fused or separate projections, fewer key heads or as many, sdpa or not."""

    def __init__(self, wide: int, heads: int, size: int, *, kv: int | None = None, fused: bool = False, sdpa: bool = True,
                 mix: bool = False) -> None:  # fmt: skip
        super().__init__()
        self.num_heads, self.head_dim, self.num_kv = heads, size, kv or heads
        self.fused, self.sdpa = fused, sdpa
        self.scale = size**-0.5
        if fused:
            self.qkv = nn.Linear(wide, 3 * heads * size)
        else:
            self.q = nn.Linear(wide, heads * size)
            self.k, self.v = nn.Linear(wide, self.num_kv * size), nn.Linear(wide, self.num_kv * size)
        self.mix = nn.Linear(heads, heads) if mix else None
        self.out = nn.Linear(heads * size, wide)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, _ = x.shape
        if self.fused:
            q, k, v = self.qkv(x).view(batch, time, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        else:
            q = self.q(x).view(batch, time, self.num_heads, self.head_dim).transpose(1, 2)
            k, v = (each(x).view(batch, time, self.num_kv, self.head_dim).transpose(1, 2) for each in (self.k, self.v))
            if self.num_kv != self.num_heads:
                k, v = (each.repeat_interleave(self.num_heads // self.num_kv, 1) for each in (k, v))
        if self.sdpa:
            x = F.scaled_dot_product_attention(q, k, v)
        else:
            scores = (q * self.scale) @ k.transpose(-2, -1)
            if self.mix is not None:
                scores = self.mix(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            x = scores.softmax(-1) @ v
        return self.out(x.transpose(1, 2).reshape(batch, time, -1))


class TorchAttention(nn.Module):
    """nn.MultiheadAttention on one input."""

    def __init__(self, wide: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(wide, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Gated(nn.Module):
    """A gated feed-forward layer, its two halves fused or not."""

    def __init__(self, wide: int, hidden: int, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.up = nn.Linear(wide, 2 * hidden if fused else hidden)
        self.gate = None if fused else nn.Linear(wide, hidden, bias=False)
        self.down = nn.Linear(hidden, wide)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            value, gate = self.up(x).chunk(2, -1)
        else:
            value, gate = self.up(x), self.gate(x)
        return self.down(value * F.silu(gate))


class Recurrent(nn.Module):
    """An LSTM or a GRU as a block."""

    def __init__(self, wide: int, hidden: int, kind: str, layers: int, both: bool) -> None:
        super().__init__()
        self.core = getattr(nn, kind)(wide, hidden, layers, batch_first=True, bidirectional=both)
        self.out = nn.Linear(hidden * (2 if both else 1), wide)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.core(x)[0])


class Normed(nn.Module):
    """x + f(norm(x))."""

    def __init__(self, wide: int, body: nn.Module, norm: str) -> None:
        super().__init__()
        self.norm = {"layer": nn.LayerNorm, "rms": nn.RMSNorm, "none": lambda _: nn.Identity()}[norm](wide)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(self.norm(x))


class Tokens(nn.Module):
    """Embeddings, positions, blocks, a head that may be tied to the embedding."""

    def __init__(
        self, wide: int, blocks: list[nn.Module], *, tied: bool, norm: str, as_: str = "tensor", second: bool = False
    ) -> None:
        super().__init__()
        self.as_ = as_
        self.embed, self.place = nn.Embedding(11, wide), nn.Parameter(torch.randn(1, 5, wide))
        self.other = nn.Linear(4, wide) if second else None
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(wide) if norm == "layer" else nn.Identity()
        self.head = nn.Linear(wide, 11, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor, more: Tensor | None = None) -> Any:
        x = self.embed(tokens) + self.place
        if self.other is not None and more is not None:
            x = x + self.other(more)[:, None]
        x = self.norm(self.blocks(x))
        return packed([self.head(x)] if self.as_ == "tensor" else [self.head(x), x.sum((1, 2))], self.as_)
