"""Detection: FCOS of torchvision finds squares, discs and triangles in generated images; mean average precision."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.detection import MeanAveragePrecision
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import box_iou

import torchslim as ts
from examples import gallery

CLASSES = 3  # square, disc, triangle
Target = dict[str, Tensor]  # boxes (objects, 4) as x1, y1, x2, y2 in pixels, and labels (objects,)


def images(count: int, seed: int, side: int = 96) -> list[tuple[Tensor, Target]]:
    """Noisy images (3, side, side), and one to three shapes of random colors and sizes that overlap little."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(side) + 0.5, torch.arange(side) + 0.5, indexing="ij")
    samples = []
    for _ in range(count):
        pixels = torch.rand(3, side, side, generator=generator) / 2
        boxes, labels = torch.zeros(0, 4), []
        for _ in range(1 + int(torch.randint(3, (), generator=generator))):
            radius, down, right = torch.rand(3, generator=generator).tolist()
            radius = side * (0.08 + 0.17 * radius)
            down, right = (radius + place * (side - 2 * radius) for place in (down, right))
            label = int(torch.randint(CLASSES, (), generator=generator))
            color = torch.rand(3, 1, 1, generator=generator) / 2
            box = torch.tensor([[right - radius, down - radius, right + radius, down + radius]])
            if len(boxes) and box_iou(box, boxes).max() > 0.1:
                continue
            above, beside = y - down, (x - right).abs()
            inside = [
                torch.maximum(above.abs(), beside) < radius,
                above**2 + beside**2 < radius**2,
                (above < radius) & (2 * beside < above + radius),
            ][label]
            pixels += inside * color
            boxes, labels = torch.cat([boxes, box]), [*labels, label]
        samples.append((pixels, {"boxes": boxes, "labels": torch.tensor(labels)}))
    return samples


def block(inputs: int, outputs: int, stride: int = 2) -> nn.Module:
    """A convolution with batch norm."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


class Backbone(nn.Module):
    """Images (batch, 3, height, width) -> features of strides 8 and 16 with `out_channels` channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.out_channels = 2 * width
        self.stem = nn.Sequential(block(3, width), block(width, width), block(width, 2 * width, 1))
        self.fine = nn.Sequential(block(2 * width, 4 * width), block(4 * width, 4 * width, 1))
        self.coarse = nn.Sequential(block(4 * width, 4 * width), block(4 * width, 4 * width, 1))
        self.lateral = nn.ModuleList(nn.Conv2d(4 * width, self.out_channels, 1) for _ in range(2))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        fine = self.fine(self.stem(x))
        return {"fine": self.lateral[0](fine), "coarse": self.lateral[1](self.coarse(fine))}


def detector(width: int = 32, side: int = 96) -> FCOS:
    """An untrained FCOS for images of `side` pixels.

    Source: Tian, Shen, Chen & He 2019, arXiv:1904.01355.
    """
    return FCOS(
        Backbone(width),
        CLASSES,
        min_size=side,
        max_size=side,
        anchor_generator=AnchorGenerator(((4,), (8,)), ((1.0,), (1.0,))),
        detections_per_img=20,
    )


def mean_average_precision(predict: Callable[..., list[Target]], batches: Iterable[Any]) -> float:
    """Mean over classes and IoU of 0.5 to 0.95 of the average precision, in percent."""
    metric = MeanAveragePrecision()
    for pixels, targets in batches:
        metric.update(predict(pixels), targets)
    return 100 * float(metric.compute()["map"])


def loss(losses: dict[str, Tensor], batch: Any) -> Tensor:
    """Sum of the losses that the detector returns in training."""
    return torch.stack(list(losses.values())).sum()


def collate(samples: list[tuple[Tensor, Target]]) -> tuple[Tensor, list[Target]]:
    """Images (batch, 3, side, side), and a target for every image."""
    return torch.stack([pixels for pixels, _ in samples]), [target for _, target in samples]


def model() -> nn.Module:
    """The detector, trained by the first call."""
    return gallery.trained("detection", detector, task(), ts.Finetune(epochs=12, lr=2e-3, warmup=0.1))


def task() -> ts.Task:
    """Train on 640 images, select on 96, report on 192."""
    return loaders(images(640, 1), images(96, 2), images(192, 3))


def loaders(
    train: list[tuple[Tensor, Target]], val: list[tuple[Tensor, Target]], test: list[tuple[Tensor, Target]]
) -> ts.Task:
    """The task of three lists of images. In training the detector takes targets, too, and returns its losses."""
    options: dict[str, Any] = {"batch_size": 16, "collate_fn": collate}
    return ts.Task(
        train=DataLoader(train, shuffle=True, **options),
        val=DataLoader(val, **options),
        test=DataLoader(test, **options),
        inputs=lambda batch: batch,
        loss=loss,
        metric=ts.Metric(fn=mean_average_precision, name="mAP", unit="%"),
    )
