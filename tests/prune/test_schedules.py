"""Pruning in rounds and along a schedule, while the model trains."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import torchslim as ts
from tests.support import toy
from torchslim.core.fingerprint import fingerprint
from torchslim.core.layer_patterns import select_weights
from torchslim.prune.schedule import cubic, rounds


def kept(model: nn.Module) -> int:
    return sum(int((weight != 0).sum()) for weight in select_weights(model).values())


TOTAL = 72 + 576 + 32


def step_of(**fields: Any) -> tuple[ts.Prune, ts.Context, list[int]]:
    """A step whose task notes how many weights are left whenever it is evaluated."""
    left: list[int] = []
    model = toy.model()

    def metric(predict: Any, batches: Any) -> float:
        left.append(kept(model))
        return -float(len(left))  # every epoch is worse than the one before

    train = ts.Finetune(epochs=fields.pop("epochs", 2), optimizer="sgd", lr=0.01)
    step = ts.Prune(sparsity=0.8, train=train, **fields)
    ctx = ts.Context(task=replace(toy.task(), metric=metric), teacher=model, example_inputs=())
    return step, ctx, left


def test_iterative_pruning_trains_after_each_of_its_rounds() -> None:
    step, ctx, left = step_of(schedule="iterative", rounds=3, epochs=2)
    phases: list[str] = []
    outcome = step(ctx.teacher, replace(ctx, progress=lambda event: phases.append(event.phase)))
    expected = [TOTAL - round(sparsity * TOTAL) for sparsity in rounds(0.8, 3)]
    assert left == [each for each in expected for _ in range(2)]
    assert [row["round"] for row in outcome.history] == [1, 1, 2, 2, 3, 3]
    assert list(dict.fromkeys(phases)) == ["prune-1", "prune-2", "prune-3"]
    assert kept(outcome.model) == TOTAL - round(0.8 * TOTAL)


@given(st.floats(0.01, 0.99), st.integers(1, 12))
def test_every_round_removes_the_same_share_of_what_is_left(sparsity: float, count: int) -> None:
    left = [1.0, *(1 - each for each in rounds(sparsity, count))]
    assert len(left) == count + 1
    assert left[-1] == 1 - sparsity
    shares = [after / before for before, after in pairwise(left)]
    assert shares == pytest.approx([(1 - sparsity) ** (1 / count)] * count)


@given(st.floats(-1, 2), st.floats(-1, 2))
def test_the_cubic_schedule_rises_from_nothing_to_everything(first: float, second: float) -> None:
    low, high = sorted((first, second))
    assert 0 <= cubic(low) <= cubic(high) <= 1
    assert cubic(0) == 0
    assert cubic(1) == 1
    inside = min(max(first, 0.0), 1.0)
    assert cubic(first) == pytest.approx(3 * inside - 3 * inside**2 + inside**3)  # Zhu & Gupta, expanded


@pytest.mark.parametrize("until", [0.3, 0.5, 1.0])
def test_gradual_pruning_follows_the_cubic_and_keeps_only_a_settled_epoch(until: float) -> None:
    step, ctx, left = step_of(schedule="gradual", until=until, epochs=4)
    seen: list[tuple[float, int]] = []
    ctx = replace(ctx, progress=lambda event: seen.append((event.current / event.total, kept(ctx.teacher))))
    outcome = step(ctx.teacher, ctx)
    counts = [count for _, count in seen]
    assert counts == sorted(counts, reverse=True)
    for progress, count in seen:
        done = int(min(progress / until, 1) * 100 + 1e-9) / 100  # it moves by hundredths
        low, high = (TOTAL * (1 - 0.8 * cubic(min(each, 1))) for each in (done + 0.01, done))
        assert low - 1 <= count <= high + 1
    assert counts[-1] == kept(outcome.model) == TOTAL - round(0.8 * TOTAL)
    settled = next(epoch for epoch in range(1, 5) if epoch / 4 >= until)
    best = max(range(1, 5), key=lambda epoch: (epoch >= settled, -epoch))
    assert outcome.history[best - 1]["val"] == -best
    assert left[settled - 1] == TOTAL - round(0.8 * TOTAL)
    assert sum(record.sparsity * outcome.masks[record.layer].numel() for record in outcome.layers) == pytest.approx(
        round(0.8 * TOTAL)
    )


def test_the_best_settled_epoch_is_the_one_that_comes_back() -> None:
    step, ctx, _ = step_of(schedule="gradual", until=0.5, epochs=4)
    states: list[str] = []

    def metric(predict: Any, batches: Any) -> float:
        states.append(fingerprint(ctx.teacher.state_dict()))
        return [9.0, 2.0, 3.0, 1.0][len(states) - 1]

    outcome = step(ctx.teacher, replace(ctx, task=replace(ctx.task, metric=metric)))
    assert fingerprint(outcome.model.state_dict()) == states[2]  # the first was better, but not yet sparse


class Unsized:
    """A loader that does not know its length."""

    def __iter__(self) -> Any:
        return iter([toy.images(16, seed) for seed in range(10)])


def test_gradual_pruning_without_a_length_moves_step_by_step_once_it_has_counted() -> None:
    step, ctx, _ = step_of(schedule="gradual", until=0.9, epochs=4)
    seen: list[int] = []
    task = replace(ctx.task, train=Unsized())
    step(ctx.teacher, replace(ctx, task=task, progress=lambda event: seen.append(kept(ctx.teacher))))
    assert set(seen[:10]) == {TOTAL}  # nothing is known in the first epoch
    assert len(set(seen[10:20])) >= 8
    assert seen[-1] == TOTAL - round(0.8 * TOTAL)


def test_gradual_pruning_says_what_it_refused() -> None:
    step, ctx, _ = step_of(schedule="gradual", epochs=2, pattern="slice", dim=2, exclude="conv1")
    outcome = step(ctx.teacher, ctx)
    (warning,) = outcome.warnings
    assert re.search("not pruned.*head.weight.*2 dimensions.*dim 2", warning)
    assert [(each.layer, each.action) for each in outcome.layers] == [
        ("head.weight", "refused"),
        ("conv2.weight", "pruned"),
    ]


@pytest.mark.parametrize("schedule", ["iterative", "gradual"])
def test_what_an_earlier_round_removed_stays_removed(schedule: str) -> None:
    step, ctx, _ = step_of(schedule=schedule, criterion="random")
    zeros: list[Tensor] = []

    def note(event: ts.Event) -> None:
        zeros.append(torch.cat([each.flatten() == 0 for each in select_weights(ctx.teacher).values()]))

    outcome = step(ctx.teacher, replace(ctx, progress=note))
    assert all(bool(later[earlier].all()) for earlier, later in pairwise(zeros))
    dropped = torch.cat([~outcome.masks[name].flatten() for name in select_weights(outcome.model)])
    assert torch.equal(dropped, zeros[-1])
    assert int(dropped.sum()) == round(0.8 * TOTAL)
