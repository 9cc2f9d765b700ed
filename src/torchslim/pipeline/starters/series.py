"""The model, the data and the metric of recipe.toml, for series: replace the three functions by your own."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import torchslim as ts

CLASSES, SENSORS, LENGTH = 3, 6, 48


def data(count: int, seed: int) -> TensorDataset:
    """Your dataset: series (LENGTH, SENSORS) and their labels. Here the frequency tells the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    phases = 6.3 * torch.rand(count, 1, SENSORS, generator=generator)
    times = torch.arange(LENGTH).view(1, -1, 1) * (0.2 + 0.3 * labels.view(-1, 1, 1))
    noise = torch.randn(count, LENGTH, SENSORS, generator=generator) / 4
    return TensorDataset(torch.sin(times + phases) + noise, labels)


class Classifier(nn.Module):
    """Your network."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.filters = nn.Conv1d(SENSORS, width, 5, padding=2)
        self.recurrent = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        features = torch.relu(self.filters(x.transpose(1, 2))).transpose(1, 2)
        logits: Tensor = self.head(self.recurrent(features)[0].mean(1))
        return logits


def model() -> nn.Module:
    """Your trained network: build it and load its weights."""
    torch.manual_seed(0)
    network = Classifier()
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)  # in place of: network.load_state_dict(...)
    for series, labels in DataLoader(data(2048, 1), batch_size=32):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(series), labels).backward()
        optimizer.step()
    return network.eval()


def wrong(predict: Callable[..., Tensor], batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """A metric of your own: the share of wrong answers, in percent. `predict` is called like the model."""
    pairs = [(predict(series).argmax(1), labels) for series, labels in batches]
    return 100 * float(torch.cat([answer != labels for answer, labels in pairs]).double().mean())


def task() -> ts.Task:
    """The loaders and the metric. `val` chooses, `test` is only reported."""
    return ts.Task(
        train=DataLoader(data(512, 1), batch_size=32, shuffle=True),
        val=DataLoader(data(128, 2), batch_size=32),
        test=DataLoader(data(128, 3), batch_size=32),
        metric=ts.Metric(fn=wrong, name="error", unit="%", higher_is_better=False),
    )
