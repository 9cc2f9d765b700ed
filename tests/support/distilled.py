"""Small students and teachers: a CNN, a transformer and an LSTM of any width."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def conv_net(width: int, stages: int = 3) -> nn.Sequential:
    blocks = []
    for stage in range(stages):
        before = 3 if stage == 0 else width * stage
        blocks.append(
            nn.Sequential(
                nn.Conv2d(before, width * (stage + 1), 3, 2, 1), nn.BatchNorm2d(width * (stage + 1)), nn.ReLU()
            )
        )
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width * stages, 5))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.TransformerEncoderLayer(width, 2, 2 * width, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Transformer(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.embed = nn.Linear(6, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class Lstm(nn.Module):
    def __init__(self, width: int, batch_first: bool = True) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, width, batch_first=batch_first, bidirectional=True)
        self.head = nn.Linear(2 * width, 5)

    def forward(self, x: Tensor) -> Tensor:
        if self.lstm.batch_first:
            return self.head(self.lstm(x)[0][:, -1])
        return self.head(self.lstm(x.transpose(0, 1))[0][-1])


def seeded(make: Any, *args: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(len(args) + sum(args))
        found: nn.Module = make(*args)
        return found
