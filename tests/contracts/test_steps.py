"""What every step promises, run over every registered one: nothing of the caller's changes."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.utils import prune as torch_prune

import torchslim as ts
from tests.support import toy
from tests.support.states import global_state, model_state
from torchslim.core.fingerprint import fingerprint
from torchslim.core.step import check_order
from torchslim.pipeline.recipe import STEPS

INSTANCES: dict[str, Callable[[], Any]] = {
    "prune": lambda: ts.Prune(sparsity=0.5),
    "prune, random slices": lambda: ts.Prune(sparsity=0.25, criterion="random", pattern="slice"),
    "prune, slices by data": lambda: ts.Prune(sparsity=0.25, criterion="taylor_activation", pattern="slice"),
    "prune, iterative": lambda: ts.Prune(sparsity=0.5, schedule="iterative", rounds=2, train=ts.Finetune(epochs=1)),
    "prune, gradual": lambda: ts.Prune(sparsity=0.5, schedule="gradual", train=ts.Distill(epochs=2)),
    "prune, gradual by data": lambda: ts.Prune(
        sparsity=0.5, criterion="taylor", schedule="gradual", train=ts.Finetune(epochs=2)
    ),
    "prune, channels": lambda: ts.Prune(sparsity=0.5, pattern="channel", round_to=1, min_channels=1),
    "prune, channels in rounds by data": lambda: ts.Prune(
        sparsity=0.5,
        pattern="channel",
        round_to=1,
        min_channels=1,
        criterion="taylor",
        schedule="iterative",
        rounds=2,
        train=ts.Finetune(epochs=1),
    ),
    "prune, channels made sparse": lambda: ts.Prune(
        sparsity=0.5, pattern="channel", round_to=1, min_channels=1, sparsify="group-lasso", train=ts.Distill(epochs=1)
    ),
    "finetune": lambda: ts.Finetune(epochs=1, optimizer="sgd"),
    "finetune, with every option": lambda: ts.Finetune(
        epochs=3, accumulate=3, average=0.9, lr_scale={"conv2": 0, "head": 0.1}, clip_norm=1.0, patience=1
    ),
    "distill": lambda: ts.Distill(epochs=1),
    "quantize": lambda: ts.Quantize("int8"),
}


def test_every_registered_step_is_under_contract() -> None:
    tested = {type(make()) for make in INSTANCES.values()}
    assert set(STEPS.values()) <= tested


@pytest.mark.slow
@pytest.mark.parametrize("name", INSTANCES)
def test_a_run_leaves_the_model_and_the_process_as_they_were(name: str) -> None:
    model, task = toy.model(), toy.task()
    model.bn1.eval()  # a mix of modes must survive too
    model.conv1.weight.requires_grad_(False)
    random.seed(5)
    np.random.seed(6)
    torch.manual_seed(7)
    before, process = model_state(model), global_state()

    result = ts.compress(model, task, [INSTANCES[name]()], runtime="eager")

    assert model_state(model) == before
    assert global_state() == process
    assert next(row["name"] for row in result.run["rows"]) == "baseline"


@pytest.mark.parametrize("name", INSTANCES)
def test_a_step_is_a_step(name: str) -> None:
    step = INSTANCES[name]()
    assert isinstance(step, ts.Step)
    check_order([step])
    assert hash(step) == hash(INSTANCES[name]())
    assert step == INSTANCES[name]()


@pytest.mark.slow
@pytest.mark.parametrize("name", INSTANCES)
def test_equal_seeds_give_equal_models(name: str) -> None:
    results = [ts.compress(toy.model(), toy.task(), [INSTANCES[name]()], runtime="eager", seed=4) for _ in range(2)]
    states = [fingerprint(result.model.state_dict()) for result in results]
    assert states[0] == states[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", INSTANCES)
def test_masks_of_an_earlier_torch_pruning_hold_through_every_step(name: str) -> None:
    model = toy.model()
    torch_prune.l1_unstructured(model.conv2, "weight", amount=0.5)
    zero = model.conv2.weight == 0
    result = ts.compress(model, toy.task(), [INSTANCES[name]()], runtime="eager")
    assert torch_prune.is_pruned(model)
    kept = result.module.get_parameter("conv2.weight")
    for surgery in (ts.surgery(result.module) or {"rounds": []})["rounds"]:
        for cut in surgery["cuts"]:
            if cut["weight"] == "conv2.weight":
                zero = zero.index_select(cut["dim"], torch.tensor(cut["kept"]))
    assert bool((kept[zero] == 0).all())
    assert bool((result.masks["conv2.weight"][zero] == False).all())  # noqa: E712
