"""Times of casts and changes of layout between modules, by the changes of grid behind each station."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import nnls

from torchslim.analysis.costs.layout import Change, Layout
from torchslim.analysis.costs.samples import Sample
from torchslim.analysis.costs.sizes import Product, Sum, Work, merged, total

PULL = 1.0
"""Programs' worth of pull of a station's own times towards those of all stations with the same changes."""

Changes = frozenset[tuple[Change, int]]
"""Changes of grid with the number of readers of each."""


@dataclass(frozen=True, kw_only=True)
class Moves:
    """Times of casts and changes of layout over the reference program's.

    Attributes:
        names: kinds of changes that the samples have.
        amounts: for each kind a constant and a time for each element of the station's output, first of one reader, then
            of each further one. The first two amounts are those of stations without a change.
        factors: by station and changes, how its own samples differ.
        outputs: elements of the output of each station.
    """

    names: tuple[Change, ...] = ()
    amounts: tuple[float, ...] = ()
    factors: Mapping[tuple[str, Changes], float] = field(default_factory=dict)
    outputs: Mapping[str, Sum] = field(default_factory=dict)

    def time(self, station: str, changes: Counter[Change]) -> Sum:
        """The time behind a station."""
        constants, slopes = np.reshape(self.amounts, (-1, 2)).T if self.amounts else np.zeros((2, 0))
        counts = _counts(changes, self.names)[: len(constants)]
        factor = self.factors.get((station, frozenset(changes.items())), 1.0)
        slope = factor * float(slopes @ counts)
        products = [Product(amount=factor * float(constants @ counts))]
        products += [Product(amount=slope * term.amount, dims=term.dims) for term in self.outputs.get(station, ())]
        return tuple(product for product in merged(products) if product.amount)


def fit_moves(
    samples: Sequence[Sample], works: Mapping[str, Work], layout: Layout, kept: Sequence[Mapping[int, float]]
) -> Moves:
    """Fit the times behind all stations together, then a factor for each station and set of changes.

    Errors count relative to the programs' times.

    Args:
        samples: measured programs.
        works: work of each module.
        layout: the stations.
        kept: kept fraction of every unit in each sample.
    """
    outputs = {station: works[station].output if station in works else () for station in layout.readers}
    changes = [
        {station: layout.changes(station, sample.choice.schemes) for station in layout.readers} for sample in samples
    ]
    names = tuple(sorted({change for by_station in changes for counts in by_station.values() for change in counts}))
    rows, times, weights, keys = [], [], [], []
    for sample, by_station, fractions in zip(samples, changes, kept, strict=True):
        sums: Counter[str] = Counter()
        for path, time in sample.moves.items():
            sums[path if path in layout.readers else layout.station(path)] += time  # type: ignore[assignment]
        for station, counts in by_station.items():
            elements = float(total(outputs[station], fractions))
            rows.append(np.outer(_counts(counts, names), [1.0, elements]).ravel())
            times.append(float(sums[station]))
            weights.append(1.0 / sample.ratio)
            keys.append((station, frozenset(counts.items())))
    table, target, weight = np.array(rows), np.array(times), np.array(weights)
    scale = np.maximum(table.max(axis=0), 1e-9)
    amounts = nnls(table / scale * weight[:, None], target * weight)[0] / scale
    fitted = table @ amounts
    factors: dict[tuple[str, Changes], float] = {}
    for key in set(keys):
        own = np.array([place for place, other in enumerate(keys) if other == key])
        expected, found = fitted[own] * weight[own], target[own] * weight[own]
        pull = PULL * float(np.mean(expected**2))
        if pull > 0:
            factors[key] = float((expected @ found + pull) / (expected @ expected + pull))
    return Moves(names=names, amounts=tuple(amounts.tolist()), factors=factors, outputs=outputs)


def _counts(changes: Counter[Change], names: Sequence[Change]) -> list[float]:
    """1 without changes, then for each kind whether there is one, and how many further ones."""
    counts = [0.0 if changes else 1.0]
    for name in names:
        counts += [float(changes[name] > 0), float(max(changes[name] - 1, 0))]
    return counts
