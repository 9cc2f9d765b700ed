"""The user's task: data, a metric, and how a batch is passed to the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from torchslim.core.batches import (
    Batch,
    Outputs,
    Predict,
    _Checked,
    batch_inputs,
    batch_mask,
    batch_size,
    batch_target,
    call,
    checked,
    output_logits,
)
from torchslim.core.checks import check_fields, shown
from torchslim.core.metrics import METRICS, Metric, TorchMetric, default_loss
from torchslim.errors import TaskError


@dataclass(frozen=True, kw_only=True)
class Task:
    """Data, metric, and functions that read a batch. Everything except `val` and `metric` has a default.

    The defaults understand `(x, y)` tuples, dicts and Hugging Face batches and outputs. `metric` is a name of
    `METRICS`, a `Metric`, a `torchmetrics.Metric`, or a plain function `metric(predict, batches) -> float`, for
    which higher is better. `examples` are further calls of the model, for branches and methods that a batch does not
    reach, such as `[(x, 1), {"method": "embed", "args": (x,)}]`; channel pruning runs all of them.
    """

    val: Iterable[Batch]
    metric: Metric | TorchMetric | Callable[[Predict, Iterable[Batch]], float] | str
    train: Iterable[Batch] | None = None
    test: Iterable[Batch] | None = None
    calibration: Iterable[Batch] | None = None
    loss: Callable[[Outputs, Batch], Tensor] | None = None
    inputs: Callable[[Batch], tuple[Any, ...] | dict[str, Any]] = batch_inputs
    logits: Callable[[Outputs], Tensor] = output_logits
    target: Callable[[Batch], Tensor | None] = batch_target
    mask: Callable[[Batch], Tensor | None] = batch_mask
    examples: Sequence[Any] = ()

    def __post_init__(self) -> None:
        if isinstance(self.metric, str) and self.metric not in METRICS:
            raise TaskError(f"metric {self.metric!r} is not known; one of {', '.join(METRICS)}, or a function")
        if isinstance(self.metric, type) or not (
            isinstance(self.metric, (str, Metric, TorchMetric)) or callable(self.metric)
        ):
            raise TaskError(f"metric must be a name, a Metric or a function, got {shown(self.metric)}")
        for name in ("train", "val", "test", "calibration"):
            batches = getattr(self, name)
            if batches is None:
                if name == "val":
                    raise TaskError("val is None; a task needs validation batches")
                continue
            if isinstance(batches, Iterator):
                raise TaskError(
                    f"{name} is an iterator and is used up after one pass; give something that can be iterated "
                    "again, such as a DataLoader or a list"
                )
            if isinstance(batches, (type, str)) or not (
                isinstance(batches, Iterable) or hasattr(batches, "__getitem__")
            ):
                raise TaskError(f"{name} must be an iterable of batches, got {shown(batches)}")
        if isinstance(self.examples, (str, Mapping)) or not isinstance(self.examples, Sequence):
            raise TaskError(f"examples must be a list of calls, got {shown(self.examples)}; give examples=[(x,), ...]")
        check_fields(self, TaskError, only=("loss", "inputs", "logits", "target", "mask"))

    def forward(self, model: Callable[..., Outputs], batch: Batch) -> Outputs:
        """Outputs of `model` on a batch."""
        return call(model, self.inputs(batch))

    def compute_loss(self, outputs: Outputs, batch: Batch) -> Tensor | None:
        """Label loss, a scalar; None if the batch has no labels and the task has no `loss`."""
        if self.loss is not None:
            return self.loss(outputs, batch)
        target = self.target(batch)
        return None if target is None else default_loss(self.logits(outputs), target)

    def as_metric(self) -> Metric:
        """The task's metric as a `Metric`, in whichever form it was given."""
        if isinstance(self.metric, Metric):
            return self.metric
        if isinstance(self.metric, str):
            _, higher, _, unit = METRICS[self.metric]
            return Metric(fn=self._ready, name=self.metric, higher_is_better=higher, unit=unit)
        if isinstance(self.metric, TorchMetric):
            higher = getattr(self.metric, "higher_is_better", True)
            return Metric(
                fn=self._torchmetric,
                name=type(self.metric).__name__.lower(),
                higher_is_better=higher is not False,
            )
        return Metric(fn=self.metric, name=getattr(self.metric, "__name__", "metric"))

    def evaluate(self, predict: Predict, split: str = "val") -> float:
        """Value of the metric for `predict` on a split.

        Raises:
            TaskError: the split has no batches, or the metric is not one finite number.
        """
        batches = _Checked(getattr(self, split), split)
        value = self.as_metric().fn(predict, batches)
        if isinstance(value, Tensor) and value.numel() != 1:
            raise TaskError(f"the metric must return one number, got a tensor of shape {tuple(value.shape)}")
        try:
            number = float(value)
        except (TypeError, ValueError) as error:
            raise TaskError(f"the metric must return one number, got {type(value).__name__}") from error
        if not math.isfinite(number):
            raise TaskError(f"the metric returned {number} on {split}; check the metric and the model's outputs")
        return number

    def calibration_batches(self, samples: int = 512) -> list[Any]:
        """Model inputs for calibration: `calibration`, or the first `samples` of train (of val without train)."""
        return [self.inputs(batch) for batch in self.first_batches(samples)]

    def first_batches(self, samples: int = 512) -> Iterator[Batch]:
        """Whole batches, labels included: `calibration`, or the first `samples` of train (of val without train)."""
        split, count = self.calibration_split, 0
        for batch in checked(getattr(self, split), split):
            yield batch
            count += batch_size(self.inputs(batch))
            if split != "calibration" and count >= samples:
                break

    @property
    def calibration_split(self) -> str:
        """Name of the split that calibration and statistics use."""
        return next(name for name in ("calibration", "train", "val") if getattr(self, name) is not None)

    def _pairs(self, predict: Predict, batches: Iterable[Batch]) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in batches:
            target = self.target(batch)
            if target is None:
                raise TaskError(f"metric {self.as_metric().name!r} needs labels, but Task.target gives None")
            logits = self.logits(self.forward(predict, batch))
            yield logits, target.to(logits.device)

    def _ready(self, predict: Predict, batches: Iterable[Batch]) -> float:
        per_batch, _, scale, _ = METRICS[str(self.metric)]
        total, count = 0.0, 0
        for logits, target in self._pairs(predict, batches):
            batch_sum, size = per_batch(logits, target)
            total, count = total + batch_sum, count + size
        return scale * total / count if count else math.nan

    def _torchmetric(self, predict: Predict, batches: Iterable[Batch]) -> float:
        metric: Any = self.metric
        metric.reset()
        for logits, target in self._pairs(predict, batches):
            metric.update(logits, target)
        return metric.compute()  # type: ignore[no-any-return]
