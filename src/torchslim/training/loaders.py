"""The user's loaders in training: seeded for each epoch, shared between processes, and restored afterwards."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, SequentialSampler

from torchslim.core.batches import Batch, take_first
from torchslim.core.fingerprint import fingerprint
from torchslim.core.isolation import preserved_globals
from torchslim.core.task import Task
from torchslim.core.trees import tensors

LOADER_OPTIONS = (
    "batch_sampler",
    "num_workers",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "generator",
    "prefetch_factor",
    "persistent_workers",
)
SAMPLES = 8  # drawn twice to test whether they are the same


@contextmanager
def seeded(batches: Any, epoch: int, seed: int) -> Iterator[None]:
    """Seed the loader's own generators for this epoch, and restore them after the block.

    A loader without a generator draws from the global ones, which the caller must seed.
    """
    owners = _parts(batches)
    generators = {
        id(owner.generator): owner.generator
        for owner in owners
        if isinstance(getattr(owner, "generator", None), torch.Generator)
    }
    states = {key: generator.get_state() for key, generator in generators.items()}
    shufflers = [(owner, getattr(owner, "epoch", None)) for owner in owners if hasattr(owner, "set_epoch")]
    try:
        for index, generator in enumerate(generators.values()):
            generator.manual_seed(seed + index)
        for owner, _ in shufflers:
            owner.set_epoch(epoch)
        yield
    finally:
        for key, generator in generators.items():
            generator.set_state(states[key])
        for owner, before in shufflers:
            if isinstance(before, int):
                owner.set_epoch(before)


@contextmanager
def seeded_splits(task: Task, seed: int) -> Iterator[None]:
    """Seed all loaders of a task for one pass, and restore them after the block."""
    with ExitStack() as stack:
        for batches in {id(loader): loader for loader in (task.train, task.val, task.test, task.calibration)}.values():
            if batches is not None:
                stack.enter_context(seeded(batches, 0, seed))
        yield


def _parts(batches: Any) -> list[Any]:
    """List a loader, its samplers and its datasets, however nested: all objects that may own a random generator."""
    owners = [batches]
    for owner in owners:
        for name in ("sampler", "batch_sampler", "dataset"):
            inner = getattr(owner, name, None)
            if inner is not None and not any(inner is known_owner for known_owner in owners):
                owners.append(inner)
    return owners


def first_batch(task: Task) -> Batch:
    """Return the first training batch, leaving the state of the loader's and the global generators unchanged."""
    with preserved_globals(), seeded(task.train, 0, 0):
        return take_first(task.train, "train")


def length(batches: Iterable[Batch], world_size: int) -> int | None:
    """Number of batches that each process gets in an epoch; None for a loader without a length."""
    count = batch_count(batches)
    return None if count is None else max(count // world_size, 1)


def shared(batches: Iterator[Batch], fabric: Any) -> Iterator[Batch]:
    """Yield this process's batches of the one seeded order; the last ones are left out if too few for all processes."""
    while len(group := list(islice(batches, fabric.world_size))) == fabric.world_size:
        yield group[fabric.global_rank]


# numbers of samples ---------------------------------------------------------------------------------------------------


class Indexed(NamedTuple):
    """A batch, and the index of each of its samples in the data set: (samples,)."""

    places: Tensor
    batch: Batch


def indexed(batches: Iterable[Batch], size: Callable[[Batch], int]) -> Iterable[Indexed]:
    """Add to batches the numbers of their samples: their indices in the data set, or their position in the order.

    Args:
        batches: a DataLoader over a data set with integer indices, shuffled or not, or batches in a fixed order.
        size: returns the number of samples of a batch.
    """
    if not _has_places(batches):
        return _Counted(batches, size)
    loader: Any = batches
    options: dict[str, Any] = {name: getattr(loader, name) for name in LOADER_OPTIONS}
    numbered: Iterable[Indexed] = DataLoader(
        _Placed(loader.dataset), collate_fn=_Collated(loader.collate_fn), **options
    )
    return numbered


def _has_places(batches: Any) -> bool:
    """Whether a loader draws its samples by integer indices, judged by the first batch."""
    if type(batches) is not DataLoader or batches.batch_sampler is None or isinstance(batches.dataset, IterableDataset):
        return False
    with preserved_globals(), seeded(batches, 0, 0):
        first: list[Any] = next(iter(batches.batch_sampler), [])
    try:
        return len(batches.dataset) > 0 and all(operator.index(place) >= 0 for place in first)
    except TypeError:  # no length, or keys of another kind
        return False


def sample_count(batches: Iterable[Batch], size: Callable[[Batch], int]) -> int:
    """Number of samples that `indexed` numbers."""
    numbered = indexed(batches, size)
    if isinstance(numbered, DataLoader):
        return len(numbered.dataset)
    return sum(size(batch) for batch in batches)


class _Placed(Dataset[Any]):
    """A data set whose samples come with their indices."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, place: int) -> tuple[int, Any]:
        return place, self.dataset[place]


class _Collated:
    """Collates samples that come with their indices."""

    def __init__(self, collate: Callable[[list[Any]], Batch]) -> None:
        self.collate = collate

    def __call__(self, samples: list[tuple[int, Any]]) -> Indexed:
        places, bare = zip(*samples, strict=True)
        return Indexed(torch.tensor([operator.index(place) for place in places]), self.collate(list(bare)))


class _Counted:
    """Batches in a fixed order, with the running number of each sample."""

    def __init__(self, batches: Iterable[Batch], size: Callable[[Batch], int]) -> None:
        self.dataset, self.size = batches, size  # `seeded` finds generators of `batches` by this name

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Indexed]:
        start = 0
        for batch in self.dataset:
            end = start + self.size(batch)
            yield Indexed(torch.arange(start, end), batch)
            start = end


def why_not_repeatable(batches: Iterable[Batch], size: Callable[[Batch], int]) -> str | None:
    """Return the reason why equal numbers may not mean equal samples; None where the test finds none.

    The test draws a few samples twice, under different random states, and those of a shuffling loader also one by one.
    """
    numbered = indexed(batches, size)
    drawn: list[Any] = []
    for seed in (1, 2):
        with preserved_globals(seed), seeded(batches, seed, seed):
            if isinstance(numbered, DataLoader):
                few = range(min(SAMPLES, len(numbered.dataset)))
                drawn.append(numbered.collate_fn([numbered.dataset[place] for place in few]))
            else:
                drawn.append(next(iter(numbered), None))
    if fingerprint(drawn[0]) != fingerprint(drawn[1]):
        kind = "augments its samples" if isinstance(numbered, DataLoader) else "shuffles or augments"
        return f"the training loader {kind}: the same sample came out differently when it was drawn twice"
    if (
        isinstance(numbered, DataLoader)
        and type(getattr(numbered.batch_sampler, "sampler", None)) is not SequentialSampler
    ):
        with preserved_globals(1), seeded(batches, 1, 1):
            singles = [numbered.collate_fn([numbered.dataset[place]]) for place in few]
        if any(_sample_shapes(single) != _sample_shapes(drawn[0]) for single in singles):
            return (
                "the training loader shuffles, and pads each batch to its longest sample: a sample's length "
                "depends on the other samples of its batch; pad all to one length"
            )
    return None


def _sample_shapes(batch: Any) -> list[Any]:
    return [tensor.shape[1:] for tensor in tensors(batch)]


def why_not_numbered(batches: Iterable[Batch], size: Callable[[Batch], int]) -> str | None:
    """Return the reason why samples cannot be identified by number, or None; augmented samples keep their numbers."""
    return None if _has_places(batches) else why_not_repeatable(batches, size)


# parts of a loader ----------------------------------------------------------------------------------------------------


def part_of(batches: Any, share: float) -> Any:
    """Return a share of the batches, spread evenly over each pass, at least one; all of a loader without a length.

    The part of a DataLoader is a DataLoader over the same data set.
    """
    count = batch_count(batches)
    if count is None or share >= 1 or count <= 1:
        return batches
    # the items at which the running share, rounded down, grows by one
    places = {i for i in range(count) if int((i + 1) * share) > int(i * share)} or {0}
    return _batches_at(batches, places)


def _batches_at(batches: Any, places: Set[int]) -> Any:
    """Return the batches at these places of each pass; of a DataLoader, a DataLoader over the same data set."""
    if type(batches) is DataLoader and batches.batch_sampler is not None:
        options = {name: getattr(batches, name) for name in LOADER_OPTIONS if name != "batch_sampler"}
        sampler = _Part(batches.batch_sampler, places)
        return DataLoader(batches.dataset, collate_fn=batches.collate_fn, batch_sampler=sampler, **options)
    return _Part(batches, places)


class _Part:
    """The items at some places of each pass."""

    def __init__(self, batches: Any, places: Set[int]) -> None:
        self.dataset, self.kept = batches, places
        self.sampler = getattr(batches, "sampler", None)

    def __len__(self) -> int:
        return len(self.kept)

    def __iter__(self) -> Iterator[Any]:
        return (batch for place, batch in enumerate(self.dataset) if place in self.kept)


def few_of(batches: Any, count: int) -> Any:
    """Return `count` batches of each pass: the first ones and the last one, which is often smaller.

    Only the first ones where the last one cannot be drawn without those before it.
    """
    total = batch_count(batches)
    if total is not None and total <= count:
        return batches
    sampled = type(batches) is DataLoader and not isinstance(batches.dataset, IterableDataset)
    if total is not None and (isinstance(batches, Sequence) or (sampled and batches.batch_sampler is not None)):
        return _batches_at(batches, {*range(count - 1), total - 1})
    return _Leading(batches, count, total)


def batch_count(batches: Any) -> int | None:
    """Number of batches of a pass; None for a loader without a length."""
    try:
        return len(batches)
    except (TypeError, NotImplementedError):  # an iterable dataset
        return None


class _Leading:
    """The first items of each pass."""

    def __init__(self, batches: Any, count: int, total: int | None) -> None:
        self.dataset, self.count, self.total = batches, count, total  # `seeded` finds generators by this name

    def __len__(self) -> int:
        if self.total is None:
            raise TypeError("the batches have no length")
        return min(self.count, self.total)

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self.dataset), self.count)
