"""From times of single narrowings to the time of any widths, and the widths that keep the most under a ceiling.

A convolution between two narrowed groups is narrowed twice, so savings do not add up. The time of a model over that of
the whole one is taken to be

    T(w) = 1 - sum_o s_o * (1 - prod_{u in o} c_u(w_u))

where s_o is the share of the time that goes to the operations o that a set of units touches, and c_u(w) is what is left
of that time when unit u alone keeps w channels. The curves c_u are such that T is exactly what was measured wherever
one unit alone is narrowed, kernels' staircases included; the shares decide only how narrowings meet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Curve = Mapping[int, float]
"""By width, a number; the full width is in it."""

NOISE = 0.01
"""A narrower width that seems slower by no more than this share of the whole time is taken to be as fast."""

FAITH = 0.1
"""How much the shares of the multiply-accumulates weigh against what was measured."""

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
        """What is left of the time of all that a unit touches; between two measured widths on the line between them."""
        curve = self.curves[unit]
        if width in curve:
            return curve[width]
        known = sorted(curve)
        return float(np.interp(width, known, [curve[each] for each in known]))

    def time(self, widths: Sequence[int]) -> float:
        """The predicted time over the whole model's."""
        return self.of(np.array([self.factor(unit, width) for unit, width in enumerate(widths)]))

    def of(self, factors: Floats) -> float:
        """The same from the units' factors."""
        left = np.where(self.touches, factors, 1.0).prod(1)
        return float(max(1 - self.shares @ (1 - left), 0.0))

    def slopes(self, factors: Floats) -> Floats:
        """By how much the time grows with each unit's factor, all others as they are: (units,)."""
        count = len(factors)
        among = np.where(self.touches, factors, 1.0)
        before = np.cumprod(np.concatenate([np.ones((len(among), 1)), among], 1), 1)[:, :count]
        after = np.cumprod(np.concatenate([np.ones((len(among), 1)), among[:, ::-1]], 1), 1)[:, :count][:, ::-1]
        slopes: Floats = self.shares @ np.where(self.touches, before * after, 0.0)
        return slopes


def smoothed(ratios: Curve) -> dict[int, float]:
    """Times over the whole model's by width, where a narrower width seems slower by mere noise: as fast."""
    found: dict[int, float] = {}
    fastest = np.inf
    for width in sorted(ratios, reverse=True):
        ratio = ratios[width]
        if fastest < ratio <= fastest + NOISE:
            ratio = fastest
        found[width] = ratio
        fastest = min(fastest, ratio)
    return found


def fit(touches: NDArray[np.bool_], work: Floats, ratios: Sequence[Curve]) -> Cost:
    """The model of a table: exact wherever one unit alone is narrowed.

    Args:
        touches: (operations, units), which units each set of operations depends on.
        work: (operations,), the fraction of all multiply-accumulates; what is touched by one unit alone may have none.
        ratios: per unit, its time over the whole model's by width; the full width's is 1.
    """
    count = len(ratios)
    touches = np.concatenate([touches.reshape(-1, count), np.eye(count, dtype=bool)])  # memory-bound work of each unit
    work = np.concatenate([work, np.zeros(count)])
    smooth = [smoothed(each) for each in ratios]
    wanted = np.array([_reach(each) for each in smooth])
    shares = _shares(touches, work, wanted)
    least = np.array([max(1 - min(each.values()), 0.0) for each in smooth])
    missing = np.maximum(least - touches.T.astype(float) @ shares, 0.0)
    shares[len(shares) - count :] += missing  # no factor is below 0
    totals = touches.T.astype(float) @ shares
    curves = [
        {width: 1 - (1 - ratio) / total if total > 1e-12 else 1.0 for width, ratio in each.items()}
        for each, total in zip(smooth, totals.tolist(), strict=True)
    ]
    return Cost(touches, shares, curves)


def _reach(ratios: Curve) -> float:
    """The share of the time that would go with all of a unit, on the line through its measured savings."""
    full = max(ratios)
    gone = np.array([1 - width / full for width in ratios])
    saved = np.array([1 - ratio for ratio in ratios.values()])
    return float(np.clip(gone @ saved / max(gone @ gone, 1e-12), 0.0, 1.0))


def _shares(touches: NDArray[np.bool_], work: Floats, wanted: Floats) -> Floats:
    """Shares of at least 0, of at most 1 together, whose sums over each unit are near `wanted`; else near `work`."""
    among = touches.T.astype(float)
    shares = work.copy()
    curvature = float(np.linalg.norm(among, 2) ** 2) + FAITH
    for _ in range(2000):
        shares = shares - (among.T @ (among @ shares - wanted) + FAITH * (shares - work)) / curvature
        shares = _projected(shares)
    return shares


def _projected(shares: Floats) -> Floats:
    """The nearest point with no share below 0 and a sum of at most 1."""
    kept: Floats = np.maximum(shares, 0.0)
    if kept.sum() <= 1:
        return kept
    falling = np.sort(shares)[::-1]
    over = (np.cumsum(falling) - 1) / np.arange(1, len(shares) + 1)
    level = over[np.flatnonzero(falling > over)[-1]]
    projected: Floats = np.maximum(shares - level, 0.0)
    return projected


def between(points: Sequence[tuple[float, float]], value: float) -> float:
    """Where known pairs of times map a value: on powers between them, as 1 is 1 and what nobody runs takes no time.

    Pairs that are out of order, by noise, are left out.

    >>> between([(0.5, 0.7)], 1.0), round(between([(0.5, 0.7)], 0.25), 2)
    (1.0, 0.49)
    """
    rising = [(0.0, 0.0)]  # in logarithms, from 1 downwards
    for first, second in sorted(points, reverse=True):
        if first > 0 and second > 0 and np.log(first) < rising[-1][0] - 1e-6 and np.log(second) < rising[-1][1] - 1e-6:
            rising.append((float(np.log(first)), float(np.log(second))))
    wanted = float(np.log(max(value, 1e-6)))
    if len(rising) == 1 or wanted >= 0:
        return float(np.exp(wanted))
    if wanted < rising[-1][0]:
        return float(np.exp(wanted * rising[-1][1] / rising[-1][0]))
    falling = rising[::-1]
    return float(np.exp(np.interp(wanted, [each for each, _ in falling], [each for _, each in falling])))


def choose(cost: Cost, lost: Sequence[Curve], ceiling: float) -> list[int]:
    """Per unit a width, so that the predicted time is at most `ceiling` and as little as can be is lost.

    Jumps to any narrower width, the one first that saves the most time for what it loses; then widened again where
    there is room, and exchanged while that loses less. Where no widths keep the ceiling, the fastest.

    Args:
        cost: of the units.
        lost: per unit, by the widths to choose from, how much is lost; the widest is where it starts.
        ceiling: over the whole model's time.
    """
    return _Search(cost, lost, ceiling).run()


class _Search:
    """Widths as they stand, as places in each unit's list of widths, the widest first."""

    def __init__(self, cost: Cost, lost: Sequence[Curve], ceiling: float) -> None:
        self.cost, self.ceiling = cost, ceiling * (1 + 1e-12)
        self.widths = [sorted(each, reverse=True) for each in lost]
        self.lost = [
            np.array([each[width] for width in widths]) for each, widths in zip(lost, self.widths, strict=True)
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
        """Every other width: unit, place, time saved (negative: spent), what is lost more (negative: regained)."""
        moves = []
        for unit, now in enumerate(self.at):
            saved = slopes[unit] * (self.factors[unit][now] - self.factors[unit])
            more = self.lost[unit] - self.lost[unit][now]
            moves += [(unit, place, saved[place], more[place]) for place in range(len(saved)) if place != now]
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
            # what is saved beyond the ceiling is worth nothing
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
        """The best pair of one unit widened and another narrowed; False where none loses less."""
        before, best = list(self.at), (-1e-12, None)
        factors = self._now()
        if self.cost.of(factors) > self.ceiling:
            return False
        for unit, place, _, first in self._moves(self.cost.slopes(factors)):
            if first >= 0:
                continue
            trial = factors.copy()
            trial[unit] = self.factors[unit][place]
            over = self.cost.of(trial) - self.ceiling
            for other, where, saved, second in self._moves(self.cost.slopes(trial)):
                if other != unit and saved >= over and first + second < best[0]:
                    best = (first + second, [(unit, place), (other, where)])  # type: ignore[assignment]
        for unit, place in best[1] or ():
            self.at[unit] = place
        return self.at != before
