"""What a sensitivity analysis tells a search beforehand: a place to begin."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchslim.analysis.result import Sensitivity
from torchslim.core.budget import Budget
from torchslim.tuning.space import Parameter, Space

MILDEST = "int8"  # what it does to the outputs is taken for bearable, where the metric itself was not measured


def informed_start(space: Space, found: Sensitivity) -> dict[str, Any]:
    """The strongest values whose damages, added up over the model, are still bearable; the rest as `Space.whole`.

    Bearable is the budget's drop where the metric was measured, and else what static int8 of all layers does. Damages
    of single changes add up to the model's only roughly: it is a place to begin, not a prediction.
    """
    totals = total_damage(found)
    limit = _bearable(found, totals, space.budget)
    values = space.whole(0.5)
    for parameter in space.parameters:
        if parameter.path[-1] == "sparsity" and parameter.kind == "float":
            values[parameter.name] = _sparsity(parameter, totals, limit)
        elif parameter.path[-1] == "scheme":
            known = [choice for choice in parameter.choices if choice in totals]
            if known:
                values[parameter.name] = min(known, key=totals.__getitem__)
    return values


def total_damage(found: Sensitivity) -> dict[Any, float]:
    """By scheme, and by the fraction of channels removed, the sum of the damages of all single changes."""
    totals: dict[Any, float] = {}
    for point in found.points:
        hurt = found.damage(point)
        if hurt is not None:
            key = point.change if point.amount is None else point.amount
            totals[key] = totals.get(key, 0.0) + hurt
    return totals


def _bearable(found: Sensitivity, totals: Mapping[Any, float], budget: Budget) -> float:
    if found.measure == "metric" and budget.metric_drop is not None:
        return budget.metric_drop
    return totals.get(MILDEST, 0.0)


def _sparsity(parameter: Parameter, totals: Mapping[Any, float], limit: float) -> float:
    amounts = sorted(total for total in totals if isinstance(total, float))
    bearable = [amount for amount in amounts if totals[amount] <= limit]
    wanted = max(bearable, default=parameter.low)
    kept = min(max(wanted, parameter.low), parameter.high)
    if parameter.step:
        kept = parameter.low + round((kept - parameter.low) / parameter.step) * parameter.step
    return float(kept)
