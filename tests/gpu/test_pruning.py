"""Pruning on the device removes what pruning on the CPU removes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import torchslim as ts
from tests.support import toy
from tests.support.gpu import CPU, assert_near, context, engine_of, on_cpu, taken, task_on
from torchslim.core.trees import device_of, to_device

TRAIN = ts.Finetune(epochs=2, optimizer="sgd", lr=0.02)
WEIGHTS: dict[str, dict[str, Any]] = {
    "l1": {"criterion": "l1"},
    "random": {"criterion": "random"},
    "2:4": {"criterion": "l1", "pattern": "2:4", "sparsity": None, "exclude": "conv1"},
    "slices": {"criterion": "l1", "pattern": "slice", "scope": "layer"},
    "wanda": {"criterion": "wanda"},
    "taylor": {"criterion": "taylor"},
}


def agreement(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Fraction of the mask's entries that are the same."""
    assert one.keys() == other.keys()
    equal = sum(int((mask == other[name]).sum()) for name, mask in one.items())
    return equal / sum(mask.numel() for mask in one.values())


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("there", [False, True], ids=["batches on CPU", "batches on device"])
def test_weights_are_pruned_as_on_the_cpu(name: str, there: bool, device: torch.device) -> None:
    options = {"sparsity": 0.5, **WEIGHTS[name]}
    batches = task_on(device if there else CPU).train
    pruned = ts.prune.weights(toy.model().to(device), batches=batches, **options)
    expected = ts.prune.weights(toy.model(), batches=task_on(CPU).train, **options)
    assert device_of(pruned).type == device.type
    zeros = [{path: weight.cpu() == 0 for path, weight in model.named_parameters()} for model in (pruned, expected)]
    assert sum(int(mask.sum()) for mask in zeros[0].values()) == sum(int(mask.sum()) for mask in zeros[1].values())
    # scores from data differ in the last bits, and may change places at the threshold
    assert agreement(*zeros) >= (1.0 if name in ("l1", "random", "2:4", "slices") else 0.99)


@pytest.mark.parametrize("criterion", ["lamp", "taylor", "wanda", "activation"])
def test_channels_are_removed_as_on_the_cpu(criterion: str, device: torch.device) -> None:
    if criterion not in ts.prune.CRITERIA:
        pytest.fail(f"{criterion!r} is not a criterion")
    options: dict[str, Any] = {"of": "channels", "round_to": 1, "min_channels": 1, "criterion": criterion}
    batches, example = task_on(CPU).train, toy.images(4, 2)[0]
    pruned = ts.prune.channels(toy.model().to(device), (example.to(device),), 0.5, batches=batches, **options)
    expected = ts.prune.channels(toy.model(), (example,), 0.5, batches=batches, **options)
    assert device_of(pruned).type == device.type
    record, other = ts.surgery(pruned), ts.surgery(expected)
    assert record is not None
    assert other is not None
    assert record["rounds"][0]["cuts"] == other["rounds"][0]["cuts"]
    assert expected.conv1.weight.shape[0] < toy.model().conv1.weight.shape[0]
    assert_near(pruned, expected, tolerance=1e-6)


@pytest.mark.parametrize("sparsify", ["group-lasso", "bn-l1"])
def test_channels_are_trained_towards_zero_as_on_the_cpu(sparsify: str, device: torch.device) -> None:
    step = ts.Prune(
        pattern="channel", of="channels", sparsity=0.5, round_to=1, min_channels=1, criterion="lamp",
        sparsify=sparsify, strength=1e-3, train=TRAIN,
    )  # fmt: skip
    outcomes = [taken(step, place) for place in (device, CPU)]
    shapes = [{name: value.shape for name, value in outcome.model.state_dict().items()} for outcome in outcomes]
    assert shapes[0] == shapes[1]
    assert shapes[0]["conv1.weight"][0] < 8
    assert_near(outcomes[0].model, outcomes[1].model)


@pytest.mark.parametrize("schedule", ["iterative", "gradual"])
@pytest.mark.parametrize("criterion", ["l1", "wanda"])
def test_schedules_end_at_the_sparsity_of_the_cpu(schedule: str, criterion: str, device: torch.device) -> None:
    step = ts.Prune(sparsity=0.75, criterion=criterion, schedule=schedule, train=TRAIN)
    here, there = (taken(step, place) for place in (device, CPU))
    for outcome in (here, there):
        masks = on_cpu(outcome.masks)
        dropped = sum(int((~mask).sum()) for mask in masks.values())
        assert dropped == round(0.75 * sum(mask.numel() for mask in masks.values()))
        for name, parameter in outcome.model.named_parameters():
            assert name not in masks or not parameter.detach().cpu()[~masks[name]].any()
    assert agreement(on_cpu(here.masks), on_cpu(there.masks)) >= 0.95  # masks follow weights, which training moves


def test_masks_of_the_cpu_are_continued_on_the_device(device: torch.device) -> None:
    """As in a run whose earlier step was taken on another machine."""
    first = taken(ts.Prune(sparsity=0.3), CPU)
    model = first.model.to(device)
    later = ts.Prune(sparsity=0.6, train=TRAIN)(
        model, context(device, model, masks=on_cpu(first.masks), engine=engine_of(device))
    )
    for name, mask in on_cpu(first.masks).items():
        assert not (on_cpu(later.masks)[name] & ~mask).any()


def test_zeros_are_held_in_a_loop_of_the_users_own(device: torch.device) -> None:
    model = ts.prune.weights(toy.model().to(device), sparsity=0.5)
    zeros = {name: weight == 0 for name, weight in model.named_parameters() if weight.dim() > 1}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with ts.prune.hold_zeros(model, optimizer):
        for images, labels in to_device(task_on(CPU).train, device)[:3]:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
    for name, zero in zeros.items():
        assert zero.any()
        assert not model.get_parameter(name)[zero].any()
