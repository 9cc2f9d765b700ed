"""Which candidates are better than others, which deserve their full cost, and whether the budget was met."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torchslim.core.budget import UNITS, Budget

HOPELESS = 3  # so many that are better in everything, and a candidate is given up
NOISE = 0.05  # a measured time may be over its bound by so much and still be tried further
NEAR = 2.0  # times the bound of the drop: what a short training left there may still come back
WHOLE = "whole"  # the stage of a trial that trains nothing: its figures are final

K = TypeVar("K")


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Was the budget met? If not, what came nearest, and which bounds it breaks."""

    met: bool
    nearest: int | None
    binding: tuple[str, ...]
    text: str


def dominates(one: Mapping[str, float], other: Mapping[str, float], names: Sequence[str]) -> bool:
    """Is `one` at most as large in everything, and smaller in something?"""
    return all(one[name] <= other[name] for name in names) and any(one[name] < other[name] for name in names)


def front_of(figures: Mapping[K, Mapping[str, float]], names: Sequence[str]) -> list[K]:
    """Those that none dominates, in their order; of equal ones all."""
    return [
        key for key, mine in figures.items() if not any(dominates(other, mine, names) for other in figures.values())
    ]


def hopeless(mine: Mapping[str, float], others: Sequence[Mapping[str, float]], budget: Budget) -> str:
    """Why a candidate is not worth training, from what does not depend on training; empty where it may be.

    Args:
        mine: figures without training.
        others: of earlier candidates, of the same effort.
    """
    for name, over in budget.excess(mine).items():
        if name != "metric_drop" and over > (NOISE if name == "latency" else 0):
            return f"{name} {_shown(name, mine[name])} of at most {_shown(name, budget.bounds[name])}"
    names = tuple(dict.fromkeys((*budget.objectives, "metric_drop")))
    better = sum(all(other[name] < mine[name] for name in names) for other in others)
    return f"{better} earlier candidates are better in everything" if better >= HOPELESS else ""


def near(excess: Mapping[str, float]) -> dict[str, float]:
    """The excess, with a drop counted from what a full training may still bring back."""
    return {name: over - (NEAR - 1) if name == "metric_drop" else over for name, over in excess.items()}


def finalists(
    figures: Mapping[int, Mapping[str, float]], short: set[int], budget: Budget, whole: Collection[int] = ()
) -> list[int]:
    """All trials, those first that deserve their full cost most.

    Within a class (inside the bounds and near the drop's; inside the other bounds; outside) layer by layer of the
    front, each layer spread over the objectives.

    Args:
        figures: by trial.
        short: the trials that were trained, if shortly; the others were given up before.
        whole: those of them that full training will not change.
    """
    classes: dict[tuple[int, float], dict[int, Mapping[str, float]]] = {}
    for number, mine in figures.items():
        excess = budget.excess(mine) if number in whole else near(budget.excess(mine))
        drop = excess.pop("metric_drop", 0.0)
        outside = sum(max(over, 0.0) for name, over in excess.items() if over > (NOISE if name == "latency" else 0))
        kind = 2 if outside or number not in short else 0 if drop <= 0 else 1
        classes.setdefault((kind, outside), {})[number] = mine
    order: list[int] = []
    for _, members in sorted(classes.items()):
        left = dict(members)
        while left:
            layer = _distinct(front_of(left, budget.objectives), left, budget.objectives)
            order += _spread({number: left[number] for number in layer}, budget.objectives)
            left = {number: each for number, each in left.items() if number not in layer}
    return order


def next_finalist(
    results: Mapping[int, Mapping[str, Any]], finished: Mapping[int, Mapping[str, Any] | None], budget: Budget
) -> int | None:
    """The trial to train in full next, as far as is known now; None where enough were.

    Trials that train nothing and keep the bounds come first, where no other of them is better: they cost no training,
    and do not count as finalists.

    Args:
        results: of the trials.
        finished: the results of those that were trained in full; None where a worker is at one.
    """
    figures = {number: result["figures"] for number, result in results.items() if "figures" in result}
    short = {number for number in figures if results[number]["state"] == "candidate"}
    whole = {number for number in figures if results[number]["stage"] == WHOLE}
    order = finalists(figures, short, budget, whole)
    sound = [number for number in order if number in whole and _keeps_bounds(results[number])]
    best = front_of({number: figures[number] for number in sound}, budget.objectives)
    free = _distinct(best, figures, budget.objectives)[: budget.finalists]
    for number in free:
        if number not in finished:
            return number
    if _enough({number: result for number, result in finished.items() if number not in free}, finished, budget):
        return None
    remaining = [number for number in order if number not in finished and number not in sound]
    known = [figures[number] for number in finished]

    def can_wait(number: int) -> tuple[bool, bool]:
        """No better than a finished one, or even equal to one: then its parameters change nothing."""
        mine = figures[number]
        return any(all(other[name] <= mine[name] for name in budget.objectives) for other in known), mine in known

    return min(remaining, key=can_wait, default=None)


def _keeps_bounds(result: Mapping[str, Any]) -> bool:
    return max(result["excess"].values(), default=0.0) <= 0


def _enough(trained: Mapping[int, Any], finished: Mapping[int, Mapping[str, Any] | None], budget: Budget) -> bool:
    """Were enough trials trained in full? Twice as many where none keeps the bounds."""
    within = any(result and result.get("within") for result in finished.values())
    limit = budget.finalists if within or not budget.bounds else 2 * budget.finalists
    undecided = None in finished.values()  # whether more are needed is known when those at work are done
    return len(trained) >= (budget.finalists if undecided else limit)


def _distinct(layer: Sequence[int], figures: Mapping[int, Mapping[str, float]], names: Sequence[str]) -> list[int]:
    """The first at each place: what is as good as another can wait."""
    places: dict[tuple[float, ...], int] = {}
    for number in layer:
        places.setdefault(tuple(figures[number][name] for name in names), number)
    return list(places.values())


def _spread(layer: Mapping[int, Mapping[str, float]], names: Sequence[str]) -> list[int]:
    """The best in the first objective, then again and again the one that is farthest from those before."""
    low = {name: min(each[name] for each in layer.values()) for name in names}
    width = {name: max(each[name] for each in layer.values()) - low[name] or 1.0 for name in names}
    places = {number: [(each[name] - low[name]) / width[name] for name in names] for number, each in layer.items()}
    left = sorted(places, key=lambda number: (places[number], number))
    order = [left.pop(0)] if left else []
    while left:
        farthest = max(
            left, key=lambda number: (min(_distance(places[number], places[each]) for each in order), -number)
        )
        left.remove(farthest)
        order.append(farthest)
    return order


def _distance(one: Sequence[float], other: Sequence[float]) -> float:
    return sum((a - b) ** 2 for a, b in zip(one, other, strict=True))


def judge(figures: Mapping[int, Mapping[str, float]], budget: Budget, units: Mapping[str, str] = UNITS) -> Verdict:
    """Of measured artifacts: is one within all bounds, or which is nearest, and what it breaks.

    The nearest is the one whose worst excess, as a fraction of its bound, is least.
    """
    if not figures:
        return Verdict(met=False, nearest=None, binding=(), text="no candidate could be measured")
    within = [number for number, each in figures.items() if max(budget.excess(each).values(), default=0.0) <= 0]
    if within:
        best = min(within, key=lambda number: ([figures[number][name] for name in budget.objectives], number))
        kept = f"{len(within)} of {len(figures)} measured artifacts within the budget, the best is trial {best}"
        return Verdict(met=True, nearest=best, binding=(), text=f"{kept}: {_told(figures[best], budget, units)}")
    worst = {number: max(budget.excess(each).values()) for number, each in figures.items()}
    nearest = min(worst, key=lambda number: (worst[number], number))
    over = budget.excess(figures[nearest])
    binding = tuple(name for name in sorted(over, key=lambda name: -over[name]) if over[name] > 0)
    return Verdict(
        met=False,
        nearest=nearest,
        binding=binding,
        text=f"the budget cannot be met by what was measured; nearest is trial {nearest}: "
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
    """The hypervolume that points, all to be small, cover up to a reference point: (points, objectives) -> area.

    Points beyond the reference count nothing. Source: Zitzler & Thiele 1998, doi:10.1007/BFb0056872.
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
