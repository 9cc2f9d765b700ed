"""The job in small, for the tests: a narrow MobileNetV2 and crops of noise; needs no package of data."""

from __future__ import annotations

import torch
from torch import nn
from torchvision.models import MobileNetV2

import torchslim as ts
from examples.imagenet_mobilenet.task import agreeing, crops

BLOCKS = [[1, 8, 1, 1], [2, 8, 16, 2]]  # expansion, channels, repetitions, stride


def model() -> nn.Module:
    """An untrained MobileNetV2 with narrow blocks, as many as the recipe names."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MobileNetV2(num_classes=4, width_mult=0.5, inverted_residual_setting=BLOCKS).eval()


def task() -> ts.Task:
    """Crops of coarse noise, enlarged to photographs of 64 x 64 pixels."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(256, (3, 3, 8, 8), generator=generator).float()
    images = list(nn.functional.interpolate(noise, scale_factor=8, mode="bilinear").to(torch.uint8))
    return agreeing(model(), crops(images, 32, 32), crops(images[:1], 16, 32), crops(images[1:2], 16, 32))
