"""Metrics by name or by function, and the default loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor
from torch.nn import functional

from torchslim.core.batches import (
    Batch,
    Predict,
)
from torchslim.core.checks import check_fields
from torchslim.errors import TaskError


@runtime_checkable
class TorchMetric(Protocol):
    """The methods of `torchmetrics.Metric` that torchslim calls."""

    def update(self, preds: Tensor, target: Tensor) -> None: ...
    def compute(self) -> Any: ...
    def reset(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A measure of a model's accuracy: `fn(predict, batches)` returns one number.

    `predict` is called like the model and returns what the model returns; the same metric therefore runs on the
    original, on every intermediate model and on the deployed artifact.
    """

    fn: Callable[[Predict, Iterable[Batch]], float]
    name: str = "metric"
    higher_is_better: bool = True
    unit: str = ""

    def __post_init__(self) -> None:
        check_fields(self, TaskError, "Metric: ")

    def better(self, value: float, than: float | None) -> bool:
        """Whether `value` is strictly better than `than`; True if `than` is None."""
        return than is None or (value > than if self.higher_is_better else value < than)


def default_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross entropy for integer labels, mean squared error for real targets.

    Shapes: (batch, classes, ...) with (batch, ...), or (batch, ..., classes) with (batch, ...), or equal shapes.
    Label -100 is ignored.
    """
    if target.is_floating_point():
        return functional.mse_loss(logits, _like(target, logits).to(logits.dtype))
    target = target.long()
    logits, target = _classes_second(logits, target)
    classes = logits.shape[1]
    counted = target[target != -100]
    if counted.numel() and (counted.min() < 0 or counted.max() >= classes):
        raise TaskError(
            f"labels must be in [0, {classes}) for {classes} outputs, got {int(counted.min())} to "
            f"{int(counted.max())}; mark labels to leave out with -100"
        )
    if not counted.numel():
        return logits.flatten()[:0].sum()  # no labels: their mean would be NaN
    return functional.cross_entropy(logits, target)


def _like(target: Tensor, logits: Tensor) -> Tensor:
    """Real targets in the shape of the outputs."""
    if target.numel() != logits.numel():
        raise TaskError(
            f"outputs of shape {tuple(logits.shape)} do not fit real targets of shape {tuple(target.shape)}; give "
            "Task(loss=...) or Task(logits=...)"
        )
    return target.reshape(logits.shape)


def _classes_second(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    same_sizes = logits.shape[:1] == target.shape[:1] and logits.shape[2:] == target.shape[1:]
    if logits.dim() == target.dim() + 1 and same_sizes:
        return logits, target
    if logits.dim() == target.dim() + 1 and logits.shape[:-1] == target.shape:  # tokens: (batch, time, vocab)
        return logits.movedim(-1, 1), target
    raise TaskError(
        f"logits of shape {tuple(logits.shape)} do not fit labels of shape {tuple(target.shape)}; "
        "give Task(loss=...) or Task(logits=...)"
    )


# Built-in metrics take a batch's (logits, target) and return (sum, count).
def _accuracy(logits: Tensor, target: Tensor) -> tuple[float, int]:
    logits, target = _classes_second(logits, target)
    counted = target != -100
    return float((logits.argmax(1) == target)[counted].sum()), int(counted.sum())


def _absolute_error(logits: Tensor, target: Tensor) -> tuple[float, int]:
    return float((logits - _like(target, logits)).abs().sum()), target.numel()


METRICS: Mapping[str, tuple[Callable[[Tensor, Tensor], tuple[float, int]], bool, float, str]] = {
    # name: (per batch, higher is better, scale, unit)
    "accuracy": (_accuracy, True, 100.0, "%"),
    "mae": (_absolute_error, False, 1.0, ""),
}
