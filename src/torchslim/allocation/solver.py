"""Solves allocation problems exactly, as mixed integer programmes.

Every option of a decision is a binary variable. Every table over two or more decisions has a continuous variable for
each of its entries; its sums over all other decisions equal the binary variables of one (the local polytope of
graphical models: Wainwright & Jordan 2008, doi:10.1561/2200000001, section 4.1.1). So the value of a table is exact
wherever the binary variables are whole, and where the tables form a tree, the relaxation is exact up to the limits.
SciPy's HiGHS proves the result (Huangfu & Hall 2018, doi:10.1007/s12532-017-0130-5).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchslim.allocation.problem import Floats, Problem, Term
from torchslim.allocation.reduction import Allowed, Reduced, reduced
from torchslim.errors import AllocationError

TOLERANCE = 1e-6
"""Relative accuracy of the solver's arithmetic at limits."""

EXACT = 1e-9
"""Relative amount by which a cost may exceed its limit, unless only choices within `TOLERANCE` of it exist."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """The choice of an option for every decision.

    Attributes:
        places: of the options, in the order of the problem's decisions.
        options: by the names of the decisions.
        damage: of the choice.
        costs: of the choice, limited or not.
        bound: proven lower bound of the damage of all choices within the limits.
        gap: (damage - bound) relative to the damage; 0 where the choice is proven to be the best one.
    """

    places: tuple[int, ...]
    options: Mapping[str, object]
    damage: float
    costs: Mapping[str, float]
    bound: float
    gap: float


class Infeasible(AllocationError):
    """No choice keeps all limits.

    Attributes:
        binding: the costs whose limits no choice keeps: each alone, or else all of them together.
        least: the least that any choice reaches for each limited cost, while the other limits hold if the limits bind
            only together.
    """

    def __init__(self, message: str, binding: tuple[str, ...], least: Mapping[str, float]) -> None:
        super().__init__(message)
        self.binding, self.least = binding, dict(least)


def solve(problem: Problem, *, allowed: Allowed = None, gap: float = 1e-4, seconds: float = 60.0) -> Solution:
    """The choice with the least damage within all limits.

    Args:
        problem: to solve; where all choices are within one part in a million of a limit, one above it may be returned.
        allowed: for each decision the places of the options that may be chosen; by default all.
        gap: relative gap at which the search for a better choice ends.
        seconds: after which the best choice so far is returned, with its proven gap. Only a choice that was found in
            less than that is the same in every run.

    Raises:
        Infeasible: no choice keeps the limits; says which bind, and the least that can be reached.
        AllocationError: no choice was found in time.
    """
    if not 0 <= gap < np.inf or not seconds > 0:
        raise AllocationError(f"gap must be at least 0 and seconds above 0, got {gap} and {seconds}")
    small = reduced(problem, allowed)
    found = _run(small, small.damage, small.limits, gap, seconds)
    if found is None:
        raise _infeasible(problem, allowed)
    places = small.original(found.places)
    over = [name for name, limit in small.limits.items() if _over(problem, name, places, limit)]
    if over:  # by less than the solver sees
        tighter = {name: limit - 2 * TOLERANCE * abs(limit) * (name in over) for name, limit in small.limits.items()}
        again = _run(small, small.damage, tighter, gap, seconds)
        places = places if again is None else small.original(again.places)
    damage = problem.total(problem.damage, places)
    bound = min(found.bound, damage)
    return Solution(
        places=places,
        options=problem.options(places),
        damage=damage,
        costs={name: problem.total(terms, places) for name, terms in problem.costs.items()},
        bound=bound,
        gap=(damage - bound) / max(abs(damage), 1e-12),
    )


def least(problem: Problem, cost: str, *, allowed: Allowed = None, seconds: float = 60.0) -> Solution:
    """The choice with the lowest `cost` within the limits of all other costs; among equal ones, of little damage.

    The result's `bound` and `gap` are of the cost, in its own unit.

    Raises:
        Infeasible: no choice keeps the other limits.
    """
    if cost not in problem.costs:
        raise AllocationError(f"no cost {cost!r}; this problem has {', '.join(problem.costs) or 'none'}")
    others = {name: limit for name, limit in problem.limits.items() if name != cost}
    lowest = solve(replace(problem, damage=problem.costs[cost], limits=others), allowed=allowed, seconds=seconds)
    mild = solve(replace(problem, limits={**others, cost: lowest.damage}), allowed=allowed, seconds=seconds)
    return replace(mild, bound=lowest.bound, gap=lowest.gap)


def front(
    problem: Problem, cost: str, points: int | Sequence[float], *, gap: float = 1e-4, seconds: float = 60.0
) -> list[Solution]:
    """Solutions at several limits of one cost, the largest first, without repetitions.

    Args:
        problem: its own limit of `cost` is an upper end; its other limits hold for every solution.
        cost: name of the cost that is traded for damage.
        points: the limits; or how many: these are spaced evenly from the cost of the least damage to the least cost,
            both included.
        gap, seconds: of each solution.

    Raises:
        Infeasible: no choice keeps the limits, or the largest of `points`.
    """
    if isinstance(points, int):
        if points < 1:
            raise AllocationError(f"a front needs at least one point, got {points}")
        mild = solve(problem, gap=gap, seconds=seconds)
        low = least(problem, cost, seconds=seconds).costs[cost]
        limits = list(np.linspace(mild.costs[cost], low, points)) if points > 1 else [mild.costs[cost]]
    else:
        limits = sorted(points, reverse=True)
    solutions: dict[tuple[int, ...], Solution] = {}
    for limit in limits:
        limited = replace(problem, limits={**problem.limits, cost: min(limit, problem.limits.get(cost, np.inf))})
        try:
            solution = solve(limited, gap=gap, seconds=seconds)
        except Infeasible:
            if not solutions:
                raise
            break  # smaller limits are infeasible too
        solutions.setdefault(solution.places, solution)
    return list(solutions.values())


def _over(problem: Problem, name: str, places: Sequence[int], limit: float) -> bool:
    return problem.total(problem.costs[name], places) > limit + EXACT * abs(limit)


def _infeasible(problem: Problem, allowed: Allowed) -> Infeasible:
    """The error that names the limits that bind, and the least of each cost."""
    alone = {
        cost: solve(replace(problem, damage=problem.costs[cost], limits={}), allowed=allowed, gap=0).damage
        for cost in problem.limits
    }
    binding = tuple(cost for cost, value in alone.items() if value > problem.limits[cost])
    if binding:
        texts = [f"{cost} of at most {problem.limits[cost]:.4g}, at least {alone[cost]:.4g}" for cost in binding]
        return Infeasible(f"no choice keeps the limits: {'; '.join(texts)}; raise them", binding, alone)
    together: dict[str, float] = {}
    for cost in problem.limits:
        others = {name: limit for name, limit in problem.limits.items() if name != cost}
        try:
            lowest = solve(replace(problem, damage=problem.costs[cost], limits=others), allowed=allowed, gap=0)
        except Infeasible as error:  # three or more limits of which fewer exclude each other
            return error
        together[cost] = lowest.damage
    texts = [f"{cost} of at most {problem.limits[cost]:.4g}, at least {value:.4g}" for cost, value in together.items()]
    return Infeasible(
        f"no choice keeps all limits together: {'; '.join(texts)} while the others hold; raise one of them",
        tuple(problem.limits),
        together,
    )


@dataclass(frozen=True)
class _Found:
    places: tuple[int, ...]
    bound: float


@dataclass
class _Columns:
    """Places of the programme's variables: one for each option of a decision, then the entries of the tables."""

    small: Reduced
    starts: list[int] = field(init=False)  # of each decision's options
    tables: dict[tuple[int, ...], int] = field(init=False)  # start of each table's entries, by its decisions
    count: int = field(init=False)

    def __post_init__(self) -> None:
        sizes = np.cumsum([0, *self.small.sizes])
        self.starts, self.count = [int(start) for start in sizes[:-1]], int(sizes[-1])
        self.tables = {}
        for scope in self.small.scopes:
            self.tables[scope] = self.count
            self.count += int(np.prod([self.small.sizes[decision] for decision in scope]))

    def weights(self, terms: Sequence[Term]) -> tuple[Floats, float]:
        """Coefficient of every variable in a sum of terms, and its constant."""
        weights, constant = np.zeros(self.count), 0.0
        for term in terms:
            if not term.decisions:
                constant += float(term.values)
                continue
            single = len(term.decisions) == 1
            start = self.starts[term.decisions[0]] if single else self.tables[term.decisions]
            weights[start : start + term.values.size] += term.values.ravel()
        return weights, constant

    def equations(self) -> tuple[Any, NDArray[np.float64]]:
        """Rows that hold every decision to one option, and every table to the options of its decisions."""
        from scipy.sparse import csr_matrix

        sizes = self.small.sizes
        rows: list[NDArray[np.intp]] = []
        columns: list[NDArray[np.intp]] = []
        values: list[Floats] = []
        right: list[float] = []

        def add(row: NDArray[np.intp], column: NDArray[np.intp], value: float) -> None:
            rows.append(row)
            columns.append(column)
            values.append(np.full(len(row), value))

        for start, size in zip(self.starts, sizes, strict=True):
            add(np.full(size, len(right)), np.arange(start, start + size), 1.0)
            right.append(1.0)
        for scope, start in self.tables.items():
            shape = tuple(sizes[decision] for decision in scope)
            entries = np.arange(int(np.prod(shape)))
            for axis, decision in enumerate(scope):
                option = np.unravel_index(entries, shape)[axis]
                add(len(right) + option, start + entries, 1.0)
                options = np.arange(shape[axis])
                add(len(right) + options, self.starts[decision] + options, -1.0)
                right += [0.0] * shape[axis]
        shape_ = (len(right), self.count)
        matrix = csr_matrix((np.concatenate(values), (np.concatenate(rows), np.concatenate(columns))), shape_)
        return matrix, np.array(right)


def _run(
    small: Reduced, damage: Sequence[Term], limits: Mapping[str, float], gap: float, seconds: float
) -> _Found | None:
    """The best choice of a reduced problem; None if there is none within the limits."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    if not small.sizes:
        feasible = all(small.totals[name] <= limit * (1 + TOLERANCE) for name, limit in limits.items())
        return _Found((), sum(float(term.values) for term in damage)) if feasible else None
    columns = _Columns(small)
    objective, constant = columns.weights(damage)
    scale = float(np.abs(objective).max()) or 1.0  # the solver's tolerances are absolute
    matrix, right = columns.equations()
    constraints = [LinearConstraint(matrix, right, right)]
    for name, limit in limits.items():
        if limit == np.inf:
            continue
        row, fixed = columns.weights(small.costs[name])
        largest = float(np.abs(row).max()) or 1.0
        room = (limit - fixed + TOLERANCE * abs(limit)) / largest
        constraints.append(LinearConstraint(row[None] / largest, -np.inf, room))
    whole = np.zeros(columns.count)
    whole[: sum(small.sizes)] = 1
    result = milp(
        objective / scale,
        integrality=whole,
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": gap, "time_limit": seconds},
    )
    if result.status == 2:
        return None
    if result.x is None:
        raise AllocationError(f"no choice was found in {seconds:g} s ({result.message}); give it more seconds")
    places = tuple(
        int(result.x[start : start + size].argmax()) for start, size in zip(columns.starts, small.sizes, strict=True)
    )
    bound = -np.inf if result.mip_dual_bound is None else float(result.mip_dual_bound) * scale + constant
    return _Found(places, bound)
