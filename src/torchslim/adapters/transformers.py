"""The task of a Hugging Face model or Trainer: data sets, a collator, compute_metrics and the model's own loss."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torchslim.adapters.loaders import first_of, loader
from torchslim.core.batches import Batch, Outputs, Predict, call, predictor
from torchslim.core.checks import got
from torchslim.core.imports import foreign
from torchslim.core.isolation import preserved_globals
from torchslim.core.metrics import Metric
from torchslim.core.task import Task
from torchslim.core.trees import changed
from torchslim.errors import TaskError

IGNORED = -100
"""Marks labels, and predictions beyond the end of a shorter batch, as a Trainer does."""

RENAMED = ("label", "label_ids")
"""Columns that the library's collators rename to "labels"."""

SAME = 1e-3
"""The largest relative difference between the model's own loss and the one that is computed from its outputs."""

Columns = Sequence[str]


def task(
    source: Any,
    *,
    train: Any = None,
    val: Any = None,
    test: Any = None,
    metric: Any = None,
    higher_is_better: bool | None = None,
    data_collator: Callable[[list[Any]], Any] | None = None,
    compute_metrics: Callable[[Any], Mapping[str, float]] | None = None,
    label_names: Sequence[str] | None = None,
    batch_size: int | None = None,
    loss: Callable[[Outputs, Batch], Tensor] | None = None,
    **options: Any,
) -> Task:
    """See `Task.from_transformers`.

    Raises:
        TaskError: no model or Trainer, no data, or a loss or metric that cannot be used.
    """
    model, trainer = _model_of(source)
    args = getattr(trainer, "args", SimpleNamespace())
    compute_metrics = compute_metrics or getattr(trainer, "compute_metrics", None)
    labels = tuple(label_names or getattr(trainer, "label_names", None) or ("labels",))
    collate = _Collate(
        data_collator or getattr(trainer, "data_collator", None) or pad_to_longest(model),
        (*_arguments(model), *labels, *RENAMED),
    )
    given = {"train": train, "val": val, "test": test}
    own = {"train": getattr(trainer, "train_dataset", None), "val": getattr(trainer, "eval_dataset", None)}
    sizes = {name: batch_size or getattr(args, f"{kind}_batch_size", 32) for name, kind in KINDS.items()}
    splits = {
        name: loader(samples, name, batch_size=sizes[name], collate=collate)
        for name in given
        if (samples := own.get(name) if given[name] is None else given[name]) is not None
    }
    if "val" not in splits:
        raise TaskError("val is None; give val=data set, or a Trainer with an eval_dataset")
    batches = _Batches(labels)
    if loss is None and "train" in splits and any(label in first_of(splits["train"], "train") for label in labels):
        loss = _OwnLoss(model, labels)
        loss.check(first_of(splits["train"], "train"))
    if metric is None:
        metric = getattr(args, "metric_for_best_model", None)
        higher_is_better = getattr(args, "greater_is_better", None) if higher_is_better is None else higher_is_better
    if compute_metrics is not None and isinstance(metric, str):
        metric = _named(metric, compute_metrics, model, trainer, labels, higher_is_better)
    if metric is None:
        raise TaskError("metric is None; give metric='accuracy', a function, or a key of what compute_metrics returns")
    read = {"inputs": batches.inputs, "target": batches.target}
    return Task(**{"train": None, **splits, **read, **options}, metric=metric, loss=loss)


KINDS: Mapping[str, str] = {"train": "train", "val": "eval", "test": "eval"}
"""Names of a Trainer's arguments, by split."""


def _model_of(source: Any) -> tuple[nn.Module, Any]:
    """The model, and the Trainer if one was given."""
    trainer = None if isinstance(source, nn.Module) else source
    model = getattr(trainer, "model", None) if trainer is not None else source
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise TaskError(f"source must be a PreTrainedModel or a transformers.Trainer with one, {got(source)}")
    return model, trainer


def _arguments(model: nn.Module) -> Columns:
    return [name for name in inspect.signature(model.forward).parameters if name not in ("args", "kwargs")]


@dataclass(frozen=True)
class _Collate:
    """A collator that receives only the columns that the model or its loss takes."""

    collator: Callable[[list[Any]], Any]
    columns: Columns

    def __call__(self, samples: list[Any]) -> Any:
        return self.collator([self._kept(sample) if isinstance(sample, Mapping) else sample for sample in samples])

    def _kept(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in sample.items() if name in self.columns}


def pad_to_longest(model: nn.Module) -> Callable[[list[Mapping[str, Any]]], dict[str, Tensor]]:
    """A collator that stacks samples, and pads sequences at their end to the longest of the batch."""
    padding = getattr(model.config, "pad_token_id", None)
    fills = {"input_ids": padding if isinstance(padding, int) else 0, "labels": IGNORED}

    def collate(samples: list[Mapping[str, Any]]) -> dict[str, Tensor]:
        if not isinstance(samples[0], Mapping):
            raise TaskError(f"a sample must be a dict of the model's arguments, {got(samples[0])}; give data_collator=")
        columns = {name: [torch.as_tensor(sample[name]) for sample in samples] for name in samples[0]}
        if "label" in columns:
            columns["labels"] = columns.pop("label")
        return {name: _stacked(values, fills.get(name, 0)) for name, values in columns.items()}

    return collate


def _stacked(values: Sequence[Tensor], fill: int) -> Tensor:
    """Values of one column as one tensor, padded at the end of their first dimension."""
    if values[0].dim() == 0 or len({len(value) for value in values}) == 1:
        return torch.stack([*values])
    return nn.utils.rnn.pad_sequence([*values], batch_first=True, padding_value=fill)


@dataclass(frozen=True)
class _Batches:
    """Reads batches: labels are no input."""

    labels: Columns

    def inputs(self, batch: Batch) -> dict[str, Any]:
        return {name: value for name, value in batch.items() if name not in self.labels}

    def target(self, batch: Batch) -> Tensor | None:
        """The labels; None where there are none, or several columns of them."""
        return batch.get(self.labels[0]) if len(self.labels) == 1 else None


@dataclass(frozen=True)
class _OwnLoss:
    """The loss that the model's class computes when a batch has labels, from its outputs."""

    model: nn.Module
    labels: Columns

    def __call__(self, outputs: Outputs, batch: Batch) -> Tensor:
        values = {name: value for name, value in outputs.items() if isinstance(value, Tensor)}
        logits = values.get("logits")
        config: Any = self.model.config
        arguments = {
            **values,
            **{name: batch[name] for name in self.labels},
            "pooled_logits": logits,
            "config": config,
            "vocab_size": getattr(config, "vocab_size", None),
            "device": None if logits is None else logits.device,
        }
        function: Any = self.model.loss_function
        loss = function(**arguments)
        return loss[0] if isinstance(loss, tuple) else loss  # type: ignore[no-any-return]

    def check(self, batch: Batch) -> None:
        """Raise TaskError unless it is the model's own loss on a batch."""
        mend = "give loss=function(outputs, batch)"
        with preserved_globals(), foreign(f"the loss of {type(self.model).__name__} cannot be used; {mend}", TaskError):
            predict = predictor(self.model)
            outputs = predict(**batch)
            own = outputs.get("loss")
            if own is None:
                raise TaskError(f"{type(self.model).__name__} returns no loss for {', '.join(batch)}; {mend}")
            inputs = {name: value for name, value in batch.items() if name not in self.labels}
            loss = self(call(predict, inputs), batch)
            if abs(float(loss) - float(own)) > SAME * max(abs(float(own)), 1e-6):
                raise TaskError(
                    f"the loss of {type(self.model).__name__} is {float(own):g}, but {float(loss):g} from its outputs "
                    f"alone; {mend}"
                )


def _named(
    name: str,
    compute: Callable[[Any], Mapping[str, float]],
    model: nn.Module,
    trainer: Any,
    labels: Columns,
    higher_is_better: bool | None,
) -> Metric:
    """The metric that `compute_metrics` returns under a name."""
    key = name.removeprefix("eval_")
    ignored = getattr(model.config, "keys_to_ignore_at_inference", None) or ()
    preprocess = getattr(trainer, "preprocess_logits_for_metrics", None)
    function = _Computed(key, compute, labels, (*ignored, "loss"), preprocess)
    higher = not key.endswith("loss") if higher_is_better is None else higher_is_better
    return Metric(fn=function, name=key, higher_is_better=higher)


@dataclass(frozen=True)
class _Computed:
    """One value of `compute_metrics` over all batches."""

    key: str
    compute: Callable[[Any], Mapping[str, float]]
    labels: Columns
    ignored: Columns
    preprocess: Callable[[Any, Any], Any] | None

    def __call__(self, predict: Predict, batches: Iterable[Batch]) -> float:
        from transformers import EvalPrediction

        predictions, labels = [], []
        for batch in batches:
            inputs = {name: value for name, value in batch.items() if name not in self.labels}
            values = predict(**inputs)
            kept = tuple(self._kept(values))
            label = tuple(batch[name] for name in self.labels if name in batch)
            if self.preprocess is not None:
                kept = _tuple(self.preprocess(_single(kept), _single(label)))
            predictions.append(_arrays(kept))
            labels.append(_arrays(label))
        result = self.compute(EvalPrediction(_single(_joined(predictions)), _single(_joined(labels))))
        by_key = {name.removeprefix("eval_"): value for name, value in result.items()}
        if self.key not in by_key:
            names = ", ".join(by_key)
            raise TaskError(f"compute_metrics returns no {self.key!r}, only {names}; give metric= one of them")
        return float(by_key[self.key])

    def _kept(self, outputs: Any) -> Iterator[Any]:
        if not isinstance(outputs, Mapping):
            yield outputs
            return
        yield from (value for name, value in outputs.items() if name not in self.ignored and value is not None)


def _tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _single(values: Sequence[Any]) -> Any:
    """The only one of several values, or else all as a tuple; None for none."""
    return (values[0] if values else None) if len(values) < 2 else tuple(values)


def _arrays(values: Sequence[Any]) -> list[Any]:
    return [changed(value, lambda tensor: tensor.detach().cpu()) for value in values]


def _joined(batches: Sequence[Sequence[Any]]) -> list[Any]:
    """Arrays of all batches, one for each value; shorter batches are padded along the second dimension."""
    return [_join([batch[place] for batch in batches]) for place in range(len(batches[0]) if batches else 0)]


def _join(values: Sequence[Any]) -> Any:
    if isinstance(values[0], (tuple, list)):
        return tuple(_join([value[place] for value in values]) for place in range(len(values[0])))
    arrays = [np.asarray(value.float() if value.dtype == torch.bfloat16 else value) for value in values]
    if arrays[0].ndim < 2:
        return np.concatenate([np.atleast_1d(array) for array in arrays])
    longest = max(array.shape[1] for array in arrays)
    widths = [[(0, 0), (0, longest - array.shape[1]), *[(0, 0)] * (array.ndim - 2)] for array in arrays]
    padded = [np.pad(array, width, constant_values=IGNORED) for array, width in zip(arrays, widths, strict=True)]
    return np.concatenate(padded)
