"""Calibration data for observers, statistics, mixed precision and sensitivity."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from functools import cached_property

from torch import nn

from torchslim.core.batches import EXAMPLES, Batch, batch_size, checked, spanning
from torchslim.core.isolation import preserved_globals
from torchslim.core.part_calls import first_samples, recorded
from torchslim.core.parts import WHOLE
from torchslim.core.program_names import split_name
from torchslim.core.step import Context, Inputs
from torchslim.core.task import Task
from torchslim.core.tensor_objects import of_structure
from torchslim.graph.capturable import examples_of_programs
from torchslim.training.loaders import seeded, seeded_splits

LOOKED_AT = 16  # batches of each split at least
SECONDS = 5.0  # for further ones: drawing all batches of images can take minutes


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
        return list(self.drawn())

    @cached_property
    def inputs(self) -> list[Inputs]:
        """The model's inputs of each batch."""
        return [self.task.inputs(batch) for batch in self.batches]

    def first(self, samples: int) -> list[Inputs]:
        """Return the first of `inputs` that hold at least `samples` samples; further batches are not drawn."""
        inputs, count = [], 0
        with closing(self.drawn()) as batches:
            for batch in self.batches if "batches" in self.__dict__ else batches:
                inputs.append(self.task.inputs(batch))
                count += batch_size(inputs[-1])
                if count >= samples:
                    break
        return inputs

    def drawn(self) -> Generator[Batch, None, None]:
        """Draw the batches one by one; the generators of loaders are restored when it is closed."""
        with preserved_globals(self.seed), seeded(getattr(self.task, self.task.calibration_split), 0, self.seed):
            yield from self.task.first_batches(self.samples)


def spanning_batches(task: Task, seed: int = 0) -> list[Batch]:
    """Up to `EXAMPLES` batches of val and of the calibration data, whose sizes span those of all looked at.

    At least `LOOKED_AT` batches of both are looked at, and as many more as `SECONDS` allow: where texts are cut at a
    length, most batches have that length, and only a few show that it varies. The calibration data are drawn as
    `CalibrationData` draws them with this seed: a loader that shuffles gives batches of other sizes in another order.
    """
    with preserved_globals(seed), seeded_splits(task, seed):
        val = spanning(_looked_at(checked(task.val, "val")), EXAMPLES, task.inputs)
    with closing(CalibrationData(task, seed).drawn()) as drawn:
        return spanning([*val, *spanning(_looked_at(drawn), EXAMPLES, task.inputs)], EXAMPLES, task.inputs)


def _looked_at(batches: Iterable[Batch]) -> Iterator[Batch]:
    until = time.monotonic() + SECONDS
    for number, batch in enumerate(batches):
        if number >= LOOKED_AT and time.monotonic() > until:
            return
        yield batch


def spanning_examples(task: Task, seed: int = 0) -> tuple[Inputs, ...]:
    """The model inputs of `spanning_batches`."""
    return tuple(task.inputs(batch) for batch in spanning_batches(task, seed))


def part_examples(model: nn.Module, task: Task, paths: Sequence[str], seed: int = 0) -> dict[str, tuple[Inputs, ...]]:
    """For each program of the parts, examples among the calls while the model runs on `spanning_batches`.

    See `examples_of_programs`.

    Raises:
        TaskError: a part is never called.
    """
    with preserved_globals(seed):
        calls = recorded(model, task, paths, spanning_batches(task, seed))
    return {name: tuple(own) for name, own in examples_of_programs(model, calls).items()}


class PartCalibration:
    """The calls of each part while a model runs on calibration batches; recorded once, when they are first asked for.

    Args:
        model: the whole model as it is now: the inputs of its parts depend on its weights.
        ctx: its task and calibration data.
        paths: the parts.
    """

    def __init__(self, model: nn.Module, ctx: Context, paths: Sequence[str]) -> None:
        self.model, self.ctx, self.paths = model, ctx, paths

    @cached_property
    def calls(self) -> dict[str, list[Inputs]]:
        """The recorded calls of the structure of each program's examples, or else these examples; by program."""
        with preserved_globals(self.ctx.seed):
            calls = recorded(self.model, self.ctx.task, self.paths, calibration_of(self.ctx).batches)
        return {
            name: of_structure(calls[split_name(name)[0]], examples[0]) or of_structure(examples, examples[0])
            for name, examples in self.ctx.parts.items()
        }

    def inputs(self, path: str) -> list[Inputs]:
        """The inputs of all calls of a part; of the model itself, those of the calibration batches."""
        return calibration_of(self.ctx).inputs if path == WHOLE else self.calls[path]

    def first(self, path: str, samples: int) -> list[Inputs]:
        """The first of `inputs` that hold at least `samples` samples."""
        return calibration_of(self.ctx).first(samples) if path == WHOLE else first_samples(self.calls[path], samples)


def calibration_of(ctx: Context) -> CalibrationData:
    """Return the calibration data of a step: the runner's, or else data drawn with the context's seed."""
    data = ctx.calibration
    return data if isinstance(data, CalibrationData) else CalibrationData(ctx.task, ctx.seed)
