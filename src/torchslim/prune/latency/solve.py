"""Pruning to a latency: choose widths from a table of times, measure the result, and choose again until it is near.

`reach` works in rounds. Each round asks the table for widths of a target time, removes the channels and measures the
result; the next target is corrected by the times measured so far.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from torchslim.core import distributed
from torchslim.core.measurement import Measurement, Speedup
from torchslim.core.step import Makers, Workbench
from torchslim.errors import PruneError
from torchslim.prune.latency.cost_model import between
from torchslim.prune.latency.table import Table
from torchslim.prune.structured.plan import Plan
from torchslim.prune.structured.removal import Shrunk, Stuck, TooLittle, shrink
from torchslim.prune.structured.selection import Amount, Scores, Selection

ROUNDS = 5
"""The largest number of rounds for one ceiling."""

BAND = 0.90
"""The rounds end with a measured time between this share of the ceiling and the ceiling."""

AIM = 0.955
"""The share of the ceiling that a round aims at: near the middle of the band, as measurements vary."""

EDGE = 0.98
"""A result is timed twice if its time is between this share of the ceiling and the ceiling."""

NUDGES = 40
"""The number of equal steps in which a target moves to its limit, to find widths that were not tried."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One round. All times are relative to the model that the table is of."""

    target: float  # asked of the table
    predicted: float  # by the table, for the widths that it chose
    measured: float | None = None  # None without a workbench

    @property
    def time(self) -> float:
        """The measured time; the predicted one where nothing was measured."""
        return self.predicted if self.measured is None else self.measured

    @property
    def source(self) -> str:
        """Whether `time` was "predicted" or "measured"."""
        return "predicted" if self.measured is None else "measured"


@dataclass(frozen=True, kw_only=True)
class Reached:
    """The best result of all rounds, with the rounds as evidence.

    `left` is its time over that of the table's model: measured, or predicted if the table has no workbench.
    """

    done: Shrunk
    left: float
    evidence: Mapping[str, Any]
    warnings: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Told:
    """A workbench whose times the first process measures and broadcasts to all processes."""

    bench: Workbench

    def deploy(self, model: nn.Module) -> Callable[..., Any]:
        """Deploy `model` on the target; the result is called like the model."""
        return self.bench.deploy(model)

    def about(self, reference: nn.Module) -> Mapping[str, Any]:
        """Key of times over `reference`: runtime, threads and structure."""
        return self.bench.about(reference)

    def latency(self, models: Makers, reference: nn.Module, *, again: bool = False) -> Mapping[str, float]:
        """Time of each model over the reference's."""
        own_times = dict(self.bench.latency(models, reference, again=again)) if distributed.is_first() else {}
        times: dict[str, float] = distributed.told(own_times)
        return times

    def compare(
        self, deployed: Mapping[str, Callable[..., Any]], reference: str
    ) -> Mapping[str, tuple[Measurement, Speedup]]:
        """Latency and speed-up of deployed models."""
        own = dict(self.bench.compare(deployed, reference)) if distributed.is_first() else {}
        compared: dict[str, tuple[Measurement, Speedup]] = distributed.told(own)
        return compared

    def layer_times(self, deployed: Callable[..., Any]) -> Mapping[str, float] | None:
        """Milliseconds of the layers of a deployed model."""
        own = self.bench.layer_times(deployed) if distributed.is_first() else None
        times: Mapping[str, float] | None = distributed.told(own)
        return times

    def within(self, path: str) -> Workbench:
        """The same service for a part of the model."""
        return Told(bench=self.bench.within(path))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Round:
    """An attempt and the verified removal that it was measured of."""

    attempt: Attempt
    removal: Shrunk


def reach(
    plan: Plan, amount: Amount, scores: Scores, table: Table, *, progress: Callable[[int], None] = lambda number: None
) -> Reached:
    """Shrink a model to at most 1 - sparsity of the time of the model that the table is of.

    Every round starts from `plan`'s model. The best round has the longest time within the ceiling; if none is within
    it, the shortest time.

    Args:
        plan: of the model to shrink: that of the table, or one that was cut from it.
        amount: the sparsity, and the steps of the widths.
        scores: of the classes.
        table: its workbench measures the results; without one they are predicted only.
        progress: called with the number of each round.

    Raises:
        PruneError: no channel can go.
    """
    ceiling = 1 - amount.sparsity
    rounds: list[_Round] = []
    widths = _Widths(table)
    for number in range(1, ROUNDS + 1):
        progress(number)
        widths.target, widths.leeway = _aim([earlier.attempt for earlier in rounds], ceiling)
        try:
            removal = shrink(plan, amount, scores, widths)
        except _Settled:
            break
        except (TooLittle, Stuck):
            if not rounds:
                raise
            break
        widths.tried.add(widths.kept)
        measured = None if table.workbench is None else _measured(removal.model, table, table.workbench, ceiling)
        attempt = Attempt(target=widths.target, predicted=widths.predicted, measured=measured)
        rounds.append(_Round(attempt=attempt, removal=removal))
        if measured is None or BAND * ceiling <= measured <= ceiling:
            break
    return _best(rounds, ceiling, amount, table)


def shrink_to_latency(
    plan: Plan, amount: Amount, scores: Scores, workbench: Workbench
) -> tuple[Shrunk, tuple[str, ...]]:
    """Shrink the plan's model as `reach` does, with a table that `workbench` measures; returns removal and warnings."""
    table = Table(plan=plan, amount=amount, workbench=workbench)
    reached = reach(plan, amount, scores, table)
    return reached.done, reached.warnings


def _aim(attempts: Sequence[Attempt], ceiling: float) -> tuple[float, float]:
    """The next target for the table, and how far it may move to find other widths (below 0: to shorter times).

    Measured times rise with predicted ones, so the target lies between the predictions of the attempts around the aim.
    It may move up to the prediction of the nearest attempt that is known to miss the band on the other side.
    """
    aim = AIM * ceiling
    times = sorted((attempt.measured, attempt.predicted) for attempt in attempts if attempt.measured is not None)
    if not times:
        return aim, 0.0
    target = between(times, aim)
    last = attempts[-1].measured
    assert last is not None
    if last > ceiling:
        lowest = max((predicted for measured, predicted in times if measured < BAND * ceiling), default=0.0)
        return target, min(lowest - target, 0.0)
    highest = min((predicted for measured, predicted in times if measured > ceiling), default=1.0)
    return target, max(highest - target, 0.0)


class _Settled(PruneError):
    """All widths between the target and its limit were tried."""


class _Widths:
    """Chooses widths for a target time that no earlier round tried; `shrink` calls it."""

    def __init__(self, table: Table) -> None:
        self.table = table
        self.target = 1.0
        self.leeway = 0.0  # how far the target may move; below 0: to shorter times
        self.predicted = 1.0  # time of the widths chosen last
        self.kept: tuple[int, ...] = ()  # the widths chosen last
        self.tried: set[tuple[int, ...]] = set()

    def __call__(self, selection: Selection) -> list[int]:
        self.table.learn()
        kept = self._untried(selection)
        if self.target < 1 and kept == [unit.width for unit in selection.coupling.units]:
            raise Stuck(
                "none of the narrower widths that were timed makes the model faster on the target; take of='macs' or "
                "'params', or give a smaller round_to"
            )
        self.kept = tuple(kept)
        self.predicted = self.table.predict(selection, kept)
        return kept

    def _untried(self, selection: Selection) -> list[int]:
        """The table's widths for the target, which moves by steps of the leeway until they were not tried."""
        step = self.leeway / NUDGES
        for _ in range(NUDGES + 1):
            kept = self.table.choose(selection, self.target)
            if tuple(kept) not in self.tried:
                return kept
            self.target += step
        raise _Settled("no other widths are nearer")


def _measured(model: nn.Module, table: Table, workbench: Workbench, ceiling: float) -> float:
    """Time of `model` over that of the table's model; just below the ceiling, the longer of two measurements."""

    def measure() -> float:
        return float(workbench.latency({"pruned": lambda: model}, table.plan.model, again=True)["pruned"])

    time = measure()
    # there noise decides whether the ceiling is kept
    return max(time, measure()) if EDGE * ceiling <= time <= ceiling else time


def _best(rounds: Sequence[_Round], ceiling: float, amount: Amount, table: Table) -> Reached:
    """The best round as a result."""
    merits = [_merit(entry.attempt, ceiling) for entry in rounds]
    place = merits.index(max(merits))
    best = rounds[place].attempt
    evidence = {
        "ceiling": ceiling,
        "rounds": [asdict(entry.attempt) for entry in rounds],
        "best": place + 1,
        "programs": sum(map(len, table.rows.values())),
        "elsewhere": table.elsewhere,
    }
    return Reached(
        done=replace(rounds[place].removal, left=best.time),
        left=best.time,
        evidence=evidence,
        warnings=tuple(_warnings(best, ceiling, amount, table.elsewhere)),
    )


def _merit(attempt: Attempt, ceiling: float) -> tuple[bool, float]:
    """Sort key of an attempt: within the ceiling the longest time is best, above it the shortest."""
    return (True, attempt.time) if attempt.time <= ceiling else (False, -attempt.time)


def _warnings(attempt: Attempt, ceiling: float, amount: Amount, elsewhere: str) -> Iterator[str]:
    """Warnings of a ceiling that was missed or is not nearly used, and of a time that was not measured here."""
    steps = f"with round_to={amount.round_to} and min_channels={amount.min_channels}"
    if attempt.time > ceiling:
        yield (
            f"a latency of {ceiling:.2f} of the model's cannot be reached {steps}: {attempt.time:.3f} is the least "
            f"that was {attempt.source}; ask for less, or let more go"
        )
    elif attempt.time < BAND * ceiling:
        yield (
            f"a latency of {ceiling:.2f} of the model's is kept by far, at {attempt.time:.3f} ({attempt.source}): "
            f"{steps} no widths were found that are nearer"
        )
    if attempt.measured is None:
        yield f"the latency was predicted from times taken on {elsewhere}, and not measured here"
