"""What the distillation benchmark trains: two pairs of a teacher and a student, with their data and ways."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

import torchslim as ts
from benchmarks.accuracy_data import CHANNELS, vowels
from benchmarks.accuracy_models import Rows
from examples.fashion_mnist import resnet, task
from examples.fashion_mnist.data import Batches, locate
from torchslim.distill import LOSSES
from torchslim.distill.losses.registry import FEATURES, RELATIONS

IMAGES, IMAGE_EPOCHS = 20_000, 4  # of the training set, augmented as for the demo
TEACHER_EPOCHS, SERIES_EPOCHS = 60, 200
LABELS = "labels alone"


class SmallNet(nn.Module):
    """Four convolutions: images (batch, 1, h, w) -> logits (batch, classes)."""

    def __init__(self, widths: tuple[int, ...] = (16, 32, 48, 64), classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for number, (before, after) in enumerate(zip((1, *widths), widths, strict=False)):
            stride = 1 if number == len(widths) - 1 else 2
            layers.append(
                nn.Sequential(
                    nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()
                )
            )  # fmt: skip
        self.stages = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        return self.head(self.stages(x).mean((2, 3)))  # type: ignore[no-any-return]


class Speakers(nn.Module):
    """Series (batch, steps, channels) and mask (batch, steps) -> logits of nine speakers."""

    def __init__(self, recurrent: nn.Module, width: int) -> None:
        super().__init__()
        self.recurrent, self.head = recurrent, nn.Linear(width, 9)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.recurrent(x)[0] * mask.unsqueeze(-1)
        return self.head(y.sum(1) / mask.sum(1, keepdim=True))  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True, kw_only=True)
class Couple:
    """A teacher and a student.

    Args:
        about: what they are, for the page.
        teacher: trained; the same for every seed.
        student: with new weights.
        task: data and metric.
        training: epochs and optimizer, the same for every way.
        taps: where features are compared.
    """

    about: str
    teacher: Callable[[], nn.Module]
    student: Callable[[], nn.Module]
    task: Callable[[], ts.Task]
    training: Mapping[str, Any]
    taps: Mapping[str, str] | None = None


@lru_cache
def _images() -> ts.Task:
    if locate() is None:
        raise RuntimeError("Fashion-MNIST is missing; get it with: apt-get install dataset-fashion-mnist")
    data = task()
    assert isinstance(data.train, Batches)
    return replace(data, train=Batches((data.train.images[:IMAGES], data.train.labels[:IMAGES]), 128, augment=True))


@lru_cache
def _series() -> ts.Task:
    train, test = vowels("TRAIN"), vowels("TEST")
    held = torch.arange(len(train[2])) % 5 == 4
    return ts.Task(
        train=Rows(*(part[~held] for part in train), size=32, shuffle=True),
        val=Rows(*(part[held] for part in train)), test=Rows(*test),
        inputs=lambda batch: batch[:2], target=lambda batch: batch[2], mask=lambda batch: batch[1],
        metric="accuracy",
    )  # fmt: skip


@lru_cache
def _listener() -> nn.Module:
    """A teacher of two bidirectional LSTM layers of 64, trained here."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Speakers(nn.LSTM(CHANNELS, 64, num_layers=2, bidirectional=True, batch_first=True), 128)
    data = _series()
    ctx = ts.Context(task=data, teacher=model, example_inputs=data.inputs(next(iter(data.val))))
    ts.Finetune(epochs=TEACHER_EPOCHS, lr=3e-3, keep="last").fit(model, ctx)
    return model.eval()


COUPLES: Mapping[str, Couple] = {
    "images": Couple(
        about=f"the demo's residual network teaches four convolutions on the first {IMAGES:,} images of Fashion-MNIST, "
        f"augmented, {IMAGE_EPOCHS} epochs",
        teacher=resnet,
        student=SmallNet,
        task=_images,
        training={"epochs": IMAGE_EPOCHS, "optimizer": "sgd", "lr": 0.1, "weight_decay": 5e-4, "keep": "last"},
    ),
    "series": Couple(
        about="two bidirectional LSTM layers of 64 teach one GRU layer of 12 the speakers of JapaneseVowels, "
        f"{SERIES_EPOCHS} epochs",
        teacher=_listener,
        student=lambda: Speakers(nn.GRU(CHANNELS, 12, batch_first=True), 12),
        task=_series,
        training={"epochs": SERIES_EPOCHS, "lr": 3e-3, "keep": "last"},
        taps={"recurrent": "recurrent"},
    ),
}


def ways(couple: str, kd: ts.KD) -> dict[str, ts.Finetune | ts.Distill]:
    """How the student is trained, by name: a response in KD's place, or a feature or relation loss beside it."""
    found = COUPLES[couple]
    made: dict[str, ts.Finetune | ts.Distill] = {LABELS: ts.Finetune(**found.training)}
    for name, kind in LOSSES.items():
        if name in FEATURES:
            if name == "fsp" and couple == "series":
                continue  # a flow goes from one layer to the next, and the student has one
            made[f"kd + {name}"] = ts.Distill(response=kd, feature=kind(), taps=found.taps, **found.training)
        elif name in RELATIONS:
            made[f"kd + {name}"] = ts.Distill(response=kd, relation=kind(), taps=found.taps, **found.training)
        else:
            made[name] = ts.Distill(response=kd if name == "kd" else kind(), **found.training)
    return made


# on validation, with a seed of its own, before anything is reported: temperature and weight of KD
TRIED: Mapping[str, ts.KD] = {
    f"temperature {temperature:g}, alpha {alpha:g}": ts.KD(temperature=temperature, alpha=alpha)
    for temperature, alpha in ((2.0, 0.5), (2.0, 0.9), (4.0, 0.5), (4.0, 0.9))
}
