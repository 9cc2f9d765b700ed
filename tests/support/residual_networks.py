"""Stacks of residual layers, for depth pruning."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PreNorm(nn.Module):
    """A layer with two branches in one forward, as in vision transformers."""

    def __init__(self, wide: int = 8) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(wide), nn.LayerNorm(wide)
        self.attention = nn.MultiheadAttention(wide, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(wide, 2 * wide), nn.GELU(), nn.Linear(2 * wide, wide))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        y, _ = self.attention(y, y, y, need_weights=False)
        x = x + y
        return x + self.mlp(self.norm2(x))


class Stack(nn.Module):
    """Layers of one kind between an embedding and a head."""

    def __init__(self, kind: type[nn.Module], count: int = 3) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.layers = nn.ModuleList(kind() for _ in range(count))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
            x = x[0] if isinstance(x, tuple) else x
        answer: Tensor = self.head(x)
        return answer


def stack(kind: type[nn.Module], seed: int = 0, count: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return Stack(kind, count).eval()


TOKENS = (torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(3)),)
