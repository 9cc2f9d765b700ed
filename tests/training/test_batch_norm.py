"""Running statistics taken again from data: the closed form, and nothing else changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support import toy
from tests.support.states import model_state
from torchslim.core.fingerprint import fingerprint
from torchslim.errors import TaskError
from torchslim.training.batch_norm import recalibrate_batch_norm


class Nested(nn.Module):
    """A norm of inputs, and a second one behind a layer and a dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.outer = nn.ModuleDict({"norm": nn.BatchNorm1d(3, momentum=None)})
        self.linear, self.drop, self.last = nn.Linear(3, 5), nn.Dropout(0.9), nn.BatchNorm1d(5, momentum=0.3)
        self.unused, self.untracked = nn.BatchNorm1d(2), nn.BatchNorm1d(5, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.untracked(self.last(self.drop(self.linear(self.outer["norm"](x)))))


def call(model: nn.Module, batch: Any) -> Any:
    return model(batch)


def batches() -> list[Tensor]:
    return [torch.randn(16, 3) * scale + scale for scale in (1.0, 2.0, 5.0)]


def test_means_and_unbiased_variances_of_the_batches_are_averaged() -> None:
    model, given = Nested().double().eval(), [each.double() for each in batches()]
    assert recalibrate_batch_norm(model, call, given) == 2
    norm = model.outer["norm"]
    torch.testing.assert_close(norm.running_mean, torch.stack([each.mean(0) for each in given]).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([each.var(0) for each in given]).mean(0))
    # the second norm sees what the first gives in training, and no dropout
    inside = []
    for each in given:
        centered = (each - each.mean(0)) / (each.var(0, unbiased=False) + norm.eps).sqrt()
        inside.append(centered @ model.linear.weight.T + model.linear.bias)
    torch.testing.assert_close(model.last.running_mean, torch.stack([each.mean(0) for each in inside]).mean(0))
    torch.testing.assert_close(model.last.running_var, torch.stack([each.var(0) for each in inside]).mean(0))


def test_nothing_else_changes() -> None:
    model = Nested()
    model.linear.eval()
    model.last.weight.requires_grad_(False)
    before, weights = model_state(model), fingerprint(dict(model.named_parameters()))
    momenta = [each.momentum for each in model.modules() if isinstance(each, nn.BatchNorm1d)]
    unused = fingerprint(model.unused.state_dict())
    recalibrate_batch_norm(model, call, batches())
    assert {**model_state(model), "weights": before["weights"]} == before
    assert fingerprint(dict(model.named_parameters())) == weights
    assert [each.momentum for each in model.modules() if isinstance(each, nn.BatchNorm1d)] == momenta
    assert fingerprint(model.unused.state_dict()) == unused
    assert model.last.num_batches_tracked == 3


def test_it_is_what_it_was_trained_to_when_asked_again() -> None:
    model = Nested().eval()
    recalibrate_batch_norm(model, call, batches()[:1])
    first = fingerprint(model.state_dict())
    torch.manual_seed(0)
    given = batches()
    recalibrate_batch_norm(model, call, given)
    second = fingerprint(model.state_dict())
    recalibrate_batch_norm(model, call, given)
    assert fingerprint(model.state_dict()) == second != first


def test_a_failure_leaves_the_statistics_as_they_were() -> None:
    model = Nested()
    before = model_state(model)

    def fails(module: nn.Module, batch: Any) -> Any:
        module(batch)
        raise RuntimeError("the user's own")

    with pytest.raises(RuntimeError, match="the user's own"):
        recalibrate_batch_norm(model, fails, batches())
    assert model_state(model) == before
    with pytest.raises(TaskError, match="calibration gave no batch"):
        recalibrate_batch_norm(model, call, [])
    assert model_state(model) == before


def test_a_model_without_norms_is_left_alone() -> None:
    assert recalibrate_batch_norm(nn.Linear(3, 3), call, batches()) == 0


def test_norms_that_fit_nothing_fit_again() -> None:
    model, task = toy.model().eval(), toy.task()
    with torch.no_grad():
        model.bn1.running_mean.fill_(3.0)
        model.bn1.running_var.fill_(9.0)
    images, _ = toy.images(64, 2)

    def gap() -> float:
        with torch.no_grad():
            seen = model.bn1(model.conv1(images))
        return float(seen.mean((0, 2, 3)).abs().max() + (seen.var((0, 2, 3)) - 1).abs().max())

    before = gap()
    recalibrate_batch_norm(model, task.forward, [toy.images(64, 1)])
    assert gap() < 0.5 < before
