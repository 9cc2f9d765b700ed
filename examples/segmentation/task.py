"""Segmentation: a small U-Net marks the pixels of discs and boxes in generated images; mean IoU."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, TensorDataset

import torchslim as ts
from examples import gallery

CLASSES = 3  # background, disc, box


def images(count: int, seed: int, side: int = 48) -> TensorDataset:
    """Noisy images (3, side, side) with a disc and a box of random colors, and the class (side, side) of each pixel."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    pixels = torch.rand(count, 3, side, side, generator=generator) / 2
    labels = torch.zeros(count, side, side, dtype=torch.int64)
    for image, label in zip(pixels, labels, strict=True):
        for shape in (1, 2):
            radius, down, right = (torch.rand(3, generator=generator) * side / 4 + side / 16).tolist()
            down, right = 3 * down, 3 * right
            apart = [(y - down).abs(), (x - right).abs()]
            inside = apart[0] ** 2 + apart[1] ** 2 < radius**2 if shape == 1 else torch.maximum(*apart) < radius
            image += inside * torch.rand(3, 1, 1, generator=generator) / 2
            label[inside] = shape
    return TensorDataset(pixels, labels)


def block(inputs: int, outputs: int) -> nn.Module:
    """Two convolutions with batch norms."""
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers += [nn.Conv2d(channels, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """Images (batch, 3, height, width) -> logits (batch, classes, height, width); sizes divisible by 4.

    Source: Ronneberger, Fischer & Brox 2015, arXiv:1505.04597.
    """

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.down1, self.down2, self.bottom = block(3, width), block(width, 2 * width), block(2 * width, 4 * width)
        self.up2, self.up1 = block(6 * width, 2 * width), block(3 * width, width)
        self.head = nn.Conv2d(width, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.down1(x)
        middle = self.down2(nn.functional.max_pool2d(fine, 2))
        x = self.bottom(nn.functional.max_pool2d(middle, 2))
        x = self.up2(torch.cat([interpolate(x, scale_factor=2.0), middle], 1))
        return self.head(self.up1(torch.cat([interpolate(x, scale_factor=2.0), fine], 1)))


def mean_iou(predict: Callable[..., Tensor], batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Mean over the classes of intersection over union, in percent."""
    both, either = torch.zeros(CLASSES), torch.zeros(CLASSES)
    for pixels, labels in batches:
        found = predict(pixels).argmax(1)
        for label in range(CLASSES):
            both[label] += ((found == label) & (labels == label)).sum()
            either[label] += ((found == label) | (labels == label)).sum()
    return 100 * float((both / either).mean())


def model() -> nn.Module:
    """The U-Net, trained by the first call."""
    return gallery.trained("segmentation", UNet, task(), ts.Finetune(epochs=30, lr=4e-3))


def task() -> ts.Task:
    """Train on 512 images, select on 96, report on 192."""
    return loaders(images(512, 1), images(96, 2), images(192, 3))


def loaders(train: TensorDataset, val: TensorDataset, test: TensorDataset) -> ts.Task:
    """The task of three sets of images."""
    return ts.Task(
        train=DataLoader(train, batch_size=16, shuffle=True),
        val=DataLoader(val, batch_size=16),
        test=DataLoader(test, batch_size=16),
        metric=ts.Metric(fn=mean_iou, name="mean IoU", unit="%"),
    )
