"""Loaders over data sets, and the first batch of a loader."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sized
from typing import Any

from torch.utils.data import DataLoader

from torchslim.core.batches import Batch, take_first
from torchslim.core.checks import got
from torchslim.core.isolation import preserved_globals
from torchslim.errors import TaskError


def first_of(batches: Iterable[Batch], name: str) -> Batch:
    """First batch of a split, without a change of the random state."""
    with preserved_globals():
        return take_first(batches, name)


def loader(
    samples: Any, name: str, *, batch_size: int, workers: int = 0, collate: Callable[[list[Any]], Any] | None = None
) -> DataLoader[Any]:
    """A loader over a data set, shuffled if it is named "train"; a DataLoader stays as it is.

    Raises:
        TaskError: `samples` is no data set, or is empty.
    """
    if isinstance(samples, DataLoader):
        return samples
    if not isinstance(samples, Sized) or not hasattr(samples, "__getitem__") or isinstance(samples, (str, dict)):
        raise TaskError(f"{name} must be a data set with a length and indices, {got(samples)}")
    if not len(samples):
        raise TaskError(f"{name} is an empty data set; give at least one sample")
    return DataLoader(
        samples,
        batch_size=batch_size,
        shuffle=name == "train",
        num_workers=workers,
        collate_fn=collate,
        persistent_workers=workers > 0,
    )
