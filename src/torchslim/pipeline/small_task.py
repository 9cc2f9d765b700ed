"""A task with a few batches of each split, on which a metric is tried, on more of them where it fails."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from torchslim.core import distributed
from torchslim.core.batches import Batch, Predict
from torchslim.core.metrics import Metric
from torchslim.core.task import Task
from torchslim.errors import TorchslimError
from torchslim.training.loaders import batch_count, few_of

UPDATES = 3  # for each process: the first one warms up, the second one is timed, the last batch is often smaller
EVALUATED = 2  # batches on which the metric is tried first
MOST = 64  # batches on which the metric is tried, before all of the split


def small(task: Task, note: Callable[[float, int | None], None], *, evaluated: int = EVALUATED) -> Task:
    """The task with a few batches of each split: of val and test of different sizes, where the loader has them.

    Args:
        task: the user's task.
        note: called with the seconds and the batches of each evaluation; without batches where it is repeated.
        evaluated: batches on which the metric is tried first.
    """
    val, test = Few(task.val, evaluated), None if task.test is None else Few(task.test, evaluated)
    splits = [split for split in (val, test) if split is not None]
    metric = task.as_metric()
    return replace(
        task,
        train=None if task.train is None else few_of(task.train, UPDATES * distributed.count()),
        val=val,
        test=test,
        calibration=None if task.calibration is None else few_of(task.calibration, EVALUATED),
        metric=replace(metric, fn=_Patient(metric, splits, note)),
    )


@dataclass
class Few:
    """A few batches of a split, as `few_of` draws them; `grow` doubles their number, in the end to all."""

    dataset: Iterable[Batch]  # `seeded` finds generators by this name
    count: int = EVALUATED
    drawn: int = 0
    whole: bool = field(default=False)

    def __len__(self) -> int:
        return len(self._chosen())

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._chosen():
            self.drawn += 1
            yield batch

    def _chosen(self) -> Any:
        return self.dataset if self.whole else few_of(self.dataset, self.count)

    def grow(self) -> bool:
        """Double the number of batches; False where there are no more."""
        total = batch_count(self.dataset)
        if self.whole or (total is not None and total <= self.count):
            return False
        self.count *= 2
        self.whole = self.count > MOST
        return True


class _Patient:
    """A metric that is tried again on more batches where it fails, as one that needs all classes does on a few."""

    def __init__(self, metric: Metric, splits: Sequence[Few], note: Callable[[float, int | None], None]) -> None:
        self.metric, self.splits, self.note = metric, splits, note

    def __call__(self, predict: Predict, batches: Iterable[Batch]) -> Any:
        while True:
            start, before = time.perf_counter(), self._drawn()
            try:
                value = self.metric.fn(predict, batches)
                few = _not_finite(value)
            except TorchslimError:
                raise  # says what is wrong, with any number of batches
            except Exception:
                if not self._grow():
                    raise
                few = True
            else:
                few = few and self._grow()
            seconds = time.perf_counter() - start
            self.note(seconds, None if few else self._drawn() - before)
            if not few:
                return value

    def _drawn(self) -> int:
        return sum(split.drawn for split in self.splits)

    def _grow(self) -> bool:
        return sum(split.grow() for split in self.splits) > 0  # all of them grow


def _not_finite(value: Any) -> bool:
    """Whether a metric's value is a number that is NaN or infinite; other values are judged by `Task.evaluate`."""
    try:
        return not math.isfinite(value.item() if isinstance(value, Tensor) and value.numel() == 1 else value)
    except (TypeError, ValueError):
        return False
