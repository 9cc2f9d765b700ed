"""The user's loaders: seeded for each epoch, and left as they were found."""

from __future__ import annotations

import logging
import random
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, TensorDataset

import torchslim as ts
from tests.support import toy
from torchslim.training.loaders import batch_count, few_of, seeded
from torchslim.training.loop import Hook, LabelLoss, Loop
from torchslim.training.optimizer import OptimizerSettings


def train(model: nn.Module, task: ts.Task, **options: Any) -> Any:
    settings = OptimizerSettings(optimizer="sgd", lr=0.05)
    return ts.fit(model, task.train, LabelLoss(task), **{"epochs": 3, "settings": settings, "evaluate": task} | options)


class Generators:
    """Everything random that the caller owns."""

    def __init__(self) -> None:
        data = TensorDataset(*toy.images(64, 1))
        self.owned = [torch.Generator().manual_seed(each) for each in (5, 6)]
        self.sampler = DistributedSampler(data, num_replicas=1, rank=0)
        self.sampler.set_epoch(7)
        self.loaders = [
            DataLoader(data, batch_size=16, shuffle=True, generator=self.owned[0]),
            DataLoader(data, batch_size=16, sampler=RandomSampler(data, generator=self.owned[1])),
            DataLoader(data, batch_size=16, sampler=self.sampler),
        ]

    def state(self) -> list[Any]:
        numbers = np.random.get_state()[1].tolist()
        states = [torch.get_rng_state(), *(each.get_state() for each in self.owned)]
        return [*(each.tolist() for each in states), numbers, random.getstate(), self.sampler.epoch]


def switches() -> list[Any]:
    return [
        torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision(),
        logging.getLogger("lightning_fabric").level, logging.root.manager.disable,
    ]  # fmt: skip


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("fails", [False, True])
def test_training_leaves_the_process_and_the_loaders_as_they_were(index: int, fails: bool) -> None:
    owner, model = Generators(), toy.model()
    task = replace(toy.task(), train=owner.loaders[index], val=owner.loaders[0])
    model.bn1.eval()
    modes = [module.training for module in model.modules()]
    state, switched = owner.state(), switches()

    class Meddle(Hook):
        def on_step(self, loop: Loop) -> None:
            torch.set_default_dtype(torch.float64)
            torch.set_num_threads(2)
            if fails and loop.epoch == 1:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) if fails else nullcontext():
        ts.Finetune(epochs=2).check(ts.Context(task=task, teacher=model, example_inputs=()))
        train(model, task, hooks=[Meddle()])
    assert owner.state() == state
    assert switches() == switched
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.slow
def test_epochs_see_the_data_in_different_orders_and_seeds_decide_which() -> None:
    owner = Generators()

    def orders(seed: int, loader: Any) -> list[list[float]]:
        seen: list[float] = []
        task = replace(toy.task(), train=loader)

        def loss(outputs: Tensor, batch: Any) -> Tensor:
            seen.extend(batch[0].mean((1, 2, 3)).tolist())
            return outputs.sum() * 0

        train(toy.model(), replace(task, loss=loss), epochs=2, seed=seed, evaluate=None)
        return [seen[:64], seen[64:]]

    for loader in owner.loaders:
        first, again, other = orders(1, loader), orders(1, loader), orders(2, loader)
        assert first == again
        assert first[0] != first[1]
        assert sorted(first[0]) == sorted(first[1])
        if loader is not owner.loaders[2]:  # a DistributedSampler knows epochs, not seeds
            assert first != other


class Unsized:
    """A loader that does not know its length."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def __iter__(self) -> Any:
        return iter([toy.images(16, seed) for seed in range(self.batches)])


@pytest.mark.parametrize("batches", [1, 4])
def test_a_loader_without_a_length_learns_at_a_full_rate_and_then_as_if_it_had_one(batches: int) -> None:
    rates: dict[str, list[float]] = {"without": [], "with": []}

    class Look(Hook):
        def __init__(self, name: str) -> None:
            self.name = name

        def on_step(self, loop: Loop) -> None:
            rates[self.name].append(loop.optimizer.param_groups[0]["lr"])

    for name, loader in (("without", Unsized(batches)), ("with", list(Unsized(batches)))):
        task = replace(toy.task(), train=loader)
        totals: list[Any] = []
        train(toy.model(), task, hooks=[Look(name)], progress=lambda event, t=totals: t.append(event.total))
        assert totals[0] == (None if name == "without" else 3 * batches)
        assert totals[-1] == 3 * batches
    assert rates["without"][batches:] == pytest.approx(rates["with"][batches:])
    assert all(rate == rates["without"][0] > 0.04 for rate in rates["without"][:batches])


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 6))
def test_few_batches_are_the_first_ones_and_the_last_one(samples: int, count: int, size: int) -> None:
    data = TensorDataset(torch.arange(samples))
    sampled = DataLoader(data, size)
    every = [batch[0].tolist() for batch in sampled]
    expected = every if len(every) <= count else [*every[: count - 1], every[-1]]
    for batches in (sampled, list(sampled)):
        few = few_of(batches, count)
        assert [batch[0].tolist() for batch in few] == expected
        assert len(few) == len(expected)
    assert type(few_of(sampled, count)) is DataLoader


def test_few_batches_of_what_cannot_be_indexed_are_the_first_ones() -> None:
    drawn: list[int] = []

    class Stream:
        def __iter__(self) -> Any:
            for number in range(10):
                drawn.append(number)
                yield number

    few = few_of(Stream(), 3)
    assert [list(few), list(few)] == [[0, 1, 2]] * 2
    assert len(drawn) == 6, "no more than the batches that are used"
    assert batch_count(few) is None


def test_few_batches_of_a_shuffling_loader_are_those_of_its_seed() -> None:
    loader = DataLoader(TensorDataset(torch.arange(12)), 2, shuffle=True, generator=torch.Generator())
    orders = []
    for batches in (loader, few_of(loader, 3)):
        with seeded(batches, 0, 5):
            orders.append([batch[0].tolist() for batch in batches])
    assert orders[1] == [*orders[0][:2], orders[0][-1]]
