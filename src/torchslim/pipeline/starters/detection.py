"""The model, the data and the metric of recipe.toml, for detection: replace the three functions by your own."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import torchslim as ts

SIZE, CELL = 32, 8  # of an image and of a cell of the grid, in pixels
CELLS = SIZE // CELL


def data(count: int, seed: int) -> TensorDataset:
    """Your dataset: images (3, 32, 32) and a grid (5, 4, 4) with an object and its box in pixels for each cell.

    Here each image shows one bright rectangle. The cell at its center must find it; a box is x1, y1, x2, y2.
    """
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 3, SIZE, SIZE, generator=generator) / 2
    sizes = torch.randint(6, 14, (count, 2), generator=generator)
    corners = (torch.rand(count, 2, generator=generator) * (SIZE - sizes)).long()
    boxes = torch.cat([corners, corners + sizes], 1)
    truth = torch.zeros(count, 5, CELLS, CELLS)
    for number, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        images[number, :, y1:y2, x1:x2] += 0.5
        truth[number, :, (y1 + y2) // 2 // CELL, (x1 + x2) // 2 // CELL] = torch.tensor([1.0, x1, y1, x2, y2])
    return TensorDataset(images, truth)


class Detector(nn.Module):
    """Your network: scores (batch, 1, 4, 4) as logits and boxes (batch, 4, 4, 4) in pixels."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for channels, wider in ((3, width), (width, 2 * width), (2 * width, 2 * width)):
            layers += [nn.Conv2d(channels, wider, 3, stride=2, padding=1), nn.BatchNorm2d(wider), nn.ReLU()]
        self.features = nn.Sequential(*layers, nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.ReLU())
        self.scores, self.boxes = nn.Conv2d(2 * width, 1, 1), nn.Conv2d(2 * width, 4, 1)
        steps = torch.arange(CELLS) * CELL + CELL / 2
        y, x = torch.meshgrid(steps, steps, indexing="ij")
        self.register_buffer("centers", torch.stack([x, y, x, y]), persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(images)
        return self.scores(features), self.centers + CELL * self.boxes(features)


def loss(outputs: tuple[Tensor, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    """Loss of the scores (which cell holds an object) plus loss of the boxes (where it lies)."""
    (scores, boxes), (_, truth) = outputs, batch
    has_object = truth[:, :1]
    score_loss = nn.functional.binary_cross_entropy_with_logits(scores, has_object, pos_weight=torch.tensor(4.0))
    return score_loss + (has_object * (boxes - truth[:, 1:]).abs()).sum() / (has_object.sum() * SIZE)


def overlap(predict: Callable[..., tuple[Tensor, Tensor]], batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Mean IoU of the best box of an image with the true one, in percent. `predict` is called like the model."""
    values = []
    for images, truth in batches:
        scores, boxes = predict(images)
        best = scores.flatten(1).argmax(1)
        chosen = boxes.flatten(2)[torch.arange(len(best)), :, best]
        real = truth[:, 1:].flatten(2).amax(2)
        sides = (torch.minimum(chosen, real)[:, 2:] - torch.maximum(chosen, real)[:, :2]).clamp(min=0)
        areas = [(box[:, 2:] - box[:, :2]).clamp(min=0).prod(1) for box in (chosen, real)]
        values.append(sides.prod(1) / (areas[0] + areas[1] - sides.prod(1)))
    return 100 * torch.cat(values).mean().item()


def model() -> nn.Module:
    """Your trained network: build it and load its weights."""
    torch.manual_seed(0)
    network = Detector()
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)  # in place of: network.load_state_dict(...)
    for _ in range(4):
        for batch in DataLoader(data(2048, 1), batch_size=32, shuffle=True):
            optimizer.zero_grad()
            loss(network(batch[0]), batch).backward()
            optimizer.step()
    return network.eval()


def task() -> ts.Task:
    """The loaders, the loss and the metric. `val` chooses, `test` is only reported."""
    return ts.Task(
        train=DataLoader(data(2048, 1), batch_size=32, shuffle=True),
        val=DataLoader(data(128, 2), batch_size=32),
        test=DataLoader(data(128, 3), batch_size=32),
        loss=loss,
        metric=ts.Metric(fn=overlap, name="IoU", unit="%", higher_is_better=True),
    )
