"""The job in small, for the tests: articles of random words; needs no package of data."""

from __future__ import annotations

import torch
from torch import nn

import torchslim as ts
from examples.topics.task import TOPICS, TextCNN, split

WORDS = 40 * len(TOPICS)


def model() -> nn.Module:
    """An untrained network."""
    return TextCNN(words=WORDS, width=16).eval()


def task() -> ts.Task:
    """Articles of 20 to 60 words, which tell their topic."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number in range(100):
        topic, length = number % len(TOPICS), int(torch.randint(20, 61, (), generator=generator))
        rows.append((torch.randint(1, 40, (length,), generator=generator) + 40 * topic, topic))
    return split(rows, train=50, val=25, batch_size=5)
