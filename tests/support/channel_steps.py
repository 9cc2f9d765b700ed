"""A network with groups of several widths, and a context of a step that prunes it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import torchslim as ts
from tests.support import toy


class Wide(nn.Module):
    """A stem, a residual block and a plain stage: groups of several widths, some coupled."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.inner, self.inner_norm = nn.Conv2d(32, 48, 3, padding=1), nn.BatchNorm2d(48)
        self.back = nn.Conv2d(48, 32, 3, padding=1)
        self.last = nn.Conv2d(32, 64, 3, padding=1)
        self.head = nn.Linear(64, toy.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.back(torch.relu(self.inner_norm(self.inner(x)))) + x)
        return self.head(torch.relu(self.last(x)).mean((2, 3)))


def wide() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Wide().eval()


def context(**fields: Any) -> ts.Context:
    loader = DataLoader(
        TensorDataset(*toy.images(64, 1)), batch_size=16, shuffle=True, generator=torch.Generator().manual_seed(5)
    )
    task = replace(toy.task(), train=loader)
    return ts.Context(**{"task": task, "teacher": wide(), "example_inputs": (toy.images(4, 2)[0],), "seed": 3} | fields)
