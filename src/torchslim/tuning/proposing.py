"""Proposes the next recipe of a solved search: from tables, and from what the trained recipes were measured to be.

The proposals form a chain. The first one only quantizes. Each next one is solved for a lower cost, with options that
remove no less than those of the recipe before it, and starts from its trained weights, so that training adds up along
the chain. Once the chain has reached the lowest cost that is wanted, the widest gaps of the front are filled: by
trained recipes as long as the budget of training lasts, then by small cuts from trained weights, which only solve for
the weights that remain. After every measurement the weights of the kinds of changes are fitted again, and predicted
costs are corrected.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np

from torchslim.allocation.problem import Problem
from torchslim.allocation.solver import Infeasible, Solution, least, solve
from torchslim.analysis.damage import SCHEME, AdditionLaw, DamageTable, fitted, kind_of

MOST_STEP = 0.65
"""The next recipe of a chain costs at least this much of the recipe before it: training recovers small steps better."""

LEAST_STEP = 0.85
"""It costs at most this much of it, as long as the recipe before it is within the bound of the metric's drop: a law
that was fitted to few recipes must not end a chain that has lost little so far."""

GAP = 0.03
"""A gap between two recipes of less than this fraction of the cost is not filled."""

NOISE = 5e-4
"""A change of the metric by less than this fraction of the original's is noise: 0.045 points of an accuracy of 90 %."""

FRACTIONS = (0.5, 0.25)
"""Where a gap is filled without training, as fractions of its width on a logarithmic scale: small cuts lose least."""

BEYOND = 1.5
"""Times the bound of the metric's drop: a chain ends behind a recipe that loses more."""

TRAINED_POWERS = (0.25, 0.375, 0.5, 0.75, 1.0)
ENOUGH = 5
"""Trained recipes from which the power of single damages is fitted; fewer tell noise from a power too badly."""

ORIGINAL = -1


@dataclass(frozen=True, kw_only=True)
class Tables:
    """Everything that proposals are solved from.

    Attributes:
        problem: decisions, costs in the budget's units, and the budget's limits; its damage is that of `law`.
        damage: single damages.
        law: how they add up without training.
        cost: name of the cost that is traded for the metric.
    """

    problem: Problem
    damage: DamageTable
    law: AdditionLaw
    cost: str


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A recipe that was measured, or is being trained.

    Attributes:
        number: of the trial; `ORIGINAL` for the model without changes.
        places: of its options.
        cost: measured; predicted while it is trained.
        drop: of the metric after training; None while it is trained.
        trains: whether it trained after its own cuts.
        after: number of the trained recipe that it started from.
    """

    number: int
    places: tuple[int, ...]
    cost: float
    drop: float | None
    trains: bool = True
    after: int = ORIGINAL


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """The next recipe: options, the trial whose weights it starts from, whether it trains, and what is expected."""

    solution: Solution
    after: int
    cost: float
    drop: float
    train: bool = True


@dataclass
class Proposer:
    """Proposes recipes.

    Args:
        tables: of the model.
        wanted_drop: bound of the metric's drop; None: none.
        wanted_cost: bound of the cost; None: as low as the metric allows.
        metric: of the original, for its size.
        changes: whether the choice of all first options changes the model, by steps that the solver does not decide.
    """

    tables: Tables
    wanted_drop: float | None = None
    wanted_cost: float | None = None
    metric: float = 100.0
    changes: bool = False
    _known: dict[tuple[int, ...], float] = field(default_factory=dict)  # predicted costs

    @property
    def noise(self) -> float:
        """Drops up to this are noise, in the metric's unit."""
        return NOISE * (abs(self.metric) or 1.0)

    def propose(self, seen: Sequence[Seen], remaining: int) -> Proposal | None:
        """The next recipe; None if the front has no gap that is worth one.

        Args:
            seen: recipes that were measured or are trained.
            remaining: number of recipes that can still be trained.
        """
        full = (0,) * len(self.tables.problem.decisions)
        original = Seen(number=ORIGINAL, places=full, cost=self.predicted(full), drop=0.0, trains=False)
        quantized = self._quantized()
        known = [*seen] if self.changes else [original, *seen]
        if quantized.places not in {each.places for each in known}:
            return self._made(quantized, original, seen)
        if remaining < 1:
            return self._untrained(known, seen)
        everything = known
        law = self.law(seen)
        lowest = min(everything, key=lambda each: (each.cost, each.number))
        target = self._target(law, lowest, seen)
        if not self._too_far(lowest) and lowest.cost > target * (1 + GAP):
            ratio = float(np.clip((target / lowest.cost) ** (1 / remaining), MOST_STEP, LEAST_STEP))
            found = self._below(lowest, lowest.cost * ratio, law, seen)
            if found is not None:
                return found
        for upper, lower in self._gaps(everything):
            found = self._below(upper, _between(upper, lower, 0.5), law, seen)
            if found is not None:
                return found
        return None

    def _untrained(self, known: Sequence[Seen], seen: Sequence[Seen]) -> Proposal | None:
        """A small cut that fills the widest gap without training; None if all gaps were tried."""
        measured = [each for each in known if each.drop is not None]  # others are lost, or their gaps may close
        for upper, lower in self._gaps(measured):
            for fraction in FRACTIONS:
                limit = _between(upper, lower, fraction)
                found = self._below(upper, limit, self.tables.law, seen) if upper.cost - limit > GAP * limit else None
                if found is not None:
                    return replace(found, train=False)
        return None

    def predicted(self, places: tuple[int, ...]) -> float:
        """The cost of a choice by the tables."""
        problem = self.tables.problem
        if places not in self._known:
            self._known[places] = problem.total(problem.costs[self.tables.cost], places)
        return self._known[places]

    def corrected(self, predicted: float, seen: Sequence[Seen]) -> float:
        """A predicted cost, corrected by the recipes with similar costs that were measured."""
        measured = [each for each in seen if each.drop is not None]
        if not measured:
            return predicted
        known = np.log([self.predicted(each.places) for each in measured])
        factors = np.log([each.cost for each in measured]) - known
        order = np.argsort(known, kind="stable")
        return float(predicted * np.exp(np.interp(np.log(predicted), known[order], factors[order])))

    def law(self, seen: Sequence[Seen]) -> AdditionLaw:
        """How damages add up to drops of the metric after training, by the recipes that were trained."""
        trained = [each for each in seen if each.drop is not None and each.trains]
        return fitted(
            self.tables.damage,
            [each.places for each in trained],
            [each.drop or 0.0 for each in trained],
            powers=TRAINED_POWERS if len(trained) >= ENOUGH else (self.tables.law.power,),
            prior=replace(self.tables.law, outer=1.0),
            floor=self.noise,
        )

    def expected(self, places: Sequence[int], seen: Sequence[Seen]) -> float:
        """The drop of the metric that a choice is expected to end with; NaN before any recipe was trained."""
        law = self.law(seen)
        return self.tables.damage.predicted(places, law) if law.count else float("nan")

    def problem(self, law: AdditionLaw) -> Problem:
        """The problem that is solved: the damage by a law."""
        return replace(self.tables.problem, damage=self.tables.damage.terms(law))

    def _quantized(self) -> Solution:
        """The cheapest choice of schemes with all widths and blocks as they are."""
        decisions = self.tables.problem.decisions
        allowed = [range(len(decision.options)) if kind_of(decision) == SCHEME else (0,) for decision in decisions]
        unlimited = replace(self.problem(self.tables.law), limits={})
        return least(unlimited, self.tables.cost, allowed=allowed)

    def _target(self, law: AdditionLaw, lowest: Seen, seen: Sequence[Seen]) -> float:
        """The lowest cost to go to."""
        if self.wanted_cost is not None:
            return self.wanted_cost
        end = least(replace(self.problem(law), limits={}), self.tables.cost)
        bottom = self.corrected(end.costs[self.tables.cost], seen)
        if self.wanted_drop is None or not law.count:
            return float(np.sqrt(bottom * max(lowest.cost, bottom)))
        limits = np.geomspace(max(lowest.cost, bottom), bottom, 8)[1:]
        target = lowest.cost
        for limit in limits:
            found = self._solved(lowest, float(limit), law, seen)
            if found is None or self.tables.damage.predicted(found.places, law) > self.wanted_drop:
                break
            target = float(limit)
        within = lowest.trains and lowest.drop is not None and lowest.drop < self.wanted_drop - self.noise
        return min(target, lowest.cost * LEAST_STEP) if within else target

    def _too_far(self, each: Seen) -> bool:
        return self.wanted_drop is not None and (each.drop or 0.0) > BEYOND * max(self.wanted_drop, self.noise)

    def _gaps(self, everything: Sequence[Seen]) -> list[tuple[Seen, Seen]]:
        """The recipes above and below each gap of the front, the largest gap first."""
        ordered = sorted(everything, key=lambda each: (each.cost, each.number))
        front: list[Seen] = []
        for each in reversed(ordered):  # from the dearest one on
            while front and (each.drop or 0.0) <= (front[-1].drop or 0.0):
                front.pop()
            front.append(each)
        gaps = []
        for upper, lower in pairwise(front):
            if self._too_far(upper) or lower.cost > upper.cost * (1 - GAP):
                continue
            bottom = min(lower.drop or 0.0, BEYOND * self.wanted_drop if self.wanted_drop else np.inf)
            height = bottom - (upper.drop or 0.0)
            if height > self.noise:  # else the cheaper recipe is as good
                area = (upper.cost - lower.cost) * height
                gaps.append((area, upper.number, upper, lower))
        gaps.sort(key=lambda gap: (-gap[0], gap[1]))
        return [(upper, lower) for _, _, upper, lower in gaps]

    def _below(self, upper: Seen, limit: float, law: AdditionLaw, seen: Sequence[Seen]) -> Proposal | None:
        """The proposal at a cost, from a recipe above it; None if there is none that is new."""
        found = self._solved(upper, limit, law, seen)
        if found is None or found.places in {each.places for each in seen}:
            return None
        return self._made(found, upper, seen)

    def _solved(self, upper: Seen, limit: float, law: AdditionLaw, seen: Sequence[Seen]) -> Solution | None:
        """The choice with the least damage at a measured cost, among those that remove no less than `upper`."""
        cost = self.tables.cost
        factor = self.corrected(limit, seen) / limit
        problem = self.problem(law)
        limits = {**problem.limits, cost: min(limit / factor, problem.limits.get(cost, np.inf))}
        decisions = problem.decisions
        allowed = [
            range(len(decision.options)) if kind_of(decision) == SCHEME else range(place, len(decision.options))
            for decision, place in zip(decisions, upper.places, strict=True)
        ]
        try:
            return solve(replace(problem, limits=limits), allowed=allowed, gap=1e-3)
        except Infeasible:
            return None

    def _made(self, solution: Solution, upper: Seen, seen: Sequence[Seen]) -> Proposal:
        return Proposal(
            solution=solution,
            after=upper.number if upper.trains else upper.after,
            cost=self.corrected(solution.costs[self.tables.cost], seen),
            drop=self.expected(solution.places, seen),
        )


def _between(upper: Seen, lower: Seen, fraction: float) -> float:
    """The cost at a fraction of the way from one recipe to a cheaper one, on a logarithmic scale."""
    return float(upper.cost * (lower.cost / upper.cost) ** fraction)
