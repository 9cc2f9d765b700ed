"""Quantized models that are wrong on purpose: what verification must find, whatever brought it about."""

from __future__ import annotations

import copy
from collections.abc import Callable
from operator import attrgetter

import torch
from torch import nn
from torch.fx import GraphModule, Node

from torchslim.graph.export import layer_of
from torchslim.quantize import QuantizedModule
from torchslim.quantize.aten_ops import weighted
from torchslim.quantize.conversion import integers

WAYS = ("dead", "shifted", "nan", "dead channel")


def harm(model: QuantizedModule, layer: str, how: str) -> QuantizedModule:
    """A copy whose layer is wrong as long as its weight is integers."""
    harmed = copy.deepcopy(model)
    program = harmed.program
    assert isinstance(program, GraphModule)
    for node in program.graph.nodes:
        found = weighted(node)
        if found is None or layer_of(node) != layer:
            continue
        read = node.args[found.weight]
        assert isinstance(read, Node)
        if "dequantize_per_channel" in str(read.target):
            name = str(read.args[1].target)
            scale = attrgetter(name)(program).detach().clone()
            if how == "dead channel":
                scale[0] = 0.0
            else:
                scale *= {"dead": 0.0, "shifted": 40.0, "nan": float("nan")}[how]
            owner, _, attribute = name.rpartition(".")
            setattr(program.get_submodule(owner), attribute, scale)
    return harmed


def harmful(layer: str, how: str) -> Callable[..., QuantizedModule]:
    """In the place of `integers`: a layer is converted wrongly."""
    return lambda prepared, released=(): harm(integers(prepared, released), layer, how)


class Heads(nn.Module):
    """Boxes in pixels and scores below 1 from one convolution each, concatenated."""

    def __init__(self, classes: int = 3, last: bool = False) -> None:
        super().__init__()
        self.stem, self.box, self.score = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(8, classes, 1)
        self.score.bias.data.fill_(-3.0)
        self.last = last

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        f = torch.relu(self.stem(x))
        found = torch.cat([self.box(f).sigmoid().flatten(2) * 640, self.score(f).sigmoid().flatten(2)], 1)
        return found.transpose(1, 2) if self.last else found


class Mixed(nn.Module):
    """One convolution gives channels of two units: the first by hundreds, the others by fractions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 5, 1)
        self.head.weight.data[:2] *= 2000

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.stem(x)))


def small(widths: tuple[int, ...], outputs: int) -> nn.Module:
    """Convolutions, then two linear layers."""
    layers: list[nn.Module] = []
    before = 3
    for width in widths:
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        before = width
    head = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * before, 16), nn.ReLU(), nn.Linear(16, outputs)]
    return nn.Sequential(*layers, *head).eval()


def images(batches: int = 3, count: int = 8, size: int = 12) -> list[tuple[torch.Tensor]]:
    """Images that differ enough for the outputs to."""
    return [(torch.randn(count, 3, size, size) * torch.rand(count, 3, 1, 1) * 2 + torch.randn(count, 3, 1, 1),)
            for _ in range(batches)]  # fmt: skip
