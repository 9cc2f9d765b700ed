"""Explains a choice: what each option bought for its damage, and which options were refused at what price."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torchslim.allocation.problem import Decision, Problem

NOTHING = 1e-12


@dataclass(frozen=True, slots=True, kw_only=True)
class Trade:
    """One option in place of another one, all other decisions as chosen.

    Attributes:
        decision: name of the decision.
        before, after: the options.
        saved: what the option saves of the cost.
        damage: what it adds to the damage.
    """

    decision: str
    before: object
    after: object
    saved: float
    damage: float

    @property
    def rate(self) -> float:
        """What is saved per damage; infinite where there is no damage."""
        return self.saved / self.damage if self.damage > NOTHING else float("inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """The options that bought most per damage, and the refused options that would have bought most, best first."""

    bought: tuple[Trade, ...]
    refused: tuple[Trade, ...]


def explain(problem: Problem, places: Sequence[int], cost: str, *, count: int = 10) -> Explanation:
    """What the options of a choice save of a cost for their damage, and what was refused.

    A chosen option is compared with option 0 of its decision, which changes nothing. A refused option is one that saves
    more than the chosen one; of each decision, the one that saves most for its damage.

    Args:
        problem: with the damage and the cost.
        places: of the chosen options.
        cost: name of the cost.
        count: how many options of each kind are returned at most.
    """
    bought, refused = [], []
    for number, decision in enumerate(problem.decisions):
        chosen = places[number]
        if chosen:
            trade = _trade(problem, places, cost, number, decision, 0, chosen)
            if trade.saved > 0:
                bought.append(trade)
        others = [
            _trade(problem, places, cost, number, decision, chosen, other)
            for other in range(len(decision.options))
            if other != chosen
        ]
        saving = [trade for trade in others if trade.saved > 0 and trade.damage > 0]
        if saving:
            refused.append(max(saving, key=lambda trade: trade.rate))
    return Explanation(
        bought=tuple(sorted(bought, key=lambda trade: (-trade.rate, -trade.saved))[:count]),
        refused=tuple(sorted(refused, key=lambda trade: -trade.rate)[:count]),
    )


def _trade(
    problem: Problem, places: Sequence[int], cost: str, number: int, decision: Decision, before: int, after: int
) -> Trade:
    """The differences between two options; only terms over the decision differ."""
    saved = damage = 0.0
    old, new = ([*places[:number], place, *places[number + 1 :]] for place in (before, after))
    for term in problem.costs[cost]:
        if number in term.decisions:
            saved += term.at(old) - term.at(new)
    for term in problem.damage:
        if number in term.decisions:
            damage += term.at(new) - term.at(old)
    return Trade(
        decision=decision.name,
        before=decision.options[before],
        after=decision.options[after],
        saved=saved,
        damage=damage,
    )
