"""The user's loaders in training: seeded for each epoch, shared between processes, and given back as they were."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any

import torch

from torchslim.isolation import preserved_globals
from torchslim.task import Batch, Task, take_first


@contextmanager
def seeded(batches: Any, epoch: int, seed: int) -> Iterator[None]:
    """Seed the loader's own generators for this epoch, and give them back as they were.

    A loader that has none draws from the global generators; those are the caller's to seed.
    """
    owners = _parts(batches)
    generators = {
        id(owner.generator): owner.generator
        for owner in owners
        if isinstance(getattr(owner, "generator", None), torch.Generator)
    }
    states = {key: each.get_state() for key, each in generators.items()}
    shufflers = [(owner, getattr(owner, "epoch", None)) for owner in owners if hasattr(owner, "set_epoch")]
    try:
        for index, each in enumerate(generators.values()):
            each.manual_seed(seed + index)
        for owner, _ in shufflers:
            owner.set_epoch(epoch)
        yield
    finally:
        for key, each in generators.items():
            each.set_state(states[key])
        for owner, before in shufflers:
            if isinstance(before, int):
                owner.set_epoch(before)


@contextmanager
def seeded_splits(task: Task, seed: int) -> Iterator[None]:
    """Every loader of a task, seeded for one pass and given back as it was."""
    with ExitStack() as stack:
        for batches in {id(each): each for each in (task.train, task.val, task.test, task.calibration)}.values():
            if batches is not None:
                stack.enter_context(seeded(batches, 0, seed))
        yield


def _parts(batches: Any) -> list[Any]:
    """A loader, its samplers and its datasets, however they are nested: whoever may own randomness."""
    found = [batches]
    for owner in found:
        for name in ("sampler", "batch_sampler", "dataset"):
            inner = getattr(owner, name, None)
            if inner is not None and not any(inner is each for each in found):
                found.append(inner)
    return found


def first_batch(task: Task) -> Batch:
    """The first training batch; neither the loader's own generators nor the global ones move on."""
    with preserved_globals(), seeded(task.train, 0, 0):
        return take_first(task.train, "train")


def calibration_batches(task: Task, seed: int) -> list[Batch]:
    """The batches that statistics are taken from, labels and all; the same ones for equal seeds.

    A list: in the middle of a training the loader is busy, and one with persistent workers cannot start another pass.
    """
    with preserved_globals(seed), seeded(getattr(task, task.calibration_split), 0, seed):
        return list(task.first_batches())


def length(batches: Iterable[Batch], world_size: int) -> int | None:
    """How many batches each process gets in an epoch; None for a loader without a length."""
    try:
        return max(len(batches) // world_size, 1)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):  # an iterable dataset
        return None


def shared(batches: Iterator[Batch], fabric: Any) -> Iterator[Batch]:
    """Every process sees its own batches of the one seeded order."""
    return batches if fabric.world_size == 1 else islice(batches, fabric.global_rank, None, fabric.world_size)
