"""Penalties against loops in NumPy that know nothing of how they are computed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import torchslim as ts
from tests.support import toy
from torchslim.errors import PruneError
from torchslim.prune.structured.penalties import make_penalty
from torchslim.prune.structured.plan import analyze
from torchslim.training.loop import Loop


class Split(nn.Module):
    """A convolution flattened into a linear layer: a channel takes several columns."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6)
        self.deep, self.head = nn.Linear(6 * 4, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x))).flatten(1)
        return self.head(torch.relu(self.deep(x)))


MODELS: dict[str, tuple[Any, tuple[Tensor, ...]]] = {
    "residual": (toy.model, (toy.images(2, 0)[0],)),
    "flattened": (Split, (torch.randn(2, 2, 4, 4),)),
}


def made(name: str, kind: Any, strength: float = 0.01) -> tuple[nn.Module, Any, Loop]:
    factory, inputs = MODELS[name]
    model = factory().double()
    with torch.no_grad():
        for each in model.parameters():
            each.copy_(torch.randn_like(each))
    inputs = tuple(each.double() for each in inputs)
    hook = make_penalty(kind, analyze(model, inputs).coupling(), strength)
    loop = Loop(model, torch.optim.SGD(model.parameters(), lr=0.1), 1)
    hook.on_start(loop)
    return model, hook, loop


def slices(name: str) -> list[list[tuple[str, int, list[int]]]]:
    """By hand: for each channel that may go, what goes with it: parameter, dimension, indices."""
    if name == "residual":
        return [
            [("conv1.weight", 0, [c]), ("bn1.weight", 0, [c]), ("bn1.bias", 0, [c]), ("conv2.weight", 0, [c]),
             ("conv2.weight", 1, [c]), ("conv2.bias", 0, [c]), ("head.weight", 1, [c])]
            for c in range(8)
        ]  # fmt: skip
    first = [
        [("conv.weight", 0, [c]), ("conv.bias", 0, [c]), ("norm.weight", 0, [c]), ("norm.bias", 0, [c]),
         ("deep.weight", 1, [4 * c + place for place in range(4)])]
        for c in range(6)
    ]  # fmt: skip
    return first + [[("deep.weight", 0, [c]), ("deep.bias", 0, [c]), ("head.weight", 1, [c])] for c in range(10)]


@pytest.mark.parametrize("name", MODELS)
def test_group_lasso_is_the_sum_of_the_norms_of_what_goes_together(name: str) -> None:
    model, hook, loop = made(name, "group-lasso", 0.01)
    weights = {path: each.detach().numpy() for path, each in model.named_parameters()}
    expected = 0.0
    for channel in slices(name):
        parts = [np.take(weights[path], index, axis=dim).ravel() for path, dim, index in channel]
        everything = np.concatenate(parts)
        expected += math.sqrt(everything.size) * float(np.sqrt((everything**2).sum()))
    value = hook.penalty(loop)
    assert value.item() == pytest.approx(0.01 * expected, rel=1e-6)
    value.backward()
    frozen = "head.bias"  # outputs stay, and nothing pulls at what stays
    assert all((each.grad is None) == (path == frozen) for path, each in model.named_parameters())


@pytest.mark.parametrize("name", MODELS)
def test_bn_l1_is_the_sum_of_the_scales_magnitudes(name: str) -> None:
    model, hook, loop = made(name, "bn-l1", 0.5)
    norm = model.bn1 if name == "residual" else model.norm
    value = hook.penalty(loop)
    assert value.item() == pytest.approx(0.5 * float(np.abs(norm.weight.detach().numpy()).sum()), rel=1e-6)
    value.backward()
    assert torch.equal(norm.weight.grad, 0.5 * norm.weight.sign())
    assert [path for path, each in model.named_parameters() if each.grad is not None] == [
        path for path, each in model.named_parameters() if each is norm.weight
    ]


def test_a_channel_that_is_gone_has_a_slope_of_zero_and_not_nan() -> None:
    model, hook, loop = made("residual", "group-lasso")
    with torch.no_grad():
        for each in model.parameters():
            each.zero_()
        model.conv1.weight[0] = 1.0
    hook.penalty(loop).backward()
    assert bool(torch.isfinite(model.conv1.weight.grad).all())
    assert not bool(model.conv1.weight.grad[1:].any())
    assert bool(model.conv1.weight.grad[0].any())


def test_frozen_weights_are_not_penalized() -> None:
    model, hook, loop = made("residual", "bn-l1")
    model.bn1.weight.requires_grad_(False)
    hook.on_start(loop)
    assert hook.penalty(loop) is None


def test_bn_l1_needs_batch_norms() -> None:
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    coupling = analyze(model, (torch.randn(2, 4),)).coupling()
    with pytest.raises(PruneError, match="no batch norm.*'group-lasso'"):
        make_penalty("bn-l1", coupling, 1.0)


@pytest.mark.parametrize("kind", ["group-lasso", "bn-l1"])
def test_a_strong_penalty_makes_channels_fade(kind: str) -> None:
    """The ratio of the weakest channel's norm to that without the penalty falls; only the last epoch is kept."""
    task = toy.task()
    norms = []
    for strength in (1e-12, 0.03 if kind == "group-lasso" else 0.3):
        model = toy.model()
        coupling = analyze(model, (toy.images(2, 0)[0],)).coupling()
        ctx = ts.Context(task=task, teacher=model, example_inputs=(), seed=1)
        train = ts.Finetune(epochs=3, optimizer="sgd", lr=0.02)
        report = train.fit(model, ctx, hooks=[make_penalty(kind, coupling, strength)])
        assert report.best_epoch == 3
        assert report.history[0]["loss_penalty"] > 0
        norms.append(float(model.bn1.weight.detach().abs().mean()))
    assert norms[1] < 0.7 * norms[0]
