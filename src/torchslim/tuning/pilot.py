"""A pilot of a quantization: round the model plainly, deploy it, and compare its time and metric with those of float.

Only a measurement shows whether 8 bits save time: the kernels may be few, and most of the time may be spent elsewhere,
in Python around deployed parts, or in the overhead of calls and small operations.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from torchslim.artifact.assembled import AnyDeployed, DeployedParts
from torchslim.artifact.latency import compare, interleave, resized
from torchslim.core.batches import batch_size, take_first
from torchslim.core.measurement import Speedup
from torchslim.core.step import Inputs, Target
from torchslim.core.task import Task
from torchslim.errors import TorchslimError
from torchslim.pipeline.beginning import ready
from torchslim.pipeline.options import RunOptions
from torchslim.pipeline.small_task import small
from torchslim.quantize import Quantize
from torchslim.runtimes import Deployed
from torchslim.training.loaders import batch_count, part_of

SAMPLES = 256  # of val on which the metric is compared, and of the calibration data
ROUNDS, SECONDS = 40, 5.0
MANY = 16  # samples of the larger call that tells the cost of a call from that of its samples
CLOCK = time.process_time  # one thread computes: the time of the processor, without that of other programs
CALLS = 20  # timed calls of a whole model with parts


@dataclass(frozen=True, kw_only=True)
class Pilot:
    """What plain rounding gains and loses, measured on a runtime with one thread.

    Attributes:
        scheme, runtime: what was tried.
        failure: why it could not be tried; then the figures below are None.
        speedup: of one call over float, from paired rounds.
        before, after: the metric of float and of the rounded model on the same batches of val.
        lost: how much worse `after` is, in the metric's own unit; below 0 if it is better.
        overhead: share of the time of one sample in float that does not grow with the samples of a call; None where
            the batch is fixed.
        outside: share of the time in float that is spent outside of the deployed parts; None for a whole model.
    """

    scheme: str
    runtime: str
    failure: str = ""
    speedup: Speedup | None = None
    before: float | None = None
    after: float | None = None
    lost: float | None = None
    overhead: float | None = None
    outside: float | None = None

    @property
    def faster(self) -> bool:
        """Whether the whole spread of the speed-up is above 1."""
        return self.speedup is not None and self.speedup.verdict == "faster"


def pilot(
    model: nn.Module,
    task: Task,
    scheme: str,
    layers: Mapping[str, str],
    runtime: str,
    *,
    part: str | Sequence[str] | None = None,
    example_inputs: Inputs | None = None,
    accuracy: Any = "plain",
) -> Pilot:
    """Quantize a copy of the model after training, deploy both models, and compare them.

    Costs a calibration on `SAMPLES` samples, two deployments, two evaluations on `SAMPLES` samples of val, and
    `SECONDS` of timing.
    """
    try:
        return _tried(model, task, scheme, layers, runtime, part, example_inputs, accuracy)
    except TorchslimError as error:
        return Pilot(scheme=scheme, runtime=runtime, failure=str(error))


def _tried(
    model: nn.Module,
    task: Task,
    scheme: str,
    layers: Mapping[str, str],
    runtime: str,
    part: str | Sequence[str] | None,
    example_inputs: Inputs | None,
    accuracy: Any,
) -> Pilot:
    step = Quantize(scheme, layers=dict(layers), accuracy=accuracy, checks=None)
    options = RunOptions(
        target=Target(runtime=runtime, threads=1),
        part=part,
        example_inputs=example_inputs,
        progress=lambda event: None,
    )
    few = _few(task)
    with ready(model, few, [step], options) as (ctx, bench, _):
        assert ctx.model is not None
        deployed = bench.deploy(ctx.model)
        rounded = bench.deploy(step(ctx.model, replace(ctx, name="pilot")).model)
        before, after = (few.evaluate(candidate, "val") for candidate in (deployed, rounded))
    rounds = compare({"float": deployed, "rounded": rounded}, rounds=ROUNDS, seconds=SECONDS, clock=CLOCK)
    worse = before - after if few.as_metric().higher_is_better else after - before
    return Pilot(
        scheme=scheme,
        runtime=runtime,
        speedup=rounds.speedup("rounded", "float"),
        before=before,
        after=after,
        lost=worse,
        overhead=call_overhead(deployed),
        outside=outside_share(deployed),
    )


def _few(task: Task) -> Task:
    """The task with about `SAMPLES` samples of val, more only where the metric fails on them, and for calibration."""
    split = task.calibration_split
    calibration = _samples(task, split)
    few = small(task, lambda seconds, batches: None, evaluated=_batches(task, "val"))
    return replace(few, calibration=calibration, test=None)


def _batches(task: Task, split: str) -> int:
    """Number of batches with about `SAMPLES` samples, by the size of the first one."""
    first = take_first(getattr(task, split), split)
    return max(1, math.ceil(SAMPLES / max(batch_size(task.inputs(first)), 1)))


def _samples(task: Task, split: str) -> Any:
    """Batches of a split with about `SAMPLES` samples, spread over it; all of a loader without a length."""
    batches = getattr(task, split)
    count = batch_count(batches)
    return batches if count is None else part_of(batches, _batches(task, split) / max(count, 1))


def call_overhead(deployed: AnyDeployed) -> float | None:
    """Share of the time of one sample that a call takes whatever the number of its samples; None if that is fixed."""
    if not isinstance(deployed, Deployed) or not deployed.takes_single_samples:
        return None
    one, many = resized(deployed, 1), resized(deployed, MANY)
    rounds = interleave(
        {"one": lambda: deployed.run(one), "many": lambda: deployed.run(many)},
        rounds=ROUNDS,
        seconds=SECONDS,
        clock=CLOCK,
    ).rounds
    return overhead_share(rounds["one"], rounds["many"])


def overhead_share(one: Sequence[float], many: Sequence[float]) -> float:
    """Share of the time of one sample that is there without samples, from paired times of one and of `MANY` samples.

    The line through t(1) and t(n) has (n t(1) - t(n)) / (n - 1) at no sample.
    """
    shares = [(MANY - large / single) / (MANY - 1) for single, large in zip(one, many, strict=True)]
    return min(max(statistics.median(shares), 0.0), 1.0)


def outside_share(deployed: AnyDeployed) -> float | None:
    """Share of the time of a call that a whole model spends outside of its deployed parts; None without parts."""
    if not isinstance(deployed, DeployedParts):
        return None
    watch = _Watch()
    parts: dict[str, Any] = {path: _Watched(piece, watch) for path, piece in deployed.parts.items()}
    call = DeployedParts(deployed.model, parts, deployed.example, deployed.part_examples).caller()
    call()
    shares = []
    for _ in range(CALLS):
        watch.seconds, start = 0.0, CLOCK()
        call()
        shares.append(1 - watch.seconds / max(CLOCK() - start, 1e-9))
    return min(max(statistics.median(shares), 0.0), 1.0)


@dataclass
class _Watch:
    """Seconds inside of the watched functions."""

    seconds: float = 0.0


class _Watched:
    """A deployed part whose calls are timed."""

    def __init__(self, part: Deployed, watch: _Watch) -> None:
        self._part, self._watch = part, watch

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        start = CLOCK()
        try:
            return self._part(*args, **kwargs)
        finally:
            self._watch.seconds += CLOCK() - start

    def __getattr__(self, name: str) -> Any:
        return getattr(self._part, name)
