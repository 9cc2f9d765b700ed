"""Sensitivity of parts: each is measured on its own calls, or by the metric of the whole model around it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from torchslim.analysis.measures import Gauge, Measure, OutputGauge, Runs, evaluated
from torchslim.analysis.probe import Sensing
from torchslim.core.batches import Batch, predictor, take_first
from torchslim.core.fingerprint import fingerprint
from torchslim.core.isolation import copy_model
from torchslim.core.layer_patterns import Patterns, as_list
from torchslim.core.part_calls import recorded
from torchslim.core.parts import (
    Fitted,
    mounted,
    part_view,
    patterns_inside,
    select_parts,
    shared_with_the_rest,
    signature_of,
)
from torchslim.core.step import Event, Inputs
from torchslim.core.task import Task
from torchslim.core.tensor_objects import by_structure, named_arguments, of_structure, structure_of
from torchslim.core.trees import tensors
from torchslim.errors import SensitivityError
from torchslim.prune.criteria.registry import Criterion, Scorer, find_criterion, needs
from torchslim.prune.criteria.statistics import Gathered, gather
from torchslim.training.calibration import CalibrationData


@dataclass(kw_only=True)
class PartSensing(Sensing):
    """Measures the points of one part. `task` has the part's calls; `whole` and `whole_task` are the model's own.

    Calls of another structure than the most frequent one do not count for "sqnr", and are unchanged for "metric".
    """

    path: str
    whole: nn.Module
    whole_task: Task

    @cached_property
    def gauge(self) -> Gauge:
        """Gauge that measures the points."""
        if self.measure == "metric":
            return PartMetricGauge(self.whole_task, self.whole, self.path, self.example_inputs, self.seed)
        return OutputGauge(self.measure, self.task, self.batches)

    def more_of_key(self) -> list[Any]:
        """The part's name, and the data and weights around it."""
        val = fingerprint(take_first(self.whole_task.val, "val")) if self.measure == "metric" else None
        return [self.path, fingerprint(self.whole.state_dict()), val]

    def gathered(self, model: nn.Module) -> Gathered:
        """Statistics of the part's weights while the whole model runs on its calibration data."""
        statistics, task = needs(find_criterion(self.criterion)), self.whole_task
        batches: Sequence[Batch] = CalibrationData(task, self.seed, self.samples).batches
        whole = gather(self.whole, statistics, batches, forward=task.forward, loss=task.compute_loss)
        return whole.inside(self.path)


class PartMetricGauge:
    """Evaluates the metric of the whole model on val, with a change in one part."""

    inputs: Sequence[Any] = ()

    def __init__(self, task: Task, model: nn.Module, path: str, example: Inputs, seed: int) -> None:
        self.task, self.seed = task, seed
        metric = task.as_metric()
        self.unit, self.higher_is_better = metric.unit, metric.higher_is_better
        self.part = _ChangedPart(signature_of(model.get_submodule(path)), structure_of(example))
        self.changed = mounted(copy_model(model)[0].eval(), {path: self.part})
        self.reference: float | None = evaluated(task, predictor(model), seed)

    def start(self, runs: Runs) -> None:
        """Do nothing: the reference is measured at construction."""

    def value(self, runs: Runs, change: Any) -> float:
        """Metric of the model with the changed part."""
        self.part.answer = lambda inputs: runs.answer(change, inputs)
        return evaluated(self.task, predictor(self.changed), self.seed)


class _ChangedPart:
    """Answers the calls of one structure in the place of a part."""

    def __init__(self, signature: inspect.Signature, structure: str) -> None:
        self.signature, self.structure = signature, structure
        self.answer: Callable[[Inputs], Any] = lambda inputs: inputs
        self.inputs: Inputs = ()

    def fitted(self, args: Sequence[Any], kwargs: Mapping[str, Any], *, sizes: bool = False) -> Fitted | None:
        """The tensors of a call of the structure; None for other calls."""
        self.inputs = named_arguments(self.signature, tuple(args), kwargs) if kwargs else tuple(args)
        return Fitted(tensors(self.inputs)) if structure_of(self.inputs) == self.structure else None

    def __call__(self, fitted: Fitted) -> Any:
        return self.answer(self.inputs)


def part_sensings(
    model: nn.Module,
    task: Task,
    part: str | Sequence[str],
    *,
    measure: Measure,
    runtime: str,
    include: Patterns,
    exclude: Patterns,
    samples: int,
    criterion: str | Criterion | Scorer,
    reconstruct: bool,
    seed: int,
    progress: Callable[[Event], None],
) -> dict[str, PartSensing]:
    """A `PartSensing` for each part that the patterns leave something of, by path.

    Raises:
        SelectError: a pattern of `part` names no submodule.
        TaskError: a part is never called.
        SensitivityError: the measure compares logits, or `include` names no layer of the parts.
    """
    if measure == "kl":
        raise SensitivityError("measure 'kl' compares the logits of whole models; with part, take 'sqnr' or 'metric'")
    paths = select_parts(model, part)
    calls = recorded(model, task, paths, CalibrationData(task, seed, samples).batches)
    sensings = {}
    for path in paths:
        included, excluded = (
            [name for names in patterns_inside(model, path, as_list(patterns)).values() for name in names]
            for patterns in (include, exclude)
        )
        if include is not None and not included:
            continue
        example = by_structure(calls[path])[0][0]
        own = of_structure(calls[path], example)
        sensings[path] = PartSensing(
            model=part_view(model, path, example),
            task=Task(val=own, calibration=own, metric=task.metric, inputs=_as_they_are),
            example_inputs=own[0],
            measure=measure,
            runtime=runtime,
            include=None if include is None else included,
            exclude=excluded or None,
            fixed=tuple(shared_with_the_rest(model, path)),
            samples=samples,
            criterion=criterion,
            reconstruct=reconstruct,
            seed=seed,
            progress=progress,
            path=path,
            whole=model,
            whole_task=task,
        )
    if not sensings:
        raise SensitivityError(f"include={include!r} names no layer of the parts {', '.join(map(repr, paths))}")
    return sensings


def _as_they_are(call: Inputs) -> Inputs:
    return call
