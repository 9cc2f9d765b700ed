"""The job in small, for the tests."""

from __future__ import annotations

from torch import nn

import torchslim as ts
from examples.detection.task import detector, images, loaders


def model() -> nn.Module:
    """An untrained narrow detector."""
    return detector(width=16, side=32).eval()


def task() -> ts.Task:
    """Images of 32 x 32 pixels."""
    return loaders(images(16, 1, 32), images(8, 2, 32), images(8, 3, 32))
