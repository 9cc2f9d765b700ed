"""What every distillation loss promises: it teaches any pair of networks, and leaves both as they are made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import torchslim as ts
from tests.support.distilled import Lstm, Transformer, conv_net
from tests.support.states import hooks
from torchslim.core.fingerprint import fingerprint
from torchslim.distill import LOSSES
from torchslim.distill.losses.registry import FEATURES, KINDS
from torchslim.errors import DistillError
from torchslim.pipeline.recipe import parse_recipe

PAIRS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv": (lambda: conv_net(4), lambda: conv_net(6, 4), (3, 32, 32)),
    "transformer": (lambda: Transformer(4, 2), lambda: Transformer(8, 5), (7, 6)),
    "lstm": (lambda: Lstm(3), lambda: Lstm(5, batch_first=False), (7, 6)),
}
ALONE = {("fsp", "lstm")}  # a flow goes from one layer to the next, and these networks have one


def kind_of(name: str) -> str:
    return next(kind for kind, known in KINDS.items() if name in known)


def context(pair: str, **fields: Any) -> tuple[nn.Module, ts.Context]:
    torch.manual_seed(0)
    student, teacher, shape = PAIRS[pair]
    x, y = torch.randn(24, *shape), torch.arange(24) % 5
    train = DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True)
    task = ts.Task(train=train, val=[(x, y)], metric="accuracy")
    model = student()
    return model, ts.Context(task=task, teacher=teacher(), model=model, example_inputs=(x[:2],), **fields)


def step_of(name: str, **fields: Any) -> ts.Distill:
    given: dict[str, Any] = {"response": None, kind_of(name): LOSSES[name]()}
    return ts.Distill(**{"epochs": 2, "lr": 0.01, **given, **fields})


def test_every_registered_loss_is_of_one_kind_and_in_recipes() -> None:
    assert sorted(LOSSES) == sorted(name for known in KINDS.values() for name in known)
    for name in LOSSES:
        recipe = f'model = "a:b"\ntask = "a:c"\n[[step]]\ndo = "distill"\n{kind_of(name)} = {{ do = "{name}" }}'
        (step,) = parse_recipe(recipe).steps
        found = getattr(step, kind_of(name))
        assert (found if kind_of(name) == "response" else found[0]) == LOSSES[name]()


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_teaches_any_pair(name: str, pair: str) -> None:
    model, ctx = context(pair)
    teacher = fingerprint(ctx.teacher.state_dict())
    step = step_of(name)
    if (name, pair) in ALONE:
        with pytest.raises(DistillError, match="two"):
            step.check(ctx)
        return
    step.check(ctx)
    names, before = list(model.state_dict()), fingerprint(model.state_dict())
    outcome = step(model, ctx)
    logged = "loss_response" if kind_of(name) == "response" else f"loss_{name}"
    assert all(torch.isfinite(torch.tensor(row[logged])) for row in outcome.history)
    assert list(model.state_dict()) == names  # projections are no part of it
    assert fingerprint(model.state_dict()) != before
    assert fingerprint(ctx.teacher.state_dict()) == teacher
    assert all(parameter.grad is None for parameter in ctx.teacher.parameters())
    assert hooks(model) == hooks(ctx.teacher) == 0
    if kind_of(name) != "response":
        assert [record.reason for record in outcome.layers if "taught by" in record.reason]


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_a_training_that_was_killed_goes_on_to_the_same_weights(name: str, tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def kill(event: ts.Event) -> None:
        if event.values["epoch"] == 2:
            raise Killed

    whole, ctx = context("conv")
    step_of(name)(whole, ctx)
    model, ctx = context("conv", state=tmp_path, progress=kill)
    with pytest.raises(Killed):
        step_of(name)(model, ctx)
    assert hooks(model) == 0
    again, ctx = context("conv", state=tmp_path)
    step_of(name)(again, ctx)
    assert fingerprint(again.state_dict()) == fingerprint(whole.state_dict())


@pytest.mark.parametrize("name", FEATURES)
def test_a_batch_of_one_works_or_is_refused_before_training(name: str) -> None:
    model, ctx = context("conv")
    x = torch.randn(1, 3, 32, 32)
    task = ts.Task(train=[(x, torch.tensor([1]))], val=[(x, torch.tensor([1]))], metric="accuracy")
    model = nn.Sequential(*(each for each in model))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    loss = step_of(name)
    with loss.lesson(model, ts.Context(task=task, teacher=ctx.teacher, example_inputs=(x,))) as lesson:
        parts = lesson.objective(model.eval(), (x, torch.tensor([1])))
        assert all(torch.isfinite(part) for part in parts.values())


@pytest.mark.parametrize("name", [name for name in LOSSES if kind_of(name) == "relation"])
def test_relations_learn_from_outputs_where_nothing_can_be_tapped(name: str) -> None:
    class Bare(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(width, 6))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.T

    x = torch.randn(8, 6)
    task = ts.Task(train=[(x,)], val=[(x,)], metric=lambda predict, batches: 0.0)
    ctx = ts.Context(task=task, teacher=Bare(4), model=Bare(4), example_inputs=(x,))
    step = step_of(name, label_weight=0.0)
    if name == "crd":
        with pytest.raises(DistillError, match="nothing can be tapped"):
            step.check(ctx)
        return
    step.check(ctx)
    outcome = step(Bare(4), ctx)
    assert f"loss_{name}" in outcome.history[0]
