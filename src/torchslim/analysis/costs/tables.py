"""Cost tables: decisions about widths, schemes and blocks, and what every choice of their options costs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product as combinations

import numpy as np
from numpy.typing import NDArray

from torchslim.allocation.problem import Decision, Term
from torchslim.analysis.costs.fit import Curve, Fit
from torchslim.analysis.costs.layout import Layout
from torchslim.analysis.costs.programs import Choice
from torchslim.analysis.costs.sizes import Sum, Work
from torchslim.core.measurement import Measurement
from torchslim.prune.dependency.coupling import Coupling
from torchslim.prune.structured.selection import losses
from torchslim.prune.structured.widths import widths_of
from torchslim.quantize.schemes import FLOAT

Floats = NDArray[np.float64]

KEEP, DROP = "keep", "drop"

TOGETHER = 3
"""Units in one term at most: its table has an entry for every joint choice."""

JOINT_SCHEMES = 32
"""Joint choices of schemes in one term at most."""

NEGLIGIBLE = 1e-5
"""Terms below this share of the reference's time are left out."""


@dataclass(frozen=True, kw_only=True)
class Space:
    """The decisions about a model.

    Attributes:
        coupling: the units of coupled channels.
        kept: for each unit the numbers of steps that it may keep, the full width first.
        schemes: for each layer that can leave float its schemes, "float" first.
        blocks: paths of the modules that go with each block, by the block's name.
    """

    coupling: Coupling
    kept: Sequence[Sequence[int]]
    schemes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    blocks: Mapping[str, Collection[str]] = field(default_factory=dict)

    def decisions(self) -> tuple[Decision, ...]:
        """Widths of units, then schemes of layers, then blocks.

        A width is named after the first group of its unit, and its options are numbers of channels of that group.
        """
        widths = []
        for unit, kept in zip(self.coupling.units, self.kept, strict=True):
            group = self.coupling.groups[unit.groups[0]]
            loss = losses(unit, self.coupling)[unit.groups[0]]
            options = tuple(len(group.classes) - (unit.width - steps) * loss for steps in kept)
            widths.append(Decision(name=f"width {group.name}", options=options))
        schemes = [Decision(name=f"scheme {layer}", options=tuple(own)) for layer, own in self.schemes.items()]
        blocks = [Decision(name=f"block {name}", options=(KEEP, DROP)) for name in self.blocks]
        return (*widths, *schemes, *blocks)

    def fractions(self, unit: int) -> Floats:
        """Kept fraction of a unit for each of its options."""
        return np.array(self.kept[unit], dtype=np.float64) / self.coupling.units[unit].width

    def choice(self, places: Sequence[int]) -> Choice:
        """The choice of one option, by its place, of every decision."""
        count = len(self.kept)
        kept = tuple(own[place] for own, place in zip(self.kept, places[:count], strict=True))
        of_schemes = places[count : count + len(self.schemes)]
        schemes = {layer: own[place] for (layer, own), place in zip(self.schemes.items(), of_schemes, strict=True)}
        return Choice(kept=kept, schemes=schemes)

    def places(self, choice: Choice) -> tuple[int, ...]:
        """The inverse of `choice`; every block stays."""
        widths = [own.index(steps) for own, steps in zip(self.kept, choice.kept, strict=True)]
        schemes = [list(own).index(choice.schemes.get(layer, FLOAT)) for layer, own in self.schemes.items()]
        return (*widths, *schemes, *([0] * len(self.blocks)))

    def widths(self, places: Sequence[int]) -> dict[str, int]:
        """The chosen widths by group, for `Prune(pattern="channel", widths=...)`; groups that stay are left out."""
        chosen = widths_of(self.coupling, self.choice(places).kept)
        full = widths_of(self.coupling, [unit.width for unit in self.coupling.units])
        return {name: width for name, width in chosen.items() if width != full[name]}

    def layers(self, places: Sequence[int]) -> dict[str, str]:
        """The chosen schemes by layer, for `Quantize(layers=...)`, outer modules first."""
        schemes = self.choice(places).schemes
        return dict(sorted(schemes.items(), key=lambda pair: pair[0].count(".")))

    def dropped(self, places: Sequence[int]) -> list[str]:
        """Names of the blocks that go."""
        of_blocks = places[len(self.kept) + len(self.schemes) :]
        return [name for name, place in zip(self.blocks, of_blocks, strict=True) if place]


@dataclass(frozen=True, kw_only=True)
class CostTables:
    """What every choice costs.

    Attributes:
        space: the decisions and what their options mean.
        decisions: of the space.
        costs: terms of "latency" in ms, "size_bytes", "macs", "params" and "memory_bytes".
        upper: terms of the latency at the upper end (90th percentile) of the samples, for ceilings that must hold.
        reference: milliseconds of the float model at full width.
        spread: 10th and 90th percentile of measured over predicted times of programs, each predicted without itself.
        programs: number of programs that were timed.
    """

    space: Space
    decisions: tuple[Decision, ...]
    costs: Mapping[str, tuple[Term, ...]]
    upper: tuple[Term, ...]
    reference: Measurement
    spread: tuple[float, float] = (1.0, 1.0)
    programs: int = 0

    def predict(self, places: Sequence[int], cost: str = "latency") -> float:
        """A cost for one option, by its place, of every decision."""
        return sum((term.at(places) for term in self.costs[cost]), 0.0)


def latency_terms(
    space: Space, layout: Layout, works: Mapping[str, Work], fit: Fit, *, unit_ms: float, upper: bool = False
) -> tuple[Term, ...]:
    """Terms of a fit's times.

    Args:
        space: the decisions.
        layout: what decides how modules compute.
        works: of the modules that run operations.
        fit: times relative to the reference.
        unit_ms: milliseconds of the reference.
        upper: takes the upper end of every module's spread.
    """
    parts: list[Part] = []
    for path in works:

        def own(schemes: Mapping[str, str], path: str = path) -> Curve:
            return fit.curve(path, layout.context(path, schemes))

        parts.append(Part(path, (path,) if path in layout.layers else layout.deciders(path), own))
    for station in layout.readers:

        def moves(schemes: Mapping[str, str], station: str = station) -> Curve:
            return Curve(time=fit.moves.time(station, layout.passes(station, schemes)))

        parts.append(Part(station, layout.deciders(station), moves))
    terms = [Term(decisions=(), values=np.array(fit.constant * unit_ms))] if fit.constant else []
    for part in parts:
        for term in part.terms(space, upper):
            if np.abs(term.values).max() > NEGLIGIBLE:
                terms.append(Term(decisions=term.decisions, values=term.values * unit_ms))
    return tuple(terms)


def sum_terms(space: Space, amounts: Mapping[str, Sum]) -> tuple[Term, ...]:
    """Terms of sums of sizes by module; a module without sizes of its own costs nothing where its block is dropped."""
    return tuple(
        term
        for path, amount in amounts.items()
        for term in Part(path, (), partial(_always, Curve(time=amount))).terms(space)
    )


def _always(curve: Curve, schemes: Mapping[str, str]) -> Curve:
    """The same curve for all schemes."""
    return curve


def scheme_terms(space: Space, layer: str, amounts: Mapping[str, Sum]) -> tuple[Term, ...]:
    """Terms of the sizes of a layer by its scheme."""
    part = Part(layer, (layer,), lambda schemes: Curve(time=amounts[schemes.get(layer, FLOAT)]))
    return tuple(part.terms(space))


@dataclass(frozen=True, slots=True)
class Part:
    """A module's share of a cost: a curve for each joint choice of the schemes of `deciders`."""

    path: str
    deciders: Sequence[str]
    curve: Callable[[Mapping[str, str]], Curve]

    def terms(self, space: Space, upper: bool = False) -> Iterator[Term]:
        """Its terms over units, schemes and blocks."""
        names = list(space.schemes)
        deciding = self._deciding(space)
        rest = [layer for layer in self.deciders if layer not in deciding]
        joint = list(combinations(*(space.schemes[layer] for layer in deciding)))
        curves = []
        for schemes in joint:
            chosen = dict(zip(deciding, schemes, strict=True))
            # layers beyond those of the table are taken to be as the last of these is
            curves.append(self.curve(chosen | dict.fromkeys(rest, schemes[-1] if schemes else FLOAT)))
        blocks = [number for number, paths in enumerate(space.blocks.values()) if _inside(self.path, paths)]
        every = sorted({unit for curve in curves for product in curve.time for unit in product.units})
        few = len(every) <= TOGETHER
        sets = [tuple(every)] if few else _sets(curves)
        for units in sets:
            values = np.stack([_at(curve, units, few, space, upper) for curve in curves], axis=-1)
            values = values.reshape([*values.shape[:-1], *(len(space.schemes[layer]) for layer in deciding)])
            first = len(space.kept)
            decisions = (*units, *(first + names.index(layer) for layer in deciding))
            for number in blocks:
                values = np.stack([values, np.zeros_like(values)], axis=-1)
                decisions = (*decisions, first + len(names) + number)
            yield _squeezed(Term(decisions=decisions, values=values))

    def _deciding(self, space: Space) -> list[str]:
        """The first of the deciders, whose joint choices are few."""
        found: list[str] = []
        count = 1
        for layer in self.deciders:
            count *= len(space.schemes.get(layer, ()))
            if not 0 < count <= JOINT_SCHEMES:
                break
            found.append(layer)
        return found


def _sets(curves: Sequence[Curve]) -> list[tuple[int, ...]]:
    """The sets of units of all products."""
    return sorted({tuple(sorted(product.units)) for curve in curves for product in curve.time})


def _at(curve: Curve, units: Sequence[int], few: bool, space: Space, upper: bool) -> Floats:
    """The time on the grid of the options of `units`: of all products if these are `few`, else of those on `units`."""
    grid = {
        unit: space.fractions(unit).reshape([-1 if axis == place else 1 for axis in range(len(units))])
        for place, unit in enumerate(units)
    }
    values = np.zeros([len(space.kept[unit]) for unit in units])
    for product in curve.time:
        if few or product.units == frozenset(units):
            values = values + product.at(grid)
    return values * (max(curve.high, 1.0) if upper else 1.0)


def _squeezed(term: Term) -> Term:
    """The term without decisions that do not change it."""
    decisions, values = list(term.decisions), term.values
    for axis in reversed(range(values.ndim)):
        first = values.take([0], axis)
        if np.allclose(values, first, rtol=1e-12, atol=0.0):
            values = first.squeeze(axis)
            del decisions[axis]
    return Term(decisions=tuple(decisions), values=values)


def _inside(path: str, modules: Collection[str]) -> bool:
    return any(path == module or path.startswith(f"{module}.") for module in modules)
