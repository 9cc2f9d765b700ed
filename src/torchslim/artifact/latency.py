"""Latency of deployed models with its spread, from interleaved rounds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torchslim.artifact.assembled import AnyDeployed, DeployedParts
from torchslim.core.measurement import THIS_MACHINE, Measurement, Speedup
from torchslim.errors import TorchslimError
from torchslim.runtimes.base import Deployed

ROUND_SECONDS = 0.002  # a round repeats short calls until it lasts this long: the clock is no finer
WARMUP_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Timings:
    """Milliseconds by candidate, one value a round; round i of every candidate was measured side by side.

    `machines` names the machines of candidates that were measured elsewhere.
    """

    rounds: Mapping[str, Sequence[float]]
    machines: Mapping[str, str] = field(default_factory=dict)

    def latency(self, name: str) -> Measurement:
        """Milliseconds of one call of a candidate: the median round and the spread."""
        p10, median, p90 = percentiles(self.rounds[name])
        machine = self.machines.get(name, THIS_MACHINE)
        return Measurement(value=median, unit="ms", p10=p10, p90=p90, rounds=len(self.rounds[name]), machine=machine)

    def speedup(self, name: str, baseline: str) -> Speedup:
        """How many times faster `name` is than `baseline`."""
        pairs = zip(self.rounds[baseline], self.rounds[name], strict=True)
        p10, median, p90 = percentiles([slow / fast for slow, fast in pairs])
        machine = self.machines.get(name, THIS_MACHINE)
        return Speedup(value=median, p10=p10, p90=p90, rounds=len(self.rounds[name]), machine=machine)


def percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    """10th, 50th and 90th percentile, linearly interpolated."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return tenths[0], statistics.median(values), tenths[-1]


def interleave(
    candidates: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = 50,
    seconds: float = 60.0,
    clock: Callable[[], float] | None = None,
    settle: bool = False,
) -> Timings:
    """Time the candidates in turn, A B A B ..., so that drift of the machine affects all of them.

    Args:
        candidates: functions to call, by name.
        rounds: largest number of rounds.
        seconds: time after which to stop, though not before five rounds.
        clock: seconds, by default `time.perf_counter`. `time.process_time` leaves out the turns that other programs
            take, which cost long calls more than short ones; it counts the time of all threads.
        settle: calls every candidate once before its turn, untimed: a candidate with large weights leaves the cache to
            the next one, whose first call is slower then, and a short candidate has more calls in its turn.
    """
    if rounds < 1:
        raise TorchslimError(f"rounds must be at least 1, got {rounds}; 50 give a spread that can be trusted")
    clock = clock or time.perf_counter  # looked up at each call, so that tests can set the clock
    repeats: dict[str, int] = {}
    for name, function in candidates.items():
        until = time.perf_counter() + WARMUP_SECONDS
        function()
        fastest = float("inf")
        while True:
            start = clock()
            function()
            fastest = min(fastest, clock() - start)
            if time.perf_counter() >= until:
                break
        repeats[name] = max(1, round(ROUND_SECONDS / max(fastest, 1e-7)))
    measured: dict[str, list[float]] = {name: [] for name in candidates}
    stop = time.perf_counter() + seconds
    for number in range(rounds):
        for name, function in candidates.items():
            if settle:
                function()
            start = clock()
            for _ in range(repeats[name]):
                function()
            measured[name].append((clock() - start) * 1e3 / repeats[name])
        if number >= 4 and time.perf_counter() > stop:
            break
    return Timings(measured)


def compare(
    deployed: Mapping[str, AnyDeployed],
    *,
    batch: int | None = None,
    rounds: int = 50,
    seconds: float = 60.0,
    inputs: Sequence[Tensor] | None = None,
    clock: Callable[[], float] | None = None,
) -> Timings:
    """Interleaved latency of deployed models on their example inputs, resized to `batch` samples.

    Args:
        deployed: models by name; each runs on its own example, so compare models of the same task.
        batch: samples a call; None takes one where the batch is free, and the example's size where it is fixed.
        rounds, seconds, clock: as for `interleave`.
        inputs: flat inputs for all models, in place of their own examples.
    """
    callers = {name: _caller(model, batch, inputs) for name, model in deployed.items()}
    return interleave(callers, rounds=rounds, seconds=seconds, clock=clock)


def compare_largest(
    deployed: Mapping[str, AnyDeployed], *, batch: int | None = None, rounds: int = 50, seconds: float = 60.0
) -> Timings | None:
    """As `compare`, on the largest example of every model; None if sizes vary in none of them."""
    if all(_largest(model) is None for model in deployed.values()):
        return None
    callers = {name: _caller(model, batch, _largest(model)) for name, model in deployed.items()}
    return interleave(callers, rounds=rounds, seconds=seconds)


def shared_examples(models: Sequence[AnyDeployed]) -> tuple[list[Tensor] | None, list[Tensor] | None]:
    """The median-size and the largest example that all models take; None for an example that they do not share.

    The second is None also where the two have the same sizes. A stage of a run may have fixed sizes where the others
    have free ones: then all are timed at its sizes.
    """
    whole = [model for model in models if isinstance(model, Deployed)]
    if len(whole) < len(models):
        return None, None  # a model with deployed parts is called on its own example
    examples: list[list[Tensor] | None] = []
    for candidates in ([model.example for model in whole], [model.largest for model in whole]):
        fitting = (leaves for leaves in candidates if leaves and all(model.spec.fits(leaves) for model in whole))
        examples.append(next(fitting, None))
    median, largest = examples
    if (
        median is not None
        and largest is not None
        and [leaf.shape for leaf in median] == [leaf.shape for leaf in largest]
    ):
        largest = None
    return median, largest


def _largest(model: AnyDeployed) -> list[Tensor] | None:
    """The largest example of a model whose sizes vary."""
    return model.largest if isinstance(model, Deployed) else None


def _caller(deployed: AnyDeployed, batch: int | None, inputs: Sequence[Tensor] | None = None) -> Callable[[], Any]:
    if isinstance(deployed, DeployedParts):  # a whole model is called as its task calls it
        return deployed.caller()
    leaves = resized(deployed, batch, inputs)
    return lambda: deployed.run(leaves)


def resized(deployed: Deployed, batch: int | None = None, inputs: Sequence[Tensor] | None = None) -> list[Tensor]:
    """The example inputs, or `inputs`, with `batch` samples (1 by default) along every free batch dimension."""
    example = deployed.example if inputs is None else inputs
    if batch is not None and batch < 1:
        raise TorchslimError(f"batch must be at least 1, got {batch}; leave it out for one sample a call")
    axis = deployed.spec.batch_axis
    if axis is None:
        return list(example)
    count = batch or 1
    leaves = []
    for leaf, sizes in zip(example, deployed.spec.sizes, strict=True):
        if len(sizes) > axis and sizes[axis] is None:
            leaf = leaf.index_select(axis, torch.arange(count) % leaf.shape[axis]).contiguous()
        leaves.append(leaf)
    return leaves
