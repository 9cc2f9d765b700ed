"""Calibration data for observers, statistics, mixed precision and sensitivity."""

from __future__ import annotations

import math
from collections.abc import Generator
from contextlib import closing
from functools import cached_property
from itertools import chain, islice

from torchslim.core.batches import Batch, batch_size
from torchslim.core.isolation import preserved_globals
from torchslim.core.step import Context, Inputs
from torchslim.core.task import Task
from torchslim.core.trees import tensors
from torchslim.training.loaders import seeded, seeded_splits

EXAMPLES = 8
LOOKED_AT = 16  # batches of each split


class CalibrationData:
    """The calibration batches of a task, drawn once; equal seeds give equal batches.

    Loaders that shuffle and data sets that draw at random are seeded while the batches are drawn, and restored after.

    Args:
        task: its `calibration` is used, or else the first samples of train, or of val.
        seed: seed of everything random in the task's loaders.
        samples: minimum number of samples, in whole batches, where the task has no `calibration`.
    """

    def __init__(self, task: Task, seed: int, samples: int = 512) -> None:
        self.task, self.seed, self.samples = task, seed, samples

    @cached_property
    def batches(self) -> list[Batch]:
        """The batches as the loader gives them, with labels.

        They are stored in a list, because a loader in use by a training cannot start another pass if it has persistent
        workers.
        """
        return list(self._drawn())

    @cached_property
    def inputs(self) -> list[Inputs]:
        """The model's inputs of each batch."""
        return [self.task.inputs(batch) for batch in self.batches]

    def first(self, samples: int) -> list[Inputs]:
        """Return the first of `inputs` that hold at least `samples` samples; further batches are not drawn."""
        inputs, count = [], 0
        with closing(self._drawn()) as batches:
            for batch in self.batches if "batches" in self.__dict__ else batches:
                inputs.append(self.task.inputs(batch))
                count += batch_size(inputs[-1])
                if count >= samples:
                    break
        return inputs

    def _drawn(self) -> Generator[Batch, None, None]:
        with preserved_globals(self.seed), seeded(getattr(self.task, self.task.calibration_split), 0, self.seed):
            yield from self.task.first_batches(self.samples)


def spanning_examples(task: Task) -> tuple[Inputs, ...]:
    """Inputs of up to `EXAMPLES` batches of val and of the calibration data, whose sizes span those of all looked at.

    They are the first batch, the smallest and the largest one, and the first ones of other sizes.
    """
    looked_at: dict[tuple[tuple[int, ...], ...], Inputs] = {}
    with preserved_globals(0), seeded_splits(task, 0):
        splits = (task.val, getattr(task, task.calibration_split))
        for batch in chain.from_iterable(islice(split, LOOKED_AT) for split in splits if split is not None):
            inputs = task.inputs(batch)
            looked_at.setdefault(tuple(tuple(tensor.shape) for tensor in tensors(inputs)), inputs)
    by_size = sorted(looked_at, key=lambda shapes: sum(map(math.prod, shapes)))
    shapes = list(dict.fromkeys((next(iter(looked_at)), by_size[0], by_size[-1], *looked_at)))
    return tuple(looked_at[shape] for shape in shapes[:EXAMPLES])


def calibration_of(ctx: Context) -> CalibrationData:
    """Return the calibration data of a step: the runner's, or else data drawn with the context's seed."""
    data = ctx.calibration
    return data if isinstance(data, CalibrationData) else CalibrationData(ctx.task, ctx.seed)
