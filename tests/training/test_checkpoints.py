"""A killed training goes on from its last whole epoch and ends as if nothing had happened."""

from __future__ import annotations

import io
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, TensorDataset

import torchslim as ts
from tests.support import toy
from torchslim.core.fingerprint import fingerprint
from torchslim.core.seals import read_sealed
from torchslim.errors import TrainError
from torchslim.training.loop import Hook, LabelLoss, Loop
from torchslim.training.optimizer import OptimizerSettings


class Dropping(nn.Module):
    """Draws from the global random state in its forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.drop = toy.model(), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.drop(x))


class Unsized:
    """A loader that does not know its length."""

    def __iter__(self) -> Iterator[Any]:
        return iter([toy.images(16, seed) for seed in range(4)])


class Noisy(Dataset[Any]):
    """Augments with a generator of its own, and with numpy's and Python's global ones."""

    def __init__(self) -> None:
        self.images, self.labels = toy.images(64, 1)
        self.generator = torch.Generator().manual_seed(9)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        shift = random.random() + float(np.random.rand())
        noise = torch.randn(1, 8, 8, generator=self.generator)
        return self.images[index] + 0.1 * noise + shift, self.labels[index]


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def batch_sampler() -> DataLoader[Any]:
    data = TensorDataset(*toy.images(64, 1))
    return DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data, generator=generator()), 16, False))


LOADERS: dict[str, Callable[[], Any]] = {
    "global": lambda: toy.task().train,
    "own generator": lambda: DataLoader(
        TensorDataset(*toy.images(64, 1)), batch_size=16, shuffle=True, generator=generator()
    ),
    "batch sampler": batch_sampler,
    "own augmentation": lambda: DataLoader(Noisy(), batch_size=16, shuffle=True),
    "no length": Unsized,
}
SETTINGS = {
    "sgd": OptimizerSettings(optimizer="sgd", lr=0.05, clip_norm=1.0),
    "adamw": OptimizerSettings(optimizer="adamw", lr=0.01, schedule="constant"),
    "averaged groups": OptimizerSettings(
        lr=0.01, accumulate=2, average=0.99, lr_scale={"net.conv1": 0.0, "type:Linear": 0.3}, clip_norm=1.0
    ),
}


def train(model: nn.Module, task: ts.Task, **options: Any) -> Any:
    defaults = {"epochs": 3, "settings": SETTINGS["sgd"], "evaluate": task}
    return ts.fit(model, task.train, LabelLoss(task), **defaults | options)


def opened(state: Path) -> Any:
    return torch.load(io.BytesIO(read_sealed(state, "")), weights_only=True)


class Killed(Exception):
    """Stands for whatever ends a process."""


class StopAt(Hook):
    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_step(self, loop: Loop) -> None:
        if loop.epoch == self.epoch and loop.step_in_epoch == 2:
            raise Killed


def model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Dropping()


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", SETTINGS)
@pytest.mark.parametrize("loader", LOADERS)
def test_a_resumed_training_ends_with_the_same_weights(loader: str, optimizer: str, tmp_path: Path) -> None:
    stop = 2 if optimizer == "sgd" else 1
    masks = {"net.conv2.weight": torch.rand(8, 8, 3, 3) < 0.5}
    options = {"settings": SETTINGS[optimizer], "masks": masks}

    def task() -> ts.Task:
        return replace(toy.task(), train=LOADERS[loader]())

    whole, resumed, state = model(), model(), tmp_path / "c.ckpt"
    report = train(whole, task(), **options)
    with pytest.raises(Killed):
        train(model(), task(), hooks=[StopAt(stop)], state=state, **options)
    assert opened(state)["epoch"] == stop
    torch.manual_seed(1234)  # another process
    random.seed(99)
    np.random.seed(99)
    again = train(resumed, task(), state=state, **options)
    assert fingerprint(resumed.state_dict()) == fingerprint(whole.state_dict())
    assert again == replace(report, masks=again.masks)
    assert torch.equal(again.masks["net.conv2.weight"], masks["net.conv2.weight"])


@pytest.mark.parametrize("killed", [1, 2, 4])
def test_early_stopping_counts_on_after_an_interruption(killed: int, tmp_path: Path) -> None:
    """Epochs 2, 3 and 4 are no better than epoch 1, whichever run measures them."""

    def task() -> ts.Task:
        def metric(predict: Any, batches: Any) -> float:
            return float(-len(calls))

        return replace(toy.task(), metric=metric)

    class Count(Hook):
        def on_epoch(self, loop: Loop) -> None:
            calls[:] = [0] * loop.epoch

    calls: list[int] = []
    whole, resumed, state = model(), model(), tmp_path / "c.ckpt"
    report = train(whole, task(), epochs=9, patience=3, hooks=[Count()])
    assert [row["since_best"] for row in report.history] == [0, 1, 2, 3]
    if killed < 4:
        with pytest.raises(Killed):
            train(model(), task(), epochs=9, patience=3, hooks=[Count(), StopAt(killed)], state=state)
    else:
        train(model(), task(), epochs=9, patience=3, hooks=[Count()], state=state)
    events: list[ts.Event] = []
    again = train(resumed, task(), epochs=9, patience=3, hooks=[Count()], state=state, progress=events.append)
    assert again == report
    assert bool(events) == (killed < 4), "a run that has stopped is finished"
    assert fingerprint(resumed.state_dict()) == fingerprint(whole.state_dict())


def test_a_checkpoint_without_an_average_cannot_be_averaged_on(tmp_path: Path) -> None:
    train(toy.model(), toy.task(), epochs=1, state=tmp_path / "c.ckpt")
    with pytest.raises(TrainError, match="cannot be resumed from.*average"):
        settings = replace(SETTINGS["sgd"], average=0.9)
        train(toy.model(), toy.task(), epochs=2, settings=settings, state=tmp_path / "c.ckpt")


def test_a_loader_killed_and_resumed_in_the_same_process_is_left_as_it_was(tmp_path: Path) -> None:
    loader = LOADERS["own generator"]()
    task, before = replace(toy.task(), train=loader), loader.generator.get_state()
    with pytest.raises(Killed):
        train(model(), task, hooks=[StopAt(1)], state=tmp_path / "c.ckpt")
    assert torch.equal(loader.generator.get_state(), before)
    resumed, whole = model(), model()
    train(resumed, task, state=tmp_path / "c.ckpt")
    train(whole, task)
    assert fingerprint(resumed.state_dict()) == fingerprint(whole.state_dict())


def test_a_finished_training_is_not_done_again(tmp_path: Path) -> None:
    first, second, calls = model(), model(), []
    report = train(first, toy.task(), state=tmp_path / "c.ckpt")
    again = train(second, toy.task(), state=tmp_path / "c.ckpt", progress=calls.append)
    assert not calls
    assert again.history == report.history
    assert fingerprint(second.state_dict()) == fingerprint(first.state_dict())


@pytest.mark.parametrize("options", [{}, {"average": 0.9, "patience": 1, "lr_scale": {"conv1": 0.1}}])
@pytest.mark.parametrize("schedule", ["gradual", "iterative"])
@pytest.mark.parametrize("calls", [5, 12, 20])
def test_pruning_that_trains_resumes_wherever_it_was_killed(
    options: dict[str, Any], schedule: str, calls: int, tmp_path: Path
) -> None:
    train_step = ts.Finetune(epochs=3 if schedule == "gradual" else 2, optimizer="sgd", lr=0.05, **options)
    step = ts.Prune(sparsity=0.6, schedule=schedule, rounds=2, until=0.6, train=train_step)
    task = replace(toy.task(), train=LOADERS["own generator"]())
    ctx = ts.Context(task=task, teacher=toy.model(), example_inputs=(), seed=3)
    whole = step(toy.model(), ctx)
    seen: list[ts.Event] = []

    def kill(event: ts.Event) -> None:
        seen.append(event)
        if len(seen) == calls:
            raise Killed

    # three epochs of four batches, or two rounds of two
    resumable = replace(ctx, state=tmp_path)
    if calls <= 12:
        with pytest.raises(Killed):
            step(toy.model(), replace(resumable, progress=kill))
    else:
        step(toy.model(), resumable)
    resumed = step(toy.model(), resumable)
    assert fingerprint(resumed.model.state_dict()) == fingerprint(whole.model.state_dict())
    assert fingerprint(dict(resumed.masks)) == fingerprint(dict(whole.masks))
    assert (resumed.history, resumed.layers, resumed.warnings) == (
        whole.history,
        whole.layers,
        whole.warnings,
    )


def test_a_loss_that_is_not_finite_names_its_place_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    state, net = tmp_path / "c.ckpt", toy.model()

    class Poison(Hook):
        def penalty(self, loop: Loop) -> Tensor | None:
            late = loop.epoch == 1 and loop.step_in_epoch == 1
            return torch.tensor(float("nan")) if late else torch.tensor(0.5)

    with pytest.raises(TrainError, match=r"loss.*nan.*'fit', epoch 2, batch 2.*last finite loss.* \d"):
        train(net, toy.task(), hooks=[Poison()], state=state)
    saved = opened(state)
    assert saved["epoch"] == 1
    assert saved["history"][0]["loss_penalty"] == pytest.approx(0.5)


def test_weights_that_are_lost_in_an_epochs_last_step_are_neither_saved_nor_evaluated(tmp_path: Path) -> None:
    state, net, evaluated = tmp_path / "c.ckpt", toy.model(), []

    class Lose(Hook):
        def on_step(self, loop: Loop) -> None:
            if loop.epoch == 1 and loop.step_in_epoch == loop.steps_per_epoch:
                with torch.no_grad():
                    loop.model.head.bias[0] = float("inf")

    task = replace(toy.task(), metric=lambda predict, batches: float(len(evaluated) or evaluated.append(1) or 0))
    with pytest.raises(TrainError, match=r"head.bias.*nan or infinite.*'fit', end of epoch 2"):
        train(net, task, hooks=[Lose()], state=state)
    assert len(evaluated) == 1
    assert opened(state)["epoch"] == 1


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :]


def truncated(data: bytes) -> bytes:
    return data[: len(data) // 2]


@pytest.mark.parametrize("damage", [lambda data: b"junk", lambda data: b"", truncated, flipped])
def test_a_damaged_checkpoint_is_warned_of_and_not_taken(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    state, whole, net = tmp_path / "c.ckpt", toy.model(), toy.model()
    train(whole, toy.task(), epochs=2)
    train(toy.model(), toy.task(), epochs=1, state=state)
    state.write_bytes(damage(state.read_bytes()))
    with pytest.warns(UserWarning, match=r"c\.ckpt.*truncated or changed.*starts over"):
        train(net, toy.task(), epochs=2, state=state)
    assert fingerprint(net.state_dict()) == fingerprint(whole.state_dict())
    train(toy.model(), toy.task(), epochs=2, state=state)  # whole again


def test_a_checkpoint_under_another_key_is_not_taken(tmp_path: Path) -> None:
    train(toy.model(), toy.task(), epochs=1, state=tmp_path / "c.ckpt", key="one")
    with pytest.warns(UserWarning, match="another run.*starts over"):
        train(toy.model(), toy.task(), epochs=1, state=tmp_path / "c.ckpt", key="two")


def test_a_checkpoint_of_another_model_is_an_error(tmp_path: Path) -> None:
    train(toy.model(), toy.task(), epochs=1, state=tmp_path / "c.ckpt")
    with pytest.raises(TrainError, match="cannot be resumed from"):
        train(model(), toy.task(), state=tmp_path / "c.ckpt")


FULL_DISK = """
import resource, sys
from pathlib import Path
from tests.support import toy
import torchslim as ts
from torchslim.training.loop import Hook, LabelLoss

class Fill(Hook):
    def on_epoch(self, loop):
        if loop.epoch == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

task = toy.task()
try:
    ts.fit(toy.model(), task.train, LabelLoss(task), epochs=3, hooks=[Fill()], state=Path(sys.argv[1]))
except ts.TorchslimError as error:
    print(type(error).__name__, error)
"""


@pytest.mark.slow
def test_a_disk_that_fills_up_keeps_the_checkpoint_of_the_epoch_before(tmp_path: Path) -> None:
    state = tmp_path / "c.ckpt"
    done = subprocess.run([sys.executable, "-c", FULL_DISK, state], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"StorageError cannot write {state}: File too large")
    assert [each.name for each in tmp_path.iterdir()] == ["c.ckpt"]
    assert opened(state)["epoch"] == 1
    report = train(toy.model(), toy.task(), settings=None, evaluate=None, state=state)
    assert [row["epoch"] for row in report.history] == [1.0, 2.0, 3.0]
