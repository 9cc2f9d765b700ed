"""A forward method that only an exporter calls fits the pruned model too: its numbers follow the channels."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import torchslim as ts

pytestmark = pytest.mark.filterwarnings("ignore:no example reached:UserWarning")


class Stage(nn.Module):
    """Halves its channels by `chunk`, or by a number that the other method alone reads."""

    def __init__(self, inside: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.first = nn.Conv2d(inside, 2 * width, 1)
        self.norm = nn.BatchNorm2d(2 * width)
        self.block = nn.Conv2d(width, width, 3, padding=1)
        self.last = nn.Conv2d(3 * width, inside, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.norm(self.first(x)).chunk(2, 1)
        return self.last(torch.cat([a, b, torch.relu(self.block(b))], 1))

    def forward_split(self, x: Tensor) -> Tensor:
        a, b = self.norm(self.first(x)).split((self.width, self.width), 1)
        return self.last(torch.cat([a, b, torch.relu(self.block(b))], 1))

    def forward_plain(self, x: Tensor) -> Tensor:
        """Another function, which says nothing about the numbers."""
        a, b = self.first(x).split((self.width, self.width), 1)
        return self.last(torch.cat([a, b, a + b], 1))


class Net(nn.Module):
    """Two stages, of which the second is as wide as its input."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.stages = nn.Sequential(Stage(16, 12), Stage(16, 16))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.stages(self.stem(x))).mean((2, 3)))


def exported(model: nn.Module) -> nn.Module:
    """As exporters of detectors do it: the other method in place of `forward`."""
    other = copy.deepcopy(model)
    for module in other.modules():
        if isinstance(module, Stage):
            module.forward = module.forward_split  # type: ignore[method-assign]
    return other


@pytest.mark.parametrize("seed", range(4))
def test_the_other_forward_computes_the_same_after_pruning(seed: int) -> None:
    torch.manual_seed(seed)
    model, x = Net().eval(), torch.randn(2, 3, 8, 8)
    shrunk = ts.prune.channels(model, (x,), 0.4, criterion="random", seed=seed, round_to=1, min_channels=2)
    widths = [stage.block.in_channels for stage in shrunk.stages]  # type: ignore[union-attr]
    assert widths != [12, 16]
    assert [stage.width for stage in shrunk.stages] == widths  # type: ignore[union-attr]
    again = ts.prune.apply_surgery(model, ts.surgery(shrunk))  # type: ignore[arg-type]
    with torch.no_grad():
        for other in (exported(shrunk), exported(again), again):
            torch.testing.assert_close(other(x), shrunk(x))
    assert [stage.width for stage in model.stages] == [12, 16]  # type: ignore[union-attr]


def test_methods_run_on_copies_and_may_fail() -> None:
    class Counting(Stage):
        calls = 0

        def forward_split(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.block.weight.data.zero_()
            if self.calls > 2:
                raise RuntimeError(self.block)
            return super().forward_split(x)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 1), Counting(16, 12), nn.ReLU(), nn.Conv2d(16, 4, 1)).eval()
    shrunk = ts.prune.channels(model, (torch.randn(2, 3, 8, 8),), 0.4, round_to=1, min_channels=2)
    assert model[1].calls == shrunk[1].calls == 0  # type: ignore[index]
    assert float(shrunk[1].block.weight.abs().sum()) > 0  # type: ignore[index]
