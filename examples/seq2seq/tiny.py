"""The job in small, for the tests."""

from __future__ import annotations

from torch import nn

import torchslim as ts
from examples.seq2seq.task import Translator, dates, loaders


def model() -> nn.Module:
    """An untrained narrow translator."""
    return Translator(width=32).eval()


def task() -> ts.Task:
    """A few dates."""
    return loaders(dates(24, 1), dates(12, 2), dates(12, 3), batch_size=6)
