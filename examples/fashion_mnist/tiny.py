"""The job in small, for the tests: the network untrained, on generated images."""

from __future__ import annotations

import torch
from torch import nn

import torchslim as ts
from examples.fashion_mnist.data import Batches, Split
from examples.fashion_mnist.model import ResNet


def model() -> nn.Module:
    """The network, untrained."""
    return ResNet().eval()


def task() -> ts.Task:
    """Images of 8 x 8 pixels, whose brightness tells the class."""
    generator = torch.Generator().manual_seed(0)

    def split(count: int) -> Split:
        labels = torch.arange(count) % 10
        noise = torch.randint(20, (count, 1, 8, 8), generator=generator)
        return (noise + 20 * labels.view(-1, 1, 1, 1)).to(torch.uint8), labels

    return ts.Task(
        train=Batches(split(40), 20, augment=True), val=Batches(split(20), 20), test=Batches(split(20), 20),
        metric="accuracy",
    )  # fmt: skip
