"""The training loop, distillation and the task: one loop, exact losses, runs that resume."""

from __future__ import annotations

import resource
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import torchslim as ts
from tests import toy
from torchslim.distill import kl_divergence
from torchslim.errors import DistillError, TaskError, TrainError
from torchslim.isolation import preserved_globals
from torchslim.optimizer import OptimizerSettings
from torchslim.steps import fingerprint
from torchslim.task import predictor
from torchslim.training import Hook, LabelLoss, Loop


def train(model: nn.Module, task: ts.Task, **options: Any) -> Any:
    settings = OptimizerSettings(optimizer="sgd", lr=0.05)
    return ts.fit(
        model, LabelLoss(task), task.train, **{"epochs": 3, "settings": settings, "evaluate": task} | options
    )


def own_generator() -> ts.Task:
    data = TensorDataset(*toy.images(96, 1))
    loader = DataLoader(data, batch_size=16, shuffle=True, generator=torch.Generator().manual_seed(5))
    return replace(toy.task(), train=loader)


class Unsized:
    """A loader that does not know its length."""

    def __iter__(self) -> Any:
        return iter([toy.images(16, seed) for seed in range(4)])


@pytest.mark.parametrize("make", [toy.task, own_generator, lambda: replace(toy.task(), train=Unsized())])
@pytest.mark.parametrize("stop", [1, 2])
def test_a_resumed_training_ends_with_the_same_weights(make: Any, stop: int, tmp_path: Path) -> None:
    class Stop(Hook):
        def on_step(self, loop: Loop) -> None:
            if loop.epoch == stop and loop.step_in_epoch == 2:
                raise KeyboardInterrupt

    whole, broken, task = toy.model(), toy.model(), make()
    report = train(whole, task)
    with pytest.raises(KeyboardInterrupt):
        train(broken, task, hooks=[Stop()], state=tmp_path / "c.ckpt")
    resumed = toy.model()
    again = train(resumed, make(), state=tmp_path / "c.ckpt")
    assert fingerprint(resumed.state_dict()) == fingerprint(whole.state_dict())
    assert again.history == report.history
    assert again.best_epoch == report.best_epoch


def test_training_leaves_the_process_and_the_loader_as_they_were() -> None:
    task, model = own_generator(), toy.model()
    model.bn1.eval()
    before = (
        torch.get_rng_state().tolist(),
        task.train.generator.get_state().tolist(),
        np.random.get_state()[1].tolist(),
    )
    train(model, task)
    after = (
        torch.get_rng_state().tolist(),
        task.train.generator.get_state().tolist(),
        np.random.get_state()[1].tolist(),
    )
    assert before == after
    assert not model.bn1.training
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_best_epoch_is_kept_or_the_last() -> None:
    values = iter([0.2, 0.9, 0.5])
    seen: list[Tensor] = []

    def metric(predict: Any, batches: Any) -> float:
        seen.append(model.head.weight.detach().clone())
        return next(values)

    task, model = replace(toy.task(), metric=metric), toy.model()
    report = train(model, task)
    assert (report.best_epoch, report.best_value) == (2, 0.9)
    assert torch.equal(model.head.weight, seen[1])
    other = toy.model()
    train(other, toy.task(), evaluate=None)
    assert not torch.equal(other.head.weight, model.head.weight)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_masked_weights_and_what_the_optimizer_knows_of_them_stay_zero(optimizer: str) -> None:
    model, mask = toy.model(), torch.rand(8, 8, 3, 3) < 0.5
    kept: dict[str, Any] = {}

    class Look(Hook):
        def on_epoch(self, loop: Loop) -> None:
            kept["state"] = loop.optimizer.state[loop.model.conv2.weight]

    settings = OptimizerSettings(optimizer=optimizer, lr=0.01, weight_decay=0.1, clip_norm=1.0)
    train(model, toy.task(), masks={"conv2.weight": mask}, hooks=[Look()], settings=settings)
    assert bool((model.conv2.weight[~mask] == 0).all())
    assert not bool((model.conv2.weight[mask] == 0).any())
    for value in kept["state"].values():
        if value.shape == mask.shape:
            assert bool((value[~mask] == 0).all())


def test_masks_that_fit_no_parameter_are_refused() -> None:
    with pytest.raises(TrainError, match="masks name parameters that the model does not have: nothing"):
        train(toy.model(), toy.task(), masks={"nothing": torch.ones(1, dtype=torch.bool)})
    with pytest.raises(TrainError, match="the mask of 'head.weight' must be boolean"):
        train(toy.model(), toy.task(), masks={"head.weight": torch.ones(1)})


def test_a_loss_that_is_not_finite_names_its_place_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    state, model = tmp_path / "c.ckpt", toy.model()

    class Poison(Hook):
        def penalty(self, loop: Loop) -> Tensor | None:
            late = loop.epoch == 1 and loop.step_in_epoch == 1
            return torch.tensor(float("nan")) if late else torch.tensor(0.5)

    with pytest.raises(
        TrainError, match=r"the loss became nan in 'fit', epoch 2, batch 2; the last finite loss was \d"
    ):
        train(model, toy.task(), hooks=[Poison()], state=state)
    saved = torch.load(state, weights_only=True)
    assert saved["epoch"] == 1
    assert saved["history"][0]["loss_penalty"] == pytest.approx(0.5)


def test_a_damaged_checkpoint_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "c.ckpt").write_bytes(b"junk")
    with pytest.raises(TrainError, match="cannot be resumed from.*delete it to start over"):
        train(toy.model(), toy.task(), state=tmp_path / "c.ckpt")


def momentum_free(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01)


@pytest.mark.parametrize("optimizer", [momentum_free, "tests.test_training:momentum_free"])
def test_an_optimizer_of_the_users_own(optimizer: Any) -> None:
    model, before = toy.model(), toy.model()
    train(model, toy.task(), settings=OptimizerSettings(optimizer=optimizer), epochs=1)
    assert not torch.equal(model.head.weight, before.head.weight)


@given(st.floats(0, 1), st.floats(0, 0.9), st.sampled_from(["cosine", "constant"]))
def test_the_learning_rate_stays_between_zero_and_its_top(
    progress: float, warmup: float, schedule: Any
) -> None:
    settings = OptimizerSettings(schedule=schedule, warmup=warmup)
    assert 0 <= settings.factor(progress) <= 1
    assert settings.factor(warmup) == pytest.approx(1)


@pytest.mark.parametrize(
    ("field", "value"),
    [("epochs", 0), ("lr", 0.0), ("lr", float("nan")), ("momentum", 1.0), ("weight_decay", -1.0), ("warmup", 1.0),
     ("clip_norm", 0.0), ("optimizer", "lion"), ("schedule", "step"), ("keep", "first")],
)  # fmt: skip
def test_training_fields_are_checked(field: str, value: Any) -> None:
    with pytest.raises(TrainError, match=f"{field} must be"):
        ts.Finetune(**{field: value})


def test_nothing_trainable_is_an_error() -> None:
    model = toy.model().requires_grad_(False)
    with pytest.raises(TrainError, match="no trainable parameter"):
        train(model, toy.task())
