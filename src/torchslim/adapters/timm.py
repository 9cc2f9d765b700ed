"""The task of a timm model: images from folders or data sets, with the transforms of the model's configuration."""

from __future__ import annotations

from collections.abc import Callable, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import Dataset

from torchslim.adapters.loaders import loader
from torchslim.core.checks import got, shown
from torchslim.core.imports import foreign
from torchslim.core.task import Task
from torchslim.errors import TaskError


def task(
    model: nn.Module,
    *,
    val: Any,
    train: Any = None,
    test: Any = None,
    metric: Any = "accuracy",
    batch_size: int = 32,
    workers: int = 0,
    augment: dict[str, Any] | None = None,
    **options: Any,
) -> Task:
    """See `Task.from_timm`.

    Raises:
        TaskError: no timm model, no timm, or data that are no images with labels.
    """
    if not isinstance(model, nn.Module) or not hasattr(model, "pretrained_cfg"):
        raise TaskError(f"model must come from timm.create_model, {got(model)}; for other models give ts.Task(...)")
    try:
        from timm.data import create_transform, resolve_model_data_config
    except ImportError as error:
        raise TaskError("from_timm needs timm: pip install 'torchslim[timm]'") from error
    config = resolve_model_data_config(model)
    with foreign("augment does not fit timm.data.create_transform", TaskError):
        transforms = {
            "train": create_transform(**{**config, "is_training": True, **(augment or {})}),
            "val": create_transform(**config, is_training=False),
        }
    classes: dict[str, int] | None = None
    splits = {}
    for name, given in (("train", train), ("val", val), ("test", test)):
        if given is None:
            continue
        images = given
        if isinstance(given, (str, Path)):
            images, classes = _folder(Path(given), name, classes)
        if not isinstance(images, Sized):
            raise TaskError(f"{name} must be a folder or a data set of (PIL image, label) with a length, {got(images)}")
        mode = "L" if config["input_size"][0] == 1 else "RGB"
        pictures = Pictures(images, transforms["train" if name == "train" else "val"], name, mode)
        splits[name] = loader(pictures, name, batch_size=batch_size, workers=workers)
        _check(pictures, getattr(model, "num_classes", None))
    if "val" not in splits:
        raise TaskError("val is None; give val=folder or val=data set of (image, label)")
    return Task(**{**splits, **options}, metric=metric)


def _folder(folder: Path, name: str, classes: dict[str, int] | None) -> tuple[Any, dict[str, int]]:
    """The images of a folder with a folder for each class, and the numbers of the classes: those of the first split."""
    from timm.data import ImageDataset

    if not folder.is_dir():
        raise TaskError(f"{name} must be a folder with a folder of images for each class, got {shown(str(folder))}")
    with foreign(f"{name}={str(folder)!r} holds no images in folders of classes", TaskError):
        images = ImageDataset(str(folder), class_map=classes or "")
    return images, classes or images.reader.class_to_idx


@dataclass
class Pictures(Dataset[Any]):
    """Pairs of a transformed image and its label."""

    images: Any
    transform: Callable[[Any], Any]
    name: str
    mode: str  # of PIL: "RGB" or "L"

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: int) -> tuple[Any, int]:
        image, label = self.images[place]
        return self.transform(image.convert(self.mode)), int(label)


def _check(pictures: Pictures, classes: int | None) -> None:
    """Raise TaskError unless the first sample is an image with a label."""
    sample = pictures.images[0]
    if not isinstance(sample, (tuple, list)) or len(sample) != 2 or not hasattr(sample[0], "convert"):
        raise TaskError(
            f"{pictures.name} must give pairs of a PIL image and a label, {got(sample)}; leave the transform out of "
            "the data set, or give ts.Task(...) loaders of tensors"
        )
    label = int(sample[1])
    if classes and not 0 <= label < classes:
        raise TaskError(f"{pictures.name} has the label {label}, but the model has {classes} classes; mend num_classes")
