"""Damage of widths, schemes and dropped blocks in one unit, as terms of an allocation problem.

Single changes come from a sensitivity analysis. They do not simply add up: damages of several changes at once are
measured on random joint choices, and after training on the choices that were trained. Both are described by

    damage = (sum over kinds k of weight_k * sum over the decisions of kind k of single_damage ** power) ** (1 / power)

(after training without the outer power, and plus an offset: what training itself costs).

The weights say how much one kind of change counts against another, the power how small changes count against large
ones: below 1, training brings back more of the large ones. Minimizing the damage is minimizing the inner sum, which a
solver takes as terms over single decisions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchslim.allocation.problem import Decision, Floats, Term
from torchslim.analysis.result import Point, Sensitivity

WIDTH, SCHEME, BLOCK = "width", "scheme", "block"
POWERS = (0.25, 0.375, 0.5, 0.75, 1.0, 1.5, 2.0)
PULL, PULL_OF_OFFSET = 0.3, 0.1
"""How much weights are kept near those of a prior, and an offset near 0, in relative errors of one measurement."""

LEAST = 1e-9
"""Damage of a change that the measure cannot tell from none: it still comes after changing nothing."""


def kind_of(decision: Decision) -> str:
    """The kind of a decision: the first word of its name."""
    return decision.name.partition(" ")[0]


@dataclass(frozen=True, kw_only=True)
class DamageTable:
    """The damage of each option of each decision, all other decisions unchanged.

    Attributes:
        decisions: of the problem.
        singles: for each decision the damage by option, 0 for option 0.
    """

    decisions: tuple[Decision, ...]
    singles: tuple[Floats, ...]

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of decisions, each once."""
        return tuple(dict.fromkeys(map(kind_of, self.decisions)))

    def sums(self, places: Sequence[int], power: float) -> Floats:
        """Sums of the damages of a choice raised to `power`, by kind: (kinds,)."""
        totals = dict.fromkeys(self.kinds, 0.0)
        for decision, single, place in zip(self.decisions, self.singles, places, strict=True):
            totals[kind_of(decision)] += float(single[place]) ** power
        return np.array(list(totals.values()))

    def terms(self, law: AdditionLaw) -> tuple[Term, ...]:
        """The terms to minimize: a choice with a smaller sum has less damage by the law."""
        weights = dict(zip(self.kinds, law.weights, strict=True))
        return tuple(
            Term(decisions=(number,), values=weights[kind_of(decision)] * single**law.power)
            for number, (decision, single) in enumerate(zip(self.decisions, self.singles, strict=True))
        )

    def predicted(self, places: Sequence[int], law: AdditionLaw) -> float:
        """The damage of a choice by a law."""
        return float((self.sums(places, law.power) @ np.array(law.weights)) ** (1 / law.outer)) + law.offset


@dataclass(frozen=True, slots=True, kw_only=True)
class AdditionLaw:
    """How damages add up.

    Attributes:
        power: of single damages.
        weights: by kind, in the order of `DamageTable.kinds`.
        outer: the sum is raised to 1 / outer: the power, if the sum is a damage of the same unit, or 1.
        offset: what every choice loses, such as by training on little data.
        error: median factor, above 1, between the predicted and the measured damages that it was fitted to.
        count: number of these.
    """

    power: float
    weights: tuple[float, ...]
    outer: float
    offset: float = 0.0
    error: float = 1.0
    count: int = 0


def plain_law(table: DamageTable) -> AdditionLaw:
    """The law by which damages simply add up."""
    return AdditionLaw(power=1.0, weights=(1.0,) * len(table.kinds), outer=1.0)


def fitted(
    table: DamageTable,
    choices: Sequence[Sequence[int]],
    damages: Sequence[float],
    *,
    powers: Sequence[float] = POWERS,
    prior: AdditionLaw | None = None,
    floor: float = 0.0,
) -> AdditionLaw:
    """The law that describes measured damages of joint choices best: weights by non-negative least squares.

    Args:
        table: of single damages.
        choices: places of the options of each choice.
        damages: of the choices; with a prior they may be in another unit, such as points of a metric.
        powers: to try.
        prior: a law that relative weights stay near, as far as the damages leave them open; its sum is then not raised
            to a power, and the law has an offset.
        floor: damages below it count as this much: smaller ones are noise.

    Returns:
        The prior, or the plain law, if there are no damages.
    """
    measured = np.maximum(np.asarray(damages, dtype=float), max(floor, LEAST))
    best: AdditionLaw | None = None
    for power in powers if len(measured) else ():
        outer = 1.0 if prior is not None else power
        sums = np.array([table.sums(choice, power) for choice in choices])
        pull = _pull(table, prior, power)
        weights, offset = _weights(sums, measured**outer, pull, with_offset=prior is not None)
        predicted = np.maximum(sums @ weights, LEAST) ** (1 / outer) + offset
        logs = np.abs(np.log(np.maximum(predicted, max(floor, LEAST)) / measured))
        law = AdditionLaw(
            power=power,
            weights=tuple(weights.tolist()),
            outer=outer,
            offset=offset,
            error=float(np.exp(np.median(logs))),
            count=len(measured),
        )
        if best is None or _misfit(law) < _misfit(best):
            best = law
    return best if best is not None else prior if prior is not None else plain_law(table)


def _misfit(law: AdditionLaw) -> tuple[float, float]:
    return law.error, abs(np.log(law.power))


def _pull(table: DamageTable, prior: AdditionLaw | None, power: float) -> Floats:
    """Relative weights to stay near: equal ones, or those at which the prior's kinds count as they did before."""
    if prior is None:
        return np.ones(len(table.kinds))
    largest = [float(max((single.max() for d, single in _of(table, kind)), default=1.0)) for kind in table.kinds]
    scales = np.maximum(np.array(largest), LEAST)
    pull: Floats = np.array(prior.weights) * scales ** (prior.power - power)
    return pull


def _of(table: DamageTable, kind: str) -> Iterable[tuple[Decision, Floats]]:
    pairs = zip(table.decisions, table.singles, strict=True)
    return [(decision, single) for decision, single in pairs if kind_of(decision) == kind]


def _weights(sums: Floats, targets: Floats, pull: Floats, *, with_offset: bool) -> tuple[Floats, float]:
    """Weights and an offset of at least 0 that reproduce the targets up to relative errors.

    The weights stay near a multiple of `pull`, the offset near 0.
    """
    from scipy.optimize import nnls

    scale = 1 / targets
    along = (sums @ pull) * scale
    multiple = float(along.sum() / max(along @ along, 1e-300))  # of `pull` alone
    center = np.maximum(multiple * pull, 1e-300)
    # in units of the center, so that the pull treats all kinds alike, and of the least target
    columns = [sums * scale[:, None] * center, (scale * targets.min())[:, None] * with_offset]
    pulls = np.diag([PULL] * len(pull) + [PULL_OF_OFFSET])
    right = np.concatenate([np.ones(len(targets)), np.full(len(pull), PULL), [0.0]])
    found: Floats = nnls(np.concatenate([np.concatenate(columns, 1), pulls]), right)[0]
    return found[:-1] * center, float(found[-1] * targets.min())


def damage_table(
    decisions: Sequence[Decision], sensitivities: Iterable[Sensitivity], blocks: Mapping[str, float] | None = None
) -> DamageTable:
    """Damages of all options, interpolated between measured amounts.

    A width that was not measured, and one beyond the measured ones, gets the damage of the nearest narrower measured
    one, or else infinity in the place of a finite number: the largest damage in the table, times the fraction removed.
    A group that was not measured at all counts as the most sensitive one.

    Args:
        decisions: of the problem: "width NAME" with widths, "scheme NAME" with schemes, "block NAME".
        sensitivities: analyses with one measure.
        blocks: damage of dropping each block.
    """
    points = [(found.damage(point), point) for found in sensitivities for point in found.points]
    known = [(float(damage), point) for damage, point in points if damage is not None]
    worst = max([LEAST, *(damage for damage, _ in known), *(blocks or {}).values()])
    index = _Index(known)
    return DamageTable(
        decisions=tuple(decisions),
        singles=tuple(_single(decision, index, blocks or {}, worst) for decision in decisions),
    )


@dataclass
class _Index:
    """Damages by group and amount, and by layer and scheme."""

    points: Sequence[tuple[float, Point]]
    groups: dict[str, dict[float, float]] = field(default_factory=dict)
    layers: dict[tuple[str, str], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for damage, point in self.points:
            if point.amount is None:
                self.layers[point.name, point.change] = damage
            else:
                for name in (point.name, *point.groups):
                    self.groups.setdefault(name, {})[point.amount] = damage


def _single(decision: Decision, index: _Index, blocks: Mapping[str, float], worst: float) -> Floats:
    kind, _, name = decision.name.partition(" ")
    options: Sequence[Any] = decision.options
    if kind == WIDTH:
        removed = np.array([1 - width / options[0] for width in options])
        return _interpolated(removed, _amounts(name, index), worst)
    if kind == SCHEME:
        known = [index.layers.get((name, str(scheme)), worst) for scheme in options]
        return np.array([0.0, *(max(damage, LEAST) for damage in known[1:])])
    return np.array([0.0, *(max(blocks.get(name, worst), LEAST) for _ in options[1:])])


def _amounts(name: str, index: _Index) -> Mapping[float, float]:
    """Damages by the fraction removed of a unit, whose name may consist of the names of its groups."""
    for key in (name, *name.split(" ")):
        if key in index.groups:
            return index.groups[key]
    return {}


def _interpolated(removed: Floats, amounts: Mapping[float, float], worst: float) -> Floats:
    """Damages that never fall where more is removed: linear between measured amounts, proportional beyond them."""
    if not amounts:
        return worst * removed
    places = np.array([0.0, *sorted(amounts)])
    rising = np.maximum.accumulate([0.0, *(max(amounts[place], LEAST) for place in sorted(amounts))])
    inside: NDArray[np.float64] = np.interp(removed, places, rising)
    beyond = removed > places[-1]
    inside[beyond] = rising[-1] * removed[beyond] / places[-1]
    return inside
