"""The jobs that are compared: what they load, in small, and who runs on them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

import torchslim as ts

OURS, FLOAT = "torchslim", "float"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A job of the gallery with the scripts of all sides.

    Args:
        load: the trained model, and the task with the data that all sides train on.
        epochs: of training, in all, of the other sides; torchslim's are in its steps.
        scripts: modules of the sides, by their names in the table.
    """

    load: Callable[[], tuple[nn.Module, ts.Task]]
    epochs: int
    scripts: Mapping[str, str]


def _images(train: int = 4_000, val: int = 1_000) -> tuple[nn.Module, ts.Task]:
    from examples.fashion_mnist import resnet, task
    from examples.fashion_mnist.data import Batches, splits

    (images, labels), (val_images, val_labels) = splits()["train"], splits()["val"]
    small = Batches((images[:train], labels[:train]), 128, augment=True)
    return resnet(), dataclasses.replace(task(), train=small, val=Batches((val_images[:val], val_labels[:val]), 500))


def _sentences() -> tuple[nn.Module, ts.Task]:
    from examples.sentences.task import model, task

    return model(), task()


def _series() -> tuple[nn.Module, ts.Task]:
    from examples.series.task import model, task

    return model(), task()


JOBS: Mapping[str, Job] = {
    name: Job(
        load=load, epochs=epochs, scripts={OURS: f"{name}_torchslim", "by hand": name, "fasterai": f"{name}_fasterai"}
    )
    for name, load, epochs in (("images", _images, 4), ("sentences", _sentences, 0), ("series", _series, 0))
}
