"""A timm model as a task: images as the model was trained with them, from folders or data sets."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import torchslim as ts
from torchslim.core.batches import predictor
from torchslim.errors import TaskError

timm = pytest.importorskip("timm")
Image = pytest.importorskip("PIL.Image")

CLASSES = ("blue", "green", "red")


def pictures(count: int, seed: int, mode: str = "RGB") -> list[tuple[Any, int]]:
    """Images of several sizes in the color of their class."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        pixels = rng.integers(0, 100, (int(rng.integers(30, 50)), 40, 3), dtype=np.uint8)
        pixels[:, :, number % 3] = 255
        made.append((Image.fromarray(pixels).convert(mode), number % 3))
    return made


def model(chans: int = 3) -> nn.Module:
    torch.manual_seed(0)
    made: nn.Module = timm.create_model("test_resnet", num_classes=3, in_chans=chans)
    made.pretrained_cfg.update(input_size=(chans, 32, 32), mean=(0.2,) * chans, std=(0.3,) * chans, crop_pct=1.0)
    return made.eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images in a folder for each class; classes are numbered by their names."""
    for split, count, seed in (("train", 24, 0), ("val", 9, 1)):
        for number, (image, label) in enumerate(pictures(count, seed)):
            path = tmp_path / split / CLASSES[2 - label]
            path.mkdir(parents=True, exist_ok=True)
            image.save(path / f"{number}.png")
    return tmp_path


def test_images_are_transformed_as_the_model_was_trained() -> None:
    data = pictures(10, 0)
    task = ts.Task.from_timm(model(), train=data, val=data, batch_size=4)
    batches = list(task.val)
    assert [tuple(images.shape) for images, _ in batches] == [(4, 3, 32, 32), (4, 3, 32, 32), (2, 3, 32, 32)]
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model()))
    assert torch.equal(batches[0][0][1], transform(data[1][0]))
    assert torch.cat([labels for _, labels in batches]).tolist() == [label for _, label in data]
    assert 0 <= task.evaluate(predictor(model())) <= 100
    [one], [other] = ({float(images.sum()) for images, _ in [next(iter(task.train))]} for _ in range(2))  # type: ignore[arg-type]
    assert one != other, "training images are augmented"


def test_training_images_are_augmented_as_asked() -> None:
    data = pictures(4, 0)
    plain = {"is_training": False}
    task = ts.Task.from_timm(model(), train=data, val=data, batch_size=4, augment=plain)
    shuffled, _ = next(iter(task.train))  # type: ignore[arg-type]
    [[images, _]] = task.val
    assert sorted(shuffled.sum((1, 2, 3)).tolist()) == pytest.approx(sorted(images.sum((1, 2, 3)).tolist()))


def test_folders_of_classes_have_the_same_numbers_in_every_split(folder: Path) -> None:
    shutil.rmtree(folder / "val" / "blue")
    task = ts.Task.from_timm(model(), train=folder / "train", val=str(folder / "val"), batch_size=9)
    assert torch.cat([labels for _, labels in task.train or ()]).bincount().tolist() == [8, 8, 8]
    assert torch.cat([labels for _, labels in task.val]).bincount().tolist() == [0, 3, 3]


def test_gray_images_stay_gray() -> None:
    task = ts.Task.from_timm(model(chans=1), val=pictures(2, 0))
    [[images, _]] = task.val
    assert images.shape == (2, 1, 32, 32)


@pytest.mark.slow
def test_a_run_prunes_distills_and_quantizes(folder: Path) -> None:
    """Costs 20 s."""
    task = ts.Task.from_timm(model(), train=folder / "train", val=folder / "val", batch_size=8)
    steps = [ts.Prune(sparsity=0.3, pattern="channel", round_to=1), ts.Distill(epochs=1), ts.Quantize("int8")]
    result = ts.compress(model(), task, steps, runtime="eager", threads=1)
    before, *_, after = result.run["rows"]
    assert after["parameters"]["value"] < before["parameters"]["value"]
    assert after["metric"]["val"]["value"] == pytest.approx(task.evaluate(result.deployed))


def cases() -> Iterator[tuple[str, Callable[[], Any], str]]:
    make, data = ts.Task.from_timm, pictures(3, 0)
    yield "another model", lambda: make(nn.Linear(2, 2), val=data), "model must come from timm.*Linear"
    yield "no val", lambda: make(model(), val=None, train=data), "val is None; give val="
    yield "no folder", lambda: make(model(), val="nowhere"), "val must be a folder.*'nowhere'"
    yield "no images", lambda: make(model(), val=Path(__file__).parent), "val=.*no images in folders"
    yield (
        "tensors",
        lambda: make(model(), val=[(torch.ones(3, 4, 4), 1)]),
        "val must give pairs of a PIL image.*ts.Task",
    )
    yield "no pairs", lambda: make(model(), val=[1]), "val must give pairs of a PIL image and a label, got 1"
    yield "a generator", lambda: make(model(), val=iter(data)), "val must be a folder or a data set.*length"
    yield "empty", lambda: make(model(), val=[]), "val is an empty data set"
    yield "a label", lambda: make(model(), val=[(data[0][0], 3)]), "val has the label 3, but the model has 3 classes"
    yield "augment", lambda: make(model(), val=data, augment={"flip": 1}), "augment does not fit.*flip"


@pytest.mark.parametrize(("about", "make", "message"), [*cases()], ids=[about for about, _, _ in cases()])
def test_wrong_arguments_are_named(about: str, make: Callable[[], Any], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        make()
