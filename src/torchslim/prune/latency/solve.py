"""A ceiling of latency: widths are chosen by what is predicted, measured, and chosen again until they are near it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from torchslim.core import distributed
from torchslim.core.step import Makers, Workbench
from torchslim.errors import PruneError
from torchslim.prune.latency.cost_model import between
from torchslim.prune.latency.table import Table
from torchslim.prune.structured.plan import Plan
from torchslim.prune.structured.removal import Shrunk, Stuck, TooLittle, shrink
from torchslim.prune.structured.selection import Amount, Scores, Selection

ROUNDS = 5
BAND = 0.90
"""At what share of the ceiling, and above, a result is near enough."""

AIM = 0.955
"""What a round aims at: the middle of what is near enough, as measurements vary."""

EDGE = 0.98
"""From what share of the ceiling a result is timed twice."""

NUDGES = 40
"""In how many steps widths are looked for that were not tried, between the aim and what is known to be too far."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One round: what the predictor was asked for, what it predicted, and what was measured of the result."""

    target: float
    predicted: float
    measured: float | None = None


@dataclass(frozen=True, kw_only=True)
class Reached:
    """The best of the rounds.

    `left` is its time over the received model's: measured, or where the times were taken elsewhere, predicted.
    """

    done: Shrunk
    left: float
    evidence: Mapping[str, Any]
    warnings: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Told:
    """A workbench on which one process measures, and all know."""

    bench: Workbench

    def deploy(self, model: nn.Module) -> Callable[..., Any]:
        """The model on the target."""
        return self.bench.deploy(model)

    def about(self, reference: nn.Module) -> Mapping[str, Any]:
        """What times over a reference are times of."""
        return self.bench.about(reference)

    def latency(self, models: Makers, reference: nn.Module, *, again: bool = False) -> Mapping[str, float]:
        """Time of each model over the reference's."""
        mine = dict(self.bench.latency(models, reference, again=again)) if distributed.is_first() else {}
        found: dict[str, float] = distributed.told(mine)
        return found


def reach(
    plan: Plan, amount: Amount, scores: Scores, table: Table, *, progress: Callable[[int], None] = lambda number: None
) -> Reached:
    """Shrink a model to at most 1 - sparsity of the time of the model that the table is of.

    Every round starts from `plan`'s model; the best has the longest measured time that keeps the ceiling.

    Args:
        plan: of the model to shrink: that of the table, or one that was cut from it.
        amount: the sparsity, and the steps of the widths.
        scores: of the classes.
        table: its workbench measures the results; without one they are predicted only.
        progress: called with the number of each round.

    Raises:
        PruneError: nothing can go.
    """
    ceiling, search = 1 - amount.sparsity, _Widths(table)
    attempts: list[Attempt] = []
    results: list[Shrunk] = []
    for number in range(1, ROUNDS + 1):
        progress(number)
        search.target, search.toward = _aim(attempts, ceiling)
        try:
            done = shrink(plan, amount, scores, search)
        except _Settled:
            break
        except (TooLittle, Stuck):
            if not results:
                raise
            break
        search.tried.add(search.kept)
        measured = None
        if table.workbench is not None:
            measured = _measured(done.model, table, ceiling)
        attempts.append(Attempt(target=search.target, predicted=search.predicted, measured=measured))
        results.append(done)
        if measured is None or BAND * ceiling <= measured <= ceiling:
            break
    best = max(range(len(attempts)), key=lambda place: _merit(attempts[place], ceiling))
    took = attempts[best]
    left = took.predicted if took.measured is None else took.measured
    evidence = {
        "ceiling": ceiling,
        "rounds": [asdict(attempt) for attempt in attempts],
        "best": best + 1,
        "programs": sum(map(len, table.rows.values())),
        "elsewhere": table.elsewhere,
    }
    return Reached(
        done=replace(results[best], left=left),
        left=left,
        evidence=evidence,
        warnings=tuple(_warnings(took, ceiling, amount, table.elsewhere)),
    )


def _measured(model: nn.Module, table: Table, ceiling: float) -> float:
    """The time over the received model's; where noise decides whether the ceiling is kept, the slower of two."""
    bench = table.workbench
    assert bench is not None

    def once() -> float:
        return float(bench.latency({"pruned": lambda: model}, table.plan.model, again=True)["pruned"])

    took = once()
    return max(took, once()) if EDGE * ceiling <= took <= ceiling else took


def reach_here(plan: Plan, amount: Amount, scores: Scores, workbench: Workbench) -> tuple[Shrunk, tuple[str, ...]]:
    """The same from nothing but a workbench: the removal, and what a user must know of it."""
    table = Table(plan=plan, amount=amount, workbench=workbench)
    found = reach(plan, amount, scores, table)
    return found.done, found.warnings


class _Settled(PruneError):
    """No widths are left to try on the side where the ceiling is."""


class _Widths:
    """Chooses widths that were not tried before: `target` asked for, and where they were, moved `toward`."""

    def __init__(self, table: Table) -> None:
        self.table = table
        self.target = self.predicted = 1.0
        self.toward = 0.0  # how far the target may move; below 0 to narrower widths
        self.kept: tuple[int, ...] = ()
        self.tried: set[tuple[int, ...]] = set()

    def __call__(self, selection: Selection) -> list[int]:
        self.table.learn()
        step = self.toward / NUDGES
        for _ in range(NUDGES + 1):
            kept = self.table.choose(selection, self.target)
            if tuple(kept) not in self.tried:
                break
            self.target += step
        else:
            raise _Settled("no other widths are nearer")
        if self.target < 1 and kept == [unit.width for unit in selection.coupling.units]:
            raise Stuck(
                "none of the narrower widths that were timed makes the model faster on the target; take of='macs' or "
                "'params', or give a smaller round_to"
            )
        self.kept = tuple(kept)
        self.predicted = self.table.predict(selection, kept)
        return kept


def _aim(attempts: list[Attempt], ceiling: float) -> tuple[float, float]:
    """What to ask the predictor for next, and how far that may move where its answer is known already.

    Between the attempts around the aim, as times grow with what is predicted.
    """
    goal = AIM * ceiling
    known = sorted((attempt.measured, attempt.predicted) for attempt in attempts if attempt.measured is not None)
    if not known:
        return goal, 0.0
    target = between(known, goal)
    last = attempts[-1].measured
    assert last is not None
    if last > ceiling:
        least = max((predicted for measured, predicted in known if measured < BAND * ceiling), default=0.0)
        return target, min(least - target, 0.0)
    most = min((predicted for measured, predicted in known if measured > ceiling), default=1.0)
    return target, max(most - target, 0.0)


def _merit(attempt: Attempt, ceiling: float) -> tuple[bool, float]:
    took = attempt.predicted if attempt.measured is None else attempt.measured
    return (True, took) if took <= ceiling else (False, -took)


def _warnings(attempt: Attempt, ceiling: float, amount: Amount, elsewhere: str) -> list[str]:
    """What a user must know: a ceiling that was missed, or that nobody has measured."""
    took = attempt.predicted if attempt.measured is None else attempt.measured
    said = "predicted" if attempt.measured is None else "measured"
    steps = f"with round_to={amount.round_to} and min_channels={amount.min_channels}"
    found = []
    if took > ceiling:
        found.append(
            f"a latency of {ceiling:.2f} of the model's cannot be reached {steps}: {took:.3f} is the least that was "
            f"{said}; ask for less, or let more go"
        )
    elif took < BAND * ceiling:
        found.append(
            f"a latency of {ceiling:.2f} of the model's is kept by far, at {took:.3f} ({said}): {steps} no widths were "
            "found that are nearer"
        )
    if attempt.measured is None:
        found.append(f"the latency was predicted from times taken on {elsewhere}, and not measured here")
    return found
