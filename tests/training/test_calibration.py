"""Calibration data are drawn once, and are the same for equal seeds, whatever shuffles."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import torchslim as ts
from tests.support import toy
from torchslim.quantize.mixed_precision import Trials
from torchslim.training.calibration import CalibrationData, calibration_of, spanning_examples


class Drawing(Dataset[tuple[Tensor, Tensor]]):
    """Noise that is drawn anew each time; counts how often."""

    def __init__(self) -> None:
        self.drawn = 0

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.drawn += 1
        return torch.randn(1, 8, 8) + index % 4, torch.tensor(index % 4)


def shuffled() -> tuple[Drawing, ts.Task]:
    data = Drawing()
    loader = DataLoader(data, batch_size=8, shuffle=True)
    return data, ts.Task(train=loader, val=[toy.images(32, 2)], metric="accuracy")


def values(inputs: list[Any]) -> Tensor:
    return torch.cat([each[0] for each in inputs])


@pytest.mark.slow
@given(seed=st.integers(0, 1000), other=st.integers(0, 1000), samples=st.integers(1, 64))
def test_equal_seeds_give_equal_samples_and_the_first_are_the_first(seed: int, other: int, samples: int) -> None:
    torch.manual_seed(other)  # what ran before changes nothing
    before = torch.get_rng_state()
    whole = values(CalibrationData(shuffled()[1], seed).inputs)
    assert torch.equal(torch.get_rng_state(), before)
    data, task = shuffled()
    fresh = CalibrationData(task, seed)
    few = values(fresh.first(samples))
    assert samples <= len(few) < samples + 8
    assert data.drawn <= len(few)
    assert torch.equal(few, whole[: len(few)])
    assert torch.equal(values(fresh.inputs), whole)
    assert torch.equal(values(fresh.first(samples)), few)
    assert other == seed or not torch.equal(values(CalibrationData(task, other).inputs), whole)


@given(seed=st.integers(0, 1000))
def test_examples_have_the_sizes_of_the_calibration_data_of_the_same_seed(seed: int) -> None:
    """In one order both batches have five steps, in another one has five and the other three."""
    rows = [torch.zeros(length, 2) for length in (5, 5, 3, 3)]

    def padded(chosen: list[Tensor]) -> tuple[Tensor, Tensor]:
        return torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True), torch.zeros(len(chosen))

    train = DataLoader(rows, batch_size=2, shuffle=True, collate_fn=padded)
    task = ts.Task(train=train, val=[padded(rows[:2])], metric="mae")
    sizes = {tuple(inputs[0].shape) for inputs in spanning_examples(task, seed)}
    assert {tuple(inputs[0].shape) for inputs in CalibrationData(task, seed).inputs} <= sizes


@pytest.mark.slow
def test_a_step_draws_once() -> None:
    data, task = shuffled()
    ctx = ts.Context(
        task=task, teacher=toy.model(), example_inputs=(toy.images(1, 1)[0],), calibration=CalibrationData(task, 0)
    )
    step = ts.Quantize("int8", layers="auto", metric_drop=50.0)
    step(toy.model(), ctx)
    assert data.drawn == 64


@pytest.mark.parametrize("options", [{"checks": None}, {}])
def test_schemes_that_need_no_ranges_draw_no_more_than_the_checks_take(options: dict[str, Any]) -> None:
    data, task = shuffled()
    ctx = ts.Context(task=task, teacher=toy.model(), example_inputs=(toy.images(1, 1)[0],))
    ts.Quantize("int8-weights", **options)(toy.model(), ctx)
    assert data.drawn == (0 if options else 32)


@pytest.mark.slow
def test_every_candidate_of_a_bisection_sees_the_same_samples() -> None:
    """Resumed or not: a process that starts in the middle draws what the first one drew."""
    _, task = shuffled()
    ctx = ts.Context(task=task, teacher=toy.model(), example_inputs=(toy.images(1, 1)[0],), seed=7)
    step = ts.Quantize("int8", layers="auto", metric_drop=50.0)
    ranges = []
    for again in (
        ctx,
        ctx,
        ts.Context(task=shuffled()[1], teacher=toy.model(), example_inputs=ctx.example_inputs, seed=7),
    ):
        torch.manual_seed(len(ranges))
        trials = Trials(toy.model(), again, step)
        prepared = trials.way.prepared(toy.model(), again, {"head": "float"}, trials.data)[""]
        ranges.append([value for name, value in prepared.program.state_dict().items() if "min_val" in name])
        assert ranges[-1]
    assert all(torch.equal(a, b) for other in ranges[1:] for a, b in zip(ranges[0], other, strict=True))
    assert torch.equal(values(calibration_of(ctx).inputs), values(calibration_of(ctx).inputs))


def test_a_size_that_few_batches_have_is_among_the_examples() -> None:
    texts = [torch.zeros(4, 32, dtype=torch.long) for _ in range(40)]
    texts[29] = texts[29][:, :7]  # the others are cut at 32 tokens
    batches = [(text, torch.zeros(4)) for text in texts]
    task = ts.Task(train=batches[:8], val=batches, metric="accuracy")
    assert {inputs[0].shape[1] for inputs in spanning_examples(task)} == {7, 32}
