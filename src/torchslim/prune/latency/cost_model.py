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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Curve = Mapping[int, float]
"""A number for each width; the full width is included."""

NOISE = 0.01
"""A narrower width whose time is above a wider one's by at most this share of the whole time counts as equally fast."""

FAITH = 0.1
"""Weight of the shares of MACs in the fit, relative to the measured savings."""

SWAPS = 100


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

    First narrows units to any smaller width, always the one that saves the most time for its loss; then widens units
    where there is room, and exchanges widths while that reduces the loss. If no widths keep the ceiling, the fastest.

    Args:
        cost: the cost model of the units.
        lost: per unit, the loss by width, for the widths to choose from; the search starts at the widest.
        ceiling: relative to the whole model's time.
    """
    return _Search(cost, lost, ceiling).run()


class _Search:
    """The current widths, as places in each unit's list of widths, which starts with the widest."""

    def __init__(self, cost: Cost, lost: Sequence[Curve], ceiling: float) -> None:
        self.cost, self.ceiling = cost, ceiling * (1 + 1e-12)
        self.widths = [sorted(curve, reverse=True) for curve in lost]
        self.lost = [
            np.array([curve[width] for width in widths]) for curve, widths in zip(lost, self.widths, strict=True)
        ]
        self.factors = [
            np.array([cost.factor(unit, width) for width in widths]) for unit, widths in enumerate(self.widths)
        ]
        self.at = [0] * len(lost)

    def run(self) -> list[int]:
        self._narrow()
        for _ in range(SWAPS):
            self._widen()
            if not self._exchange():
                break
        return [widths[place] for widths, place in zip(self.widths, self.at, strict=True)]

    def _now(self) -> Floats:
        return np.array([factors[place] for factors, place in zip(self.factors, self.at, strict=True)])

    def _moves(self, slopes: Floats) -> list[tuple[int, int, float, float]]:
        """Every other width of a unit: unit, place, time saved (negative: spent), extra loss (negative: regained)."""
        moves = []
        for unit, current in enumerate(self.at):
            saved = slopes[unit] * (self.factors[unit][current] - self.factors[unit])
            extra_loss = self.lost[unit] - self.lost[unit][current]
            moves += [(unit, place, saved[place], extra_loss[place]) for place in range(len(saved)) if place != current]
        return moves

    def _narrow(self) -> None:
        while True:
            factors = self._now()
            excess = self.cost.of(factors) - self.ceiling
            if excess <= 0:
                return
            moves = [move for move in self._moves(self.cost.slopes(factors)) if move[2] > 0]
            if not moves:
                return
            # time saved beyond the ceiling is worth nothing
            unit, place, _, _ = min(moves, key=lambda move: max(move[3], 0.0) / min(move[2], excess))
            self.at[unit] = place

    def _widen(self) -> None:
        while True:
            factors = self._now()
            room = self.ceiling - self.cost.of(factors)
            moves = [move for move in self._moves(self.cost.slopes(factors)) if move[3] < 0 and -move[2] <= room]
            if not moves:
                return
            unit, place, _, _ = min(moves, key=lambda move: move[3])
            self.at[unit] = place

    def _exchange(self) -> bool:
        """Apply the best exchange: one unit widened, another narrowed; False if none reduces the loss."""
        before, best = list(self.at), (-1e-12, None)
        factors = self._now()
        if self.cost.of(factors) > self.ceiling:
            return False
        for unit, place, _, first_loss in self._moves(self.cost.slopes(factors)):
            if first_loss >= 0:
                continue
            trial = factors.copy()
            trial[unit] = self.factors[unit][place]
            over = self.cost.of(trial) - self.ceiling
            for other_unit, other_place, saved, second_loss in self._moves(self.cost.slopes(trial)):
                if other_unit != unit and saved >= over and first_loss + second_loss < best[0]:
                    best = (first_loss + second_loss, [(unit, place), (other_unit, other_place)])  # type: ignore[assignment]
        for unit, place in best[1] or ():
            self.at[unit] = place
        return self.at != before
