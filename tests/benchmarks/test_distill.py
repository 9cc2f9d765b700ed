"""The distillation benchmark: what is still to run, what is chosen on validation, and the page of given rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import torchslim as ts
from benchmarks import distill, distill_models
from benchmarks.distill_models import LABELS, TRIED, SmallNet, ways
from benchmarks.distill_page import half_width, interval, page
from torchslim.artifact.model_size import macs
from torchslim.distill import LOSSES

MACHINE = {"processor": "a processor", "instruction_set": "avx2", "versions": {"torch": "2"}}


def row(way: str, seed: int, val: float, test: float | None = None, couple: str = "images") -> dict[str, Any]:
    found = {"couple": couple, "way": way, "seed": seed, "val": val, "seconds": 2.0, "version": "x"}
    return found if test is None else found | {"test": test}


def tried() -> list[dict[str, Any]]:
    return [row(name, distill.TRIAL_SEED, 80.0 + number) for number, name in enumerate(TRIED)]


def test_the_students_have_a_tenth_of_the_work() -> None:
    from examples.fashion_mnist.model import ResNet

    x = torch.zeros(1, 1, 28, 28)
    assert 10 * macs(SmallNet().eval(), (x,)).total <= macs(ResNet().eval(), (x,)).total


def test_every_loss_is_a_way() -> None:
    names = ways("images", ts.KD())
    assert set(LOSSES) == {name.removeprefix("kd + ") for name in names if name != LABELS}
    assert len({step.epochs for step in names.values()}) == 1


def test_settings_come_first_and_several_seeds_last() -> None:
    assert distill.todo([], "images") == [(name, distill.TRIAL_SEED) for name in TRIED]
    assert distill.chosen_kd(tried()[:-1], "images") is None
    assert distill.chosen_kd(tried(), "images") == list(TRIED.values())[-1]
    left = distill.todo(tried(), "images")
    names = list(ways("images", ts.KD()))
    assert left[: len(names)] == [(name, 0) for name in names]
    rows = tried() + [row(name, 0, 85.0 + (name in ("kd + hint", "kd + pkt")), 84.0) for name in names]
    left = distill.todo(rows, "images")
    assert {name for name, _ in left} == {LABELS, "kd", "dkd", "kd + hint", "kd + pkt"}
    assert {seed for _, seed in left} == {1, 2, 3, 4}


@pytest.mark.slow
def test_intervals_are_students() -> None:
    stats = pytest.importorskip("scipy.stats")
    values = [0.3, 0.1, 0.4, 0.2, 0.6]
    low, high = stats.t.interval(0.95, 4, loc=np.mean(values), scale=stats.sem(values))
    half = half_width(values)
    assert half is not None
    assert np.mean(values) - half == pytest.approx(low, abs=1e-3)
    assert np.mean(values) + half == pytest.approx(high, abs=1e-3)
    assert interval([0.5]) == "+0.50"


def test_the_page_says_whether_the_bar_is_met() -> None:
    labels = [row(LABELS, seed, 85.0, 84.0 + 0.1 * seed) for seed in range(5)]
    better = [row("kd", seed, 86.0, 85.0 + 0.1 * seed + 0.01 * (-1) ** seed) for seed in range(5)]
    worse = [row("kd", seed, 86.0, 84.0 + 0.1 * seed + 0.5 * (-1) ** seed) for seed in range(5)]
    text = page([*tried(), *labels, *better], MACHINE)
    assert "t-interval above zero: met." in text
    assert "| kd | 5 | 86.00 +- 0.00 |" in text
    assert "chosen on validation with a seed of its own: temperature 4, alpha 0.9" in text
    assert "t-interval above zero: **missed**." in page([*labels, *worse], MACHINE)
    assert "2 of 5 seeds have run" in page([*labels, *better[:2]], MACHINE)
    cost = {"couple": "images", "way": "cost of kd", "seed": 0, "bar": 1.1, "over": "student + teacher",
            "ratios": [1.0, 1.2, 1.3], "over_labels": [2.0, 2.0, 2.0]}  # fmt: skip
    memory = {"couple": "memory", "way": "batch 64", "seed": 0, "ratios": [1.5]}
    text = page([*labels, cost, memory], MACHINE)
    assert "| kd | student + teacher | 1.20x [1.00-1.30] | 1.10 | **missed** | 2.00x |" in text
    assert "| 64 | 1.5 | 1 |" in text


def test_a_student_trains_from_the_weights_of_its_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.randn(32, 1, 12, 12), torch.arange(32) % 10
    task = ts.Task(train=[(x, y)], val=[(x, y)], test=[(x, y)], metric="accuracy")
    couple = distill_models.Couple(
        about="", teacher=lambda: SmallNet().eval(), student=SmallNet, task=lambda: task, training={"epochs": 1}
    )
    monkeypatch.setitem(distill_models.COUPLES, "toy", couple)  # type: ignore[arg-type]
    one, two, other = (distill.train("toy", ways("toy", ts.KD())[LABELS], seed, tested=seed != 9) for seed in (3, 3, 9))
    assert one["losses"] == two["losses"] != other["losses"]
    assert "test" in one
    assert "test" not in other
