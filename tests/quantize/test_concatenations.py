"""Concatenations: parts of different ranges keep grids of their own, parts that integer layers read share one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.compiled import deploy
from torchslim.quantize import sqnr, static
from torchslim.runtimes import kernels

LEAST_DB = 25.0  # of eight bits, over a range that values fill


class Head(nn.Module):
    """Boxes in pixels (4 channels) and scores far below 1 (3 channels), joined in many ways.

    Every function takes the model, boxes and scores and returns a tensor with the scores last in dimension 1, or several.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.box, self.score = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 4, 1), nn.Conv2d(16, 3, 1)
        self.read, self.inner = nn.Conv2d(7, 6, 3, padding=1), nn.Conv2d(4, 4, 1)
        nn.init.constant_(self.score.bias, -3.0)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = F.silu(self.stem(x))
        return tuple(join(self, self.box(y).sigmoid() * 640, self.score(y).sigmoid()) for join in JOINS.values())


def join(box: Tensor, score: Tensor) -> Tensor:
    return torch.cat([box, score], 1)


def read_too(model: Any, joined: Tensor, moved: Tensor) -> Tensor:
    """A value that an integer layer reads as well; the answer of that layer counts for nothing."""
    return moved + 0 * model.read(joined).mean()


JOINS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "output": lambda _, box, score: join(box, score),
    "views": lambda _, box, score: join(box, score).flatten(2).permute(0, 2, 1).reshape(len(box), -1, 7).transpose(1, 2),
    "levels": lambda _, box, score: torch.cat(
        [join(box, score).flatten(2), join(F.max_pool2d(box, 2), F.max_pool2d(score, 2)).flatten(2)], 2
    ),
    "read by a layer, too": lambda model, box, score: read_too(model, y := join(box, score), y),
    "moved and read": lambda model, box, score: read_too(
        model, y := join(box, score), y.permute(0, 2, 3, 1).permute(0, 3, 1, 2)
    ),
    "split and read": lambda model, box, score: read_too(model, y := join(box, score), join(*y.split([4, 3], 1))),
    "clamped and read": lambda model, box, score: read_too(model, y := F.relu(join(model.inner(box), score)), y),
    "nested and read": lambda model, box, score: torch.cat([model.read(y := join(box, score)), y], 1),
    "padded": lambda _, box, score: F.pad(join(box, score), (1, 1, 1, 1)),
    "chosen": lambda _, box, score: torch.where((y := join(box, score)) > 1e-3, y, 0 * y),
    "written": lambda _, box, score: (
        F.pad(torch.zeros_like(box), (0, 0, 0, 0, 0, 3)).index_copy(1, torch.arange(4), box)
        .index_copy(1, torch.arange(4, 7), score)
    ),
    "stacked": lambda _, box, score: torch.stack([box[:, :3], score], 1).flatten(1, 2),
}  # fmt: skip


def images(count: int, size: int = 16) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(count))


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval()


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_scores_beside_boxes_keep_their_bits(runtime: str) -> None:
    model, x = seeded(Head), images(4)
    quantized = static(model, [(x,)], runtime=runtime)
    deployed = deploy(quantized, (x,), runtime=runtime, threads=1)
    with torch.no_grad():
        for name, wanted, *found in zip(JOINS, model(x), quantized(x), deployed(x), strict=True):
            for each in found:
                for channel in range(wanted.shape[1] - 3, wanted.shape[1]):
                    assert sqnr(wanted[:, channel], each[:, channel]) > LEAST_DB, f"{name}, channel {channel}"


class Branches(nn.Module):
    """As Inception, U-Net and ShuffleNet join: parts of similar ranges, which convolutions read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.left, self.right = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.next, self.pooled, self.last = nn.Conv2d(16, 8, 1), nn.Conv2d(16, 8, 1), nn.Conv2d(24, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        y = torch.cat([torch.relu(self.left(x)), torch.relu(self.right(x))], 1)  # a float pool reads it, too
        z = torch.cat([self.next(y), self.pooled(F.avg_pool2d(y, 3, 1, 1))], 1)
        return self.last(F.channel_shuffle(torch.cat([z, x], 1), 2)).mean((2, 3))


@pytest.mark.slow
def test_parts_of_similar_ranges_are_joined_as_integers() -> None:
    model, x = seeded(Branches), images(4)
    deployed = deploy(static(model, [(x,)]), (x,), threads=1)
    kinds = Counter(each.type for each in kernels(deployed))
    assert kinds["QLinearConcat"] == 3
    assert kinds["QLinearConv"] == 6
    assert not kinds["Concat"]
    with torch.no_grad():
        assert sqnr(model(x), deployed(x)) > LEAST_DB


class Normed(nn.Module):
    """As DenseNet joins: a batch norm reads it, in float."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.side = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.last = nn.BatchNorm2d(16), nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.last(torch.relu(self.norm(torch.cat([x, self.side(x)], 1))))


@pytest.mark.slow
def test_a_batch_norm_reads_the_parts_as_they_are() -> None:
    model, x = seeded(Normed), images(4)
    deployed = deploy(static(model, [(x,)]), (x,), threads=1)
    kinds = Counter(each.type for each in kernels(deployed))
    assert (kinds["QLinearConv"], kinds["QLinearConcat"], kinds["Concat"]) == (3, 0, 1)
    with torch.no_grad():
        assert sqnr(model(x), deployed(x)) > LEAST_DB
