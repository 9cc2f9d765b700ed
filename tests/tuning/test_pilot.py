"""A pilot measures what plain rounding gains and loses, and a suggestion says where no gain is to be expected."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import torchslim as ts
from tests.support import toy
from torchslim.core.batches import predictor
from torchslim.core.measurement import Speedup
from torchslim.runtimes import Deployed
from torchslim.tuning import pilot as pilots
from torchslim.tuning.pilot import MANY, Pilot, call_overhead, outside_share, pilot
from torchslim.tuning.suggestion_text import LOSS, allowed_loss, tried

PERCENT = ts.Metric(fn=lambda predict, batches: 0.0, name="accuracy", unit="%")
ERROR = ts.Metric(fn=lambda predict, batches: 0.0, name="error", unit="m", higher_is_better=False)


def run(low: float, high: float, lost: float = 0.0, **more: Any) -> Pilot:
    speedup = Speedup(value=(low + high) / 2, p10=low, p90=high, rounds=9, machine="this")
    figures = {"speedup": speedup, "before": 90.0, "after": 90.0 - lost, "lost": lost}
    return Pilot(**{"scheme": "int8", "runtime": "onnxruntime", **figures, **more})


def line(found: Pilot, budget: ts.Budget | None = None, metric: ts.Metric = PERCENT, **table: Any) -> str:
    return tried(found, metric, budget or ts.Budget(), {"do": "quantize", **table})


class Two(nn.Module):
    """A part, and a loop in Python around it."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.waits = toy.model(), 0.0

    def forward(self, x: Tensor) -> Tensor:
        until = time.process_time() + self.waits
        while time.process_time() < until:
            pass
        return self.inside(x)


@given(st.floats(1e-6, 10.0), st.floats(1e-6, 10.0))
def test_the_overhead_of_a_call_is_the_time_of_no_sample(fixed: float, by_sample: float) -> None:
    """Times on a line give the line's share at one sample."""
    rounds = {"one": [fixed + by_sample] * 5, "many": [fixed + MANY * by_sample] * 5}
    assert pilots.overhead_share(rounds["one"], rounds["many"]) == pytest.approx(fixed / (fixed + by_sample), abs=1e-6)


def test_an_overhead_is_a_share() -> None:
    assert pilots.overhead_share([1.0], [100.0]) == 0.0
    assert pilots.overhead_share([1.0], [0.5]) == 1.0


def test_a_call_that_gains_nothing_says_so_with_the_reasons() -> None:
    same = line(run(0.9, 1.2, overhead=0.7, outside=None))
    for text in ("1.05x [0.90-1.20]", "no difference", "do not expect speed", "70% of the time of one sample"):
        assert text in same
    faster = line(run(1.5, 1.7, overhead=0.1, outside=0.2))
    assert "do not expect" not in faster
    assert "overhead" not in faster
    assert "of the parts" not in faster
    assert "80% of the time is spent outside of the parts" in line(run(0.9, 1.2, outside=0.8))


@pytest.mark.parametrize(("lost", "budget", "said"), [
    (LOSS, None, False), (LOSS + 0.5, None, True), (LOSS + 0.5, ts.Budget(metric_drop=2.0), False),
    (0.3, ts.Budget(metric_drop=0.2), True), (-5.0, None, False),
])  # fmt: skip
def test_a_loss_above_the_allowed_one_is_told(lost: float, budget: ts.Budget | None, said: bool) -> None:
    found = line(run(1.5, 1.7, lost), budget, mode="qat")
    assert ("rounding alone loses more than" in found) == said
    assert ("trains on the grid" in found) == said


def test_a_metric_without_percent_may_lose_per_cent_of_itself() -> None:
    assert allowed_loss(ts.Budget(), ERROR, -2.0) == pytest.approx(0.02)
    assert "rounding alone" in line(run(1.5, 1.7, 0.91), metric=ERROR)
    assert "rounding alone" not in line(run(1.5, 1.7, 0.89), metric=ERROR)


def test_a_pilot_that_cannot_run_gives_the_reason() -> None:
    failed = pilot(toy.model(), toy.task(), "int8", {}, "no such runtime")
    assert "no such runtime" in failed.failure
    assert not failed.faster
    assert line(failed).endswith(failed.failure)


@pytest.mark.slow
def test_a_pilot_measures_both_models_and_leaves_the_model_alone() -> None:
    """Costs 4 s."""
    model, task = toy.model(), toy.task()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = pilot(model, task, "int8", {}, "onnxruntime")
    assert found.failure == ""
    assert found.before == pytest.approx(task.evaluate(predictor(model), "val"))
    assert found.speedup is not None
    assert found.speedup.value > 0
    assert found.lost == pytest.approx((found.before or 0) - (found.after or 0))
    assert found.outside is None
    assert 0 <= (found.overhead or 0) <= 1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.slow
def test_the_share_outside_of_the_parts_is_that_of_the_code_around_them() -> None:
    """Costs 3 s."""
    x = toy.task().inputs(next(iter(toy.task().val)))
    for waits, least, most in ((0.02, 0.8, 1.0), (0.0, 0.0, 0.95)):
        model = Two().eval()
        model.waits = waits
        deployed = ts.deploy(model, x, runtime="onnxruntime", part="inside", threads=1)
        share = outside_share(deployed)
        assert share is not None
        assert least <= share <= most
        assert call_overhead(deployed) is None
    whole = ts.deploy(toy.model(), x, runtime="onnxruntime", threads=1)
    assert isinstance(whole, Deployed)
    assert outside_share(whole) is None


@pytest.mark.slow
def test_a_suggestion_has_a_line_for_each_pilot_and_none_without_measuring() -> None:
    """Costs 5 s."""
    found = ts.suggest(toy.model(), toy.task(), runtime="onnxruntime")
    assert len(found.pilots) == 1
    assert len(found.reasons) == 4
    assert found.reasons[3].startswith("Tried: int8 on onnxruntime, plainly rounded: ")
    assert not ts.suggest(toy.model(), toy.task(), runtime="onnxruntime", measure=False).pilots
    assert not ts.suggest(toy.model(), toy.task(), ts.Budget(size_mb=1.0), runtime="onnxruntime").pilots
