"""The job in small, for the tests: generated series; needs no package of data."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import torchslim as ts
from examples.series.task import CHANNELS, SPEAKERS, Recurrent, loaders


def model() -> nn.Module:
    """An untrained LSTM."""
    return Recurrent(width=24).eval()


def task() -> ts.Task:
    """Series of 5 to 20 steps, whose mean tells the speaker."""
    generator = torch.Generator().manual_seed(0)

    def rows(count: int) -> list[tuple[Tensor, int]]:
        lengths = torch.randint(5, 21, (count,), generator=generator).tolist()
        return [
            (torch.randn(length, CHANNELS, generator=generator) + number % SPEAKERS, number % SPEAKERS)
            for number, length in enumerate(lengths)
        ]

    return loaders(rows(48), rows(36), rows(36))
