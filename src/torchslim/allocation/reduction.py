"""Makes an allocation problem smaller without losing its best choices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from torchslim.allocation.problem import Floats, Problem, Term
from torchslim.errors import AllocationError

Tables = dict[tuple[int, ...], Floats]
"""One table for each set of decisions, which are in rising order."""

Allowed = Sequence[Sequence[int]] | None
"""For each decision the places of the options that may be chosen; None: all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reduced:
    """A smaller problem: decisions of one option are gone, and each set of decisions has one table.

    Attributes:
        sizes: number of options of each remaining decision.
        scopes: the sets of two or more decisions that have a table.
        damage, costs, limits: as those of a problem, of the limited costs alone.
        totals: constant of each limited cost.
        kept: for each remaining decision, its place in the whole problem and the places of its remaining options.
        fixed: for each decision of the whole problem, the place of its only option, where one remains.
    """

    sizes: tuple[int, ...]
    scopes: tuple[tuple[int, ...], ...]
    damage: tuple[Term, ...]
    costs: Mapping[str, tuple[Term, ...]]
    limits: Mapping[str, float]
    totals: Mapping[str, float]
    kept: tuple[tuple[int, tuple[int, ...]], ...]
    fixed: tuple[int, ...]

    def original(self, places: Sequence[int]) -> tuple[int, ...]:
        """Places in the whole problem from places in the reduced one."""
        whole = list(self.fixed)
        for (decision, options), place in zip(self.kept, places, strict=True):
            whole[decision] = options[place]
        return tuple(whole)


def reduced(problem: Problem, allowed: Allowed = None) -> Reduced:
    """The problem without dominated options, without decisions of one option, and with its tables merged.

    An option is dominated if another one of the same decision has no more damage and no more of any limited cost,
    whatever the other decisions are. Costs without a limit are left out.

    Raises:
        AllocationError: a decision has no allowed option.
    """
    names = [name for name, limit in problem.limits.items() if limit < np.inf]
    sums = [merged(problem.damage), *(merged(problem.costs[name]) for name in names)]
    sizes = [len(decision.options) for decision in problem.decisions]
    keep: list[NDArray[np.intp]] = [np.arange(size) for size in sizes]
    if allowed is not None:
        keep = [np.array(sorted(set(places)), dtype=np.intp) for places in allowed]
        for chosen, own, size in zip(problem.decisions, keep, sizes, strict=True):
            if not len(own) or own[0] < 0 or own[-1] >= size:
                raise AllocationError(f"decision {chosen.name!r} allows {own.tolist()} of its {size} options")
    queue = list(range(len(sizes)))
    while queue:  # fewer options of one decision can make options of its neighbours dominated
        decision = queue.pop(0)
        remaining = _undominated(decision, keep, sums)
        if len(remaining) < len(keep[decision]):
            keep[decision] = remaining
            queue += sorted(_neighbours(decision, sums) - set(queue))
    free = [decision for decision, options in enumerate(keep) if len(options) > 1]
    places = {decision: place for place, decision in enumerate(free)}
    tables = [_over(table, keep, places) for table in sums]
    scopes = _widest({scope for table in tables for scope in table if len(scope) > 1})
    damage, *costs = (_terms(table, scopes, [len(keep[decision]) for decision in free]) for table in tables)
    return Reduced(
        sizes=tuple(len(keep[decision]) for decision in free),
        scopes=scopes,
        damage=damage,
        costs=dict(zip(names, costs, strict=True)),
        limits={name: problem.limits[name] for name in names},
        totals={name: float(table.get((), np.zeros(()))) for name, table in zip(names, tables[1:], strict=True)},
        kept=tuple((decision, tuple(keep[decision].tolist())) for decision in free),
        fixed=tuple(int(options[0]) for options in keep),
    )


def merged(terms: Sequence[Term]) -> Tables:
    """The sum of all terms over the same decisions, in rising order of the decisions."""
    tables: Tables = {}
    for term in terms:
        order = np.argsort(term.decisions, kind="stable")
        scope = tuple(term.decisions[place] for place in order)
        values = term.values.transpose(order) if scope else term.values
        tables[scope] = tables[scope] + values if scope in tables else values
    return tables


def _neighbours(decision: int, sums: Sequence[Tables]) -> set[int]:
    return {other for table in sums for scope in table if decision in scope for other in scope} - {decision}


def _undominated(decision: int, keep: Sequence[NDArray[np.intp]], sums: Sequence[Tables]) -> NDArray[np.intp]:
    """Options of a decision, of those in `keep`, that no other dominates; of equal ones the first."""
    options = keep[decision]
    count = len(options)
    never_more = np.ones((count, count), dtype=bool)  # [a, b]: a is never above b, in any sum
    for table in sums:
        difference = np.zeros((count, count))  # an upper bound of a - b
        for scope, values in table.items():
            if decision not in scope:
                continue
            inner = values[np.ix_(*(keep[other] for other in scope))]
            rows = np.moveaxis(inner, scope.index(decision), 0).reshape(count, -1)
            difference += (rows[:, None] - rows[None]).max(2)
        never_more &= difference <= 0
    equal = never_more & never_more.T
    earlier = np.tri(count, k=-1, dtype=bool).T  # [a, b]: a is before b
    dominated = (never_more & (~equal | earlier)).any(0)
    remaining: NDArray[np.intp] = options[~dominated]
    return remaining


def _over(table: Tables, keep: Sequence[NDArray[np.intp]], places: Mapping[int, int]) -> Tables:
    """The tables over the free decisions alone, by their new places."""
    smaller: Tables = {}
    for scope, values in table.items():
        inner = values[np.ix_(*(keep[decision] for decision in scope))] if scope else values
        new = tuple(places[decision] for decision in scope if decision in places)
        inner = inner.reshape([len(keep[decision]) for decision in scope if decision in places])
        smaller[new] = smaller[new] + inner if new in smaller else inner
    return smaller


def _widest(scopes: set[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
    """The scopes that are part of no other."""
    return tuple(sorted(scope for scope in scopes if not any(set(scope) < set(other) for other in scopes)))


def _terms(table: Tables, scopes: Sequence[tuple[int, ...]], sizes: Sequence[int]) -> tuple[Term, ...]:
    """Terms over single decisions and over the widest scopes, into which the narrower ones are added."""
    terms: Tables = {}
    for scope, values in table.items():
        home = scope if len(scope) < 2 else next(wide for wide in scopes if set(scope) <= set(wide))
        shape = [sizes[decision] if decision in scope else 1 for decision in home]
        spread = np.broadcast_to(values.reshape(shape), [sizes[decision] for decision in home])
        terms[home] = terms[home] + spread if home in terms else spread
    return tuple(Term(decisions=scope, values=values) for scope, values in terms.items())
