"""The job in small, for the tests: a table of noise."""

from __future__ import annotations

import torch
from torch import nn

import torchslim as ts
from examples.tabular.task import Perceptron, split


def model() -> nn.Module:
    """An untrained perceptron."""
    return Perceptron(torch.linspace(-1, 1, 7).repeat(6, 1), width=64).eval()


def task() -> ts.Task:
    """Six columns; the sum of the first two tells the class."""
    numbers = torch.randn(128, 6, generator=torch.Generator().manual_seed(0))
    return split(numbers, (numbers[:, :2].sum(1) > 0).long(), train=64, val=32)
