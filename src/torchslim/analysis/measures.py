"""Measures of how a change of a model affects its outputs or its metric, with any code that runs the model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from torchslim.core.batches import Batch, predictor
from torchslim.core.isolation import preserved_globals
from torchslim.core.parts import signature_of
from torchslim.core.task import Task
from torchslim.core.trees import tensors
from torchslim.errors import TaskError
from torchslim.graph.calling import bind_call
from torchslim.quantize.layerwise import LIMIT, noise_of
from torchslim.training.loaders import seeded_splits

Measure = Literal["sqnr", "kl", "metric"]
MEASURES: Mapping[str, str] = {
    "sqnr": "signal to quantization noise of all floating-point outputs on calibration data, in dB",
    "kl": "KL(softmax of the float logits || those of the changed model) on calibration data, in nats",
    "metric": "the task's metric on val, in its own unit",
}
LARGEST_NATS = 1e4  # reported for an infinite divergence
LARGEST_DB = 200.0  # reported for no change at all; float64 sums are no more precise


class Runs(Protocol):
    """Runs of a model with one change at a time: `quantize.layerwise.Passes`, `activation_cache.Replays`."""

    def outputs(self, change: Any = None) -> Iterator[Any]:
        """Outputs on each of the inputs that the runs were made with."""
        ...

    def answer(self, change: Any, inputs: Any) -> Any:
        """Outputs on other inputs."""
        ...


class Gauge(Protocol):
    """Measures changes against a reference."""

    unit: str
    higher_is_better: bool
    reference: float | None
    inputs: Sequence[Any]  # inputs that `Runs` must be made with

    def start(self, runs: Runs) -> None:
        """Measure the model without a change, where that is needed."""
        ...

    def value(self, runs: Runs, change: Any) -> float:
        """Value of the measure with a change."""
        ...


class OutputGauge:
    """Compares outputs on calibration batches, by "sqnr" or "kl"."""

    reference: float | None

    def __init__(self, measure: Measure, task: Task, batches: Sequence[Batch]) -> None:
        self.measure, self.task, self.batches = measure, task, batches
        self.inputs: Sequence[Any] = [task.inputs(batch) for batch in batches]
        self.unit, self.higher_is_better = ("dB", True) if measure == "sqnr" else ("nats", False)
        self.reference = None if measure == "sqnr" else 0.0
        self.before: list[Any] = []

    def start(self, runs: Runs) -> None:
        """Keep the outputs, or their log probabilities, without a change."""
        self.before = list(runs.outputs())
        if self.measure == "kl":
            self.before = [self._logs(batch, output) for batch, output in zip(self.batches, self.before, strict=True)]

    def value(self, runs: Runs, change: Any) -> float:
        """SQNR in dB, or divergence in nats per position."""
        if self.measure == "sqnr":
            return decibels(noise_of(self.before, runs.outputs(change)))
        total, count = 0.0, 0
        for batch, before, output in zip(self.batches, self.before, runs.outputs(change), strict=True):
            after = self._logs(batch, output)
            ruled_out = torch.isneginf(before)  # such a class counts 0, not 0 * -inf
            terms = before.exp() * (before - after).masked_fill(ruled_out, 0.0)
            total += float(terms.masked_fill(ruled_out, 0.0).sum())
            count += len(before)
        nats = total / max(count, 1)
        # infinite where the change rules out a class, or NaN
        return max(nats, 0.0) if math.isfinite(nats) else LARGEST_NATS

    def _logs(self, batch: Batch, outputs: Any) -> Tensor:
        """Log probabilities in float64, (positions, classes)."""
        logits = self.task.logits(outputs)
        if logits.dim() < 2 or not logits.is_floating_point():
            raise TaskError(
                f"measure 'kl' compares logits of (batch, classes, ...), got shape {tuple(logits.shape)}; give "
                "Task(logits=...), or take measure='sqnr'"
            )
        target = self.task.target(batch)
        tokens = logits.dim() == 3 and (target is None or target.shape == logits.shape[:2])
        rows = logits if tokens else logits.movedim(1, -1)
        rows = rows.reshape(-1, rows.shape[-1]).double()
        empty = torch.isneginf(rows).all(-1, keepdim=True)  # positions whose classes are all ruled out by a mask
        return functional.log_softmax(rows.masked_fill(empty, 0.0), -1).masked_fill(empty, -torch.inf)


class MetricGauge:
    """Evaluates the task's metric on val.

    The first evaluation records the inputs that the metric calls the model with; later ones get outputs computed batch
    by batch on the recorded inputs, as long as the metric calls with the same inputs.
    """

    def __init__(self, task: Task, model: nn.Module, seed: int, limit: int = LIMIT) -> None:
        self.task, self.model, self.seed = task, model, seed
        metric = task.as_metric()
        self.unit, self.higher_is_better = metric.unit, metric.higher_is_better
        calls: list[Any] = []
        held = 0
        run = predictor(model)

        def predict(*args: Any, **kwargs: Any) -> Any:
            nonlocal held
            inputs = _inputs(model, args, kwargs)
            held += sum(tensor.numel() * tensor.element_size() for tensor in tensors(inputs))
            if held <= limit:
                calls.append(inputs)
            return run(*args, **kwargs)

        self.reference: float | None = self._evaluate(predict)
        self.inputs: Sequence[Any] = calls if held <= limit else []

    def start(self, runs: Runs) -> None:
        """Do nothing: the reference is measured at construction."""

    def value(self, runs: Runs, change: Any) -> float:
        """Metric of the changed model."""
        recorded, answers = iter(self.inputs), runs.outputs(change) if self.inputs else iter(())
        astray = False

        def predict(*args: Any, **kwargs: Any) -> Any:
            nonlocal astray
            inputs, expected = _inputs(self.model, args, kwargs), next(recorded, None)
            astray = astray or expected is None or not _equal(expected, inputs)
            if not astray:
                return next(answers)
            return runs.answer(change, inputs)

        return self._evaluate(predict)

    def _evaluate(self, predict: Any) -> float:
        return evaluated(self.task, predict, self.seed)


def evaluated(task: Task, predict: Any, seed: int) -> float:
    """The task's metric on val, on the same batches each time."""
    with preserved_globals(seed), seeded_splits(task, seed):
        return task.evaluate(predict, "val")


def _inputs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The arguments of a call in the form that batches have: a tuple, or a dict by the names of `forward`."""
    return bind_call(signature_of(model), args, kwargs) if args and kwargs else kwargs or args


def decibels(noise: float) -> float:
    """SQNR in dB of a noise-to-signal ratio: -10 log10(noise), within +-`LARGEST_DB`."""
    if noise <= 0:
        return LARGEST_DB
    if not math.isfinite(noise):
        return -LARGEST_DB
    return min(max(-10 * math.log10(noise), -LARGEST_DB), LARGEST_DB)


def _equal(one: Any, two: Any) -> bool:
    pairs = tensors(one), tensors(two)
    return [tensor.shape for tensor in pairs[0]] == [tensor.shape for tensor in pairs[1]] and all(
        torch.equal(left, right) for left, right in zip(*pairs, strict=True)
    )
