"""What the user brings: data, a metric, and how a batch goes into the model."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from itertools import islice
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence

from torchslim.core.checks import check_fields, shown
from torchslim.core.isolation import unfused_attention
from torchslim.errors import TaskError

Batch = Any
Outputs = Any
Predict = Callable[..., Outputs]

LABELS = ("labels", "label", "target", "targets", "y")
MASKS = ("attention_mask", "mask")  # 1 where a token is real; torch's own padding masks mean the opposite


@runtime_checkable
class TorchMetric(Protocol):
    """What is used of a `torchmetrics.Metric`."""

    def update(self, preds: Tensor, target: Tensor) -> None: ...
    def compute(self) -> Any: ...
    def reset(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """How good a model is: `fn(predict, batches)` returns one number.

    `predict` is called like the model and returns like the model; the same metric therefore runs on the
    original, on every intermediate model and on the deployed artifact.
    """

    fn: Callable[[Predict, Iterable[Batch]], float]
    name: str = "metric"
    higher_is_better: bool = True
    unit: str = ""

    def __post_init__(self) -> None:
        check_fields(self, TaskError, "Metric: ")

    def better(self, value: float, than: float | None) -> bool:
        """Is `value` strictly better?"""
        return than is None or (value > than if self.higher_is_better else value < than)


def batch_inputs(batch: Batch) -> tuple[Any, ...] | dict[str, Any]:
    """What of a batch goes into the model: of `(x, ..., y)` all but the last, of a dict all but the labels."""
    if isinstance(batch, Mapping):
        return {key: value for key, value in batch.items() if key not in LABELS}
    if isinstance(batch, (tuple, list)):
        return tuple(batch[:-1]) if len(batch) > 1 else tuple(batch)
    return (batch,)


def batch_target(batch: Batch) -> Tensor | None:
    """The labels of a batch: the last of a tuple, or a dict's `labels`; None where there are none."""
    if isinstance(batch, Mapping):
        return next((batch[key] for key in LABELS if key in batch), None)
    if isinstance(batch, (tuple, list)) and len(batch) > 1:
        return batch[-1]  # type: ignore[no-any-return]
    return None


def batch_mask(batch: Batch) -> Tensor | None:
    """The padding mask of a dict batch, where it has one."""
    return next((batch[key] for key in MASKS if key in batch), None) if isinstance(batch, Mapping) else None


def output_logits(outputs: Outputs) -> Tensor:
    """The tensor that a response loss compares: the output, its `logits`, or its first element."""
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs, Mapping) and "logits" in outputs:
        return outputs["logits"]  # type: ignore[no-any-return]
    if hasattr(outputs, "logits"):
        return outputs.logits  # type: ignore[no-any-return]
    if isinstance(outputs, (tuple, list)) and outputs and isinstance(outputs[0], Tensor):
        return outputs[0]
    raise TaskError(f"no logits in an output of type {type(outputs).__name__}; give Task(logits=...)")


def default_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross entropy for integer labels, mean squared error for real targets.

    Shapes: (batch, classes, ...) with (batch, ...), or (batch, ..., classes) with (batch, ...), or equal shapes.
    Label -100 is ignored.
    """
    if target.is_floating_point():
        if target.numel() != logits.numel():
            raise TaskError(
                f"outputs of shape {tuple(logits.shape)} do not fit real targets of shape {tuple(target.shape)}; give "
                "Task(loss=...) or Task(logits=...)"
            )
        return functional.mse_loss(logits, target.reshape(logits.shape).to(logits.dtype))
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
        return logits.flatten()[:0].sum()  # nothing to learn from: a mean over no label would be NaN
    return functional.cross_entropy(logits, target)


def _classes_second(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    alike = logits.shape[:1] == target.shape[:1] and logits.shape[2:] == target.shape[1:]
    if logits.dim() == target.dim() + 1 and alike:
        return logits, target
    if logits.dim() == target.dim() + 1 and logits.shape[:-1] == target.shape:  # tokens: (batch, time, vocab)
        return logits.movedim(-1, 1), target
    raise TaskError(
        f"logits of shape {tuple(logits.shape)} do not fit labels of shape {tuple(target.shape)}; "
        "give Task(loss=...) or Task(logits=...)"
    )


# Ready metrics see each batch's (logits, target) and return (sum, count).
def _accuracy(logits: Tensor, target: Tensor) -> tuple[float, int]:
    logits, target = _classes_second(logits, target)
    counted = target != -100
    return float((logits.argmax(1) == target)[counted].sum()), int(counted.sum())


def _absolute_error(logits: Tensor, target: Tensor) -> tuple[float, int]:
    return float((logits - target.reshape(logits.shape)).abs().sum()), target.numel()


METRICS: Mapping[str, tuple[Callable[[Tensor, Tensor], tuple[float, int]], bool, float, str]] = {
    # name: (per batch, higher is better, scale, unit)
    "accuracy": (_accuracy, True, 100.0, "%"),
    "mae": (_absolute_error, False, 1.0, ""),
}


@dataclass(frozen=True, kw_only=True)
class Task:
    """Data, metric, and the reading of a batch. Everything but `val` and `metric` has a default.

    The defaults understand `(x, y)` tuples, dicts and Hugging Face batches and outputs. `metric` is a name of
    `METRICS`, a `Metric`, a `torchmetrics.Metric`, or a plain function `metric(predict, batches) -> float`, which
    counts as higher-is-better. `examples` are further calls of the model, of branches and methods that a batch does not
    reach, such as `[(x, 1), {"method": "embed", "args": (x,)}]`: channel pruning looks at all of them.
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
        """The model's outputs on a batch."""
        return call(model, self.inputs(batch))

    def compute_loss(self, outputs: Outputs, batch: Batch) -> Tensor | None:
        """The label loss, a scalar; None where the batch has no labels and no `loss` was given."""
        if self.loss is not None:
            return self.loss(outputs, batch)
        target = self.target(batch)
        return None if target is None else default_loss(self.logits(outputs), target)

    def as_metric(self) -> Metric:
        """The task's metric in one form."""
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
        """The metric of `predict` on a split.

        Raises:
            TaskError: when the split has no batches, or the metric is not one finite number.
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
        """Whole batches, labels and all: `calibration`, or the first `samples` of train (of val without train)."""
        split, count = self.calibration_split, 0
        for batch in checked(getattr(self, split), split):
            yield batch
            count += batch_size(self.inputs(batch))
            if split != "calibration" and count >= samples:
                break

    @property
    def calibration_split(self) -> str:
        """The split that statistics are taken from."""
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
            part, size = per_batch(logits, target)
            total, count = total + part, count + size
        return scale * total / count if count else math.nan

    def _torchmetric(self, predict: Predict, batches: Iterable[Batch]) -> float:
        metric: Any = self.metric
        metric.reset()
        for logits, target in self._pairs(predict, batches):
            metric.update(logits, target)
        return metric.compute()  # type: ignore[no-any-return]


def call(function: Callable[..., Outputs], inputs: Any) -> Outputs:
    """Call with a tuple of positional or a dict of keyword arguments."""
    if isinstance(inputs, Mapping):
        return function(**inputs)
    return function(*inputs) if isinstance(inputs, (tuple, list)) else function(inputs)


def checked(batches: Iterable[Batch] | None, name: str) -> Iterator[Batch]:
    """Iterate over batches; a split that is missing or empty raises TaskError."""
    if batches is None:
        raise TaskError(f"the task has no {name} batches; give Task({name}=...)")
    empty = True
    for batch in batches:
        empty = False
        yield batch
    if empty:
        raise TaskError(f"{name} gave no batch; it is empty, or was used up by an earlier pass")


class _Checked:
    """A split as a metric sees it: iterated as often as it likes, with the loader's length, and not empty."""

    def __init__(self, batches: Iterable[Batch] | None, name: str) -> None:
        self.batches, self.name = batches, name

    def __iter__(self) -> Iterator[Batch]:
        return checked(self.batches, self.name)

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]


def take_first(batches: Iterable[Batch] | None, name: str) -> Batch:
    """The first batch of a split."""
    return next(islice(checked(batches, name), 1))


def tensors(tree: Any) -> list[Tensor]:
    """All tensors of nested tuples, lists, dicts and dataclasses, in order."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    changed(tree, note)
    return found


def to_device(tree: Any, device: torch.device | str) -> Any:
    """The same tree with every tensor on `device`."""
    return changed(tree, lambda tensor: tensor.to(device))


def dtype_of(model: nn.Module) -> torch.dtype | None:
    """The floating-point type of the model's parameters; None where there are several, or none."""
    found = {each.dtype for each in model.parameters() if each.is_floating_point()}
    return found.pop() if len(found) == 1 else None


def to_dtype(tree: Any, dtype: torch.dtype | None) -> Any:
    """The same tree with every floating-point tensor of that type; None changes nothing."""
    if dtype is None:
        return tree
    return changed(tree, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)


def changed(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same containers with their tensors changed; other leaves stay."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, Mapping):
        values = {key: changed(each, change) for key, each in tree.items()}
        return values if type(tree) is dict else _rebuilt(tree, values)
    if isinstance(tree, PackedSequence):  # its indices go with the data, but how many samples have each step, does not
        data, indices = change(tree.data), (tree.sorted_indices, tree.unsorted_indices)
        return PackedSequence(
            data, tree.batch_sizes, *(each if each is None else each.to(data.device) for each in indices)
        )
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(changed(each, change) for each in tree))
    if isinstance(tree, (tuple, list)):
        return type(tree)(changed(each, change) for each in tree)
    if is_dataclass(tree) and not isinstance(tree, type):
        values = {each.name: changed(getattr(tree, each.name), change) for each in fields(tree)}
        copied = copy.copy(tree)
        for name, value in values.items():
            object.__setattr__(copied, name, value)  # frozen ones too, and without running their checks again
        return copied
    return tree


def _rebuilt(tree: Mapping[str, Any], values: dict[str, Any]) -> Any:
    """A mapping of the same kind; a Hugging Face output or batch takes its fields as keywords or as one dict."""
    try:
        return type(tree)(**values) if is_dataclass(tree) else type(tree)(values)  # type: ignore[call-arg]
    except TypeError:
        return values


def batch_size(inputs: Any) -> int:
    """The size of the first dimension of the first tensor that has one."""
    return next((int(tensor.shape[0]) for tensor in tensors(inputs) if tensor.dim()), 1)


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter or buffer lives; CPU when it has none."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def predictor(model: nn.Module) -> Predict:
    """`model` in eval mode without gradients, called with inputs on any device and answering on theirs."""

    def predict(*args: Any, **kwargs: Any) -> Outputs:
        modes = [(module, module.training) for module in model.modules() if module.training]
        given = tensors((args, kwargs))
        home, away = device_of(model), given[0].device if given else None
        for module, _ in modes:
            module.training = False
        try:
            # in eval mode PyTorch's fused kernel for encoders gives 0 at padded positions, as no other way does
            with torch.no_grad(), unfused_attention():
                if away is None or away == home:
                    return model(*args, **kwargs)
                args, kwargs = to_device((args, kwargs), home)
                return to_device(model(*args, **kwargs), away)
        finally:
            for module, training in modes:
                module.training = training

    return predict
