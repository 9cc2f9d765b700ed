"""The model, the data and the metric of recipe.toml, for images: replace the three functions by your own."""

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import torchslim as ts

CLASSES = 4


def data(count: int, seed: int) -> TensorDataset:
    """Your dataset: images (3, 32, 32) in [0, 1] and their labels. Here the color tells the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    images = torch.rand(count, 3, 32, 32, generator=generator) / 2
    colors = torch.tensor([[0.5, 0.0, 0.0], [0.0, 0.5, 0.0], [0.0, 0.0, 0.5], [0.2, 0.2, 0.2]])
    return TensorDataset(images + colors[labels][:, :, None, None], labels)


class Classifier(nn.Module):
    """Your network."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width)
        self.head = nn.Linear(2 * width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(torch.relu(self.norm1(self.conv1(x))), 2)
        x = torch.relu(self.norm2(self.conv2(x)))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def model() -> nn.Module:
    """Your trained network: build it and load its weights."""
    torch.manual_seed(0)
    network = Classifier()
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)  # in place of: network.load_state_dict(...)
    for images, labels in DataLoader(data(2048, 1), batch_size=32):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images), labels).backward()
        optimizer.step()
    return network.eval()


def task() -> ts.Task:
    """The loaders and the metric. `val` chooses, `test` is only reported."""
    return ts.Task(
        train=DataLoader(data(512, 1), batch_size=32, shuffle=True),
        val=DataLoader(data(128, 2), batch_size=32),
        test=DataLoader(data(128, 3), batch_size=32),
        metric="accuracy",  # or ts.Metric(...), or a function (predict, batches) -> float
    )
