"""A table: tumors by thirty measurements of their cells; an embedding of each measurement's range, and a perceptron."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from sklearn.datasets import load_breast_cancer
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import torchslim as ts
from examples import gallery

COLUMNS, BINS = 30, 16


def table() -> tuple[Tensor, Tensor]:
    """Measurements (tumors, columns) in a random order, and 1 for benign ones.

    Source: Street, Wolberg & Mangasarian 1993, as scikit-learn ships it.
    """
    data = load_breast_cancer()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    return torch.tensor(data.data)[order].float(), torch.tensor(data.target)[order]


class Perceptron(nn.Module):
    """Numbers (batch, columns) -> logits of two classes; `edges` (columns, bins - 1) divide the columns into ranges."""

    def __init__(self, edges: Tensor, width: int = 512) -> None:
        super().__init__()
        columns, bins = len(edges), edges.shape[1] + 1
        self.register_buffer("edges", edges)
        self.register_buffer("first", torch.arange(columns) * bins)
        self.embedding = nn.Embedding(columns * bins, 16)
        self.layers = nn.Sequential(
            nn.Linear(16 * columns, width), nn.ReLU(), nn.Linear(width, width // 2), nn.ReLU(), nn.Linear(width // 2, 2)
        )

    def forward(self, numbers: Tensor) -> Tensor:
        ranges = (numbers.unsqueeze(-1) > self.edges).sum(-1)
        return self.layers(self.embedding(ranges + self.first).flatten(1))


def ranking(predict: Callable[..., Tensor], batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Area under the ROC curve, in percent: how often a benign tumor is ranked before another one."""
    pairs = [(predict(numbers).diff(dim=1).flatten(), labels) for numbers, labels in batches]
    scores, labels = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    return 100 * float(roc_auc_score(labels, scores))


def untrained() -> nn.Module:
    """The perceptron, with ranges that hold equally many tumors of the training data."""
    quantiles = torch.arange(1, BINS) / BINS
    return Perceptron(table()[0][:300].quantile(quantiles, dim=0).T.contiguous())


def model() -> nn.Module:
    """The perceptron, trained by the first call."""
    return gallery.trained("tabular", untrained, task(), ts.Finetune(epochs=10, lr=1e-3))


def task() -> ts.Task:
    """Train on 300 tumors, select on 100, report on 169."""
    return split(*table(), train=300, val=100)


def split(numbers: Tensor, labels: Tensor, *, train: int, val: int) -> ts.Task:
    """The task of rows in order: those for training, for validation, and the rest for the test."""
    parts = [
        TensorDataset(numbers[rows], labels[rows])
        for rows in (slice(train), slice(train, train + val), slice(train + val, None))
    ]
    return ts.Task(
        train=DataLoader(parts[0], batch_size=32, shuffle=True),
        val=DataLoader(parts[1], batch_size=50),
        test=DataLoader(parts[2], batch_size=50),
        metric=ts.Metric(fn=ranking, name="ROC AUC", unit="%"),
    )
