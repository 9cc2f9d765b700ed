"""Derive the first trial of a search from a sensitivity analysis."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchslim.analysis.result import Sensitivity
from torchslim.core.budget import Budget
from torchslim.tuning.space import Parameter, Space

MILDEST = "int8"  # scheme whose total damage counts as bearable if the metric itself was not measured


def informed_start(space: Space, found: Sensitivity) -> dict[str, Any]:
    """Values with the strongest bearable sparsities and the least damaging schemes; all others as `Space.whole(0.5)`.

    A damage is bearable up to the budget's drop if the metric was measured, else up to that of static int8 of all
    layers. Damages of single changes add up to the model's only roughly: the values are a start, not a prediction.
    """
    totals = total_damage(found)
    limit = _bearable(found, totals, space.budget)
    values = space.whole(0.5)
    for parameter in space.parameters:
        if parameter.path[-1] == "sparsity" and parameter.kind == "float":
            values[parameter.name] = _sparsity(parameter, totals, limit)
        elif parameter.path[-1] == "scheme":
            schemes = [choice for choice in parameter.choices if choice in totals]
            if schemes:
                values[parameter.name] = min(schemes, key=totals.__getitem__)
    return values


def total_damage(found: Sensitivity) -> dict[Any, float]:
    """Sum of the damages of all single changes, by scheme and by fraction of channels removed."""
    totals: dict[Any, float] = {}
    for point in found.points:
        damage = found.damage(point)
        if damage is not None:
            key = point.change if point.amount is None else point.amount
            totals[key] = totals.get(key, 0.0) + damage
    return totals


def _bearable(sensitivity: Sensitivity, totals: Mapping[Any, float], budget: Budget) -> float:
    if sensitivity.measure == "metric" and budget.metric_drop is not None:
        return budget.metric_drop
    return totals.get(MILDEST, 0.0)


def _sparsity(parameter: Parameter, totals: Mapping[Any, float], limit: float) -> float:
    amounts = sorted(amount for amount in totals if isinstance(amount, float))
    bearable = [amount for amount in amounts if totals[amount] <= limit]
    strongest = max(bearable, default=parameter.low)
    sparsity = min(max(strongest, parameter.low), parameter.high)
    if parameter.step:
        sparsity = parameter.low + round((sparsity - parameter.low) / parameter.step) * parameter.step
    return float(sparsity)
