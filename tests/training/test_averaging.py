"""The moving average of the weights: its numbers, where it is used, and what holds in it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import torchslim as ts
from tests.support import toy
from torchslim.core.fingerprint import fingerprint
from torchslim.training.averaging import WeightAverage
from torchslim.training.loop import Hook, LabelLoss, Loop
from torchslim.training.optimizer import OptimizerSettings


def train(model: nn.Module, task: ts.Task, **options: Any) -> Any:
    settings = OptimizerSettings(**{"optimizer": "sgd", "lr": 0.05, "average": 0.9} | options.pop("settings", {}))
    return ts.fit(model, task.train, LabelLoss(task), **{"epochs": 2, "settings": settings, "evaluate": task} | options)


def averaged_line(decay: float, steps: int, slope: float) -> tuple[float, float]:
    """The average of a weight that starts at 1 and changes by `slope` at each step, and the weight's last value."""
    model, last = nn.Linear(1, 1, bias=False, dtype=torch.float64), []
    nn.init.ones_(model.weight)

    class Look(Hook):
        def on_epoch(self, loop: Loop) -> None:
            last.append(loop.model.weight.item())

    batches = [(torch.ones(1, 1, dtype=torch.float64), torch.zeros(1))] * steps
    task = ts.Task(train=batches, val=batches, metric="accuracy", loss=lambda outputs, batch: -slope * outputs.sum())
    settings = OptimizerSettings(
        optimizer="sgd", lr=1.0, momentum=0.0, weight_decay=0.0, schedule="constant", warmup=0.0, average=decay
    )
    ts.fit(model, batches, LabelLoss(task), epochs=1, settings=settings, hooks=[Look()])
    return model.weight.item(), last[0]


@given(st.floats(0, 2 / 11), st.integers(1, 12), st.floats(-1, 1))
def test_the_average_of_a_line_lags_behind_it_by_the_closed_form(decay: float, steps: int, slope: float) -> None:
    average, last = averaged_line(decay, steps, slope)
    lag = decay * (1 - decay**steps) / (1 - decay)  # of decay + decay**2 + ..., in steps
    assert last == pytest.approx(1 + slope * steps)
    assert average == pytest.approx(last - slope * lag)


@given(st.integers(1, 12), st.floats(-1, 1))
def test_in_the_warmup_the_lag_is_about_a_tenth_of_the_training(steps: int, slope: float) -> None:
    """lag(n) = (1 + n) / (10 + n) * (lag(n - 1) + 1) is solved by the sum of (n + 1) / 10 and a multiple of a product."""
    average, last = averaged_line(0.999, steps, slope)
    product = math.gamma(steps + 2) * math.gamma(11) / math.gamma(steps + 11)  # of (1 + k) / (10 + k), k up to n
    assert average == pytest.approx(last - slope * (steps + 1 - product) / 10)


def test_weights_in_bfloat16_have_an_average_in_float32() -> None:
    """In bfloat16, which has 8 bits, a 1000th of the distance would be rounded away at every step."""
    model = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    nn.init.ones_(model.weight)
    average = WeightAverage(model, 0.999)
    nn.init.constant_(model.weight, 1.5)
    for step in range(100_000, 100_500):
        average.update(step)
    average.settle()
    assert model.weight.dtype == torch.bfloat16
    assert model.weight.item() == pytest.approx(1.5 - 0.5 * 0.999**500, abs=2**-8)


def test_real_and_complex_weights_are_averaged_and_indices_are_not() -> None:
    model = nn.ParameterDict(
        {
            "real": nn.Parameter(torch.zeros(2)),
            "complex": nn.Parameter(torch.zeros(2, dtype=torch.complex64)),
            "index": nn.Parameter(torch.zeros(2, dtype=torch.long), requires_grad=False),
        }
    )
    average = WeightAverage(model, 0.1)
    with torch.no_grad():
        for parameter in model.values():
            parameter.fill_(10)
    average.update(1)
    with average.shown():
        assert {name: parameter[0].item() for name, parameter in model.items()} == {
            "real": 9,
            "complex": 9,
            "index": 10,
        }
    assert all(bool((parameter == 10).all()) for parameter in model.values())


def test_evaluation_the_best_epoch_and_the_result_use_the_average() -> None:
    values, seen, raw = iter([0.9, 0.2]), [], []

    class Look(Hook):
        def on_epoch(self, loop: Loop) -> None:
            raw.append(loop.model.head.weight.detach().clone())

    def metric(predict: Any, batches: Any) -> float:
        seen.append(model.head.weight.detach().clone())
        return next(values)

    model = toy.model()
    report = train(model, replace(toy.task(), metric=metric), hooks=[Look()])
    assert report.best_epoch == 1
    assert torch.equal(model.head.weight, seen[0])
    assert all(not torch.equal(average, weight) for average, weight in zip(seen, raw, strict=True))
    plain: list[Tensor] = []

    class LookAgain(Look):
        def on_epoch(self, loop: Loop) -> None:
            plain.append(loop.model.head.weight.detach().clone())

    train(toy.model(), toy.task(), hooks=[LookAgain()], settings={"average": None})
    assert all(torch.equal(one, other) for one, other in zip(raw, plain, strict=True)), (
        "the average changes no training"
    )


def test_without_evaluation_the_model_ends_with_the_average_of_the_last_epoch() -> None:
    best, last = toy.model(), toy.model()
    values = iter([0.1, 0.2])
    train(best, replace(toy.task(), metric=lambda predict, batches: next(values)))
    train(last, toy.task(), evaluate=None)
    assert fingerprint(best.state_dict()) == fingerprint(last.state_dict())


@pytest.mark.parametrize("later", [False, True])
def test_masked_weights_are_zero_in_the_average(later: bool) -> None:
    mask, model = torch.rand(8, 8, 3, 3) < 0.5, toy.model()

    class Later(Hook):
        def on_epoch(self, loop: Loop) -> None:
            if loop.epoch == 2:
                loop.masks["conv2.weight"] = mask

    hooks = [Later()] if later else []
    train(model, toy.task(), epochs=2, evaluate=None, masks={} if later else {"conv2.weight": mask}, hooks=hooks)
    assert bool((model.conv2.weight[~mask] == 0).all())
    assert not bool((model.conv2.weight[mask] == 0).any())


def test_statistics_of_norms_are_averaged_and_other_buffers_are_not() -> None:
    class Counting(toy.Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += self.training
            return super().forward(x)

    trace: list[Tensor] = []

    class Look(Hook):
        def on_step(self, loop: Loop) -> None:
            trace.append(loop.model.bn1.running_var.clone())

    model = Counting()
    train(model, toy.task(), epochs=1, evaluate=None, hooks=[Look()])
    expected = torch.ones(8)
    for number, value in enumerate(trace, 1):
        decay = min(0.9, (1 + number) / (10 + number))
        expected = decay * expected + (1 - decay) * value
    torch.testing.assert_close(model.bn1.running_var, expected)
    assert model.calls == model.bn1.num_batches_tracked == len(trace)
