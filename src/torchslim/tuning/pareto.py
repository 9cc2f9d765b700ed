"""Pareto dominance, the choice of finalists, and the verdict whether the budget was met."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torchslim.core.budget import UNITS, Budget

HOPELESS = 3  # a trial is given up once this many earlier ones are better in everything
NOISE = 0.05  # fraction by which a measured time may exceed its bound without stopping the trial
NEAR = 2.0  # times the bound of the metric drop: allowed after a short training, as full training may recover it
WHOLE = "whole"  # stage of a trial that trains nothing: its figures are final

K = TypeVar("K")


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whether the budget was met, by the best trial, or else the nearest trial and the bounds that it breaks."""

    met: bool
    nearest: int | None
    binding: tuple[str, ...]
    text: str


def dominates(one: Mapping[str, float], other: Mapping[str, float], names: Sequence[str]) -> bool:
    """Whether `one` is nowhere larger than `other`, and smaller in at least one of `names`."""
    return all(one[name] <= other[name] for name in names) and any(one[name] < other[name] for name in names)


def front_of(figures: Mapping[K, Mapping[str, float]], names: Sequence[str]) -> list[K]:
    """Keys that no other dominates, in their order; equal ones are all included."""
    return [
        key for key, mine in figures.items() if not any(dominates(other, mine, names) for other in figures.values())
    ]


def hopeless(mine: Mapping[str, float], others: Sequence[Mapping[str, float]], budget: Budget) -> str:
    """Reason to give up a trial before any training; empty if there is none.

    Args:
        mine: figures without training.
        others: figures of earlier trials at the same effort.
    """
    for name, over in budget.excess(mine).items():
        if name != "metric_drop" and over > (NOISE if name == "latency" else 0):
            return f"{name} {_shown(name, mine[name])} of at most {_shown(name, budget.bounds[name])}"
    names = tuple(dict.fromkeys((*budget.objectives, "metric_drop")))
    better = sum(all(other[name] < mine[name] for name in names) for other in others)
    return f"{better} earlier candidates are better in everything" if better >= HOPELESS else ""


def near(figures: Mapping[str, float], budget: Budget) -> dict[str, float]:
    """The excess, with the part of the metric drop subtracted that full training may still recover.

    A bound of 0 gives no scale for that part, so nothing is subtracted.
    """
    slack = NEAR - 1 if budget.metric_drop else 0.0
    return {name: over - slack if name == "metric_drop" else over for name, over in budget.excess(figures).items()}


def finalists(
    figures: Mapping[int, Mapping[str, float]], short: set[int], budget: Budget, whole: Collection[int] = ()
) -> list[int]:
    """All trials, in the order in which to train them in full.

    First come the trials inside the bounds and near the drop's, then those inside the other bounds, then those outside
    or given up, by their total excess. Each class is ordered by Pareto layers, each layer spread over the objectives.

    Args:
        figures: by trial.
        short: trials that were not given up; they are trained in part, or train nothing.
        whole: those of `short` that full training will not change.
    """
    classes: dict[tuple[int, float], dict[int, Mapping[str, float]]] = {}
    for number, mine in figures.items():
        excess = budget.excess(mine) if number in whole else near(mine, budget)
        drop = excess.pop("metric_drop", 0.0)
        outside = sum(max(over, 0.0) for name, over in excess.items() if over > (NOISE if name == "latency" else 0))
        kind = 2 if outside or number not in short else 0 if drop <= 0 else 1
        classes.setdefault((kind, outside), {})[number] = mine
    order: list[int] = []
    for _, members in sorted(classes.items()):
        remaining = dict(members)
        while remaining:
            layer = _distinct(front_of(remaining, budget.objectives), remaining, budget.objectives)
            order += _spread({number: remaining[number] for number in layer}, budget.objectives)
            remaining = {number: point for number, point in remaining.items() if number not in layer}
    return order


def next_finalist(
    results: Mapping[int, Mapping[str, Any]], finished: Mapping[int, Mapping[str, Any] | None], budget: Budget
) -> int | None:
    """Trial to train in full next, from the results so far; None if enough were trained.

    Trials that train nothing, keep the bounds and are dominated by no other such trial come first: they cost no
    training and do not count as finalists.

    Args:
        results: by trial.
        finished: results of the trials trained in full; None while a worker trains one.
    """
    figures = {number: result["figures"] for number, result in results.items() if "figures" in result}
    short = {number for number in figures if results[number]["state"] == "candidate"}
    whole = {number for number in figures if results[number]["stage"] == WHOLE}
    order = finalists(figures, short, budget, whole)
    untrained = [number for number in order if number in whole and _keeps_bounds(results[number])]
    best = front_of({number: figures[number] for number in untrained}, budget.objectives)
    free = _distinct(best, figures, budget.objectives)[: budget.finalists]
    for number in free:
        if number not in finished:
            return number
    if _enough({number: result for number, result in finished.items() if number not in free}, finished, budget):
        return None
    remaining = [number for number in order if number not in finished and number not in untrained]
    rivals = [figures[number] for number in finished]

    def can_wait(number: int) -> tuple[bool, bool]:
        """Whether a finished trial is as good, or even equal: then its parameters change nothing."""
        mine = figures[number]
        return any(all(other[name] <= mine[name] for name in budget.objectives) for other in rivals), mine in rivals

    return min(remaining, key=can_wait, default=None)


def _keeps_bounds(result: Mapping[str, Any]) -> bool:
    return max(result["excess"].values(), default=0.0) <= 0


def _enough(trained: Mapping[int, Any], finished: Mapping[int, Mapping[str, Any] | None], budget: Budget) -> bool:
    """Whether enough trials were trained in full: twice as many while none keeps the bounds."""
    within = any(result and result.get("within") for result in finished.values())
    limit = budget.finalists if within or not budget.bounds else 2 * budget.finalists
    undecided = None in finished.values()  # whether more are needed depends on those still in training
    return len(trained) >= (budget.finalists if undecided else limit)


def _distinct(layer: Sequence[int], figures: Mapping[int, Mapping[str, float]], names: Sequence[str]) -> list[int]:
    """The first trial at each point: equal ones can wait."""
    places: dict[tuple[float, ...], int] = {}
    for number in layer:
        places.setdefault(tuple(figures[number][name] for name in names), number)
    return list(places.values())


def _spread(layer: Mapping[int, Mapping[str, float]], names: Sequence[str]) -> list[int]:
    """Trials in order: the best in the first objective, then repeatedly the one farthest from those chosen so far."""
    low = {name: min(point[name] for point in layer.values()) for name in names}
    width = {name: max(point[name] for point in layer.values()) - low[name] or 1.0 for name in names}
    places = {number: [(point[name] - low[name]) / width[name] for name in names] for number, point in layer.items()}
    remaining = sorted(places, key=lambda number: (places[number], number))
    order = [remaining.pop(0)] if remaining else []
    while remaining:
        farthest = max(
            remaining,
            key=lambda number: (min(_distance(places[number], places[earlier]) for earlier in order), -number),
        )
        remaining.remove(farthest)
        order.append(farthest)
    return order


def _distance(one: Sequence[float], other: Sequence[float]) -> float:
    return sum((a - b) ** 2 for a, b in zip(one, other, strict=True))


def judge(figures: Mapping[int, Mapping[str, float]], budget: Budget, units: Mapping[str, str] = UNITS) -> Verdict:
    """Verdict on measured artifacts: the best within all bounds, or else the nearest and the bounds that it breaks.

    The nearest has the smallest worst excess, as a fraction of the bound.
    """
    if not figures:
        return Verdict(met=False, nearest=None, binding=(), text="no candidate could be measured")
    within = [number for number, point in figures.items() if max(budget.excess(point).values(), default=0.0) <= 0]
    if within:
        best = min(within, key=lambda number: ([figures[number][name] for name in budget.objectives], number))
        summary = f"{len(within)} of {len(figures)} measured artifacts within the budget, the best is trial {best}"
        return Verdict(met=True, nearest=best, binding=(), text=f"{summary}: {_told(figures[best], budget, units)}")
    worst = {number: max(budget.excess(point).values()) for number, point in figures.items()}
    nearest = min(worst, key=lambda number: (worst[number], number))
    over = budget.excess(figures[nearest])
    binding = tuple(name for name in sorted(over, key=lambda name: -over[name]) if over[name] > 0)
    return Verdict(
        met=False,
        nearest=nearest,
        binding=binding,
        text=f"no measured artifact meets the budget; the nearest is trial {nearest}: "
        f"{_told(figures[nearest], budget, units)}; bounds that it breaks: {', '.join(binding)}",
    )


def _told(figures: Mapping[str, float], budget: Budget, units: Mapping[str, str]) -> str:
    bounds = budget.bounds
    names = tuple(dict.fromkeys((*bounds, *budget.objectives)))
    return ", ".join(
        f"{name} {_shown(name, figures[name], units)}"
        + (f" of at most {_shown(name, bounds[name], units)}" if name in bounds else "")
        for name in names
    )


def _shown(name: str, value: float, units: Mapping[str, str] = UNITS) -> str:
    number = f"{value:,.0f}" if name in ("macs", "params") else f"{value:.3g}"
    return f"{number} {units[name]}".strip()


def volume(points: Sequence[Sequence[float]], reference: Sequence[float]) -> float:
    """Hypervolume between points to be minimized and a reference point: (points, objectives) -> area.

    Points beyond the reference add nothing. Source: Zitzler & Thiele 1998, doi:10.1007/BFb0056872.
    """
    inside = [tuple(point) for point in points if all(a < b for a, b in zip(point, reference, strict=True))]
    if not inside:
        return 0.0
    if len(reference) == 1:
        return reference[0] - min(point[0] for point in inside)
    total = 0.0
    levels = sorted({point[-1] for point in inside})
    for level, following in zip(levels, [*levels[1:], reference[-1]], strict=True):
        total += (following - level) * volume([point[:-1] for point in inside if point[-1] <= level], reference[:-1])
    return total
