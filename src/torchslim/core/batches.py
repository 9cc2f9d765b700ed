"""Split batches into inputs, targets and masks, and call models with them."""

from __future__ import annotations

import inspect
import math
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from torchslim.core.isolation import unfused_attention
from torchslim.core.train_modes import eval_mode
from torchslim.core.trees import device_of, tensors, to_device
from torchslim.errors import TaskError

Batch = Any
T = TypeVar("T")
Outputs = Any
Predict = Callable[..., Outputs]
LABELS = ("labels", "label", "target", "targets", "y")
EXAMPLES = 8  # inputs of different sizes that a program is captured with
MASKS = ("attention_mask", "mask")  # 1 where a token is real; torch's own padding masks mean the opposite


def batch_inputs(batch: Batch) -> tuple[Any, ...] | dict[str, Any]:
    """Model inputs of a batch: all of `(x, ..., y)` except the last, all of a dict except the labels."""
    if isinstance(batch, Mapping):
        return {key: value for key, value in batch.items() if key not in LABELS}
    if isinstance(batch, (tuple, list)):
        return tuple(batch[:-1]) if len(batch) > 1 else tuple(batch)
    return (batch,)


def batch_target(batch: Batch) -> Tensor | None:
    """Labels of a batch: the last element of a tuple, or a dict's `labels`; None if it has none."""
    if isinstance(batch, Mapping):
        return next((batch[key] for key in LABELS if key in batch), None)
    if isinstance(batch, (tuple, list)) and len(batch) > 1:
        return batch[-1]  # type: ignore[no-any-return]
    return None


def batch_mask(batch: Batch) -> Tensor | None:
    """Padding mask of a dict batch; None if it has none."""
    return next((batch[key] for key in MASKS if key in batch), None) if isinstance(batch, Mapping) else None


def output_logits(outputs: Outputs) -> Tensor:
    """Tensor that a response loss compares: the output, its `logits`, or its first element."""
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs, Mapping) and "logits" in outputs:
        return outputs["logits"]  # type: ignore[no-any-return]
    if hasattr(outputs, "logits"):
        return outputs.logits  # type: ignore[no-any-return]
    if isinstance(outputs, (tuple, list)) and outputs and isinstance(outputs[0], Tensor):
        return outputs[0]
    raise TaskError(f"no logits in an output of type {type(outputs).__name__}; give Task(logits=...)")


def call(function: Callable[..., Outputs], inputs: Any) -> Outputs:
    """Call `function` with a tuple of positional or a dict of keyword arguments."""
    if isinstance(inputs, Mapping):
        return function(**inputs)
    return function(*inputs) if isinstance(inputs, (tuple, list)) else function(inputs)


def checked(batches: Iterable[Batch] | None, name: str) -> Iterator[Batch]:
    """Iterate over batches; raise TaskError if the split is missing or empty."""
    if batches is None:
        raise TaskError(f"the task has no {name} batches; give Task({name}=...)")
    empty = True
    iterator = iter(batches)
    while True:
        try:
            batch = next(iterator)
        except StopIteration:
            break
        except (RuntimeError, TypeError) as error:
            if not _from_collating(error):
                raise
            raise TaskError(
                f"the samples of {name} do not fit into one batch ({_last_line(error)}); give its DataLoader a "
                "collate_fn that pads them to one size, or batch_size=1"
            ) from error
        empty = False
        yield batch
    if empty:
        raise TaskError(f"{name} gave no batch; it is empty, or was used up by an earlier pass")


def _from_collating(error: Exception) -> bool:
    """Whether an error arose where a DataLoader joins samples, in this process or in a worker, which sends its text."""
    frames = traceback.extract_tb(error.__traceback__)
    return any("collate" in frame.name for frame in frames) or ", in collate" in str(error)


def _last_line(error: Exception) -> str:
    """The last line of an error's text; that of a worker's error follows its traceback."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1]}"[:300]


class _Checked:
    """A split for a metric: can be iterated several times, has the loader's length, raises TaskError if empty."""

    def __init__(self, batches: Iterable[Batch] | None, name: str) -> None:
        self.batches, self.name = batches, name

    def __iter__(self) -> Iterator[Batch]:
        return checked(self.batches, self.name)

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]


def take_first(batches: Iterable[Batch] | None, name: str) -> Batch:
    """First batch of a split."""
    return next(islice(checked(batches, name), 1))


def batch_size(inputs: Any) -> int:
    """Size of the first dimension of the first tensor that has one; 1 if none has."""
    return next((int(tensor.shape[0]) for tensor in tensors(inputs) if tensor.dim()), 1)


def spanning(items: Iterable[T], most: int, inputs: Callable[[T], Any]) -> list[T]:
    """Up to `most` items whose sizes span those of all: the first, the smallest, the largest, and further sizes.

    Args:
        items: batches or calls, each looked at once.
        most: largest number of items to return.
        inputs: returns the model inputs of an item.
    """
    by_shapes: dict[tuple[tuple[int, ...], ...], T] = {}
    for item in items:
        by_shapes.setdefault(tuple(tuple(tensor.shape) for tensor in tensors(inputs(item))), item)
    by_size = sorted(by_shapes, key=lambda shapes: sum(map(math.prod, shapes)))
    ordered = dict.fromkeys((*list(by_shapes)[:1], *by_size[:1], *by_size[-1:], *by_shapes))
    return [by_shapes[shapes] for shapes in list(ordered)[:most]]


class Predictor:
    """Runs a model in eval mode without gradients, with inputs and outputs on any one device.

    Methods of the model, such as `generate`, run in the same way; other attributes are the model's own.
    """

    def __init__(self, model: nn.Module, method: str = "") -> None:
        self.model, self.method = model, method

    def __call__(self, *args: Any, **kwargs: Any) -> Outputs:
        model = self.model
        function = getattr(model, self.method) if self.method else model
        arguments = tensors((args, kwargs))
        home, away = device_of(model), arguments[0].device if arguments else None
        # in eval mode PyTorch's fused encoder kernel gives 0 at padded positions; no other implementation does
        with eval_mode(model), torch.no_grad(), unfused_attention():
            if away is None or away == home:
                return function(*args, **kwargs)
            args, kwargs = to_device((args, kwargs), home)
            return to_device(function(*args, **kwargs), away)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = getattr(self.model, name)
        bound_to_model = inspect.ismethod(value) and value.__self__ is self.model
        return Predictor(self.model, name) if bound_to_model else value


def predictor(model: nn.Module) -> Predict:
    """Function that runs `model` in eval mode without gradients; its attributes are the model's."""
    return Predictor(model)
