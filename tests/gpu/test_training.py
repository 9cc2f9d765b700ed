"""A training on the device gives what the same training on the CPU gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torchslim as ts
from tests.support import toy
from tests.support.gpu import CPU, assert_moved, assert_near, context, engine_of, task_on
from torchslim.core.trees import device_of
from torchslim.training.loop import Hook, LabelLoss, Loop
from torchslim.training.optimizer import OptimizerSettings

SGD: dict[str, Any] = {"optimizer": "sgd", "lr": 0.05}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulate": {"accumulate": 3},
    "average": {"average": 0.9},
    "lr_scale": {"lr_scale": {"conv1": 0.0, "type:Linear": 0.3}},
    "clip_norm": {"clip_norm": 0.5},
    "all": {"accumulate": 2, "average": 0.99, "lr_scale": {"conv2": 0.5}, "clip_norm": 1.0},
}


def half_masks(model: nn.Module, device: torch.device) -> dict[str, torch.Tensor]:
    """Every second weight of a convolution."""
    mask = torch.arange(model.conv2.weight.numel()).reshape(model.conv2.weight.shape) % 2 == 0
    return {"conv2.weight": mask.to(device)}


def train(engine: ts.Engine, *, model: nn.Module | None = None, task: ts.Task | None = None, **options: Any) -> Any:
    """A model after a training of two epochs, and the report."""
    model, task = model or toy.model(), task or task_on(CPU)
    settings = OptimizerSettings(**SGD | options.pop("settings", {}))
    defaults = {"epochs": 2, "evaluate": task, "engine": engine, "settings": settings}
    return model, ts.fit(model, task.train, LabelLoss(task), **defaults | options)


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_a_training_give_the_weights_of_the_cpu(name: str, engine: ts.Engine) -> None:
    here, report = train(engine, settings=OPTIONS[name])
    there, expected = train(engine_of(CPU), settings=OPTIONS[name])
    assert_moved(there)
    assert_near(here, there)
    assert report.best_epoch == expected.best_epoch
    assert [row["loss_label"] for row in report.history] == pytest.approx(
        [row["loss_label"] for row in expected.history], rel=1e-3
    )


@pytest.mark.parametrize("model_there", [False, True], ids=["model on CPU", "model on device"])
@pytest.mark.parametrize("batches_there", [False, True], ids=["batches on CPU", "batches on device"])
def test_models_and_batches_may_be_on_either_device(
    model_there: bool, batches_there: bool, device: torch.device, engine: ts.Engine
) -> None:
    home = device if model_there else CPU
    model, report = train(engine, model=toy.model().to(home), task=task_on(device if batches_there else CPU))
    assert device_of(model).type == home.type
    assert_near(model, train(engine_of(CPU))[0])
    assert report.best_value is not None


@pytest.mark.parametrize("masks_there", [False, True], ids=["masks on CPU", "masks on device"])
def test_masks_on_either_device_keep_their_weights_at_zero(
    masks_there: bool, device: torch.device, engine: ts.Engine
) -> None:
    model = toy.model()
    masks = half_masks(model, device if masks_there else CPU)
    model, report = train(engine, model=model, masks=masks, settings={"momentum": 0.9, "weight_decay": 0.1})
    kept = masks["conv2.weight"].cpu()
    assert not model.conv2.weight[~kept].any()
    assert model.conv2.weight[kept].all()
    assert report.masks["conv2.weight"].device.type == "cpu"  # where the model was


def test_finetune_returns_the_model_on_its_own_device(device: torch.device) -> None:
    step = ts.Finetune(epochs=2, **SGD)
    model = toy.model()
    outcome = step(model, context(device, model))
    assert device_of(outcome.model) == CPU
    other = toy.model()
    assert_near(outcome.model, step(other, context(CPU, other)).model)


class Killed(Exception):
    """Stands for the end of a process."""


class StopIn(Hook):
    """Ends a training in the middle of an epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_step(self, loop: Loop) -> None:
        if loop.epoch == self.epoch and loop.step_in_epoch == 2:
            raise Killed


@pytest.mark.parametrize("first_there", [False, True], ids=["CPU then device", "device then CPU"])
@pytest.mark.parametrize("options", ["plain", "all"])
def test_a_killed_training_resumes_on_another_device(
    options: str, first_there: bool, device: torch.device, tmp_path: Path
) -> None:
    begun, resumed = (device, CPU) if first_there else (CPU, device)
    shared: dict[str, Any] = {"epochs": 4, "state": tmp_path / "fit.ckpt", "settings": OPTIONS[options]}
    with pytest.raises(Killed):
        train(engine_of(begun), masks=half_masks(toy.model(), begun), hooks=[StopIn(2)], **shared)
    assert (tmp_path / "fit.ckpt").exists()
    model, report = train(engine_of(resumed), masks=half_masks(toy.model(), resumed), **shared)
    undisturbed, expected = train(
        engine_of(CPU), masks=half_masks(toy.model(), CPU), epochs=4, settings=OPTIONS[options]
    )
    assert [row["epoch"] for row in report.history] == [1, 2, 3, 4]
    assert_moved(undisturbed)
    assert_near(model, undisturbed)
    assert (model.conv2.weight == 0).sum() == (undisturbed.conv2.weight == 0).sum()
    assert report.best_epoch == expected.best_epoch


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("options", ["plain", "all"])
def test_mixed_precision_learns_what_float32_learns(precision: str, options: str, device: torch.device) -> None:
    if precision == "bf16-mixed" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        pytest.skip("this GPU has no bfloat16")
    model, report = train(engine_of(device, precision), settings=OPTIONS[options], epochs=4)
    there, expected = train(engine_of(CPU), settings=OPTIONS[options], epochs=4)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert_moved(model)
    assert_near(model, there, tolerance=0.1)  # products have 8 bits of bfloat16, or 11 of float16
    losses, others = ([row["loss_label"] for row in one.history] for one in (report, expected))
    assert losses == pytest.approx(others, rel=0.1)
    assert losses[-1] < losses[0]


def test_the_scale_of_losses_in_float16_may_overflow_at_first(cuda: torch.device) -> None:
    """The first scale is 65536, which large gradients overflow; the scaler then skips the step and halves the scale."""
    task = task_on(CPU, loss=lambda outputs, batch: 300 * nn.functional.cross_entropy(outputs, batch[1]))
    model, report = train(engine_of(cuda, "16-mixed"), task=task, settings={"lr": 1e-4, "clip_norm": 1.0}, epochs=3)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert report.history[-1]["loss_label"] <= report.history[0]["loss_label"]


def test_a_training_leaves_nothing_in_the_memory_of_the_device(cuda: torch.device) -> None:
    train(engine_of(cuda))  # libraries keep workspaces
    before = torch.cuda.memory_allocated()
    _, report = train(engine_of(cuda), settings=OPTIONS["all"])
    assert torch.cuda.memory_allocated() - before <= 2**20
    assert report.history


def test_accumulation_needs_less_memory_than_one_large_batch(cuda: torch.device) -> None:
    """The same step from eight small batches: activations of one are in memory at a time."""
    images, labels = toy.images(512, 1)

    def peak(batches: int, **settings: Any) -> tuple[nn.Module, int]:
        parts = [*zip(images.chunk(batches), labels.chunk(batches), strict=True)]
        task = ts.Task(train=parts, val=[toy.images(64, 2)], metric="accuracy")
        model = toy.model().eval()
        model.bn1 = nn.Identity()  # statistics of a batch depend on its size
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        train(engine_of(cuda), model=model, task=task, settings={"schedule": "constant", **settings})
        return model, torch.cuda.max_memory_allocated() - before

    whole, most = peak(1)
    accumulated, less = peak(8, accumulate=8)
    assert_near(accumulated, whole)
    assert less < most / 2
