"""Positional arguments in another order: an error shows the right one; an order that was right before still works."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn

import torchslim as ts
from tests.support import toy
from torchslim.core.arguments import checks_arguments
from torchslim.errors import PruneError, QuantizeError, RecipeError, TorchslimError, TrainError

MODEL, TASK = toy.model(), toy.task()
INPUTS = (torch.zeros(2, 1, 8, 8),)


def loss(model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
    return {"loss": model(batch[0]).square().mean()}


@pytest.mark.parametrize(
    ("call", "error", "shown"),
    [
        (lambda: ts.fit(MODEL, loss, list(TASK.train or ()), epochs=1), TrainError, "fit(model, batches, objective, "),
        (lambda: ts.compress(TASK, MODEL, [ts.Prune(sparsity=0.5)]), RecipeError, "compress(model, task, steps)"),
        (lambda: ts.deploy(INPUTS, MODEL), TorchslimError, "deploy(model, example_inputs)"),
        (lambda: ts.prune.channels(MODEL, 0.5, INPUTS), PruneError, "channels(model, example_inputs, sparsity)"),
        (lambda: ts.prune.weights(0.5, MODEL), PruneError, "weights(model, sparsity)"),
        (lambda: ts.quantize.static([INPUTS], MODEL), QuantizeError, "static(model, batches)"),
        (lambda: ts.save("folder", MODEL), TorchslimError, "save(model, folder)"),
    ],
)
def test_arguments_in_another_order_are_refused_with_the_right_call(
    call: Callable[[], Any], error: type[TorchslimError], shown: str
) -> None:
    with pytest.raises(error) as refused:
        call()
    assert f"call {shown}" in str(refused.value)


@checks_arguments(RecipeError, earlier=("recipe", "model", "task"))
def look(model: nn.Module, task: ts.Task, recipe: Mapping[str, Any], *, seed: int = 0) -> tuple[Any, ...]:
    return model, task, recipe, seed


def test_an_earlier_order_works_with_a_warning_that_shows_the_new_call() -> None:
    recipe = {"steps": []}
    assert look(MODEL, TASK, recipe, seed=3) == (MODEL, TASK, recipe, 3)
    with pytest.warns(DeprecationWarning, match=r"call look\(model, task, recipe, \.\.\.\)"):
        assert look(recipe, MODEL, TASK, seed=3) == (MODEL, TASK, recipe, 3)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match=r"another order: call look\(model, task, recipe\)"):
        look(TASK, MODEL, recipe)  # type: ignore[arg-type]


def test_the_search_takes_the_earlier_order() -> None:
    with pytest.warns(DeprecationWarning, match="earlier order"), pytest.raises(RecipeError, match="step"):
        ts.search({}, MODEL, TASK, workdir="nowhere")  # type: ignore[arg-type]


def test_wrong_arguments_that_fit_in_no_order_or_several_name_no_call() -> None:
    for arguments in [(MODEL, MODEL, {}), (TASK, TASK, {}), (1, 2, 3)]:
        with pytest.raises(RecipeError) as refused:
            look(*arguments)
        assert "another order" not in str(refused.value)


@checks_arguments(RecipeError)
def pair(student: nn.Module, teacher: nn.Module) -> None:
    """Takes two of a kind."""


def test_an_argument_of_the_right_kind_that_is_wrong_otherwise_names_no_other_order() -> None:
    broken = nn.Linear(2, 2)
    nn.init.constant_(broken.weight, float("nan"))
    with pytest.raises(RecipeError, match="holds NaN") as refused:
        pair(broken, MODEL)
    assert "another order" not in str(refused.value)
