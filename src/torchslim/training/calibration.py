"""Calibration data: what observers, statistics, mixed precision and sensitivity look at."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from functools import cached_property

from torchslim.core.batches import Batch, batch_size
from torchslim.core.isolation import preserved_globals
from torchslim.core.step import Context, Inputs
from torchslim.core.task import Task
from torchslim.training.loaders import seeded


class CalibrationData:
    """The batches that a task's statistics are taken from: drawn once, and the same ones for equal seeds.

    Loaders that shuffle and data sets that draw at random are seeded for the drawing, and are afterwards as before.

    Args:
        task: whose `calibration` is taken, or else the first samples of train, or of val.
        seed: of everything random in its loaders.
        samples: at least so many, in whole batches, where the task has no `calibration`.
    """

    def __init__(self, task: Task, seed: int, samples: int = 512) -> None:
        self.task, self.seed, self.samples = task, seed, samples

    @cached_property
    def batches(self) -> list[Batch]:
        """As the loader gives them, labels and all.

        A list: in the middle of a training the loader is busy, and one with persistent workers cannot start another
        pass.
        """
        return list(self._drawn())

    @cached_property
    def inputs(self) -> list[Inputs]:
        """What the model is called with."""
        return [self.task.inputs(batch) for batch in self.batches]

    def first(self, samples: int) -> list[Inputs]:
        """The first of `inputs` that hold so many samples; no more batches are drawn."""
        found, count = [], 0
        with closing(self._drawn()) as batches:
            for batch in self.batches if "batches" in self.__dict__ else batches:
                found.append(self.task.inputs(batch))
                count += batch_size(found[-1])
                if count >= samples:
                    break
        return found

    def _drawn(self) -> Generator[Batch, None, None]:
        with preserved_globals(self.seed), seeded(getattr(self.task, self.task.calibration_split), 0, self.seed):
            yield from self.task.first_batches(self.samples)


def calibration_of(ctx: Context) -> CalibrationData:
    """The calibration data of a step: the one that the runner has given it, or else one of the context's seed."""
    found = ctx.calibration
    return found if isinstance(found, CalibrationData) else CalibrationData(ctx.task, ctx.seed)
