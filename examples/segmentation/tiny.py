"""The job in small, for the tests."""

from __future__ import annotations

from torch import nn

import torchslim as ts
from examples.segmentation.task import UNet, images, loaders


def model() -> nn.Module:
    """An untrained narrow U-Net."""
    return UNet(width=16).eval()


def task() -> ts.Task:
    """Images of 16 x 16 pixels."""
    return loaders(images(32, 1, 16), images(16, 2, 16), images(16, 3, 16))
