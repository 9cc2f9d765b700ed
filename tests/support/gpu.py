"""What the tests of tests/gpu share: engines, tasks whose batches live on a device, and comparisons with the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import torchslim as ts
from tests.support import toy
from torchslim.core.trees import device_of, to_device

CPU = torch.device("cpu")
TOLERANCE = 2e-3  # of a weight after a short training in float32: sums are in another order, and training amplifies it


def engine_of(device: torch.device, precision: str = "32-true") -> ts.Engine:
    """An engine of one device."""
    return ts.Engine(accelerator=device.type, precision=precision)


def task_on(device: torch.device, **fields: Any) -> ts.Task:
    """The toy task with all batches on a device, in a fixed order."""
    images, labels = toy.images(128, 1)
    train = [*zip(images.split(16), labels.split(16), strict=True)]
    splits = {"train": train, "val": [toy.images(64, 2)], "test": [toy.images(64, 3)]}
    return ts.Task(**{name: to_device(split, device) for name, split in splits.items()}, metric="accuracy", **fields)


def other_model() -> nn.Module:
    """The toy model with other weights: a teacher from which the toy model has something to learn."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return toy.Net()


def context(device: torch.device, model: nn.Module, **fields: Any) -> ts.Context:
    """What a step gets on its own, with its training on the device and batches on the CPU."""
    task = fields.pop("task", None) or task_on(CPU)
    engine = fields.pop("engine", None) or engine_of(device)
    example = toy.images(4, 2)[0].to(device_of(model))
    return ts.Context(task=task, teacher=other_model(), example_inputs=(example,), engine=engine, **fields)


def taken(step: ts.Step, device: torch.device, **fields: Any) -> ts.Outcome:
    """The outcome of a step on the toy model, which lives on the device; its batches stay on the CPU."""
    model = toy.model().to(device)
    outcome = step(model, context(device, model, **fields))
    assert device_of(outcome.model).type in (device.type, "cpu")
    return outcome


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Floating-point state of a model, on the CPU and in float64."""
    return {
        name: value.detach().cpu().double() for name, value in model.state_dict().items() if value.is_floating_point()
    }


def assert_near(one: nn.Module, other: nn.Module, tolerance: float = TOLERANCE) -> None:
    """The weights of two models are the same up to a tolerance, and they are not merely untrained."""
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(
            value, second[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_moved(model: nn.Module, by: float = 5 * TOLERANCE) -> None:
    """A training changed the toy model by far more than the tolerance; otherwise a comparison shows nothing."""
    start = weights(toy.model())
    moved = [float((value - start[name]).abs().max()) for name, value in weights(model).items()]
    assert max(moved) > by


def on_cpu(masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Masks on the CPU."""
    return {name: mask.cpu() for name, mask in masks.items()}
