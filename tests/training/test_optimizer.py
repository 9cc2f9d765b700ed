"""The optimizer, its learning rate, and the masks that hold."""

from __future__ import annotations

import math
from dataclasses import replace
from fnmatch import fnmatch
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import torchslim as ts
from tests.support import toy
from torchslim.errors import SelectError, TrainError
from torchslim.training.loop import Hook, LabelLoss, Loop
from torchslim.training.optimizer import OptimizerSettings

WARMUPS = st.floats(0, 0.9)


def train(model: nn.Module, task: ts.Task, **options: Any) -> Any:
    settings = OptimizerSettings(optimizer="sgd", lr=0.05)
    return ts.fit(model, task.train, LabelLoss(task), **{"epochs": 3, "settings": settings, "evaluate": task} | options)


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
    with pytest.raises(TrainError, match="masks.*parameters.*nothing"):
        train(toy.model(), toy.task(), masks={"nothing": torch.ones(1, dtype=torch.bool)})
    with pytest.raises(TrainError, match="mask.*'head.weight'.*boolean"):
        train(toy.model(), toy.task(), masks={"head.weight": torch.ones(1)})


def momentum_free(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01)


@pytest.mark.parametrize("optimizer", [momentum_free, "tests.training.test_optimizer:momentum_free"])
def test_an_optimizer_of_the_users_own(optimizer: Any) -> None:
    model, before = toy.model(), toy.model()
    train(model, toy.task(), settings=OptimizerSettings(optimizer=optimizer), epochs=1)
    assert not torch.equal(model.head.weight, before.head.weight)


@given(st.floats(0, 1), st.floats(0.01, 0.9))
def test_warm_up_is_a_straight_line_and_cosine_is_the_papers_curve(progress: float, warmup: float) -> None:
    cosine = OptimizerSettings(warmup=warmup).factor(progress)
    constant = OptimizerSettings(warmup=warmup, schedule="constant").factor(progress)
    if progress < warmup:
        assert cosine == constant == pytest.approx(progress / warmup)
    else:  # Loshchilov & Hutter 2017, eq. 5, with eta_min = 0
        assert constant == 1
        rest = (progress - warmup) / (1 - warmup)
        assert cosine == pytest.approx(0.5 + 0.5 * math.cos(math.pi * rest))


@given(st.floats(0, 1), st.floats(0, 1), WARMUPS)
def test_the_learning_rate_only_rises_in_the_warm_up_and_only_falls_after_it(
    first: float, second: float, warmup: float
) -> None:
    low, high = sorted((first, second))
    factor = OptimizerSettings(warmup=warmup).factor
    if high <= warmup:
        assert factor(low) <= factor(high)
    elif low >= warmup:
        assert factor(low) >= factor(high)


@given(st.floats(0, 1), WARMUPS, st.sampled_from(["cosine", "constant"]))
def test_the_learning_rate_stays_between_zero_and_its_top(progress: float, warmup: float, schedule: Any) -> None:
    settings = OptimizerSettings(schedule=schedule, warmup=warmup)
    assert 0 <= settings.factor(progress) <= 1
    assert settings.factor(warmup) == pytest.approx(1)


@pytest.mark.parametrize(
    ("field", "value"),
    [("epochs", 0), ("lr", 0.0), ("lr", float("nan")), ("momentum", 1.0), ("weight_decay", -1.0), ("warmup", 1.0),
     ("clip_norm", 0.0), ("accumulate", 0), ("average", 1.0), ("patience", 0), ("optimizer", "lion"), ("schedule", "step"), ("keep", "first")],
)  # fmt: skip
def test_training_fields_are_checked(field: str, value: Any) -> None:
    with pytest.raises(TrainError, match=f"{field} must be"):
        ts.Finetune(**{field: value})


@pytest.mark.parametrize("epochs", [0, -1, 2.5, "3"])
def test_epochs_are_whole(epochs: Any) -> None:
    whole = "epochs.*whole number.*at least 1, got" if isinstance(epochs, int) else "epochs.*whole number, got"
    with pytest.raises(TrainError, match=whole):
        train(toy.model(), toy.task(), epochs=epochs)
    with pytest.raises(TrainError, match=whole):
        ts.Finetune(epochs=epochs)


def test_weight_decay_leaves_biases_and_norms_alone() -> None:
    groups = OptimizerSettings(weight_decay=0.3).build(toy.model()).param_groups
    decay = {parameter.dim() > 1: group["weight_decay"] for group in groups for parameter in group["params"]}
    assert decay == {True: 0.3, False: 0.0}


def test_frozen_weights_stay_bit_for_bit() -> None:
    model = toy.model()
    model.conv1.weight.requires_grad_(False)
    before = model.conv1.weight.clone()
    train(model, toy.task(), settings=OptimizerSettings(lr=0.1, weight_decay=0.5))
    assert torch.equal(model.conv1.weight, before)
    assert not model.conv1.weight.requires_grad


def test_a_factory_that_makes_no_optimizer_is_an_error() -> None:
    with pytest.raises(TrainError, match="Optimizer.*got list"):
        train(toy.model(), toy.task(), settings=OptimizerSettings(optimizer=list))
    with pytest.raises(TrainError, match="optimizer 'tests.support.toy:nothing'.*'tests.support.toy'.*'nothing'"):
        ts.Finetune(optimizer="tests.support.toy:nothing").check(
            ts.Context(task=toy.task(), teacher=toy.model(), example_inputs=())
        )


def test_nothing_trainable_is_an_error() -> None:
    model = toy.model().requires_grad_(False)
    with pytest.raises(TrainError, match="no trainable parameter"):
        train(model, toy.task())


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_mask_that_comes_later_clears_what_the_optimizer_remembers(optimizer: str) -> None:
    mask, states = torch.rand(8, 8, 3, 3) < 0.5, []

    class Later(Hook):
        def on_epoch(self, loop: Loop) -> None:
            if loop.epoch == 1:
                loop.masks["conv2.weight"] = mask

        def on_step(self, loop: Loop) -> None:
            state = loop.optimizer.state[loop.model.conv2.weight].values()
            states.append([value[~mask].clone() for value in state if value.shape == mask.shape])

    train(toy.model(), toy.task(), hooks=[Later()], settings=OptimizerSettings(optimizer=optimizer, lr=0.01))
    assert all(bool((value != 0).any()) for value in states[7])  # eight steps make an epoch
    assert states[8]
    assert not any(bool((value != 0).any()) for value in states[8])  # not even the first step remembers


def test_held_weights_do_not_count_when_gradients_are_clipped() -> None:
    batch, mask = toy.images(16, 0), torch.rand(8, 8, 3, 3) < 0.5
    settings = OptimizerSettings(optimizer="sgd", lr=0.1, momentum=0.0, weight_decay=0.0, clip_norm=0.01)
    expected, model = toy.model().train(), toy.model()
    with torch.no_grad():
        expected.conv2.weight.mul_(mask)
    nn.functional.cross_entropy(expected(batch[0]), batch[1]).backward()
    expected.conv2.weight.grad.mul_(mask)
    nn.utils.clip_grad_norm_(expected.parameters(), 0.01)
    rate = 0.1 * settings.factor(0.5)
    task = replace(toy.task(), train=[batch])
    train(model, task, epochs=1, evaluate=None, settings=settings, masks={"conv2.weight": mask})
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.allclose(ours, theirs - rate * theirs.grad, atol=1e-7)


# learning rates by pattern --------------------------------------------------------------------------------------------


def moved(lr_scale: dict[str, float], **settings: Any) -> dict[str, Any]:
    """How far a step of plain SGD moves the parameters of the toy model, and its masked weights."""
    plain = {"optimizer": "sgd", "lr": 0.1, "momentum": 0.0, "weight_decay": 0.0}
    options = OptimizerSettings(**plain | settings, lr_scale=lr_scale)
    model, task = toy.model().double(), toy.task()
    x, y = toy.images(16, 0)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    ts.fit(model, [(x.double(), y)], LabelLoss(task), epochs=1, settings=options)
    assert all(parameter.requires_grad for parameter in model.parameters())
    return {name: parameter.detach() - before[name] for name, parameter in model.named_parameters()}


@given(
    st.dictionaries(
        st.sampled_from(["*", "conv?", "conv2.bias", "type:BatchNorm2d", "type:Conv2d", "head", "*.weight"]),
        st.sampled_from([0.0, 0.25, 1.0, 3.0]),
    ).filter(lambda patterns: not patterns or any(factor > 0 for factor in patterns.values()))
)
def test_a_step_is_scaled_by_the_last_pattern_that_matches(lr_scale: dict[str, float]) -> None:
    layers = {"conv1": "Conv2d", "conv2": "Conv2d", "bn1": "BatchNorm2d", "head": "Linear"}

    def factor(name: str) -> float:
        layer = name.partition(".")[0]
        matching = [
            value
            for pattern, value in lr_scale.items()
            if fnmatch(name, pattern) or fnmatch(layer, pattern) or pattern == f"type:{layers[layer]}"
        ]
        return matching[-1] if matching else 1.0

    whole = moved({})
    if all(factor(name) == 0 for name in whole):
        with pytest.raises(TrainError, match="no trainable parameter.*lr_scale"):
            moved(lr_scale)
        return
    for name, change in moved(lr_scale).items():
        torch.testing.assert_close(change, factor(name) * whole[name], rtol=1e-9, atol=1e-12)


def test_scaled_rates_keep_weight_decay_and_the_logged_rate() -> None:
    settings = OptimizerSettings(weight_decay=0.3, lr=0.2, lr_scale={"conv2": 0.5, "head.bias": 0.1})
    model = toy.model()
    groups = settings.build(model).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(each)]: (group["lr"], group["weight_decay"]) for group in groups for each in group["params"]}
    assert found == {
        "conv1.weight": (0.2, 0.3), "bn1.weight": (0.2, 0.0), "bn1.bias": (0.2, 0.0), "conv2.weight": (0.1, 0.3),
        "conv2.bias": (0.1, 0.0), "head.weight": (0.2, 0.3), "head.bias": (pytest.approx(0.02), 0.0),
    }  # fmt: skip
    constant = {"optimizer": "sgd", "lr": 0.1, "schedule": "constant", "warmup": 0.0}
    rates = [
        train(toy.model(), toy.task(), epochs=1, settings=OptimizerSettings(**constant, lr_scale=scale)).history[0][
            "lr"
        ]
        for scale in ({}, {"*": 0.5})
    ]
    assert rates == [0.1, pytest.approx(0.1)]


@pytest.mark.parametrize("optimizer", [momentum_free, "sgd", "adamw"])
def test_layers_scaled_by_zero_are_frozen_with_any_optimizer(optimizer: Any) -> None:
    model, before = toy.model(), toy.model()
    model.bn1.bias.requires_grad_(False)
    settings = OptimizerSettings(optimizer=optimizer, lr=0.1, lr_scale={"conv?": 0, "bn1": 0.5}, clip_norm=1.0)
    train(model, toy.task(), settings=settings)
    for name, value in before.named_parameters():
        same = torch.equal(model.get_parameter(name), value)
        assert same == (name.startswith("conv") or name == "bn1.bias"), name
        assert model.get_parameter(name).requires_grad == (name != "bn1.bias")


def test_a_pattern_that_scales_nothing_is_an_error_before_any_work() -> None:
    ctx = ts.Context(task=toy.task(), teacher=toy.model(), example_inputs=())
    for step in (ts.Finetune(lr_scale={"hed.*": 0.1}), ts.Prune(sparsity=0.5, train=ts.Distill(lr_scale={"hed": 0.1}))):
        with pytest.raises(SelectError, match="'hed.*near names: head"):
            step.check(ctx)
    with pytest.raises(SelectError, match="'type:ReLU'.*without parameters"):
        model = nn.Sequential(toy.model(), nn.ReLU())
        ts.Finetune(lr_scale={"type:ReLU": 0.1}).check(replace(ctx, model=model))
    for wrong in (-1.0, float("inf"), "fast"):
        with pytest.raises(TrainError, match="lr_scale"):
            ts.Finetune(lr_scale={"head": wrong})


def test_rates_are_scaled_by_the_names_of_a_pruned_model() -> None:
    step = ts.Prune(
        sparsity=0.5, pattern="channel", round_to=1, min_channels=1, train=ts.Finetune(epochs=1, lr_scale={"*.bias": 0})
    )
    model = toy.model()
    task = toy.task()
    ctx = ts.Context(task=task, teacher=toy.model(), model=model, example_inputs=task.inputs(task.val[0]))
    untrained = replace(step, train=None)(toy.model(), ctx).model
    trained = step(model, ctx).model
    for name, value in untrained.named_parameters():
        assert torch.equal(trained.get_parameter(name), value) == name.endswith("bias"), name
