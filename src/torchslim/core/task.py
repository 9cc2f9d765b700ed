"""The user's task: data, a metric, and how a batch is passed to the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

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
from torchslim.core.imports import resolve
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

    @classmethod
    def from_lightning(
        cls,
        module: nn.Module,
        data: Any = None,
        *,
        metric: Metric | TorchMetric | Callable[[Predict, Iterable[Batch]], float] | str,
        model: str = "",
        higher_is_better: bool | None = None,
        loss: Callable[[Outputs, Batch], Tensor] | None = None,
        **options: Any,
    ) -> Task:
        """The task of a LightningModule: the loaders of its data, the loss of its training_step.

        Args:
            module: a LightningModule; it is copied and never modified.
            data: a LightningDataModule; without one, the module's own loaders, or `train`, `val` and `test`.
            metric: a name that validation_step logs or returns, or a metric as `Task` takes it.
            model: name of the part that is compressed, such as "net"; empty: the module itself.
            higher_is_better: of a logged metric; None: False for names with "loss" or "error".
            loss: loss(outputs, batch), instead of that of training_step.
            options: further arguments of `Task`.

        Raises:
            TaskError: training_step, validation_step or the data cannot be used; the message says what to give instead.
        """
        fields = {"metric": metric, "model": model, "higher_is_better": higher_is_better, "loss": loss, **options}
        return _adapted("lightning", module, data, **fields)

    @classmethod
    def from_transformers(
        cls,
        source: Any,
        *,
        train: Any = None,
        val: Any = None,
        test: Any = None,
        metric: Metric | TorchMetric | Callable[[Predict, Iterable[Batch]], float] | str | None = None,
        higher_is_better: bool | None = None,
        data_collator: Callable[[list[Any]], Any] | None = None,
        compute_metrics: Callable[[Any], Mapping[str, float]] | None = None,
        label_names: Sequence[str] | None = None,
        batch_size: int | None = None,
        loss: Callable[[Outputs, Batch], Tensor] | None = None,
        **options: Any,
    ) -> Task:
        """The task of a Hugging Face model: its data sets, its own loss, and a metric of `compute_metrics`.

        Args:
            source: a PreTrainedModel, or a transformers.Trainer, which has defaults for all other arguments.
            train, val, test: data sets of dicts with the model's arguments and labels, or DataLoaders.
            metric: a key of what `compute_metrics` returns, or a metric as `Task` takes it.
            higher_is_better: of a key of `compute_metrics`; None: False for names that end in "loss".
            data_collator: makes a batch of samples; None: pads sequences to the longest of the batch.
            compute_metrics: takes a transformers.EvalPrediction, as a Trainer's does.
            label_names: columns that are no inputs of the deployed model; default "labels".
            batch_size: of all splits; default 32, or that of the Trainer.
            loss: loss(outputs, batch), instead of the model's own.
            options: further arguments of `Task`.

        Raises:
            TaskError: the model, the data or the metric cannot be used; the message says what to give instead.
        """
        data = {"train": train, "val": val, "test": test, "data_collator": data_collator, "batch_size": batch_size}
        metrics = {"metric": metric, "higher_is_better": higher_is_better, "compute_metrics": compute_metrics}
        return _adapted("transformers", source, **data, **metrics, label_names=label_names, loss=loss, **options)

    @classmethod
    def from_timm(
        cls,
        model: nn.Module,
        *,
        val: Any,
        train: Any = None,
        test: Any = None,
        metric: Metric | TorchMetric | Callable[[Predict, Iterable[Batch]], float] | str = "accuracy",
        batch_size: int = 32,
        workers: int = 0,
        augment: dict[str, Any] | None = None,
        **options: Any,
    ) -> Task:
        """The task of a timm model: images, with the size and normalization that the model was trained with.

        Args:
            model: a result of timm.create_model.
            val, train, test: folders with a folder of images for each class, or data sets of (PIL image, label).
            metric: as `Task` takes it.
            batch_size, workers: of the loaders.
            augment: arguments of timm.data.create_transform for the training images.
            options: further arguments of `Task`.

        Raises:
            TaskError: the model or the data cannot be used.
        """
        fields = {"metric": metric, "batch_size": batch_size, "workers": workers, "augment": augment, **options}
        return _adapted("timm", model, val=val, train=train, test=test, **fields)

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


def _adapted(library: str, *args: Any, **fields: Any) -> Task:
    """The task that an adapter makes; it is imported by name, as it stands above this package."""
    made: Task = resolve(f"torchslim.adapters.{library}:task", "the adapter", TaskError)(*args, **fields)
    return made
