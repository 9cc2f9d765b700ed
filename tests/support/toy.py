"""A small trained-in-seconds task that recipes and subprocesses of the tests can import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import torchslim as ts

CLASSES = 4


class Net(nn.Module):
    """Conv, batch norm, a residual addition, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.conv2(y) + y)
        return self.head(y.mean((2, 3)))


def images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noise whose level tells the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    noise = torch.randn(count, 1, 8, 8, generator=generator)
    return noise + labels.view(-1, 1, 1, 1), labels


def model() -> nn.Module:
    """The same weights each time, whatever the global random state is."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net()


def task(**fields: Any) -> ts.Task:
    """A shuffling loader for training, lists for the rest; further fields of a task."""
    train = DataLoader(TensorDataset(*images(128, 1)), batch_size=16, shuffle=True)
    return ts.Task(train=train, val=[images(64, 2)], test=[images(64, 3)], metric="accuracy", **fields)


@dataclass(frozen=True, kw_only=True)
class Shift:
    """A step of a user's own."""

    accepts: ClassVar[ts.Form] = ts.Form.MODULE
    produces: ClassVar[ts.Form] = ts.Form.MODULE
    by: float = 0.0

    def check(self, ctx: ts.Context) -> None: ...

    def __call__(self, model: nn.Module, ctx: ts.Context) -> ts.Outcome:
        return ts.Outcome(model=model, masks=ctx.masks)
