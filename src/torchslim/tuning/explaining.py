"""Explains the recipes of a solved search: what each choice bought, what was refused, and what was predicted.

Savings are those of the tables; damages are in the unit of the metric once recipes were trained, else in that of the
damage table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torchslim.allocation.explain import Trade, explain
from torchslim.tuning.proposing import Proposer, Seen

COUNT = 10


def explained(
    proposer: Proposer, member: Seen, earlier: Sequence[Seen], seen: Sequence[Seen], units: Mapping[str, str]
) -> dict[str, Any]:
    """The explanation of a measured recipe, as `search.json` holds it.

    Args:
        proposer: of the search.
        member: the recipe.
        earlier: recipes that were measured before it was proposed.
        seen: all recipes.
        units: of figures, and of the metric as "metric_drop".
    """
    tables = proposer.tables
    law = proposer.law(seen)
    problem = replace(tables.problem, damage=tables.damage.terms(law))
    trades = explain(problem, member.places, tables.cost, count=COUNT)
    unit = units[tables.cost]
    of_damage = f"{units['metric_drop']} lost".strip() if law.count else "damage before training"
    predicted = {tables.cost: proposer.corrected(proposer.predicted(member.places), earlier)}
    drop = proposer.expected(member.places, earlier)
    if member.trains and not math.isnan(drop):  # some recipe was trained before
        predicted["metric_drop"] = drop
    return {
        "predicted": predicted,
        "bought": [f"{_change(trade)}: saves {_amounts(trade, unit, of_damage)}" for trade in trades.bought],
        "refused": [f"{_change(trade)}: would save {_amounts(trade, unit, of_damage)}" for trade in trades.refused],
    }


def _change(trade: Trade) -> str:
    kind, _, name = trade.decision.partition(" ")
    if kind == "block":
        return f"drop the block {name}" if trade.after == "drop" else f"keep the block {name}"
    if kind == "scheme":
        return f"{trade.after} in place of {trade.before} for {name}"
    return f"{name} with {trade.after} in place of {trade.before} channels"


def _amounts(trade: Trade, unit: str, of_damage: str) -> str:
    return f"{trade.saved:.3g} {unit} for {max(trade.damage, 0.0):.2g} {of_damage}"
