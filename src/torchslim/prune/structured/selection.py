"""Selection of channels: units ranked by the scores of their classes, and narrowed until the target is met."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import gcd, lcm
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from torchslim.core.checks import check_fields
from torchslim.errors import PruneError
from torchslim.prune.dependency.coupling import Coupling, Mask
from torchslim.prune.dependency.groups import Group, Unit
from torchslim.prune.masking.selection import check_sparsity

Of = Literal["params", "macs", "channels", "latency"]
Scope = Literal["global", "layer"]
Scores = Callable[[Coupling, Group], NDArray[np.float64]]


NEAR = 0.02
"""How far from its target a removal is near enough."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Amount:
    """How much to remove, and in what steps; or the widths of groups by name, then `sparsity` does not count."""

    sparsity: float = 0.5
    of: Of = "params"
    scope: Scope = "global"
    round_to: int = 8
    min_channels: int = 8
    widths: Mapping[str, int] | None = None

    def __post_init__(self) -> None:
        check_fields(self, PruneError)
        self._check_widths()
        check_sparsity(self.sparsity)
        for name, value, choices in (("of", self.of, get_args(Of)), ("scope", self.scope, get_args(Scope))):
            if value not in choices:
                raise PruneError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
        if self.of == "latency" and self.scope == "layer":
            raise PruneError(
                "of='latency' chooses each group's width by what it saves; leave out scope='layer', or take of='macs'"
            )
        for name, count in (("round_to", self.round_to), ("min_channels", self.min_channels)):
            if not isinstance(count, int) or count < 1:
                raise PruneError(f"{name} must be a whole number of at least 1, got {count!r}")

    def _check_widths(self) -> None:
        if self.widths is None:
            return
        if not self.widths:
            raise PruneError("widths names no layer: {}; give at least one, such as {'conv1': 48}")
        for name, width in self.widths.items():
            if width < 1:
                raise PruneError(f"widths[{name!r}] must be at least 1, got {width}; a whole layer cannot go")
        if self.of != "params" or self.scope != "global":
            raise PruneError("of and scope belong to sparsity; leave them out with widths")


def amount_of(*, sparsity: float | None, widths: Mapping[str, int] | None = None, **fields: Any) -> Amount:
    """The amount for a sparsity, or for widths: these need be no multiples unless `fields` say so."""
    if widths is None:
        return Amount(**fields) if sparsity is None else Amount(sparsity=sparsity, **fields)
    return Amount(**{"round_to": 1, "min_channels": 1, **fields}, widths=widths)


def losses(unit: Unit, coupling: Coupling) -> dict[int, int]:
    """Number of channels that each group of a unit loses per step: one for each part that must stay equal to others."""
    counts = dict.fromkeys(unit.groups, 0)
    for cell in unit.cells:
        number = next(group for group in unit.groups if cell.classes[0] in coupling.groups[group].classes)
        counts[number] += cell.stride
    return counts


def is_bound(unit: Unit) -> bool:
    """Whether parts of a unit shrink in step, so that its groups lose several channels at once."""
    return len(unit.cells) > 1 or unit.cells[0].stride > 1


def least_steps(unit: Unit, coupling: Coupling, min_channels: int) -> int:
    """Least number of steps of a unit: its narrowest group keeps `min_channels`; 1 if that group has fewer."""
    pace = min(losses(unit, coupling).values())
    return -(-min_channels // pace) if unit.width * pace >= min_channels else 1


def step_size(unit: Unit, coupling: Coupling, amount: Amount, *, ease: int = 1, narrowest: int = 1) -> int:
    """Steps that a unit loses at once to keep its widths multiples of `round_to`; 1 if the unit is narrower.

    If parts must stay equal and no narrower width is such a multiple, widths are multiples of a smaller divisor.

    Args:
        ease: divides `round_to` for units whose parts must stay equal.
        narrowest: no width is below this.
    """
    paces = []
    for number, pace in losses(unit, coupling).items():
        group = coupling.groups[number]
        paces.append(pace * max(len(member.indices) // max(len(group.classes), 1) for member in group.members))
    round_to = max(amount.round_to // ease, 1) if is_bound(unit) else amount.round_to
    low = max(least_steps(unit, coupling, amount.min_channels), narrowest)
    while True:
        step = lcm(*(round_to // gcd(round_to, pace) for pace in paces))
        if not is_bound(unit):
            return step if unit.width >= step else 1
        if -(-low // step) * step < unit.width or round_to == 1:
            return step
        round_to = max(index for index in range(1, round_to) if round_to % index == 0)


def rounded(unit: Unit, kept: float, step: int, least: int, narrowest: int = 1) -> int:
    """The nearest allowed width: a multiple of `step`, at least `least` and `narrowest`, at most the unit's."""
    low = -(-max(least, narrowest) // step) * step  # a whole number of steps
    nearest = round(kept / step) * step if step > 1 else round(kept)
    return max(min(nearest, unit.width), min(low, unit.width), 1)


@dataclass
class Selection:
    """Which classes to remove, for any width: the classes of every unit in the order in which they go."""

    coupling: Coupling
    amount: Amount
    names: Sequence[str]
    order: list[list[NDArray[np.int64]]]  # per unit and cell: classes, the least important first
    ranks: list[NDArray[np.float64]]  # per unit: the score of each of its steps, rising
    narrowest: int = 1
    ease: int = 1  # divides `round_to` where parts must stay equal
    _known: dict[int, list[tuple[int, int]]] = field(default_factory=dict)

    def removed(self, kept: Sequence[int]) -> Mask:
        """Mask of the atoms that go if the units keep `kept` steps."""
        mask = np.zeros(self.coupling.atoms.count, dtype=bool)
        for unit, cells, steps in zip(self.coupling.units, self.order, kept, strict=True):
            for cell, classes in zip(unit.cells, cells, strict=True):
                mask[classes[: (unit.width - steps) * cell.stride]] = True
        mask.setflags(write=False)
        return mask

    def left(self, kept: Sequence[int]) -> float:
        """Fraction of the model that is left, in the measure `amount.of`; of the channels for "latency"."""
        if self.amount.of in ("channels", "latency"):
            total = sum(unit.width for unit in self.coupling.units)
            return sum(kept) / max(total, 1)
        removed = self.removed(kept)
        nothing = np.zeros_like(removed)
        if self.amount.of == "macs":
            return self.coupling.macs(removed) / max(self.coupling.macs(nothing), 1)
        return self.coupling.parameters(removed, self.names) / max(self.coupling.parameters(nothing, self.names), 1)

    def widths(self, wanted: Sequence[float]) -> list[int]:
        """The allowed widths nearest to the wanted ones."""
        return [
            rounded(unit, width, step, least, self.narrowest)
            for unit, width, (step, least) in zip(self.coupling.units, wanted, self._steps(), strict=True)
        ]

    def _steps(self) -> list[tuple[int, int]]:
        """The step and the least width of each unit."""
        if self.ease not in self._known:
            self._known[self.ease] = [
                (
                    step_size(unit, self.coupling, self.amount, ease=self.ease, narrowest=self.narrowest),
                    least_steps(unit, self.coupling, self.amount.min_channels),
                )
                for unit in self.coupling.units
            ]
        return self._known[self.ease]

    def choose(self) -> list[int]:
        """Number of steps that each unit keeps, so that the fraction left is as near the target as possible.

        If the target cannot be reached, `round_to` is relaxed for the units whose parts must stay equal.
        """
        target = 1 - self.amount.sparsity
        best = kept = self._nearest()
        while abs(self.left(best) - target) > NEAR and 2 * self.ease <= self.amount.round_to:
            if not any(map(is_bound, self.coupling.units)):
                break
            self.ease *= 2
            kept = self._nearest()
            best = min((best, kept), key=lambda widths: abs(self.left(widths) - target))
        return best

    def _nearest(self) -> list[int]:
        units, target = self.coupling.units, 1 - self.amount.sparsity
        if self.amount.scope == "layer":
            if self.amount.of == "channels":
                return self.widths([unit.width * target for unit in units])

            def at(progress: float) -> list[int]:
                return self.widths([unit.width * (1 - progress) for unit in units])

            return self._search(at, np.linspace(0, 1, 513))
        scores = np.concatenate(self.ranks) if units else np.zeros(0)
        owner = np.repeat(np.arange(len(units)), [len(ranks) for ranks in self.ranks])
        queue = owner[np.argsort(scores, kind="stable")]

        def after(count: float) -> list[int]:
            removed_steps = np.bincount(queue[: int(count)], minlength=len(units)) if units else np.zeros(0)
            return self.widths([unit.width - steps for unit, steps in zip(units, removed_steps.tolist(), strict=True)])

        return self._search(after, np.arange(len(queue) + 1))

    def _search(self, at: Callable[[float], list[int]], grid: NDArray[Any]) -> list[int]:
        """The widths nearest the target, by bisection: the fraction left falls along the grid."""
        target, low, high = 1 - self.amount.sparsity, 0, len(grid) - 1
        while low < high:
            middle = (low + high) // 2
            if self.left(at(float(grid[middle]))) > target:
                low = middle + 1
            else:
                high = middle
        options = [at(float(grid[place])) for place in {max(low - 1, 0), low}]
        return min(options, key=lambda kept: abs(self.left(kept) - target))


def select(
    coupling: Coupling, amount: Amount, names: Sequence[str], scores: Scores, *, narrowest: int = 1
) -> Selection:
    """Rank the classes of every unit; in units of several cells, the lowest of each cell go together."""
    values = np.zeros(coupling.atoms.count)
    for unit in coupling.units:
        for number in unit.groups:
            group = coupling.groups[number]
            values[group.classes] = scores(coupling, group)
    order, ranks = [], []
    for unit in coupling.units:
        cells, steps = [], np.zeros(unit.width)
        for cell in unit.cells:
            ranked = cell.classes[np.argsort(values[cell.classes], kind="stable")]
            cells.append(ranked)
            steps += values[ranked[: unit.width * cell.stride]].reshape(unit.width, cell.stride).mean(1)
        order.append(cells)
        ranks.append(np.maximum.accumulate(steps / len(unit.cells)))
    return Selection(coupling, amount, names, order, ranks, narrowest)
