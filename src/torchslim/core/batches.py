"""Batches as models take them: inputs, targets, masks, and calls of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from torchslim.core.isolation import unfused_attention
from torchslim.core.trees import device_of, tensors, to_device
from torchslim.errors import TaskError

Batch = Any
Outputs = Any
Predict = Callable[..., Outputs]
LABELS = ("labels", "label", "target", "targets", "y")
MASKS = ("attention_mask", "mask")  # 1 where a token is real; torch's own padding masks mean the opposite


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


def batch_size(inputs: Any) -> int:
    """The size of the first dimension of the first tensor that has one."""
    return next((int(tensor.shape[0]) for tensor in tensors(inputs) if tensor.dim()), 1)


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
