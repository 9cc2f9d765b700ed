"""The history and the best epoch of a training, kept in a checkpoint from which it resumes."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchslim.core.distributed import is_first, told
from torchslim.core.files import present
from torchslim.core.isolation import warn
from torchslim.core.metrics import Metric
from torchslim.core.seals import read_sealed, write_sealed
from torchslim.errors import StorageError, TrainError
from torchslim.training.averaging import WeightAverage
from torchslim.training.devices import Placement
from torchslim.training.fsdp import collected, load_optimizer, load_spread

if TYPE_CHECKING:
    from torchslim.training.loop import Loop


@dataclass(frozen=True, slots=True)
class Best:
    """The epoch with the best validation metric; all None before the first evaluation."""

    epoch: int | None = None
    value: float | None = None
    weights: Mapping[str, Any] | None = None
    masks: dict[str, Tensor] | None = None


@dataclass
class Record:
    """What a training has measured so far. With a `path`, `add` writes a checkpoint after every epoch.

    The file is the same for every strategy and number of processes; the first process writes it, sealed with `key`.
    """

    place: Placement
    path: Path | None
    key: str
    average: WeightAverage | None = None
    patience: int | None = None
    history: list[dict[str, float]] = field(default_factory=list)
    best: Best = Best()
    since_best: int = 0  # epochs that could have been the best one, and were not

    def rate(self, loop: Loop, value: float, metric: Metric) -> None:
        """Keep the weights as they are now if they are the best ones so far; count the epoch if not."""
        if metric.better(value, self.best.value):
            self.best = Best(loop.epoch, value, self.place.weights(loop.model), dict(loop.masks))
            self.since_best = 0
        else:
            self.since_best += 1

    @property
    def exhausted(self) -> bool:
        """Whether `patience` epochs have passed without a better one, by the count of the first process."""
        return self.patience is not None and told(self.since_best) >= self.patience

    def stopped(self, loop: Loop) -> str:
        """The reason why the training ended before its last epoch; empty where it did not."""
        if loop.epoch >= loop.epochs:
            return ""
        return f"stopped after epoch {loop.epoch} of {loop.epochs}: no better metric on val in {self.patience} epochs"

    def add(self, loop: Loop, row: dict[str, float]) -> None:
        """Append a finished epoch to the history, and write the checkpoint."""
        self.history.append(row)
        if self.path is None:
            return
        checkpoint = {
            "epoch": loop.epoch,
            "step": loop.step,
            "model": self.place.weights(loop.model),
            "masks": loop.masks,
            "companion": self.place.weights(self.place.companion),
            "history": self.history,
            "steps_per_epoch": loop.steps_per_epoch,
            "optimizer": collected(loop.optimizer.state_dict(), self.place.fabric.is_global_zero),
            "average": None
            if self.average is None
            else collected(self.average.values, self.place.fabric.is_global_zero),
            "precision": self.place.fabric.strategy.precision.state_dict(),  # the scale of losses, with "16-mixed"
            "since_best": self.since_best,
            "best": [self.best.epoch, self.best.value, self.best.weights, self.best.masks],
        }
        if self.place.fabric.is_global_zero:
            buffer = io.BytesIO()
            torch.save(checkpoint, buffer)
            write_sealed(self.path, buffer.getvalue(), self.key)

    def resume(self, loop: Loop) -> None:
        """Set model, optimizer and loop to the checkpoint, where there is an intact one.

        Raises:
            TrainError: the checkpoint belongs to another model.
        """
        if (payload := self._payload()) is None:
            return
        try:
            saved = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
            load_spread(loop.model, saved["model"])
            self.place.companion.load_state_dict(saved["companion"])
            load_optimizer(loop.optimizer, saved["optimizer"])
            loop.masks, loop.epoch, loop.step = saved["masks"], saved["epoch"], saved["step"]
            loop.steps_per_epoch = saved["steps_per_epoch"]
            self.history, self.best, self.since_best = saved["history"], Best(*saved["best"]), saved["since_best"]
            if saved["precision"]:
                self.place.fabric.strategy.precision.load_state_dict(saved["precision"])
            if self.average is not None:
                self.average.load(saved["average"])
        except Exception as error:
            raise TrainError(
                f"the checkpoint {self.path} cannot be resumed from ({error}); delete it to start over"
            ) from error

    def _payload(self) -> bytes | None:
        """The bytes of the checkpoint; None where there is none, or, with a warning, where it is damaged."""
        if self.path is None or not present(self.path):
            return None
        try:
            return read_sealed(self.path, self.key)
        except StorageError as error:
            if is_first():
                warn(f"{error}; the training starts over")
            return None
