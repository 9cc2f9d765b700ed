"""The job in small, for the tests: a small BERT and sentences of random words; needs no package of data."""

from __future__ import annotations

import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import torchslim as ts
from examples.sentences.task import split

WORDS = 200


def model() -> nn.Module:
    """An untrained BERT of two layers."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return BertForSequenceClassification(BertConfig(vocab_size=WORDS, num_labels=2, **sizes)).eval()


def task() -> ts.Task:
    """Sentences of 4 to 20 words; kind ones have words from the upper half."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number in range(96):
        length = int(torch.randint(4, 21, (), generator=generator))
        words = torch.randint(1, WORDS // 2, (length,), generator=generator)
        rows.append((words + (number % 2) * (WORDS // 2 - 1), number % 2))
    return split(rows, train=48, val=24, batch_size=8)
