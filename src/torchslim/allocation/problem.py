"""An allocation problem: decisions with a few options each, and tables of the damage and the costs of the options.

Damage and each cost are sums of terms. A term is a table over a few decisions, so what one decision costs may depend on
others: the time of a convolution on the width before it, its own width and its precision.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from torchslim.errors import AllocationError

Floats = NDArray[np.float64]

LATENCY, SIZE_BYTES, MACS, PARAMS, MEMORY_BYTES = "latency", "size_bytes", "macs", "params", "memory_bytes"


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """A choice to make: "width layer1.0.conv1", "scheme layer1.0.conv1" or "block layer1.1".

    Option 0 leaves the model as it is: the full width (widths fall), "float", or "keep" of ("keep", "drop").
    """

    name: str
    options: tuple[object, ...]

    def __post_init__(self) -> None:
        if not self.options:
            raise AllocationError(f"decision {self.name!r} has no options; give at least the one that changes nothing")


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """A table over a few decisions, one summand of a damage or a cost.

    Attributes:
        decisions: places in `Problem.decisions`, each once; () for a constant.
        values: an axis for each of `decisions`, as long as the decision has options.
    """

    decisions: tuple[int, ...]
    values: Floats

    def __post_init__(self) -> None:
        values = np.asarray(self.values, dtype=np.float64)
        object.__setattr__(self, "values", values)
        if values.ndim != len(self.decisions) or len(set(self.decisions)) < len(self.decisions):
            raise AllocationError(
                f"a term over decisions {self.decisions} needs distinct decisions and as many axes, got shape "
                f"{values.shape}"
            )
        if not np.isfinite(values).all():
            raise AllocationError(f"the term over decisions {self.decisions} has values that are not finite")

    def at(self, places: Sequence[int]) -> float:
        """The value for one option of every decision of the problem."""
        return float(self.values[tuple(places[decision] for decision in self.decisions)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Choose an option of every decision: the least damage with every limited cost at most its limit.

    Attributes:
        decisions: what to choose.
        damage: summands of what is minimized.
        costs: summands of each cost by its name: "latency", "size_bytes", "macs", "params", "memory_bytes".
        limits: the largest value of some of the costs.
    """

    decisions: tuple[Decision, ...]
    damage: tuple[Term, ...]
    costs: Mapping[str, tuple[Term, ...]] = field(default_factory=dict)
    limits: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [decision.name for decision in self.decisions]
        if len(set(names)) < len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise AllocationError(f"decisions have one name: {', '.join(twice)}; name each differently")
        for what, terms in (("damage", self.damage), *self.costs.items()):
            for term in terms:
                _check(what, term, self.decisions)
        unknown = sorted(set(self.limits) - set(self.costs))
        if unknown:
            raise AllocationError(
                f"limits of unknown costs: {', '.join(unknown)}; this problem has {', '.join(self.costs) or 'none'}"
            )
        for name, limit in self.limits.items():
            if np.isnan(limit):
                raise AllocationError(f"the limit of {name} is not a number")

    def total(self, terms: Iterable[Term], places: Sequence[int]) -> float:
        """The sum of terms for one option, by its place, of every decision."""
        return sum((term.at(places) for term in terms), 0.0)

    def options(self, places: Sequence[int]) -> dict[str, object]:
        """The chosen options by the names of the decisions, from their places."""
        return {decision.name: decision.options[place] for decision, place in zip(self.decisions, places, strict=True)}

    def places(self, options: Mapping[str, object]) -> tuple[int, ...]:
        """Places of options by the names of the decisions; decisions that are not named keep option 0."""
        known = {decision.name for decision in self.decisions}
        if not known >= set(options):
            raise AllocationError(f"no such decisions: {', '.join(sorted(set(options) - known))}")
        return tuple(_place(decision, options.get(decision.name, decision.options[0])) for decision in self.decisions)


def _place(decision: Decision, option: object) -> int:
    try:
        return decision.options.index(option)
    except ValueError:
        raise AllocationError(
            f"{decision.name!r} has no option {option!r}; it has {', '.join(map(repr, decision.options))}"
        ) from None


def _check(what: str, term: Term, decisions: Sequence[Decision]) -> None:
    if not all(0 <= place < len(decisions) for place in term.decisions):
        raise AllocationError(f"a term of {what} names decisions {term.decisions} of {len(decisions)}")
    shape = tuple(len(decisions[place].options) for place in term.decisions)
    if term.values.shape != shape:
        raise AllocationError(
            f"a term of {what} over decisions {term.decisions} has shape {term.values.shape}, but their options are "
            f"{shape}"
        )
