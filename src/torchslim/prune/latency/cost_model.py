"""Predicts the time of any widths from times of single narrowings, and chooses the best widths under a ceiling.

A convolution between two narrowed groups is narrowed twice, so savings do not add up. The time of a model over that of
the whole model is predicted as

    T(w) = 1 - sum_o s_o * (1 - prod_{u in o} c_u(w_u))

where s_o is the share of the time that goes to the operations o that a set of units touches, and c_u(w) is the
fraction of that time that remains when unit u alone keeps w channels. The curves c_u are such that T equals the
measured time wherever one unit alone is narrowed, kernels' staircases included; the shares decide only how narrowings
combine.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from torchslim.allocation.problem import LATENCY, Decision, Problem, Term
from torchslim.allocation.solver import Infeasible, least, solve

Floats = NDArray[np.float64]
Curve = Mapping[int, float]
"""A number for each width; the full width is included."""

NOISE = 0.01
"""A narrower width whose time is above a wider one's by at most this share of the whole time counts as equally fast."""

FAITH = 0.1
"""Weight of the shares of MACs in the fit, relative to the measured savings."""

TOGETHER = 3
"""An operation that more units touch is linearized: a table over all of their widths would be too large."""

LINEARIZATIONS = 6


@dataclass(frozen=True)
class Cost:
    """The time of a model by the widths of its units, over that of the whole model.

    Shapes: `touches` (operations, units), boolean; `shares` (operations,).
    """

    touches: NDArray[np.bool_]
    shares: Floats
    curves: Sequence[Curve]

    def factor(self, unit: int, width: int) -> float:
        """Fraction of the time left of all operations that a unit touches, interpolated between measured widths."""
        curve = self.curves[unit]
        if width in curve:
            return curve[width]
        measured = sorted(curve)
        return float(np.interp(width, measured, [curve[point] for point in measured]))

    def time(self, widths: Sequence[int]) -> float:
        """The predicted time over the whole model's."""
        return self.of(np.array([self.factor(unit, width) for unit, width in enumerate(widths)]))

    def of(self, factors: Floats) -> float:
        """The predicted time over the whole model's, from the units' factors."""
        remaining = np.where(self.touches, factors, 1.0).prod(1)
        return float(max(1 - self.shares @ (1 - remaining), 0.0))

    def slopes(self, factors: Floats) -> Floats:
        """Derivative of the time by each unit's factor: (units,)."""
        count = len(factors)
        touched = np.where(self.touches, factors, 1.0)
        before = np.cumprod(np.concatenate([np.ones((len(touched), 1)), touched], 1), 1)[:, :count]
        after = np.cumprod(np.concatenate([np.ones((len(touched), 1)), touched[:, ::-1]], 1), 1)[:, :count][:, ::-1]
        slopes: Floats = self.shares @ np.where(self.touches, before * after, 0.0)
        return slopes


def smoothed(ratios: Curve) -> dict[int, float]:
    """Times by width, where a width that is slower than a wider one only by noise gets the wider one's time."""
    smooth: dict[int, float] = {}
    fastest = np.inf
    for width in sorted(ratios, reverse=True):
        ratio = ratios[width]
        if fastest < ratio <= fastest + NOISE:
            ratio = fastest
        smooth[width] = ratio
        fastest = min(fastest, ratio)
    return smooth


def fit(touches: NDArray[np.bool_], work: Floats, ratios: Sequence[Curve]) -> Cost:
    """The cost model of a table, exact wherever one unit alone is narrowed.

    Args:
        touches: (operations, units), which units each set of operations depends on.
        work: (operations,), the fraction of all multiply-accumulates of each set; sets of one unit may have none.
        ratios: per unit, the time over the whole model's by the unit's width; 1 at the full width.
    """
    count = len(ratios)
    touches = np.concatenate([touches.reshape(-1, count), np.eye(count, dtype=bool)])  # memory-bound work of each unit
    work = np.concatenate([work, np.zeros(count)])
    smooth = [smoothed(curve) for curve in ratios]
    savings = np.array([_reach(curve) for curve in smooth])
    shares = _shares(touches, work, savings)
    least = np.array([max(1 - min(curve.values()), 0.0) for curve in smooth])
    missing = np.maximum(least - touches.T.astype(float) @ shares, 0.0)
    shares[len(shares) - count :] += missing  # so that no factor is below 0
    totals = touches.T.astype(float) @ shares
    curves = [
        {width: 1 - (1 - ratio) / total if total > 1e-12 else 1.0 for width, ratio in curve.items()}
        for curve, total in zip(smooth, totals.tolist(), strict=True)
    ]
    return Cost(touches, shares, curves)


def _reach(ratios: Curve) -> float:
    """Share of the time that removing a whole unit would save, on the line fitted to its measured savings."""
    full = max(ratios)
    removed = np.array([1 - width / full for width in ratios])
    saved = np.array([1 - ratio for ratio in ratios.values()])
    return float(np.clip(removed @ saved / max(removed @ removed, 1e-12), 0.0, 1.0))


def _shares(touches: NDArray[np.bool_], work: Floats, targets: Floats) -> Floats:
    """Shares of at least 0 and at most 1 in total, with sums per unit near `targets`, and otherwise near `work`."""
    unit_rows = touches.T.astype(float)
    shares = work.copy()
    curvature = float(np.linalg.norm(unit_rows, 2) ** 2) + FAITH
    for _ in range(2000):
        shares = shares - (unit_rows.T @ (unit_rows @ shares - targets) + FAITH * (shares - work)) / curvature
        shares = _projected(shares)
    return shares


def _projected(shares: Floats) -> Floats:
    """The nearest point with no share below 0 and a sum of at most 1."""
    clipped: Floats = np.maximum(shares, 0.0)
    if clipped.sum() <= 1:
        return clipped
    falling = np.sort(shares)[::-1]
    over = (np.cumsum(falling) - 1) / np.arange(1, len(shares) + 1)
    level = over[np.flatnonzero(falling > over)[-1]]
    projected: Floats = np.maximum(shares - level, 0.0)
    return projected


def between(points: Sequence[tuple[float, float]], value: float) -> float:
    """The time that pairs of times map `value` to: by powers between the pairs, with 1 at 1 and 0 at 0.

    Pairs that noise has put out of order are left out.

    >>> between([(0.5, 0.7)], 1.0), round(between([(0.5, 0.7)], 0.25), 2)
    (1.0, 0.49)
    """
    logs = [(0.0, 0.0)]  # in logarithms, from 1 downwards
    for first, second in sorted(points, reverse=True):
        if first > 0 and second > 0 and np.log(first) < logs[-1][0] - 1e-6 and np.log(second) < logs[-1][1] - 1e-6:
            logs.append((float(np.log(first)), float(np.log(second))))
    log_value = float(np.log(max(value, 1e-6)))
    if len(logs) == 1 or log_value >= 0:
        return float(np.exp(log_value))
    if log_value < logs[-1][0]:
        return float(np.exp(log_value * logs[-1][1] / logs[-1][0]))
    ascending = logs[::-1]
    return float(np.exp(np.interp(log_value, [source for source, _ in ascending], [image for _, image in ascending])))


def choose(cost: Cost, lost: Sequence[Curve], ceiling: float) -> list[int]:
    """A width for each unit, with a predicted time of at most `ceiling` and as little loss as possible.

    The times of operations that few units touch enter as tables over these units, and the choice is exact. An operation
    that many units touch, such as one behind a concatenation, is linearized at the widths of the last solution; then
    the best of a few solutions is returned. If no widths keep the ceiling, the fastest.

    Args:
        cost: the cost model of the units.
        lost: per unit, the loss by width, for the widths to choose from.
        ceiling: relative to the whole model's time.
    """
    widths = [sorted(curve, reverse=True) for curve in lost]
    factors = [np.array([cost.factor(unit, width) for width in own]) for unit, own in enumerate(widths)]
    losses = [np.array([curve[width] for width in own]) for curve, own in zip(lost, widths, strict=True)]
    wide = cost.touches.sum(1) > TOGETHER
    at = np.ones(len(lost))
    limit, tried = ceiling, {}
    for _ in range(LINEARIZATIONS if wide.any() else 1):
        places = _solved(_problem(cost, factors, losses, wide, at), limit)
        at = np.array([own[place] for own, place in zip(factors, places, strict=True)])
        time = cost.of(at)
        loss = sum(float(own[place]) for own, place in zip(losses, places, strict=True))
        excess = max(time - ceiling * (1 + 1e-9), 0.0)
        if places in tried and not excess:
            break
        tried[places] = (excess, loss)
        limit -= excess  # what the linearization missed
    best = min(tried, key=lambda chosen: tried[chosen])
    return [own[place] for own, place in zip(widths, best, strict=True)]


def _solved(problem: Problem, limit: float) -> tuple[int, ...]:
    """Places of the widths with the least loss within a limit of the time, or of the fastest ones."""
    try:
        return solve(replace(problem, limits={LATENCY: limit})).places
    except Infeasible:
        return least(problem, LATENCY).places


def _problem(
    cost: Cost, factors: Sequence[Floats], losses: Sequence[Floats], wide: NDArray[np.bool_], at: Floats
) -> Problem:
    """The choice of widths as an allocation problem, with the operations of `wide` linearized at the factors `at`."""
    terms = [Term(decisions=(), values=np.array(1 - cost.shares.sum()))]
    for touched, share in zip(cost.touches[~wide], cost.shares[~wide], strict=True):
        units = tuple(np.flatnonzero(touched).tolist())
        table = functools.reduce(np.multiply.outer, [factors[unit] for unit in units], np.array(share))
        terms.append(Term(decisions=units, values=table))
    if wide.any():
        part = Cost(cost.touches[wide], cost.shares[wide], cost.curves)
        slopes = part.slopes(at)
        constant = part.shares @ np.where(part.touches, at, 1.0).prod(1) - slopes @ at
        terms.append(Term(decisions=(), values=np.array(constant)))
        terms += [Term(decisions=(unit,), values=slopes[unit] * own) for unit, own in enumerate(factors)]
    return Problem(
        decisions=tuple(Decision(name=f"width {unit}", options=tuple(own)) for unit, own in enumerate(losses)),
        damage=tuple(Term(decisions=(unit,), values=own) for unit, own in enumerate(losses)),
        costs={LATENCY: tuple(terms)},
    )
